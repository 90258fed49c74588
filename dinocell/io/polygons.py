"""Outlines and run lengths of cells → label images.

Pixel (row, col) covers ``row..row + 1`` by ``col..col + 1`` and belongs to an outline when its centre
lies inside.  So the outlines that `dinocell.results.outlines` traces give the same labels back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_UINT32_MAX = 2**32 - 1


class CellMask(NamedTuple):
    """The pixels of one cell: a boolean (h, w) mask whose upper left pixel is (top, left) of the image."""

    top: int
    left: int
    mask: NDArray[np.bool_]


def fill_rings(rings: Sequence[ArrayLike], shape: tuple[int, int]) -> CellMask | None:
    """Fill closed lines by the even-odd rule: a ring inside another one is a hole.

    Parameters
    ----------
    rings : (N, 2) corners (row, col) in pixels each, the first one repeated at the end or not
    shape : (H, W) of the image; what lies outside it is cut off

    Returns None if no pixel's centre lies inside.

    Notes
    -----
    Each side of a ring crosses the centre lines of some pixel rows.  A crossing toggles all pixels to its
    right, so that a running sum along each row tells inside from outside.  A side counts with its upper
    end and without its lower one: a corner on a centre line is then counted once.  The cost is linear in
    the crossings and in the pixels of the cell's bounding box.
    """
    starts = np.concatenate([np.asarray(ring, np.float64).reshape(-1, 2) for ring in rings])
    sizes = [len(np.asarray(ring).reshape(-1, 2)) for ring in rings]
    following = np.arange(1, len(starts) + 1)
    stops = np.cumsum(sizes)
    following[stops - 1] = stops - sizes
    ends = starts[following]
    upper, lower = np.minimum(starts[:, 0], ends[:, 0]), np.maximum(starts[:, 0], ends[:, 0])
    first = np.clip(np.ceil(upper - 0.5), 0, shape[0]).astype(np.int64)
    count = np.clip(np.ceil(lower - 0.5), 0, shape[0]).astype(np.int64) - first
    side = np.repeat(np.arange(len(starts)), count)
    if not len(side):
        return None
    rows = first[side] + np.arange(len(side)) - np.repeat(np.cumsum(count) - count, count)
    step = (ends[side] - starts[side])[:, 1] / (ends[side] - starts[side])[:, 0]
    crossing = starts[side, 1] + (rows + 0.5 - starts[side, 0]) * step
    cols = np.clip(np.ceil(crossing - 0.5), 0, shape[1]).astype(np.int64)
    top, left, width = rows.min(), cols.min(), cols.max() - cols.min()
    height = rows.max() + 1 - top
    places = (rows - top) * (width + 1) + cols - left
    toggles = np.bincount(places, minlength=height * (width + 1)).reshape(height, width + 1)
    inside = (np.cumsum(toggles, axis=1)[:, :-1] & 1).astype(bool)
    return CellMask(int(top), int(left), inside) if inside.any() else None


def run_lengths_to_mask(counts: Sequence[int], shape: tuple[int, int]) -> CellMask | None:
    """Decode COCO's run lengths: outside and inside in turn, column by column.

    Returns None for a cell without pixels.  Raises ValueError unless the lengths are whole numbers of 0
    and above that add up to H · W.
    """
    lengths = np.asarray(counts, dtype=np.int64)
    height, width = shape
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(
            f"Run lengths must be 0 or more and add up to {height} × {width} = {height * width}, got "
            f"{int(lengths.sum())}"
        )
    stop = np.cumsum(lengths)[1::2]
    begin = stop - lengths[1::2]
    begin, stop = begin[begin < stop], stop[begin < stop]
    if not len(begin):
        return None
    left, right = begin[0] // height, (stop[-1] - 1) // height + 1
    changes = np.zeros((right - left) * height + 1, np.int8)
    np.add.at(changes, begin - left * height, 1)
    np.add.at(changes, stop - left * height, -1)
    mask = np.cumsum(changes[:-1], dtype=np.int8).reshape(right - left, height).T.astype(bool)
    rows = np.flatnonzero(mask.any(axis=1))
    return CellMask(int(rows[0]), int(left), mask[rows[0] : rows[-1] + 1])


def expand_run_lengths(text: str) -> list[int]:
    """Unpack the string of COCO tools, which `dinocell.results.exports.write_coco_rle` also writes.

    A number is written in groups of 5 bits, lowest first; from the fourth on it is the difference to the
    one two before.
    """
    counts: list[int] = []
    number = shift = 0
    for letter in text.encode("ascii"):
        group = letter - 48
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def paint_cells(
    cells: Iterable[CellMask | None],
    shape: tuple[int, int],
    numbers: Sequence[Any] | None = None,
) -> tuple[NDArray[np.uint32], int]:
    """Label image of cells that may overlap, and the number of pixels that several of them claim.

    Cell 1 is the first unless `numbers` says what each is called (see `distinct_numbers`); None stands for
    a cell without pixels.  Smaller cells lie on top of larger ones, so that a small cell within a large
    one is kept.
    """
    labels = np.zeros(shape, np.uint32)
    cells = list(cells)
    names = range(1, len(cells) + 1) if numbers is None else distinct_numbers(numbers)
    found = [(number, cell) for number, cell in zip(names, cells, strict=True) if cell is not None]
    areas = [int(np.count_nonzero(cell.mask)) for _, cell in found]
    for place in np.argsort(-np.array(areas, np.int64), kind="stable"):
        number, (top, left, mask) = found[place]
        window: NDArray[Any] = labels[top : top + mask.shape[0], left : left + mask.shape[1]]
        window[mask] = number
    return labels, sum(areas) - int(np.count_nonzero(labels))


def paint_with_notes(
    cells: Sequence[CellMask | None],
    shape: tuple[int, int],
    notes: list[str],
    numbers: Sequence[Any] | None = None,
) -> NDArray[np.uint32]:
    """The label image of `paint_cells`; what it cannot show is noted."""
    labels, overlap_px = paint_cells(cells, shape, numbers)
    if empty := sum(cell is None for cell in cells):
        notes.append(f"{empty} annotations cover no pixel")
    if overlap_px:
        notes.append(f"{overlap_px} px belong to several cells: the smaller cell is on top")
    return labels


def distinct_numbers(given: Sequence[Any]) -> Sequence[int]:
    """A number for each cell: the given one where it is a label that no earlier cell has, else a new one.

    New numbers follow the highest one; if there is no room above it, all cells are numbered 1..n.
    """
    taken: set[int] = set()
    kept: list[int | None] = []
    for number in given:
        whole = isinstance(number, int | float) and number == number // 1
        fits = whole and 0 < number <= _UINT32_MAX and number not in taken
        kept.append(int(number) if fits else None)
        taken |= {int(number)} if fits else set()
    following = max(taken, default=0) + 1
    if following + kept.count(None) - 1 > _UINT32_MAX:
        return range(1, len(kept) + 1)
    new = iter(range(following, following + kept.count(None)))
    return [next(new) if number is None else number for number in kept]
