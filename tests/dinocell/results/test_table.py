"""Tables: columns that cannot change, CSV that gives the numbers back, text in columns."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from dinocell.results.measure import measure_labels
from dinocell.results.table import CellTable, align_columns


def test_table_is_read_only_and_plain() -> None:
    areas = np.array([2, 5])
    table = CellTable({"area": areas, "far": np.array([1.5, np.nan])})
    areas[0] = 9
    assert len(table) == 2
    assert table.columns == ("area", "far")
    assert list(table.rows()) == [{"area": 2, "far": 1.5}, {"area": 5, "far": None}]
    assert table.to_dict() == {"area": [2, 5], "far": [1.5, None]}
    assert "far" in table
    assert "near" not in table
    assert repr(table) == "CellTable(2 cells, 2 columns)"
    with pytest.raises(ValueError, match="read-only"):
        table["area"][0] = 1
    with pytest.raises(TypeError):
        table.data["area"] = areas  # type: ignore[index]
    with pytest.raises(KeyError, match="must be one of area, far; got 'size'"):
        table["size"]
    with pytest.raises(ValueError, match=r"got shape \(3,\) for 'b'"):
        CellTable({"a": np.zeros(2), "b": np.zeros(3)})
    assert len(CellTable({})) == 0


def test_csv_gives_the_numbers_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = np.random.default_rng(0).integers(0, 9, (12, 15)) * 10_000
    table = measure_labels(
        labels, rng.random((*labels.shape, 2)), pixel_size_um=0.3, channel_names=["DNA", "a,b"]
    )
    table.to_csv(tmp_path / "cells.csv")
    text = (tmp_path / "cells.csv").read_bytes()
    assert b"\r" not in text
    with open(tmp_path / "cells.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table)
    assert tuple(rows[0]) == table.columns
    for name in table.columns:
        written = [row[name] for row in rows]
        if table[name].dtype == bool:
            assert [value == "true" for value in written] == table[name].tolist()
            assert set(written) <= {"true", "false"}
        else:
            again = [math.nan if value == "" else float(value) for value in written]
            np.testing.assert_array_equal(again, table[name])


def test_csv_without_cells_has_its_header(tmp_path: Path) -> None:
    table = measure_labels(np.zeros((3, 3), int))
    table.to_csv(tmp_path / "new" / "cells.csv")
    assert (tmp_path / "new" / "cells.csv").read_text() == ",".join(table.columns) + "\n"


def test_numbers_are_aligned_to_the_right_and_text_to_the_left() -> None:
    rows = [("name", "cells"), ("a.tif", "7"), ("b", "")]
    assert align_columns(rows) == ["name   cells", "a.tif      7", "b"]
    assert align_columns(rows, numbers=False) == ["name   cells", "a.tif  7", "b"]


def test_the_width_of_a_text_in_the_terminal_may_differ_from_its_length() -> None:
    wide = {"細胞": 4}
    lines = align_columns([("細胞", "1"), ("ab", "2")], width_of=lambda t: wide.get(t, len(t)))
    assert lines == ["細胞  1", "ab    2"]


def test_csv_of_text_and_infinity(tmp_path):
    """Columns that JSON cannot spell."""
    table = CellTable(
        {
            "label": np.arange(1, 4),
            'plate, "well"': np.array(["A01", 'a "quoted", name', "],["]),
            "value": np.array([np.inf, np.nan, 1e-5]),
            "flag": np.array([True, False, True]),
        }
    )
    table.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(table.columns)
    assert [row[1] for row in rows[1:]] == table['plate, "well"'].tolist()
    assert [row[2] for row in rows[1:]] == ["inf", "", "1e-05"]
    assert [row[3] for row in rows[1:]] == ["true", "false", "true"]
