"""Distance map → labels: markers by persistence (`dinocell.segmentation.markers`), then a seeded flood.

The flood is a watershed, from the markers downhill, highest pixel first (Meyer, *Un algorithme optimal
pour la ligne de partage des eaux*, 8e congrès RFIA, 1991).

Everything is linear in the number of pixels, runs without the interpreter's lock (threads may each do
an image), and keeps to one connected piece of foreground at a time, which fits in the processor's
cache.  ``docs/decisions/0003-markers-and-watershed.md`` has the alternatives and their figures.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from dinocell.compilation import njit
from dinocell.scratch import zeros_like
from dinocell.segmentation.levels import NUM_LEVELS, checked_map, framed_levels, quantize
from dinocell.segmentation.markers import merge_basins
from dinocell.segmentation.thresholds import Thresholds


def distance_map_to_labels(
    distance_map: ArrayLike,
    *,
    peak_threshold: float,
    fill_threshold: float,
    min_prominence: float = Thresholds.min_prominence,
    min_area_px: int = Thresholds.min_area_px,
) -> NDArray[np.uint32]:
    """Separate cells in a distance map by seeded watershed.

    Parameters
    ----------
    distance_map : (H, W) array of values in [0, 1], any real dtype
        0 outside cells and at their border, 1 at the deepest pixel; values beyond are clipped, but
        an integer map must hold nothing but 0 and 1 (a map saved as 0..255 is refused).
    peak_threshold, fill_threshold, min_prominence, min_area_px
        See `dinocell.segmentation.thresholds.Thresholds`.

    Returns (H, W) uint32 ndarray: 0 is background, cells are 1..n without gaps in reading order of
    their peaks.  Each cell is 4-connected.  A connected piece of pixels above `fill_threshold`
    without any peak above `peak_threshold` is background, and so is a cell of fewer than
    `min_area_px` pixels: no neighbour receives its pixels.  All zeros when no peak exists; same
    shape when H or W is 0.

    Raises ValueError (`distance_map` is not 2-D, holds NaN, no real numbers, or integers other than
    0 and 1, or has 2³¹ pixels or more; or a threshold is out of its range).

    Notes
    -----
    Equals ``skimage.segmentation.watershed(-quantize(distance_map), find_markers(...), mask=distance_map
    > fill_threshold)`` but for ties: pixels to which the best ways from two markers are equally high at
    their lowest point.

    Heights are compared in `NUM_LEVELS` levels: `peak_threshold` holds to half a level (0.00012) and
    `min_prominence` to one.  `fill_threshold` is compared with the map itself, in float32.
    """
    thresholds = Thresholds(peak_threshold, fill_threshold, min_prominence, min_area_px)
    return separate_cells(distance_map, thresholds)


def separate_cells(distance_map: ArrayLike, thresholds: Thresholds) -> NDArray[np.uint32]:
    """`distance_map_to_labels` with its thresholds as one object."""
    array = checked_map(distance_map)
    if array.size == 0:
        return np.zeros(array.shape, np.uint32)
    levels = framed_levels(array, thresholds.fill_threshold)
    basin_of, piece_of_basin, peaks = merge_basins(levels, thresholds)
    grown = _grow(levels, basin_of, piece_of_basin, peaks)
    areas = np.zeros(peaks.size + 1, np.int64)
    _count_pixels(grown, areas)
    kept = areas >= max(thresholds.min_area_px, 1)
    kept[0] = False
    labels = zeros_like(array, array.shape, np.uint32)
    _unframe(grown, np.where(kept, kept.cumsum(), 0).astype(np.uint32), labels)
    return labels


def flood(distance_map: ArrayLike, markers: ArrayLike, mask: ArrayLike) -> NDArray[np.int32]:
    """The second half of `distance_map_to_labels`: grow markers downhill inside a mask, 4-connected.

    The highest pixel among those reached spreads its label first; of equal ones the first reached.

    Parameters
    ----------
    distance_map : (H, W) array of values in [0, 1]
    markers : (H, W) integer array-like
        Positive where a cell starts, any number of pixels each; outside `mask` they are ignored.
    mask : (H, W) boolean array-like

    Returns (H, W) int32 ndarray: marker numbers; 0 outside `mask` and where no marker reaches.

    Raises ValueError (the shapes differ, a marker is negative or above 2³¹ − 1, or the map is not
    2-D or holds NaN); TypeError (`markers` is not of an integer type).

    Notes
    -----
    No way from another marker to a pixel is higher at its lowest point than that from its own.  Where
    two ways are equally high there, the order of the queues decides; a marker on a saddle may so win or
    lose a whole hill that has no marker of its own.
    """
    array = checked_map(distance_map)
    seeds, inside = np.asarray(markers), np.asarray(mask, dtype=bool)
    if seeds.shape != array.shape or inside.shape != array.shape:
        raise ValueError(
            f"`markers` and `mask` must have the map's shape {array.shape}, got {seeds.shape} and "
            f"{inside.shape}: crop them alike"
        )
    if seeds.dtype.kind not in "iu":
        raise TypeError(
            f"`markers` must be an integer image, got dtype {seeds.dtype}: number the cells from 1"
        )
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if seeds.min() < 0 or seeds.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"`markers` must hold numbers from 0 to 2³¹ − 1, got {seeds.min()} to {seeds.max()}: "
            "number the cells from 1"
        )
    levels = np.full((array.shape[0] + 2, array.shape[1] + 2), -1, np.int16)
    levels[1:-1, 1:-1] = np.where(inside, quantize(array), -1)
    grown = np.zeros(levels.shape, np.int32)
    grown[1:-1, 1:-1] = np.where(inside, seeds, 0)
    pieces = ndimage.label(levels >= 0)[0]
    positions = np.flatnonzero(grown).astype(np.int32)
    _flood_by_piece(levels, grown, positions, pieces.ravel()[positions])
    return np.ascontiguousarray(grown[1:-1, 1:-1])


def _grow(
    levels: NDArray[np.int16],
    basin_of: NDArray[np.int32],
    piece_of_basin: NDArray[np.int32],
    peaks: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Framed label image: pixels of the i-th peak's cell are i + 1."""
    grown = zeros_like(levels, levels.shape, np.int32)
    numbers = np.arange(1, peaks.size + 1, dtype=np.int32)
    piece_of_peak = piece_of_basin[-1 - basin_of[peaks]]
    num_peaks = np.bincount(piece_of_peak, minlength=piece_of_basin.size)
    # A piece of the mask with one peak is that cell, all of it; only the others are flooded.
    alone = num_peaks[piece_of_peak] == 1
    label_of_piece = np.zeros(piece_of_basin.size, np.int32)
    label_of_piece[piece_of_peak[alone]] = numbers[alone]
    _paint_basins(basin_of, label_of_piece[piece_of_basin], grown)
    grown.ravel()[peaks] = numbers
    _flood_by_piece(levels, grown, peaks[~alone], piece_of_peak[~alone])
    return grown


