"""Labels → distance map, the target that the network learns.

A distance map holds, for every pixel of a cell, how deep it lies inside *that* cell: the distance to
the nearest pixel outside, divided by the largest such distance in the cell.  Every cell peaks at 1
whatever its size, and two touching cells are parted by a valley, since each is outside the other.

Two targets:

``linear``
    That ratio as it is (SAMCell's target, with the exact distance in place of its approximation).
``sqrt``
    Its square root: steeper at the border and flatter in the middle.  A network errs by some amount in
    *value*; where the map is steep, the same error moves the border by less.  Chosen as the default by
    experiment, ``docs/decisions/0002-distance-target.md``.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.labels import check_labels
from dinocell.scratch import as_if_writable, contiguous, zeros_like

TARGETS: tuple[str, ...] = ("linear", "sqrt")
"""Known values of `target`."""

DEFAULT_TARGET: str = "sqrt"
"""The target that is learned unless a configuration says otherwise."""

_LARGEST_TABLE = 2**24
"""Labels up to here index a table directly.  Its memory is asked for in zeroed pages that cost nothing
until a label falls on them; larger labels are renumbered first."""


def labels_to_distance_map(labels: ArrayLike, *, target: str = DEFAULT_TARGET) -> NDArray[Any]:
    """Compute how deep each pixel lies inside its cell, from 0 outside to 1 at the deepest.

    Parameters
    ----------
    labels : (H, W) integer array-like
        Label image, 0 is background.  Any integer dtype, any positive labels, with gaps.
    target : {"sqrt", "linear"}; ``linear``: Euclidean distance, in pixels, to the nearest pixel
        outside the cell, divided by its maximum in the cell.  ``sqrt``: the square root of that.

    Returns (H, W) float32 ndarray, values in [0, 1]: 0 in the background, above 0 inside cells,
    exactly 1 at the deepest pixel (or pixels) of each.  All zeros when there is no cell; same shape
    when H or W is 0.

    Raises TypeError (`labels` is not of an integer type (a boolean mask is none: label it first));
    ValueError (`labels` is not 2-D, holds a negative number, or `target` is unknown).

    Notes
    -----
    A cell is all pixels of one label; the pieces of a cell in two parts share one maximum.  Another
    cell is outside, a hole is outside, the edge of the image is *not*: a cell cut by it is as deep there
    as if it went on.  Hence a cell that fills the whole image, where no pixel is outside, is 1 everywhere.

    The distance is exact, and found in a time that is linear in the number of pixels, whatever the number
    of cells.

    Examples
    --------
    >>> labels_to_distance_map([[0, 7, 7, 7, 0, 9]], target="linear").tolist()
    [[0.0, 0.5, 1.0, 0.5, 0.0, 1.0]]
    """
    if target not in TARGETS:
        raise ValueError(
            f"`target` must be one of {', '.join(map(repr, TARGETS))}, got {target!r}: choose one of these"
        )
    table_index, table_size = _table_index(labels)
    depth_px = zeros_like(table_index, table_index.shape, np.float32)
    if depth_px.size:
        deepest_px = np.zeros(table_size, np.float32)
        column_distance = zeros_like(table_index, table_index.shape, np.int32)
        _column_distance(table_index, column_distance)
        _depth_inside_cells(table_index, column_distance, depth_px, deepest_px)
        _divide_by_deepest(table_index, deepest_px, target == "sqrt", depth_px)
    return depth_px


def _table_index(labels: ArrayLike) -> tuple[NDArray[np.int32], int]:
    """Labels that fit a table, and the size of that table."""
    array = check_labels(labels)
    if array.ndim != 2:
        raise ValueError(
            f"`labels` must be 2-D (H, W), got shape {array.shape}: give one label image"
        )
    if not array.size:
        return np.zeros(array.shape, np.int32), 1
    largest = int(array.max())
    if largest >= _LARGEST_TABLE:
        array, largest = _renumbered(array)
    return as_if_writable(contiguous(array, np.int32)), largest + 1


def _renumbered(labels: NDArray[Any]) -> tuple[NDArray[Any], int]:
    """The same cells as 1..n, 0 kept, and n; sorts the runs of equal labels and not the pixels."""
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    names, number_of_run = np.unique(flat[starts], return_inverse=True)
    number_of_run = number_of_run + int(names[0] != 0)
    numbers = np.repeat(number_of_run, np.diff(starts, append=flat.size))
    return numbers.reshape(labels.shape), int(number_of_run.max())


@njit
def _column_distance(labels: NDArray[Any], distance: NDArray[Any]) -> None:
    """Write the distance in px, within the column, to the nearest pixel of another label; 2³⁰ if none.

    One pass downwards counts from the last change of label above, one upwards from the next below.
    """
    height, width = labels.shape
    none = 1 << 30
    for column in range(width):
        distance[0, column] = none
    for row in range(1, height):
        for column in range(width):
            if labels[row, column] != labels[row - 1, column]:
                distance[row, column] = 1
            else:
                distance[row, column] = min(distance[row - 1, column] + 1, none)
    for row in range(height - 2, -1, -1):
        for column in range(width):
            if labels[row, column] != labels[row + 1, column]:
                distance[row, column] = 1
            else:
                distance[row, column] = min(distance[row, column], distance[row + 1, column] + 1)


@njit
def _depth_inside_cells(
    labels: NDArray[Any], column_distance: NDArray[Any], depth_px: NDArray[Any], deepest_px: Any
) -> None:
    """Write the distance to the nearest pixel outside the cell, and its maximum per label.

    `depth_px` is 0 in the background and infinite where no pixel is outside.

    The squared distance of a pixel is the least, over the columns of its row, of the squared step along
    the row plus the squared `column_distance` of that column.  As a function of the pixel's column each
    term is a parabola, and the least of them is their lower envelope: one pass from the left keeps the
    parabolas that are lowest somewhere and where each takes over, a second pass reads the values.  It is
    enough to look at one run of the cell's pixels and the two pixels that end it: these are outside, and
    anything beyond them is farther.  Each parabola enters and leaves once, so the time is linear.
    (Felzenszwalb & Huttenlocher, "Distance transforms of sampled functions", Theory of Computing 8, 2012,
    section 2, algorithm 1.)
    """
    height, width = labels.shape
    none = 1 << 30
    # The lower envelope of one run: parabola k has its vertex at `vertex[k]`, at `height_of[k]`, and is
    # the lowest from `start[k]` on.
    vertex = np.empty(width + 2, np.int64)
    height_of = np.empty(width + 2, np.int64)
    start = np.empty(width + 2, np.float64)
    for row in range(height):
        end = 0
        while end < width:
            begin = end
            label = labels[row, begin]
            end += 1
            while end < width and labels[row, end] == label:
                end += 1
            if label == 0:
                depth_px[row, begin:end] = 0.0
                continue

            last = -1
            # The pixels that end the run, at `begin - 1` and `end`, are vertices of height 0.
            for column in range(max(begin - 1, 0), min(end + 1, width)):
                outside = column < begin or column == end
                if outside:
                    squared = np.int64(0)
                elif column_distance[row, column] >= none:
                    continue
                else:
                    squared = np.int64(column_distance[row, column]) ** 2
                # The first parabola stays: it is the lowest from −∞ on, and every crossing is finite.
                crossing = -np.inf
                while last >= 0:
                    rise = squared - height_of[last] + column * column - vertex[last] * vertex[last]
                    crossing = rise / (2.0 * (column - vertex[last]))
                    if crossing > start[last]:
                        break
                    last -= 1
                last += 1
                vertex[last] = column
                height_of[last] = squared
                start[last] = crossing

            if last < 0:  # no pixel of the image lies outside this cell
                depth_px[row, begin:end] = np.inf
                deepest_px[label] = np.inf
                continue
            deepest = np.float32(0.0)
            lowest = 0
            for column in range(begin, end):
                while lowest < last and start[lowest + 1] <= column:
                    lowest += 1
                along = column - vertex[lowest]
                depth = np.float32(np.sqrt(np.float64(along * along + height_of[lowest])))
                depth_px[row, column] = depth
                deepest = max(deepest, depth)
            deepest_px[label] = max(deepest_px[label], deepest)


@njit
def _divide_by_deepest(labels: Any, deepest_px: Any, square_root: bool, depth_px: Any) -> None:
    height, width = labels.shape
    for row in range(height):
        for column in range(width):
            label = labels[row, column]
            if label == 0:
                continue
            deepest = deepest_px[label]
            share = np.float32(1.0)
            if deepest < np.inf:
                share = depth_px[row, column] / deepest
            depth_px[row, column] = np.sqrt(share) if square_root else share
