"""Many files: resume, failures, settings, and what a folder holds afterwards."""

from __future__ import annotations

import csv
import errno
import json
import os

import numpy as np
import pytest

from dinocell.batch import journal
from dinocell.batch import run as batch
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.errors import CheckpointError, ConfigError, DINOCellError, UsageError
from dinocell.io import find_images, read_labels, write_image
from dinocell.pipeline import segment

OPTIONS = SegmentOptions(device="cpu")


@pytest.fixture
def images(tmp_path, blob_data):
    paths = find_images([blob_data / "images"])[:3]
    return paths


def run(paths, out, model, **options):
    from dataclasses import replace

    return segment_files(paths, out, replace(OPTIONS, **options), model=model, shown=False)


def test_what_a_folder_holds(images, tmp_path, small_model):
    result = run(images, tmp_path / "out", small_model, report=True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"summary.csv", "settings.json", "images.jsonl", "report.html"}
    for path in images:
        expected |= {f"{path.stem}{end}" for end in ("_labels.tif", "_cells.csv", "_overlay.png")}
    assert names == expected
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [path.stem for path in images]
    for row in rows:
        labels = read_labels(tmp_path / "out" / f"{row['name']}_labels.tif")
        assert int(row["num_cells"]) == labels.max()
    assert "in 3 images" in result.text()


def test_a_bad_file_stops_nothing(images, tmp_path, small_model):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(images[0].read_bytes()[:300])
    colour = tmp_path / "colour.png"
    rng = np.random.default_rng(0)
    write_image(colour, rng.integers(0, 255, (40, 40, 3)).astype(np.uint8))
    paths = [broken, images[0], colour, images[1]]
    result = run(paths, tmp_path / "out", small_model, report=True)
    assert [path for path, _ in result.failures] == [broken, colour]
    assert len(result.rows) == 2
    assert "failed: " in result.text()
    assert not list((tmp_path / "out").glob("broken_*"))
    with (tmp_path / "out" / "summary.csv").open() as file:
        errors = {row["name"]: row["error"] for row in csv.DictReader(file)}
    assert "gray" in errors["colour"]
    assert errors["broken"]
    assert not errors[images[0].stem]
    assert "colour" in (tmp_path / "out" / "report.html").read_text()


def test_results_do_not_depend_on_workers(images, tmp_path, small_model):
    for workers in (0, 1, 3):
        run(images, tmp_path / str(workers), small_model, workers=workers)
    for path in images:
        one, *others = (
            read_labels(tmp_path / str(workers) / f"{path.stem}_labels.tif")
            for workers in (0, 1, 3)
        )
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_finished_results_are_not_replaced_unasked(images, tmp_path, small_model):
    out = tmp_path / "out"
    run(images, out, small_model)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UsageError, match="set `resume` to keep them, `overwrite`"):
        run(images, out, small_model)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_resume_does_the_rest(images, tmp_path, small_model):
    out = tmp_path / "out"
    run(images[:2], out, small_model)
    before = (out / f"{images[0].stem}_labels.tif").stat().st_mtime_ns
    result = run(images, out, small_model, resume=True, batch_size=2, workers=0)
    assert result.skipped == 2
    assert len(result.rows) == 3
    assert (out / f"{images[0].stem}_labels.tif").stat().st_mtime_ns == before
    (out / f"{images[1].stem}_labels.tif").unlink()
    with (out / "images.jsonl").open("a") as file:
        file.write('{"name": "cut')  # as a crash leaves it
    assert run(images, out, small_model, resume=True).skipped == 2


def test_resume_needs_the_same_settings(images, tmp_path, small_model):
    out = tmp_path / "out"
    run(images[:1], out, small_model)
    for change in ({"peak_threshold": 0.9}, {"min_area_px": 3}, {"precision": "bf16"}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            run(images, out, small_model, resume=True, **change)
    from dinocell.network.model import create_dinocell_model

    other = create_dinocell_model("tiny", patch_size=16, window_px=32, overlap_px=8).eval()
    with pytest.raises(ConfigError, match="weights_sha256"):
        run(images, out, other, resume=True)


def test_overwrite_replaces(images, tmp_path, small_model):
    out = tmp_path / "out"
    run(images, out, small_model)
    run(images, out, small_model, overwrite=True, peak_threshold=0.95)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["peak_threshold"] == 0.95
    assert len((out / "images.jsonl").read_text().splitlines()) == len(images)


def test_options_reach_the_files(images, tmp_path, small_model):
    run(images[:1], tmp_path / "a", small_model, overlay=False, formats=("png", "geojson"))
    names = {path.name.removeprefix(images[0].stem) for path in (tmp_path / "a").iterdir()}
    assert {"_labels.png", "_outlines.geojson", "_cells.csv"} <= names
    assert not any(name.endswith(("_overlay.png", ".tif")) for name in names)
    run(images[:1], tmp_path / "b", small_model, pixel_size_um=0.5)
    assert "area_um2" in (tmp_path / "b" / f"{images[0].stem}_cells.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ("svg",)}, "tif, png"),
        ({"formats": ()}, "got none"),
        ({"precision": "fp8"}, "fp32 or bf16"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"tile_px": 0}, "at least 1"),
        ({"page": -1}, "count from 0"),
        ({"pixel_size_um": -1.0}, "above 0"),
    ],
)
def test_wrong_calls_leave_no_folder(images, tmp_path, small_model, change, message):
    with pytest.raises(UsageError, match=message):
        run(images, tmp_path / "out", small_model, **change)
    assert not (tmp_path / "out").exists()


