"""Which pixels of an image are signal, and the range of intensities that a network sees.

A percentile alone is thrown by a handful of pixels that no cell made: a burnt-in scale bar, hot
pixels, a dead camera row, the border of a mosaic.  Three properties tell them from signal, whatever
their values and shapes are:

* **A gap.**  Optics blur every edge, so that the sorted intensities of a real image have no wide
  gap; pixels that were written by a camera fault or a program stand apart.  Over 740 real images
  the widest gap below the brightest pixels is 0.18 of the range beneath it but for two images with
  a hot pixel (0.5 and 4.5), that above the darkest is 0.11 of the whole range.
* **A spike.**  A hot pixel exceeds the median of its 5 x 5 neighbourhood by more than the range of
  the whole median-filtered image; of real images at most 0.1 % of the pixels do.
* **An outlier among bright places.**  The bright ends of 64 px tiles that show signal are alike;
  three quarters of them lie above 1/5 of the image's 99.8th percentile in every real image.

The first two hold no signal: they are left out of all statistics and replaced from their neighbours.
The third is signal (a dead cell, blurred dust), so it stays but does not set the range.  A bound from the
image's own noise keeps an empty field from being stretched until its noise looks like cells.

The range is always that of the whole image, never of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dinocell.network.config import IMAGENET_MEAN, IMAGENET_STD
from dinocell.scratch import all_finite, new_image, row_bands, sampled_blocks

# Second difference along both axes: zero on planes and straight edges, so what is left is noise.
_NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
_NOISE_KERNEL_NORM = 6.0  # root of the sum of squares: white noise of std 1 gives std 6
_MEDIAN_TO_STD = 0.6745  # median of |x| for x ~ N(0, 1)
_QUANTISATION_STD = 12**-0.5  # rounding to integers is uniform noise of width 1

# Shares of a range: see the module's text for what real images have.
_TOP_GAP = 0.5
_BOTTOM_GAP = 0.05
_GAP_SIGMA = 8.0  # of the noise that a gap is wider than
_BASE_SHARE = 0.01  # of the pixels that may lie beyond a range's other end
_MAX_SHARE = 0.4  # of the pixels that a gap may part from the rest on one side
_SPIKE = 0.75
_TILE_PX = 64
_OUTLIER = 3.5  # the 99.8th percentile against the tiles' bright end, above which the latter counts
_HEADROOM = 1.5  # above the tiles' bright end, then
_SIGNAL_SIGMA = 20.0  # of the noise that a tile with signal spans
_FILL_SIGMAS = (1.0, 3.0)
_FILL_WEIGHT = 0.05
_NOTED_SHARE = 5e-4  # single hot pixels are common and need no note
_REACH_PX = 32  # `apply` reads twice the fill's reach and the median's: 12 + 2 + 12
_LARGEST_VALUE = float(np.finfo(np.float32).max)
_SMALLEST_SPAN = 1e-30  # far above the smallest float32, 1e-38
_FEWEST_LEVELS = 64  # that float32 leaves between the darkest and the brightest pixel


@dataclass(frozen=True)
class IntensityRange:
    """How one image's intensities map to [0, 1]."""

    # low, high: what becomes 0 and 1, in units of the image
    low: float
    high: float
    # floor, ceiling: pixels below `floor` or above `ceiling` hold no signal
    floor: float = -np.inf
    ceiling: float = np.inf
    # a pixel that exceeds the median of its 5 x 5 neighbourhood by more holds no signal
    spike: float = np.inf
    notes: tuple[str, ...] = ()  # what was left out, in words for the user
    noise: float = 0.0  # standard deviation of the pixel noise, in units of the image

    def apply(self, image: NDArray) -> NDArray[np.float32]:
        """Gray (H, W) image of any real dtype → (H, W) float32 in [0, 1]; zeros for an empty range."""
        if self.high <= self.low:
            return np.zeros(image.shape, dtype=np.float32)
        pixels = _clipped(image, self.floor, self.ceiling)
        if np.isfinite([self.floor, self.ceiling]).any():
            mask = (image < self.floor) | (image > self.ceiling)
            pixels = _filled(pixels, mask, self.low)
        if np.isfinite(self.spike):
            pixels = _filled(
                pixels, _spikes(pixels, _median(pixels), self.spike, self.low), self.low
            )
        pixels -= np.float32(self.low)
        pixels /= np.float32(self.high - self.low)
        return np.clip(pixels, 0.0, 1.0, out=pixels)

    def apply_rows(self, image: NDArray, rows: slice) -> NDArray[np.float32]:
        """`apply(image)[rows]` for rows `start:stop` of the image, from these and few beside them."""
        first = max(rows.start - _REACH_PX, 0)
        return self.apply(image[first : rows.stop + _REACH_PX])[
            rows.start - first : rows.stop - first
        ]


