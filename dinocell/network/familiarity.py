"""How an image looks to a network, summed over its windows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


class Appearance:
    """Sums over the windows of one image of what the network saw in them.

    Feed it each batch of windows once, in any order; it keeps sums and no window.
    """

    def __init__(self) -> None:
        self._weights = 0.0
        self._features: NDArray[np.float64] | None = None

    def add(self, gray: Tensor, features: Tensor, maps: Tensor) -> None:
        """Add a batch of windows.

        Parameters
        ----------
        gray : (B, 1, H, W) tensor in [0, 1]
            Normalised intensities.
        features : (B, D, H / p, W / p) tensor
            The deepest features of `DINOCell.map_and_features`.
        maps : (B, 1, H, W) tensor in [0, 1]
            Distance maps.
        """
        weights = functional.adaptive_avg_pool2d(maps.float(), features.shape[-2:])  # [B, 1, h, w]
        summed = (features.float() * weights).sum(dim=(0, 2, 3)).double().cpu().numpy()  # [D]
        self._weights += float(weights.sum())
        self._features = summed if self._features is None else self._features + summed

    def signature(self) -> NDArray[np.float64] | None:
        """Mean feature (D,), weighted by the map; None before the first window."""
        if self._features is None:
            return None
        return self._features / max(self._weights, 1e-6)
