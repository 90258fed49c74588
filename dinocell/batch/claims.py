"""One process at a time works on a batch or a part of one: it holds the `claim.json` of the folder.

A claim names the job, machine and process that made it.  Making one is a hard link to a finished file,
which fails if the claim exists; taking over the claim of a dead process is a rename, which succeeds for
one of several processes.  Both are single steps of the file system on every machine that mounts it.

File locks (`flock`, and so the package filelock) are not as safe here: Lustre with `localflock`, BeeGFS
as it is installed and NFS with `nolock` or `local_lock` keep them inside one machine, so that two
nodes of a cluster would both get the lock, without any error.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from dinocell.errors import DINOCellError

CLAIM_NAME = "claim.json"
_YOUNG_S = 60.0  # of a claim that is still being written


def _unknown(job: str) -> bool:
    return True


@dataclass(frozen=True)
class Claimant:
    """The process that asks for a part, and what it knows of the jobs that hold others.

    Attributes
    ----------
    job : number of the job of a cluster that this process belongs to; "" outside
    job_runs : whether a job, by its number, still runs; without a cluster every job counts as running
    """

    job: str = ""
    job_runs: Callable[[str], bool] = _unknown

    def claim(self) -> dict[str, Any]:
        """Who this process is."""
        return {
            "job": self.job,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "time": time.time(),
        }

    def finds_running(self, other: dict[str, Any]) -> bool:
        """Whether the process of another claim still runs, as far as can be known here."""
        job = other.get("job")
        if job:
            return job != self.job and self.job_runs(job)  # a job runs once at a time
        if other.get("host") != socket.gethostname():
            return True  # cannot be known from here
        try:
            os.kill(int(other["pid"]), 0)
        except (ProcessLookupError, KeyError, ValueError):
            return False
        except PermissionError:
            pass
        # Numbers of processes are used again, in a container at once.
        return other.get("began", "") in ("", _began(int(other["pid"])))


@contextlib.contextmanager
def claimed(folder: Path, claimant: Claimant, what: str = "A shard") -> Iterator[None]:
    """Hold the claim of `folder`, which is `what` in messages; that of a killed process is taken over.

    Raises DINOCellError (another process holds it).
    """
    path = folder / CLAIM_NAME
    mine = claimant.claim()
    text = json.dumps(mine)
    try:
        _make_claim(path, text)
    except FileExistsError:
        other = read_claim(path)
        if claimant.finds_running(other) if other else _is_young(path):
            raise in_use(folder, other, what) from None
        try:
            _take_away(path, other)
            _make_claim(path, text)
        except (FileNotFoundError, FileExistsError):
            raise DINOCellError(
                f"{what} must be run by one process at a time, got two that started {folder}: the other "
                "one continues, so nothing needs to be done"
            ) from None
    try:
        yield
    finally:
        if read_claim(path) == mine:
            path.unlink(missing_ok=True)


def refuse_running(folder: Path, claimant: Claimant, what: str = "A shard") -> None:
    """Raise the error of `claimed` if another process holds the claim of a folder."""
    other = read_claim(folder / CLAIM_NAME)
    if other and claimant.finds_running(other):
        raise in_use(folder, other, what)


def in_use(folder: PurePath, claim: dict[str, Any], what: str) -> DINOCellError:
    """The error of a folder that another process holds."""
    return DINOCellError(
        f"{what} must be run by one process at a time, got {folder}, which {owner_of(claim)} on "
        f"{claim.get('host')} is running: wait for it, or delete {folder / CLAIM_NAME} if it is gone"
    )


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" if there is none, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def owner_of(claim: dict[str, Any]) -> str:
    """The job or process of a claim, for messages."""
    return f"job {claim['job']}" if claim.get("job") else f"process {claim.get('pid')}"


def _take_away(path: Path, judged: dict[str, Any]) -> None:
    """Remove a claim that was judged abandoned; of several processes that judge so, one succeeds.

    Raises FileNotFoundError, FileExistsError (another process was first).
    """
    left = path.with_name(f".tmp-{secrets.token_hex(8)}")
    path.rename(left)
    try:
        if read_claim(left) != judged:  # it is the new claim of a faster process
            try:
                os.link(left, path)
            except OSError:  # a file system without hard links, or a third process
                if not path.exists():
                    left.rename(path)
            raise FileExistsError(path)
    finally:
        left.unlink(missing_ok=True)


def _is_young(path: Path) -> bool:
    """Whether a claim that cannot be read may be one that is being written."""
    try:
        return time.time() - path.stat().st_mtime < _YOUNG_S
    except OSError:
        return False


def _make_claim(path: Path, text: str) -> None:
    """Write a file that must not exist yet; whoever sees it sees all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def read_claim(path: Path) -> dict[str, Any]:
    """The claim in a file, {} if it cannot be read."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
