"""Counts of pixel configurations from which perimeters, the Euler number and hole areas follow.

`index` is the label image with cells renumbered 1..n and one background pixel added on every side.
All functions are compiled once and cached on disk by numba, and take time linear in the image.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.compilation import njit
from dinocell.results.runs import Runs
from dinocell.scratch import row_bands

# A 2x2 window is numbered 1·bottom right + 2·top right + 4·bottom left + 8·top left.
EULER_WEIGHTS = np.zeros(16, np.int64)
EULER_WEIGHTS[[6, 14]] = -1  # anti-diagonal pair; all but the bottom right
EULER_WEIGHTS[8] = 1  # top left alone
# Crofton: of the lines in 4 directions, which leave the cell in this window?
_ALONG = math.pi / 4
_DIAGONAL = math.pi / 4 / math.sqrt(2)
CROFTON_WEIGHTS = np.array(
    [
        _ALONG * bool(code & 1 and not code & 2)  # up a column: leaves the cell at the top right
        + _ALONG * bool(code & 8 and not code & 2)  # along a row: leaves it at the top right
        + _DIAGONAL * bool(code & 1 and not code & 8)  # along the diagonal
        + _DIAGONAL * bool(code & 2 and not code & 4)  # along the other diagonal
        for code in range(16)
    ]
)


def border_counts(runs: Runs) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """`quad_histogram` and `border_pixels` of all cells, from one band of rows after the other."""
    num_cells = len(runs.label)
    quads, steps = np.zeros((num_cells, 16), np.int64), np.zeros((num_cells, 3), np.int64)
    cells, pixels = [np.empty(0, np.int32)], [np.empty((0, 2), np.int32)]
    for rows in row_bands(runs.shape):
        # The corners above the first row belong to this band, those below the last row to the next one.
        top, bottom = rows.start - 2, rows.stop + 2
        near = (runs.row >= top) & (runs.row < bottom)
        index = index_image(
            bottom - top - 2,
            runs.shape[1],
            runs.row[near] - top - 1,
            runs.start[near],
            runs.stop[near],
            runs.cell[near],
        )
        last = rows.stop == runs.shape[0]
        quads += quad_histogram(index[1 : -1 if last else -2], num_cells)[1:]
        cell, pixel, step = border_pixels(index, num_cells)
        steps += step[1:]
        cells.append(cell)
        pixels.append(pixel + np.array([rows.start, 0], np.int32))
    return quads, steps, np.concatenate(cells), np.concatenate(pixels)


@njit
def index_image(
    height: int,
    width: int,
    row: NDArray[Any],
    start: NDArray[Any],
    stop: NDArray[Any],
    cell: NDArray[Any],
) -> NDArray[Any]:
    index = np.zeros((height + 2, width + 2), np.int32)
    for i in range(len(row)):
        for col in range(start[i], stop[i]):
            index[row[i] + 1, col + 1] = cell[i] + 1
    return index


@njit
def quad_histogram(index: NDArray[Any], num_cells: int) -> NDArray[Any]:
    """Count the 2x2 windows of each number (see above) for each cell, full windows left out.

    A window is counted once for each label in it, from that label's view.  Euler number and Crofton
    perimeter are sums over the windows of a weight per number (Ohser, Nagel & Schladitz 2002).
    """
    histogram = np.zeros((num_cells + 1, 16), np.int64)
    for row in range(index.shape[0] - 1):
        for col in range(index.shape[1] - 1):
            a = index[row, col]
            b = index[row, col + 1]
            c = index[row + 1, col]
            d = index[row + 1, col + 1]
            if a == b and a == c and a == d:
                continue
            histogram[d, 1 + 2 * (b == d) + 4 * (c == d) + 8 * (a == d)] += 1
            if b != d:
                histogram[b, 2 + 4 * (c == b) + 8 * (a == b)] += 1
            if c != d and c != b:
                histogram[c, 4 + 8 * (a == c)] += 1
            if a != d and a != b and a != c:
                histogram[a, 8] += 1
    return histogram


@njit
def border_pixels(
    index: NDArray[Any], num_cells: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """List the pixels with a side on another label, and count their configurations.

    `index` has a second row above and below, whose pixels decide but are not listed.  Returns the cell
    and the position (row, column) of each border pixel in raster order, and per cell the number of
    border pixels that stand for a straight step, a diagonal step and half of each.  How many of a border
    pixel's four sides and four corners are border pixels of the same cell decides which (the table of
    Benkrid & Crookes 2000, as scikit-image reads it).
    """
    height, width = index.shape
    border = np.zeros((height, width), np.bool_)
    total = 0
    for row in range(1, height - 1):
        for col in range(1, width - 1):
            k = index[row, col]
            if k != 0 and (
                index[row - 1, col] != k
                or index[row + 1, col] != k
                or index[row, col - 1] != k
                or index[row, col + 1] != k
            ):
                border[row, col] = True
                total += 1 < row < height - 2
    cell = np.empty(total, np.int32)
    pixel = np.empty((total, 2), np.int32)
    steps = np.zeros((num_cells + 1, 3), np.int64)
    i = 0
    for row in range(2, height - 2):
        for col in range(1, width - 1):
            if not border[row, col]:
                continue
            k = index[row, col]
            cell[i] = k
            pixel[i, 0] = row - 2
            pixel[i, 1] = col - 1
            i += 1
            sides = 0
            corners = 0
            for dr in range(-1, 2):
                for dc in range(-1, 2):
                    if border[row + dr, col + dc] and index[row + dr, col + dc] == k:
                        if dr != 0 and dc != 0:
                            corners += 1
                        elif dr != 0 or dc != 0:
                            sides += 1
            if (sides == 2 or sides == 3) and corners <= 2:
                steps[k, 0] += 1
            elif (sides == 0 and corners == 2) or (sides == 1 and corners == 3):
                steps[k, 1] += 1
            elif sides == 1 and (corners == 1 or corners == 2):
                steps[k, 2] += 1
    return cell, pixel, steps


@njit
def hole_area(
    first: NDArray[Any],
    row: NDArray[Any],
    start: NDArray[Any],
    stop: NDArray[Any],
    min_row: NDArray[Any],
    max_row: NDArray[Any],
    min_col: NDArray[Any],
    max_col: NDArray[Any],
) -> NDArray[Any]:
    """Pixels of each cell's holes: what an 8-connected flood from outside does not reach.

    The flood starts in a frame of one pixel around the bounding box, so it reaches every pixel that
    has a way out and no other; what neither is the cell nor was reached is a hole.  A hole has the
    cell on its left and on its right, hence cells without two runs in one row are skipped, which
    are nearly all.  Time and memory are those of the bounding boxes of the others.
    """
    num_cells = len(min_row)
    holes = np.zeros(num_cells, np.int64)
    for k in range(num_cells):
        split = False  # a hole needs a row with two runs
        for i in range(first[k] + 1, first[k + 1]):
            if row[i] == row[i - 1]:
                split = True
                break
        if not split:
            continue
        height = max_row[k] - min_row[k] + 2
        width = max_col[k] - min_col[k] + 2
        closed = np.zeros((height, width), np.bool_)
        left = height * width
        for i in range(first[k], first[k + 1]):
            at = row[i] - min_row[k] + 1
            for col in range(start[i], stop[i]):
                closed[at, col - min_col[k] + 1] = True
            left -= stop[i] - start[i]
        stack = np.empty(left, np.int64)
        stack[0] = 0
        closed[0, 0] = True
        size = 1
        while size > 0:
            size -= 1
            left -= 1
            r = stack[size] // width
            c = stack[size] % width
            for rr in range(max(r - 1, 0), min(r + 2, height)):
                for cc in range(max(c - 1, 0), min(c + 2, width)):
                    if not closed[rr, cc]:
                        closed[rr, cc] = True
                        stack[size] = rr * width + cc
                        size += 1
        holes[k] = left
    return holes
