"""Jobs on a real SLURM: they finish, survive being cut, and say what became of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from slurm_cluster import last_iteration, log_of, losses, processes_of, teacher, wait_for

from dinocell.cluster.record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def test_submit_follow_and_list(cluster, tmp_path, pretraining):
    """From the submission to the teacher's file, with a follower that sees the log."""
    done = cluster.dinocell(
        "submit", "pretrain", str(pretraining), "optim.epochs=1", "-o", "run",
        "--set", "cpus_per_gpu=1", "--set", "mem=800M", "--set", "environment.COLOUR=red",
        "--set", "setup=[echo colour $COLOUR]", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    assert f"cancel: scancel {job}" in done.stdout
    assert f"follow: tail -F {tmp_path}/run/slurm/{job}_0_log.out" in done.stdout
    rows = json.loads(cluster.dinocell("jobs", "--json", cwd=tmp_path).stdout)
    (row,) = [row for row in rows if row["job"] == job]
    assert row["state"] in ("pending", "running", "configuring")
    wait_for(lambda: "of 3 samples" in log_of(tmp_path / "run"), what="the log")
    assert cluster.wait(job, "COMPLETED")["JobName"] == "ssl-run"
    assert "colour red" in log_of(tmp_path / "run")
    assert (tmp_path / "run/eval/training_29/teacher_checkpoint.pth").is_file()
    listed = cluster.dinocell("jobs", cwd=tmp_path).stdout
    assert any(
        line.split()[:4] == [job, "ssl-run", "done", "30/30"] for line in listed.splitlines()
    ), listed


def test_preempted_by_usr2(cluster, tmp_path, pretraining, whole):
    """Two preemptions: the run is bit for bit the one that was left alone, in one wandb run."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), "wandb.enabled=true", "-o", "run", cwd=tmp_path
    )
    for after in (5, 40):
        wait_for(lambda after=after: last_iteration(run) >= after, what=f"iteration {after}")
        before = int(cluster.show(job)["Restarts"])
        urgent = cluster.make_room()
        wait_for(lambda n=before: int(cluster.show(job)["Restarts"]) > n, what="the requeue")
        cluster.wait(urgent, "COMPLETED", "COMPLETING")
    cluster.wait(job, "COMPLETED")
    reference = teacher(whole)
    assert all(torch.equal(value, reference[name]) for name, value in teacher(run).items())
    assert losses(run).keys() >= {0, 10, 50, 80, 89}  # one file, which continues
    log = log_of(run)
    assert log.count("SIGUSR2 (preemption)") == 2
    assert "Traceback" not in log
    record = read_record(run)
    assert [start.restart for start in record.starts] == [0, 1, 2]
    assert 0 < record.starts[1].progress < record.starts[2].progress < 90
    assert record.state == "done"
    # Lines are medians of the last steps: equal until the first cut.
    expected = losses(whole)
    early = [it for it in losses(run) if it < record.starts[1].progress and it in expected]
    assert early
    assert all(losses(run)[iteration] == expected[iteration] for iteration in early)
    identities = {path.name.split("-")[-1] for path in (run / "wandb").glob("offline-run-*")}
    assert identities == {(run / "wandb_run_id.txt").read_text().strip()}


def test_preempted_by_sigterm_only(term_cluster, tmp_path, fine_tuning):
    """The signal that submitit ignores: a fine-tuning saves itself and continues, bit for bit."""
    done = term_cluster.dinocell("train", str(fine_tuning), "output_dir=whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tuned"
    job = term_cluster.submit("train", str(fine_tuning), cwd=tmp_path)
    wait_for(lambda: len((run / "metrics.jsonl").read_text().splitlines()) > 10)
    term_cluster.make_room()
    wait_for(lambda: int(term_cluster.show(job)["Restarts"]) == 1, what="the requeue")
    record = read_record(run)
    assert record.starts[0].progress == 0
    assert "SIGTERM (preemption)" in log_of(run)
    term_cluster.wait(job, "COMPLETED")
    record = read_record(run)
    assert 10 <= record.starts[1].progress < 120
    assert (run / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 121))


def test_time_limit(cluster, tmp_path, pretraining):
    """USR2 comes ahead of the limit; the job is requeued and continues."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), "train.OFFICIAL_EPOCH_LENGTH=2000", "-o", "run",
        "--time", "3", "--set", "signal_ahead_s=60", cwd=tmp_path,
    )  # fmt: skip
    # On a slow machine the first signals may come before there is anything to save.
    wait_for(
        lambda: int(cluster.show(job)["Restarts"]) >= 1 and list((run / "ckpt").glob("[0-9]*")),
        what="the requeue",
    )
    log = log_of(run)
    assert "SIGUSR2 (time limit or request): the job continues" in log
    saved = max(int(path.name) for path in (run / "ckpt").iterdir() if path.name.isdigit())
    wait_for(lambda: last_iteration(run) > saved, what="iterations after the requeue")
    assert f"continuing with iteration {saved + 1}" in log_of(run)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_for(lambda: read_record(run).state == "cancelled")


