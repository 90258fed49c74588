"""The columns of the tables of cells and wells: units and types, for files that state them and for `docs/tables.md`."""

import re

_UNITS = (
    (r".*_um", "µm"),
    (r".*_um2(_mean)?", "µm²"),
    (r".*_percent", "%"),
    (r"bbox_.*|centroid_.*|perimeter.*|axis_.*|feret_.*|equivalent_.*|nearest_.*", "px"),
    (r"area.*", "px²"),
    (r"orientation", "rad"),
    (r"intensity_integrated.*", "gray value × px²"),
    (r"intensity_.*", "gray value"),
)


def unit_of(column: str) -> str:
    """Unit of a column of `measure_labels` or `well_rows` by its name; empty for numbers without a unit."""
    name = re.sub(r"^(nucleus|cytoplasm)_", "", column)
    return next((unit for pattern, unit in _UNITS if re.fullmatch(pattern, name)), "")
