"""How many other cells lie near each cell, and how far the closest is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_FAR = np.int64(2**60)


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
    So only border pixels are compared, and a grid of squares gives those near a place.  One border
    pixel of a cell looks into growing rings of squares until another cell is found; that distance
    bounds the search of all border pixels of the cell, each of which then looks into every square
    that the larger of bound and `distance_px` reaches.  The rings only find a bound, which the second
    step corrects, so nothing depends on where they stop.  For cells spread evenly the time is linear in
    the number of border pixels.

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
    # Squares of about a quarter of the mean spacing hold a handful of border pixels each.
    square = int(np.clip(math.sqrt(shape[0] * shape[1] / num_cells) / 4, 8, 64))
    grid = (shape[0] // square + 1, shape[1] // square + 1)
    key = border_pixel[:, 0] // square * grid[1] + border_pixel[:, 1] // square
    by_square = np.argsort(key, kind="stable")
    square_first = np.searchsorted(key[by_square], np.arange(grid[0] * grid[1] + 1))
    count, squared = _search(
        first,
        border_pixel[by_cell],
        square,
        grid,
        square_first,
        border_cell[by_square] - 1,
        border_pixel[by_square],
        # math.sqrt(13) squared is a little less than 13: a distance given as a root means the root.
        math.floor(distance_px**2 + 1e-9),
    )
    return count, np.sqrt(squared)


@njit(cache=True)
def _search(
    first: NDArray[Any],
    pixel: NDArray[Any],
    square: int,
    grid: tuple[int, int],
    square_first: NDArray[Any],
    near_cell: NDArray[Any],
    near_pixel: NDArray[Any],
    reach: int,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Count other cells within a squared distance, and find the squared distance of the closest.

    `pixel` holds the border pixels by cell, `near_cell` and `near_pixel` the same by square.
    """
    num_cells = len(first) - 1
    grid_rows, grid_cols = grid
    count = np.zeros(num_cells, np.int64)
    closest = np.empty(num_cells, np.int64)
    counted_for = np.full(num_cells, -1, np.int64)
    for k in range(num_cells):
        best: Any = _FAR
        r: Any = np.int64(pixel[first[k], 0])
        c: Any = np.int64(pixel[first[k], 1])
        ring = 0
        while best > (ring * square) ** 2 and ring <= max(grid_rows, grid_cols):
            top, bottom = int(r // square - ring), int(r // square + ring)
            lead, trail = c // square - ring, c // square + ring
            for sr in range(max(top, 0), min(bottom + 1, grid_rows)):
                whole = sr in (top, bottom) or ring == 0
                for sc in range(lead, trail + 1, 1 if whole else trail - lead):
                    if sc < 0 or sc >= grid_cols:
                        continue
                    at = sr * grid_cols + sc
                    for i in range(square_first[at], square_first[at + 1]):
                        if near_cell[i] != k:
                            d_row, d_col = near_pixel[i, 0] - r, near_pixel[i, 1] - c
                            best = min(best, d_row * d_row + d_col * d_col)
            ring += 1
        for p in range(first[k], first[k + 1]):
            r, c = np.int64(pixel[p, 0]), np.int64(pixel[p, 1])
            farthest: Any = max(best, reach)
            span = math.floor(math.sqrt(farthest))
            for sr in range(max(r - span, 0) // square, min((r + span) // square + 1, grid_rows)):
                for sc in range(
                    max(c - span, 0) // square, min((c + span) // square + 1, grid_cols)
                ):
                    at = sr * grid_cols + sc
                    for i in range(square_first[at], square_first[at + 1]):
                        other = near_cell[i]
                        if other == k:
                            continue
                        d_row, d_col = near_pixel[i, 0] - r, near_pixel[i, 1] - c
                        squared = d_row * d_row + d_col * d_col
                        best = min(best, squared)
                        if squared <= reach and counted_for[other] != k:
                            counted_for[other] = k
                            count[k] += 1
        closest[k] = best
    return count, closest
