"""Decoders: patch features of four depths → one logit per pixel.

`unet` is the default, `unet_wide` the original drawing kept for comparison, `linear` the floor
(Ronneberger et al. 2015 for the U-Net), `detail` and `fpn` look at the image themselves.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinocell.network.config import DECODERS, PYRAMID_DECODERS
from dinocell.network.detail import DetailDecoder, FPNDecoder
from dinocell.network.layers import PRIOR_LOGIT, conv_bn_relu, resize


def unet_widths(embed_dim: int, patch_size: int) -> tuple[tuple[int, ...], int]:
    """Channels of each stage and of each skip of the default decoder: at most a fifth of the backbone.

    ViT-S/8 gets the design's 128, 64, 32 with 32-channel skips.  A ViT-Ti is a third of that
    backbone and a patch of 16 leaves it a quarter of the tokens, but the decoder works on all
    pixels: each of the two halves the widths.
    """
    base = 128 if embed_dim >= 384 else 64
    if patch_size > 8:
        base //= 2
    stages = tuple(max(base // 2**stage, base // 4) for stage in range(_num_doublings(patch_size)))
    return stages, base // 4


class UNetDecoder(nn.Module):
    """U-Net over the patch grid, full resolution out.

    The deepest feature map enters at the patch grid.  Every stage doubles the grid with a
    transposed convolution, concatenates the next shallower feature (projected to `skip_channels`
    by a 1×1 convolution, then enlarged bilinearly to the stage's grid) and applies two 3×3
    Conv-BatchNorm-ReLU.  A patch of p takes ceil(log2(p)) stages; where p is no power of two, the
    last stage is resized to the pixel grid.  Widths beyond the doublings become further stages
    without enlargement.

    Parameters
    ----------
    embed_dim : channels of each feature map
    num_features : feature maps given to `forward`, shallowest first
    stages : channels of each stage, at least ceil(log2(patch_size))
    skip_channels : channels a skip is projected to; None keeps all `embed_dim` without a projection
    image_channels : channels of a 3×3 convolution of the input image, concatenated in the last
        stage, so that edges need not pass through the patch embedding; 0 leaves it out
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int,
        *,
        num_features: int = 4,
        stages: Sequence[int] = (128, 64, 32),
        skip_channels: int | None = 32,
        image_channels: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.num_doublings = _num_doublings(patch_size)
        if len(stages) < self.num_doublings:
            raise ValueError(
                f"`stages` must have at least {self.num_doublings} widths for patch_size "
                f"{patch_size}, got {tuple(stages)}: add widths"
            )
        self.enlarge = nn.ModuleList()
        self.project = nn.ModuleList()
        self.convolve = nn.ModuleList()
        self.image_stem = conv_bn_relu(3, image_channels) if image_channels > 0 else None
        width_in = embed_dim
        for index, width in enumerate(stages):
            if index < self.num_doublings:
                self.enlarge.append(nn.ConvTranspose2d(width_in, width, kernel_size=2, stride=2))
            else:
                self.enlarge.append(nn.Conv2d(width_in, width, kernel_size=1))
            has_skip = index < num_features - 1
            if has_skip and skip_channels is not None:
                self.project.append(nn.Conv2d(embed_dim, skip_channels, kernel_size=1))
            else:
                self.project.append(nn.Identity())
            joined = width
            if has_skip:
                joined += embed_dim if skip_channels is None else skip_channels
            if index == len(stages) - 1:
                joined += image_channels
            self.convolve.append(
                nn.Sequential(conv_bn_relu(joined, width), conv_bn_relu(width, width))
            )
            width_in = width
        self.num_skips = min(num_features - 1, len(stages))
        self.head = nn.Conv2d(width_in, 1, kernel_size=1)
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """(B, D, h, w) features, shallowest first, and their image (B, 3, H, W) → (B, 1, H, W) logits.

        H is h * patch_size, W is w * patch_size.
        """
        size = image.shape[-2:]
        x = features[-1]  # [B, D, h, w]
        skips = list(reversed(features[:-1]))  # deepest first
        last = len(self.enlarge) - 1
        for index, (enlarge, project, convolve) in enumerate(
            zip(self.enlarge, self.project, self.convolve, strict=True)
        ):
            x = enlarge(x)
            if index >= self.num_doublings - 1 and x.shape[-2:] != size:
                x = resize(x, size)
            parts = [x]
            if index < self.num_skips:
                parts.append(resize(project(skips[index]), x.shape[-2:]))
            if index == last and self.image_stem is not None:
                parts.append(self.image_stem(image))
            x = convolve(torch.cat(parts, dim=1) if len(parts) > 1 else x)
        return self.head(x)  # [B, 1, H, W]


class LinearDecoder(nn.Module):
    """The floor: one linear map from all features of a patch to the logits of its pixels."""

    def __init__(self, embed_dim: int, patch_size: int, *, num_features: int = 4) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.head = nn.Conv2d(embed_dim * num_features, patch_size**2, kernel_size=1)
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """(B, D, h, w) features and the (B, 3, H, W) image → (B, 1, H, W) logits."""
        x = self.head(torch.cat(list(features), dim=1))  # [B, p * p, h, w]
        return functional.pixel_shuffle(x, self.patch_size)  # [B, 1, H, W]


def create_decoder(
    name: str,
    embed_dim: int,
    patch_size: int,
    *,
    num_features: int = 4,
    image_channels: int = 0,
    has_pyramid: bool = True,
) -> nn.Module:
    """The decoder called `name`: `unet`, `unet_wide`, `linear`, `detail` or `fpn`.

    `has_pyramid` is False where the backbone is a pyramid already (`detail` and `fpn` only).

    Raises ValueError (unknown name, or `image_channels` for a decoder without an image skip).
    """
    if name not in DECODERS:
        raise ValueError(
            f"`decoder` must be one of {', '.join(DECODERS)}, got {name!r}: choose one of them"
        )
    if name != "unet" and image_channels:
        raise ValueError(
            f"`image_channels` must be 0 for decoder {name}, got {image_channels}: use unet"
        )
    if name in PYRAMID_DECODERS:
        kind = DetailDecoder if name == "detail" else FPNDecoder
        return kind(embed_dim, patch_size, num_features=num_features, has_pyramid=has_pyramid)
    if name == "linear":
        return LinearDecoder(embed_dim, patch_size, num_features=num_features)
    # `unet_wide` is as first drawn: four stages whatever the patch, skips at their full width.
    stages: tuple[int, ...]
    skip: int | None
    stages, skip = (256, 128, 64, 32), None
    if name == "unet":
        stages, skip = unet_widths(embed_dim, patch_size)
    counts = {"num_features": num_features, "image_channels": image_channels}
    return UNetDecoder(embed_dim, patch_size, stages=stages, skip_channels=skip, **counts)


def _num_doublings(patch_size: int) -> int:
    return math.ceil(math.log2(patch_size))
