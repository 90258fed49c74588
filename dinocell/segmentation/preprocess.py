"""Intensities → the range a network sees.  Always of the whole image, never of a tile.

Percentiles make the range robust against hot pixels; a bound from the image's own noise keeps an
empty field from being stretched until its noise looks like cells.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinocell.segmentation.intensity import find_range

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    return find_range(
        image,
        low_percentile=low_percentile,
        high_percentile=high_percentile,
        min_contrast_sigma=min_contrast_sigma,
    ).apply(image)


def to_model_input(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gray (H, W) in [0, 1] → (3, H, W) float32 with ImageNet's mean and standard deviation."""
    mean = np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    std = np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return (image[None].astype(np.float32) - mean) / std  # [3, H, W]
