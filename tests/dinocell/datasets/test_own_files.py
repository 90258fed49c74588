"""Folders of a user's own: names, links and endings as other programs and people write them."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import layout_doubles as doubles
import numpy as np
import pytest

from dinocell.datasets import SplitOptions, prepare
from dinocell.errors import DataSetError, DINOCellError, ImageFileError
from dinocell.io import read_image, read_labels

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


def test_accents_may_be_apart_from_their_letters(tmp_path):
    """As macOS stores them."""
    source, out = tmp_path / "source", tmp_path / "out"
    doubles.image(source / "\u00e4.tif")
    seg_npy(source / "a\u0308_seg.npy", 0)
    assert list(prepared("seg_npy", source, out)[0]) == ["\u00e4"]


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
    with pytest.raises(DINOCellError, match=r"closed' was left out.*change its rights"):
        prepared("seg_npy", tmp_path / "source", tmp_path / "out")


def test_a_file_for_a_folder_says_what_is_needed(tmp_path):
    doubles.seg_npy(source := tmp_path / "source")
    with pytest.raises(DataSetError, match=r"must hold a_seg\.npy of Cellpose beside the image a"):
        prepared("seg_npy", source / "0_seg.npy", tmp_path / "out")


def test_images_without_labels_are_noted(tmp_path):
    doubles.seg_npy(source := tmp_path / "source")
    doubles.image(source / "forgotten.tif")
    doubles.labels(source / "0_cp_masks.tif")
    doubles.image(source / "0_flows.tif")  # of Cellpose, no image
    _, text = prepared("seg_npy", source, tmp_path / "out")
    assert "Images without labels were left out: 1 (forgotten.tif); manifest.json lists" in text


def coco(source: Path, names: list[str], **changes) -> dict:
    """Images `names` below `source`, and the content of a COCO file that lists them."""
    for number, name in enumerate(names):
        doubles.image(source / name, number)
    content = doubles.coco_content(names)
    for annotation in content["annotations"]:
        annotation |= changes
    return content


def save(path: Path, content: dict, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(content).encode(encoding))


@pytest.mark.parametrize(
    ("file_name", "stated"),
    [
        ("images/a b.tif", "images\\a b.tif"),
        ("images/a b.tif", "..\\..\\upload\\4\\a b.tif"),
        ("images/a b.tif", "/data/local-files/?d=project/a%20b.tif"),
        ("images/ä 5% #1.tif", "%C3%A4%205%25%20%231.tif"),
        ("images/ä 5% #1.tif", "ä 5% #1.tif"),
        ("images/a\u0308.tif", "\u00e4.tif"),
        ("images/\u00e4.tif", "a%CC%88.tif"),
        ("images/a%20b.tif", "a%20b.tif"),
        ("images/a.tif", "https://example.org/a.tif?signature=1/2"),
    ],
)
def test_names_of_coco_files_may_be_paths_of_windows_and_addresses(tmp_path, file_name, stated):
    content = coco(tmp_path / "source", [file_name])
    content["images"][0]["file_name"] = stated
    save(tmp_path / "source" / "all.json", content, "utf-8-sig")  # as PowerShell writes it
    rows, _ = prepared("coco", tmp_path / "source", tmp_path / "out")
    assert list(rows) == [Path(file_name).stem]


def test_images_of_one_name_in_several_folders_have_the_folders_in_their_names(tmp_path):
    names = ["p1/a.tif", "p2/a.tif", "p2/b.tif"]
    content = coco(tmp_path / "source" / "images", names)
    save(tmp_path / "source" / "all.json", content)
    rows, _ = prepared("coco", tmp_path / "source", tmp_path / "out")
    assert list(rows) == ["p1_a", "p2_a", "b"]
    for number, name in enumerate(rows):
        labels = read_labels(tmp_path / "out" / rows[name]["labels"])
        assert np.array_equal(labels, doubles.truth(number))
    content["images"].append(content["images"][0] | {"id": 99})
    save(tmp_path / "source" / "all.json", content)
    with pytest.raises(DataSetError, match=r"p1/a\.tif' is listed several times"):
        prepared("coco", tmp_path / "source", tmp_path / "out2")


def test_the_folder_of_a_coco_file_says_the_split(tmp_path):
    """Roboflow: train/_annotations.coco.json beside its images, valid, test."""
    for folder in ("train", "valid", "test"):
        home = tmp_path / "source" / folder
        save(home / "_annotations.coco.json", coco(home, [f"of_{folder}.tif"]))
    rows, _ = prepared("coco", tmp_path / "source", tmp_path / "out")
    splits = {name: row["split"] for name, row in rows.items()}
    assert splits == {"of_train": "train", "of_valid": "val", "of_test": "test"}


def test_a_file_of_crowds_alone_holds_cells(tmp_path):
    """CVAT marks every painted mask as a crowd."""
    save(tmp_path / "source" / "all.json", coco(tmp_path / "source", ["a.tif"], iscrowd=1))
    rows, text = prepared("coco", tmp_path / "source", tmp_path / "out")
    assert "All 2 annotations of all.json are marked as crowds" in text
    assert np.array_equal(read_labels(tmp_path / "out" / rows["a"]["labels"]), doubles.truth())


def test_boxes_are_no_cells(tmp_path):
    content = coco(tmp_path / "source", ["a.tif"])
    content["annotations"][1]["segmentation"] = []
    save(tmp_path / "source" / "all.json", content)
    with pytest.raises(ImageFileError, match=r"'a\.tif' .A box without an outline"):
        prepared("coco", tmp_path / "source", tmp_path / "out")


def test_a_preparation_beside_its_images_can_be_continued(tmp_path):
    source = tmp_path / "source"
    save(source / "all.json", coco(source / "images", ["a.tif", "b.tif"]))
    whole = (source / "images" / "b.tif").read_bytes()
    (source / "images" / "b.tif").write_bytes(whole[:200])
    for folder in ("one", "two"):
        with pytest.raises(ImageFileError, match="1 finished images were kept"):
            prepared("coco", source / "all.json", source / folder)
    (source / "images" / "b.tif").write_bytes(whole)
    for folder in ("one", "two"):
        assert list(prepared("coco", source / "all.json", source / folder)[0]) == ["a", "b"]


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_numbers_of_64_bit_keep_their_values(tmp_path, dtype):
    source = tmp_path / "source"
    pixels = doubles.picture().astype(dtype) * np.array(
        1e200 if dtype == "float64" else 2**40, dtype
    )
    source.mkdir()
    np.save(source / "a.npy", pixels)
    seg_npy(source / "a_seg.npy", 0)
    rows, _ = prepared("seg_npy", source, tmp_path / "out")
    image = read_image(tmp_path / "out" / rows["a"]["image"]).pixels
    assert image.dtype == np.float64
    assert np.array_equal(image, pixels.astype(np.float64))
