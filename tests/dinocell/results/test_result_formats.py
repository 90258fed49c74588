"""Every format of results, read back by a library that is not ours."""

from __future__ import annotations

import re
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinocell.errors import DINOCellError, ImageFileError, MissingExtraError, UsageError
from dinocell.io import describe_image, read_labels
from dinocell.io.pyramids import add_labels_to_ome_zarr, write_ome_zarr
from dinocell.results.columns import unit_of
from dinocell.results.exports import write_coco_rle, write_geojson
from dinocell.results.formats import EXPORT_FORMATS, Cells, require_packages
from dinocell.results.measure import measure_labels


def cells(*, empty: bool = False, side_px: int = 60, step: int = 1) -> Cells:
    """Nine cells, one with a hole and one in two pieces, in an image of two channels."""
    labels = np.zeros((side_px, side_px + 7), np.uint32)
    if not empty:
        for number in range(9):
            row, col = 20 * (number // 3), 20 * (number % 3)
            labels[row + 2 : row + 15, col + 3 : col + 16] = (number + 1) * step
        labels[6:9, 7:9] = 0
        labels[40:60, 50] = 0
    rng = np.random.default_rng(0)
    image = rng.integers(0, 4000, (*labels.shape, 2)).astype(np.uint16)
    names = ("DNA", "ER")
    table = measure_labels(labels, image, pixel_size_um=0.5, channel_names=names)
    return Cells(labels, table, 0.5, "field", "field.tif", image, names)


def write(kind: str, folder: Path, given: Cells) -> Path:
    needs = EXPORT_FORMATS[kind].needs
    if needs:
        pytest.importorskip(needs[0], reason=f"{needs[0]} is not installed: extra [{needs[2]}]")
    path = folder / f"field{EXPORT_FORMATS[kind].suffix}"
    EXPORT_FORMATS[kind].write(path, given)
    return path


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def test_the_formats_and_their_endings() -> None:
    assert len({exporter.suffix for exporter in EXPORT_FORMATS.values()}) == len(EXPORT_FORMATS)
    assert list(EXPORT_FORMATS) == [
        *("tif", "png", "ome-tiff", "ome-zarr", "geojson", "roi", "coco", "cellpose", "ctc"),
        *("parquet", "h5ad"),
    ]


@pytest.mark.parametrize("kind", list(EXPORT_FORMATS))
@pytest.mark.parametrize("empty", [True, False])
def test_every_format_writes_and_repeats(kind: str, empty: bool, tmp_path: Path) -> None:
    """Also without cells, and without anything but labels."""
    given = cells(empty=empty)
    path = write(kind, tmp_path, given)
    first = contents(path)
    write(kind, tmp_path, given)
    assert contents(path) == first
    write(kind, tmp_path, Cells(given.labels))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if kind in ("tif", "png", "ome-tiff", "cellpose"):
        np.testing.assert_array_equal(read_labels(path), given.labels)


@pytest.mark.parametrize("kind", ["tif", "ome-tiff", "cellpose", "ome-zarr"])
def test_more_cells_than_16_bits_hold(kind: str, tmp_path: Path) -> None:
    labels = np.arange(1, 260 * 260 + 1, dtype=np.uint32).reshape(260, 260)
    path = write(kind, tmp_path, Cells(labels))
    if kind == "ome-zarr":
        path = path / "labels" / "cells"
    np.testing.assert_array_equal(read_labels(path), labels)


def test_formats_of_16_bits_refuse_more(tmp_path: Path) -> None:
    labels = np.array([[70_000, 0]], np.uint32)
    for kind in ("png", "ctc"):
        with pytest.raises(ImageFileError, match=r"up to 65,535, .* 70,000: write"):
            write(kind, tmp_path, Cells(labels))
    assert list(tmp_path.iterdir()) == []


def test_ome_tiff_is_a_pyramid_with_pixel_size_and_name(tmp_path: Path) -> None:
    import tifffile

    labels = np.kron(np.arange(1, 10).reshape(3, 3), np.ones((433, 401))).astype(np.uint32)
    path = write("ome-tiff", tmp_path, Cells(labels, pixel_size_um=0.25, name="plate 1"))
    with tifffile.TiffFile(path) as tif:
        levels = tif.series[0].levels
        assert [level.shape for level in levels] == [(1299, 1203), (650, 602), (325, 301)]
        np.testing.assert_array_equal(levels[0].asarray(), labels)
        np.testing.assert_array_equal(levels[2].asarray(), labels[::4, ::4])
        assert tif.series[0].name == "plate 1"
        assert levels[0].dtype == np.uint16
        assert tif.pages[0].is_tiled
        pixels = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]["Pixels"]
    assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeXUnit"]) == (0.25, "µm")
    assert pixels["Channel"]["Name"] == "labels"


