"""One image through the network: normalise whole, cut into windows, predict, blend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinocell.network.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from dinocell.network.familiarity import Appearance, contrast_of
from dinocell.network.model import DINOCell
from dinocell.network.precision import autocast
from dinocell.scratch import all_finite, is_large, row_bands, zeros_in_file
from dinocell.segmentation.intensity import IntensityRange, find_range
from dinocell.segmentation.rescale import Resampling, resample, rescaled_shape
from dinocell.segmentation.tiles import predict_windows

_SIGNAL = 1.2
"""Signal spans more than this multiple of the least range, `min_contrast_sigma`: 24 standard deviations
of the noise in place of 20; the faintest field of dinocell-tiny's training data spans 30."""

_FLIPS = ((), (-1,), (-2,), (-2, -1))
"""Axes along which test-time augmentation flips a window: none, left-right, up-down, both."""


@dataclass(frozen=True)
class Inference:
    """How a network is run over an image.

    batch_size : windows per network call; changes speed and memory, not the result
    tile_px : of an image with more pixels than a square of this edge (default 4096), the map is kept in
        a temporary file; the result is the same
    precision : `auto`, `fp32` or `bf16`, see `dinocell.network.precision.autocast`; bf16 differs in the
        third digit
    tta : test-time augmentation: predict each window in four orientations (as it is, flipped
        left-right, up-down, and both), and take the mean of the four maps; takes four times as long
    """

    batch_size: int = 8
    tile_px: int | None = None
    precision: str = "auto"
    tta: bool = False


def start_appearance(intensity: IntensityRange, dtype: np.dtype, config: ModelConfig) -> Appearance:
    """What `predict_distance_map` fills for an image of this type and range of intensities."""
    span = intensity.high - intensity.low
    is_noise = span < _SIGNAL * config.min_contrast_sigma * intensity.noise
    return Appearance(contrast_of(span, dtype), is_noise=is_noise)


def predict_distance_map(
    model: DINOCell,
    image: NDArray,
    *,
    intensity: IntensityRange | None = None,
    how: Inference = Inference(),
    progress: Callable[[int, int], None] | None = None,
    appearance: Appearance | None = None,
    rescale: float = 1.0,
) -> NDArray[np.float32]:
    """Distance map of a gray image of any size.

    The image is normalised as a whole, then seen in windows of the
    model's size that overlap and are blended smoothly.  What windows need of it is normalised row of
    windows by row of windows, so that no second plane of its size is kept.

    Parameters
    ----------
    model : DINOCell, in eval mode
    image : (H, W) ndarray, raw intensities of any real dtype, finite
    intensity : IntensityRange, optional
        Of this image, where it is known; None finds it with the model's percentiles.
    how : batches, precision, test-time augmentation, and where the map is stored
    progress : callable (done, total), optional, called after every batch of windows
    appearance : Appearance, optional, gets what the network saw in every window, not in its flips
    rescale : float, above 0: how many times the normalised image is enlarged for the network; the map comes
        back in the size of `image`

    Returns (H, W) float32 ndarray in [0, 1], with `how.tta` (2, H, W): the mean map of the flips, and
    their standard deviation at each pixel.  All zeros for a constant image, without asking the network.

    Raises ValueError (the image is not 2-D or not finite, the precision is unknown, or the network
    answers NaN).
    """
    network = _Network(model, how, appearance)
    config = model.config
    seen_shape = image.shape if rescale == 1 else rescaled_shape(image.shape, rescale)
    intensity = intensity or find_range(image, **config.intensity)
    normalized = _NormalizedImage(image, intensity, seen_shape)
    shape = (2, *seen_shape) if how.tta else seen_shape
    large = is_large(image.shape, how.tile_px) or is_large(seen_shape, how.tile_px)
    make = zeros_in_file if large else np.zeros
    maps: NDArray[np.float32] = make(shape, np.float32)
    if normalized.is_blank():
        return make((*shape[:-2], *image.shape), np.float32)
    predict_windows(
        normalized,
        network.predict,
        window_px=config.window_px,
        overlap_px=config.overlap_px,
        batch_size=how.batch_size,
        blended=maps,
        progress=progress,
    )
    if not all(map(all_finite, maps if how.tta else [maps])):
        raise ValueError(
            "The network must answer with finite values, got NaN: the model file is damaged or "
            "the precision too low for it; try precision fp32"
        )
    if seen_shape != image.shape:
        seen, maps = maps, make((*shape[:-2], *image.shape), np.float32)
        resample(seen, maps)
    return np.clip(maps, 0.0, 1.0, out=maps)


