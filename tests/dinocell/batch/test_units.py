"""Planes of a file as images of their own, and folders that hold images of one name."""

import builtins
import csv
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import tifffile

from dinocell.batch.merge import merge_shards
from dinocell.batch.options import SegmentOptions
from dinocell.batch.parts import plan_shards, run_shard
from dinocell.batch.run import segment_files
from dinocell.batch.units import Unit, named_as_before, units_of
from dinocell.cli import main
from dinocell.errors import UsageError
from dinocell.io import read_image, read_labels, write_image
from dinocell.network.model import save_model
from dinocell.pipeline import segment


@pytest.fixture
def stack(tmp_path):
    """ImageJ hyperstack: 2 times, 3 planes along z."""
    pixels = np.random.default_rng(0).integers(0, 4000, (2, 3, 1, 40, 48)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "stack.tif", pixels, imagej=True, metadata={"axes": "TZCYX"})
    return tmp_path / "stack.tif"


@pytest.fixture
def model_path(mini_model, tmp_path):
    save_model(tmp_path / "model.safetensors", mini_model)
    return tmp_path / "model.safetensors"


def options(**given) -> SegmentOptions:
    return SegmentOptions(**{"device": "cpu", "overlay": False, **given})


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_names_and_places(stack):
    units = units_of([stack], options(z="each", time="each"))
    assert [unit.name for unit in units][:4] == [
        *("stack_t000_z000", "stack_t000_z001", "stack_t000_z002", "stack_t001_z000"),
    ]
    assert units[3].place == {"time": 1, "z": 0} == units[3].choice
    assert units[3].options(options(z="each")).z == 0
    assert [unit.name for unit in units_of([stack], options(z="each", time=1))] == [
        *("stack_z000", "stack_z001", "stack_z002"),
    ]
    (whole,) = units_of([stack], options(z=1, time=0))
    assert whole == Unit(stack, "stack")
    assert units_of(units, options()) == units
    assert Unit.of_text(stack, units[3].to_text()) == units[3]
    assert Unit.of_text(stack, None) == whole


def test_planes_without_a_meaning_are_what_they_are_taken_for(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((11, 30, 30), np.uint8))
    names = [unit.name for unit in units_of([tmp_path / "a.npy"], options(time="each"))]
    assert names[-1] == "a_t010"
    write_image(tmp_path / "flat.tif", np.zeros((30, 30), np.uint8))
    (flat,) = units_of([tmp_path / "flat.tif"], options(z="each"))
    assert (flat.name, flat.place) == ("flat", {"z": 0})


def test_scenes_of_different_shapes(tmp_path, mini_model):
    path, rng = tmp_path / "scenes.ome.tif", np.random.default_rng(0)
    with tifffile.TiffWriter(path, ome=True) as file:
        for shape in ((40, 48), (64, 32)):
            file.write(rng.integers(0, 255, shape).astype(np.uint8), metadata={"axes": "YX"})
    out = tmp_path / "out"
    result = segment_files([path], out, options(scene="each"), model=mini_model, shown=False)
    assert [row["scene"] for row in result.rows] == [0, 1]
    assert read_labels(out / "scenes.ome_s001_labels.tif").shape == (64, 32)


def test_every_plane_has_results_and_columns(stack, tmp_path, model_path, mini_model):
    out = tmp_path / "out"
    how = ["-m", model_path, "--device", "cpu", "--no-overlay", "--z", "each", "--time", "1"]
    assert exit_code("segment", stack, "-o", out, *how) == 0
    expected = segment(stack, model=mini_model, z=2, time=1)
    np.testing.assert_array_equal(read_labels(out / "stack_z002_labels.tif"), expected.labels)
    rows = rows_of(out / "summary.csv")
    assert [(row["name"], row["z"]) for row in rows] == [
        (f"stack_z00{z}", str(z)) for z in range(3)
    ]
    assert expected.num_cells
    assert {row["z"] for row in rows_of(out / "stack_z002_cells.csv")} == {"2"}
    (out / "stack_z001_labels.tif").unlink()
    before = (out / "stack_z002_labels.tif").stat().st_mtime_ns
    assert exit_code("segment", stack, "-o", out, *how, "--resume") == 0
    assert (out / "stack_z001_labels.tif").exists()
    assert (out / "stack_z002_labels.tif").stat().st_mtime_ns == before