def test_ome_zarr_is_what_its_specification_asks_for(tmp_path: Path) -> None:
    """Its metadata pass the models of ome-zarr-models; its arrays are read by zarr."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    images = pytest.importorskip("ome_zarr_models.v04.image")
    labels = pytest.importorskip("ome_zarr_models.v04.image_label")
    given = cells(side_px=1500)
    group = zarr.open_group(str(write("ome-zarr", tmp_path, given)), mode="r")
    image = images.ImageAttrs.model_validate(dict(group.attrs))
    found = labels.ImageLabelAttrs.model_validate(dict(group["labels/cells"].attrs))
    assert [group[name].shape for name in ("0", "1")] == [(2, 1500, 1507), (2, 750, 754)]
    np.testing.assert_array_equal(np.moveaxis(group["0"][:], 0, -1), given.image)
    assert abs(float(group["1"][0, 0, 0]) - given.image[:2, :2, 0].mean()) <= 0.5
    np.testing.assert_array_equal(group["labels/cells/0"][:], given.labels)
    np.testing.assert_array_equal(group["labels/cells/1"][:], given.labels[::2, ::2])
    assert [channel.label for channel in image.omero.channels] == ["DNA", "ER"]
    (pyramid,) = found.multiscales
    scales = [level.coordinateTransformations[0].scale for level in pyramid.datasets]
    assert scales == [[0.5, 0.5], [1.0, 1.0]]
    assert [axis.unit for axis in pyramid.axes] == ["micrometer"] * 2


def foreign_image(zarr: Any, path: Path, version: int, **axis: str) -> None:
    """An image of 2 × 2 pixels by another program, 0.5 units of `axis` apart."""
    scale = [{"type": "scale", "scale": [0.5, 0.5]}]
    image = {
        "version": f"0.{version + 2}",
        "axes": [{"name": name, "type": "space", **axis} for name in "yx"],
        "datasets": [{"path": "0", "coordinateTransformations": scale}],
    }
    ome = {"multiscales": [image]}
    attributes = ome if version == 2 else {"ome": ome | {"version": "0.5"}}
    attributes = {"of the user": 1, **attributes}
    group = zarr.create_group(str(path), zarr_format=version, attributes=attributes)
    group.create_array("0", data=np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize("version", [2, 3])
def test_labels_go_into_a_zarr_that_exists(version: int, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    path = tmp_path / "source.zarr"
    with pytest.raises(ImageFileError, match="must be one OME-Zarr image"):
        add_labels_to_ome_zarr(path, np.ones((2, 2), np.uint8))
    foreign_image(zarr, path, version)
    before = contents(path)
    add_labels_to_ome_zarr(path, np.ones((2, 2), np.uint8), name="b")
    group = zarr.open_group(str(path / "labels"), mode="r+", zarr_format=version)
    group.attrs["theirs"] = 5
    add_labels_to_ome_zarr(path, np.eye(2, dtype=np.uint8), pixel_size_um=2.0, name="a")
    assert before.items() <= contents(path).items()
    group = zarr.open_group(str(path), mode="r")
    attributes = dict(group["labels"].attrs)
    assert attributes["theirs"] == 5
    assert attributes.get("ome", attributes)["labels"] == ["a", "b"]
    np.testing.assert_array_equal(group["labels/a/0"][:], np.eye(2))
    np.testing.assert_array_equal(read_labels(path / "labels" / "a"), np.eye(2))
    assert describe_image(path / "labels" / "a").series[0].edge_um == 2.0
    with pytest.raises(ImageFileError, match="has labels named 'a': set `overwrite`"):
        add_labels_to_ome_zarr(path, np.zeros((2, 2), np.uint8), name="a")
    models = pytest.importorskip(f"ome_zarr_models.v0{version + 2}.image_label")
    attributes = dict(group["labels/a"].attrs)
    models.ImageLabelAttrs.model_validate(attributes.get("ome", attributes))
    add_labels_to_ome_zarr(path, np.zeros((2, 2), np.uint8), name="a", overwrite=True)
    assert not read_labels(path / "labels" / "a").any()


@pytest.mark.parametrize("version", [2, 3])
def test_added_labels_are_in_consolidated_metadata(version: int, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    collection, image = tmp_path / "collection.zarr", tmp_path / "collection.zarr" / "0"
    zarr.create_group(str(collection), zarr_format=version)
    foreign_image(zarr, image, version)
    before = contents(collection)
    add_labels_to_ome_zarr(image, np.eye(2, dtype=np.uint8), name="a")
    assert before.items() <= contents(collection).items(), "there were none, and none are made"
    for group in (image / "labels", image, collection):
        with warnings.catch_warnings(action="ignore"):
            zarr.consolidate_metadata(str(group), zarr_format=version)
    add_labels_to_ome_zarr(image, np.eye(2, dtype=np.uint8), name="b")
    for group in (image / "labels", image, collection):
        found = zarr.open_group(str(group), mode="r")  # with them, where there are any
        names = [name for name, _ in found.members(max_depth=None)]
        assert any(name.endswith("b/0") for name in names), names
        inner = {collection: "0/labels", image: "labels"}.get(group)
        attributes = dict((found[inner] if inner else found).attrs)
        assert attributes.get("ome", attributes)["labels"] == ["a", "b"]


def test_labels_lie_on_the_image_they_are_added_to(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    path = tmp_path / "source.zarr"
    foreign_image(zarr, path, 2, unit="micrometer")
    for size_um in (None, 2.0):
        add_labels_to_ome_zarr(
            path, np.eye(2, dtype=np.uint8), pixel_size_um=size_um, overwrite=True
        )
        assert describe_image(path / "labels" / "cells").series[0].edge_um == 0.5
    before = contents(path)
    with pytest.raises(ImageFileError, match=r"size of their image, got \(3, 3\) for \(2, 2\) px"):
        add_labels_to_ome_zarr(path, np.eye(3, dtype=np.uint8), overwrite=True)
    plate = {"plate": {"wells": [{"path": "A/1"}]}}
    zarr.create_group(str(tmp_path / "plate.zarr"), zarr_format=2, attributes=plate)
    with pytest.raises(ImageFileError, match="must be one OME-Zarr image"):
        add_labels_to_ome_zarr(tmp_path / "plate.zarr", np.eye(2, dtype=np.uint8))
    assert contents(path) == before


def test_folders_of_others_are_not_replaced(tmp_path: Path) -> None:
    given = cells()
    for kind in ("ctc", "ome-zarr"):
        folder = tmp_path / f"field{EXPORT_FORMATS[kind].suffix}"
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work")
        with pytest.raises(
            DINOCellError, match="no such result of DINOCell, so it is not replaced"
        ):
            write(kind, tmp_path, given)
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("ctc", tmp_path, cells())
    before = contents(path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(DINOCellError, match=r"_RES' cannot be written \(No space left"):
        write("ctc", tmp_path, cells(empty=True))
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_challenge_folder_is_a_result_of_one_frame(tmp_path: Path) -> None:
    import tifffile

    given = cells(step=7)
    path = write("ctc", tmp_path, given)
    assert sorted(file.name for file in path.iterdir()) == ["mask000.tif", "res_track.txt"]
    frame = tifffile.imread(path / "mask000.tif")
    assert frame.dtype == np.uint16
    np.testing.assert_array_equal(frame, given.labels)
    tracks = np.loadtxt(path / "res_track.txt", dtype=int)
    np.testing.assert_array_equal(tracks, [[7 * k, 0, 0, 0] for k in range(1, 10)])


def test_seg_npy_has_what_cellpose_reads(tmp_path: Path) -> None:
    """The keys that its window (`gui.io._load_seg`) and its training (`io`) take."""
    given = cells()
    project = np.load(write("cellpose", tmp_path, given), allow_pickle=True).item()
    np.testing.assert_array_equal(project["masks"], given.labels)
    assert project["masks"].dtype == project["outlines"].dtype == np.uint16
    borders = project["outlines"] > 0
    np.testing.assert_array_equal(project["outlines"][borders], given.labels[borders])
    assert borders[2, 3]
    assert not borders[3, 4]
    assert len(project["ismanual"]) == given.labels.max()
    assert project["filename"] == "field.tif"
    assert project["chan_choose"] == [0, 0]
    assert project["flows"] == []
    np.testing.assert_array_equal(project["img"], given.image)


def test_geojson_is_valid_for_shapely(tmp_path: Path) -> None:
    shapely = pytest.importorskip("shapely")
    given = cells()
    shapes = shapely.from_geojson(write("geojson", tmp_path, given).read_text(encoding="utf-8"))
    assert shapely.is_valid(shapes).all()
    areas = [shape.area for shape in shapes.geoms]
    assert areas == np.bincount(given.labels.ravel())[1:].tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools
def test_coco_opens_in_pycocotools(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    given = cells()
    found = coco.COCO(str(write("coco", tmp_path, given)))
    assert [image["file_name"] for image in found.loadImgs(found.getImgIds())] == ["field.tif"]
    labels = np.zeros_like(given.labels)
    for annotation in found.loadAnns(found.getAnnIds()):
        labels[found.annToMask(annotation) > 0] = annotation["id"]
    np.testing.assert_array_equal(labels, given.labels)


@pytest.mark.parametrize("empty", [True, False])
def test_parquet_has_the_same_types_everywhere(empty: bool, tmp_path: Path) -> None:
    pandas, polars, duckdb = map(pytest.importorskip, ("pandas", "polars", "duckdb"))
    given = cells(empty=empty)
    table = given.table
    assert table is not None
    path = write("parquet", tmp_path, given)
    kinds = {"b": ("bool", "Boolean", "BOOLEAN"), "i": ("int64", "Int64", "BIGINT")}
    expected = {
        name: kinds.get(column.dtype.kind, ("float64", "Float64", "DOUBLE"))
        for name, column in table.data.items()
    }
    frame = pandas.read_parquet(path)
    assert {name: str(kind) for name, kind in frame.dtypes.items()} == {
        name: kind[0] for name, kind in expected.items()
    }
    in_polars = polars.read_parquet(path)
    assert {name: str(kind) for name, kind in in_polars.schema.items()} == {
        name: kind[1] for name, kind in expected.items()
    }
    described = duckdb.sql(f"describe select * from '{path}'").fetchall()
    assert {row[0]: row[1] for row in described} == {
        name: kind[2] for name, kind in expected.items()
    }
    for name, column in table.data.items():
        np.testing.assert_array_equal(frame[name].to_numpy(), column)
        assert in_polars[name].to_list() == table.to_dict()[name]  # a missing value is null


def test_parquet_states_units_and_pixel_size(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    schema = parquet.read_schema(write("parquet", tmp_path, cells()))
    assert schema.metadata == {b"image": b"field", b"pixel_size_um": b"0.5"}
    units = {field.name: (field.metadata or {}).get(b"unit", b"").decode() for field in schema}
    assert units["area"] == "px²"
    assert units["area_um2"] == "µm²"
    assert units["centroid_row_um"] == "µm"
    assert units["orientation"] == "rad"
    assert units["intensity_mean_ER"] == "gray value"
    assert units["solidity"] == ""
    assert units == {name: unit_of(name) for name in units}


@pytest.mark.parametrize("empty", [True, False])
def test_anndata_opens_with_places_and_units(empty: bool, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    given = cells(empty=empty)
    table = given.table
    assert table is not None
    found = anndata.read_h5ad(write("h5ad", tmp_path, given))
    assert found.obs_names.tolist() == [str(label) for label in table["label"]]
    np.testing.assert_array_equal(found.obs["label"], table["label"])
    np.testing.assert_array_equal(found.obs["touches_border"], table["touches_border"])
    assert {*found.obs.columns, *found.var_names} == set(table.columns)
    for name in found.var_names:
        np.testing.assert_array_equal(found.X[:, found.var_names.get_loc(name)], table[name])
    places = [table["centroid_col_um"], table["centroid_row_um"]]
    np.testing.assert_array_equal(found.obsm["spatial"].T, places)
    assert (found.uns["spatial_unit"], found.uns["pixel_size_um"]) == ("µm", 0.5)
    assert found.var.loc["area_um2", "unit"] == "µm²"


@pytest.mark.parametrize("most_bytes", [0, 4096, 8192, 16384])
def test_anndata_on_a_full_disk_is_one_sentence(
    most_bytes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """h5py would print an error for each open part of the file, before and after ours."""
    pytest.importorskip("anndata", reason="anndata is not installed: extra [tables]")
    resource = pytest.importorskip("resource", reason="limits of files are those of Unix")
    write("h5ad", tmp_path, cells())
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, limits[1]))  # stands for the disk
    try:
        with pytest.raises(DINOCellError) as caught:
            write("h5ad", tmp_path, cells())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = r"cannot be written \(File too large\): choose another folder or free some space"
    assert re.search(reason, str(caught.value))
    assert capfd.readouterr() == ("", "")
    assert contents(tmp_path) == before


def test_anndata_holds_what_its_own_writer_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parts with the same attributes, and none of a type that earlier readers do not know."""
    anndata = pytest.importorskip("anndata", reason="anndata is not installed: extra [tables]")
    import h5py

    def parts(path: Path) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        with h5py.File(path) as file:

            def note(name: str, item: Any) -> None:
                values = "" if isinstance(item, h5py.Group) else repr(item[()])
                found.append((name, values, repr(sorted(dict(item.attrs).items()))))

            note("/", file)
            file.visititems(note)
        return found

    real, theirs = anndata.io.write_elem, tmp_path / "theirs.h5ad"

    def written_twice(file: Any, name: str, content: Any) -> None:
        content.write_h5ad(theirs)
        real(file, name, content)

    monkeypatch.setattr(anndata.io, "write_elem", written_twice)
    assert parts(write("h5ad", tmp_path, cells())) == parts(theirs)


