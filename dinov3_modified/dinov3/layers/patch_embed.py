"""Image → one vector a patch: a convolution as wide as its stride (Dosovitskiy et al. 2021, eq. 1)."""

import math
from collections.abc import Callable

from torch import Tensor, nn


def make_2tuple(x: int | tuple[int, int]) -> tuple[int, int]:
    """A number stands for both axes."""
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ValueError(f"A size must have two numbers, got {x}: give (height, width)")
        return x
    return (int(x), int(x))


class PatchEmbed(nn.Module):
    """[B, C, H, W] → [B, H/p, W/p, D], or [B, N, D] if `flatten_embedding`.

    Args:
        img_size: the image size that `num_patches` is computed for; other sizes work as well.
        patch_size: edge of a patch; what is left at the right and lower edge is not seen.
        norm_layer: made with the embedding width and applied last.
        flatten_embedding: one axis of patches instead of two.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten_embedding: bool = True,
    ) -> None:
        super().__init__()
        self.img_size = make_2tuple(img_size)
        self.patch_size = make_2tuple(patch_size)
        self.patches_resolution = (
            self.img_size[0] // self.patch_size[0],
            self.img_size[1] // self.patch_size[1],
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.flatten_embedding = flatten_embedding
        self.proj = nn.Conv2d(
            in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def reset_parameters(self) -> None:
        """Uniform within ±1/sqrt(values in a patch), weight and bias alike."""
        bound = 1 / math.sqrt(self.in_chans * self.patch_size[0] * self.patch_size[1])
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.uniform_(self.proj.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)  # [B, D, h, w]
        height, width = x.shape[-2:]
        x = self.norm(x.flatten(2).transpose(1, 2))  # [B, N, D]
        if self.flatten_embedding:
            return x
        return x.unflatten(1, (height, width))  # [B, h, w, D]
