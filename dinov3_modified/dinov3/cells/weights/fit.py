"""Do the entries of a file fit a network?  The one answer for backbones, teachers and the hub."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dinov3.cells.checks import listed

State = dict[str, Tensor]

_SHOWN = 12  # keys of each kind in a message


class WeightsError(ValueError):
    """A file that is no backbone, or does not fit; `problems` has all keys by kind."""

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


def refuse_differences(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], fact: str, advice: str
) -> None:
    """Raise WeightsError where the entries of a file have other names and shapes than a network.

    `fact` and `advice` are what the message says before and after the differences, which are all in
    `problems`.
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
            f"{len(keys)} {kind}: {listed(keys, _SHOWN)}" for kind, keys in problems.items() if keys
        )
        raise WeightsError(f"{fact} ({shown}): {advice}", problems)


def refuse_zeros(state: Mapping[str, Tensor], path: Path, *, whole: bool = False) -> None:
    """Raise WeightsError where zeros stand in place of weights, as in a file that was cut short.

    A download into a file of the full size leaves them behind its end, so that a last row tells.
    `whole`: only matrices and kernels that are zero everywhere count.
    """
    zero = [
        key
        for key, value in state.items()
        if key.endswith(".weight")
        and value.numel() > 0
        and value.ndim > int(whole)
        and not bool((value if whole else value[-1]).any())
    ]
    if zero:
        raise WeightsError(
            f"Weights must have been trained, got zeros in {listed(zero)} of {path}: the download was "
            "cut short, or the file was never filled; fetch it again"
        )
