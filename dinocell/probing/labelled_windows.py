"""Square windows of labelled images, which the small decoder trains and is scored on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError
from dinocell.pairs import Pair
from dinocell.probing.feature_extraction import window_corners
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.intensity import normalize_intensity
from dinocell.training.datasets import read_pair, spread_evenly


@dataclass(frozen=True)
class LabelledWindow:
    """A square window of a normalised image with its truth."""

    name: str
    image: NDArray[np.float32]  # (window, window) in [0, 1]
    # (h, w), smaller than the window where the image is: the rest of the window is reflection
    labels: NDArray[Any]
    # (window, window) distance map made from the whole image: cut cells keep true distances
    target: NDArray[np.float32]


def cut_windows(
    name: str,
    image: NDArray[Any],
    labels: NDArray[Any],
    *,
    window_px: int,
    count: int = 1,
    columns: tuple[int, int] | None = None,
) -> list[LabelledWindow]:
    """At most `count` windows of a centred grid, those with the most cell pixels first.

    The raw `image` (H, W) is normalised as a whole before it is cut, only from `columns` (first,
    last + 1) if they are given.  An image smaller than the window is padded by reflection.
    """
    normalized = normalize_intensity(image)
    target = labels_to_distance_map(labels, target="sqrt")
    if columns is not None:
        part = slice(*columns)
        normalized, target, labels = normalized[:, part], target[:, part], labels[:, part]
    height, width = labels.shape
    padding = ((0, max(0, window_px - height)), (0, max(0, window_px - width)))
    if any(after for _, after in padding):
        normalized = np.pad(normalized, padding, mode="symmetric")
        target = np.pad(target, padding, mode="symmetric")
    found = []
    for row, column in window_corners(normalized.shape, window_px):
        window = (slice(row, row + window_px), slice(column, column + window_px))
        parts = [np.ascontiguousarray(whole[window]) for whole in (normalized, labels, target)]
        found.append(LabelledWindow(f"{name}@{row},{column}", *parts))
    return sorted(found, key=lambda window: -np.count_nonzero(window.labels))[:count]


def read_windows(
    pairs: Sequence[Pair], *, window_px: int, windows_per_image: int, max_images: int | None = None
) -> list[LabelledWindow]:
    """Windows of at most `max_images` image files, spread evenly over the sorted names.

    Raises DataSetError, ImageFileError (a file does not fit; or no window holds a cell).
    """
    windows = []
    for pair in spread_evenly(pairs, max_images):
        image, labels = read_pair(pair)
        windows += cut_windows(
            pair.image_path.stem, image, labels, window_px=window_px, count=windows_per_image
        )
    require_cells_in_some(windows, str(pairs[0].labels_path.parent) if pairs else "no folder")
    return windows


def inside_image(array: NDArray[np.float32], window: LabelledWindow) -> NDArray[np.float32]:
    """The part of a window-sized array that lies in the window's image, without the reflection."""
    height, width = window.labels.shape
    return array[:height, :width]


def require_cells_in_some(windows: Sequence[LabelledWindow], where: str) -> None:
    """Raise DataSetError if no window holds a cell; `where` names their origin in the message."""
    if not any(window.labels.any() for window in windows):
        raise DataSetError(
            f"Labelled windows must hold cells, got {len(windows)} without any from {where}: name "
            "other labels"
        )
