"""Intensities → the range a network sees.  Always of the whole image, never of a tile.

Percentiles make the range robust against hot pixels; a bound from the image's own noise keeps an
empty field from being stretched until its noise looks like cells.
"""

import numpy as np
from numpy.typing import NDArray

from dinocell.segmentation.intensity import find_range

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_intensity(image: NDArray, **options: float) -> NDArray[np.float32]:
    """Map the intensities of a whole gray (H, W) image to float32 in [0, 1].

    `options`, range and errors are those of `dinocell.segmentation.intensity.find_range`; a constant
    image gives zeros.
    """
    return find_range(image, **options).apply(image)


def to_model_input(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gray (H, W) in [0, 1] → (3, H, W) float32 with ImageNet's mean and standard deviation."""
    mean = np.asarray(IMAGENET_MEAN, dtype=np.float32)[:, None, None]
    std = np.asarray(IMAGENET_STD, dtype=np.float32)[:, None, None]
    return (image[None].astype(np.float32) - mean) / std  # [3, H, W]