def check_values(pixels: NDArray, where: str, failure: type[Exception]) -> None:
    """Refuse pixels that a network, which computes in float32, cannot take."""
    if pixels.size == 0 or (pixels.dtype.kind != "f" and pixels.dtype.itemsize < 4):
        return
    if not all_finite(pixels):
        raise failure(
            f"The image must be finite, got NaN or infinite pixels{where}: replace them first, for "
            "example by 0"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if max(-low, high) > _LARGEST_VALUE:
        raise failure(
            f"Pixels must lie within ±{_LARGEST_VALUE:.2g}, got {low:g} to {high:g}{where}: divide them by "
            "a constant, or replace the values that stand for missing pixels"
        )
    if 0 < high - low < _SMALLEST_SPAN:
        raise failure(
            f"Pixels must differ by {_SMALLEST_SPAN:g} or more, got {low:g} to {high:g}{where}: multiply "
            "them by a constant"
        )
    steps = [_step(max(-low, high), dtype) for dtype in (np.dtype(np.float32), pixels.dtype)]
    if steps[1] < steps[0] and 0 < high - low < _FEWEST_LEVELS * steps[0]:
        raise failure(
            f"Pixels must differ by {_FEWEST_LEVELS * steps[0]:g} or more where they are so large, got {low:.17g} "
            f"to {high:.17g}{where}: subtract a constant"
        )


def _step(value: float, dtype: np.dtype[Any]) -> float:
    """Distance of neighbouring numbers of a data type near `value`, at least 1 of whole numbers."""
    if dtype.kind in "bui":
        return 1.0
    number = np.abs(dtype.type(value))
    return float(number - np.nextafter(number, dtype.type(0)))  # the largest has none above it


def find_range(
    image: NDArray,
    *,
    low_percentile: float = 1.0,
    high_percentile: float = 99.8,
    min_contrast_sigma: float = 20.0,
) -> IntensityRange:
    """Range of the pixels that are signal: see the module's text for what is left out.

    `low_percentile` goes to 0 and `high_percentile` to 1, but never less than `min_contrast_sigma`
    noise standard deviations apart: fluorescence fields without cells span 8 to 10 of them, the
    faintest real field of the training data 30.

    Parameters
    ----------
    image : (H, W) ndarray, boolean, integer or float, finite.  Of an image of more than 4096 x 4096
        pixels, blocks of 64 x 64 px that lie evenly and have as many pixels together are looked at.
    low_percentile, high_percentile : float, 0 <= low < high <= 100
    min_contrast_sigma : float, 0 switches the bound off

    Raises ValueError (`image` is not 2-D, is empty, or holds NaN or infinite values).
    """
    if image.ndim != 2 or image.size == 0:
        raise ValueError(
            f"`image` must be 2-D (H, W) and not empty, got shape {image.shape}: choose one channel"
        )
    if np.issubdtype(image.dtype, np.floating) and not all_finite(image):
        raise ValueError(
            "`image` must be finite, got NaN or infinite pixels: replace them, for example with "
            "numpy.nan_to_num"
        )
    whole, image = image, sampled_blocks(image)
    if image.dtype == np.bool_:
        image = image.astype(np.uint8)
    floor, ceiling = _cuts(whole, image)
    kept: NDArray[np.bool_] | None = None
    inside, filled = image.ravel(), _clipped(image, floor, ceiling)
    if np.isfinite([floor, ceiling]).any():
        kept = (image >= floor) & (image <= ceiling)
        inside = image[kept]
        filled = _filled(filled, ~kept, float(np.percentile(inside, low_percentile)))
    notes = [] if kept is None else _cut_notes(whole, floor, ceiling)
    noise = estimate_noise(filled, kept)
    if np.issubdtype(image.dtype, np.integer):
        noise = max(noise, _QUANTISATION_STD)
    low, high = (float(bound) for bound in np.percentile(inside, [low_percentile, high_percentile]))
    spike = np.inf
    if high <= low:
        # More than high_percentile of the pixels are alike: what differs is the signal.
        low, high = max(float(whole.min()), floor), min(float(whole.max()), ceiling)
        if high <= low:
            return IntensityRange(low, low, floor, ceiling, notes=tuple(notes))
    else:
        smooth = _median(filled)
        faintest = _SIGNAL_SIGMA * noise
        reach = max(float(np.percentile(smooth, high_percentile)) - low, faintest)
        spikes = _spikes(filled, smooth, _SPIKE * reach, low)
        if count := int(spikes.sum()):
            spike = _SPIKE * reach
            high = float(np.percentile(filled[~spikes], high_percentile))
            if count > _NOTED_SHARE * image.size:
                estimate = round(count * whole.size / image.size)
                notes.append(f"{estimate:,} hot pixels were replaced from their neighbours")
        bright = _bright_end(smooth, low, faintest)
        if bright is not None and high - low > _OUTLIER * (bright - low):
            high = low + _HEADROOM * (bright - low)
            notes.append(
                "A few places are much brighter than the rest: they do not set the contrast "
                f"(white is {high:.4g})"
            )
    high = low + max(high - low, min_contrast_sigma * noise)
    return IntensityRange(low, high, floor, ceiling, spike, tuple(notes), noise)


def estimate_noise(image: NDArray, where: NDArray[np.bool_] | None = None) -> float:
    """Standard deviation of the pixel noise, in units of the image.

    Median absolute response to a Laplacian difference, hence insensitive to cells that cover less
    than half of the image.

    `image`: (H, W) ndarray of any real dtype.  Integer images have at least the noise of their
    rounding, 0.29.  `where`: (H, W) bool ndarray, optional, the pixels that count.

    References
    ----------
    J. Immerkær, Fast noise variance estimation, CVIU 64 (1996), eq. 2; the median in place of the
    mean is our change.
    """
    pixels = image.astype(np.float32, copy=False)
    response = np.abs(cv2.filter2D(pixels, -1, _NOISE_KERNEL, borderType=cv2.BORDER_REFLECT))
    if where is not None and where.any():
        response = response[where]
    response = response[np.isfinite(response)]  # beside the lowest float of a no-data value
    noise = float(np.median(response)) / _MEDIAN_TO_STD / _NOISE_KERNEL_NORM
    return max(noise, _QUANTISATION_STD) if np.issubdtype(image.dtype, np.integer) else noise


def _cuts(image: NDArray, sample: NDArray) -> tuple[float, float]:
    """The floor and the ceiling of the signal; infinite where no gap parts anything from it."""
    values, counts = _distinct(image if image.dtype in (np.uint8, np.uint16) else sample)
    least = _GAP_SIGMA * estimate_noise(sample)
    # A range that a gap is compared with must not hold the outliers of the other side: top again.
    ceiling = _end_before_gap(values, counts, _TOP_GAP, least)
    kept = values <= ceiling
    floor = -_end_before_gap(-values[kept][::-1], counts[kept][::-1], _BOTTOM_GAP, least)
    kept &= values >= floor
    ceiling = min(ceiling, _end_before_gap(values[kept], counts[kept], _TOP_GAP, least))
    if np.count_nonzero(kept & (values <= ceiling)) < 2:
        return -np.inf, np.inf  # a drawing: what differs from the constant rest is the signal
    return floor, ceiling


def _end_before_gap(
    values: NDArray[np.float64], counts: NDArray[np.int64], share: float, least: float
) -> float:
    """The last of the sorted values before the first wide gap that only a few values lie behind.

    Signal behind a gap would have as many values as pixels; what a fault or a program wrote has one.
    """
    total = counts.sum()
    below = np.cumsum(counts) / total
    base = values[np.searchsorted(below, _BASE_SHARE)]
    gaps = np.diff(values)
    wide = (gaps >= share * (values[:-1] - base)) & (gaps > least) & (below[:-1] >= 1 - _MAX_SHARE)
    for place in np.flatnonzero(wide):
        behind = counts[place + 1 :]
        if np.sort(behind)[-3:].sum() >= 0.9 * behind.sum():
            return float(values[place])
    return np.inf


def _distinct(image: NDArray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if image.dtype in (np.uint8, np.uint16):
        counts = np.zeros(2 ** (8 * image.dtype.itemsize), np.int64)
        for rows in row_bands(image.shape):
            counts += np.bincount(image[rows].ravel(), minlength=len(counts))
        values = np.flatnonzero(counts)
        return values.astype(np.float64), counts[values]
    values, counts = np.unique(image, return_counts=True)
    return values.astype(np.float64), counts


def _cut_notes(image: NDArray, floor: float, ceiling: float) -> list[str]:
    notes = []
    bands = [image[rows] for rows in row_bands(image.shape)]
    for count, value, word in (
        (sum(np.count_nonzero(band < floor) for band in bands), floor, "below"),
        (sum(np.count_nonzero(band > ceiling) for band in bands), ceiling, "above"),
    ):
        if count > _NOTED_SHARE * image.size:
            notes.append(
                f"{count:,} pixels ({count / image.size:.1%}) {word} {value:.6g} hold no signal (border, "
                "scale bar, text, dust, hot or dead pixels?): they were left out"
            )
    return notes


def _bright_end(smooth: NDArray[np.float32], low: float, faintest: float) -> float | None:
    """The 99th percentile of most tiles that show signal; None where none does."""
    side = max(16, min(_TILE_PX, min(smooth.shape) // 8))
    rows, columns = (size // side for size in smooth.shape)
    if not rows * columns:
        return None
    tiles = smooth[: rows * side, : columns * side].reshape(rows, side, columns, side)
    ends = np.percentile(tiles.swapaxes(1, 2).reshape(rows * columns, -1), 99, axis=1)
    ends = ends[ends - low > faintest]
    return float(np.percentile(ends, 75)) if len(ends) else None


def _clipped(image: NDArray, floor: float, ceiling: float) -> NDArray[np.float32]:
    """As float32, once what exceeds the signal is clipped, so that nothing overflows."""
    if np.isfinite([floor, ceiling]).any():
        image = image.clip(floor, ceiling)
    return image.astype(np.float32)


def _median(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return cv2.medianBlur(pixels, 5).astype(np.float32, copy=False)


def _spikes(
    pixels: NDArray[np.float32], smooth: NDArray[np.float32], excess: float, low: float
) -> NDArray[np.bool_]:
    """Pixels far above their neighbourhood's median and all signal, or far below it and the ground.

    The corner of a cell may exceed the median, but not the brightest cells; a gap between two cells
    is dark, but not darker than what lies outside all cells.
    """
    difference = pixels - smooth
    return ((difference > excess) & (pixels > low + 1.3 / _SPIKE * excess)) | (
        (difference < -excess) & (pixels < low)
    )


def _filled(
    pixels: NDArray[np.float32], mask: NDArray[np.bool_], background: float
) -> NDArray[np.float32]:
    """Pixels of the mask replaced by the weighted mean of their nearest neighbours that are signal.

    Normalised convolution (Knutsson and Westin, CVPR 1993) at two scales; farther inside a wide
    region stands the background.
    """
    result = np.where(mask, np.float32(background), pixels)
    known = (~mask).astype(np.float32)
    left = mask
    for sigma in _FILL_SIGMAS:
        weight = cv2.GaussianBlur(known, (0, 0), sigma)
        mean = cv2.GaussianBlur(np.where(mask, np.float32(0), pixels), (0, 0), sigma)
        near = left & (weight > _FILL_WEIGHT)
        result[near] = mean[near] / weight[near]
        left = left & ~near
        if not left.any():
            break
    return result


def normalize_intensity(image: NDArray, **options: float) -> NDArray[np.float32]:
    """Map the intensities of a whole gray (H, W) image to float32 in [0, 1].

    `options`, range and errors are those of `find_range`; a constant image gives zeros.
    """
    return find_range(image, **options).apply(image)


def average_channels(
    pixels: NDArray, ranges: Sequence[IntensityRange], tile_px: int | None = None
) -> NDArray[np.float32]:
    """Mean (H, W) of the channels of an image (H, W, C), each mapped to [0, 1] by its own range.

    A large image (`tile_px`: see `dinocell.scratch.new_image`) is kept in a file.
    """
    planes = list(np.moveaxis(pixels, 2, 0))
    average = new_image(pixels.shape[:2], np.float32, tile_px)
    for rows in row_bands(average.shape):
        scaled = [r.apply_rows(plane, rows) for r, plane in zip(ranges, planes, strict=True)]
        average[rows] = np.mean(scaled, axis=0, dtype=np.float32)
    return average


def to_model_input(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gray (H, W) in [0, 1] → (3, H, W) float32 with ImageNet's mean and standard deviation."""
    mean = np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    std = np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return (image[None].astype(np.float32) - mean) / std  # [3, H, W]
