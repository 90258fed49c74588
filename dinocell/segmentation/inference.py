"""One image through the network: normalise whole, cut into windows, predict, blend."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from dinocell.network.familiarity import Appearance
from dinocell.network.model import DINOCell
from dinocell.network.precision import autocast
from dinocell.segmentation.intensity import IntensityRange, find_range
from dinocell.segmentation.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dinocell.segmentation.tiles import predict_windows


def predict_distance_map(
    model: DINOCell,
    image: NDArray,
    *,
    intensity: IntensityRange | None = None,
    batch_size: int = 8,
    tile_px: int | None = None,
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    appearance: Appearance | None = None,
) -> NDArray[np.float32]:
    """Distance map of a gray image of any size.

    The image is normalised as a whole, then seen in windows of the
    model's size that overlap and are blended smoothly.

    Parameters
    ----------
    model : DINOCell
        In eval mode.
    image : (H, W) ndarray
        Raw intensities of any real dtype, finite.
    intensity : IntensityRange, optional
        Of this image, where it is known; None finds it with the model's percentiles.
    batch_size : int
        Windows per network call; changes speed and memory, not the result.
    tile_px : int, optional
        Visit the windows region by region of this size, no batch across two; the result is the same.
    precision : `auto`, `fp32` or `bf16`
        See `dinocell.network.precision.autocast`; bf16 differs in the third digit.
    progress : callable (done, total), optional
        Called after every batch of windows.
    appearance : Appearance, optional
        Gets what the network saw in every window.

    Returns
    -------
    (H, W) float32 ndarray in [0, 1]
        All zeros for a constant image, without asking the network.

    Raises
    ------
    ValueError
        The image is not 2-D or not finite, the precision is unknown, or the network answers NaN.
    """
    context = autocast(precision, model.device)
    config = model.config
    normalized = (intensity or find_range(image, **config.intensity)).apply(image)
    if not normalized.any():
        return np.zeros(image.shape, dtype=np.float32)
    device = model.device
    mean, std = (
        torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def predict(windows: NDArray[np.float32]) -> NDArray[np.float32]:
        gray = torch.from_numpy(windows).to(device)  # [B, 1, window, window]
        batch = ((gray - mean) / std).contiguous()  # [B, 3, window, window]
        with torch.inference_mode(), context:
            maps, features = model.map_and_features(batch)
            if appearance is not None:
                appearance.add(gray, features, maps)
            return maps[:, 0].cpu().numpy()  # [B, window, window]

    distance_map = predict_windows(
        normalized[None],
        predict,
        window_px=config.window_px,
        overlap_px=config.overlap_px,
        batch_size=batch_size,
        tile_px=tile_px,
        progress=progress,
    )
    if not np.isfinite(distance_map).all():
        raise ValueError(
            "the network must answer with finite values, got NaN: the model file is damaged or "
            "the precision too low for it; try precision fp32"
        )
    return np.clip(distance_map, 0.0, 1.0, out=distance_map)