def test_scancel_saves_and_is_final(cluster, tmp_path, pretraining):
    """A cancelled job leaves a checkpoint, is not requeued; submitting again continues."""
    run = tmp_path / "run"
    job = cluster.submit("pretrain", str(pretraining), "-o", "run", cwd=tmp_path)
    wait_for(lambda: last_iteration(run) >= 5)
    cluster.run("scancel", job)
    cluster.wait(job, "CANCELLED")
    wait_for(lambda: read_record(run).state == "cancelled")
    (checkpoint,) = (run / "ckpt").glob("[0-9]*")
    assert int(checkpoint.name) >= 5
    (row,) = [
        row
        for row in json.loads(cluster.dinocell("jobs", "--json", cwd=tmp_path).stdout)
        if row["job"] == job
    ]
    assert row["state"] == "cancelled"
    assert "submit it again to continue" in row["reason"]
    again = cluster.submit("pretrain", str(pretraining), "-o", "run", cwd=tmp_path)
    cluster.wait(again, "COMPLETED")
    record = read_record(run)
    assert [start.job for start in record.starts] == [job, again]
    assert record.starts[1].progress == int(checkpoint.name) + 1


@pytest.mark.slow
def test_node_dies(cluster, tmp_path, pretraining, whole):
    """Nothing can be saved at the end: the run continues from its last periodic checkpoint, exactly."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), "checkpointing.period=10", "-o", "run", cwd=tmp_path
    )
    wait_for(lambda: last_iteration(run) >= 20)
    node = cluster.run("sinfo", "-h", "-o", "%n").stdout.split()[0]
    frozen = processes_of(job)
    assert len(frozen) >= 2
    for number in frozen:  # as if the power had gone: no handler runs any more
        os.kill(number, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    try:
        wait_for(lambda: cluster.show(job)["Restarts"] == "1", what="the requeue")
        for number in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        # A node that comes back has nothing of the job left, else SLURM drains it.
        daemon = f"slurmstepd: [{job}."
        wait_for(lambda: daemon not in cluster.run("ps", "-eo", "args").stdout, what="its end")
    finally:
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.wait(job, "COMPLETED")
    record = read_record(run)
    assert record.starts[1].progress % 10 == 0
    assert record.starts[1].progress >= 20
    reference = teacher(whole)
    assert all(torch.equal(value, reference[name]) for name, value in teacher(run).items())


# Modules that a training loads through ssl_evaluation.hook, for things that go wrong in it.
OUT_OF_MEMORY = """
import os, signal, threading
def make(cfg):
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return lambda *rest: {}
"""
DEAD_RANK = """
import os, threading
def make(cfg):
    if os.environ["SLURM_PROCID"] == "1":
        def explode(*rest):
            raise RuntimeError("this process has an accident")
        import dinov3.train.train as train
        assert train.forward_backward_all
        train.forward_backward_all = explode
    return lambda *rest: {}
