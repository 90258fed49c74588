"""Do the entries of a file fit a network?  The one answer for backbones, teachers and the hub."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]

_SHOWN = 12  # keys of each kind in a message


class WeightsError(ValueError):
    """A file that is no backbone, or does not fit.

    Attributes:
        problems: all keys by kind ("missing", "unexpected", "misshapen"), of which the message shows
            the first.
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


def refuse_differences(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], fact: str, advice: str
) -> None:
    """Compare the names and shapes of entries with those that a network has.

    Args:
        state: the entries of a file.
        expected: names and shapes of the network.
        fact, advice: what the message says before and after the differences.

    Raises:
        WeightsError: an entry is missing, unexpected or has another shape; all are in `problems`.
    """
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != tuple(shape)
        ],
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(keys)} {kind}: {listed(keys)}" for kind, keys in problems.items() if keys
        )
        raise WeightsError(f"{fact} ({shown}): {advice}", problems)


def listed(keys: list[str]) -> str:
    """The first keys, for a message."""
    return ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
