"""Distance map → labels: markers by persistence, then a seeded flood.

One rule finds the markers.  Let the map be a landscape and lower a water level from its highest
point: peaks appear as islands, and islands meet at saddles.  A peak is a cell if it is higher than
`peak_threshold` and rises at least `min_prominence` above the saddle where it meets a higher one.
A crescent has one peak whatever its centroid; a cell with two bumps has two peaks, but a high
saddle between them; two touching cells have a low one.
(Edelsbrunner, Letscher & Zomorodian 2002 call the rise persistence; Grimaud 1992, dynamics.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["NUM_LEVELS", "distance_map_to_labels", "find_markers", "flood", "quantize"]

NUM_LEVELS = 4096
"""Levels of the quantised map: finer than a network in bf16, and one bucket a level stays cheap."""


def distance_map_to_labels(
    distance_map: NDArray[Any],
    *,
    peak_threshold: float,
    fill_threshold: float,
    min_prominence: float = 0.05,
    min_area_px: int = 0,
) -> NDArray[np.uint32]:
    """Separate cells in a distance map by seeded watershed.

    Parameters
    ----------
    distance_map : (H, W) ndarray of values in [0, 1]
        0 outside cells and at their border, 1 at the deepest pixel; values beyond are clipped.
    peak_threshold, fill_threshold : float
        A cell's peak is above `peak_threshold`; a pixel above `fill_threshold` belongs to a cell.
        0 <= fill < peak < 1.
    min_prominence : float
        A peak that rises less than this above its saddle to a higher peak is part of that cell.
    min_area_px : int
        Smaller cells are dropped.

    Returns
    -------
    (H, W) uint32 ndarray
        0 is background, cells are 1..n without gaps in reading order of their peaks.  Connected
        pixels above `fill_threshold` without a peak are background.  All zeros when there is no peak.

    Raises
    ------
    ValueError
        `distance_map` is not 2-D or holds NaN, or a number is out of its range.
    """
    distance_map = _checked_map(distance_map)
    _check_thresholds(peak_threshold, fill_threshold, min_prominence)
    if min_area_px < 0:
        raise ValueError(f"`min_area_px` must be at least 0, got {min_area_px}: 0 keeps all cells")
    if distance_map.size == 0:
        return np.zeros(distance_map.shape, dtype=np.uint32)
    levels = _framed_levels(distance_map, fill_threshold)
    grown, peaks = _label_components(
        levels, _level_above(peak_threshold), min_prominence * (NUM_LEVELS - 1), True
    )
    return _number_cells(grown, peaks, min_area_px)


def find_markers(
    distance_map: NDArray[Any],
    *,
    peak_threshold: float,
    fill_threshold: float,
    min_prominence: float = 0.05,
) -> NDArray[np.int32]:
    """The first half of `distance_map_to_labels`: one pixel per cell.

    Returns
    -------
    (H, W) int32 ndarray
        0, and 1..n in reading order at the peaks.

    Raises
    ------
    ValueError
        As `distance_map_to_labels`.
    """
    distance_map = _checked_map(distance_map)
    _check_thresholds(peak_threshold, fill_threshold, min_prominence)
    if distance_map.size == 0:
        return np.zeros(distance_map.shape, dtype=np.int32)
    levels = _framed_levels(distance_map, fill_threshold)
    markers = _persistent_peaks(
        levels, _level_above(peak_threshold), min_prominence * (NUM_LEVELS - 1)
    )
    return np.ascontiguousarray(markers[1:-1, 1:-1])


def flood(
    distance_map: NDArray[Any], markers: NDArray[Any], mask: NDArray[np.bool_]
) -> NDArray[np.int32]:
    """The second half: grow markers downhill inside a mask, 4-connected, in linear time.

    A bucket queue over the quantised map (`quantize`): the same order as a priority queue by value
    and then by arrival, hence scikit-image's `watershed(-quantised, markers, mask=mask)` but for
    the order of equal markers at the start.

    Parameters
    ----------
    distance_map : (H, W) ndarray in [0, 1]
    markers : (H, W) integer ndarray
        Positive where cells start; outside of the mask they are ignored.
    mask : (H, W) boolean ndarray

    Returns
    -------
    (H, W) int32 ndarray
        Marker numbers, 0 where no marker reaches.

    Raises
    ------
    ValueError
        The shapes differ, or the map is not 2-D or holds NaN.
    """
    distance_map = _checked_map(distance_map)
    if markers.shape != distance_map.shape or mask.shape != distance_map.shape:
        raise ValueError(
            f"`markers` and `mask` must have the map's shape {distance_map.shape}, got "
            f"{markers.shape} and {mask.shape}: cut them alike"
        )
    if distance_map.size == 0:
        return np.zeros(distance_map.shape, dtype=np.int32)
    levels = np.full((mask.shape[0] + 2, mask.shape[1] + 2), -1, dtype=np.int16)
    levels[1:-1, 1:-1] = np.where(mask, quantize(distance_map), -1)
    grown = np.zeros(levels.shape, dtype=np.int32)
    grown[1:-1, 1:-1] = np.where(mask, markers, 0)
    _flood(levels, grown)
    return np.ascontiguousarray(grown[1:-1, 1:-1])


def quantize(distance_map: NDArray[Any]) -> NDArray[np.int16]:
    """Map [0, 1] to the integers 0..`NUM_LEVELS` − 1, rounding to the nearest."""
    scaled = np.clip(np.asarray(distance_map, dtype=np.float32), 0.0, 1.0)
    return np.rint(scaled * np.float32(NUM_LEVELS - 1)).astype(np.int16)


def _checked_map(distance_map: NDArray[Any]) -> NDArray[np.float32]:
    distance_map = np.asarray(distance_map)
    if distance_map.ndim != 2:
        raise ValueError(
            f"`distance_map` must be 2-D (H, W), got shape {distance_map.shape}: choose one plane"
        )
    if distance_map.dtype.kind not in "buif":
        raise ValueError(
            f"`distance_map` must hold real numbers, got dtype {distance_map.dtype}: convert it"
        )
    distance_map = np.ascontiguousarray(distance_map, dtype=np.float32)
    if distance_map.size and np.isnan(distance_map.min()):
        raise ValueError(
            "`distance_map` must not hold NaN, got some: look for the cause in the network's output"
        )
    return distance_map


def _check_thresholds(peak: float, fill: float, prominence: float) -> None:
    if not 0.0 <= fill < peak < 1.0:
        raise ValueError(
            f"thresholds must hold 0 <= fill < peak < 1, got fill {fill} and peak {peak}: lower "
            "fill_threshold or raise peak_threshold"
        )
    if not 0.0 <= prominence <= 1.0:
        raise ValueError(f"`min_prominence` must be in [0, 1], got {prominence}: 0.05 is usual")


def _level_above(threshold: float) -> int:
    """The lowest level whose value is above `threshold`."""
    return int(np.floor(threshold * (NUM_LEVELS - 1))) + 1


@njit(cache=True, nogil=True)
def _framed_levels(distance_map, fill_threshold):  # type: ignore[no-untyped-def]
    """Quantised map with −1 outside the mask and in a frame of one pixel, which spares bounds checks."""
    height, width = distance_map.shape
    levels = np.full((height + 2, width + 2), np.int16(-1), dtype=np.int16)
    top = np.float32(NUM_LEVELS - 1)
    fill = np.float32(fill_threshold)
    for row in range(height):
        for column in range(width):
            value = distance_map[row, column]
            if value > fill:
                levels[row + 1, column + 1] = np.int16(np.rint(min(value, np.float32(1.0)) * top))
    return levels


@njit(cache=True, nogil=True)
def _find(parent, basin):  # type: ignore[no-untyped-def]
    while parent[basin] != basin:
        parent[basin] = parent[parent[basin]]
        basin = parent[basin]
    return basin


@njit(cache=True, nogil=True)
def _collect_component(first, flat, width, visited, pixels):  # type: ignore[no-untyped-def]
    """Gather the 4-connected masked pixels around `first` into `pixels`; return how many."""
    visited[first] = True
    pixels[0] = first
    count, position = 1, 0
    while position < count:
        index = pixels[position]
        position += 1
        for step in (-width, -1, 1, width):
            neighbour = index + step
            if flat[neighbour] >= 0 and not visited[neighbour]:
                visited[neighbour] = True
                pixels[count] = neighbour
                count += 1
    return count


@njit(cache=True, nogil=True)
def _sort_by_level(pixels, count, flat, counts, order):  # type: ignore[no-untyped-def]
    """Counting sort into `order`, highest level first; `counts` is zero before and after."""
    lowest, highest = NUM_LEVELS, 0
    for position in range(count):
        level = flat[pixels[position]]
        counts[level] += 1
        lowest, highest = min(lowest, level), max(highest, level)
    total = 0
    for level in range(highest, lowest - 1, -1):
        counts[level], total = total, total + counts[level]
    for position in range(count):
        level = flat[pixels[position]]
        order[counts[level]] = pixels[position]
        counts[level] += 1
    for level in range(lowest, highest + 1):
        counts[level] = 0


@njit(cache=True, nogil=True)
def _component_peaks(  # type: ignore[no-untyped-def]
    order, count, flat, width, peak_level, prominence, basin_of, parent, peak, found
):
    """Write the peaks that are cells to `found`; return how many.

    Pixels come from high to low.  A pixel without a visited neighbour starts a basin; one with
    several joins them, and the lower peaks are judged there and then.  Of equal peaks the one
    visited first counts as the higher.
    """
    num_basins, num_found = 0, 0
    for position in range(count):
        index = order[position]
        level = flat[index]
        own = 0
        for step in (-width, -1, 1, width):
            neighbour = basin_of[index + step]
            if neighbour == 0:
                continue
            other = _find(parent, neighbour)
            if own == 0:
                own = other
            elif own != other:
                # Basins are numbered from the highest peak down.
                high, low = min(own, other), max(own, other)
                low_level = flat[peak[low]]
                rise = low_level - level
                if low_level >= peak_level and rise >= prominence and rise > 0:
                    found[num_found] = peak[low]
                    num_found += 1
                parent[low] = high
                own = high
        if own == 0:
            num_basins += 1
            own = num_basins
            parent[own] = own
            peak[own] = index
        basin_of[index] = own
    # A component has one basin in the end, the first: its highest peak.
    if num_basins > 0 and flat[peak[1]] >= peak_level:
        found[num_found] = peak[1]
        num_found += 1
    return num_found


@njit(cache=True, nogil=True)
def _persistent_peaks(levels, peak_level, prominence):  # type: ignore[no-untyped-def]
    """Markers 1..n, in reading order, at the peaks that are cells."""
    height, width = levels.shape
    markers, _ = _label_components(levels, peak_level, prominence, False)
    out = np.zeros((height, width), dtype=np.int32)
    flat_markers, flat_out = markers.ravel(), out.ravel()
    number = 0
    for index in range(flat_out.size):
        if flat_markers[index] > 0:
            number += 1
            flat_out[index] = number
    return out


@njit(cache=True, nogil=True)
def _label_components(levels, peak_level, prominence, grow):  # type: ignore[no-untyped-def]
    """Find the peaks of each component of the mask and, if `grow`, flood it from them.

    Components are independent, and one at a time stays in the processor's cache.

    Returns the framed label image, numbered from 1 in order of discovery, and the peak pixel of
    each number (position 0 is unused).
    """
    height, width = levels.shape
    flat = levels.ravel()
    size = flat.size
    num_masked = 0
    for index in range(size):
        num_masked += flat[index] >= 0
    labels = np.zeros((height, width), dtype=np.int32)
    flat_labels = labels.ravel()
    visited = np.zeros(size, dtype=np.bool_)
    basin_of = np.zeros(size, dtype=np.int32)
    following = np.full(size, -1, dtype=np.int32)
    pixels = np.empty(num_masked + 1, dtype=np.int32)
    order = np.empty(num_masked + 1, dtype=np.int32)
    parent = np.empty(num_masked + 2, dtype=np.int32)
    peak = np.empty(num_masked + 2, dtype=np.int32)
    found = np.empty(num_masked + 1, dtype=np.int32)
    counts = np.zeros(NUM_LEVELS, dtype=np.int64)
    head = np.full(NUM_LEVELS, -1, dtype=np.int32)
    tail = np.full(NUM_LEVELS, -1, dtype=np.int32)
    peaks = np.empty(num_masked + 1, dtype=np.int32)
    number = 0
    for first in range(size):
        if flat[first] < 0 or visited[first]:
            continue
        count = _collect_component(first, flat, width, visited, pixels)
        highest = 0
        for position in range(count):
            highest = max(highest, flat[pixels[position]])
        if highest < peak_level:
            continue
        _sort_by_level(pixels, count, flat, counts, order)
        num_found = _component_peaks(
            order, count, flat, width, peak_level, prominence, basin_of, parent, peak, found
        )
        for position in range(num_found):
            number += 1
            peaks[number] = found[position]
            flat_labels[found[position]] = number
        if not grow:
            continue
        if num_found == 1:  # the flood would reach every pixel of the component
            for position in range(count):
                flat_labels[pixels[position]] = number
        else:
            _flood_from(found, num_found, flat, width, flat_labels, head, tail, following)
    return labels, peaks[: number + 1]


@njit(cache=True, nogil=True)
def _flood_from(  # type: ignore[no-untyped-def]
    seeds, num_seeds, flat, width, flat_labels, head, tail, following
):
    """Grow the labelled `seeds` over the unlabelled pixels with a level >= 0.

    One first-in-first-out list a level, threaded through `following`: a pixel waits at most once.
    `head` is −1 everywhere before and after.
    """
    current = -1
    for position in range(num_seeds):
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
def _flood(levels, labels):  # type: ignore[no-untyped-def]
    """Grow the markers in `labels` in place over the pixels with a level >= 0."""
    flat, flat_labels = levels.ravel(), labels.ravel()
    size = flat.size
    seeds = np.empty(size, dtype=np.int32)
    num_seeds = 0
    for index in range(size):
        if flat_labels[index] > 0 and flat[index] >= 0:
            seeds[num_seeds] = index
            num_seeds += 1
    head = np.full(NUM_LEVELS, -1, dtype=np.int32)
    tail = np.full(NUM_LEVELS, -1, dtype=np.int32)
    following = np.full(size, -1, dtype=np.int32)
    _flood_from(seeds, num_seeds, flat, levels.shape[1], flat_labels, head, tail, following)


def _number_cells(
    grown: NDArray[np.int32], peaks: NDArray[np.int32], min_area_px: int
) -> NDArray[np.uint32]:
    """Framed labels → uint32 labels without frame or gaps, in reading order of their peaks."""
    areas = np.bincount(grown.ravel(), minlength=peaks.size)
    numbers = np.zeros(peaks.size, dtype=np.uint32)
    in_order = 1 + np.argsort(peaks[1:])
    kept = in_order[areas[in_order] >= min_area_px]
    numbers[kept] = np.arange(1, kept.size + 1, dtype=np.uint32)
    return numbers[grown[1:-1, 1:-1]]
