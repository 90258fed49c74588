"""Label images and tables of every kind through the writers: valid files that give them back, or one error.

`test_longer` runs the same for minutes (`-m slow`).  What it finds becomes a test of its own.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from export_decoders import check_outlines, geojson_to_labels, read_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dinocell.io import read_labels, write_labels
from dinocell.results.exports import write_geojson
from dinocell.results.measure import measure_labels
from dinocell.results.table import CellTable

pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")

CHECKS = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
KINDS = ("uint8", "uint16", ">u2", "uint32", "int32", "int64", "uint64", ">i8")


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@st.composite
def label_images(draw) -> np.ndarray:
    """Few cells with many contacts, numbers up to the largest, in every memory layout."""
    kind = np.dtype(draw(st.sampled_from(KINDS)))
    largest = min(int(np.iinfo(kind).max), 2**32 - 1)
    numbers = st.sampled_from([0, 0, 1, 2, 3, largest, min(largest, 70_000)])
    shape = arrays.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)
    labels = draw(arrays.arrays(kind, shape, elements=numbers))
    times = draw(st.sampled_from([(1, 1), (1, 3), (2, 1)]))
    labels = np.repeat(np.repeat(labels, times[0], axis=0), times[1], axis=1)
    if draw(st.booleans()):
        labels = labels.T
    step = draw(st.sampled_from([1, -1, 2]))
    return labels[::step]


@st.composite
def columns(draw, num_cells: int) -> dict[str, np.ndarray]:
    """Columns of any numbers, NaN and infinity among them, with any names."""
    found = {}
    for name in draw(st.lists(TEXTS.filter(lambda text: text != "label"), max_size=3, unique=True)):
        kind = draw(st.sampled_from(["float64", "float32", "int64", "uint64", "bool"]))
        found[name] = draw(arrays.arrays(kind, num_cells))
    return found


def check_every_writer(folder, labels: np.ndarray, data) -> None:
    expected = labels.astype(np.uint32)
    numbers = np.unique(expected[expected > 0])
    table = CellTable({"label": numbers, **data.draw(columns(len(numbers)))})
    path = folder / "cells"

    write_geojson(path, labels, table)
    np.testing.assert_array_equal(geojson_to_labels(path, labels.shape), expected)
    for row, feature in zip(table.rows(), read_json(path)["features"], strict=True):
        known = {n: v for n, v in row.items() if v is not None and np.isfinite(v)}
        assert feature["properties"]["measurements"] == json.loads(json.dumps(known))
    check_outlines(path, labels)

    if labels.size:
        write_labels(folder / "cells.tif", labels)
        np.testing.assert_array_equal(read_labels(folder / "cells.tif"), expected)
        measured = measure_labels(labels)
        write_geojson(path, labels, measured)
        assert len(read_json(path)["features"]) == len(measured) == len(numbers)


@settings(max_examples=15, deadline=None, suppress_health_check=CHECKS)
@given(label_images(), st.data())
def test_writers_give_everything_back(tmp_path, labels, data):
    check_every_writer(tmp_path, labels, data)


@pytest.mark.slow
@settings(max_examples=1_000, deadline=None, suppress_health_check=CHECKS)
@given(label_images(), st.data())
def test_longer(tmp_path, labels, data):
    check_every_writer(tmp_path, labels, data)