def _flood_by_piece(
    levels: NDArray[np.int16],
    grown: NDArray[np.int32],
    seeds: NDArray[np.int32],
    piece_of_seed: NDArray[Any],
) -> None:
    """Flood from `seeds`, flat positions labelled in `grown`, one piece of the mask after the other."""
    order = np.argsort(piece_of_seed, kind="stable")
    pieces = piece_of_seed[order]
    first_of_piece = np.flatnonzero(np.diff(pieces, prepend=-1, append=-1))
    _flood_pieces(
        levels,
        grown,
        seeds[order],
        first_of_piece,
        np.full(NUM_LEVELS, -1, np.int32),
        np.empty(NUM_LEVELS, np.int32),
        zeros_like(levels, (levels.size,), np.int32),
    )


@njit
def _paint_basins(basin_of: Any, label_of_basin: Any, labels: Any) -> None:
    flat_labels = labels.ravel()
    for index in range(flat_labels.size):
        if basin_of[index] != -1:
            flat_labels[index] = label_of_basin[-1 - basin_of[index]]


@njit
def _flood_pieces(
    levels: Any,
    labels: Any,
    seeds: Any,
    first_of_piece: Any,
    head: Any,
    tail: Any,
    following: Any,
) -> None:
    """Grow the labelled `seeds`, grouped by piece, over the unlabelled pixels with a level of 0 or more.

    The highest pixel that has been reached gives its label to its unlabelled neighbours, which then
    count as reached at their own level; one that is higher than `current` (a hill without a marker)
    comes next.  This is Prim's algorithm for widest paths: when a pixel is labelled, no other way from
    a marker to it has a higher lowest point, else a pixel of that way would have been taken before.
    Instead of a heap each level has a first-in, first-out queue, from `head` to `tail`, threaded
    through `following`; a pixel waits in one queue, once.  So the time is linear in pixels, plus the
    number of levels for each piece.  `head` is −1 everywhere before and after each piece, which lets
    all pieces share the queues.
    """
    width = levels.shape[1]
    flat, flat_labels = levels.ravel(), labels.ravel()
    for piece in range(first_of_piece.size - 1):
        current = -1
        for position in range(first_of_piece[piece], first_of_piece[piece + 1]):
            index = seeds[position]
            level = flat[index]
            following[index] = -1
            if head[level] < 0:
                head[level] = index
            else:
                following[tail[level]] = index
            tail[level] = index
            current = max(current, level)
        while current >= 0:
            index = head[current]
            if index < 0:
                current -= 1
                continue
            head[current] = following[index]
            label = flat_labels[index]
            highest = current
            for step in (-width, -1, 1, width):
                neighbour = index + step
                level = flat[neighbour]
                if level < 0 or flat_labels[neighbour] != 0:
                    continue
                flat_labels[neighbour] = label
                following[neighbour] = -1
                if head[level] < 0:
                    head[level] = neighbour
                else:
                    following[tail[level]] = neighbour
                tail[level] = neighbour
                highest = max(highest, level)
            current = highest


@njit
def _count_pixels(labels: Any, areas: Any) -> None:
    for label in labels.ravel():
        areas[label] += 1


@njit
def _unframe(labels: Any, numbers: Any, numbered: Any) -> None:
    """Renumber and take off the frame."""
    for row in range(numbered.shape[0]):
        for column in range(numbered.shape[1]):
            numbered[row, column] = numbers[labels[row + 1, column + 1]]
