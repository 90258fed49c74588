"""`docs/tables.md` lists the columns that the code writes, with their types and units."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from dinocell.evaluation.scores import evaluate_pair
from dinocell.io.plates import PLACE_NAMES
from dinocell.pipeline import Segmentation
from dinocell.results.columns import unit_of

PAGE = Path(__file__).parents[3] / "docs" / "tables.md"


def listed(heading: str) -> dict[str, tuple[str, str]]:
    """Column → (type, unit or meaning) of the table below a heading."""
    text = PAGE.read_text(encoding="utf-8").split(f"{heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`(?:, `\w+`)? \| (\w+) \| ([^|]*)\|", text, flags=re.M)
    return {name: (kind, unit.strip()) for name, kind, unit in rows}


def segmented(num_cells: int) -> Segmentation:
    labels = np.zeros((9, 12), np.uint32)
    for number in range(num_cells):
        labels[2:6, 4 * number : 4 * number + 3] = number + 1
    image = np.arange(labels.size, dtype=np.uint16).reshape(labels.shape)
    return Segmentation(labels, np.zeros(labels.shape, np.float32), image, 0.5, scores=np.ones(num_cells))  # fmt: skip


def test_the_page_lists_every_column() -> None:
    """In the order of the table, also where there is no cell."""
    for num_cells in (0, 2):
        table = segmented(num_cells).measure()
        found = {name: (str(c.dtype), unit_of(name)) for name, c in table.data.items()}
        assert list(found.items()) == list(listed("# Tables of cells").items())


def test_the_page_lists_the_columns_of_the_place() -> None:
    found = listed("## Place of the image")
    assert [*found] == [*PLACE_NAMES[:-1], "scene"]  # `time` shares the row of `z`
    kinds = {"string": "plate well channel", "int64": "site z scene"}
    assert {name: kind for name, (kind, _) in found.items()} == {
        name: kind for kind, names in kinds.items() for name in names.split()
    }


def test_the_formulas_of_the_page() -> None:
    """Those that combine other columns; measure_labels is compared with scikit-image elsewhere."""
    table = segmented(2).measure()
    area, major, minor = (table[n] for n in ("area", "axis_major_length", "axis_minor_length"))
    box = (table["bbox_max_row"] - table["bbox_min_row"]) * (
        table["bbox_max_col"] - table["bbox_min_col"]
    )
    for name, expected in {
        "equivalent_diameter_area": np.sqrt(4 * area / np.pi),
        "eccentricity": np.sqrt(1 - (minor / major) ** 2),
        "aspect_ratio": major / minor,
        "roundness": 4 * area / (np.pi * major**2),
        "circularity": np.minimum(4 * np.pi * area / table["perimeter_crofton"] ** 2, 1),
        "solidity": area / table["area_convex"],
        "extent": area / box,
        "intensity_integrated": table["intensity_mean"] * area,
        "area_um2": area * 0.25,
        "perimeter_um": table["perimeter"] * 0.5,
        "nearest_border_distance": np.array([2.0, 2.0]),
        "num_neighbors": np.array([1, 1]),
    }.items():
        np.testing.assert_allclose(table[name], expected, rtol=1e-12, err_msg=name)


def test_the_page_lists_the_columns_of_the_summary_and_the_scores() -> None:
    text = PAGE.read_text(encoding="utf-8")
    images, scores = text.split("## Summary of images")[1].split("## Scores against the truth")
    listed = re.findall(r"^\| `(\w+)` \|", images, flags=re.M)
    result = replace(segmented(2), unfamiliar=0.5, kind="nuclei")
    assert listed == ["name", "source", *result.summary(), "warnings", "error"]
    listed = set(re.findall(r"^\| `(\w+)`", scores, flags=re.M))
    found = evaluate_pair(result.labels, result.labels).scores()
    assert listed == {name for name in found if not name.endswith(("75", "90"))}
