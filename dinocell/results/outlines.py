"""Outlines of cells along the sides of their pixels.

Pixel (row, col) covers ``row..row + 1`` by ``col..col + 1``.  So the area of an outline equals the
number of pixels, a program that fills outlines by pixel centres gets the same labels back, and
neighbours share their common side.  `skimage.measure.find_contours` and `cv2.findContours` run through
pixel centres or between them, cut corners, and handle one cell at a time; hence our own tracing.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.labels import as_labels

Ring = NDArray[np.int64]
"""(N, 2) corners (row, col) of a closed line, the first one not repeated."""
Polygons = tuple[tuple[int, ...], ...]
"""Polygons of a cell, each the numbers of its rings, the outer one first."""


def labels_to_polygons(labels: ArrayLike) -> dict[int, list[list[Ring]]]:
    """Outline every cell along the sides of its pixels.

    Parameters
    ----------
    labels : (H, W) integer array_like
        0 is background.

    Returns
    -------
    dict of int to list of polygons
        Per label, ascending, one polygon per 4-connected piece.  A polygon is a list of rings, the
        outer border first, then its holes.  A ring is an (N, 2) int64 array of corners
        (row, col), not repeating the first one; no ring visits a corner twice.  With x = col and
        y = row, outer borders have positive signed area and holes negative, and the sum of a cell's signed
        areas is its number of pixels.  An image without cells gives an empty dict.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`).
    """
    corners, stops, polygons = trace_polygons(labels)
    rings = _rings(corners, stops)
    return {
        label: [[rings(number) for number in piece] for piece in pieces]
        for label, pieces in polygons.items()
    }


def trace_polygons(
    labels: ArrayLike,
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, Polygons]]:
    """`labels_to_polygons` without an array per ring.

    Returns the corners (row, col) of all rings one after the other, where each ring stops, and the
    polygons with numbers of rings.  Rings that touch themselves are among the corners, but not among
    the polygons, which hold their simple parts.
    """
    corners, stops, label_of, pinched = _trace_rings(np.pad(as_labels(labels), 1))
    rings = _rings(corners, stops)
    origin = np.arange(len(stops))
    parts = [
        (number, part)
        for number in np.flatnonzero(pinched).tolist()
        for part in _split_ring(rings(number))
    ]
    if parts:
        corners = np.concatenate([corners, *(part for _, part in parts)])
        stops = np.append(stops, stops[-1] + np.cumsum([len(part) for _, part in parts]))
        origin = np.append(origin, [number for number, _ in parts])
        rings = _rings(corners, stops)
    label_of, is_hole = label_of[origin], _signed_areas(corners, stops) < 0
    order = np.lexsort((origin, is_hole, label_of))
    order = order[~np.append(pinched, np.zeros(len(parts), np.bool_))[order]]
    label_of, is_hole = label_of[order], is_hole[order]
    first = np.append(True, label_of[1:] != label_of[:-1])[: len(order)]
    # Tuples, because a hundred thousand lists keep the garbage collector busy for half a second.
    polygons: dict[int, Polygons] = {
        label: ((number,),)
        for label, number in zip(label_of[first].tolist(), order[first].tolist(), strict=True)
    }
    several: dict[int, list[list[int]]] = {}
    for number, label, hole in zip(
        order[~first].tolist(), label_of[~first].tolist(), is_hole[~first].tolist(), strict=True
    ):
        pieces = several.setdefault(label, [[polygons[label][0][0]]])
        if not hole:
            pieces.append([number])
            continue
        home = pieces[0]
        if len(pieces) > 1:
            home = next(p for p in pieces if _encloses(rings(p[0]), rings(number)))
        home.append(number)
    polygons |= {label: tuple(map(tuple, pieces)) for label, pieces in several.items()}
    return corners, stops, polygons


def _rings(corners: NDArray[Any], stops: NDArray[Any]) -> Callable[[int], Ring]:
    """Number of a ring → its corners."""
    begin = np.append(0, stops)
    return lambda number: corners[begin[number] : stops[number]]


def _signed_areas(corners: NDArray[Any], stops: NDArray[Any]) -> NDArray[Any]:
    """Twice the area of each ring by the shoelace formula with x = col, y = row."""
    begin = np.append(0, stops)[:-1]
    following = np.arange(1, len(corners) + 1)
    following[stops - 1] = begin
    row, col = corners[:, 0], corners[:, 1]
    terms = col * row[following] - col[following] * row
    return np.add.reduceat(terms, begin) if len(begin) else terms


def _split_ring(ring: Ring) -> list[Ring]:
    """Cut a ring that visits a corner twice into rings that do not."""
    simple = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for corner in map(tuple, ring.tolist()):
        if corner in place:
            begin = place[corner]
            simple.append(np.array(path[begin:], dtype=np.int64))
            for left in path[begin:]:
                del place[left]
            del path[begin:]
        place[corner] = len(path)
        path.append(corner)
    simple.append(np.array(path, dtype=np.int64))
    return simple


def _encloses(ring: Ring, hole: Ring) -> bool:
    """Tell whether the centre of a pixel beside the hole lies inside the ring (even-odd rule)."""
    # a hole is traced with its cell on the right: step right from the middle of the first pixel side
    ahead = np.sign(hole[1] - hole[0])
    row, col = hole[0] + ahead / 2 + np.array([ahead[1], -ahead[0]]) / 2
    following = np.roll(ring, -1, axis=0)
    crosses = (ring[:, 0] > row) != (following[:, 0] > row)
    return bool(np.count_nonzero(crosses & (ring[:, 1] > col)) % 2)


@njit
def _trace_rings(
    padded: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Follow the borders of all labels, the cell on the right hand (in image coordinates).

    `padded` has one background pixel on every side.  Returns the corners (row, col) of all rings
    one after the other, without the padding; where each ring stops; its label; and whether it
    touches itself at a corner.

    Every border, outer or of a hole, has an upper side of some pixel: a side with the cell below and
    another label above.  The scan starts a ring at each such side that no ring has passed yet, and a
    ring returns to its start because each side has exactly one successor and one predecessor.  So
    every side of the border is passed once, in time linear in pixels and sides.  At a corner the
    path looks at the pixel ahead and the one to its left: it turns right when the pixel ahead is
    another label's, left when both are the cell's.  Where two pixels of a label meet in a corner
    only, it stays with its pixel, which keeps pieces that touch in corners apart.
    """
    height, width = padded.shape
    sides = 0
    for row in range(1, height - 1):
        for col in range(1, width - 1):
            label = padded[row, col]
            if label != 0:
                sides += padded[row - 1, col] != label
                sides += padded[row + 1, col] != label
                sides += padded[row, col - 1] != label
                sides += padded[row, col + 1] != label
    corners = np.empty((sides, 2), np.int64)
    stops = np.empty(sides // 4 + 1, np.int64)
    labels = np.empty(sides // 4 + 1, np.int64)
    pinched = np.zeros(sides // 4 + 1, np.bool_)
    seen = np.zeros((height, width), np.bool_)  # the upper side of this pixel
    # headings: east along the upper side, south along the right, west along the lower, north
    step_row = (0, 1, 0, -1)
    step_col = (1, 0, -1, 0)
    end_row = (0, 1, 1, 0)
    end_col = (1, 1, 0, 0)
    count = 0
    rings = 0
    for row0 in range(1, height - 1):
        for col0 in range(1, width - 1):
            label = padded[row0, col0]
            if label == 0 or padded[row0 - 1, col0] == label or seen[row0, col0]:
                continue
            row, col, heading = row0, col0, 0
            while True:
                if heading == 0:
                    seen[row, col] = True
                left = (heading + 3) % 4
                ahead_row = row + step_row[heading]
                ahead_col = col + step_col[heading]
                beside_row = ahead_row + step_row[left]
                beside_col = ahead_col + step_col[left]
                turn = True
                next_row, next_col, next_heading = row, col, (heading + 1) % 4
                if padded[ahead_row, ahead_col] != label:
                    if padded[beside_row, beside_col] == label:
                        pinched[rings] = True
                elif padded[beside_row, beside_col] == label:
                    next_row, next_col, next_heading = beside_row, beside_col, left
                else:
                    next_row, next_col, next_heading = ahead_row, ahead_col, heading
                    turn = False
                if turn:
                    corners[count, 0] = row + end_row[heading] - 1
                    corners[count, 1] = col + end_col[heading] - 1
                    count += 1
                row, col, heading = next_row, next_col, next_heading
                if row == row0 and col == col0 and heading == 0:
                    break
            stops[rings] = count
            labels[rings] = label
            rings += 1
    return corners[:count], stops[:rings], labels[:rings], pinched[:rings]
