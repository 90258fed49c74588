"""A label image as horizontal runs: the form in which sums over cells cost least."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from dinocell.scratch import row_bands


@dataclass(frozen=True)
class Runs:
    """Horizontal runs of equal label, grouped by cell, in raster order within a cell.

    `first[k]:first[k + 1]` are the runs of cell k, `label[k]` its label; a run covers columns
    `start <= col < stop` of `row`.
    """

    shape: tuple[int, int]
    label: NDArray[np.int64]
    first: NDArray[np.int64]
    row: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    cell: NDArray[np.int64]

    @classmethod
    def of(cls, labels: NDArray[np.uint32]) -> Self:
        height, width = labels.shape
        bands = [_runs_of_rows(labels, rows) for rows in row_bands(labels.shape)]
        begin, end, value = (
            np.concatenate([band[part] for band in bands] or [np.empty(0, np.int64)])
            for part in range(3)
        )
        label, cell = np.unique(value, return_inverse=True)
        order = np.argsort(cell, kind="stable")
        begin, end, cell = begin[order], end[order], cell[order]
        row = begin // max(width, 1)
        return cls(
            shape=(height, width),
            label=label.astype(np.int64),
            first=np.searchsorted(cell, np.arange(len(label) + 1)),
            row=row,
            start=begin - row * width,
            stop=end - row * width + 1,
            cell=cell,
        )

    def fold(self, ufunc: np.ufunc, values: NDArray[Any]) -> NDArray[Any]:
        """Reduce one value per run to one value per cell."""
        if not len(self.label):
            return values[:0]
        folded: NDArray[Any] = ufunc.reduceat(values, self.first[:-1])
        return folded


def _runs_of_rows(labels: NDArray[np.uint32], rows: slice) -> tuple[NDArray[Any], ...]:
    """First and last pixel of each run in these rows, counted through the whole image, and its label."""
    band = labels[rows]
    cells = band != 0
    change = band[:, 1:] != band[:, :-1]
    begins = cells.copy()
    begins[:, 1:] &= change
    ends = cells
    ends[:, :-1] &= change
    begin, end = np.flatnonzero(begins), np.flatnonzero(ends)
    before = rows.start * labels.shape[1]
    return begin + before, end + before, band.reshape(-1)[begin]