PLACE = {"plate": "P7", "well": "A01", "site": 2, "channel": "DNA", "z": 0, "time": 1}


@pytest.mark.parametrize("empty", [True, False])
def test_tables_begin_with_the_place_of_the_image(empty: bool, tmp_path: Path) -> None:
    """Texts and whole numbers, the same columns in CSV, Parquet and AnnData."""
    parquet = pytest.importorskip("pyarrow.parquet")
    anndata = pytest.importorskip("anndata")
    given = cells(empty=empty)
    assert given.table is not None
    table = replace(given.table, place=PLACE)
    placed = given._replace(table=table)
    table.to_csv(tmp_path / "a.csv")
    columns = [*PLACE, *table.columns]
    assert (tmp_path / "a.csv").read_text(encoding="utf-8").split("\n")[0].split(",") == columns
    read = parquet.read_table(write("parquet", tmp_path, placed))
    assert read.column_names == columns
    assert [str(read.schema.field(name).type) for name in PLACE] == [
        *("string", "string", "int64", "string", "int64", "int64")
    ]
    assert read.select(list(PLACE)).to_pylist() == [PLACE] * len(table)
    path = write("h5ad", tmp_path, placed)
    obs, before = anndata.read_h5ad(path).obs, contents(path)
    assert list(obs.columns[: len(PLACE)]) == list(PLACE)
    assert obs[list(PLACE)].to_dict("records") == [PLACE] * len(table)
    assert list(obs["well"].cat.categories) == ["A01"]
    assert contents(write("h5ad", tmp_path, placed)) == before