"""
HOOK = ("ssl_evaluation.period_iterations=1000", "ssl_evaluation.hook=accident:make")


def with_module(cluster, folder: Path, text: str, name: str = "accident") -> str:
    (folder / f"{name}.py").write_text(text)
    path = f"{folder}:{cluster.environment['PYTHONPATH']}"
    return f"environment.PYTHONPATH={path}"


def test_out_of_memory_is_reported_and_not_repeated(cluster, tmp_path, pretraining):
    """What the kernel does to a process that takes too much: SIGKILL from nowhere."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), *HOOK, "-o", "run",
        "--set", with_module(cluster, tmp_path, OUT_OF_MEMORY), cwd=tmp_path,
    )  # fmt: skip
    assert cluster.wait(job, "FAILED", "COMPLETED")["Restarts"] == "0"
    record = read_record(run)
    assert record.state == "out_of_memory"
    assert "raise mem, or lower batch size" in record.reason
    assert "raise mem, or lower batch size" in cluster.dinocell("jobs", cwd=tmp_path).stdout


def test_failure_is_reported_and_not_repeated(cluster, tmp_path, pretraining):
    job = cluster.submit(
        "pretrain", str(pretraining), "train.dataset_path=ImageFolder:root=/nowhere",
        "-o", "run", "--no-look", cwd=tmp_path,
    )  # fmt: skip
    assert cluster.wait(job, "FAILED")["ExitCode"] == "2:0"
    listed = cluster.dinocell("jobs", cwd=tmp_path).stdout
    assert "must be a folder, got /nowhere" in listed


@pytest.mark.slow
def test_requeues_without_progress_end(cluster, tmp_path, pretraining):
    """A job that is requeued again and again before it saves anything is given up."""
    run = tmp_path / "run"
    run.mkdir()
    job = cluster.submit(
        "pretrain", str(pretraining), "-o", "run", "--set", "max_stalled_starts=2", cwd=tmp_path
    )
    for count in (1, 2):
        wait_for(lambda n=count: len(read_record(run).starts) == n, what=f"start {count}")
        cluster.run("scontrol", "requeue", job)  # as after the death of a node, with no checkpoint
        wait_for(lambda n=count: cluster.show(job)["Restarts"] == str(n))
        for path in (run / "ckpt").glob("*"):  # a node that died would not have saved
            path.rename(tmp_path / f"saved_{count}")
    cluster.wait(job, "FAILED")
    record = read_record(run)
    assert record.state == "stalled"
    assert len(record.starts) == 2
    assert "got 2 starts" in record.reason


@pytest.mark.slow
def test_two_processes_by_srun(cluster, tmp_path, pretraining):
    """srun starts both; one file of each kind, written by the first."""
    job = cluster.submit(
        "pretrain", str(pretraining), "optim.epochs=1", "-o", "run",
        "--set", "tasks_per_node=2", cwd=tmp_path,
    )  # fmt: skip
    cluster.wait(job, "COMPLETED")
    text = (tmp_path / "run" / "slurm" / f"{job}_0_log.out").read_text()
    assert "30 iterations of 6 samples (3 x 2 processes x 1 accumulated)" in text
    assert list(losses(tmp_path / "run")) == [0, 10, 20, 29]
    assert len(read_record(tmp_path / "run").starts) == 1


