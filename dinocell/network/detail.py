"""A small convolutional pyramid of the image, and the decoders that read it.

A transformer sees the image through patches, and its decoder must guess again what lies within
them.  A pyramid of convolutions keeps edges at their place for little arithmetic, so that
patches may be coarser (Yao et al. 2023, ViTMatte, section 3.3).  With `size: conv` the pyramid is the
whole backbone.

No convolution works on single pixels: 2 x 2 pixels become 4 times the channels first and the logits
are put back the same way (Shi et al. 2016), which loses nothing and works on a quarter of the places.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinocell.network.layers import PRIOR_LOGIT, conv_bn_relu, resize

CELL_PX = 2  # edge of the square of pixels that is one place of the finest level
PYRAMID_WIDTHS = (32, 64, 96, 128, 192)  # channels at strides 2, 4, 8, 16 and 32
FPN_WIDTH = 64  # channels of all levels of `FPNDecoder`


def pyramid_widths(coarsest: int) -> tuple[int, ...]:
    """Channels of the levels from stride 2 to the stride `coarsest`: 4, 8, 16 or 32.

    Raises ValueError (another stride).
    """
    num_levels = coarsest.bit_length() - 1
    if not 2 <= num_levels <= len(PYRAMID_WIDTHS) or 2**num_levels != coarsest:
        raise ValueError(
            f"`patch_size` must be 4, 8, 16 or 32 for decoders detail and fpn, got {coarsest}: use unet"
        )
    return PYRAMID_WIDTHS[:num_levels]


class ConvPyramid(nn.Module):
    """Feature maps of an image at strides 2, 4, 8, ...: two 3 x 3 convolutions a level.

    Parameters
    ----------
    widths : channels of each level, from stride 2 on
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        width_in = 3 * CELL_PX**2
        for index, width in enumerate(widths):
            self.levels.append(
                nn.Sequential(
                    conv_bn_relu(width_in, width, stride=1 if index == 0 else 2),
                    conv_bn_relu(width, width),
                )
            )
            width_in = width
        self.embed_dim = widths[-1]
        self.blocks_read = tuple(range(len(widths)))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) image → maps (B, width, H / stride, W / stride), the finest first.

        H and W are multiples of the coarsest stride.
        """
        x = functional.pixel_unshuffle(image, CELL_PX)  # [B, 12, H / 2, W / 2]
        maps = []
        for level in self.levels:
            x = level(x)
            maps.append(x)
        return tuple(maps)


class DetailDecoder(nn.Module):
    """U-Net whose skips come from a `ConvPyramid` and whose bottom comes from the backbone.

    Parameters
    ----------
    embed_dim : channels of each feature map of the transformer
    patch_size : 4, 8, 16 or 32; the pyramid has the strides below it
    num_features : feature maps given to `forward`
    has_pyramid : False where the backbone is itself a pyramid, whose finer maps are the skips
    """

    def __init__(
        self, embed_dim: int, patch_size: int, *, num_features: int = 4, has_pyramid: bool = True
    ) -> None:
        super().__init__()
        *widths, bottom = pyramid_widths(patch_size)
        self.pyramid = ConvPyramid(widths) if has_pyramid else None
        joined = embed_dim * num_features if has_pyramid else embed_dim
        self.fuse = conv_bn_relu(joined, bottom, kernel_size=1)
        self.project = nn.ModuleList()
        self.convolve = nn.ModuleList()
        width_in = bottom
        for width in reversed(widths):
            self.project.append(nn.Conv2d(width_in, width, kernel_size=1))
            self.convolve.append(
                nn.Sequential(conv_bn_relu(2 * width, width), conv_bn_relu(width, width))
            )
            width_in = width
        self.head = nn.Conv2d(width_in, CELL_PX**2, kernel_size=1)
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Features and their image (B, 3, H, W) → (B, 1, H, W) logits.

        `features` are (B, D, h, w) maps of a transformer, joined; or the maps of a pyramid.
        """
        details, bottom = _details_and_bottom(self.pyramid, features, image)
        x = self.fuse(bottom)
        for project, convolve, detail in zip(
            self.project, self.convolve, reversed(details), strict=True
        ):
            x = resize(project(x), detail.shape[-2:])
            x = convolve(torch.cat([x, detail], dim=1))
        return functional.pixel_shuffle(self.head(x), CELL_PX)  # [B, 1, H, W]


class FPNDecoder(nn.Module):
    """Feature pyramid network (Lin et al. 2017, section 3), its levels summed at stride 2.

    The sum is that of Kirillov et al. 2019, section 3.1, with one convolution a level.  docs/results.md
    compares it with `DetailDecoder`.

    Parameters are those of `DetailDecoder`.
    """

    def __init__(
        self, embed_dim: int, patch_size: int, *, num_features: int = 4, has_pyramid: bool = True
    ) -> None:
        super().__init__()
        widths = pyramid_widths(patch_size)[:-1]
        self.pyramid = ConvPyramid(widths) if has_pyramid else None
        joined = embed_dim * num_features if has_pyramid else embed_dim
        self.fuse = conv_bn_relu(joined, FPN_WIDTH, kernel_size=1)
        self.lateral = nn.ModuleList(
            nn.Conv2d(width, FPN_WIDTH, kernel_size=1) for width in reversed(widths)
        )
        self.smooth = nn.ModuleList(
            conv_bn_relu(FPN_WIDTH, FPN_WIDTH) for _ in range(len(widths) + 1)
        )
        self.last = conv_bn_relu(FPN_WIDTH, FPN_WIDTH // 2)
        self.head = nn.Conv2d(FPN_WIDTH // 2, CELL_PX**2, kernel_size=1)
        nn.init.constant_(self.head.bias, PRIOR_LOGIT)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """As `DetailDecoder`."""
        details, bottom = _details_and_bottom(self.pyramid, features, image)
        size = details[0].shape[-2:]
        x = self.fuse(bottom)
        total = resize(self.smooth[0](x), size)
        for lateral, smooth, detail in zip(
            self.lateral, self.smooth[1:], reversed(details), strict=True
        ):
            x = lateral(detail) + resize(x, detail.shape[-2:])
            total = total + resize(smooth(x), size)
        return functional.pixel_shuffle(self.head(self.last(total)), CELL_PX)  # [B, 1, H, W]


def _details_and_bottom(
    pyramid: ConvPyramid | None, features: Sequence[Tensor], image: Tensor
) -> tuple[Sequence[Tensor], Tensor]:
    """Maps at the strides below the coarsest, the finest first; and what lies at the coarsest."""
    if pyramid is None:
        return features[:-1], features[-1]
    return pyramid(image), torch.cat(list(features), dim=1)
