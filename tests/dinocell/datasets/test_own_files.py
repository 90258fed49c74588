"""Folders of a user's own: names, links and endings as other programs and people write them."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import layout_doubles as doubles
import numpy as np
import pytest

from dinocell.datasets import SplitOptions, prepare
from dinocell.errors import DINOCellError
from dinocell.io import read_labels

ALL_TRAIN = SplitOptions(val_fraction=0, test_fraction=0)


def prepared(name: str, source: Path, out: Path) -> tuple[dict[str, dict[str, str]], str]:
    """Rows of the manifest by the name of the image, and the text for the user."""
    text = prepare(name, source, out, splits=ALL_TRAIN, shown=False).text()
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}, text


def seg_npy(path: Path, number: int) -> None:
    np.save(path, {"masks": doubles.truth(number)})


def test_endings_may_be_in_capitals_and_an_ome_tiff_has_labels_of_its_short_name(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for number, name in enumerate(("Zählung 1.Png", "b#2.TIF", "c.ome.tif")):
        doubles.image(source / "made.tif", number)
        if name.endswith("Png"):
            doubles.image(source / "made.png", number)
            (source / "made.png").rename(source / name)
        else:
            shutil.copy(source / "made.tif", source / name)
        seg_npy(source / f"{name.partition('.')[0]}_seg.npy", number)
    (source / "made.tif").unlink()
    rows, _ = prepared("seg_npy", source, out)
    assert list(rows) == ["b#2", "c.ome", "Zählung 1"]
    for number, name in enumerate(("Zählung 1", "b#2", "c.ome")):
        assert np.array_equal(read_labels(out / rows[name]["labels"]), doubles.truth(number))
    doubles.geojson(source := tmp_path / "capitals")
    (source / "0.geojson").rename(source / "0.GeoJSON")
    assert list(prepared("geojson", source, tmp_path / "out2")[0]) == ["0", "1"]


def test_folders_behind_links_are_read_once(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    for folder, number in ((source, 0), (tmp_path / "elsewhere", 1)):
        doubles.image(folder / f"{number}.tif", number)
        seg_npy(folder / f"{number}_seg.npy", number)
    os.symlink(tmp_path / "elsewhere", source / "linked")
    os.symlink(source, source / "circle")
    rows, _ = prepared("seg_npy", source, out)
    assert list(rows) == ["0", "linked_1"]


def test_a_folder_that_cannot_be_opened_stops_the_preparation(tmp_path, monkeypatch):
    doubles.seg_npy(tmp_path / "source")
    doubles.seg_npy(closed := tmp_path / "source" / "closed")
    scandir = os.scandir

    def refuses(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DINOCellError, match="closed' was left out.*change its rights"):
        prepared("seg_npy", tmp_path / "source", tmp_path / "out")


def test_images_without_labels_are_noted(tmp_path):
    doubles.seg_npy(source := tmp_path / "source")
    doubles.image(source / "forgotten.tif")
    doubles.labels(source / "0_cp_masks.tif")
    _, text = prepared("seg_npy", source, tmp_path / "out")
    assert "Images without a file of labels beside them were left out: 1 (forgotten.tif)" in text
