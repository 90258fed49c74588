"""How many steps fit into the minutes of `dinocell adapt`."""

import time

LEAST_STEPS, MOST_STEPS = 10, 600
"""Of a training."""

_FIRST_SHARE = 4


def first_steps(steps: int) -> int:
    """With how many steps all candidates are tried where the best one gets `steps`: a quarter, at least ten."""
    return max(min(steps, LEAST_STEPS), steps // _FIRST_SHARE)


class Pace:
    """Seconds that a training of each candidate takes: its first step, with what is copied before it, and
    each later step.
    """

    def __init__(self) -> None:
        self._marks: list[float] = []
        self._seconds: dict[str, tuple[float, float]] = {}

    def begin(self) -> None:
        """A training begins."""
        self._marks = [time.monotonic()]

    def stepped(self) -> None:
        """A step is done."""
        self._marks.append(time.monotonic())

    def end(self, name: str) -> None:
        """The training was one of the candidate `name`."""
        begun, first, last = self._marks[0], self._marks[1], self._marks[-1]
        later_s = (last - first) / (len(self._marks) - 2) if len(self._marks) > 2 else first - begun
        self._seconds[name] = first - begun, later_s

    def seconds(self, steps: int) -> float:
        """All candidates trained twice with `first_steps`; if that is not all, the slowest twice with `steps`;
        and the slowest once more, on all images.
        """
        few = first_steps(steps)
        first, later = max(self._seconds.values(), key=lambda pace: pace[1])
        tried_s = sum(2 * (begun + (few - 1) * each) for begun, each in self._seconds.values())
        return tried_s + (3 if steps > few else 1) * (first + (steps - 1) * later)

    def steps_within(self, seconds: float) -> int:
        """The most steps, from `LEAST_STEPS` to `MOST_STEPS`, that take no longer; the fewest if none fit."""
        fitting = (n for n in range(MOST_STEPS, LEAST_STEPS, -1) if self.seconds(n) <= seconds)
        return next(fitting, LEAST_STEPS)
