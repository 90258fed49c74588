"""`convert_labels`: from every format to every other one, and what other programs have edited."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.errors import DataSetError, DINOCellError, ImageFileError, UsageError
from dinocell.io import read_labels, write_image, write_labels
from dinocell.results.conversion import LABEL_FORMATS, convert_labels
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.results.outlines import labels_to_polygons


def scene() -> np.ndarray:
    """Touching cells with gaps in their numbers, one with a hole and one in two pieces."""
    labels = np.zeros((50, 64), np.uint32)
    labels[4:18, 5:20], labels[4:18, 20:31], labels[18:30, 5:31] = 3, 12, 7
    labels[20:24, 9:13] = 0
    labels[34:45, 5:15] = labels[34:45, 20:30] = 900
    rows, cols = np.mgrid[:50, :64]
    labels[(rows - 25) ** 2 + (cols - 47) ** 2 < 140] = 5
    return labels


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "field.tif"
    write_image(path, np.arange(50 * 64, dtype=np.uint16).reshape(50, 64), pixel_size_um=0.25)
    return path


@pytest.mark.parametrize("kind", LABEL_FORMATS)
def test_every_format_gives_the_same_labels_back(kind: str, tmp_path: Path, image: Path) -> None:
    """With the numbers of the cells; by the ending and by `format`."""
    for package in filter(None, [EXPORT_FORMATS[kind].needs]):
        pytest.importorskip(package[0], reason=f"extra [{package[2]}] is not installed")
    labels = scene()
    write_labels(tmp_path / "a_labels.tif", labels)
    there = tmp_path / f"a{EXPORT_FORMATS[kind].suffix}x".removesuffix("x").replace(
        "_labels", "_again"
    )
    done = convert_labels(tmp_path / "a_labels.tif", there, image=image)
    assert (done.path, done.format, done.num_cells) == (there, kind, 5)
    np.testing.assert_array_equal(read_labels(there, shape=labels.shape), labels)
    back = convert_labels(there, tmp_path / "back.png", image=image)
    assert back.format == "png"
    np.testing.assert_array_equal(read_labels(tmp_path / "back.png"), labels)
    empty = np.zeros_like(labels)
    write_labels(tmp_path / "a_labels.tif", empty)
    convert_labels(tmp_path / "a_labels.tif", there, format=kind, image=image, overwrite=True)
    np.testing.assert_array_equal(read_labels(there, shape=labels.shape), empty)


@pytest.mark.parametrize("kind", ["tif", "ome-tiff", "ome-zarr"])
def test_pixel_size_is_kept(kind: str, tmp_path: Path, image: Path) -> None:
    if kind == "ome-zarr":
        pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    from dinocell.io import describe_image

    write_labels(tmp_path / "a.tif", scene(), pixel_size_um=0.5)
    for given, expected in ((None, 0.5), (image, 0.25)):
        there = tmp_path / f"b{EXPORT_FORMATS[kind].suffix}"
        convert_labels(tmp_path / "a.tif", there, image=given, overwrite=True)
        assert describe_image(there).series[0].edge_um == pytest.approx(expected)


def test_labels_are_added_to_an_image_in_zarr(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    from dinocell.io.pyramids import write_ome_zarr

    write_labels(tmp_path / "a.tif", scene())
    write_labels(tmp_path / "b.tif", np.zeros_like(scene()))
    image = tmp_path / "image.zarr"
    write_ome_zarr(image, np.zeros_like(scene()), image=scene().astype(np.float32))
    with pytest.raises(UsageError, match=r"image\.zarr' exists: choose another name"):
        convert_labels(tmp_path / "a.tif", image)
    with pytest.raises(ImageFileError, match="has labels named 'cells': set `overwrite`"):
        convert_labels(tmp_path / "a.tif", image, add=True)
    convert_labels(tmp_path / "a.tif", image, add=True, overwrite=True)
    np.testing.assert_array_equal(read_labels(image), scene())
    np.testing.assert_array_equal(zarr.open_array(str(image / "0"), mode="r")[0], scene())
    with pytest.raises(UsageError, match="`add` is for OME-Zarr, got"):
        convert_labels(tmp_path / "a.tif", tmp_path / "c.tif", add=True)


def test_what_qupath_has_edited(tmp_path: Path, image: Path) -> None:
    """Corners between pixels, a divided cell whose parts have one name, a new one, a region, nuclei."""

    def feature(points: list[list[float]], **properties: object) -> dict[str, object]:
        ring = [*points, points[0]]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        return {"type": "Feature", "id": "x", "geometry": geometry, "properties": properties}

    square = [[2.0, 2.0], [9.7, 2.0], [9.7, 9.7], [2.0, 9.7]]
    features = [
        feature([[0, 0], [64, 0], [64, 50], [0, 50]], objectType="annotation"),
        feature(square, objectType="cell", name="7", nucleusGeometry={"type": "Polygon"}),
        feature([[x + 20, y] for x, y in square], objectType="cell", name="7"),
        feature([[x, y + 20] for x, y in square], objectType="detection"),
        feature(
            [[x + 20, y + 20] for x, y in square], objectType="cell", measurements={"label": 2.0}
        ),
    ]
    path = tmp_path / "edited.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    convert_labels(path, tmp_path / "a.tif", image=image)
    labels = read_labels(tmp_path / "a.tif")
    assert [labels[5, 5], labels[5, 25], labels[25, 5], labels[25, 25]] == [7, 8, 9, 2]
    assert np.bincount(labels.ravel())[[2, 7, 8, 9]].tolist() == [64] * 4
    path.write_text(json.dumps(features))  # QuPath's other form: a list
    convert_labels(path, tmp_path / "b.tif", image=image)
    np.testing.assert_array_equal(read_labels(tmp_path / "b.tif"), labels)


def test_simplified_outlines_keep_the_cells(tmp_path: Path, image: Path) -> None:
    """Outlines that another library has smoothed: IoU of 0.98 for cells of 50 px and more."""
    shapely = pytest.importorskip("shapely")
    labels = scene()
    features = []
    for label, pieces in labels_to_polygons(labels).items():
        parts = [shapely.Polygon(r[0][:, ::-1], [h[:, ::-1] for h in r[1:]]) for r in pieces]
        shape = shapely.MultiPolygon(parts).simplify(0.4)
        geometry = json.loads(shapely.to_geojson(shape))
        properties = {"objectType": "cell", "name": str(label)}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    convert_labels(path, tmp_path / "a.tif", image=image)
    found = read_labels(tmp_path / "a.tif")
    for label in np.unique(labels[labels > 0]):
        both = np.count_nonzero((found == label) & (labels == label))
        assert both / np.count_nonzero((found == label) | (labels == label)) >= 0.98


def test_coco_polygons(tmp_path: Path) -> None:
    """As annotation tools write them: without holes, ids in any order."""
    labels = scene()
    labels[20:24, 9:13] = 7
    annotations = [
        {
            "id": label,
            "image_id": 4,
            "category_id": 1,
            "iscrowd": 0,
            "segmentation": [outer[:, ::-1].ravel().tolist() for (outer,) in pieces],
        }
        for label, pieces in reversed(labels_to_polygons(labels).items())
    ]
    image = {"id": 4, "file_name": "a.tif", "height": 50, "width": 64}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": [image], "annotations": annotations}))
    convert_labels(path, tmp_path / "a.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), labels)
    path.write_text(json.dumps({"images": [image, image | {"id": 5}], "annotations": []}))
    with pytest.raises(DataSetError, match="must be a COCO file of one image, got 2"):
        convert_labels(path, tmp_path / "b.tif")
    for height, message in (
        (-3, "must state height and width"),
        (0, "must state height and width"),
        (10**9, "may have up to 2,000,000,000 pixels"),
    ):
        path.write_text(json.dumps({"images": [image | {"height": height}], "annotations": []}))
        with pytest.raises(DINOCellError, match=message):
            convert_labels(path, tmp_path / "b.tif")


def test_a_folder_that_holds_the_source_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "RES"
    write_film(folder)
    with pytest.raises(UsageError, match="must not hold the source"):
        convert_labels(folder / "mask001.tif", folder, format="ctc", overwrite=True)
    assert (folder / "mask000.tif").exists()


def write_film(folder: Path) -> None:
    folder.mkdir()
    for frame in range(2):
        write_labels(folder / f"mask00{frame}.tif", scene())
    (folder / "res_track.txt").write_text("1 0 1 0\n")


def test_one_frame_of_a_film(tmp_path: Path) -> None:
    film = tmp_path / "01_RES"
    film.mkdir()
    for number in range(2):
        write_labels(film / f"mask00{number}.tif", scene() * (number + 1))
    with pytest.raises(UsageError, match=r"`page` must be given for a film, .* 2 frames"):
        convert_labels(film, tmp_path / "a.tif")
    with pytest.raises(UsageError, match="`page` must be one of the 2 frames"):
        convert_labels(film, tmp_path / "a.tif", page=2)
    convert_labels(film, tmp_path / "a.tif", page=1)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), scene() * 2)


def test_wrong_calls_and_files_write_nothing(tmp_path: Path, image: Path) -> None:
    source = tmp_path / "a_labels.tif"
    write_labels(source, scene())
    (tmp_path / "text.geojson").write_text("no JSON")
    (tmp_path / "point.geojson").write_text(
        '{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}'
    )
    (tmp_path / "folder").mkdir()
    small = tmp_path / "small.tif"
    write_image(small, np.zeros((5, 6), np.uint8))
    np.save(tmp_path / "a_seg.npy", np.zeros((3, 3)))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for arguments, options, message in (
        ((source, "b.xyz"), {}, "must end in _seg.npy, .*change the ending, or set `format`"),
        ((source, "b.tif"), {"format": "csv"}, "`format` must be one of tif, .* got csv"),
        ((source, "small.tif"), {}, "small.tif' exists: choose another name, or set `overwrite`"),
        ((source, "a_labels.tif"), {"overwrite": True}, "must be another file than the source"),
        ((source, "b.tif"), {"image": small}, "the size of the image, got 50 × 64 px .* 5 × 6"),
        (("absent.tif", "b.tif"), {}, "There is no file"),
        (("folder", "b.tif"), {}, "a folder without label images of the Cell Tracking"),
        (("text.geojson", "b.tif"), {}, "`image` must be given for ROIs and GeoJSON"),
        (("text.geojson", "b.tif"), {"image": image}, "must be GeoJSON with the outlines"),
        (("point.geojson", "b.tif"), {"image": image}, "must be areas, got a Point"),
        (("a_seg.npy", "b.tif"), {}, "must be a `_seg.npy` file of Cellpose with masks"),
        ((source, "folder/b"), {"format": "h5ad"}, "`format` must be one of"),
    ):
        given = [tmp_path / name for name in arguments]
        with pytest.raises(DINOCellError, match=message):
            convert_labels(*given, **options)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_format_that_cannot_hold_the_labels_keeps_the_old_file(tmp_path: Path) -> None:
    write_labels(tmp_path / "a.tif", np.array([[70_000, 0]], np.uint32))
    write_labels(tmp_path / "b.png", np.array([[1, 0]], np.uint32))
    with pytest.raises(ImageFileError, match="PNG holds labels up to 65,535"):
        convert_labels(tmp_path / "a.tif", tmp_path / "b.png", overwrite=True)
    assert read_labels(tmp_path / "b.png").max() == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses such names")
@pytest.mark.parametrize("kind", ["coco", "ome-tiff"])
def test_names_that_are_no_utf8(kind: str, tmp_path: Path, image: Path) -> None:
    named = image.rename(tmp_path / os.fsdecode(b"b\xff.tif"))
    write_labels(tmp_path / "labels.png", scene())
    target = tmp_path / "there"
    convert_labels(tmp_path / "labels.png", target, format=kind, image=named)
    assert b"b\\" in target.read_bytes()


def test_the_image_of_outlines_may_be_turned(tmp_path: Path) -> None:
    """The outlines are those of the picture upright, as `segment` sees it."""
    labels = scene()
    turned = tmp_path / "turned.tif"
    stored = np.zeros(labels.shape[::-1], np.uint8)
    tifffile.imwrite(turned, stored, extratags=[(274, "H", 1, 6, True)])
    write_labels(tmp_path / "a.tif", labels)
    for name in ("a.geojson", "b.tif"):
        convert_labels(tmp_path / "a.tif", tmp_path / name, image=turned)
    convert_labels(tmp_path / "a.geojson", tmp_path / "c.tif", image=turned)
    assert np.array_equal(read_labels(tmp_path / "c.tif"), labels)
