"""Measurements of nucleus and cytoplasm beside those of the cell that has both."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.results.measure import measure_labels
from dinocell.results.table import CellTable

_OF_NUCLEUS = ("label", "touches_border", "num_neighbors")
"""Columns of the cell that are not repeated for its nucleus."""


def with_compartments(
    table: CellTable,
    cells: NDArray[Any],
    nuclei: NDArray[Any],
    image: NDArray[Any],
    channel_names: tuple[str, ...] | None,
) -> CellTable:
    """A table of cells with the columns ``nucleus_...`` and ``cytoplasm_...``.

    Parameters
    ----------
    table : `measure_labels(cells, ...)`
    cells, nuclei : (H, W) integer ndarray; a nucleus has the number of its cell and lies within it
    image : (H, W) or (H, W, C) ndarray, with one of `channel_names` per channel

    Returns CellTable: of the nucleus all measurements but the neighbours; of the cytoplasm, the cell without its
    nucleus, area and intensities, which are 0 and missing where nothing is left.
    """
    data = dict(table.data)
    cytoplasm = np.where(nuclei > 0, 0, cells)
    for prefix, labels in (("nucleus", nuclei), ("cytoplasm", cytoplasm)):
        measured = measure_labels(
            labels, image, pixel_size_um=table.pixel_size_um, channel_names=channel_names
        )
        place = np.searchsorted(table["label"], measured["label"])
        for name, column in measured.data.items():
            is_area = name in ("area", "area_um2")
            if prefix == "nucleus" and (
                name in _OF_NUCLEUS or name.startswith(("bbox", "nearest"))
            ):
                continue
            if prefix == "cytoplasm" and not (is_area or name.startswith("intensity")):
                continue
            if is_area:
                values = np.zeros(len(table), column.dtype)
            else:
                values = np.full(len(table), np.nan)
            values[place] = column
            data[f"{prefix}_{name}"] = values
    return replace(table, data=data)
