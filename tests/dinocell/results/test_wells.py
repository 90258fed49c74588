"""A plate by wells: sums and means, and heat maps."""

import csv

import pytest

from dinocell.results.wells import heat_maps, well_rows, write_wells

ROWS = [
    {"plate": "P", "well": "B10", "num_cells": 3, "area_mean": 10.0, "quality": 0.5, "confluency_percent": 2.0},
    {"plate": "P", "well": "B10", "num_cells": 1, "area_mean": 30.0, "quality": 0.9, "confluency_percent": 4.0},
    {"plate": "P", "well": "B2", "num_cells": 0, "area_mean": None, "quality": None, "confluency_percent": 0.0},
    {"name": "elsewhere", "num_cells": 9},
]  # fmt: skip


def test_means_are_over_cells():
    first, second = well_rows(ROWS)
    assert first == {
        "plate": "P",
        "well": "B2",
        "images": 1,
        "num_cells": 0,
        "confluency_percent": 0.0,
        "area_mean": None,
        "quality": None,
    }
    assert (second["images"], second["num_cells"], second["confluency_percent"]) == (2, 4, 3.0)
    assert second["area_mean"] == pytest.approx(15.0)
    assert second["quality"] == pytest.approx(0.6)


def test_files(tmp_path):
    write_wells(tmp_path, ROWS)
    with (tmp_path / "wells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["well"] for row in rows] == ["B2", "B10"]
    assert rows[0]["area_mean"] == ""
    assert not (tmp_path / "wells.parquet").exists()
    none = tmp_path / "none"
    write_wells(none, ROWS[3:], ["parquet"])
    assert not none.exists()


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra tables is not installed")
    others = [{"plate": "P", "well": "B11", "num_cells": 2, "area_um2_mean": 4.0}]
    others.append({"well": "C1", "num_cells": 0})
    write_wells(tmp_path, [*ROWS, *others], ["tif", "parquet"])
    table = parquet.read_table(tmp_path / "wells.parquet")
    rows = well_rows([*ROWS, *others])
    names = list(dict.fromkeys(name for row in rows for name in row))
    assert table.to_pylist() == [{name: row.get(name) for name in names} for row in rows]
    types = {field.name: str(field.type) for field in table.schema}
    assert types == dict.fromkeys(names, "double") | {
        **dict.fromkeys(("plate", "well"), "string"),
        **dict.fromkeys(("images", "num_cells"), "int64"),
    }
    units = {
        field.name: (field.metadata or {}).get(b"unit", b"").decode() for field in table.schema
    }
    assert (units["area_mean"], units["area_um2_mean"], units["well"]) == ("px²", "µm²", "")
    assert units["confluency_percent"] == "%"


def test_heat_maps_have_the_shape_of_the_plate():
    maps = {one["title"]: one for one in heat_maps(ROWS)}
    assert set(maps) == {
        f"P: {name}" for name in ("num_cells", "confluency_percent", "area_mean", "quality")
    }
    counts = maps["P: num_cells"]
    assert (len(counts["rows"]), counts["columns"]) == (8, 12)
    assert counts["rows"][1][9]["text"] == "4"
    assert counts["rows"][1][9]["title"] == "B10: 4 (2 images)"
    assert counts["rows"][1][9]["style"] != counts["rows"][1][1]["style"]
    assert counts["rows"][0][0] is None
    assert maps["P: area_mean"]["rows"][1][1]["text"] == "–"
    assert heat_maps(ROWS[3:]) == []
