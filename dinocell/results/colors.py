"""Colours of cells and of distance maps.

The colours of cells are those of Okabe and Ito (Color Universal Design, 2008) without black and with
a light gray, which people with colour-blindness can tell apart; the colours of the distance map rise
evenly in lightness, so that they also read well in gray.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.labels import as_labels
from dinocell.results.runs import Runs
from dinocell.results.shape_kernels import index_image

CELL_COLORS: tuple[tuple[int, int, int], ...] = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (0, 158, 115),  # bluish green
    (240, 228, 66),  # yellow
    (0, 114, 178),  # blue
    (213, 94, 0),  # vermilion
    (204, 121, 167),  # reddish purple
    (200, 200, 200),  # light gray
)
"""Colours of cells; those of neighbours differ."""

# Control points at equal steps of lightness (CIE L* about 9.6 apart), the hue going from blue
# through red to yellow at the chroma that sRGB can just show.
_DISTANCE_POINTS = (
    (0, 0, 0),
    (4, 17, 98),
    (84, 8, 111),
    (131, 16, 110),
    (176, 24, 108),
    (223, 33, 99),
    (249, 78, 87),
    (251, 132, 94),
    (252, 173, 114),
    (254, 210, 149),
    (255, 243, 205),
)

_NEAR_PX = 3


def color_labels(labels: ArrayLike) -> NDArray[np.uint8]:
    """Give each cell a colour; neighbours get different ones.

    Parameters
    ----------
    labels : (H, W) integer array_like
        0 background, other values cells; they need not be consecutive.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        Background black, cells in `CELL_COLORS`.  Cells that touch, also over a corner, always differ;
        cells with at most two pixels between them differ where eight colours allow it.  A cell that
        touches so many others that the eight run out gets a darker one of them.  The same labels give
        the same picture.

    Notes
    -----
    Greedy colouring in smallest-last order (Matula and Beck, J. ACM 30, 417, 1983).
    """
    from networkx import Graph
    from networkx.algorithms.coloring import strategy_smallest_last

    labels = as_labels(labels)
    runs = Runs.of(labels)
    values = runs.label
    if len(values) == 0:
        return np.zeros((*labels.shape, 3), np.uint8)
    indices = index_image(*labels.shape, runs.row, runs.start, runs.stop, runs.cell)[1:-1, 1:-1]
    touching = _neighbours(indices, len(values), 1)
    near = _neighbours(indices, len(values), _NEAR_PX)
    palette = np.random.default_rng([0, 0xCE11]).permutation(len(CELL_COLORS))
    colors = np.full(len(values), -1)
    for cell in strategy_smallest_last(Graph(dict(enumerate(touching))), {}):
        taken = {int(colors[other]) for other in touching[cell] if colors[other] >= 0}
        around = taken | {int(colors[other]) for other in near[cell] if colors[other] >= 0}
        free = [c for c in range(len(CELL_COLORS)) if c not in around]
        free = free or [c for c in range(len(CELL_COLORS)) if c not in taken]
        # A cell's number decides among the free ones, so that the picture is lively and repeatable.
        turn = int(values[cell]) * 2654435761 % 2**32 >> 16
        if free:
            colors[cell] = free[int(palette[turn % len(palette)] + turn) % len(free)]
        else:
            colors[cell] = next(c for c in range(len(values) + 8) if c not in taken)
    table = np.zeros((len(values) + 1, 3), np.uint8)
    base = np.array(CELL_COLORS)[colors % len(CELL_COLORS)]
    table[1:] = np.rint(base * 0.75 ** (colors // len(CELL_COLORS))[:, None])
    return table[indices]


def color_distance_map(distance_map: ArrayLike) -> NDArray[np.uint8]:
    """Colour a distance map, dark to light.

    Parameters
    ----------
    distance_map : (H, W) real array_like
        0 is black, 1 the lightest; values outside [0, 1] are clipped.

    Returns
    -------
    (H, W, 3) uint8 ndarray

    Raises ValueError (not 2-D, or holds NaN).
    """
    array = np.asarray(distance_map)
    if array.ndim != 2:
        raise ValueError(
            f"`distance_map` must be 2-D (H, W), got shape {array.shape}: choose one channel"
        )
    array = array.astype(np.float32, copy=False)
    if np.isnan(array).any():
        raise ValueError("`distance_map` must not hold NaN, got some: check the model's output")
    steps = np.linspace(0.0, 1.0, len(_DISTANCE_POINTS))
    points = np.array(_DISTANCE_POINTS, float)
    fine = np.linspace(0.0, 1.0, 256)
    table = np.stack([np.interp(fine, steps, points[:, c]) for c in range(3)], axis=-1)
    index = np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.intp)
    return np.rint(table).astype(np.uint8)[index]


def _neighbours(indices: NDArray[np.int32], count: int, reach_px: int) -> list[set[int]]:
    """For each cell the cells within `reach_px` (the larger of the row and column distances)."""
    result: list[set[int]] = [set() for _ in range(count)]
    for code in np.unique(_pair_codes(indices, count, reach_px)).tolist():
        first_cell, second_cell = divmod(code, count)
        result[first_cell].add(second_cell)
        result[second_cell].add(first_cell)
    return result


@njit
def _pair_codes(indices: NDArray[Any], count: int, reach: int) -> NDArray[Any]:
    """The lower cell times `count` plus the higher one, of pixels of two cells that lie close together."""
    height, width = indices.shape
    codes = np.empty(1024, np.int64)
    num = 0
    for row in range(height):
        for col in range(width):
            here = indices[row, col]
            if here == 0:
                continue
            last = np.int64(-1)
            for r in range(row, min(row + reach + 1, height)):
                for c in range(max(col - reach, 0), min(col + reach + 1, width)):
                    there = indices[r, c]
                    if there == 0 or there == here or (r == row and c < col):
                        continue
                    code = (min(here, there) - 1) * count + max(here, there) - 1
                    if code == last:
                        continue
                    last = code
                    if num == len(codes):
                        codes = np.append(codes, np.empty_like(codes))
                    codes[num] = code
                    num += 1
    return codes[:num]
