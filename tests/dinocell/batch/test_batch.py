"""Many files: resume, failures, settings, and what a folder holds afterwards."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import socket
import sys
import threading
import warnings

import numpy as np
import pytest
from waiting import wait_until

from dinocell.batch import journal
from dinocell.batch import run as batch
from dinocell.batch.claims import Claimant, claimed
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.errors import (
    CheckpointError,
    ConfigError,
    DINOCellError,
    MissingExtraError,
    UsageError,
)
from dinocell.io import find_images, read_image, read_labels, write_image
from dinocell.pipeline import segment
from dinocell.results.formats import EXPORT_FORMATS

OPTIONS = SegmentOptions(device="cpu")


@pytest.fixture
def images(tmp_path, blob_data):
    paths = find_images([blob_data / "images"])[:3]
    return paths


def run(paths, out, model, **options):
    from dataclasses import replace

    return segment_files(paths, out, replace(OPTIONS, **options), model=model, shown=False)


def test_what_a_folder_holds(images, tmp_path, mini_model):
    result = run(images, tmp_path / "out", mini_model, report=True)
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


def test_a_format_without_its_package_is_refused_before_anything_is_written(
    images, tmp_path, mini_model, monkeypatch
):
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[tables\]'"):
        run(images, tmp_path / "out", mini_model, formats=("tif", "h5ad"))
    assert not (tmp_path / "out").exists()


def test_the_report_names_thresholds_and_links_labels(images, tmp_path, mini_model):
    options = {"min_area_px": 3, "min_score": 0.125, "formats": ("png", "coco")}
    run(images[:1], tmp_path / "out", mini_model, report=True, **options)
    page = (tmp_path / "out" / "report.html").read_text()
    for name, value in (("min_area_px", "3"), ("min_score", "0.125")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page
    for name in ("peak_threshold", "fill_threshold", "min_prominence"):
        assert f"<dt>{name}</dt>" in page
    for end in ("_labels.png", "_coco.json"):
        assert f'href="{images[0].stem}{end}"' in page


def test_images_unlike_the_training_are_named(tmp_path, knowing_model, small_model):
    gradient = np.add.outer(np.arange(70), np.arange(90)).astype(np.uint16) + 10
    write_image(tmp_path / "gradient.tif", gradient)
    result = run([tmp_path / "gradient.tif"], tmp_path / "out", knowing_model, report=True)
    sentence = "The image does not look like what knowing was trained on ("
    assert f"note: gradient: {sentence}" in result.text()
    with (tmp_path / "out" / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["unfamiliar"]) > 1
    assert sentence in row["warnings"]
    assert sentence in (tmp_path / "out" / "report.html").read_text()
    run([tmp_path / "gradient.tif"], tmp_path / "without", small_model)
    assert "unfamiliar" not in (tmp_path / "without" / "summary.csv").read_text()


def test_a_bad_file_stops_nothing(images, tmp_path, mini_model):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(images[0].read_bytes()[:300])
    two = tmp_path / "two.npy"
    rng = np.random.default_rng(0)
    write_image(two, rng.integers(0, 255, (40, 40, 2)).astype(np.uint8))
    paths = [broken, images[0], two, images[1]]
    result = run(paths, tmp_path / "out", mini_model, report=True)
    assert [path for path, _ in result.failures] == [broken, two]
    assert len(result.rows) == 2
    assert "failed: " in result.text()
    assert not list((tmp_path / "out").glob("broken_*"))
    with (tmp_path / "out" / "summary.csv").open() as file:
        errors = {row["name"]: row["error"] for row in csv.DictReader(file)}
    assert "gray" in errors["two"]
    assert errors["broken"]
    assert not errors[images[0].stem]
    page = (tmp_path / "out" / "report.html").read_text()
    places = [page.rindex(path.stem) for path in paths]
    assert places == sorted(places)


def test_results_do_not_depend_on_workers(images, tmp_path, mini_model):
    for workers in (0, 1, 3):
        run(images, tmp_path / str(workers), mini_model, workers=workers)
    for path in images:
        one, *others = (
            read_labels(tmp_path / str(workers) / f"{path.stem}_labels.tif")
            for workers in (0, 1, 3)
        )
        for other in others:
            np.testing.assert_array_equal(one, other)


def test_finished_results_are_not_replaced_unasked(images, tmp_path, mini_model):
    out = tmp_path / "out"
    run(images, out, mini_model)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(UsageError, match="set `resume` to keep them, `overwrite`"):
        run(images, out, mini_model)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_resume_does_the_rest(images, tmp_path, mini_model):
    out = tmp_path / "out"
    run(images[:2], out, mini_model)
    before = (out / f"{images[0].stem}_labels.tif").stat().st_mtime_ns
    result = run(images, out, mini_model, resume=True, batch_size=2, workers=0)
    assert result.skipped == 2
    assert len(result.rows) == 3
    assert (out / f"{images[0].stem}_labels.tif").stat().st_mtime_ns == before
    (out / f"{images[1].stem}_labels.tif").unlink()
    with (out / "images.jsonl").open("a") as file:
        file.write('{"name": "cut')  # as a crash leaves it
    assert run(images, out, mini_model, resume=True).skipped == 2


def test_resume_needs_the_same_settings(images, tmp_path, mini_model):
    out = tmp_path / "out"
    run(images[:1], out, mini_model)
    for change in (
        {"peak_threshold": 0.9},
        {"min_area_px": 3},
        {"min_score": 0.1},
        {"precision": "bf16"},
        {"tta": True},
        {"rescale": 2.0},
        {"diameter_px": 12.0},
        {"percentiles": (1, 90)},
    ):
        with pytest.raises(ConfigError, match=next(iter(change))):
            run(images, out, mini_model, resume=True, **change)
    from dinocell.network.model import create_dinocell_model

    other = create_dinocell_model("tiny", patch_size=16, window_px=32, overlap_px=8).eval()
    with pytest.raises(ConfigError, match="weights_sha256"):
        run(images, out, other, resume=True)


def test_folders_with_and_without_flips(images, tmp_path, mini_model):
    out = tmp_path / "out"
    cells, page = out / f"{images[0].stem}_cells.csv", out / "report.html"
    run(images[:1], out, mini_model, report=True)
    plain = cells.read_text()
    assert "tta" not in page.read_text()
    settings = json.loads((out / "settings.json").read_text())
    assert settings.pop("tta") is False
    (out / "settings.json").write_text(json.dumps(settings))  # as before the option existed
    with pytest.raises(ConfigError, match="values of tta than"):
        run(images[:1], out, mini_model, resume=True, tta=True)
    assert run(images[:1], out, mini_model, resume=True).skipped == 1
    run(images[:1], out, mini_model, overwrite=True, tta=True, report=True)
    assert json.loads((out / "settings.json").read_text())["tta"] is True
    assert cells.read_text() != plain
    assert "tta" in page.read_text()
    flipped = segment(images[0], model=mini_model, tta=True)
    np.testing.assert_array_equal(read_labels(out / f"{images[0].stem}_labels.tif"), flipped.labels)
    with pytest.raises(ConfigError, match="values of tta than"):
        run(images[:1], out, mini_model, resume=True)
    assert run(images[:1], out, mini_model, resume=True, tta=True).skipped == 1


def test_overwrite_replaces(images, tmp_path, mini_model):
    out = tmp_path / "out"
    run(images, out, mini_model)
    run(images, out, mini_model, overwrite=True, peak_threshold=0.95)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["peak_threshold"] == 0.95
    assert len((out / "images.jsonl").read_text().splitlines()) == len(images)


def test_overwriting_some_images_with_other_settings_is_refused(images, tmp_path, mini_model):
    """Else `resume` would take the others for results of the new settings."""
    out = tmp_path / "out"
    run(images, out, mini_model)
    others = f"{images[1].stem}, {images[2].stem}"
    with pytest.raises(ConfigError, match=rf"peak_threshold .*its other images \({others}\)"):
        run(images[:1], out, mini_model, overwrite=True, peak_threshold=0.95)
    assert run(images, out, mini_model, resume=True).skipped == len(images)
    assert run(images[:1], out, mini_model, overwrite=True).skipped == 0
    run(images, out, mini_model, overwrite=True, peak_threshold=0.95)


def test_options_reach_the_files(images, tmp_path, mini_model):
    run(images[:1], tmp_path / "a", mini_model, overlay=False, formats=("png", "geojson"))
    names = {path.name.removeprefix(images[0].stem) for path in (tmp_path / "a").iterdir()}
    assert {"_labels.png", "_outlines.geojson", "_cells.csv"} <= names
    assert not any(name.endswith(("_overlay.png", ".tif")) for name in names)
    run(images[:1], tmp_path / "b", mini_model, pixel_size_um=0.5)
    assert "area_um2" in (tmp_path / "b" / f"{images[0].stem}_cells.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"formats": ("svg",)}, "tif, png"),
        ({"formats": ()}, "got none"),
        ({"precision": "fp8"}, "one of auto, fp32, bf16"),
        ({"percentiles": (99, 1)}, "0 <= low < high <= 100"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"tile_px": 0}, "at least 1"),
        ({"page": -1}, "count from 0"),
        ({"pixel_size_um": -1.0}, "above 0"),
    ],
)
def test_wrong_calls_leave_no_folder(images, tmp_path, mini_model, change, message):
    with pytest.raises(UsageError, match=message):
        run(images, tmp_path / "out", mini_model, **change)
    assert not (tmp_path / "out").exists()


def test_no_images_and_equal_names(images, tmp_path, mini_model):
    with pytest.raises(UsageError, match="At least one image"):
        run([], tmp_path / "out", mini_model)
    with pytest.raises(UsageError, match="differ in name"):
        run([images[0], images[0].with_suffix(".png")], tmp_path / "out", mini_model)


def test_a_wrong_model_is_met_before_the_folder_is_made(images, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        segment_files(
            images, tmp_path / "out", SegmentOptions(model=str(tmp_path / "m.safetensors"))
        )
    assert not (tmp_path / "out").exists()


def test_resume_never_replaces_results_of_another_image(images, tmp_path, mini_model):
    import shutil

    out = tmp_path / "out"
    run(images[:1], out, mini_model)
    before = (out / f"{images[0].stem}_labels.tif").read_bytes()
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / images[0].name
    shutil.copy(images[1], other)
    with pytest.raises(UsageError, match="same images"):
        run([other], out, mini_model, resume=True)
    assert (out / f"{images[0].stem}_labels.tif").read_bytes() == before
    (out / "settings.json").unlink()
    with pytest.raises(UsageError, match="must find the settings"):
        run(images[:1], out, mini_model, resume=True)


def test_one_folder_has_one_setting_and_one_summary(images, tmp_path, mini_model):
    out = tmp_path / "out"
    run(images[:1], out, mini_model)
    with pytest.raises(ConfigError, match="peak_threshold"):
        run(images[1:2], out, mini_model, peak_threshold=0.9)
    run(images[1:2], out, mini_model)
    with (out / "summary.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [p.stem for p in images[:2]]


def test_overwriting_with_a_bad_file_keeps_the_old_result(images, tmp_path, mini_model):
    import shutil

    path = tmp_path / images[0].name
    shutil.copy(images[0], path)
    out = tmp_path / "out"
    run([path], out, mini_model)
    before = (out / f"{path.stem}_labels.tif").read_bytes()
    path.write_bytes(path.read_bytes()[:300])
    result = run([path], out, mini_model, overwrite=True)
    assert result.failures
    assert (out / f"{path.stem}_labels.tif").read_bytes() == before


def test_a_device_out_of_memory_stops_one_image_only(images, tmp_path, mini_model, monkeypatch):
    from dinocell.pipeline import DINOCellPipeline

    predict = DINOCellPipeline.predict
    calls = []

    def once_too_large(self, plane, **options):
        calls.append(plane)
        if len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        return predict(self, plane, **options)

    monkeypatch.setattr(DINOCellPipeline, "predict", once_too_large)
    result = run(images, tmp_path / "out", mini_model)
    assert [path for path, _ in result.failures] == [images[0]]
    assert len(result.rows) == 2


@pytest.mark.parametrize("ending", ["_labels.tif", "_cells.csv", "_overlay.png"])
def test_a_full_disk_is_no_fault_of_the_images(images, tmp_path, mini_model, monkeypatch, ending):
    """Said by the system when a finished file is to get its name; the writers wrap it."""
    replace = os.replace

    def full(source, target, *rest):
        if str(target).endswith(ending):
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target, *rest)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        DINOCellError, match=r"could not be written .*No space left.*free space"
    ) as caught:
        run(images, tmp_path / "out", mini_model)
    assert not (tmp_path / "out" / "summary.csv").exists()
    # Without it the same command is refused where an image was finished.
    assert str(caught.value).endswith("run the same command again with `resume`")
    with pytest.raises(DINOCellError, match=r"again with `resume` in place of `overwrite`$"):
        run(images, tmp_path / "out", mini_model, overwrite=True)
    with pytest.raises(DINOCellError, match=r"run the same command again$"):
        run(images, tmp_path / "out", mini_model, resume=True)


def at_second_image(monkeypatch, strike):
    """Calls `strike` when the network gets the second image of a batch."""
    predict, seen = batch.DINOCellPipeline.predict, []

    def predict_and_strike(self, plane, **options):
        seen.append(plane)
        if len(seen) == 2:
            strike()
        return predict(self, plane, **options)

    monkeypatch.setattr(batch.DINOCellPipeline, "predict", predict_and_strike)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_goes_away_is_not_made_again(
    images, tmp_path, mini_model, monkeypatch, replaced
):
    """As when a network folder is unmounted: `replaced` where the mount point itself is the folder."""
    out, away = tmp_path / "out", tmp_path / "away"

    def unmount():
        # What is written while the folder goes may reach either of the two.
        wait_until(lambda: journal.count_rows(out / journal.JOURNAL_NAME))
        out.rename(away)
        if replaced:
            out.mkdir()

    with monkeypatch.context() as patch:
        at_second_image(patch, unmount)
        with pytest.raises(
            DINOCellError, match=r"the folder is gone .*images were kept.*the mount"
        ):
            run(images, out, mini_model)
    assert out.exists() == replaced
    if replaced:
        out.rmdir()  # it is empty
    away.rename(out)
    (out / "claim.json").unlink()  # of this process, which would have ended
    run(images, out, mini_model, resume=True)
    run(images, tmp_path / "whole", mini_model)
    for path in (tmp_path / "whole").iterdir():
        if path.name != journal.JOURNAL_NAME:
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_journal_that_takes_no_line_stops_the_batch(images, tmp_path, mini_model, monkeypatch):
    """A file that is read-only is one for all users but root, a folder for root as well."""
    lines = tmp_path / "out" / journal.JOURNAL_NAME

    def close():
        lines.unlink(missing_ok=True)
        lines.mkdir()

    at_second_image(monkeypatch, close)
    with pytest.raises(DINOCellError, match=r"could not be written .*directory.*change the rights"):
        run(images, tmp_path / "out", mini_model)
    with pytest.raises(DINOCellError, match=r"could not be written .*directory.*change the rights"):
        run(images, tmp_path / "out", mini_model, resume=True)


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"]
)
def test_a_broken_gpu_is_no_fault_of_the_images(images, tmp_path, mini_model, monkeypatch, text):
    def broken(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(batch.DINOCellPipeline, "predict", broken)
    with pytest.raises(DINOCellError, match=f"The GPU has failed .{text}"):
        run(images, tmp_path / "out", mini_model)


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


def test_suspected_images_come_last_and_alone(images, tmp_path, mini_model):
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
    result, begun = part_of(images, tmp_path, mini_model)
    assert begun == [third, second, first]
    assert [row["name"] for row in result.rows] == [first, second, third]
    assert journal.kills(part) == {}  # all were tried: nobody is suspected any more


def test_images_that_a_stopped_start_had_not_finished_are_no_suspects(images, tmp_path, mini_model):
    """The first start was asked to stop; the next one is killed with another image."""
    part = tmp_path / "part"
    part.mkdir()
    journal.note_start(part, "innocent")
    journal.begin_part(part)
    journal.note_start(part, "guilty")
    assert journal.suspect_unfinished_images(part) == 1
    assert journal.kills(part) == {"guilty": 1}
    journal.note_start(part, "innocent")
    part_of(images, tmp_path, mini_model)  # forgets them, too
    assert journal.suspect_unfinished_images(part) == 0


def test_an_image_that_kills_is_given_up(images, tmp_path, mini_model):
    part = tmp_path / "part"
    part.mkdir()
    for _ in range(journal.MAX_KILLS):
        journal.note_start(part, images[1].stem)
        journal.suspect_unfinished_images(part)
    result, begun = part_of(images, tmp_path, mini_model)
    assert begun == [images[0].stem, images[2].stem]
    ((path, sentence),) = result.failures
    assert path == images[1]
    assert "must fit into the memory, got a process killed 3 times" in sentence
    # Asked again, it is tried again.
    result, begun = part_of(images, tmp_path, mini_model)
    assert begun == [images[1].stem]
    assert result.failures == []


def test_names_that_are_no_utf8_end_no_batch(images, tmp_path, mini_model, capsys):
    (tmp_path / "plate").mkdir()
    name = os.fsdecode(b"caf\xe9")  # Latin-1
    good, bad = tmp_path / "plate" / f"{name}.tif", tmp_path / "plate" / f"{name}2.tif"
    good.write_bytes(images[0].read_bytes())
    bad.write_bytes(b"no image")
    out = tmp_path / "out"
    for options in ({}, {"resume": True}):
        result = run(find_images([tmp_path / "plate"]), out, mini_model, report=True, **options)
        assert [path for path, _ in result.failures] == [bad]
        assert read_labels(out / f"{name}_labels.tif").shape == (64, 80)
        with (out / "summary.csv").open(encoding="utf-8") as file:
            assert [row["name"] for row in csv.DictReader(file)] == ["caf\\udce9", "caf\\udce92"]
        page = (out / "report.html").read_text(encoding="utf-8")
        assert "caf\\udce9" in page
    assert result.skipped == 1


def test_channels_that_are_segmented_alone_are_noted(images, tmp_path, mini_model):
    (tmp_path / "plate").mkdir()
    for name in ("r01c01f01p01-ch1sk1fk1fl1", "r01c01f01p01-ch2sk1fk1fl1", "overview"):
        (tmp_path / "plate" / f"{name}.tif").write_bytes(images[0].read_bytes())
    files = find_images([tmp_path / "plate"])
    (note,) = run(files, tmp_path / "out", mini_model).notes
    assert note.startswith("2 of 3 names are those of operetta")
    assert note.endswith("set `plate` to operetta and name `channels`")
    assert run(files, tmp_path / "off", mini_model, plate="off").notes == ()


@pytest.mark.parametrize("plate", [r"(?P<well>[A-H]\d\d)_s", "operetta"])
def test_a_plate_that_fits_no_name_is_noted(images, tmp_path, mini_model, plate):
    (note,) = run(images[:1], tmp_path / "out", mini_model, plate=plate).notes
    assert note.startswith(f"`plate` {plate!r} fits none of the images, such as {images[0].name}")


def test_a_name_too_long_for_its_outputs_is_refused_before_any_is_written(
    images, tmp_path, mini_model
):
    path = tmp_path / ("x" * 244 + ".tif")
    path.write_bytes(images[0].read_bytes())
    result = run([path, images[1]], tmp_path / "out", mini_model)
    ((failed, sentence),) = result.failures
    assert failed == path
    assert "up to 255 bytes" in sentence
    assert "got 256" in sentence
    assert not list((tmp_path / "out").glob("x*"))
    result = segment(path, model=mini_model)
    with pytest.raises(DINOCellError, match="_overlay"):
        result.save(tmp_path / "single")
    assert not list((tmp_path / "single").iterdir())
    assert result.save(tmp_path / "single", overlay=False)
    with pytest.raises(DINOCellError, match=r"got 261 for .*_outlines.geojson"):
        result.save(tmp_path / "single", overlay=False, formats=("geojson",))
    assert run([path], tmp_path / "out", mini_model, resume=True).failures
    assert run([path], tmp_path / "out", mini_model, overwrite=True).failures


def test_a_name_too_long_for_the_labels_of_nuclei_is_refused_too(images, tmp_path, mini_model):
    path = tmp_path / ("x" * 238 + ".npy")
    np.save(path, np.stack([read_image(images[0]).pixels] * 2, axis=-1))
    choice = {"nuclei": "0", "cells": "ring:3px"}
    ((_, sentence),) = run([path], tmp_path / "out", mini_model, **choice).failures
    assert "got 256 for" in sentence
    assert not list((tmp_path / "out").glob("x*"))
    with pytest.raises(DINOCellError, match="_nuclei_labels"):
        segment(path, model=mini_model, nuclei=0, cells="ring:3px").save(tmp_path / "single")
    assert not list((tmp_path / "single").iterdir())


def test_a_file_in_place_of_the_folder(images, tmp_path, mini_model):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(UsageError, match="`out` must be a folder"):
            run(images, out, mini_model)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES])
def test_a_folder_that_takes_no_files(images, tmp_path, mini_model, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("dinocell.batch.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(DINOCellError, match=rf"out' \({os.strerror(error)}\): change the rights"):
        run(images, tmp_path / "out", mini_model)


@pytest.fixture
def own(images, tmp_path):
    """Copies that a test may change."""
    (tmp_path / "own").mkdir()
    for path in images:
        (tmp_path / "own" / path.name).write_bytes(path.read_bytes())
    return find_images([tmp_path / "own"])


def test_resume_repeats_an_image_whose_file_was_replaced(own, tmp_path, mini_model):
    out = tmp_path / "out"
    pixels = read_image(own[0]).pixels
    write_image(own[0], pixels, compression="none")
    run(own, out, mini_model)
    labels = [read_labels(out / f"{path.stem}_labels.tif") for path in own]
    size = own[0].stat().st_size
    write_image(own[0], np.ascontiguousarray(pixels[::-1]), compression="none")
    assert own[0].stat().st_size == size
    os.utime(own[1], (1.0, 1.0))  # touched, but of the same content
    result = run(own, out, mini_model, resume=True)
    assert result.skipped == 2
    assert "segmented again, because files have changed: blob0\n" in f"{result.text()}\n"
    assert result.text().count("again") == 1 == len(result.notes)
    assert not np.array_equal(read_labels(out / "blob0_labels.tif"), labels[0])
    np.testing.assert_array_equal(read_labels(out / "blob1_labels.tif"), labels[1])
    again = run(own, out, mini_model, resume=True)
    assert (again.skipped, again.notes) == (3, ())
    own[2].unlink()  # nothing else can be read of it
    assert run(own, out, mini_model, resume=True).skipped == 3


def test_rows_without_a_mark_are_repeated(own, tmp_path, mini_model):
    out = tmp_path / "out"
    run(own[:1], out, mini_model)
    row = json.loads((out / "images.jsonl").read_text())
    row.pop("input")
    (out / "images.jsonl").write_text(json.dumps(row) + "\n")
    assert run(own[:1], out, mini_model, resume=True).skipped == 0


def test_gray_and_colour_images_share_a_folder(own, tmp_path, mini_model):
    out = tmp_path / "out"
    colour = tmp_path / "colour.tif"
    gray = read_image(own[0]).pixels
    write_image(colour, np.stack([gray, gray[::-1]], axis=-1))
    run(own[:1], out, mini_model)
    result = run([colour], out, mini_model, channels=(1,), resume=True)
    assert result.failures == []
    assert run([colour], out, mini_model, channels=(1,), resume=True).skipped == 1
    with pytest.raises(ConfigError, match=r"got channels \[0\] for 'colour', .* with \[1\]"):
        run([colour], out, mini_model, channels=(0,), resume=True)
    with (out / "summary.csv").open() as file:
        reader = csv.DictReader(file)
        assert [row["name"] for row in reader] == ["blob0", "colour"]
        assert "input" not in reader.fieldnames


def test_a_report_of_a_finished_folder_shows_all_images(own, tmp_path, mini_model):
    out = tmp_path / "out"
    run(own[:2], out, mini_model, report=True)
    full = (out / "report.html").read_text()
    run(own[:2], out, mini_model, report=True, resume=True)
    page = (out / "report.html").read_text()
    pictures = [text.count("data:image") for text in (full, page)]
    assert pictures[0] - pictures[1] == 2  # the distance maps are in no file
    table = re.compile(r"<table.*?</table>", re.S)
    assert table.findall(full) == table.findall(page)
    run(own[2:], out, mini_model, report=True)  # images of another call
    page = (out / "report.html").read_text()
    assert [page.count(f"{path.stem}_overlay.png") > 0 for path in own] == [True] * 3
    # What is gone is left out, what is damaged too.
    own[0].unlink()
    (out / "blob1_labels.tif").write_bytes(b"no labels")
    (out / "blob2_cells.csv").unlink()
    run(own[2:], out, mini_model, report=True, resume=True)
    page = (out / "report.html").read_text()
    assert [page.count(f"{path.stem}_overlay.png") > 0 for path in own] == [True] * 3


def test_a_second_run_into_a_folder_is_refused(own, tmp_path, mini_model, monkeypatch):
    out = tmp_path / "out"
    predict = batch.DINOCellPipeline.predict
    refused = []

    def meanwhile(self, plane, **options):
        with pytest.raises(DINOCellError, match=f"which process {os.getpid()} on .* is running"):
            run(own[1:], out, mini_model)
        refused.append(plane)
        return predict(self, plane, **options)

    monkeypatch.setattr(batch.DINOCellPipeline, "predict", meanwhile)
    assert len(run(own[:1], out, mini_model).rows) == len(refused) == 1
    monkeypatch.undo()
    assert not (out / "claim.json").exists()
    (out / "claim.json").write_text(
        json.dumps({"job": "", "host": socket.gethostname(), "pid": 2**30, "began": "1"})
    )  # of a process that was killed
    assert run(own[1:], out, mini_model).skipped == 0
    part = out / "shards" / "0003"
    part.mkdir(parents=True)
    with claimed(part, Claimant()), pytest.raises(DINOCellError, match="0003, which process"):
        run(own, out, mini_model, resume=True)


@pytest.mark.parametrize(("limit", "most"), [(2**29, 2), (1, 0)])
def test_what_waits_between_the_stages_is_bounded(
    own, tmp_path, mini_model, monkeypatch, limit, most
):
    waiting = []
    predict = batch._Batch._predict

    def count(self, path, read):
        waiting.append(len(self.pending))
        return predict(self, path, read)

    monkeypatch.setattr(batch, "_MAX_WAITING_BYTES", limit)
    monkeypatch.setattr(batch._Batch, "_predict", count)
    run(own, tmp_path / "out", mini_model, workers=1)
    assert waiting == [min(place, most) for place in range(3)]


@pytest.mark.parametrize("limit", [2**29, 1])
def test_the_next_image_is_read_while_the_network_runs(
    own, tmp_path, mini_model, monkeypatch, limit
):
    reads, read_at = [], []
    second_read = threading.Event()
    load, predict = batch.DINOCellPipeline.load, batch.DINOCellPipeline.predict

    def loaded(self, path, **options):
        reads.append(path)
        if len(reads) == 2:
            second_read.set()
        return load(self, path, **options)

    def predicted(self, *arguments, **options):
        if limit > 1:
            assert second_read.wait(600)
        read_at.append(len(reads))
        return predict(self, *arguments, **options)

    monkeypatch.setattr(batch, "_MAX_WAITING_BYTES", limit)
    monkeypatch.setattr(batch.DINOCellPipeline, "load", loaded)
    monkeypatch.setattr(batch.DINOCellPipeline, "predict", predicted)
    run(own, tmp_path / "out", mini_model)
    assert read_at == [1, 2, 3] if limit == 1 else read_at[0] == 2
    assert len(set(reads)) == len(reads) == 3


def test_warnings_of_libraries_belong_to_their_image(own, tmp_path, mini_model, monkeypatch, capfd):
    def warn(method, *texts):
        def warned(self, *arguments, **options):
            for text in texts:
                warnings.warn(text, RuntimeWarning, stacklevel=1)
            warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
            return method(self, *arguments, **options)

        return warned

    pipeline = batch.DINOCellPipeline
    monkeypatch.setattr(pipeline, "predict", warn(pipeline.predict, "overflow", "overflow"))
    monkeypatch.setattr(pipeline, "finish", warn(pipeline.finish, "invalid value"))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        result = run(own, tmp_path / "out", mini_model, report=True)
    text = "RuntimeWarning of Python: overflow; RuntimeWarning of Python: invalid value"
    assert [row["warnings"] for row in result.rows] == [text] * 3
    assert "invalid value" in (tmp_path / "out" / "report.html").read_text()
    assert capfd.readouterr().err == ""


def test_damaged_lines_of_a_journal_are_left_out(tmp_path):
    path = tmp_path / "images.jsonl"
    path.write_bytes(b'{"name": "a"}\n\xff\xfe\n7\nnull\n{}\n' + b"9" * 5000 + b'\n{"name": "b"}\n')
    assert [row["name"] for row in journal.read_journal(path)] == ["a", "b"]


def test_a_watcher_follows_every_image_and_may_stop_one(images, tmp_path, mini_model):
    from dinocell.batch.watcher import Watcher

    seen = []

    class Recorder(Watcher):
        def loaded(self, image):
            seen.append(("loaded", image.name))

        def progressed(self, done, total):
            seen.append((done, total))
            if ("loaded", images[1].stem) in seen:
                raise RuntimeError("Enough")

        def predicted(self, pipeline, image, distance_map):
            assert distance_map.shape == image.plane.shape
            assert (pipeline.finish(image, distance_map).labels > 0).any()
            seen.append(("predicted", image.name))

    result = segment_files(
        images[:2], tmp_path, OPTIONS, model=mini_model, shown=False, watcher=Recorder()
    )
    first, second = (path.stem for path in images[:2])
    assert [what for what in seen if what[0] in ("loaded", "predicted")] == [
        ("loaded", first),
        ("predicted", first),
        ("loaded", second),
    ]
    windows = [what for what in seen if isinstance(what[0], int)]
    assert windows[-2][0] == windows[-2][1]
    assert result.failures == [(images[1], "Enough")]


def test_images_of_more_pixels_are_refused(images, tmp_path, mini_model):
    result = run(images[:1], tmp_path / "out", mini_model, max_pixels=64 * 80 - 1)
    assert "up to 5,119 pixels" in result.failures[0][1]
    assert run(images[:1], tmp_path / "new", mini_model, max_pixels=64 * 80).failures == []
    with pytest.raises(UsageError, match="max_pixels"):
        run(images[:1], tmp_path / "none", mini_model, max_pixels=0)


@pytest.mark.skipif(sys.platform == "darwin", reason="the file system refuses such names")
@pytest.mark.parametrize("kind", EXPORT_FORMATS)
def test_names_that_are_no_utf8_have_results_of_every_format(images, tmp_path, mini_model, kind):
    for package in filter(None, [EXPORT_FORMATS[kind].needs]):
        pytest.importorskip(package[0], reason=f"extra [{package[2]}] is not installed")
    path = tmp_path / os.fsdecode(b"b\xff.tif")
    path.write_bytes(images[0].read_bytes())
    assert not run([path], tmp_path / "out", mini_model, formats=(kind,)).failures
