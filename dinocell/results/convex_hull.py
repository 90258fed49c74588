"""Convex hulls of cells: their area in pixels, and the longest distance across them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.compilation import njit

_FAR = np.int64(2**60)  # stands for "no pixel in this row"


@njit
def _lower_chain(values: NDArray[Any], chain_row: NDArray[Any], chain_value: NDArray[Any]) -> int:
    """Lower convex chain of the points (i, values[i]); `_FAR` marks a missing point.

    Writes the corners to `chain_row`, `chain_value` and returns their number.
    Andrew's monotone chain (1979), in integers.
    """
    size = 0
    for i in range(len(values)):
        value = values[i]
        if value == _FAR:
            continue
        while size >= 2:
            run = chain_row[size - 1] - chain_row[size - 2]
            rise = chain_value[size - 1] - chain_value[size - 2]
            if rise * (i - chain_row[size - 2]) < (value - chain_value[size - 2]) * run:
                break
            size -= 1
        chain_row[size] = i
        chain_value[size] = value
        size += 1
    return size


@njit
def _half_steps(lowest: NDArray[Any], levels: NDArray[Any]) -> None:
    """Lowest column of each row to lowest column of the pixels' edge mid-points.

    Everything doubled to stay in integers: row i becomes level 2 i + 1, between the levels of its
    upper and lower edge.
    """
    levels[:] = _FAR
    for i in range(len(lowest)):
        low = lowest[i]
        if low == _FAR:
            continue
        levels[2 * i] = min(levels[2 * i], 2 * low)
        levels[2 * i + 1] = 2 * low - 1
        levels[2 * i + 2] = 2 * low


@njit
def _first_inside(
    chain_row: NDArray[Any], chain_value: NDArray[Any], size: int, first: NDArray[Any]
) -> None:
    """First whole column on or right of the chain, for each row."""
    part = 0
    for i in range(len(first)):
        level = 2 * i + 1
        while part < size - 2 and chain_row[part + 1] < level:
            part += 1
        run = chain_row[part + 1] - chain_row[part]
        rise = chain_value[part + 1] - chain_value[part]
        doubled = chain_value[part] * run + rise * (level - chain_row[part])
        first[i] = -((-doubled) // (2 * run))


@njit
def hull_area_and_feret(
    first: NDArray[Any],
    row: NDArray[Any],
    start: NDArray[Any],
    stop: NDArray[Any],
    min_row: NDArray[Any],
    max_row: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Pixels inside the convex hull, and the longest distance across those pixels, per cell.

    The hull is that of the mid-points of the pixels' edges, as in scikit-image.  Between the first
    and the last pixel of a row every point is a convex combination of these two, so two columns per
    row decide the hull, and its left side is the lower convex chain of "first column as a function
    of the row"; the right side is the left side of the mirror image (negated columns).  A row's
    pixels inside the hull are the whole columns between the two chains, exactly, as all is kept in
    doubled integers (`_half_steps`).  The diameter of a convex polygon lies between two of its
    corners; a second pair of chains, around the pixels inside the hull, gives these corners, and
    all pairs are compared.

    Time per cell is linear in its runs and rows, plus the square of the number of corners, which for
    a polygon on a grid grows only with the 2/3rd power of its size.

    References
    ----------
    A. M. Andrew, "Another efficient algorithm for convex hulls in two dimensions", 1979 (the chain).
    """
    num_cells = len(min_row)
    area = np.zeros(num_cells, np.int64)
    feret = np.zeros(num_cells, np.float64)
    tallest = 0
    for k in range(num_cells):
        tallest = max(tallest, max_row[k] - min_row[k])
    side = np.empty((2, tallest), np.int64)
    levels = np.empty(2 * tallest + 1, np.int64)
    chain_row = np.empty((2, 2 * tallest + 1), np.int64)
    chain_value = np.empty((2, 2 * tallest + 1), np.int64)
    size = np.zeros(2, np.int64)
    for k in range(num_cells):
        height = max_row[k] - min_row[k]
        rows = side[:, :height]
        half = levels[: 2 * height + 1]
        rows[:] = _FAR
        for i in range(first[k], first[k + 1]):
            at = row[i] - min_row[k]
            rows[0, at] = min(rows[0, at], start[i])
            rows[1, at] = min(rows[1, at], 1 - stop[i])
        for s in range(2):
            _half_steps(rows[s], half)
            size[s] = _lower_chain(half, chain_row[s], chain_value[s])
            _first_inside(chain_row[s], chain_value[s], size[s], rows[s])
        for i in range(height):
            wide = 1 - rows[0, i] - rows[1, i]
            if wide > 0:
                area[k] += wide
            else:  # the hull of a cell in pieces may slip between two pixels of a row
                rows[0, i] = _FAR
                rows[1, i] = _FAR
        for s in range(2):
            _half_steps(rows[s], half)
            size[s] = _lower_chain(half, chain_row[s], chain_value[s])
        longest = np.int64(0)
        for s in range(2):
            for i in range(size[s]):
                for t in range(s, 2):
                    for j in range(size[t]):
                        d_row = chain_row[s, i] - chain_row[t, j]
                        d_col = chain_value[s, i] - chain_value[t, j]
                        if s != t:
                            d_col = chain_value[s, i] + chain_value[t, j]
                        longest = max(longest, d_row * d_row + d_col * d_col)
        feret[k] = math.sqrt(longest) / 2
    return area, feret