class _Network:
    """Gray windows to distance maps; windows of zeros get one answer, which is computed once.

    Such windows lie in black borders and between the parts of a mosaic.
    """

    def __init__(self, model: DINOCell, how: Inference, appearance: Appearance | None) -> None:
        self.model, self.context = model, autocast(how.precision, model.device)
        self.appearance, self.tta = appearance, how.tta
        self.mean, self.std = (
            torch.tensor(v, device=model.device)[:, None, None]
            for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        self._of_zeros: NDArray[np.float32] | None = None

    def predict(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        """(B, 1, window, window) in [0, 1] → (B, window, window), or mean and deviation of flips
        (B, 2, window, window)."""
        shown = windows.any(axis=(1, 2, 3))
        if shown.all():
            return self._ask(windows, self.appearance)
        if self._of_zeros is None:
            self._of_zeros = self._ask(np.zeros_like(windows[:1]), None)
        maps = np.repeat(self._of_zeros, len(windows), axis=0)
        if shown.any():
            maps[shown] = self._ask(windows[shown], self.appearance)
        return maps

    def _ask(
        self, windows: NDArray[np.float32], appearance: Appearance | None
    ) -> NDArray[np.float32]:
        gray = torch.from_numpy(windows).to(self.model.device)  # [B, 1, window, window]
        if not self.tta:
            return self._map(gray, appearance)
        maps = [
            np.flip(self._map(gray.flip(axes), None if axes else appearance), axes)
            for axes in _FLIPS
        ]
        return np.stack([np.mean(maps, axis=0), np.std(maps, axis=0)], axis=1)

    def _map(self, gray: torch.Tensor, appearance: Appearance | None) -> NDArray[np.float32]:
        batch = ((gray - self.mean) / self.std).contiguous()  # [B, 3, window, window]
        with torch.inference_mode(), self.context:
            maps, features = self.model.map_and_features(batch)
            if appearance is not None:
                appearance.add(gray, features, maps)
            return maps[:, 0].cpu().numpy()  # [B, window, window]


class _NormalizedImage:
    """The (1, H, W) normalised image that windows are read from; holds one row of windows at a time.

    `shape`: (H, W) that the network sees, that of the image or another, to which it is resampled.
    """

    def __init__(self, image: NDArray, intensity: IntensityRange, shape: tuple[int, int]) -> None:
        self.image, self.intensity = image, intensity
        self.shape = (1, *shape)
        self._rows, self._band = slice(0, 0), np.empty((0, shape[1]), np.float32)
        self._way = None if shape == image.shape else Resampling(image.shape, shape)

    def is_blank(self) -> bool:
        """Whether all of it is 0."""
        return not any(self._read(rows).any() for rows in row_bands(self.shape[1:]))

    def __getitem__(self, key: tuple[slice, Any, Any]) -> NDArray[np.float32]:
        """Pixels of all channels; rows and columns are two slices, or two arrays that are combined."""
        _, rows, columns = key
        if isinstance(rows, slice):
            return self._read(rows)[None, :, columns]
        first = int(rows.min())
        return self._read(slice(first, int(rows.max()) + 1))[None, rows - first, columns]

    def _read(self, rows: slice) -> NDArray[np.float32]:
        """Rows of the image; those of the last band, all of a small image, are normalised once."""
        if rows.start < self._rows.start or rows.stop > self._rows.stop:
            self._rows, self._band = rows, self._normalized(rows)
        return self._band[rows.start - self._rows.start : rows.stop - self._rows.start]

    def _normalized(self, rows: slice) -> NDArray[np.float32]:
        if self._way is None:
            return self.intensity.apply_rows(self.image, rows)
        band = self._way.rows(lambda own: self.intensity.apply_rows(self.image, own), rows)
        return np.clip(band, 0.0, 1.0, out=band)
