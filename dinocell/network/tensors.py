"""The tensors of a model file: read, and refused where they cannot be those of its network."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dinocell.errors import CheckpointError, raised_as
from dinocell.network.config import ModelConfig
from dinocell.tree import tree_imports

_SHOWN = 8  # names in a message


def read_tensors(
    path: Path, expected: Mapping[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """The tensors of a model file, in the types of the file.

    `expected` are those of the network that `config`, from the header, describes.  Raises
    CheckpointError (the file is damaged, other tensors are in it, or zeros in place of weights).
    """
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except Exception as error:
        raise CheckpointError(
            f"A model file must be complete, got {path} ({error}): fetch it again"
        ) from error
    _refuse_others(path, state, expected, config)
    _refuse_zeros(path, state)
    return state


def _refuse_others(
    path: Path, state: dict[str, Tensor], expected: Mapping[str, Tensor], config: ModelConfig
) -> None:
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    if {key: tuple(value.shape) for key, value in state.items()} == shapes:
        return  # without our part of the tree, so that upstream's own tree segments too
    with tree_imports():
        from dinov3.cells.weights.fit import WeightsError, refuse_differences
    with raised_as(CheckpointError, WeightsError):
        refuse_differences(
            state,
            shapes,
            f"The weights of '{path}' must fit its header ({config.size}/{config.patch_size}, "
            f"{config.decoder})",
            "the file is damaged or was made by another program, so fetch it again",
        )


def _refuse_zeros(path: Path, state: Mapping[str, Tensor]) -> None:
    """As `refuse_zeros` of `dinov3.cells.weights.fit`, which upstream's own tree does not have.

    Biases, shifts of a normalisation, and a mask token that was never trained may be zero.
    """
    matrices = {
        k: v for k, v in state.items() if k.endswith(".weight") and v.ndim > 1 and v.numel()
    }
    # The last row clears nearly every matrix, so that loading takes no longer.
    zero = [key for key, value in matrices.items() if not value[-1].any() and not value.any()]
    if zero:
        more = f", ... ({len(zero)})" if len(zero) > _SHOWN else ""
        raise CheckpointError(
            f"Weights must have been trained, got zeros in {', '.join(zero[:_SHOWN])}{more} of {path}: "
            "the download was cut short, or the file was never filled; fetch it again"
        )
