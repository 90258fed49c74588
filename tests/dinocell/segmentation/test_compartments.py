"""Nuclei grow to cells of the same number; both and the cytoplasm are measured and written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from skimage.segmentation import watershed

from dinocell.errors import UsageError
from dinocell.io import read_labels, write_image
from dinocell.pipeline import segment
from dinocell.results.compartments import with_compartments
from dinocell.results.exports import write_geojson
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.results.measure import measure_labels
from dinocell.segmentation.compartments import CellChoice, grow_cells, grow_ring


def test_nuclei_grow_to_the_valley_between_cells() -> None:
    distance_map = np.array([[0, 0.3, 0.6, 0.5, 0.2, 0.4, 0.7, 0.3, 0, 0.9, 0.9]])
    nuclei = np.array([[0, 0, 9, 0, 0, 0, 4, 0, 0, 0, 0]])
    found = grow_cells(nuclei, distance_map, fill_threshold=0.25)
    assert found.tolist() == [[0, 9, 9, 9, 0, 4, 4, 4, 0, 0, 0]]  # no nucleus, no cell
    found = grow_cells(nuclei, distance_map, fill_threshold=0.1)
    assert found.tolist()[0][:4] == [0, 9, 9, 9]
    assert found.tolist()[0][5:] == [4, 4, 4, 0, 0, 0]
    found = grow_cells(nuclei, np.zeros((1, 11)), fill_threshold=0.1)
    np.testing.assert_array_equal(found, nuclei)  # a nucleus is part of its cell


def test_growth_equals_the_watershed_of_scikit_image() -> None:
    rng = np.random.default_rng(0)
    distance_map = rng.permutation(4096).reshape(64, 64) / 4096  # no two pixels are equal
    nuclei = np.zeros((64, 64), int)
    for number, (row, col) in enumerate(rng.integers(2, 60, (12, 2)), start=3):
        nuclei[row : row + 3, col : col + 3] = number
    inside = (distance_map > 0.2) | (nuclei > 0)
    expected = watershed(-distance_map, nuclei, mask=inside)
    found = grow_cells(nuclei, distance_map, fill_threshold=0.2)
    assert (found == expected).mean() > 0.98  # but for the order of pixels below the seeds


def test_rings_reach_as_far_as_asked() -> None:
    nuclei = np.zeros((20, 30), int)
    nuclei[8:11, 5:8], nuclei[8:11, 16:19] = 7, 2
    found = grow_ring(nuclei, 5)
    rows, cols = np.mgrid[:20, :30]
    distances = {
        label: np.min(
            [np.hypot(rows - r, cols - c) for r, c in np.argwhere(nuclei == label)], axis=0
        )
        for label in (2, 7)
    }
    assert (found[(distances[7] <= 5) & (distances[7] < distances[2])] == 7).all()
    assert (found[(distances[2] <= 5) & (distances[2] < distances[7])] == 2).all()
    assert not found[(distances[2] > 5) & (distances[7] > 5)].any()


def test_how_cells_are_asked_for() -> None:
    assert CellChoice.of("AGP, 0") == CellChoice(("AGP", 0))
    assert CellChoice.of("ring:5um").width_px(0.5) == 10
    assert CellChoice.of("ring:2.5µm").width_px(0.5) == 5
    assert CellChoice.of("ring:12px").width_px(None) == 12
    with pytest.raises(UsageError, match="`cells` in µm needs the pixel size"):
        CellChoice.of("ring:5um").width_px(None)
    for text in ("ring", "ring:5", "ring:0um", "ring:-1px"):
        with pytest.raises(UsageError, match="must be channels or a ring such as ring:5um"):
            CellChoice.of(text)


def labelled() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, nuclei and an image of two channels; cell 5 is all nucleus."""
    cells, nuclei = np.zeros((2, 12, 20), np.uint32)
    cells[1:9, 1:9], cells[2:8, 11:17] = 3, 5
    nuclei[3:6, 3:6], nuclei[2:8, 11:17] = 3, 5
    image = np.random.default_rng(0).integers(0, 99, (12, 20, 2)).astype(np.uint16)
    return cells, nuclei, image


def test_columns_of_nucleus_and_cytoplasm() -> None:
    cells, nuclei, image = labelled()
    names = ("DNA", "AGP")
    table = measure_labels(cells, image, pixel_size_um=0.5, channel_names=names)
    both = with_compartments(table, cells, nuclei, image, names)
    assert both.columns[: len(table.columns)] == table.columns
    alone = measure_labels(nuclei, image, pixel_size_um=0.5, channel_names=names)
    for name in ("area", "area_um2", "eccentricity", "centroid_row", "intensity_mean_DNA"):
        np.testing.assert_array_equal(both[f"nucleus_{name}"], alone[name])
    assert both["cytoplasm_area"].tolist() == [64 - 9, 0]
    assert both["cytoplasm_area_um2"].tolist() == [55 / 4, 0]
    expected = image[..., 1][(cells == 3) & (nuclei == 0)].mean()
    assert both["cytoplasm_intensity_mean_AGP"][0] == pytest.approx(expected)
    assert np.isnan(both["cytoplasm_intensity_mean_AGP"][1])
    empty = measure_labels(cells * 0, image, channel_names=names)
    none = with_compartments(empty, cells * 0, nuclei * 0, image, names)
    assert len(none) == 0
    assert "nucleus_area" in none


