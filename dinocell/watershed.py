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

__all__ = [
    "DEFAULT_MIN_PROMINENCE",
    "NUM_LEVELS",
    "distance_map_to_labels",
    "find_markers",
    "flood",
    "quantize",
]

NUM_LEVELS = 4096
"""Levels of the quantised map: finer than what a network knows, and few enough to count and queue by."""

DEFAULT_MIN_PROMINENCE: float = 0.1
"""Best, or within half a point of it, on the maps of a network; perfect maps want 0.3."""


def distance_map_to_labels(
    distance_map: ArrayLike,
    *,
    peak_threshold: float,
    fill_threshold: float,
    min_prominence: float = DEFAULT_MIN_PROMINENCE,
    min_area_px: int = 0,
) -> NDArray[np.uint32]:
    """Separate cells in a distance map by seeded watershed.

    Parameters
    ----------
    distance_map : (H, W) array of values in [0, 1]
        0 outside cells and at their border, 1 at the deepest pixel; values beyond are clipped.
    peak_threshold, fill_threshold : float
        A cell's peak is above `peak_threshold`; a pixel above `fill_threshold` belongs to a cell.
        ``0 <= fill_threshold < peak_threshold < 1``.
    min_prominence : float in [0, 1]
        A peak that rises less than this above the saddle to a higher one is part of that cell.  At 0
        every local maximum above `peak_threshold` is a cell.
    min_area_px : int
        Cells with fewer pixels become background, after the flood: their pixels go to nobody.

    Returns
    -------
    labels : (H, W) uint32 ndarray
        0 is background, cells are 1..n without gaps in reading order of their peaks.  Each cell is
        4-connected.  A connected piece of pixels above `fill_threshold` without any peak above
        `peak_threshold` is background.  All zeros when there is no peak; same shape when H or W is 0.

    Raises
    ------
    ValueError
        `distance_map` is not 2-D, holds NaN or no numbers, or has 2³¹ pixels or more; or a threshold
        is out of its range.

    Notes
    -----
    Equals ``skimage.segmentation.watershed(-quantize(distance_map), find_markers(...), mask=distance_map
    > fill_threshold)`` but for pixels that two cells reach at the same level at the same time.
    """
    array = _checked_map(distance_map)
    peak_level, rise = _checked_levels(peak_threshold, fill_threshold, min_prominence)
    if not min_area_px >= 0:
        raise ValueError(f"`min_area_px` must be at least 0, got {min_area_px}: 0 keeps all cells.")
    if array.size == 0:
        return np.zeros(array.shape, np.uint32)
    levels = _framed_levels(array, np.float32(fill_threshold))
    basin_of, parent, peaks = _markers(levels, peak_level, rise)
    return _grow_and_number(levels, basin_of, parent, peaks, float(min_area_px))


def find_markers(
    distance_map: ArrayLike,
    *,
    peak_threshold: float,
    fill_threshold: float,
    min_prominence: float = DEFAULT_MIN_PROMINENCE,
) -> NDArray[np.int32]:
    """The first half of `distance_map_to_labels`: one pixel per cell, its highest.

    Parameters
    ----------
    distance_map, peak_threshold, fill_threshold, min_prominence
        As of `distance_map_to_labels`.

    Returns
    -------
    markers : (H, W) int32 ndarray
        1..n in reading order at the peaks, 0 elsewhere.  Of several equally high pixels of a cell the
        first in reading order is its peak.

    Raises
    ------
    ValueError
        As `distance_map_to_labels`.
    """
    array = _checked_map(distance_map)
    peak_level, rise = _checked_levels(peak_threshold, fill_threshold, min_prominence)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    levels = _framed_levels(array, np.float32(fill_threshold))
    _, _, peaks = _markers(levels, peak_level, rise)
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
    pieces, num_pieces = ndimage.label(levels >= 0)
    positions = np.flatnonzero(grown).astype(np.int32)
    order, first_of_piece = _group(pieces.ravel()[positions].astype(np.int32), num_pieces + 1)
    _flood_pieces(levels, grown, positions[order], first_of_piece)
    return np.ascontiguousarray(grown[1:-1, 1:-1])


def quantize(distance_map: ArrayLike) -> NDArray[np.int16]:
    """Map [0, 1] to the integers 0..`NUM_LEVELS` − 1, rounding to the nearest; values beyond are clipped."""
    scaled = np.clip(np.asarray(distance_map, dtype=np.float32), 0.0, 1.0)
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
    # Writable, or numba would compile once more for read-only arrays.
    array = np.require(array, np.float32, ["C", "W"])
    if array.size and np.isnan(array.min()):
        raise ValueError(
            "`distance_map` must not hold NaN, got some: look for the cause in the network's output."
        )
    return array


