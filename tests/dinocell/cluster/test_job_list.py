"""`dinocell jobs`: what became of each submission, from its record, its files and SLURM's answers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dinocell.cli import main
from dinocell.cluster.jobs import jobs_text, list_jobs
from dinocell.cluster.record import JobRecord, Start, Submission, note_submission, write_record
from dinocell.errors import UsageError

DAY_S = 86_400


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """A function that notes a submission of a fine-tuning and returns its folder."""
    monkeypatch.chdir(tmp_path)

    def note(job: str, *, folder: str = "", days_ago: float = 0.0, cluster: str = "north") -> Path:
        run = tmp_path / (folder or f"run{job}")
        item = Submission(
            job, f"train-{job}", ["train", "c.yaml"], str(run), f"/log/{job}.out",
            time.time() - days_ago * DAY_S, cluster,
        )  # fmt: skip
        note_submission([item])
        return run

    return note


def record(run: Path, state: str, *jobs: str, reason: str = "", restart: int = 0) -> None:
    starts = [Start(job, restart, 0, 1.0, "node1") for job in jobs]
    write_record(run, JobRecord(["train", "c.yaml"], state, reason, starts))


def only_row():
    (row,) = list_jobs()
    return row


def test_no_jobs(slurm):
    assert list_jobs() == []
    assert "in the last week: submit one with `dinocell submit`" in jobs_text([])
    assert "week" not in jobs_text([], everything=True)


def test_a_job_that_waits(slurm, submitted):
    run = submitted("7")
    slurm.job("7", JobState="PENDING", Reason="Priority")
    row = only_row()
    assert (row.job, row.name, row.state) == ("7", "train-7", "pending")
    assert row.reason == "others come first (Priority)"
    assert (row.progress, row.eta_s, row.restarts) == ("", None, 0)
    assert (row.run_dir, row.log) == (str(run), "/log/7.out")


def test_a_job_that_waits_again_tells_why(slurm, submitted):
    record(submitted("7"), "requeued", "7", reason="SIGUSR2 (preemption): the job continues")
    slurm.job("7", JobState="PENDING", Reason="BeginTime", Restarts=1)
    row = only_row()
    assert (
        row.reason
        == "SIGUSR2 (preemption): the job continues; starts again in a moment (BeginTime)"
    )
    assert (row.state, row.restarts) == ("pending", 1)


def test_a_job_that_runs_with_progress_and_time_left(slurm, submitted):
    run = submitted("7")
    record(run, "running", "7")
    (run / "config.yaml").write_text("schedule: {steps: 1000}\n")
    (run / "metrics.jsonl").write_text(
        '{"step": 250, "crops_per_s": 2.0, "global_batch_size": 8}\n{"step": 26'
    )
    slurm.job("7", JobState="RUNNING", Restarts=2)
    row = only_row()
    # 750 steps of 8 crops at 2 a second.
    assert (row.state, row.progress, row.eta_s) == ("running", "250/1000 (25 %)", 3000.0)
    assert (row.restarts, row.reason) == (2, "")
    assert "0:50:00" in jobs_text([row])
    slurm.job("7", JobState="PENDING", Reason="Resources")  # it makes no progress: no time is shown
    assert (only_row().progress, only_row().eta_s) == ("250/1000 (25 %)", None)


def test_a_job_that_is_done(slurm, submitted):
    record(submitted("7"), "done", "7")
    slurm.job("7", JobState="COMPLETED")
    assert (only_row().state, only_row().reason) == ("done", "")


def test_a_job_that_is_done_and_that_slurm_has_forgotten(slurm, submitted):
    record(submitted("7"), "done", "7", restart=3)
    slurm.answer("sacct", code=1)
    assert (only_row().state, only_row().restarts) == ("done", 3)


@pytest.mark.parametrize("state", ["failed", "out_of_memory", "stalled", "stopped"])
def test_a_job_that_failed_tells_why(slurm, submitted, state):
    record(submitted("7"), state, "7", reason="the folder must exist, got none: make it")
    slurm.job("7", JobState="FAILED", Reason="NonZeroExitCode")
    assert (only_row().state, only_row().reason) == (
        state,
        "the folder must exist, got none: make it",
    )


@pytest.mark.parametrize(
    ("slurms", "sentence"),
    [
        ("CANCELLED", "it was cancelled"),
        ("TIMEOUT", "the time limit was reached before the work could save itself"),
        ("NODE_FAIL", "its node died"),
        ("OUT_OF_MEMORY", "it ran out of memory: raise mem, or lower batch size and workers"),
        ("COMPLETED", ""),
        ("FAILED", "it ended with an error before it could write down why: see its log"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_job_that_was_ended_before_it_could_write(slurm, submitted, slurms, sentence, recorded):
    run = submitted("7")
    if recorded:
        record(run, "running", "7")
    slurm.job("7", JobState=slurms, Reason="NonZeroExitCode")
    assert (only_row().state, only_row().reason) == (slurms.lower(), sentence)


def test_a_job_that_is_lost(slurm, submitted):
    record(submitted("7"), "running", "7")
    submitted("8")  # without a record
    slurm.answer("sacct", "")
    lost, unknown = list_jobs()
    assert (lost.state, lost.reason) == (
        "lost",
        "SLURM no longer knows it; its last known state is running",
    )
    assert unknown.state == "unknown"
    assert "see its log" in unknown.reason


def test_another_job_has_continued_in_the_folder(slurm, submitted):
    run = submitted("7", folder="shared")
    submitted("9", folder="shared")
    record(run, "done", "7", "9")
    slurm.answer("sacct", "9|COMPLETED||\n")
    assert [row.job for row in list_jobs()] == ["9"]
    first, second = list_jobs(everything=True)
    assert (first.state, first.reason) == ("ended", "another job has continued in its folder")
    assert (second.state, second.reason) == ("done", "")
    # What the second has done is not the first one's progress.
    assert first.progress == ""


def test_what_a_job_came_to_stays(slurm, submitted):
    """Also when a later one has gone on with its folder."""
    run = submitted("7", folder="shared")
    submitted("9", folder="shared")
    ends = {"7": ("cancelled", "it was saved", "2/18 (11 %)")}
    starts = [Start(job, 0, 0, 0.0, "node") for job in ("7", "9")]
    write_record(run, JobRecord(["train", "c.yaml"], "running", "", starts, ends))
    slurm.job("9")
    slurm.answer("sacct", "7|CANCELLED||\n")
    first, second = list_jobs(everything=True)
    assert (first.state, first.reason, first.progress) == ends["7"]
    assert second.state == "running"
    assert not any("7" in call for call in slurm.calls() if call.startswith("scontrol show job"))


def test_jobs_of_a_folder(slurm, submitted, tmp_path):
    submitted("1", folder="a")
    submitted("2", folder="a/shards/0001")
    submitted("3", folder="ab")
    slurm.answer("sacct", "")
    assert [row.job for row in list_jobs(folder=tmp_path / "a")] == ["1", "2"]
    assert len(list_jobs(folder=tmp_path)) == 3


def test_a_cancelled_job_before_it_ran_keeps_out_of_the_folder_of_another(slurm, submitted):
    run = submitted("7", folder="shared")
    submitted("9", folder="shared")
    record(run, "failed", "7", reason="an accident")
    slurm.answer("sacct", "9|CANCELLED by 0||\n")
    first, second = list_jobs(everything=True)
    assert (first.state, first.reason) == ("failed", "an accident")
    assert (second.state, second.reason) == ("cancelled", "it was cancelled")


def test_older_than_a_week(slurm, submitted):
    submitted("1", days_ago=7.1)
    submitted("2", days_ago=6.9)
    slurm.answer("sacct", "")
    assert [row.job for row in list_jobs()] == ["2"]
    assert [row.job for row in list_jobs(everything=True)] == ["1", "2"]


def test_jobs_of_another_cluster_are_another_list(slurm, submitted):
    record(submitted("7", folder="north"), "done", "7")
    submitted("7", folder="south", cluster="south")
    submitted("8", cluster="")
    slurm.answer("sacct", "")
    assert [(row.job, row.state) for row in list_jobs()] == [("7", "done")]
    # What has its end on record is not asked for, and the others are not this cluster's.
    assert slurm.calls() == ["scontrol show config"]


def test_an_old_job_that_still_runs_is_listed(slurm, submitted):
    """A long pretraining is requeued for weeks."""
    record(submitted("7", days_ago=20), "running", "7")
    submitted("8", days_ago=20)
    slurm.job("7", JobState="RUNNING")
    slurm.answer("sacct", "8|COMPLETED|None\n")
    assert [row.job for row in list_jobs()] == ["7"]
    assert [row.job for row in list_jobs(everything=True)] == ["7", "8"]


def test_without_slurm_states_come_from_the_records(no_slurm, submitted):
    """On a laptop that shares the folders: what is written down, and no question to anyone."""
    record(submitted("7"), "done", "7")
    record(submitted("8", cluster="south"), "running", "8")
    assert [(row.job, row.state) for row in list_jobs()] == [("7", "done"), ("8", "lost")]


# --- from the command line ---


def jobs(capsys, *arguments: str) -> str:
    main_exits(["jobs", *arguments])
    return capsys.readouterr().out


def main_exits(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert not stop.value.code


@pytest.fixture
def two(slurm, submitted):
    record(submitted("7", folder="runs/a"), "failed", "7", reason="no such folder")
    submitted("11_3", folder="runs/b")
    slurm.answer(
        "scontrol show job -o 11",
        "JobId=14 ArrayJobId=11 ArrayTaskId=3 JobState=RUNNING Reason=None Restarts=1\n",
    )
    slurm.answer("sacct", "7|FAILED||\n")
    submitted("5", days_ago=30)


def test_the_table(two, capsys):
    assert jobs(capsys).splitlines() == [
        "job   name        state    progress  left  requeues  run",
        "7     train-7     failed                   0         runs/a",
        "    no such folder",
        "11_3  train-11_3  running                  1         runs/b",
    ]


def test_the_table_of_a_folder(two, capsys):
    assert [line.split()[0] for line in jobs(capsys, "runs/b").splitlines()] == ["job", "11_3"]


def test_an_empty_table_names_the_option_for_older_jobs(slurm, capsys):
    assert "; set --all to list older jobs." in jobs(capsys)


def test_json(two, capsys, tmp_path):
    rows = json.loads(jobs(capsys, "--json"))
    assert [row["job"] for row in rows] == ["7", "11_3"]
    assert rows[0] == {
        "job": "7", "name": "train-7", "state": "failed", "progress": "", "eta_s": None,
        "restarts": 0, "reason": "no such folder", "run_dir": str(tmp_path / "runs/a"),
        "log": "/log/7.out",
    }  # fmt: skip
    everything = json.loads(jobs(capsys, "--json", "--all"))
    assert [row["job"] for row in everything] == ["7", "11_3", "5"]


def test_folders_elsewhere_have_their_whole_path(two, capsys, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert str(tmp_path / "runs/a") in jobs(capsys)


def test_without_a_home_a_sentence_replaces_the_list(monkeypatch, capsys):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    with pytest.raises(SystemExit, match="2"):
        main(["jobs"])
    assert "set XDG_STATE_HOME to the folder" in capsys.readouterr().err


@pytest.mark.usefixtures("slurm")
def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    assert list_jobs(folder=tmp_path) == []
    with pytest.raises(UsageError, match=r"`folder` must be a folder that exists, got .*nowhere"):
        list_jobs(folder=tmp_path / "nowhere")
