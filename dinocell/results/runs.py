"""A label image as horizontal runs: the form in which sums over cells cost least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
    def of(cls, labels: NDArray[np.uint32]) -> Runs:
        height, width = labels.shape
        cells = labels != 0
        change = labels[:, 1:] != labels[:, :-1]
        begins = cells.copy()
        begins[:, 1:] &= change
        ends = cells
        ends[:, :-1] &= change
        begin = np.flatnonzero(begins)
        end = np.flatnonzero(ends)
        label, cell = np.unique(labels.reshape(-1)[begin], return_inverse=True)
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
