"""Why a job's command ended: what SLURM or a signal asked for, or what failed."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dinocell.cluster.child import Child
from dinocell.cluster.processes import Processes
from dinocell.cluster.slurm import JobState
from dinocell.errors import UsageError

REQUEUE_REQUEST = "requeue_"
"""Beginning of the name of the file that asks a job's script to requeue it, before its number."""

_WAIT_FOR_END_S = 90.0  # for SLURM to end a job that it has requeued


@dataclass(frozen=True)
class StopCause:
    """What SLURM says about a job that has got a signal."""

    known: bool = False  # whether SLURM answered
    requeued: bool = False  # it has requeued the job itself
    ran_out: bool = False  # the time limit was reached
    preempted: bool = False  # the job had to make room
    cancelled: bool = False  # the job was cancelled

    @classmethod
    def of(cls, state: JobState | None, restart: int) -> Self:
        """From the job's state; `restart` counts the requeues that this process knows of."""
        if state is None:
            return cls()
        run_s, limit_s = state.run_s, state.limit_s
        ran_out = run_s is not None and limit_s is not None and run_s >= limit_s
        # A job that is preempted without grace is being ended, too.
        ending = state.state in ("COMPLETING", "CANCELLED")
        cancelled = ending and not ran_out and not state.preempted
        return cls(True, state.restarts > restart, ran_out, state.preempted, cancelled)


def failure_of(
    code: int, child: Child, who: Processes, *, killed_here: bool, kills: bool
) -> tuple[str, str]:
    """State and sentence of a command that ended by itself with exit code `code`, negative for a signal.

    `killed_here`: the supervisor killed it, because it did not end.  `kills`: the kernel has killed
    processes of the job for their memory.
    """
    if killed_here and not kills:
        return "failed", (
            f"Processes must end when another one has failed, got {who} that did not and was "
            "killed: look at the logs of the others"
        )
    if code == -signal.SIGKILL or child.lacked_memory(kills):
        certain = "was" if kills else "was probably"
        return "out_of_memory", (
            f"The work must fit into the job's memory, got {who} killed: it {certain} the memory "
            "of the node; raise mem, or lower batch size, workers and caches (not requeued: it "
            "would happen again)"
        )
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; is /dev/shm full?" if name == "SIGBUS" else ""
        reason = f"The work must end by itself, got {who} ended by {name}{hint}: see the log"
        return "failed", reason
    state = "refused" if code == UsageError.exit_code else "failed"
    return state, child.last_sentence() or f"{who} ended with exit code {code}: see the log"


def script_requeues() -> bool:
    """Whether the job's script requeues it: a container seldom has SLURM's commands."""
    return shutil.which("scontrol") is None and bool(os.environ.get("SUBMITIT_FOLDER"))


def request_requeue(job: str) -> None:
    """Ask the job's script to requeue it when this process has ended."""
    Path(os.environ["SUBMITIT_FOLDER"], f"{REQUEUE_REQUEST}{job}").touch()


def wait_for_end(must_end: Callable[[], bool]) -> None:
    """Stay until SLURM ends the job: if it ended by itself, it would count as finished."""
    deadline = time.monotonic() + _WAIT_FOR_END_S
    while not must_end() and time.monotonic() < deadline:
        time.sleep(0.2)
