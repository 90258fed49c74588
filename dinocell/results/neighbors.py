"""How many other cells lie near each cell, and how far the closest is."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.compilation import njit

_FAR = np.int64(2**60)
_LEAF_PX = 8
"""Edge of the smallest squares: at most 64 border pixels each, however ragged the cells are."""
_EMPTY, _MIXED = -1, -2


def count_neighbors(
    num_cells: int,
    shape: tuple[int, int],
    border_cell: NDArray[np.int32],
    border_pixel: NDArray[np.int32],
    distance_px: float,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Count the cells within a distance of each cell, and measure the distance to the closest.

    Distances are those between pixel centres, exact.  The closest pixels of two cells lie on their
    borders: from a pixel inside, one step towards the other cell stays in the cell and is shorter.
    So only border pixels are compared.  A quadtree of squares knows of each square whether it is empty,
    or belongs to one cell only.  For each border pixel of a cell the search walks down the tree, and
    leaves out squares that are empty, hold only the cell itself, or lie farther away than both
    `distance_px` and the closest pixel of another cell that any pixel of this cell has found so far.
    It enters the tree where squares are as large as that distance, so it passes few levels.  A square
    that the search does read holds at most 64 pixels, so the time grows about linearly with the number
    of border pixels, for ragged cells, too.  (Quadtree search: Finkel & Bentley, "Quad trees: a data
    structure for retrieval on composite keys", Acta Informatica 4, 1974.)

    Parameters
    ----------
    num_cells : int
    shape : (int, int)
        Size of the image in pixels.
    border_cell, border_pixel : (N,) and (N, 2) integer ndarrays
        Cell, counted from 1, and position of each border pixel; each cell has at least one.
    distance_px : float
        At most this far apart are neighbours.

    Returns
    -------
    (num_cells,) int64 and float64 ndarrays
        Number of neighbours, and distance to the closest cell in pixels (NaN for a single cell).
    """
    if num_cells < 2:
        return np.zeros(num_cells, np.int64), np.full(num_cells, np.nan)
    by_cell = np.argsort(border_cell, kind="stable")
    first = np.searchsorted(border_cell[by_cell], np.arange(1, num_cells + 2))
    grid = (shape[0] // _LEAF_PX + 1, shape[1] // _LEAF_PX + 1)
    key = border_pixel[:, 0] // _LEAF_PX * grid[1] + border_pixel[:, 1] // _LEAF_PX
    by_square = np.argsort(key, kind="stable")
    square_first = np.searchsorted(key[by_square], np.arange(grid[0] * grid[1] + 1))
    near_cell = border_cell[by_square] - 1
    owner, level_first, level_shape = _quadtree(grid, square_first, near_cell)
    count, squared = _search(
        first,
        border_pixel[by_cell],
        owner,
        level_first,
        level_shape,
        square_first,
        np.column_stack([near_cell, border_pixel[by_square]]),
        # math.sqrt(13) squared is a little less than 13: a distance given as a root means the root.
        math.floor(distance_px**2 + 1e-9),
    )
    return count, np.sqrt(squared)


def _quadtree(
    grid: tuple[int, int], square_first: NDArray[Any], near_cell: NDArray[Any]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """The one cell of each square, level after level from the leaves to the root.

    Returns the owners of all levels one after the other (`_EMPTY` without border pixel, `_MIXED` with
    those of several cells), where each level begins, and its (rows, columns).
    """
    leaves = np.full(grid, _EMPTY, np.int32)
    filled = np.flatnonzero(square_first[1:] > square_first[:-1])
    begin = square_first[filled]
    low, high = np.minimum.reduceat(near_cell, begin), np.maximum.reduceat(near_cell, begin)
    leaves.reshape(-1)[filled] = np.where(low == high, low, _MIXED)
    levels = [leaves]
    while levels[-1].size > 1:
        below = np.pad(
            levels[-1],
            [(0, size % 2) for size in levels[-1].shape],
            constant_values=_EMPTY,
        )
        four = [below[i::2, j::2] for i in (0, 1) for j in (0, 1)]
        merged = four[0]
        for other in four[1:]:
            merged = np.where(
                (other == _EMPTY) | (other == merged),
                merged,
                np.where(merged == _EMPTY, other, _MIXED),
            )
        levels.append(merged)
    level_first = np.cumsum([0] + [level.size for level in levels])
    return (
        np.concatenate([level.reshape(-1) for level in levels]),
        level_first,
        np.array([level.shape for level in levels]),
    )


@njit
def _search(
    first: NDArray[Any],
    pixel: NDArray[Any],
    owner: NDArray[Any],
    level_first: NDArray[Any],
    level_shape: NDArray[Any],
    square_first: NDArray[Any],
    near: NDArray[Any],
    reach: int,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Count other cells within a squared distance, and find the squared distance of the closest.

    `pixel` holds the border pixels by cell, `near` their cells, rows and columns by leaf.
    """
    num_cells = len(first) - 1
    top = len(level_shape) - 1
    count = np.zeros(num_cells, np.int64)
    closest = np.empty(num_cells, np.int64)
    counted_for = np.full(num_cells, -1, np.int64)
    waiting = np.empty((3 * top + 9, 3), np.int64)  # level, row and column of squares
    for k in range(num_cells):
        best: Any = _FAR
        for p in range(first[k], first[k + 1]):
            r, c = np.int64(pixel[p, 0]), np.int64(pixel[p, 1])
            # Of the level with edges of at least the distance, the squares around hold all that is near.
            level: Any = 0
            while level < top and (_LEAF_PX << level) ** 2 < max(best, reach):
                level += 1
            edge = _LEAF_PX << level
            num_waiting = 0
            for sr in range(max(r // edge - 1, 0), min(r // edge + 2, level_shape[level, 0])):
                for sc in range(max(c // edge - 1, 0), min(c // edge + 2, level_shape[level, 1])):
                    waiting[num_waiting] = level, sr, sc
                    num_waiting += 1
            while num_waiting:
                num_waiting -= 1
                level, sr, sc = waiting[num_waiting]
                at = level_first[level] + sr * level_shape[level, 1] + sc
                cell = owner[at]
                if cell in (_EMPTY, k):
                    continue
                edge = _LEAF_PX << level
                d_row = max(sr * edge - r, 0, r - (sr + 1) * edge + 1)
                d_col = max(sc * edge - c, 0, c - (sc + 1) * edge + 1)
                squared = d_row * d_row + d_col * d_col
                counted = squared > reach or (cell >= 0 and counted_for[cell] == k)
                if counted and squared >= best:
                    continue
                if level:  # the quarter towards the pixel is read first, its opposite last
                    half = edge // 2
                    lower, right = r >= sr * edge + half, c >= sc * edge + half
                    for turn in range(3, -1, -1):
                        row, col = 2 * sr + (lower ^ (turn >> 1)), 2 * sc + (right ^ (turn & 1))
                        if row < level_shape[level - 1, 0] and col < level_shape[level - 1, 1]:
                            waiting[num_waiting] = level - 1, row, col
                            num_waiting += 1
                    continue
                for i in range(square_first[at], square_first[at + 1]):
                    other = near[i, 0]
                    if other == k:
                        continue
                    d_row, d_col = near[i, 1] - r, near[i, 2] - c
                    squared = d_row * d_row + d_col * d_col
                    best = min(best, squared)
                    if squared <= reach and counted_for[other] != k:
                        counted_for[other] = k
                        count[k] += 1
        closest[k] = best
    return count, closest
