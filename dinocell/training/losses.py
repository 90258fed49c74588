"""What the network is trained to reduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distance_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between distance maps, over all pixels and crops.

    Parameters
    ----------
    predicted, target : (B, 1, H, W) float tensors in [0, 1]

    Returns
    -------
    scalar tensor

    Raises
    ------
    ValueError
        The shapes differ (broadcasting would hide it).
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"`predicted` and `target` must have one shape, got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}: the decoder must return the input's size"
        )
    return functional.mse_loss(predicted.float(), target.float())
