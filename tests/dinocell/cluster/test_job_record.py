"""What is remembered of jobs, and how far a run is, from folders that are made up here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dinocell.batch.journal import merging_folder, shard_folder
from dinocell.cluster.commands import command_of
from dinocell.cluster.record import (
    JobRecord,
    Start,
    Submission,
    note_submission,
    read_record,
    read_submissions,
    run_progress,
    write_record,
)
from dinocell.errors import UsageError
from dinocell.submitted import RunProgress


def start(job: str, progress: int, restart: int = 0, time: float = 0.0) -> Start:
    return Start(job, restart, progress, time, "node1")


def lines(path: Path, *values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


# --- the record of a run ---


def test_a_record_comes_back(tmp_path):
    record = JobRecord(
        ["train", "c.yaml"], "stopped", "a reason", [start("7", 0), start("7", 3, 1)]
    )
    write_record(tmp_path / "run", record)
    assert read_record(tmp_path / "run") == record
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["job.json"]


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "{}", '{"command": [], "starts": [{"a": 1}]}']
)
def test_a_record_that_cannot_be_read_is_none(tmp_path, text):
    if text is not None:
        (tmp_path / "job.json").write_text(text)
    assert read_record(tmp_path) is None


def test_stalled_starts_are_those_since_the_best_progress():
    starts = [start("7", 0), start("7", 0), start("8", 0), start("7", 5), start("7", 5)]
    record = JobRecord([], starts=starts)
    assert record.stalled_starts("7", 5) == 2
    assert record.stalled_starts("7", 6) == 0  # it has got on since
    assert record.stalled_starts("8", 0) == 1
    assert record.stalled_starts("9", 0) == 0
    assert JobRecord([], starts=starts[:2]).stalled_starts("7", 0) == 2
    # Work that loses what it had and gains it again gets nowhere.
    wavering = [start("7", 4), start("7", 0), start("7", 3)]
    assert JobRecord([], starts=wavering).stalled_starts("7", 2) == 3
    assert JobRecord([]).stalled_starts("7", 0) == 0


# --- what is saved ---


def test_saved_progress_of_a_pretraining(tmp_path):
    command = ("pretrain", "c.yaml")
    assert command_of(command).saved(tmp_path / "absent") == 0
    for name in ("9", "29", "29.tmp", "best", "tmp_99"):
        (tmp_path / "ckpt" / name).mkdir(parents=True)
    assert command_of(command).saved(tmp_path) == 30  # iterations 0 to 29 are done


def test_saved_progress_of_a_fine_tuning(tmp_path):
    command = ("train", "c.yaml")
    assert command_of(command).saved(tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_00000090.pt", "step_00000100.pt", "best.pt", "step_x.pt", ".tmp-1.pt"):
        (tmp_path / "checkpoints" / name).touch()
    assert command_of(command).saved(tmp_path) == 100


@pytest.mark.parametrize("command", [("segment", "p"), ("shards", "run", "out", "1")])
def test_saved_progress_of_images_is_their_whole_lines(tmp_path, command):
    assert command_of(command).saved(tmp_path) == 0
    (tmp_path / "images.jsonl").write_text('{"name": "a"}\n{"name": "b"}\n{"na')
    assert command_of(command).saved(tmp_path) == 2


def test_saved_progress_of_what_saves_nothing(tmp_path):
    assert command_of(("evaluate",)).saved(tmp_path) == 0
    assert command_of(()).saved(tmp_path) == 0


# --- how far ---


def pretraining(run: Path, text: str) -> None:
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("optim: {epochs: 3}\ntrain: {OFFICIAL_EPOCH_LENGTH: 30}\n")
    (run / "training_metrics.json").write_text(text)


PRETRAIN = ("pretrain", "c.yaml")
TRAIN = ("train", "c.yaml")


def test_progress_of_a_pretraining(tmp_path):
    pretraining(tmp_path, '{"iteration": 0, "iter_time": 9}\n{"iteration": 19, "iter_time": 0.5}\n')
    progress = run_progress(PRETRAIN, tmp_path)
    # 20 of 3 x 30 are done, the other 70 take half a second each.
    assert progress == RunProgress(20, 90, "iterations", 35.0)
    assert str(progress) == "20/90 (22 %)"


def test_a_checkpoint_may_be_newer_than_the_last_line(tmp_path):
    pretraining(tmp_path, '{"iteration": 19, "iter_time": 0.5}\n')
    (tmp_path / "ckpt" / "24").mkdir(parents=True)
    assert run_progress(PRETRAIN, tmp_path) == RunProgress(25, 90, "iterations", 32.5)


@pytest.mark.parametrize(
    "rest",
    ['{"iteration": 29, "iter_t', "\x00\x00", '{"iteration": 29, "evaluation": 1}\n', "[1]\n7\n"],
)
def test_lines_that_are_cut_or_of_something_else_are_passed_over(tmp_path, rest):
    pretraining(tmp_path, '{"iteration": 19, "iter_time": 0.5}\n' + rest)
    assert run_progress(PRETRAIN, tmp_path) == RunProgress(20, 90, "iterations", 35.0)


def test_the_last_line_of_a_long_file(tmp_path):
    """Only the end is read, which begins in the middle of a line."""
    line = '{"iteration": 1, "iter_time": 7, "note": "' + 1000 * "é" + '"}\n'
    pretraining(tmp_path, 100 * line + '{"iteration": 89, "iter_time": 0.5}\n')
    assert run_progress(PRETRAIN, tmp_path) == RunProgress(90, 90, "iterations", 0.0)


def test_progress_of_a_fine_tuning(tmp_path):
    (tmp_path / "config.yaml").write_text("schedule: {steps: 250}\n")
    lines(
        tmp_path / "metrics.jsonl",
        {"step": 40, "loss": 1, "crops_per_s": 16, "global_batch_size": 4},
        {"step": 50, "loss": 1, "crops_per_s": 8, "global_batch_size": 4},
        {"step": 50, "val_ap50": 0.3},  # a validation has no speed
    )
    # 200 steps of 4 crops at 8 crops a second.
    assert run_progress(TRAIN, tmp_path) == RunProgress(50, 250, "steps", 100.0)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000060.pt").touch()
    assert run_progress(TRAIN, tmp_path) == RunProgress(60, 250, "steps", 95.0)


@pytest.mark.parametrize("command", [PRETRAIN, TRAIN])
def test_no_progress_before_the_first_metrics(tmp_path, command):
    assert run_progress(command, tmp_path / "absent") is None
    (tmp_path / "training_metrics.json").write_text('{"iteration": 1, "iter_time": 1}\n')
    lines(tmp_path / "metrics.jsonl", {"step": 1, "crops_per_s": 1})
    assert run_progress(command, tmp_path) is None  # the configuration is not there yet
    for text in ("", "just text", "a: [b"):
        (tmp_path / "config.yaml").write_text(text)
        assert run_progress(command, tmp_path) is None
    (tmp_path / "config.yaml").write_text("optim: {epochs: 1}\nschedule: {steps: 2}\n")
    (tmp_path / "training_metrics.json").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "cro')
    assert run_progress(command, tmp_path) is None


def test_an_evaluation_tells_nothing(tmp_path):
    assert run_progress(("evaluate",), tmp_path) is None
    assert run_progress((), tmp_path) is None


def part_of_images(folder: Path, *, done: int, state: str = "running", before: int = 2) -> None:
    """A part of 10 images whose second start, at 1000 s, found `before` done."""
    (folder / "manifest.csv").write_text("place,bytes,path\n" + 10 * "0,1,/a.tif\n")
    lines(folder / "images.jsonl", *({"name": str(i)} for i in range(done)))
    starts = [start("7", 0, time=10.0), start("7", before, 1, time=1000.0)]
    write_record(folder, JobRecord(["shards"], state, "", starts))


def test_progress_of_a_part(tmp_path, monkeypatch):
    command = ("shards", "run", "out", "0")
    monkeypatch.setattr("time.time", lambda: 1030.0)
    part_of_images(tmp_path, done=5)
    # 3 images in 30 s since the last start: 5 more take 50 s.
    progress = run_progress(command, tmp_path)
    assert progress == RunProgress(5, 10, "images", 50.0)
    assert str(progress) == "5/10 (50 %)"
    part_of_images(tmp_path, done=2)  # nothing since the start: no speed is known
    assert run_progress(command, tmp_path) == RunProgress(2, 10, "images")
    part_of_images(tmp_path, done=5, state="stopped")
    assert run_progress(command, tmp_path) == RunProgress(5, 10, "images")


def test_progress_of_a_segmentation_without_a_list(tmp_path):
    command = ("segment", "plate", "-o", "out")
    assert run_progress(command, tmp_path) == RunProgress(0, None, "images")
    lines(tmp_path / "images.jsonl", {"name": "a"}, {"name": "b"})
    assert str(run_progress(command, tmp_path)) == "2 images"


def test_progress_of_a_merging_is_what_is_merged(tmp_path):
    """Its own folder has no images; those of the whole batch are in the journal that it writes."""
    command, folder = ("shards", "merge", str(tmp_path)), merging_folder(tmp_path)
    folder.mkdir(parents=True)
    assert run_progress(command, folder) is None
    lines(tmp_path / "images.jsonl", {"name": "a"}, {"name": "b"}, {"name": "c"})
    assert run_progress(command, folder) == RunProgress(3, None, "images")
    assert run_progress(command, merging_folder(tmp_path / "unlike")) is None
    part = shard_folder(tmp_path, 0)
    part.mkdir()
    assert run_progress(("shards", "run", str(tmp_path), "0"), part).done == 0


def test_nothing_of_nothing():
    assert str(RunProgress(0, 0, "images")) == "0/0"


# --- the user's submissions ---


def submission(job: str, cluster: str = "north", **changes: object) -> Submission:
    values = {"name": f"run-{job}", "run_dir": f"/runs/{job}", "log": f"/runs/{job}.out"} | changes
    return Submission(job=job, command=["train"], submitted=5.0, cluster=cluster, **values)


def registry() -> Path:
    return Path(os.environ["XDG_STATE_HOME"]) / "dinocell" / "jobs.jsonl"


def test_submissions_come_back_in_their_order():
    assert read_submissions() == []
    note_submission([submission("2_0"), submission("2_1")])
    note_submission([submission("1")])
    assert read_submissions() == [submission("2_0"), submission("2_1"), submission("1")]
    assert len(registry().read_text().splitlines()) == 3


def test_the_list_is_in_the_home_without_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    note_submission([submission("1")])
    assert (tmp_path / ".local/state/dinocell/jobs.jsonl").is_file()


def test_without_a_home_no_list_exists(monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    with pytest.raises(UsageError, match="set XDG_STATE_HOME"):
        note_submission([submission("1")])
    assert read_submissions() == []


def test_a_number_that_is_used_again_is_the_later_job():
    note_submission([submission("1", name="old"), submission("1", "south", name="other")])
    note_submission([submission("1", name="new")])
    assert [(item.cluster, item.name) for item in read_submissions()] == [
        ("north", "new"),
        ("south", "other"),
    ]


def test_damaged_lines_are_passed_over():
    note_submission([submission("1")])
    with registry().open("a") as file:
        file.write('{"job": "2"}\nnull\n7\nno json\n\n{"job": "3", "unknown": 1}\n')
    note_submission([submission("4")])
    assert [item.job for item in read_submissions()] == ["1", "4"]


def test_a_cut_line_costs_no_other():
    note_submission([submission("1")])
    with registry().open("a") as file:
        file.write('{"job": "2", "na')  # as a full disk leaves it
    note_submission([submission("3")])
    assert [item.job for item in read_submissions()] == ["1", "3"]


def test_a_damaged_byte_costs_no_other_line():
    note_submission([submission("1")])
    with registry().open("ab") as file:
        file.write(b"\xff\xfe\n")
    assert [item.job for item in read_submissions()] == ["1"]


def test_a_list_that_cannot_be_written_is_reported(monkeypatch, tmp_path):
    (tmp_path / "state").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(OSError, match="state"):
        note_submission([submission("1")])
    assert read_submissions() == []
