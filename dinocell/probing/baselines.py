"""What a trained backbone must beat: random weights of its shape, raw pixels, and a thumbnail."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dinocell.probing.feature_extraction import ViewFeatures

THUMBNAIL = "4x4 thumbnail"
PIXELS = "pixels (PCA)"
RANDOM = "random weights"

_PIXELS_PX = 32  # edge to which a window is reduced before its principal components are computed
_COMPONENTS = 64


class PixelBackbone(nn.Module):
    """Answers with the reduced image itself: of the window as CLS, of each patch as patch token.

    `edge_px` is that of the reduced window and, where a patch is larger, of the reduced patch; the
    mean is subtracted, so that brightness alone tells nothing.  The decoder of `probe_features` gets the
    patches with their mean: cells may be found by their brightness.
    """

    def __init__(self, patch_size: int, edge_px: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.edge_px = edge_px
        self.embed_dim = min(edge_px, patch_size) ** 2  # of a patch token
        self.blocks = nn.ModuleList([nn.Identity()])  # one depth, for readers of several
        self.device_of = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward_features(self, batch: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] → `x_norm_clstoken` [B, D] and `x_norm_patchtokens` [B, N, D']."""
        window = functional.adaptive_avg_pool2d(batch[:, :1], self.edge_px).flatten(1)
        patches = self._patches(batch)
        return {
            "x_norm_clstoken": window - window.mean(dim=1, keepdim=True),
            "x_norm_patchtokens": patches - patches.mean(dim=2, keepdim=True),
        }

    def get_intermediate_layers(
        self, batch: Tensor, *, n: Sequence[int], reshape: bool, norm: bool
    ) -> list[Tensor]:
        """[B, 3, H, W] → the reduced patches [B, D', h, w], once; the options are those of a ViT."""
        del n, reshape, norm
        rows = batch.shape[2] // self.patch_size
        return [self._patches(batch).unflatten(1, (rows, -1)).permute(0, 3, 1, 2)]

    def _patches(self, batch: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, N, D']"""
        size = self.patch_size
        patches = functional.unfold(batch[:, :1], size, stride=size)  # [B, size², N]
        squares = patches.transpose(1, 2).unflatten(2, (1, size, size))  # [B, N, 1, size, size]
        small = functional.adaptive_avg_pool2d(squares.flatten(0, 1), min(self.edge_px, size))
        return small.flatten(1).unflatten(0, (len(batch), -1))


def with_random_weights(vit: nn.Module, seed: int) -> nn.Module:
    """A network of the same shape as `vit` before any training; LayerScale is 1, as with 1e-5 nothing of
    the image would pass.  The random generator of the caller is left as it was."""
    made = copy.deepcopy(vit).cpu()  # the same weights on every device
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made.init_weights()  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(1.0)
    return made.eval().requires_grad_(False)


def principal_components(features: ViewFeatures) -> ViewFeatures:
    """Each kind of feature by its first 64 principal components, fitted on the views themselves."""
    found: dict[str, Any] = {}
    turned: dict[str, NDArray[np.float32]] = {}
    for kind in ("cls", "patch_mean", "patch"):
        upright, moved = getattr(features, kind), features.turned[kind]
        flat = upright.reshape(-1, upright.shape[-1]).astype(np.float64)
        mean = flat.mean(axis=0)
        _, _, directions = np.linalg.svd((flat - mean).T @ (flat - mean))
        basis = directions[:_COMPONENTS].T

        def shown(
            values: NDArray[np.float32],
            mean: NDArray[np.float64] = mean,
            basis: NDArray[np.float64] = basis,
        ) -> NDArray[np.float32]:
            return ((values - mean) @ basis).astype(np.float32)

        found[kind], turned[kind] = shown(upright), shown(moved)
    return replace(features, turned=turned, **found)


def pixel_backbones(patch_size: int) -> dict[str, nn.Module]:
    """The baselines without a network, by name."""
    return {
        PIXELS: PixelBackbone(patch_size, _PIXELS_PX),
        THUMBNAIL: PixelBackbone(patch_size, 4),
    }
