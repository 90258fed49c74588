"""How many steps fit into the minutes of `dinocell adapt`.

All candidates are tried with few steps, the best of them again with many.  The speed measured before says
how many the few are, and the time that is left when all were tried how many the many are.  The few are 10
where the many are below 160, else 40: so the many alone say what both were, and a training can be repeated.
"""

import time

LEAST_STEPS, MOST_STEPS = 10, 600
"""Of a training."""

_FEW = 10, 40
_ENOUGH = 160  # of the many, for the greater number of the few
_SURE = 0.85  # of the steps that seem to fit: a speed known from few steps may be wrong by so much


def first_steps(steps: int) -> int:
    """With how many steps all candidates are tried where the best one gets `steps`."""
    return min(steps, _FEW[1] if steps >= _ENOUGH else _FEW[0])


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

    def few_within(self, seconds: float) -> int:
        """With how many steps all candidates should be tried, so that the best one can have the many even if
        it is the slowest.
        """
        slowest = max(self._seconds, key=lambda name: self._seconds[name][1])

        def needed(steps: int) -> float:
            trials = (2 * self._training_s(name, first_steps(steps)) for name in self._seconds)
            return sum(trials) + 3 * self._training_s(slowest, steps)

        fitting = (n for n in range(MOST_STEPS, LEAST_STEPS, -1) if needed(n) <= seconds)
        return first_steps(max(LEAST_STEPS, int(_SURE * next(fitting, LEAST_STEPS))))

    def many_within(self, name: str, few: int, seconds: float) -> int:
        """The most steps with which a candidate that was tried with `few` can be trained thrice; `few` if no
        more fit.  A computer that was busy meanwhile may allow fewer than belong to `few`.
        """
        fitting = [
            n for n in range(few + 1, MOST_STEPS + 1) if 3 * self._training_s(name, n) <= seconds
        ]
        belonging = [n for n in fitting if first_steps(n) == few]
        return max(belonging or fitting or [few])

    def _training_s(self, name: str, steps: int) -> float:
        first, later = self._seconds[name]
        return first + (steps - 1) * later
