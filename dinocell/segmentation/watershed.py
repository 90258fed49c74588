"""Distance map → labels: markers by persistence, then a seeded flood.

One rule finds the markers.  Let the map be a landscape and lower a water level from its highest
point: peaks appear as islands, and islands meet at saddles.  Where two meet, the lower peak is a
cell of its own if it is higher than `peak_threshold` and rises at least `min_prominence` above the
saddle; else it is part of the other.  A crescent has one peak wherever its centroid lies; a cell with
two bumps has a high saddle between them; two touching cells have a low one.
(Edelsbrunner, Letscher & Zomorodian 2002 call the rise persistence; Grimaud 1992, dynamics.)

The flood is the watershed of Meyer (1991): from the markers downhill, highest pixel first.

Everything is linear in the number of pixels, runs without the interpreter's lock (threads may each do
an image), and keeps to one connected piece of foreground at a time, which fits in the processor's
cache.  ``docs/decisions/0003-markers-and-watershed.md`` has the alternatives and their figures.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from dinocell.segmentation.thresholds import Thresholds

__all__ = [
    "NUM_LEVELS",
    "distance_map_to_labels",
    "find_markers",
    "flood",
    "quantize",
    "separate_cells",
]

NUM_LEVELS = 4096
"""Levels of the quantised map: finer than what a network knows, and few enough to count and queue by."""


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

    Returns
    -------
    labels : (H, W) uint32 ndarray
        0 is background, cells are 1..n without gaps in reading order of their peaks.  Each cell is
        4-connected.  A connected piece of pixels above `fill_threshold` without any peak above
        `peak_threshold` is background, and so is a cell of fewer than `min_area_px` pixels: no
        neighbour receives its pixels.  All zeros when no peak exists; same shape when H or W is 0.

    Raises
    ------
    ValueError
        `distance_map` is not 2-D, holds NaN, no real numbers, or integers other than 0 and 1, or
        has 2³¹ pixels or more; or a threshold is out of its range.

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
    array = _checked_map(distance_map)
    if array.size == 0:
        return np.zeros(array.shape, np.uint32)
    levels = _levels(array, thresholds.fill_threshold)
    basin_of, piece_of_basin, peaks = _markers(levels, thresholds)
    grown = _grow(levels, basin_of, piece_of_basin, peaks)
    areas = np.zeros(peaks.size + 1, np.int64)
    _count_pixels(grown, areas)
    kept = areas >= max(thresholds.min_area_px, 1)
    kept[0] = False
    labels = np.empty(array.shape, np.uint32)
    _unframe(grown, np.where(kept, kept.cumsum(), 0).astype(np.uint32), labels)
    return labels


def find_markers(distance_map: ArrayLike, thresholds: Thresholds) -> NDArray[np.int32]:
    """The first half of `separate_cells`: one pixel per cell, its highest.

    Parameters
    ----------
    distance_map : (H, W) array of values in [0, 1]
        As for `distance_map_to_labels`, with the same errors.
    thresholds : Thresholds
        `min_area_px` has no effect here.

    Returns
    -------
    markers : (H, W) int32 ndarray
        1..n in reading order at the peaks, 0 elsewhere.  Of several equally high pixels of a cell the
        first in reading order is its peak.
    """
    array = _checked_map(distance_map)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    levels = _levels(array, thresholds.fill_threshold)
    _, _, peaks = _markers(levels, thresholds)
    framed = np.zeros(levels.shape, np.int32)
    framed.ravel()[peaks] = np.arange(1, peaks.size + 1)
    return np.ascontiguousarray(framed[1:-1, 1:-1])


def flood(distance_map: ArrayLike, markers: ArrayLike, mask: ArrayLike) -> NDArray[np.int32]:
    """The second half of `distance_map_to_labels`: grow markers downhill inside a mask, 4-connected.

    The highest pixel among those reached spreads its label first; of equal ones the first reached.  One
    queue per level of the quantised map takes the place of a priority queue, hence linear time.

    Parameters
    ----------
    distance_map : (H, W) array of values in [0, 1]
    markers : (H, W) integer array-like
        Positive where a cell starts, any number of pixels each; outside `mask` they are ignored.
    mask : (H, W) boolean array-like

    Returns
    -------
    grown : (H, W) int32 ndarray
        Marker numbers; 0 outside `mask` and where no marker reaches.

    Raises
    ------
    ValueError
        The shapes differ, a marker is negative or above 2³¹ − 1, or the map is not 2-D or holds NaN.
    TypeError
        `markers` is not of an integer type.

    Notes
    -----
    No way from another marker to a pixel is higher at its lowest point than that from its own.  Where
    two ways are equally high there, the order of the queues decides; a marker on a saddle may so win or
    lose a whole hill that has no marker of its own.

    References
    ----------
    Meyer, *Un algorithme optimal pour la ligne de partage des eaux*, 8e congrès RFIA (1991).
    """
    array = _checked_map(distance_map)
    seeds, inside = np.asarray(markers), np.asarray(mask, dtype=bool)
    if seeds.shape != array.shape or inside.shape != array.shape:
        raise ValueError(
            f"`markers` and `mask` must have the map's shape {array.shape}, got {seeds.shape} and "
            f"{inside.shape}: cut them alike."
        )
    if seeds.dtype.kind not in "iu":
        raise TypeError(
            f"`markers` must be an integer image, got dtype {seeds.dtype}: number the cells from 1."
        )
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if seeds.min() < 0 or seeds.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"`markers` must hold numbers from 0 to 2³¹ − 1, got {seeds.min()} to {seeds.max()}: "
            "number the cells from 1."
        )
    levels = np.full((array.shape[0] + 2, array.shape[1] + 2), -1, np.int16)
    levels[1:-1, 1:-1] = np.where(inside, quantize(array), -1)
    grown = np.zeros(levels.shape, np.int32)
    grown[1:-1, 1:-1] = np.where(inside, seeds, 0)
    pieces = ndimage.label(levels >= 0)[0]
    positions = np.flatnonzero(grown).astype(np.int32)
    _flood_by_piece(levels, grown, positions, pieces.ravel()[positions])
    return np.ascontiguousarray(grown[1:-1, 1:-1])


def quantize(distance_map: ArrayLike) -> NDArray[np.int16]:
    """Map [0, 1] to the integers 0..`NUM_LEVELS` − 1, rounding to the nearest.

    Parameters
    ----------
    distance_map : array of any shape, values in [0, 1]
        Values beyond, the infinite ones too, are clipped.

    Returns
    -------
    levels : int16 ndarray of the same shape

    Raises
    ------
    ValueError
        `distance_map` holds NaN.
    """
    scaled = np.clip(np.asarray(distance_map), 0.0, 1.0).astype(np.float32)
    _refuse_nan(scaled)
    return np.rint(scaled * np.float32(NUM_LEVELS - 1)).astype(np.int16)


def _checked_map(distance_map: ArrayLike) -> NDArray[np.float32]:
    array = np.asarray(distance_map)
    if array.ndim != 2:
        raise ValueError(
            f"`distance_map` must be 2-D (H, W), got shape {array.shape}: choose one plane."
        )
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"`distance_map` must hold real numbers, got dtype {array.dtype}: convert it."
        )
    if (array.shape[0] + 2) * (array.shape[1] + 2) >= 2**31:
        raise ValueError(
            f"`distance_map` must have fewer than 2³¹ pixels, got shape {array.shape}: "
            "cut it into strips."
        )
    if array.dtype.kind in "ui" and array.size and not 0 <= array.min() <= array.max() <= 1:
        raise ValueError(
            f"`distance_map` must hold values in [0, 1], got {array.dtype} from {array.min()} to "
            f"{array.max()}: divide it by the number that stands for 1."
        )
    # Writable, or numba would compile once more for read-only arrays.
    with np.errstate(over="ignore"):  # beyond float32 is beyond 1, and clipped all the same
        array = np.require(array, np.float32, ["C", "W"])
    _refuse_nan(array)
    return array


def _refuse_nan(array: NDArray[np.float32]) -> None:
    if array.size and np.isnan(array.min()):
        raise ValueError(
            "`distance_map` must not hold NaN, got some: look for the cause in the network's output."
        )


def _levels(distance_map: NDArray[np.float32], fill_threshold: float) -> NDArray[np.int16]:
    """Quantised map with −1 outside the mask and in a frame of one pixel, which spares bounds checks."""
    height, width = distance_map.shape
    levels = np.full((height + 2, width + 2), -1, np.int16)
    _quantize_above(distance_map, np.float32(fill_threshold), levels)
    return levels


def _markers(
    levels: NDArray[np.int16], thresholds: Thresholds
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Basins, pieces of the mask, and peaks that are cells.

    Returns −1 − basin of each framed pixel (−1 outside the mask, basins count from 1), the piece of
    each basin (named by one of its basins), and the flat positions of the peaks, ascending.
    """
    top = NUM_LEVELS - 1
    peak_level = (
        int(np.floor(thresholds.peak_threshold * top)) + 1
    )  # the lowest above the threshold
    rise = thresholds.min_prominence * top
    basin_of = np.full(levels.size, -1, np.int32)
    _ascend(levels, basin_of)
    num_basins = _number_basins(basin_of, np.empty(levels.size, np.int32))
    peak = np.full(num_basins + 1, -1, np.int32)
    height_of = np.full(num_basins + 1, -1, np.int16)
    num_at_level = np.zeros(NUM_LEVELS, np.int64)
    _count_passes(levels, basin_of, peak, height_of, num_at_level)
    num_passes = int(num_at_level.sum())
    sides = np.empty((num_passes, 2), np.int32)
    pass_level = np.empty(num_passes, np.int16)
    end_at_level = np.cumsum(num_at_level[::-1])[::-1].copy()  # highest first
    _sort_passes(levels, basin_of, end_at_level - num_at_level, sides, pass_level)
    parent = np.arange(num_basins + 1, dtype=np.int32)
    is_marker = np.zeros(num_basins + 1, np.bool_)
    _join_basins(sides, pass_level, peak, height_of, peak_level, rise, parent, is_marker)
    return basin_of, parent, np.sort(peak[is_marker])


