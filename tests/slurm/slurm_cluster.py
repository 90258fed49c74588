"""A real SLURM of one node on loopback, and what tests ask of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SANDBOX = Path(__file__).parent / "sandbox.sh"
# Tests wait for states of jobs and files. This only ends a test that would wait for ever; a machine under
# load may be twenty times slower than a quiet one.
LAST_GUARD_S = 900.0


class Cluster:
    """A sandboxed SLURM: its environment, and commands that run in it."""

    def __init__(self, folder: Path, state: Path, **settings: str) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[bytes]] = []  # that tests have started
        self.environment = {
            **os.environ,
            **settings,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'dinov3_modified'}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "XDG_STATE_HOME": str(state),
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
        }
        for name in [n for n in self.environment if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            if not name.startswith("SLURM_SANDBOX"):
                del self.environment[name]

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=LAST_GUARD_S,
            check=False,
        )  # fmt: skip

    def dinocell(
        self, *arguments: str, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dinocell", *arguments, cwd=cwd)

    def submit(self, *arguments: str, cwd: Path) -> str:
        """Number of the job that `dinocell submit` made."""
        done = self.dinocell(
            "submit", *arguments, "--set", "cpus_per_gpu=1", "--set", "mem=800M", cwd=cwd
        )
        assert done.returncode == 0, done.stderr
        match = re.match(r"job (\d+)", done.stdout)
        assert match, done.stdout
        return match[1]

    def sbatch(self, *arguments: str, cwd: Path | None = None) -> str:
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job."""
        text = self.run("scontrol", "show", "job", "-o", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0])) if text.strip() else {}

    def wait(self, job: str, *states: str, within_s: float = LAST_GUARD_S) -> dict[str, str]:
        """Wait until a job is in one of the states."""
        deadline = time.monotonic() + within_s
        shown: dict[str, str] = {}
        while time.monotonic() < deadline:
            shown = self.show(job)
            if shown.get("JobState") in states:
                return shown
            time.sleep(0.3)
        queue = self.run("squeue").stdout
        raise AssertionError(f"job {job} is not {states} after {within_s} s: {shown}\n{queue}")

    def make_room(self) -> str:
        """A short job of the partition that preempts the others."""
        options = ("-p", "urgent", "--exclusive", "--time=1", "-o", "/dev/null")
        return self.sbatch(*options, "--wrap", "sleep 1")


def wait_for(
    condition, within_s: float = LAST_GUARD_S, what: str = "", every_s: float = 0.2
) -> None:
    """Wait until a function gives something true."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, AttributeError):
            if condition():
                return
        time.sleep(every_s)
    raise AssertionError(f"not within {within_s} s: {what or condition}")


def last_iteration(run: Path) -> int:
    lines = (run / "training_metrics.json").read_text().splitlines()
    return json.loads(lines[-1])["iteration"]


def teacher(run: Path) -> dict[str, torch.Tensor]:
    path = run / "eval" / "training_89" / "teacher_checkpoint.pth"
    return torch.load(path, weights_only=True)["teacher"]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(x) for x in (run / "training_metrics.json").read_text().splitlines()]
    return {r["iteration"]: r["total_loss"] for r in records if "total_loss" in r}


def log_of(run: Path) -> str:
    (path,) = (run / "slurm").glob("*_0_log.out")
    return path.read_text()


def processes_of(job: str, rank: int = 0) -> list[int]:
    """Process numbers of a job's task: supervisor, work, and the data workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes()
            if (
                f"SLURM_JOB_ID={job}\0".encode() in variables
                and f"SLURM_PROCID={rank}\0".encode() in variables
                and b"SLURM_STEP_ID=0\0" in variables
            ):
                found.append(int(folder.name))
    return found


def processes_on(node: str, job: str) -> list[int]:
    """Process numbers of all that a job has on a node, its script included."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (folder / "environ").read_bytes().split(b"\0")
            wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
            if wanted <= set(variables):
                found.append(int(folder.name))
    return found


def uninterrupted(cluster: Cluster, config: Path, run: Path) -> Path:
    """A pretraining in one process, left alone."""
    done = cluster.dinocell("pretrain", str(config), "-o", str(run))
    assert done.returncode == 0, done.stderr
    return run


@contextlib.contextmanager
def started_cluster(state: Path, lock: Path, **settings: str) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    folder.rmdir()
    settings = {"SLURM_SANDBOX_CPUS": "6", "SLURM_SANDBOX_GRACE": "600", **settings}
    cluster = Cluster(folder, state, **settings)
    with lock.open("w") as file:  # two test processes must not install at once
        fcntl.flock(file, fcntl.LOCK_EX)
        done = subprocess.run(
            ["bash", str(SANDBOX), "start", str(folder)],
            env=cluster.environment, capture_output=True, text=True, timeout=LAST_GUARD_S, check=False,
        )  # fmt: skip
    try:
        if done.returncode:
            if shutil.which("slurmctld") is None or shutil.which("munged") is None:
                pytest.skip(f"SLURM cannot be installed here: {done.stderr.strip()[-300:]}")
            raise RuntimeError(done.stderr)
        yield cluster
    finally:
        for daemon in cluster.daemons:
            daemon.terminate()
            daemon.wait(timeout=30)
        subprocess.run(
            ["bash", str(SANDBOX), "clean", str(folder)], capture_output=True, check=False
        )