def test_geojson_has_the_nucleus_in_the_cell(tmp_path: Path) -> None:
    shapely = pytest.importorskip("shapely")
    cells, nuclei, _ = labelled()
    write_geojson(tmp_path / "a.geojson", cells, nuclei=nuclei)
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    for label, feature in zip((3, 5), features, strict=True):
        cell, nucleus = (
            shapely.from_geojson(json.dumps(feature[part]))
            for part in ("geometry", "nucleusGeometry")
        )
        assert cell.covers(nucleus)
        assert (cell.area, nucleus.area) == ((cells == label).sum(), (nuclei == label).sum())


def field(path: Path, *, pixel_size_um: float | None = 0.5) -> Path:
    """Three nuclei of radius 6 in cells of radius 14: channels DNA and AGP."""
    rows, cols = np.mgrid[:80, :100]
    pixels = np.random.default_rng(0).normal(100, 5, (80, 100, 2))
    for row, col in [(20, 22), (52, 70), (58, 24)]:
        distance = np.hypot(rows - row, cols - col)
        pixels[..., 0] += 900 * (distance < 6)
        pixels[..., 1] += 700 * (distance < 14)
    write_image(
        path,
        pixels.clip(0).astype(np.uint16),
        pixel_size_um=pixel_size_um,
        channel_names=["DNA", "AGP"],
    )
    return path


@pytest.mark.parametrize("cells", ["AGP", "mean", "ring:2um", "ring:4px"])
def test_nuclei_and_cells_have_one_number(cells: str, tmp_path: Path) -> None:
    result = segment(field(tmp_path / "a.tif"), model="dinocell-cells", nuclei="DNA", cells=cells)
    assert result.nuclei is not None
    assert result.num_cells == 3
    inside = result.nuclei > 0
    np.testing.assert_array_equal(result.labels[inside], result.nuclei[inside])
    areas = np.bincount(result.labels.ravel())[1:] / np.bincount(result.nuclei.ravel())[1:]
    assert (areas > 1.5).all()
    alone = segment(tmp_path / "a.tif", model="dinocell-cells", channels=["DNA"])
    np.testing.assert_array_equal(result.nuclei, alone.labels)
    if cells.startswith("ring"):
        np.testing.assert_array_equal(result.labels, grow_ring(alone.labels, 4))
    else:
        table = result.measure()
        assert {"intensity_mean_DNA", "nucleus_intensity_mean_AGP"} <= set(table.columns)
        assert (table["nucleus_intensity_mean_DNA"] > table["cytoplasm_intensity_mean_DNA"]).all()


def test_nuclei_alone_is_one_channel(tmp_path: Path) -> None:
    path = field(tmp_path / "a.tif")
    result = segment(path, model="dinocell-cells", nuclei="DNA")
    alone = segment(path, model="dinocell-cells", channels=["DNA"])
    np.testing.assert_array_equal(result.labels, alone.labels)
    assert result.nuclei is None


def test_both_may_be_positions_of_an_array() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 2)).astype(np.uint8)
    numbers = segment(image, model="dinocell-cells", nuclei=0, cells=1)
    words = segment(image, model="dinocell-cells", nuclei="0", cells="1")
    np.testing.assert_array_equal(numbers.labels, words.labels)
    assert numbers.nuclei is not None


def test_the_command_writes_both(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from dinocell.cli.app import app

    image, out = field(tmp_path / "a.tif"), tmp_path / "out"
    arguments = [
        "segment",
        str(image),
        "-o",
        str(out),
        "-f",
        "tif",
        "-f",
        "geojson",
        "--no-overlay",
    ]
    done = CliRunner().invoke(app, [*arguments, "--nuclei", "DNA", "--cells", "AGP"])
    assert done.exit_code == 0, done.output
    cells, nuclei = (read_labels(out / f"a{end}.tif") for end in ("_labels", "_nuclei_labels"))
    np.testing.assert_array_equal(cells[nuclei > 0], nuclei[nuclei > 0])
    with (out / "a_cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["nucleus_area"]) for row in rows] == np.bincount(nuclei.ravel())[1:].tolist()
    features = json.loads((out / f"a{EXPORT_FORMATS['geojson'].suffix}").read_text())["features"]
    assert all("nucleusGeometry" in feature for feature in features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": "AGP"}, "`cells` needs `nuclei`"),
        ({"nuclei": "DNA", "channels": ["AGP"]}, "`nuclei` and `channels` exclude each other"),
        ({"nuclei": "DNA", "cells": "ring:x"}, "must be channels or a ring such as"),
        ({"nuclei": "DNA", "cells": ","}, "must be channels or a ring"),
        ({"nuclei": "DNA", "cells": "ring:5um"}, "needs the pixel size"),
        ({"nuclei": "ER"}, "ER"),
    ],
)
def test_wrong_choices(options, message, mini_model, tmp_path: Path) -> None:
    path = field(tmp_path / "a.tif", pixel_size_um=None)
    with pytest.raises(UsageError, match=message):
        segment(path, model=mini_model, **options)
