"""Jobs on two nodes of a real SLURM, and on one of two that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from slurm_cluster import (
    last_iteration,
    log_of,
    losses,
    processes_on,
    teacher,
    uninterrupted,
    wait_for,
)

from dinocell.cluster.record import read_record

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture
def by_torchrun(two_nodes, pretraining, tmp_path) -> Path:
    """The same pretraining in two processes of one machine."""
    out = tmp_path / "by_torchrun"
    done = two_nodes.run(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
        "dinocell", "pretrain", str(pretraining), "-o", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def power_cut(cluster, node: str, job: str) -> None:
    """Nothing of a node runs any more: neither its daemon nor a process of the job."""
    daemons = [
        number
        for number in map(int, cluster.run("pgrep", "-x", "slurmd").stdout.split())
        if f"-N\0{node}\0-f\0{cluster.folder}/".encode()
        in Path(f"/proc/{number}/cmdline").read_bytes()
    ]
    assert len(daemons) == 1
    frozen = processes_on(node, job)
    assert len(frozen) >= 2
    keepers = {parent_of(number) for number in frozen} - set(frozen)
    for number in [*daemons, *keepers, *frozen]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    # The controller would see it after SlurmdTimeout.
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")


def parent_of(number: int) -> int:
    return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[1])


def repair(cluster, node: str) -> None:
    """Its daemon is started again."""
    cluster.daemons.append(
        subprocess.Popen(
            ["slurmd", "-D", "-N", node, "-f", cluster.environment["SLURM_CONF"]],
            env=cluster.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
    )  # fmt: skip
    cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")


def test_two_nodes_train_as_two_processes_of_one(two_nodes, tmp_path, pretraining, by_torchrun):
    """srun starts one process a node; they find each other, and every number is the same."""
    run = tmp_path / "run"
    job = two_nodes.submit("pretrain", str(pretraining), "-o", "run", "--nodes", "2", cwd=tmp_path)
    shown = two_nodes.wait(job, "COMPLETED")
    assert shown["NodeList"] == "127.0.0.[1-2]"
    text = log_of(run)
    assert "90 iterations of 6 samples (3 x 2 processes" in text
    assert "learning rate up to 0.000306 (rule sqrt_wrt_1024: 0.306 x the configured one)" in text
    assert losses(run) == losses(by_torchrun)
    reference = teacher(by_torchrun)
    assert all(torch.equal(value, reference[name]) for name, value in teacher(run).items())


@pytest.mark.slow
def test_a_job_leaves_a_node_that_dies(two_nodes, tmp_path, pretraining):
    """It continues on the other one, from its last periodic checkpoint, bit for bit."""
    run = tmp_path / "run"
    job = two_nodes.submit(
        "pretrain", str(pretraining), "checkpointing.period=10", "-o", "run", cwd=tmp_path
    )
    wait_for(lambda: last_iteration(run) >= 20)
    node = two_nodes.show(job)["NodeList"]
    power_cut(two_nodes, node, job)
    wait_for(lambda: two_nodes.show(job)["Restarts"] == "1", what="the requeue")
    shown = two_nodes.wait(job, "COMPLETED")
    assert shown["NodeList"] not in ("", node)
    record = read_record(run)
    assert record.starts[1].progress >= 20
    assert record.starts[1].progress % 10 == 0
    reference = teacher(uninterrupted(two_nodes, pretraining, tmp_path / "whole"))
    assert all(torch.equal(value, reference[name]) for name, value in teacher(run).items())
    repair(two_nodes, node)


@pytest.mark.slow
def test_one_of_two_nodes_dies(two_nodes, tmp_path, pretraining, by_torchrun):
    """The process on the other one is neither lost nor taken for cancelled or failed."""
    run = tmp_path / "run"
    job = two_nodes.submit(
        "pretrain", str(pretraining), "checkpointing.period=10", "-o", "run", "--nodes", "2",
        cwd=tmp_path,
    )  # fmt: skip
    wait_for(lambda: last_iteration(run) >= 20)
    power_cut(two_nodes, "127.0.0.2", job)
    wait_for(lambda: two_nodes.show(job)["Restarts"] == "1", what="the requeue")
    repair(two_nodes, "127.0.0.2")
    two_nodes.wait(job, "COMPLETED")
    record = read_record(run)
    assert record.state == "done"
    assert record.starts[1].progress >= 20
    reference = teacher(by_torchrun)
    assert all(torch.equal(value, reference[name]) for name, value in teacher(run).items())
