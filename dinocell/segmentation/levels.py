"""Distance maps as whole numbers: few enough levels to count and to queue by."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.scratch import as_if_writable, contiguous, zeros_like

NUM_LEVELS = 4096
"""Levels of the quantised map: finer than what a network knows, and few enough to count and queue by."""


def quantize(distance_map: ArrayLike) -> NDArray[np.int16]:
    """Map [0, 1] to the integers 0..`NUM_LEVELS` − 1, rounding to the nearest.

    `distance_map`: array of any shape; values beyond [0, 1], the infinite ones too, are clipped.
    Returns int16 ndarray of the same shape.  Raises ValueError (`distance_map` holds NaN).
    """
    scaled = np.clip(np.asarray(distance_map), 0.0, 1.0).astype(np.float32)
    _refuse_nan(scaled)
    return np.rint(scaled * np.float32(NUM_LEVELS - 1)).astype(np.int16)


def checked_map(distance_map: ArrayLike) -> NDArray[np.float32]:
    """Check a distance map and return it as C-contiguous float32, to be read only.

    Raises ValueError (it is not 2-D, holds NaN, no real numbers, or integers other than 0 and 1, or
    has 2³¹ pixels or more).
    """
    array = np.asarray(distance_map)
    if array.ndim != 2:
        raise ValueError(
            f"`distance_map` must be 2-D (H, W), got shape {array.shape}: choose one plane"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"`distance_map` must hold real numbers, got dtype {array.dtype}: convert it to float32"
        )
    if (array.shape[0] + 2) * (array.shape[1] + 2) >= 2**31:
        raise ValueError(
            f"`distance_map` must have fewer than 2³¹ pixels, got shape {array.shape}: "
            "cut it into strips"
        )
    if array.dtype.kind in "ui" and array.size and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(
            f"`distance_map` must hold values in [0, 1], got {array.dtype} from {array.min()} to "
            f"{array.max()}: divide it by the number that stands for 1"
        )
    with np.errstate(over="ignore"):  # beyond float32 is beyond 1, and clipped all the same
        array = as_if_writable(contiguous(array, np.float32))
    _refuse_nan(array)
    return array


def _refuse_nan(array: NDArray[np.float32]) -> None:
    if array.size and np.isnan(array.min()):
        raise ValueError(
            "`distance_map` must not hold NaN, got some: look for the cause in the network's output"
        )


def framed_levels(distance_map: NDArray[np.float32], fill_threshold: float) -> NDArray[np.int16]:
    """Quantised map with −1 outside the mask and in a frame of one pixel, which spares bounds checks."""
    height, width = distance_map.shape
    levels = zeros_like(distance_map, (height + 2, width + 2), np.int16)
    levels -= 1
    _quantize_above(distance_map, np.float32(fill_threshold), levels)
    return levels


@njit
def _quantize_above(distance_map: Any, fill_threshold: Any, levels: Any) -> None:
    top = np.float32(NUM_LEVELS - 1)
    for row in range(distance_map.shape[0]):
        for column in range(distance_map.shape[1]):
            value = distance_map[row, column]
            if value > fill_threshold:
                levels[row + 1, column + 1] = np.int16(np.rint(min(value, np.float32(1.0)) * top))
