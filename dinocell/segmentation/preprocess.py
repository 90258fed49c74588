"""Intensities → the range a network sees.  Always of the whole image, never of a tile.

Percentiles make the range robust against hot pixels; a bound from the image's own noise keeps an
empty field from being stretched until its noise looks like cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Second difference along both axes: zero on planes and straight edges, so what is left is noise.
_NOISE_KERNEL = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
_NOISE_KERNEL_NORM = 6.0  # root of the sum of squares: white noise of std 1 gives std 6
_MEDIAN_TO_STD = 0.6745  # median of |x| for x ~ N(0, 1)
_QUANTISATION_STD = 12**-0.5  # rounding to integers is uniform noise of width 1


def estimate_noise(image: NDArray) -> float:
    """Standard deviation of the pixel noise, in units of the image.

    Median absolute response to a Laplacian difference, hence insensitive to cells that cover less
    than half of the image.

    Parameters
    ----------
    image : (H, W) ndarray
        Any real dtype.  Integer images have at least the noise of their rounding, 0.29.

    References
    ----------
    J. Immerkær, Fast noise variance estimation, CVIU 64 (1996), eq. 2; the median in place of the
    mean is our change.
    """
    response = ndimage.convolve(image.astype(np.float32), _NOISE_KERNEL, mode="reflect")
    noise = float(np.median(np.abs(response))) / _MEDIAN_TO_STD / _NOISE_KERNEL_NORM
    if np.issubdtype(image.dtype, np.integer):
        noise = max(noise, _QUANTISATION_STD)
    return noise


def normalize_intensity(
    image: NDArray,
    *,
    low_percentile: float = 1.0,
    high_percentile: float = 99.8,
    min_contrast_sigma: float = 20.0,
) -> NDArray[np.float32]:
    """Map the intensities of a whole gray image to [0, 1].

    `low_percentile` goes to 0 and `high_percentile` to 1, but never less than `min_contrast_sigma`
    noise standard deviations apart: fluorescence fields without cells span 8 to 10 of them, the
    faintest real field of the training data 30.

    Parameters
    ----------
    image : (H, W) ndarray
        Boolean, integer or float, finite.
    low_percentile, high_percentile : float
        0 <= low < high <= 100.
    min_contrast_sigma : float
        0 switches the bound off.

    Returns
    -------
    (H, W) float32 ndarray in [0, 1]
        All zeros for a constant image.

    Raises
    ------
    ValueError
        `image` is not 2-D, is empty, or holds NaN or infinite values.
    """
    if image.ndim != 2 or image.size == 0:
        raise ValueError(
            f"`image` must be 2-D (H, W) and not empty, got shape {image.shape}: choose one channel"
        )
    if image.dtype == np.bool_:
        image = image.astype(np.uint8)
    if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
        raise ValueError(
            "`image` must be finite, got NaN or infinite pixels: replace them, for example with "
            "numpy.nan_to_num"
        )
    low, high = np.percentile(image, [low_percentile, high_percentile])
    if high <= low:
        # More than high_percentile of the pixels are alike: what differs is the signal.
        low, high = float(image.min()), float(image.max())
        if high <= low:
            return np.zeros(image.shape, dtype=np.float32)
    contrast = max(high - low, min_contrast_sigma * estimate_noise(image))
    scaled = (image.astype(np.float32) - np.float32(low)) / np.float32(contrast)
    return np.clip(scaled, 0.0, 1.0, out=scaled)


def to_model_input(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gray (H, W) in [0, 1] → (3, H, W) float32 with ImageNet's mean and standard deviation."""
    mean = np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    std = np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return (image[None].astype(np.float32) - mean) / std  # [3, H, W]
