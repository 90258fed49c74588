"""The processes of one job, and why the first of them failed: each writes its reason to a file.

When one of several processes fails, the others lose their connection and fail, too, or srun ends them.
The record of the job must name the cause and not its consequences.
"""

import contextlib
import json
import os
import socket
import time

from dinocell.cluster.record import failures_folder, first_failure
from dinocell.cluster.slurm import own_job
from dinocell.files import atomic_path, write_text_atomically


class Processes:
    """This process among those of its job.

    `in_slurm`: the SLURM job around this process, if there is one, is the run's own.  `job` is its
    number, "" without a cluster; `rank` and `world` number and count the processes; `restart` counts the
    requeues, and `step` is the number of the srun.
    """

    def __init__(self, run_dir: str, *, in_slurm: bool) -> None:
        in_step = in_slurm and "SLURM_STEP_ID" in os.environ
        self.run_dir = run_dir
        self.rank = int(os.environ.get("SLURM_PROCID", 0)) if in_step else 0
        self.world = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if in_step else 1
        self.job = (own_job() or "") if in_slurm else ""
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.step = int(os.environ["SLURM_STEP_ID"]) if in_step else 0
        self.folder = failures_folder(run_dir, self.job, self.restart, self.step)

    def __str__(self) -> str:
        return f"process {self.rank} of {self.world} on {socket.gethostname()}"

    def note_failure(self, state: str, reason: str) -> None:
        """For the first process, which fails next and would otherwise report a wrong reason."""
        if self.world == 1:
            return
        note = {"state": state, "reason": f"process {self.rank} of {self.world}: {reason}"}
        with contextlib.suppress(OSError):
            path = self.folder / f"{time.time():017.3f}_rank{self.rank}.json"
            write_text_atomically(path, json.dumps(note))

    def first_failure(self) -> tuple[str, str] | None:
        """State and reason of the process that failed first; None if no process of several has."""
        if self.world == 1:
            return None
        found = first_failure(self.run_dir, self.job, self.restart, self.step)
        return None if found == ("", "") else found

    def wait_for_failure(self, within_s: float) -> tuple[str, str] | None:
        """`first_failure`, where notes of other machines may take a while to appear."""
        deadline = time.monotonic() + within_s
        while (found := self.first_failure()) is None:
            if self.world == 1 or time.monotonic() >= deadline:
                return None
            with (
                contextlib.suppress(OSError),  # after an own change, NFS reads the folder again
                atomic_path(self.folder / "looked") as temporary,
            ):
                temporary.touch()
            time.sleep(0.5)
        return found
