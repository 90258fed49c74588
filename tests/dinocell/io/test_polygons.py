"""Outlines, run lengths and files of other programs become the labels that a person draws."""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest

from dinocell.errors import DataSetError, ImageFileError, UsageError
from dinocell.io import read_label_file, read_labels
from dinocell.io.polygons import (
    expand_run_lengths,
    fill_rings,
    paint_cells,
    run_lengths_to_mask,
)
from dinocell.results.exports import write_coco_rle
from dinocell.results.imagej_rois import write_imagej_rois
from dinocell.results.outlines import labels_to_polygons


def drawn(rows: str) -> np.ndarray:
    """An image of one digit per pixel."""
    return np.array([[int(letter) for letter in row] for row in rows.split()], np.uint32)


RING = drawn("0000000 0111110 0100010 0102010 0100010 0111110 0000000")


def filled(rings, shape):
    return paint_cells([fill_rings(rings, shape)], shape)[0]


def test_a_pixel_belongs_to_an_outline_when_its_centre_lies_inside():
    square = [(0.4, 1.4), (0.4, 3.6), (2.6, 3.6), (2.6, 1.4)]  # centres 0.5 to 2.5 and 1.5 to 3.5
    assert np.array_equal(filled([square], (4, 5)), drawn("01110 01110 01110 00000"))
    triangle = [(0, 0), (0, 4), (4, 0)]  # the diagonal runs through centres: left ends count
    assert filled([triangle], (4, 4)).sum() in (6, 10)


def test_parts_outside_the_image_are_cut_off():
    assert np.array_equal(filled([[(-2, -2), (-2, 1), (1, 1), (1, -2)]], (2, 2)), drawn("10 00"))
    assert fill_rings([[(5, 5), (5, 7), (7, 7)]], (3, 3)) is None
    assert fill_rings([[(0, -9), (0, -5), (3, -5), (3, -9)]], (3, 3)) is None
    assert fill_rings([[(1, 1)]], (3, 3)) is None


def random_labels(seed: int) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 4, (6, 7))
    return np.kron(blocks, np.ones((2, 3), int)).astype(np.uint32)


@pytest.mark.parametrize(
    "labels", [RING, random_labels(0), random_labels(1)], ids=["ring", "a", "b"]
)
def test_outlines_and_run_lengths_give_the_same_labels_back(tmp_path, labels):
    outlines = [
        fill_rings([ring for piece in pieces for ring in piece], labels.shape)
        for pieces in labels_to_polygons(labels).values()
    ]
    assert np.array_equal(paint_cells(outlines, labels.shape)[0], labels)
    write_coco_rle(tmp_path / "a.json", labels)
    annotations = json.loads((tmp_path / "a.json").read_text())["annotations"]
    runs = [expand_run_lengths(item["segmentation"]["counts"]) for item in annotations]
    cells = [run_lengths_to_mask(counts, labels.shape) for counts in runs]
    assert np.array_equal(paint_cells(cells, labels.shape)[0], labels)


@pytest.mark.parametrize("counts", [[3, 4], [3, 4, -1], [[6]]])
def test_run_lengths_of_another_size_are_refused(counts):
    with pytest.raises(ValueError, match="add up to 2 × 3 = 6"):
        run_lengths_to_mask(counts, (2, 3))
    assert run_lengths_to_mask([6], (2, 3)) is None


def test_a_small_cell_lies_on_top_of_a_large_one():
    small = fill_rings([[(1, 1), (1, 2), (2, 2), (2, 1)]], (3, 3))
    large = fill_rings([[(0, 0), (0, 3), (3, 3), (3, 0)]], (3, 3))
    for cells, expected in (
        ((small, None, large), "333 313 333"),
        ((large, small), "111 121 111"),
    ):
        labels, overlap_px = paint_cells(cells, (3, 3))
        assert np.array_equal(labels, drawn(expected))
        assert overlap_px == 1


def test_rois_are_read_as_labels(tmp_path):
    pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    path = tmp_path / "a_RoiSet.zip"
    write_imagej_rois(path, RING)
    assert np.array_equal(read_labels(path, shape=RING.shape), RING)
    with pytest.raises(UsageError, match="`shape` must be given"):
        read_labels(path)
    with pytest.raises(DataSetError, match=r"image of 4 × 4 px.*belong to this image"):
        read_labels(path, shape=(4, 4))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageFileError, match="damaged or cut short"):
        read_labels(path, shape=RING.shape)


def test_lines_and_other_zips_are_no_rois_of_cells(tmp_path):
    roifile = pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    line = roifile.ImagejRoi.frompoints(np.array([[1, 1], [3, 3]]))
    line.roitype = roifile.ROI_TYPE.POLYLINE
    for name, content, message in (
        ("1.roi", line.tobytes(), "of type polyline"),
        ("a.png", b"x", r"no file that ends in \.roi"),
    ):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(ImageFileError, match=message):
            read_labels(tmp_path / "a.zip", shape=(5, 5))