def _grow(
    levels: NDArray[np.int16],
    basin_of: NDArray[np.int32],
    piece_of_basin: NDArray[np.int32],
    peaks: NDArray[np.int32],
) -> NDArray[np.int32]:
    """Framed label image: pixels of the i-th peak's cell are i + 1."""
    grown = np.zeros(levels.shape, np.int32)
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
        np.empty(levels.size, np.int32),
    )


@njit(cache=True, nogil=True)
def _quantize_above(distance_map: Any, fill_threshold: Any, levels: Any) -> None:
    top = np.float32(NUM_LEVELS - 1)
    for row in range(distance_map.shape[0]):
        for column in range(distance_map.shape[1]):
            value = distance_map[row, column]
            if value > fill_threshold:
                levels[row + 1, column + 1] = np.int16(np.rint(min(value, np.float32(1.0)) * top))


@njit(cache=True, nogil=True)
def _ascend(levels: Any, above: Any) -> None:
    """Write the flat position of each masked pixel's highest neighbour, its own if it is a peak.

    Of equally high pixels the first in reading order counts as the higher, so that every way up ends.
    """
    height, width = levels.shape
    flat = levels.ravel()
    for row in range(1, height - 1):
        for index in range(row * width + 1, (row + 1) * width - 1):
            highest = flat[index]
            if highest < 0:
                continue
            # Reading order: the two neighbours before the pixel win ties with it, the two after do not.
            best = index
            if flat[index - width] >= highest:
                best, highest = index - width, flat[index - width]
            if flat[index - 1] > highest or (best == index and flat[index - 1] == highest):
                best, highest = index - 1, flat[index - 1]
            if flat[index + 1] > highest:
                best, highest = index + 1, flat[index + 1]
            if flat[index + width] > highest:
                best = index + width
            above[index] = best