def test_no_images_and_equal_names(images, tmp_path, small_model):
    with pytest.raises(UsageError, match="at least one image"):
        run([], tmp_path / "out", small_model)
    with pytest.raises(UsageError, match="differ in name"):
        run([images[0], tmp_path / images[0].name], tmp_path / "out", small_model)


def test_a_wrong_model_is_met_before_the_folder_is_made(images, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        segment_files(
            images, tmp_path / "out", SegmentOptions(model=str(tmp_path / "m.safetensors"))
        )
    assert not (tmp_path / "out").exists()


def test_resume_never_replaces_results_of_another_image(images, tmp_path, small_model):
    import shutil

    out = tmp_path / "out"
    run(images[:1], out, small_model)
    before = (out / f"{images[0].stem}_labels.tif").read_bytes()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / images[0].name
    shutil.copy(images[1], other)
    with pytest.raises(UsageError, match="same images"):
        run([other], out, small_model, resume=True)
    assert (out / f"{images[0].stem}_labels.tif").read_bytes() == before
    (out / "settings.json").unlink()
    with pytest.raises(UsageError, match="must find the settings"):
        run(images[:1], out, small_model, resume=True)


def test_one_folder_has_one_setting_and_one_summary(images, tmp_path, small_model):
    out = tmp_path / "out"
    run(images[:1], out, small_model)
    with pytest.raises(ConfigError, match="peak_threshold"):
        run(images[1:2], out, small_model, peak_threshold=0.9)
    run(images[1:2], out, small_model)
    with (out / "summary.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [p.stem for p in images[:2]]


def test_overwriting_with_a_bad_file_keeps_the_old_result(images, tmp_path, small_model):
    import shutil

    path = tmp_path / images[0].name
    shutil.copy(images[0], path)
    out = tmp_path / "out"
    run([path], out, small_model)
    before = (out / f"{path.stem}_labels.tif").read_bytes()
    path.write_bytes(path.read_bytes()[:300])
    result = run([path], out, small_model, overwrite=True)
    assert result.failures
    assert (out / f"{path.stem}_labels.tif").read_bytes() == before


def test_a_device_out_of_memory_stops_one_image_only(images, tmp_path, small_model, monkeypatch):
    from dinocell.pipeline import DINOCellPipeline

    predict = DINOCellPipeline.predict
    calls = []

    def once_too_large(self, plane, **options):
        calls.append(plane)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        return predict(self, plane, **options)

    monkeypatch.setattr(DINOCellPipeline, "predict", once_too_large)
    result = run(images, tmp_path / "out", small_model)
    assert [path for path, _ in result.failures] == [images[0]]
    assert len(result.rows) == 2


@pytest.mark.parametrize("ending", ["_labels.tif", "_cells.csv", "_overlay.png"])
def test_a_full_disk_is_no_fault_of_the_images(images, tmp_path, small_model, monkeypatch, ending):
    """Said by the system when a finished file is to get its name; the writers wrap it."""
    replace = os.replace

    def full(source, target, *rest):
        if str(target).endswith(ending):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target, *rest)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DINOCellError, match=r"could not be written .*No space left.*Free space"):
        run(images, tmp_path / "out", small_model)
    assert not (tmp_path / "out" / "summary.csv").exists()


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"]
)
def test_a_broken_gpu_is_no_fault_of_the_images(images, tmp_path, small_model, monkeypatch, text):
    def broken(*_):
        raise RuntimeError(text)

    monkeypatch.setattr(batch.DINOCellPipeline, "predict", broken)
    with pytest.raises(DINOCellError, match=f"the GPU has failed .{text}"):
        run(images, tmp_path / "out", small_model)


