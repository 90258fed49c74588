"""The scripts of slurm/ for those who do without submitit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from slurm_cluster import last_iteration, wait_for

from dinocell.cluster.record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

FOLDER = Path(__file__).parents[2] / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
# Of the tests' cluster, whose cores are few.
HERE = ["--cpus-per-task=1", "--mem=800M", "--gres=none"]


@pytest.fixture(autouse=True)
def _dinocell_is_on_the_path(cluster, monkeypatch, tmp_path):
    launcher = tmp_path / "bin" / "dinocell"
    launcher.parent.mkdir()
    launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m dinocell "$@"\n')
    launcher.chmod(0o755)
    path = f"{launcher.parent}:{cluster.environment['PATH']}"
    monkeypatch.setitem(cluster.environment, "PATH", path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_slurm_would_take_it(cluster, tmp_path, script):
    """Its options are SLURM's; only the cores are asked down to the tests' node."""
    array = ["--array=0-1"] if "array" in script.name else []
    done = cluster.run(
        "sbatch", "--test-only", "--cpus-per-task=1", *array, str(script), "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_pretraining_with_two_processes_is_requeued(cluster, tmp_path, pretraining):
    run = tmp_path / "run"
    job = cluster.sbatch(
        *HERE, "--ntasks-per-node=2", str(FOLDER / "pretrain.sbatch"), str(pretraining),
        "-o", "run", cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: last_iteration(run) >= 5)
    cluster.make_room()
    wait_for(lambda: cluster.show(job)["Restarts"] == "1", what="the requeue")
    cluster.wait(job, "COMPLETED")
    log = (tmp_path / f"dinocell-pretrain-{job}.out").read_text()
    assert log.count("SIGUSR2 (preemption): the job continues") == 1
    assert "90 iterations of 6 samples (3 x 2 processes" in log
    assert (run / "eval" / "training_89" / "teacher_checkpoint.pth").is_file()
    assert 0 < read_record(run).starts[1].progress < 90
    rows = json.loads(cluster.dinocell("jobs", "--json", cwd=tmp_path).stdout)
    (row,) = [row for row in rows if row["job"] == job]
    assert row["state"] == "done"
    assert row["log"] == str(tmp_path / f"dinocell-pretrain-{job}.out")


def test_fine_tuning(cluster, tmp_path, fine_tuning):
    job = cluster.sbatch(
        *HERE, str(FOLDER / "train.sbatch"), str(fine_tuning), "schedule.steps=4",
        "schedule.eval_every=4", cwd=tmp_path,
    )  # fmt: skip
    cluster.wait(job, "COMPLETED")
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_array_and_merge(cluster, tmp_path):
    from dinocell.io import write_image

    rng = np.random.default_rng(1)
    for index in range(4):
        image = rng.integers(100, 900, (64, 64)).astype(np.uint16)
        write_image(tmp_path / "plate" / f"f{index}.tif", image)
    planned = cluster.dinocell("shards", "plan", "2", "plate", "-o", "out", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("4 images, 0.000 GB in 2 shards")
    job = cluster.sbatch(
        *HERE, "--array=0-1", str(FOLDER / "segment_array.sbatch"), "out", cwd=tmp_path
    )
    merging = cluster.sbatch(
        "--mem=800M", f"--dependency=afterany:{job}", str(FOLDER / "segment_merge.sbatch"), "out",
        cwd=tmp_path,
    )  # fmt: skip
    cluster.wait(merging, "COMPLETED")
    assert len((tmp_path / "out" / "summary.csv").read_text().splitlines()) == 5
    status = cluster.dinocell("shards", "status", "out", cwd=tmp_path).stdout
    assert status.splitlines() == [f"shard {i}: 2 of 2 images done" for i in range(2)]
    rows = json.loads(cluster.dinocell("jobs", "out", "--json", cwd=tmp_path).stdout)
    assert {(row["job"], row["state"]) for row in rows} == {
        (f"{job}_0", "done"), (f"{job}_1", "done"), (merging, "done"),
    }  # fmt: skip
    lost = cluster.sbatch(*HERE, str(FOLDER / "segment_array.sbatch"), "out", cwd=tmp_path)
    cluster.wait(lost, "FAILED")  # without --array
