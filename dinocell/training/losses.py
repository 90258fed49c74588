"""What the network is trained to reduce."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def distance_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between (B, 1, H, W) distance maps in [0, 1], over all pixels and crops.

    Raises ValueError if the shapes differ, which broadcasting would hide.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"`predicted` and `target` must have one shape, got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}: the decoder must return the input's size"
        )
    return functional.mse_loss(predicted.float(), target.float())