def test_dead_process_ends_the_job(cluster, tmp_path, pretraining):
    """One of two processes fails: the job ends at once, with the reason of that one."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), *HOOK, "-o", "run", "--set", "tasks_per_node=2",
        "--set", with_module(cluster, tmp_path, DEAD_RANK), cwd=tmp_path,
    )  # fmt: skip
    cluster.wait(job, "FAILED")
    second = (run / "slurm" / f"{job}_1_log.out").read_text()
    assert "Traceback" in second
    assert "this process has an accident" in second
    wait_for(lambda: read_record(run).state == "failed")
    assert read_record(run).reason.startswith("process 1 of 2: this process has an accident")
    assert cluster.show(job)["Restarts"] == "0"


def test_killed_process_ends_the_job(cluster, tmp_path, pretraining):
    """A process that dies without a word does not leave the other waiting."""
    run = tmp_path / "run"
    job = cluster.submit(
        "pretrain", str(pretraining), "-o", "run", "--set", "tasks_per_node=2", cwd=tmp_path
    )
    wait_for(lambda: last_iteration(run) >= 1)
    victims = [
        number
        for number in processes_of(job, rank=1)
        if b"-m\0dinocell\0" in Path(f"/proc/{number}/cmdline").read_bytes()
    ]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    cluster.wait(job, "FAILED")
    wait_for(lambda: read_record(run).state != "running")
    assert read_record(run).reason.startswith("process 1 of 2:")


def test_array_of_a_table(cluster, tmp_path, pretraining):
    """One task a line, each in its folder with its values."""
    (tmp_path / "sweep.csv").write_text("name,optim.lr,train.seed\nlow,1e-4,0\nhigh,1e-3,1\n")
    done = cluster.dinocell(
        "submit", "pretrain", str(pretraining), "optim.epochs=1", "-o", "sweep",
        "--array", "sweep.csv", "--set", "cpus_per_gpu=1", "--set", "mem=800M", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1].rstrip(":")
    after = cluster.submit(
        "evaluate", "--pred", "p", "--truth", "t", "--dependency", f"afterany:{job}", cwd=tmp_path
    )
    assert (
        f"{job}_" in cluster.show(after)["Dependency"] or job in cluster.show(after)["Dependency"]
    )
    for task in (0, 1):
        cluster.wait(f"{job}_{task}", "COMPLETED")
    rates = []
    for label in ("low", "high"):
        assert (tmp_path / "sweep" / label / "eval/training_29/teacher_checkpoint.pth").is_file()
        values = yaml.safe_load((tmp_path / "sweep" / label / "config.yaml").read_text())
        rates.append((values["optim"]["lr"], values["train"]["seed"]))
    assert rates == [(1e-4, 0), (1e-3, 1)]
    assert cluster.wait(after, "FAILED")["JobState"] == "FAILED"  # there is no such folder
    rows = json.loads(cluster.dinocell("jobs", "--json", cwd=tmp_path).stdout)
    states = {row["job"]: row["state"] for row in rows}
    assert states[f"{job}_0"] == states[f"{job}_1"] == "done"


def test_options_that_slurm_refuses(cluster, tmp_path, pretraining):
    """The message gives SLURM's own reason and leaves no file; a job that could never start is reported."""
    command = ["submit", "pretrain", str(pretraining), "-o", "run", "--set"]
    done = cluster.dinocell(*command, "partition=gpuu", "--set", "cpus_per_gpu=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "got a refusal (invalid partition specified: gpuu" in done.stderr
    assert "partitions here are train, urgent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for option in ("cpus_per_gpu=99", "gres=gpu:h100:8"):
        done = cluster.dinocell(*command, option, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "As things are, SLURM would not start it" in done.stdout
        cluster.run("scancel", done.stdout.split()[1])


@pytest.mark.slow
def test_gpu_of_the_site(cluster, tmp_path, pretraining):
    """The A100 profile of slurm/sites, but for the names of this cluster."""
    job = cluster.submit(
        "pretrain", str(pretraining), "optim.epochs=1", "-o", "run",
        "--site", str(Path(__file__).parents[2] / "slurm/sites/a100.yaml"),
        "--set", "partition=train", "--set", "setup=[echo devices $CUDA_VISIBLE_DEVICES]",
        "--time", "10", cwd=tmp_path,
    )  # fmt: skip
    cluster.wait(job, "COMPLETED")
    assert "devices 0" in log_of(tmp_path / "run")
    assert "gpu:a100:1" in (tmp_path / "run" / "slurm" / f"{job}_submission.sh").read_text()


@pytest.fixture(scope="module")
def plate(tmp_path_factory) -> Path:
    """Eighteen images and one that is none."""
    from dinocell.io import write_image

    folder = tmp_path_factory.mktemp("plate")
    rng = np.random.default_rng(5)
    rows, columns = np.mgrid[:96, :96]
    for index in range(18):
        image = rng.normal(200, 10, (96, 96))
        for row, column in rng.uniform(12, 84, (6, 2)):
            image[np.hypot(rows - row, columns - column) < 8] += 900
        write_image(folder / f"field{index:02d}.tif", image.clip(0).astype(np.uint16))
    (folder / "broken.tif").write_bytes(b"II*\0not an image")
    return folder


def results(out: Path) -> dict[str, bytes]:
    """Everything but the parts' own files; the journal without its order."""
    found = {}
    for path in sorted(p for p in out.iterdir() if p.is_file()):
        data = path.read_bytes()
        found[path.name] = (
            b"\n".join(sorted(data.splitlines())) if path.name == "images.jsonl" else data
        )
    return found


@pytest.fixture(scope="module")
def alone(cluster, plate, tmp_path_factory) -> Path:
    """What one process makes of the plate."""
    out = tmp_path_factory.mktemp("alone")
    done = cluster.dinocell("segment", str(plate), "-o", str(out))
    assert done.returncode == 1, done.stderr  # one image is broken
    return out


@pytest.mark.slow
def test_segment_without_shards_is_requeued(cluster, tmp_path, plate, alone):
    """Its next start continues, although the command has no --resume."""
    job = cluster.submit("segment", str(plate), "-o", "out", cwd=tmp_path)
    journal = tmp_path / "out" / "images.jsonl"
    wait_for(lambda: len(journal.read_text().splitlines()) >= 3)
    cluster.run("scontrol", "requeue", job)
    wait_for(lambda: cluster.show(job)["Restarts"] == "1")
    cluster.wait(job, "FAILED")  # one image is broken
    log = log_of(tmp_path / "out")
    assert "done before) →" in log
    found = results(tmp_path / "out")
    record = json.loads(found.pop("job.json"))
    assert record["starts"][1]["progress"] >= 3
    assert found == results(alone)


@pytest.mark.slow
def test_one_job_a_run(cluster, tmp_path, pretraining):
    """A second job of the same folder is refused when it is submitted, and should it start."""
    run = tmp_path / "run"
    job = cluster.submit("pretrain", str(pretraining), "-o", "run", cwd=tmp_path)
    again = cluster.dinocell("submit", "pretrain", str(pretraining), "-o", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert f"which job {job} uses" in again.stderr
    wait_for(lambda: last_iteration(run) >= 1)
    frozen = processes_of(job)  # so that it does not end before the second one starts
    for number in frozen:
        os.kill(number, signal.SIGSTOP)
    try:
        second = cluster.submit(
            "pretrain", str(pretraining), "-o", "run", "--dependency", f"after:{job}", cwd=tmp_path
        )
        cluster.wait(second, "FAILED")
    finally:
        for number in frozen:
            os.kill(number, signal.SIGCONT)
    assert f"where job {job} is running" in (run / "slurm" / f"{second}_0_log.out").read_text()
    cluster.wait(job, "COMPLETED")
    assert {start.job for start in read_record(run).starts} == {job}


@pytest.mark.slow
def test_container_without_scontrol(cluster, tmp_path, pretraining):
    """The job's script requeues it."""
    run = tmp_path / "run"
    empty = tmp_path / "bin"
    empty.mkdir()
    job = cluster.submit(
        "pretrain", str(pretraining), "-o", "run", "--set", f"container=env PATH={empty}",
        "--set", f"python={sys.executable}", cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: last_iteration(run) >= 5)
    cluster.make_room()
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", what="the requeue")
    cluster.wait(job, "COMPLETED")
    assert 5 < read_record(run).starts[1].progress < 90
    assert not list((run / "slurm").glob("requeue_*"))


# The first start of task 0 comes to its third image and no further.
IN_THE_MIDDLE = """
import os, sys
from pathlib import Path
middle = Path(__file__).with_name("middle")
shard = sys.orig_argv[-4:-2] == ["shards", "run"]
if shard and os.environ.get("SLURM_ARRAY_TASK_ID") == "0" and not middle.exists():
    import threading
    import dinocell.batch.run as batch
    note_start, names = batch.note_start, []
    def stop_at_the_third(folder, name):
        names.append(name)
        if len(names) == 3:
            middle.touch()
            threading.Event().wait()
        note_start(folder, name)
    batch.note_start = stop_at_the_third
"""


def test_array_over_images_with_killed_tasks(cluster, tmp_path, plate, alone):
    """Tasks that are killed and run again: every file is what one process alone would have written."""
    done = cluster.dinocell(
        "submit", "segment", str(plate), "-o", "out", "--shards", "3",
        "--set", "cpus_per_gpu=1", "--set", "mem=800M",
        "--set", with_module(cluster, tmp_path, IN_THE_MIDDLE, "sitecustomize"), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    waiting = json.loads(cluster.dinocell("jobs", "--json", cwd=tmp_path).stdout)
    known = {row["state"] for row in waiting if row["run_dir"].startswith(str(tmp_path))}
    assert known <= {"pending", "running", "configuring"}, known
    job, merging = (
        line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("job ")
    )
    shards = tmp_path / "out" / "shards"
    wait_for(lambda: (tmp_path / "middle").exists())
    wait_for(lambda: (shards / "0000" / "images.jsonl").read_text().count("\n") >= 1)
    wait_for(lambda: (shards / "0001" / "images.jsonl").read_text().count("\n") >= 1)
    cluster.run("scontrol", "requeue", f"{job}_1")
    cluster.run("scancel", "--signal=KILL", f"{job}_0")
    for task in range(3):
        cluster.wait(f"{job}_{task}", "COMPLETED", "FAILED", "CANCELLED")
    assert cluster.show(f"{job}_0")["JobState"] != "COMPLETED"
    assert cluster.show(f"{job}_1")["JobState"] == "COMPLETED"
    cluster.wait(merging, "FAILED")  # it says what is missing
    assert "images of shard 0" in log_of(shards / "merge")
    summary = (tmp_path / "out" / "summary.csv").read_text()
    assert "not done: shard 0 is not finished" in summary
    again = cluster.dinocell(
        "submit", "segment", str(plate), "-o", "out", "--shards", "3",
        "--set", "cpus_per_gpu=1", "--set", "mem=800M", cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "job " in again.stdout
    merging = [x.split()[1] for x in again.stdout.splitlines() if x.startswith("job ")][-1]
    cluster.wait(merging, "COMPLETED")
    expected, found = results(alone), results(tmp_path / "out")
    cells = found.pop("cells.csv")
    assert found.keys() == expected.keys()
    assert found == expected
    assert cells.count(b"\n") - 1 == sum(
        data.count(b"\n") - 1 for name, data in expected.items() if name.endswith("_cells.csv")
    )
    assert b"broken" in found["summary.csv"]


@pytest.mark.slow
def test_signal_before_anything_listens(cluster, tmp_path, pretraining):
    """A job that is signalled while Python is still starting is not lost."""
    job = cluster.submit("pretrain", str(pretraining), "optim.epochs=1", "-o", "run", cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    wait_for(lambda: processes_of(job), what="the task")
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait(job, "COMPLETED")


@pytest.mark.slow
def test_jobs_that_the_controller_has_forgotten(accounting_cluster, tmp_path):
    """`sacct` of this release understands the question; it installs a database."""
    one = accounting_cluster.sbatch("-o", "/dev/null", "--wrap", "sleep 1")
    array = accounting_cluster.sbatch("-o", "/dev/null", "--array=0-1", "--wrap", "exit 3")
    accounting_cluster.wait(f"{array}_1", "FAILED")
    accounting_cluster.wait(one, "COMPLETED")
    jobs = [one, f"{array}_0", f"{array}_1", "99"]
    code = (
        "import dinocell.cluster.slurm as s; ask = s._ask\n"
        "s._ask = lambda c: (1, '', '') if c[0] == 'scontrol' else ask(c)\n"
        f"print({{job: state.state for job, state in s.job_states({jobs}).items()}})"
    )
    wait_for(
        lambda: (
            accounting_cluster.run(sys.executable, "-c", code).stdout.strip()
            == str({one: "COMPLETED", f"{array}_0": "FAILED", f"{array}_1": "FAILED"})
        ),
    )