def test_parts_divide_the_planes(stack, tmp_path, model_path, mini_model):
    given = options(z="each", time="each", model=str(model_path))
    alone = tmp_path / "alone"
    segment_files([stack], alone, given, shown=False)
    out = tmp_path / "out"
    plan = plan_shards([stack], out, given, 4)
    assert (plan.count, plan.images) == (4, 6)
    for index in range(4):
        run_shard(out, index, shown=False)
    assert merge_shards(out, shown=False).images == 6
    assert (out / "summary.csv").read_text() == (alone / "summary.csv").read_text()
    assert {row["time"] for row in rows_of(out / "cells.csv")} <= {"0", "1"}
    for path in alone.glob("*_labels.tif"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_a_file_that_cannot_be_listed_fails_alone(stack, tmp_path, mini_model):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0no image")
    result = segment_files(
        [broken, stack], tmp_path / "out", options(z="each"), model=mini_model, shown=False
    )
    sentences = dict(result.failures)
    assert "damaged or cut short" in sentences[broken]
    assert "choose with `time`" in sentences[stack]
    stacks = [broken, stack]
    result = segment_files(
        stacks, tmp_path / "out", options(z="each", time=0), model=mini_model, shown=False
    )
    assert len(result.rows) == 3
    (failed,) = [row for row in rows_of(tmp_path / "out" / "summary.csv") if row["error"]]
    assert failed["name"] == "broken"


def test_a_failed_plane_is_named(tmp_path, mini_model):
    planes = np.random.default_rng(0).normal(size=(3, 30, 30)).astype(np.float32)
    planes[1, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", planes)
    result = segment_files(
        [tmp_path / "a.npy"], tmp_path / "out", options(z="each"), model=mini_model, shown=False
    )
    ((_, sentence),) = result.failures
    assert sentence.startswith("z 1: Pixels of ")
    assert len(result.rows) == 2


def test_results_mirror_folders_where_names_repeat(tmp_path, mini_model):
    rng, paths = np.random.default_rng(0), []
    for folder in ("in/p1", "in/p2/x"):
        paths += [tmp_path / folder / "a.tif", tmp_path / folder / f"{folder[-1]}.tif"]
        for path in paths[-2:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, rng.integers(0, 255, (32, 40)).astype(np.uint8))
    assert [unit.name for unit in units_of(paths[1::2], options())] == ["1", "x"]
    out = tmp_path / "out"
    result = segment_files(paths, out, options(report=True), model=mini_model, shown=False)
    assert [row["name"] for row in result.rows] == ["p1/a", "p1/1", "p2/x/a", "p2/x/x"]
    assert (out / "p2" / "x" / "a_labels.tif").exists()
    assert "p2/x/a_labels.tif" in (out / "report.html").read_text()
    os.utime(paths[0], (1, 1))
    again = segment_files(paths, out, options(resume=True), model=mini_model, shown=False)
    assert again.skipped == 4
    write_image(tmp_path / "in" / "p1" / "a.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(UsageError, match="must differ in name without suffix"):
        units_of([*paths, tmp_path / "in" / "p1" / "a.png"], options())


@pytest.fixture
def namesakes(tmp_path):
    """One file in each of three folders, all of one name."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / "in" / folder / "a.tif" for folder in "xyz"]
    for path in paths:
        path.parent.mkdir(parents=True)
        write_image(path, rng.integers(0, 255, (32, 40)).astype(np.uint8))
    return paths


def test_an_image_keeps_its_name_when_others_join(namesakes, tmp_path, mini_model):
    """Alone it is `a`, beside y/a.tif it would be `x/a`."""
    x, y, z = namesakes

    def names(*paths, **given):
        result = segment_files(
            paths, tmp_path / "out", options(**given), model=mini_model, shown=False
        )
        rows = rows_of(tmp_path / "out" / "summary.csv")
        return result.skipped, [row["name"] for row in rows]

    assert names(x) == (0, ["a"])
    with pytest.raises(UsageError, match="must not hold results of these images, got 1"):
        names(x, y)
    assert names(x, y, resume=True) == (1, ["a", "y/a"])
    assert names(z, y, x, resume=True) == (2, ["z/a", "y/a", "a"])
    assert names(y, resume=True) == (1, ["a", "z/a", "y/a"])
    changed = {"overwrite": True, "peak_threshold": 0.3}
    assert names(x, y, z, **changed) == (0, ["a", "y/a", "z/a"])
    assert not (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize("then", ["resume", "overwrite"])
def test_an_image_keeps_its_name_when_its_replacement_was_stopped(
    namesakes, tmp_path, mini_model, monkeypatch, then
):
    """`overwrite` takes it from the journal before it is segmented again."""
    x, y, _ = namesakes
    out = tmp_path / "out"
    segment_files([x], out, options(), model=mini_model, shown=False)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dinocell.batch.run._Batch._predict", stopped)
        with pytest.raises(KeyboardInterrupt):
            segment_files([x, y], out, options(overwrite=True), model=mini_model, shown=False)
    assert (out / "images.jsonl").read_text() == ""
    segment_files([x, y], out, options(**{then: True}), model=mini_model, shown=False)
    assert [row["name"] for row in rows_of(out / "summary.csv")] == ["a", "y/a"]
    assert not (out / "x").exists()


def test_a_name_in_the_summary_that_another_image_has_taken_is_free(namesakes, tmp_path):
    x, y, _ = (path.resolve() for path in namesakes)
    (tmp_path / "summary.csv").write_text(f"name,source,error\na,{x},\nz/a,{y},unreadable\n")
    assert [unit.name for unit in named_as_before(units_of([x, y], options()), tmp_path)] == [
        "a",
        "y/a",
    ]
    (tmp_path / "images.jsonl").write_text(json.dumps({"name": "a", "source": str(y)}) + "\n")
    assert [unit.name for unit in named_as_before(units_of([x, y], options()), tmp_path)] == [
        "x/a",
        "a",
    ]
    (tmp_path / "images.jsonl").write_text(json.dumps({"name": "x/a", "source": str(x)}) + "\n")
    (unit,) = named_as_before(units_of([x], options()), tmp_path)
    assert unit.name == "x/a", "the journal is newer"


def test_parts_keep_the_names_of_a_folder(namesakes, tmp_path, model_path):
    out, given = tmp_path / "out", {"model": str(model_path)}
    segment_files(namesakes[:1], out, options(**given), shown=False)
    with pytest.raises(UsageError, match="must not hold results of these images, got 1"):
        plan_shards(namesakes, out, options(**given), 2)
    plan = plan_shards(namesakes, out, options(overwrite=True, **given), 2)
    for index in range(plan.count):
        run_shard(out, index, shown=False)
    merge_shards(out, shown=False)
    assert [row["name"] for row in rows_of(out / "summary.csv")] == ["a", "y/a", "z/a"]


def test_an_earlier_name_must_not_be_that_of_another_image(namesakes, tmp_path, mini_model):
    x, y, _ = namesakes
    inner = x.parent / "x" / "a.tif"
    inner.parent.mkdir()
    inner.write_bytes(y.read_bytes())
    segment_files([x, y], tmp_path / "out", options(), model=mini_model, shown=False)
    with pytest.raises(UsageError, match=r"must differ in name .* into two folders"):
        segment_files(
            [x, inner], tmp_path / "out", options(resume=True), model=mini_model, shown=False
        )


def test_wrong_words_are_refused(stack, capsys):
    for given, sentence in (
        (["--z", "every"], "--z must be max, mean or a number"),
        (["--time", "all"], "--time must be a number from 0"),
        (["--z", "each", "--page", "1"], "--page must come without"),
    ):
        assert exit_code("segment", stack, "-o", "out", *given) == 2
        assert sentence in capsys.readouterr().err


@pytest.fixture
def plate(tmp_path):
    """Two wells of two sites, one of which is missing, and two channels."""
    rng, folder = np.random.default_rng(0), tmp_path / "P7" / "Images"
    folder.mkdir(parents=True)
    for well, site in (("r01c01", 1), ("r01c01", 2), ("r02c03", 1)):
        for channel in (1, 2):
            image = rng.integers(0, 4000, (40, 48)).astype(np.uint16)
            write_image(folder / f"{well}f0{site}p01-ch{channel}sk1fk1fl1.tiff", image)
    return folder


def test_one_channel_of_all_sites_of_a_plate(plate, tmp_path, mini_model):
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra tables is not installed")
    paths, out = sorted(plate.iterdir()), tmp_path / "out"
    with pytest.raises(UsageError, match="has a file for each of 1, 2, got none"):
        units_of(paths, options())
    with pytest.raises(UsageError, match="got DNA"):
        units_of(paths, options(channels=("DNA",)))
    assert len(units_of(paths, options(plate="off"))) == 6
    given = options(channels=(2,), report=True, formats=("tif", "parquet"))
    result = segment_files(paths, out, given, model=mini_model, shown=False)
    assert result.notes == ("Plate P7 has holes in 1 of 2 wells: B03 without site 2",)
    assert [(row["well"], row["site"], row["channel"]) for row in result.rows] == [
        *(("A01", 1, "2"), ("A01", 2, "2"), ("B03", 1, "2")),
    ]
    cells = rows_of(out / f"{result.rows[0]['name']}_cells.csv")
    assert cells[0]["plate"] == "P7"
    assert cells[0]["well"] == "A01"
    wells = rows_of(out / "wells.csv")
    counts = [row["num_cells"] for row in result.rows]
    assert [int(row["num_cells"]) for row in wells] == [sum(counts[:2]), counts[2]]
    assert float(wells[1]["intensity_mean"]) == pytest.approx(result.rows[2]["intensity_mean"])
    assert parquet.read_table(out / "wells.parquet")["well"].to_pylist() == ["A01", "B03"]
    table = parquet.read_table(out / f"{result.rows[0]['name']}_cells.parquet")
    assert set(table["well"].to_pylist()) == {"A01"}
    page = (out / "report.html").read_text()
    assert "P7: num_cells" in page
    assert "A01: " in page
    again = segment_files(paths, out, replace(given, resume=True), model=mini_model, shown=False)
    assert again.skipped == 3


def test_parts_of_a_plate(plate, tmp_path, model_path):
    out = tmp_path / "out"
    plan_shards(sorted(plate.iterdir()), out, options(channels=("1",), model=str(model_path)), 2)
    for index in range(2):
        run_shard(out, index, shown=False)
    assert merge_shards(out, shown=False).images == 3
    assert [row["well"] for row in rows_of(out / "wells.csv")] == ["A01", "B03"]
    assert {row["well"] for row in rows_of(out / "cells.csv")} <= {"A01", "B03"}


def test_files_of_a_field_are_one_image(plate, tmp_path, mini_model):
    """Nuclei and cells of a plate with a file for each channel, as of one file with both channels."""
    paths, out = sorted(plate.iterdir()), tmp_path / "out"
    given = options(nuclei="2", cells="1")
    units = units_of(paths, given)
    assert [unit.name for unit in units] == [path.stem for path in paths[1::2]]
    assert [dict(unit.place) for unit in units][2] == {
        "plate": "P7", "well": "B03", "site": 1, "z": 1, "time": 1
    }  # fmt: skip
    assert Unit.of_text(units[0].path, units[0].to_text()) == units[0]
    result = segment_files(paths, out, given, model=mini_model, shown=False)
    assert result.failures == []
    both = np.stack([read_image(path).pixels for path in paths[:2]])
    tifffile.imwrite(
        tmp_path / "both.ome.tif", both, metadata={"axes": "CYX", "Channel": {"Name": ["1", "2"]}}
    )
    expected = segment(tmp_path / "both.ome.tif", model=mini_model, nuclei="2", cells="1")
    assert expected.num_cells
    np.testing.assert_array_equal(read_labels(out / f"{units[0].name}_labels.tif"), expected.labels)
    expected.save(tmp_path / "expected", overlay=False)
    (table,) = (tmp_path / "expected").glob("*_cells.csv")
    own = rows_of(out / f"{units[0].name}_cells.csv")
    assert own[0]["well"] == "A01"
    assert [
        {name: row[name] for name in first} for row, first in zip(own, rows_of(table), strict=True)
    ] == rows_of(table)
    again = segment_files(paths, out, replace(given, resume=True), model=mini_model, shown=False)
    assert again.skipped == 3
    write_image(
        paths[0], read_image(paths[0]).pixels[::-1]
    )  # the other channel than that of the name
    again = segment_files(paths, out, replace(given, resume=True), model=mini_model, shown=False)
    assert again.skipped == 2


def test_several_channels_of_a_plate_are_averaged(plate, tmp_path, mini_model):
    paths = sorted(plate.iterdir())
    for channels, count in ((("1", 2), 3), (("mean",), 3), ((1,), 3)):
        assert len(units_of(paths, options(channels=channels))) == count
    result = segment_files(
        paths, tmp_path / "out", options(channels=("mean",)), model=mini_model, shown=False
    )
    assert {"intensity_mean_1", "intensity_mean_2"} <= result.rows[0].keys()
    with pytest.raises(UsageError, match="must name channels of the image, got 'ER'"):
        units_of(paths, options(nuclei="ER"))


def test_a_field_that_lacks_a_channel_fails_alone(plate, tmp_path, mini_model):
    paths = sorted(plate.iterdir())
    paths[0].unlink()
    result = segment_files(
        paths[1:], tmp_path / "out", options(nuclei="2", cells="1"), model=mini_model, shown=False
    )
    ((path, sentence),) = result.failures
    assert path == paths[1]
    assert sentence == (
        f"A field must have the channels 2, 1, that of '{paths[1]}' lacks 1: copy or export it again"
    )
    assert len(result.rows) == 2
    write_image(paths[2], np.zeros((9, 9), np.uint8))
    again = options(nuclei="2", cells="1", overwrite=True)
    result = segment_files(paths[2:], tmp_path / "out", again, model=mini_model, shown=False)
    ((_, sentence),) = result.failures
    assert "The channels of a field must have one size, got 40 × 48 and 9 × 9 px" in sentence
    copy = tmp_path / "P7b" / paths[2].name
    write_image(copy, np.zeros((9, 9), np.uint8))
    how = options(
        nuclei="1", plate=r"r(?P<row>\d+)c(?P<column>\d+)f(?P<site>\d+)p01-ch(?P<channel>\d)"
    )
    with pytest.raises(UsageError, match="which both are channel 1 of one place"):
        units_of([*paths[2:], copy], how)


def test_parts_of_a_plate_with_nuclei(plate, tmp_path, model_path):
    out, paths = tmp_path / "out", sorted(plate.iterdir())
    given = options(nuclei="2", cells="ring:3px", model=str(model_path))
    plan = plan_shards(paths, out, given, 2)
    used = [path.stat().st_size for path in paths if "-ch2" in path.name]
    assert (plan.images, plan.total_bytes) == (3, sum(used))
    for index in range(2):
        assert run_shard(out, index, shown=False).failures == []
    assert merge_shards(out, shown=False).images == 3
    assert len(list(out.glob("*_nuclei_labels.tif"))) == 3


def test_files_without_permission_fail_alone(tmp_path, mini_model, monkeypatch):
    """An image, and a chunk of a folder in Zarr format; also for root, to whom all is permitted."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    for name in ("a.tif", "b.tif"):
        write_image(
            tmp_path / name, np.random.default_rng(0).integers(0, 255, (32, 40)).astype(np.uint8)
        )
    group = zarr.open_group(str(tmp_path / "c.zarr"), mode="w", zarr_format=2)
    group.create_array("0", shape=(32, 40), chunks=(32, 40), dtype="uint8")[...] = 1
    group.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]
    closed = {str(tmp_path / "b.tif"), str(tmp_path / "c.zarr" / "0" / "0.0")}
    opened = io.open

    def guarded(file, *args, **kwargs):
        if str(file) in closed:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", guarded)
    monkeypatch.setattr(builtins, "open", guarded)
    paths = [tmp_path / name for name in ("a.tif", "b.tif", "c.zarr")]
    result = segment_files(paths, tmp_path / "out", options(), model=mini_model, shown=False)
    assert [row["name"] for row in result.rows] == ["a"]
    assert [sentence for _, sentence in result.failures] == [
        f"You have no permission to read '{path}': change the rights of the file"
        for path in paths[1:]
    ]


def test_plates_in_zarr_with_faults_fail_alone(tmp_path, mini_model):
    """A well that is named twice, one that is missing, a field that is, and a list that is none."""
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    plates = {
        "twice": [{"path": "A/1"}, {"path": "A/1"}],
        "hole": [{"path": "A/1"}, {"path": "B/1"}],
        "field": [{"path": "A/1"}],
        "odd": [{"row": 1}],
    }
    for name, wells in plates.items():
        group = zarr.open_group(str(tmp_path / f"{name}.zarr"), mode="w", zarr_format=2)
        group.attrs["plate"] = {"wells": wells}
        well = zarr.open_group(str(tmp_path / f"{name}.zarr" / "A" / "1"), mode="w", zarr_format=2)
        well.attrs["well"] = {"images": [{"path": "0"}]}
    write_image(tmp_path / "a.tif", np.zeros((32, 40), np.uint8))
    paths = sorted(tmp_path.glob("*.*"))
    result = segment_files(paths, tmp_path / "out", options(), model=mini_model, shown=False)
    assert [row["name"] for row in result.rows] == ["a"]
    sentences = {path.relative_to(tmp_path).parts[0]: text for path, text in result.failures}
    assert "names A/1 twice" in sentences["twice.zarr"]
    assert "lacks B/1" in sentences["hole.zarr"]
    assert "There is no file" in sentences["field.zarr"]
    assert "its list of wells is damaged" in sentences["odd.zarr"]