@njit(cache=True, nogil=True)
def _number_basins(above: Any, way: Any) -> int:
    """Follow each pixel up to its peak; write −1 − basin over it, basins counted from 1."""
    num_basins = 0
    for first in range(above.size):
        index, length = first, 0
        while above[index] >= 0 and above[index] != index:
            way[length] = index
            length += 1
            index = above[index]
        if above[index] == index:
            num_basins += 1
            above[index] = -1 - num_basins
        for step in range(length):
            above[way[step]] = above[index]
    return num_basins


@njit(cache=True, nogil=True)
def _find(parent: Any, basin: Any) -> Any:
    while parent[basin] != basin:
        parent[basin] = parent[parent[basin]]
        basin = parent[basin]
    return basin


# Two pixels side by side in different basins are a pass between these, as high as the lower pixel.


@njit(cache=True, nogil=True)
def _count_passes(levels: Any, basin_of: Any, peak: Any, height_of: Any, num_at_level: Any) -> None:
    """Count the passes of each level; on the way write position and level of each basin's peak."""
    width = levels.shape[1]
    flat = levels.ravel()
    for index in range(width, flat.size - width):
        here = basin_of[index]
        if here == -1:
            continue
        level = flat[index]
        if level > height_of[-1 - here]:
            height_of[-1 - here] = level
            peak[-1 - here] = index
        for step in (1, width):
            there = basin_of[index + step]
            if there != -1 and there != here:
                num_at_level[min(level, flat[index + step])] += 1