def test_missing_packages_are_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "anndata", None)
    require_packages(["tif", "geojson"])
    with pytest.raises(MissingExtraError, match=r"anndata, .* pip install '\.\[tables\]'"):
        require_packages(["tif", "h5ad"])


def test_rois_and_outlines_take_labels_alone(tmp_path: Path) -> None:
    given = cells()
    write_geojson(tmp_path / "a.geojson", given.labels)
    write_coco_rle(tmp_path / "a.json", given.labels)
    with zipfile.ZipFile(write("roi", tmp_path, given)) as archive:
        assert len(archive.namelist()) == 9


def test_ome_zarr_without_an_image_shows_the_labels(tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    labels = cells().labels
    write_ome_zarr(tmp_path / "a.zarr", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.zarr" / "labels" / "cells"), labels)


def test_an_image_without_cells_in_every_format(tmp_path: Path) -> None:
    for needs in filter(None, (exporter.needs for exporter in EXPORT_FORMATS.values())):
        pytest.importorskip(needs[0], reason=f"extra [{needs[2]}] is not installed")
    from typer.testing import CliRunner

    from dinocell.cli.app import app
    from dinocell.io import write_image

    write_image(tmp_path / "blank.tif", np.full((40, 50), 7, np.uint8), pixel_size_um=0.5)
    formats = [word for kind in EXPORT_FORMATS for word in ("-f", kind)]
    arguments = ["segment", str(tmp_path / "blank.tif"), "-o", str(tmp_path / "out"), *formats]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"blank{exporter.suffix}" for exporter in EXPORT_FORMATS.values()} <= written
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UsageError)  # results are not replaced unasked
