"""What the decoders share."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

PRIOR_LOGIT = -2.0
"""Start of the last bias: most pixels are background, so near sigmoid(-2) = 0.12."""


def conv_bn_relu(
    channels_in: int, channels_out: int, *, kernel_size: int = 3, stride: int = 1
) -> nn.Sequential:
    """Convolution without a bias, batch norm, ReLU; the grid shrinks by `stride` only."""
    padding = kernel_size // 2
    convolution = nn.Conv2d(
        channels_in, channels_out, kernel_size, stride=stride, padding=padding, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) on another grid, bilinearly."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