def test_rois_of_one_name_are_all_read_and_those_of_several_slices_refused(tmp_path):
    roifile = pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")

    def labels_of(*slices: int, axis: str = "position"):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of two entries of one name
            for number, place in enumerate(slices):
                top = 2 * number
                corners = np.array([[0, top], [2, top], [2, top + 1], [0, top + 1]])
                roi = roifile.ImagejRoi.frompoints(corners)
                setattr(roi, axis, place)
                archive.writestr("1.roi", roi.tobytes())
        return read_labels(tmp_path / "a.zip", shape=(5, 5))

    assert np.array_equal(labels_of(0, 3), drawn("11000 00000 22000 00000 00000"))
    for axis in ("position", "z_position", "t_position"):
        assert labels_of(2, 2, 0, axis=axis).max() == 3
        with pytest.raises(ImageFileError, match=r"must lie on one slice, those of .* 1, 2: save"):
            labels_of(1, 2, axis=axis)
    assert labels_of(1, 2, axis="c_position").max() == 2


def test_geojson_of_one_plane_without_tiles(tmp_path):
    def area(top: int, kind: str, **plane: int) -> dict:
        corners = [[0, top], [2, top], [2, top + 1], [0, top + 1]]
        geometry = {"type": "Polygon", "coordinates": [corners]}
        geometry |= {"plane": {"c": -1, "z": 0, "t": 0} | plane} if plane else {}
        return {"geometry": geometry, "properties": {"objectType": kind}}

    def labels_of(*features: dict):
        content = {"type": "FeatureCollection", "features": features}
        (tmp_path / "a.geojson").write_text(json.dumps(content), encoding="utf-8-sig")
        return read_labels(tmp_path / "a.geojson", shape=(3, 3))

    root = {"geometry": None, "properties": {"objectType": "root"}}
    one = drawn("000 110 000")
    assert np.array_equal(labels_of(root, area(0, "tile"), area(1, "detection")), one)
    assert np.array_equal(labels_of(root, area(0, "tile"), area(1, "annotation")), one)
    assert np.array_equal(labels_of(area(0, "annotation", z=2), area(1, "cell", z=1)), one)
    assert labels_of(area(0, "tile"), area(1, "tile")).max() == 2
    for plane in ({"z": 1}, {"t": 1}):
        with pytest.raises(ImageFileError, match=r"one plane, got \(z, t\) = \(0, 0\) and \("):
            labels_of(area(0, "cell"), area(1, "cell", **plane))


def test_what_outlines_cannot_show_is_noted(tmp_path):
    def corners(left: int, size: float) -> list[list[float]]:
        return [[left, 0], [left + size, 0], [left + size, size], [left, size]]

    outlines = [corners(0, 3), corners(2, 3), corners(6, 0.2)]
    expected = [
        "1 annotations cover no pixel",
        "3 px belong to several cells: the smaller cell is on top",
    ]
    areas = [{"geometry": {"type": "Polygon", "coordinates": [one]}} for one in outlines]
    (tmp_path / "a.geojson").write_text(json.dumps({"features": areas}))
    assert list(read_label_file(tmp_path / "a.geojson", shape=(4, 8)).notes) == expected
    annotations = [
        {"image_id": 1, "iscrowd": 0, "segmentation": [np.ravel(one).tolist()]} for one in outlines
    ]
    annotations.append(annotations[0] | {"iscrowd": 1})
    image = {"id": 1, "height": 4, "width": 8}
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": annotations}))
    crowds, *notes = read_label_file(tmp_path / "a.json").notes
    assert notes == expected
    assert crowds.startswith("1 crowd annotations of a.json were left out")
    roifile = pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, one in enumerate(outlines):
            roi = roifile.ImagejRoi.frompoints(np.array(one, np.float32))
            archive.writestr(f"{number}.roi", roi.tobytes())
    assert list(read_label_file(tmp_path / "a.zip", shape=(4, 8)).notes) == expected


def test_a_page_of_labels_that_have_none_is_refused(tmp_path):
    np.save(tmp_path / "a_seg.npy", {"masks": RING})
    write_coco_rle(tmp_path / "a.json", RING)
    for name in ("a_seg.npy", "a.json"):
        assert np.array_equal(read_labels(tmp_path / name, page=0), RING)
        with pytest.raises(UsageError, match="`page` must be 0 for"):
            read_labels(tmp_path / name, page=1)


class Trap:
    """Code that a pickle runs when it is loaded."""

    def __reduce__(self):
        return (exec, ("raise RuntimeError('ran')",))


def test_masks_of_a_project_are_read_without_running_code(tmp_path):
    path = tmp_path / "a_seg.npy"
    np.save(path, {"masks": RING.astype(np.uint16), "model": Trap(), "flows": [np.zeros(2)]})
    assert np.array_equal(read_labels(path), RING)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ImageFileError, match="cut short"):
        read_labels(path)
    np.save(path, {"outlines": RING})
    with pytest.raises(ImageFileError, match="with masks"):
        read_labels(path)
    np.save(path, {"masks": np.zeros((2, 4, 4), np.uint16)})
    with pytest.raises(ImageFileError, match=r"got \(2, 4, 4\)"):
        read_labels(path)
    path.write_bytes(pickle.dumps({"masks": RING}))
    with pytest.raises(ImageFileError, match="with masks"):
        read_labels(path)
