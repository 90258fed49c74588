"""Exported files read back with decoders written here, on pictures with every kind of contact."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from export_decoders import (
    coco_to_labels,
    expand,
    fill,
    geojson_to_labels,
    read_json,
    rois_to_labels,
    signed_area,
)
from scipy import ndimage

from dinocell.errors import DINOCellError, ImageFileError
from dinocell.results.colors import CELL_COLORS
from dinocell.results.exports import write_coco_rle, write_geojson
from dinocell.results.imagej_rois import write_imagej_rois
from dinocell.results.measure import measure_labels
from dinocell.results.outlines import labels_to_polygons
from dinocell.results.table import CellTable

HAND_PICTURES = {
    "nothing": "... ...",
    "one pixel": ".1 ..",
    "side by side": "1122 1122",
    "ring": "111 1.1 111",
    "ring around another": "11111 1...1 1.2.1 1...1 11111",
    "corner contact": "1. .1",
    "other corner contact": ".1 1.",
    "hole at a corner of the border": "11. 1.1 111",
    "two holes meet in a corner": "1111 1.11 11.1 1111",
    "two pieces, the second with a hole": "1.... ..111 ..1.1 ..111",
    "full": "11 11",
}


def picture(text: str) -> np.ndarray:
    """Rows of digits to a label image; a dot is background."""
    return np.array(
        [[0 if mark == "." else int(mark) for mark in line] for line in text.split()], np.uint32
    )


def scenes() -> dict[str, np.ndarray]:
    """Label images by name: the hand pictures and random ones, with numbers above 65,535."""
    named = {name: picture(text) for name, text in HAND_PICTURES.items()}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(1, 40, 2))
        noise = ndimage.gaussian_filter(rng.random(shape), (0.0, 0.7, 1.5)[seed % 3])
        labels = ndimage.label(noise > np.median(noise), structure=np.ones((3, 3)))[0]
        if seed % 4 == 0:
            labels = rng.integers(0, 3, shape)
        named[f"random {seed}"] = (labels * 70_000).astype(np.uint32)
    return named


SCENES = scenes()


@pytest.mark.parametrize("name", SCENES)
def test_polygons_give_the_labels_back(name: str) -> None:
    labels = SCENES[name]
    polygons = labels_to_polygons(labels)
    assert list(polygons) == [label for label in np.unique(labels).tolist() if label]
    for label, pieces in polygons.items():
        cell = labels == label
        numbered, count = ndimage.label(cell)
        assert len(pieces) == count  # 4-connected
        homes = set()
        for outer, *holes in pieces:
            assert signed_area(outer) > 0
            assert all(signed_area(hole) < 0 for hole in holes)
            covered = np.unique(numbered[fill([outer, *holes], labels.shape)])
            assert len(covered) == 1  # holes went to the piece they lie in
            homes |= set(covered.tolist())
        assert homes == set(range(1, count + 1))
        rings = [ring for piece in pieces for ring in piece]
        np.testing.assert_array_equal(fill(rings, labels.shape), cell)
        assert sum(signed_area(ring) for ring in rings) == cell.sum()
        for ring in rings:
            assert len(np.unique(ring, axis=0)) == len(ring)  # no corner twice
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps != 0).sum(axis=1) == 1).all()
            assert ((steps[:, 0] != 0) != (np.roll(steps, 1, axis=0)[:, 0] != 0)).all()  # turns


def test_polygons_by_hand() -> None:
    assert {
        label: [[ring.tolist() for ring in piece] for piece in pieces]
        for label, pieces in labels_to_polygons(picture(".77 .7.")).items()
    } == {7: [[[[0, 3], [1, 3], [1, 2], [2, 2], [2, 1], [0, 1]]]]}
    (ring,) = labels_to_polygons(SCENES["ring"])[1]
    assert ring[1].tolist() in [[[2, 1], [2, 2], [1, 2], [1, 1]][k:] + [[2, 1], [2, 2], [1, 2], [1, 1]][:k] for k in range(4)]  # fmt: skip
    assert [len(piece) for piece in labels_to_polygons(SCENES["two holes meet in a corner"])[1]] == [3]  # fmt: skip
    assert len(labels_to_polygons(SCENES["corner contact"])[1]) == 2
    (pinched,) = labels_to_polygons(SCENES["hole at a corner of the border"])[1]
    assert [signed_area(ring) for ring in pinched] == [8, -1]


@pytest.mark.parametrize("name", SCENES)
def test_geojson_gives_the_labels_back(name: str, tmp_path: Path) -> None:
    labels = SCENES[name]
    table = measure_labels(labels)
    write_geojson(tmp_path / "cells.geojson", labels, table)
    np.testing.assert_array_equal(
        geojson_to_labels(tmp_path / "cells.geojson", labels.shape), labels
    )
    document = read_json(tmp_path / "cells.geojson")
    assert document["type"] == "FeatureCollection"
    for feature, row in zip(document["features"], table.rows(), strict=True):
        properties = feature["properties"]
        assert properties["objectType"] == "cell"
        assert properties["color"] == list(CELL_COLORS[row["label"] % 8])
        assert properties["name"] == str(row["label"])
        assert properties["measurements"] == {
            name: value for name, value in row.items() if value is not None
        }


def test_geojson_holds_every_finite_number_exactly(tmp_path: Path) -> None:
    path, rng = tmp_path / "cells.geojson", np.random.default_rng(0)
    labels = np.arange(1, 2501, dtype=np.uint32).reshape(50, 50)
    columns = {
        "label": labels.ravel(),
        'any "µm"': rng.integers(0, 2**64, 2500, dtype=np.uint64).view(np.float64),
        "single": rng.random(2500, np.float32),
        "whole": rng.integers(0, 2**64, 2500, dtype=np.uint64),
        "flag": rng.random(2500) < 0.5,
        "by hand": np.resize([1e16, 1e-5, 5e-324, -0.0, 2.5, np.nan, np.inf, -np.inf], 2500),
    }
    write_geojson(path, labels, CellTable(columns))
    features = read_json(path)["features"]
    for name, column in columns.items():
        found = [feature["properties"]["measurements"].get(name) for feature in features]
        assert found == [value if np.isfinite(value) else None for value in column.tolist()]


def test_geojson_without_and_with_a_wrong_table(tmp_path: Path) -> None:
    path = tmp_path / "cells.geojson"
    write_geojson(path, [[1, 2]])
    properties = [feature["properties"] for feature in json.loads(path.read_text())["features"]]
    assert properties == [
        {"objectType": "cell", "name": "1", "label": 1, "color": [86, 180, 233]},
        {"objectType": "cell", "name": "2", "label": 2, "color": [0, 158, 115]},
    ]
    with pytest.raises(ValueError, match="got 1 rows for 2 cells"):
        write_geojson(path, [[1, 2]], measure_labels([[1, 1]]))
    assert len(json.loads(path.read_text())["features"]) == 2  # still the first file


@pytest.mark.parametrize("name", SCENES)
def test_coco_gives_the_labels_back(name: str, tmp_path: Path) -> None:
    labels = SCENES[name]
    write_coco_rle(tmp_path / "cells.json", labels)
    document = read_json(tmp_path / "cells.json")
    assert document["images"] == [
        {"id": 1, "file_name": "", "height": labels.shape[0], "width": labels.shape[1]}
    ]
    assert document["categories"] == [{"id": 1, "name": "cell"}]
    assert {annotation["image_id"] for annotation in document["annotations"]} <= {1}
    np.testing.assert_array_equal(coco_to_labels(tmp_path / "cells.json"), labels)


def coco_counts(labels: np.ndarray, path: Path) -> list[str]:
    """The run lengths of all cells, as the strings of the file."""
    write_coco_rle(path, labels)
    return [item["segmentation"]["counts"] for item in read_json(path)["annotations"]]


def test_coco_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    found = coco_counts(picture("12 1."), path)
    assert [expand(text) for text in found] == [[0, 2, 2], [2, 1, 1]]
    first = np.repeat(np.array([1, 0, 1], np.uint8), [2, 2, 40])[:, None]
    # 0, 2, 2, then 40 - 2 = 38: lower group 6 with "more", upper group 1
    assert coco_counts(first, path) == ["022" + chr(48 + 32 + 6) + chr(48 + 1)]
    first = np.repeat(np.array([1, 0, 1], np.uint8), [9, 2, 6])[:, None]
    assert coco_counts(first, path) == ["092" + chr(48 + 29)]  # 6 - 9 = -3 in one group
    counts = np.random.default_rng(0).integers(1, 10 ** np.arange(1, 7).repeat(3))
    long = np.repeat(np.arange(len(counts)) % 2, counts)[:, None]
    assert [expand(text) for text in coco_counts(long, path)] == [counts.tolist()]


@pytest.mark.parametrize("name", SCENES)
def test_imagej_rois_give_the_labels_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    labels = SCENES[name]
    write_imagej_rois(tmp_path / "RoiSet.zip", labels)
    with zipfile.ZipFile(tmp_path / "RoiSet.zip") as archive:
        assert archive.namelist() == [f"{label}.roi" for label in np.unique(labels) if label]
    np.testing.assert_array_equal(rois_to_labels(tmp_path / "RoiSet.zip", labels.shape), labels)


def test_imagej_rois_of_long_images(tmp_path: Path) -> None:
    pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    labels = np.zeros((1, 60_536), np.uint32)
    labels[0, -3:-1] = 1
    write_imagej_rois(tmp_path / "RoiSet.zip", labels[:, :-1])
    again = rois_to_labels(tmp_path / "RoiSet.zip", (1, 60_535))
    np.testing.assert_array_equal(again, labels[:, :-1])
    for too_long in (labels, labels.T):
        with pytest.raises(ImageFileError, match="would need 60,536: write geojson or coco"):
            write_imagej_rois(tmp_path / "RoiSet.zip", too_long)


def test_imagej_rois_of_more_corners_than_16_bits_count(tmp_path: Path) -> None:
    pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    labels = np.zeros((300, 360), np.uint32)
    labels[:, 0] = labels[::3] = labels[1::3, 1::2] = 1  # a comb of combs
    write_imagej_rois(tmp_path / "RoiSet.zip", labels)
    np.testing.assert_array_equal(rois_to_labels(tmp_path / "RoiSet.zip", labels.shape), labels)


@pytest.mark.parametrize("name", SCENES)
def test_imagej_rois_are_those_of_roifile(name: str, tmp_path: Path) -> None:
    """Byte for byte what the package writes for the same outlines."""
    roifile = pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    write_imagej_rois(tmp_path / "RoiSet.zip", SCENES[name])
    with zipfile.ZipFile(tmp_path / "RoiSet.zip") as archive:
        for entry in archive.namelist():
            content = archive.read(entry)
            assert roifile.ImagejRoi.frombytes(content).tobytes() == content


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_geojson(path, [[1]]),
        lambda path: write_coco_rle(path, [[1]]),
        lambda path: CellTable({"label": np.array([1])}).to_csv(path),
    ],
)
def test_failure_leaves_the_old_file(write, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "cells.out"
    path.write_text("old")

    def full_disk(self: Path, *args: object, **kwargs: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        with pytest.raises(DINOCellError, match=r"cells\.out' cannot be written \(No space left"):
            write(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cells.out"]
    with pytest.raises(DINOCellError, match="is a folder"):
        write(tmp_path)
    write(path)
    assert path.read_text() != "old"


@pytest.mark.parametrize("write", [write_geojson, write_coco_rle])
def test_wrong_labels(write, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="integer label image, got dtype bool"):
        write(tmp_path / "cells", np.ones((2, 2), bool))
    with pytest.raises(ValueError, match=r"got shape \(2,\)"):
        write(tmp_path / "cells", np.ones(2, int))
    write(tmp_path / "cells", np.zeros((0, 3), int))
    document = read_json(tmp_path / "cells")
    assert document.get("features", document.get("annotations")) == []
