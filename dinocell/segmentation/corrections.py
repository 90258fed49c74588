"""Corrections of labels by hand: cells are removed, merged, split, grown and painted.

Every function takes (H, W) uint32 labels, 0 background, and returns changed ones; the input stays as
it is.  The numbers of other cells stay, so that gaps may arise; new cells get numbers above all others.
Positions are (row, column) in pixels.  What the mouse only hints at, the distance map decides, with the
flood of `dinocell.segmentation.watershed`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dinocell.errors import UsageError
from dinocell.segmentation.markers import find_markers
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import flood, separate_cells

Labels = NDArray[np.uint32]
Position = tuple[float, float]

_FAINTEST = 0.02
"""Below this a peak of the distance map is no hint at a cell."""
_PROMINENCES = (0.1, 0.05, 0.02, 0.005, 0.0)
"""Tried one after the other where a cell is to be split without a hint: real valleys come first."""


def remove_cells(labels: Labels, cells: Sequence[int]) -> Labels:
    """Cells become background; UsageError if one of them does not exist."""
    _require(labels, cells, 1)
    return np.where(np.isin(labels, cells), 0, labels).astype(np.uint32)


def merge_cells(labels: Labels, cells: Sequence[int]) -> Labels:
    """Cells get the number of the first; UsageError for fewer than two, or one that does not exist."""
    _require(labels, cells, 2)
    return np.where(np.isin(labels, cells), cells[0], labels).astype(np.uint32)


def split_cell(
    labels: Labels, distance_map: NDArray[np.float32], cell: int, seeds: Sequence[Position] = ()
) -> Labels:
    """Split a cell by two seeds, or without any where the map has its deepest valley.

    Each seed climbs to its peak of the map.  If these are two peaks, the cell is flooded from them; if
    the map has no valley between the seeds, each pixel goes to the seed that is closer inside the cell.

    Raises UsageError (the cell does not exist; a seed is outside of it; the map has one peak in it).
    """
    _require(labels, [cell], 1)
    box, inside, heights = _cut_out(labels, distance_map, cell)
    markers = np.zeros(inside.shape, np.int32)
    if not seeds:
        result = labels.copy()
        _split(result, box, flood(heights, _peaks(heights), inside))
        return result
    places = [_place(labels.shape, seed) for seed in seeds]
    if len(set(places)) < 2 or any(labels[place] != cell for place in places):
        raise UsageError(
            f"Seeds must be two or more different pixels of cell {cell}, got {places}: choose pixels "
            "inside of it"
        )
    local = [(row - box[0].start, column - box[1].start) for row, column in places]
    peaks = [_climb(heights, place) for place in local]
    distinct = len(set(peaks)) == len(peaks)
    for number, place in enumerate(peaks if distinct else local, start=1):
        markers[place] = number
    # on a flat map the flood is a breadth-first search: the closer seed wins
    grown = flood(heights if distinct else np.zeros_like(heights), markers, inside)
    result = labels.copy()
    _split(result, box, grown)
    return result


def cut_cells(
    labels: Labels,
    distance_map: NDArray[np.float32],
    line: Sequence[Position],
    cells: Sequence[int] = (),
) -> Labels:
    """Split the cells that a line crosses from border to border, all of them or those of `cells`.

    The pieces beside the line are seeds; its pixels go where the map has their way down.

    Raises UsageError (the line crosses no cell).
    """
    path = line_pixels(labels.shape, line)
    apart = np.zeros(labels.shape, bool)
    apart[path] = True
    result = None
    for cell in np.unique(labels[path]):
        if cell == 0 or (cells and cell not in cells):
            continue
        box, inside, heights = _cut_out(labels, distance_map, cell)
        pieces, count = ndimage.label(inside & ~apart[box])
        if count > 1:
            result = labels.copy() if result is None else result
            _split(result, box, flood(heights, pieces, inside))
    if result is None:
        raise UsageError(
            "A line must cross a cell from border to border, got one that divides none: draw it longer"
        )
    return result


def grow_cell(
    labels: Labels, distance_map: NDArray[np.float32], at: Position, thresholds: Thresholds
) -> Labels:
    """Find the cell at a pixel that the thresholds have missed.

    The map outside all cells is separated with a peak threshold just below the peak to which the pixel
    climbs, and a fill threshold that is as much lower as the peak is below 1.

    Raises UsageError (the pixel belongs to a cell; the map is flat there).
    """
    place = _place(labels.shape, at)
    if labels[place]:
        raise UsageError(
            f"A new cell must start in the background, got a pixel of cell {labels[place]}: choose "
            "another one"
        )
    free = np.where(labels == 0, distance_map, 0).astype(np.float32)
    peak = float(free[_climb(free, place)])
    fill = min(thresholds.fill_threshold * peak, float(free[place]) * 0.98)
    if peak < _FAINTEST or free[place] <= 0:
        raise UsageError(
            "The network must see something where a cell is grown, and it sees nothing there: draw the "
            "cell with the brush"
        )
    pieces, _ = ndimage.label(free > fill)
    box = ndimage.find_objects((pieces == pieces[place]).astype(np.int8))[0]
    lower = Thresholds(
        min(thresholds.peak_threshold, 0.98 * peak), fill, thresholds.min_prominence, 0
    )
    found = separate_cells(np.where(pieces[box] == pieces[place], free[box], 0), lower)
    number = found[place[0] - box[0].start, place[1] - box[1].start]
    result = labels.copy()
    result[box][found == number] = _next_number(labels)
    return result


def paint_cell(
    labels: Labels, stroke: Sequence[Position], radius_px: float, cell: int | None = None
) -> Labels:
    """Add a stroke of a round brush to a cell, or make a new cell of it; other cells keep their pixels.

    Raises UsageError (the cell does not exist; the stroke has no pixel outside other cells).
    """
    if cell is not None:
        _require(labels, [cell], 1)
    box, brushed = _brushed(labels.shape, stroke, radius_px)
    wanted = brushed & (labels[box] == 0)
    if not wanted.any():
        raise UsageError(
            "A stroke must reach the background, and it lies on other cells: erase there first"
        )
    result = labels.copy()
    result[box][wanted] = cell or _next_number(labels)
    return result


def erase(
    labels: Labels,
    stroke: Sequence[Position],
    radius_px: float,
    cells: Sequence[int] = (),
    *,
    min_area_px: int = 0,
) -> Labels:
    """Make the pixels under a stroke background, those of `cells` only if there are any.

    A cell that falls to pieces becomes several: the largest keeps the number, and pieces of fewer than
    `min_area_px` pixels vanish.
    """
    box, brushed = _brushed(labels.shape, stroke, radius_px)
    brushed &= np.isin(labels[box], cells) if cells else labels[box] > 0
    result = labels.copy()
    result[box][brushed] = 0
    for cell in np.unique(labels[box][brushed]):
        rest = result == cell
        if not rest.any():
            continue
        whole = ndimage.find_objects(rest.astype(np.int8))[0]
        pieces, count = ndimage.label(rest[whole], np.ones((3, 3)))
        areas = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
        for piece in np.argsort(areas, kind="stable")[::-1][1:]:
            number = _next_number(result) if areas[piece] >= max(min_area_px, 1) else 0
            result[whole][pieces == piece + 1] = number
    return result


def same_numbers(before: Labels, after: NDArray[np.integer]) -> Labels:
    """Labels of any numbers, where cells of `before` that are unchanged get their number back.

    The others get numbers above all of `before`, in their order.
    """
    values, places = np.unique(after, return_inverse=True)
    places = places.reshape(after.shape)
    first = np.unique(places, return_index=True)[1]
    was = before.ravel()[first].astype(np.int64)
    common = np.bincount(places[was[places] == before], minlength=values.size)
    same = (common == np.bincount(places.ravel(), minlength=values.size)) & (was > 0)
    same &= common == np.bincount(before.ravel())[was]
    fresh = ~same & (values != 0)
    numbers = np.where(same, was, 0)
    numbers[fresh] = int(before.max(initial=0)) + 1 + np.arange(np.count_nonzero(fresh))
    numbers[values == 0] = 0
    return numbers[places].astype(np.uint32)


def touched_by(before: Labels, after: Labels) -> NDArray[np.bool_]:
    """(H, W) pixels that a correction decides: those that have changed, and all of the cells around."""
    changed = before != after
    numbers = np.union1d(before[changed], after[changed])
    return changed | (np.isin(after, numbers) & (after > 0))


def keep_touched(found: Labels, before: Labels, touched: NDArray[np.bool_]) -> Labels:
    """Cells of other thresholds around what was corrected by hand.

    Touched pixels stay as they are in `before`.  A found cell gives way where it overlaps them, and
    vanishes if it loses more than half of its pixels, because it is then one that was corrected.
    """
    if not touched.any():
        return found
    areas = np.bincount(found.ravel())
    rest = np.where(touched, 0, found)
    left = np.bincount(rest.ravel(), minlength=areas.size)
    kept = 2 * left > areas
    kept[0] = False
    offset = int(before[touched].max(initial=0))
    numbers = np.where(kept, kept.cumsum() + offset, 0).astype(np.uint32)
    return np.where(touched, before, numbers[rest])


def line_pixels(shape: tuple[int, ...], line: Sequence[Position]) -> tuple[NDArray, NDArray]:
    """Rows and columns of the 8-connected pixels of a line through points; outside it runs on the border."""
    places = [_place(shape, point, clip=True) for point in line]
    rows, columns = [], []
    for (row, column), (to_row, to_column) in zip(places, places[1:] or places, strict=False):
        steps = max(abs(to_row - row), abs(to_column - column)) + 1
        rows.append(np.floor(np.linspace(row, to_row, steps) + 0.5))
        columns.append(np.floor(np.linspace(column, to_column, steps) + 0.5))
    return np.concatenate(rows).astype(int), np.concatenate(columns).astype(int)


def _require(labels: Labels, cells: Sequence[int], least: int) -> None:
    if len(set(cells)) < least:
        raise UsageError(
            f"A correction of this kind must name {least} cells or more, got {len(set(cells))}: select "
            "more"
        )
    missing = set(cells) - set(np.unique(labels[np.isin(labels, cells)]).tolist()) | (
        {0} & {*cells}
    )
    if missing:
        raise UsageError(
            f"Cells must be in the image, got {min(missing)}, which is not: select others"
        )


def _place(shape: tuple[int, ...], at: Position, *, clip: bool = False) -> tuple[int, int]:
    row, column = (int(np.floor(value)) for value in at)
    if clip:
        return min(max(row, 0), shape[0] - 1), min(max(column, 0), shape[1] - 1)
    if not (0 <= row < shape[0] and 0 <= column < shape[1]):
        raise UsageError(
            f"Positions must be inside the image of {shape[0]} × {shape[1]} pixels, got row {row}, "
            f"column {column}: choose another one"
        )
    return row, column


def _next_number(labels: Labels) -> int:
    return int(labels.max(initial=0)) + 1


def _cut_out(
    labels: Labels, distance_map: NDArray[np.float32], cell: int
) -> tuple[tuple[slice, slice], NDArray[np.bool_], NDArray[np.float32]]:
    """Bounding box, mask, and the map inside a cell; background around it is 0."""
    box = ndimage.find_objects((labels == cell).astype(np.int8))[0]
    inside = labels[box] == cell
    return box, inside, np.where(inside, distance_map[box], 0).astype(np.float32)


def _peaks(heights: NDArray[np.float32]) -> NDArray[np.int32]:
    """The two highest peaks with the deepest valley that there is between any."""
    for prominence in _PROMINENCES:
        markers = find_markers(heights, Thresholds(1e-3, 0.0, prominence, 0))
        if markers.max() > 1:
            places = np.nonzero(markers)
            order = np.argsort(-heights[places], kind="stable")[:2]
            two = np.zeros_like(markers)
            two[places[0][order], places[1][order]] = (1, 2)
            return two
    raise UsageError(
        "A cell that is split without seeds must have two peaks in the distance map, got one: draw a "
        "line through the cell"
    )


def _split(labels: Labels, box: tuple[slice, slice], pieces: NDArray[np.int32]) -> None:
    """Number the pieces, in place; the largest keeps the number, and so do pixels that no seed reaches."""
    areas = np.bincount(pieces.ravel())
    areas[0] = 0
    number = _next_number(labels)
    for piece in np.flatnonzero(areas):
        if piece != areas.argmax():
            labels[box][pieces == piece] = number
            number += 1


def _climb(heights: NDArray[np.float32], place: tuple[int, int]) -> tuple[int, int]:
    """The peak that a pixel reaches by its highest neighbour, again and again."""
    while True:
        row, column = place
        rows = slice(max(row - 1, 0), row + 2)
        columns = slice(max(column - 1, 0), column + 2)
        around = heights[rows, columns]
        if around.max() <= heights[place]:
            return place
        highest = np.unravel_index(around.argmax(), around.shape)
        place = (rows.start + int(highest[0]), columns.start + int(highest[1]))


def _brushed(
    shape: tuple[int, ...], stroke: Sequence[Position], radius_px: float
) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """Box of a stroke and the pixels in it whose centre is within `radius_px` of its line."""
    rows, columns = line_pixels(shape, stroke)
    margin = int(np.ceil(radius_px)) + 1
    box = (
        slice(max(int(rows.min()) - margin, 0), int(rows.max()) + margin + 1),
        slice(max(int(columns.min()) - margin, 0), int(columns.max()) + margin + 1),
    )
    height = min(box[0].stop, shape[0]) - box[0].start
    width = min(box[1].stop, shape[1]) - box[1].start
    away = np.ones((height, width), bool)
    away[rows - box[0].start, columns - box[1].start] = False
    return box, ndimage.distance_transform_edt(away) <= max(radius_px - 0.5, 0)