@njit(cache=True, nogil=True)
def _sort_passes(levels: Any, basin_of: Any, place: Any, sides: Any, pass_level: Any) -> None:
    """Write the basins on both sides of each pass, those of level i from `place[i]` on."""
    width = levels.shape[1]
    flat = levels.ravel()
    for index in range(width, flat.size - width):
        here = basin_of[index]
        if here == -1:
            continue
        for step in (1, width):
            there = basin_of[index + step]
            if there != -1 and there != here:
                level = min(flat[index], flat[index + step])
                position = place[level]
                place[level] += 1
                sides[position, 0], sides[position, 1] = -1 - here, -1 - there
                pass_level[position] = level


@njit(cache=True, nogil=True)
def _join_basins(
    sides: Any,
    pass_level: Any,
    peak: Any,
    height_of: Any,
    peak_level: int,
    rise: float,
    parent: Any,
    is_marker: Any,
) -> None:
    """Join touching basins from the highest pass down and judge the lower peak of each pair.

    Taken from high to low, the first pass that joins two sets of basins is their saddle.  In the end
    `parent` names one basin for all of a connected piece of the mask.
    """
    for position in range(pass_level.size):
        high = _find(parent, sides[position, 0])
        low = _find(parent, sides[position, 1])
        if high == low:
            continue
        if height_of[low] > height_of[high] or (
            height_of[low] == height_of[high] and peak[low] < peak[high]
        ):
            high, low = low, high
        above_saddle = height_of[low] - pass_level[position]
        is_marker[low] = height_of[low] >= peak_level and above_saddle >= rise and above_saddle > 0
        parent[low] = high
    for basin in range(1, parent.size):
        parent[basin] = _find(parent, basin)
        if parent[basin] == basin:
            is_marker[basin] = height_of[basin] >= peak_level


@njit(cache=True, nogil=True)
def _paint_basins(basin_of: Any, label_of_basin: Any, labels: Any) -> None:
    flat_labels = labels.ravel()
    for index in range(flat_labels.size):
        if basin_of[index] != -1:
            flat_labels[index] = label_of_basin[-1 - basin_of[index]]


@njit(cache=True, nogil=True)
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

    A queue per level, from `head` to `tail`, threaded through `following`: a pixel waits in one queue,
    once.  `head` is −1 everywhere before and after each piece.
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


@njit(cache=True, nogil=True)
def _count_pixels(labels: Any, areas: Any) -> None:
    for label in labels.ravel():
        areas[label] += 1


@njit(cache=True, nogil=True)
def _unframe(labels: Any, numbers: Any, numbered: Any) -> None:
    """Renumber and take off the frame."""
    for row in range(numbered.shape[0]):
        for column in range(numbered.shape[1]):
            numbered[row, column] = numbers[labels[row + 1, column + 1]]