def part_of(images, tmp_path, model, *, workers: int = 2):
    """A part of a batch; gives its failures and the names in the order in which work began."""
    part = tmp_path / "part"
    part.mkdir(exist_ok=True)
    begun = []

    def noting(folder, name):
        begun.append(name)
        journal.note_start(folder, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "note_start", noting)
        result = segment_files(
            images, tmp_path / "out", SegmentOptions(device="cpu", workers=workers, resume=True),
            model=model, shown=False, part=part,
        )  # fmt: skip
    return result, begun


def test_suspected_images_come_last_and_alone(images, tmp_path, small_model):
    part = tmp_path / "part"
    part.mkdir()
    first, second, third = (path.stem for path in images)
    for name in (first, second):
        journal.note_start(part, name)
    assert journal.suspect_unfinished_images(part) == 2
    journal.note_start(part, first)
    journal.note_start(part, second)
    journal.note_failure(part, second)  # it failed by itself
    assert journal.suspect_unfinished_images(part) == 1
    result, begun = part_of(images, tmp_path, small_model)
    assert begun == [third, second, first]
    assert [row["name"] for row in result.rows] == [first, second, third]
    assert journal.kills(part) == {}  # all were tried: nobody is suspected any more


def test_images_that_a_stopped_start_had_not_finished_are_no_suspects(
    images, tmp_path, small_model
):
    """The first start was asked to stop; the next one is killed with another image."""
    part = tmp_path / "part"
    part.mkdir()
    journal.note_start(part, "innocent")
    journal.begin_part(part)
    journal.note_start(part, "guilty")
    assert journal.suspect_unfinished_images(part) == 1
    assert journal.kills(part) == {"guilty": 1}
    journal.note_start(part, "innocent")
    part_of(images, tmp_path, small_model)  # forgets them, too
    assert journal.suspect_unfinished_images(part) == 0


def test_an_image_that_kills_is_given_up(images, tmp_path, small_model):
    part = tmp_path / "part"
    part.mkdir()
    for _ in range(journal.MAX_KILLS):
        journal.note_start(part, images[1].stem)
        journal.suspect_unfinished_images(part)
    result, begun = part_of(images, tmp_path, small_model)
    assert begun == [images[0].stem, images[2].stem]
    ((path, sentence),) = result.failures
    assert path == images[1]
    assert "must fit into the memory, got a process killed 3 times" in sentence
    # Asked again, it is tried again.
    result, begun = part_of(images, tmp_path, small_model)
    assert begun == [images[1].stem]
    assert result.failures == []


def test_names_that_are_no_utf8_end_no_batch(images, tmp_path, small_model, capsys):
    (tmp_path / "plate").mkdir()
    name = os.fsdecode(b"caf\xe9")  # Latin-1
    good, bad = tmp_path / "plate" / f"{name}.tif", tmp_path / "plate" / f"{name}2.tif"
    good.write_bytes(images[0].read_bytes())
    bad.write_bytes(b"no image")
    out = tmp_path / "out"
    for options in ({}, {"resume": True}):
        result = run(find_images([tmp_path / "plate"]), out, small_model, report=True, **options)
        assert [path for path, _ in result.failures] == [bad]
        assert read_labels(out / f"{name}_labels.tif").shape == (64, 80)
        with (out / "summary.csv").open(encoding="utf-8") as file:
            assert [row["name"] for row in csv.DictReader(file)] == ["caf\\udce9", "caf\\udce92"]
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "caf\\udce9" in page
    assert result.skipped == 1


def test_a_name_too_long_for_its_outputs_is_refused_before_any_is_written(
    images, tmp_path, small_model
):
    path = tmp_path / ("x" * 244 + ".tif")
    path.write_bytes(images[0].read_bytes())
    result = run([path, images[1]], tmp_path / "out", small_model)
    ((failed, sentence),) = result.failures
    assert failed == path
    assert "up to 255 bytes" in sentence
    assert "got 256" in sentence
    assert not list((tmp_path / "out").glob("x*"))
    result = segment(path, model=small_model)
    with pytest.raises(DINOCellError, match="_overlay"):
        result.save(tmp_path / "single")
    assert not list((tmp_path / "single").iterdir())
    assert result.save(tmp_path / "single", overlay=False)
    with pytest.raises(DINOCellError, match=r"got 261 for .*_outlines.geojson"):
        result.save(tmp_path / "single", overlay=False, formats=("geojson",))
    assert run([path], tmp_path / "out", small_model, resume=True).failures
    assert run([path], tmp_path / "out", small_model, overwrite=True).failures


def test_a_file_in_place_of_the_folder(images, tmp_path, small_model):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UsageError, match="`out` must be a folder"):
            run(images, out, small_model)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_files(images, tmp_path, small_model, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("dinocell.batch.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(DINOCellError, match=rf"out' \({os.strerror(error)}\): change the rights"):
        run(images, tmp_path / "out", small_model)