def _checked_levels(peak: float, fill: float, prominence: float) -> tuple[int, float]:
    """The lowest level above the peak threshold, and the prominence in levels."""
    if not 0.0 <= fill < peak < 1.0:
        raise ValueError(
            f"thresholds must hold 0 <= fill < peak < 1, got fill {fill} and peak {peak}: lower "
            "`fill_threshold` or raise `peak_threshold`."
        )
    if not 0.0 <= prominence <= 1.0:
        raise ValueError(
            f"`min_prominence` must be in [0, 1], got {prominence}: "
            f"{DEFAULT_MIN_PROMINENCE} is usual."
        )
    return int(np.floor(peak * (NUM_LEVELS - 1))) + 1, prominence * (NUM_LEVELS - 1)


def _markers(
    levels: NDArray[np.int16], peak_level: int, rise: float
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Basin of each framed pixel, the forest of basins, and the peaks that are cells, ascending."""
    basin_of = _ascend(levels)
    num_basins = _number_basins(basin_of)
    parent, peak, is_marker = _join_basins(levels, basin_of, num_basins, peak_level, rise)
    return basin_of, parent, np.sort(peak[is_marker])


@njit(cache=True, nogil=True)
def _framed_levels(distance_map: Any, fill_threshold: Any) -> Any:
    """Quantised map with −1 outside the mask and in a frame of one pixel, which spares bounds checks."""
    height, width = distance_map.shape
    levels = np.full((height + 2, width + 2), np.int16(-1), dtype=np.int16)
    top = np.float32(NUM_LEVELS - 1)
    for row in range(height):
        for column in range(width):
            value = distance_map[row, column]
            if value > fill_threshold:
                levels[row + 1, column + 1] = np.int16(np.rint(min(value, np.float32(1.0)) * top))
    return levels


@njit(cache=True, nogil=True)
def _ascend(levels: Any) -> Any:
    """Flat position of each pixel's highest neighbour, its own if it is a peak, −1 outside the mask.

    Of equally high pixels the first in reading order counts as the higher, so that every way up ends.
    """
    height, width = levels.shape
    flat = levels.ravel()
    above = np.full(flat.size, -1, dtype=np.int32)
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
    return above


@njit(cache=True, nogil=True)
def _number_basins(above: Any) -> int:
    """Follow each pixel up to its peak; write −1 − basin over it, basins counted from 1."""
    num_basins = 0
    way = np.empty(above.size, dtype=np.int32)
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


@njit(cache=True, nogil=True)
def _join_basins(
    levels: Any, basin_of: Any, num_basins: int, peak_level: int, rise: float
) -> tuple[Any, Any, Any]:
    """Join touching basins from the highest saddle down and judge the lower peak of each pair.

    Two pixels side by side in different basins are a pass between these, as high as the lower pixel.
    Taken from high to low, the first pass that joins two sets of basins is their saddle.

    Returns the forest of basins (one tree per connected piece of the mask), the pixel of each basin's
    peak, and whether that peak is a cell; entry 0 of each is unused.
    """
    width = levels.shape[1]
    flat = levels.ravel()
    peak = np.full(num_basins + 1, -1, dtype=np.int32)
    height_of = np.full(num_basins + 1, -1, dtype=np.int16)
    # Counting sort of the passes: count, then place.
    place = np.zeros(NUM_LEVELS, dtype=np.int64)
    for index in range(width, flat.size - width):
        here = basin_of[index]
        if here == -1:
            continue
        level = flat[index]
        if level > height_of[-1 - here]:
            height_of[-1 - here] = level
            peak[-1 - here] = index
        right, below = basin_of[index + 1], basin_of[index + width]
        if right != -1 and right != here:
            place[min(level, flat[index + 1])] += 1
        if below != -1 and below != here:
            place[min(level, flat[index + width])] += 1
    num_passes = 0
    for level in range(NUM_LEVELS - 1, -1, -1):
        place[level], num_passes = num_passes, num_passes + place[level]
    one_side = np.empty(num_passes, dtype=np.int32)
    other_side = np.empty(num_passes, dtype=np.int32)
    pass_level = np.empty(num_passes, dtype=np.int16)
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
                one_side[position], other_side[position] = -1 - here, -1 - there
                pass_level[position] = level

    parent = np.arange(num_basins + 1).astype(np.int32)
    is_marker = np.zeros(num_basins + 1, dtype=np.bool_)
    for position in range(num_passes):
        high = _find(parent, one_side[position])
        low = _find(parent, other_side[position])
        if high == low:
            continue
        if height_of[low] > height_of[high] or (
            height_of[low] == height_of[high] and peak[low] < peak[high]
        ):
            high, low = low, high
        above_saddle = height_of[low] - pass_level[position]
        is_marker[low] = height_of[low] >= peak_level and above_saddle >= rise and above_saddle > 0
        parent[low] = high
    for basin in range(1, num_basins + 1):
        if parent[basin] == basin:
            is_marker[basin] = height_of[basin] >= peak_level
    return parent, peak, is_marker


@njit(cache=True, nogil=True)
def _group(piece_of: Any, num_pieces: int) -> tuple[Any, Any]:
    """Stable order by piece, and where each of the pieces 0..num_pieces − 1 begins in it (and ends)."""
    first = np.zeros(num_pieces + 1, dtype=np.int64)
    for piece in piece_of:
        first[piece + 1] += 1
    for piece in range(num_pieces):
        first[piece + 1] += first[piece]
    place = first.copy()
    order = np.empty(piece_of.size, dtype=np.int64)
    for position in range(piece_of.size):
        order[place[piece_of[position]]] = position
        place[piece_of[position]] += 1
    return order, first


@njit(cache=True, nogil=True)
def _flood_pieces(levels: Any, labels: Any, seeds: Any, first_of_piece: Any) -> None:
    """Grow the labelled `seeds`, grouped by piece, over the unlabelled pixels with a level of 0 or more.

    A queue per level, threaded through `following`: a pixel waits in one queue, once.
    """
    width = levels.shape[1]
    flat, flat_labels = levels.ravel(), labels.ravel()
    head = np.full(NUM_LEVELS, -1, dtype=np.int32)
    tail = np.full(NUM_LEVELS, -1, dtype=np.int32)
    following = np.empty(flat.size, dtype=np.int32)
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
def _grow_and_number(
    levels: Any, basin_of: Any, parent: Any, peaks: Any, min_area_px: float
) -> Any:
    """Flood from the peaks, drop small cells, take off the frame."""
    height, width = levels.shape
    labels = np.zeros((height, width), dtype=np.int32)
    flat_labels = labels.ravel()
    # A piece of the mask with one peak is that cell, all of it; only the others are flooded.
    piece_of_peak = np.empty(peaks.size, dtype=np.int32)
    num_peaks_of = np.zeros(parent.size, dtype=np.int32)
    for position in range(peaks.size):
        piece = _find(parent, np.int32(-1 - basin_of[peaks[position]]))
        piece_of_peak[position] = piece
        num_peaks_of[piece] += 1
    label_of_piece = np.zeros(parent.size, dtype=np.int32)
    num_seeds = 0
    seeds = np.empty(peaks.size, dtype=np.int32)
    piece_of_seed = np.empty(peaks.size, dtype=np.int32)
    for position in range(peaks.size):
        piece = piece_of_peak[position]
        if num_peaks_of[piece] == 1:
            label_of_piece[piece] = position + 1
        else:
            flat_labels[peaks[position]] = position + 1
            seeds[num_seeds], piece_of_seed[num_seeds] = peaks[position], piece
            num_seeds += 1
    label_of_basin = np.zeros(parent.size, dtype=np.int32)
    for basin in range(1, parent.size):
        label_of_basin[basin] = label_of_piece[_find(parent, basin)]
    for index in range(flat_labels.size):
        if basin_of[index] != -1:
            label = label_of_basin[-1 - basin_of[index]]
            if label > 0:
                flat_labels[index] = label
    order, first_of_piece = _group(piece_of_seed[:num_seeds], parent.size)
    _flood_pieces(levels, labels, seeds[order], first_of_piece)

    areas = np.zeros(peaks.size + 1, dtype=np.int64)
    for index in range(flat_labels.size):
        areas[flat_labels[index]] += 1
    numbers = np.zeros(peaks.size + 1, dtype=np.uint32)
    num_cells = 0
    for label in range(1, peaks.size + 1):
        if areas[label] >= min_area_px:
            num_cells += 1
            numbers[label] = num_cells
    numbered = np.empty((height - 2, width - 2), dtype=np.uint32)
    for row in range(height - 2):
        for column in range(width - 2):
            numbered[row, column] = numbers[labels[row + 1, column + 1]]
    return numbered
