"""Which peaks of a distance map are cells: markers by persistence.

Let the map be a landscape and lower a water level from its highest point: peaks appear as islands,
and islands meet at saddles.  Where two meet, the lower peak is a cell of its own if it is higher than
`peak_threshold` and rises at least `min_prominence` above the saddle; else it is part of the other.
A crescent has one peak wherever its centroid lies; a cell with two bumps has a high saddle between
them; two touching cells have a low one.  (Edelsbrunner, Letscher & Zomorodian, "Topological
persistence and simplification", 2002, call the rise persistence; Grimaud 1992, dynamics.)
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.scratch import zeros_like
from dinocell.segmentation.levels import NUM_LEVELS, checked_map, framed_levels
from dinocell.segmentation.thresholds import Thresholds


def find_markers(distance_map: ArrayLike, thresholds: Thresholds) -> NDArray[np.int32]:
    """The first half of `separate_cells`: one pixel per cell, its highest.

    `distance_map`: (H, W) array of values in [0, 1], as for `distance_map_to_labels`, with the same
    errors.  `thresholds`: Thresholds, `min_area_px` has no effect here.  Returns (H, W) int32
    ndarray: 1..n in reading order at the peaks, 0 elsewhere.  Of several equally high pixels of a
    cell the first in reading order is its peak.
    """
    array = checked_map(distance_map)
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    levels = framed_levels(array, thresholds.fill_threshold)
    _, _, peaks = merge_basins(levels, thresholds)
    framed = np.zeros(levels.shape, np.int32)
    framed.ravel()[peaks] = np.arange(1, peaks.size + 1)
    return np.ascontiguousarray(framed[1:-1, 1:-1])


def merge_basins(
    levels: NDArray[np.int16], thresholds: Thresholds
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Basins, pieces of the mask, and peaks that are cells.

    Each pixel climbs to its highest neighbour until it arrives at a peak; the pixels that arrive at one
    peak are its basin.  Two neighbouring pixels of different basins are a pass, as high as the lower of
    them.  Inside a basin every pixel has a way to the peak that never sinks below the pixel, so two peaks
    lie on one island exactly when passes at or above the water level connect their basins:
    the few basins and passes stand for all pixels.  Passes sorted from high to low and joined one after
    the other (Kruskal's spanning forest) hence show where islands meet, and which peak is lower there.

    Equally high pixels are ordered by their position, so no plateau needs a special case.  Passes are
    sorted by counting.  All is linear in the number of pixels, but for the disjoint sets (`_find`): a
    logarithm at worst, and in practice one or two steps per pass.

    `levels`: (H + 2, W + 2) int16 ndarray, from `framed_levels`.  `thresholds`: Thresholds.

    Returns
    -------
    basin_of : flat int32 ndarray
        −1 − basin of each framed pixel; −1 outside the mask, as basins count from 1.
    piece_of_basin : int32 ndarray
        The connected piece of the mask that each basin lies in, named by one of its basins.
    peaks : int32 ndarray
        Flat positions of the peaks that are cells, ascending.
    """
    top = NUM_LEVELS - 1
    peak_level = (
        int(np.floor(thresholds.peak_threshold * top)) + 1
    )  # the lowest above the threshold
    rise = thresholds.min_prominence * top
    basin_of = zeros_like(levels, (levels.size,), np.int32)
    basin_of -= 1
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


@njit
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


@njit
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


@njit
def _find(parent: Any, basin: Any) -> Any:
    while parent[basin] != basin:
        parent[basin] = parent[parent[basin]]
        basin = parent[basin]
    return basin


# Two pixels side by side in different basins are a pass between these, as high as the lower pixel.


@njit
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


@njit
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


@njit
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

    When a pass joins two sets of basins, all higher passes have been taken and did not join them, so
    this pass is their saddle.  The set is named by its highest peak; the other, lower peak ends here, and
    its height above the saddle is its prominence (the elder rule of persistent homology).  It is a cell
    if it is high and prominent enough.  A prominence of 0 is never enough: such a "peak" is a part of a
    plateau that climbs elsewhere.  The highest peak of a connected piece meets no higher one and must
    only exceed the peak threshold.  In the end `parent` names one basin for all of a connected piece.
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
