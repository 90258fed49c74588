"""How many steps fit into the minutes of `dinocell adapt`.

All candidates are tried with few steps, the best of them again with many.  What a few steps of each took
says how many those few are; when all were tried, the time that is left says how many the many are.  The
few are 10 × a power of 2 and the many 4 to 8 times as many, or up to 79, so that the many alone say what
both were, and a training can be repeated.
"""

import time

LEAST_STEPS, MOST_STEPS = 10, 600
"""Of a training."""

_SHARE = 4


def first_steps(steps: int) -> int:
    """With how many steps all candidates are tried where the best one gets `steps`."""
    few = min(steps, LEAST_STEPS)
    while 2 * _SHARE * few <= steps:
        few *= 2
    return few


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

    def steps_within(self, seconds: float) -> int:
        """The most steps with which everything takes no longer if the slowest candidate is the best."""
        slowest = max(self._seconds, key=lambda name: self._seconds[name][1])

        def needed(steps: int) -> float:
            few = first_steps(steps)
            trials = sum(2 * self._training_s(name, few) for name in self._seconds)
            return trials + (3 if steps > few else 1) * self._training_s(slowest, steps)

        fitting = (n for n in range(MOST_STEPS, LEAST_STEPS, -1) if needed(n) <= seconds)
        return next(fitting, LEAST_STEPS)

    def more_steps_within(self, name: str, few: int, seconds: float) -> int:
        """The most steps with which a candidate that was tried with `few` can be trained thrice."""
        fitting = (
            n
            for n in range(MOST_STEPS, few, -1)
            if first_steps(n) == few and 3 * self._training_s(name, n) <= seconds
        )
        return next(fitting, few)

    def _training_s(self, name: str, steps: int) -> float:
        first, later = self._seconds[name]
        return first + (steps - 1) * later
