"""What is remembered of jobs: one `job.json` beside each run, one list of the user's submissions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dinocell.batch.journal import JOURNAL_NAME, count_rows
from dinocell.files import write_text_atomically

__all__ = [
    "BEGINS_ANEW",
    "JobRecord",
    "RunProgress",
    "Start",
    "Submission",
    "failures_folder",
    "first_failure",
    "goes_on",
    "note_submission",
    "read_record",
    "read_submissions",
    "run_progress",
    "saved_progress",
    "work_mark",
    "write_record",
]

BEGINS_ANEW = {"pretrain": "--no-resume", "segment": "--overwrite"}
"""What makes a command leave aside what is in its folder; of a job, this is meant once."""

_RECORD_NAME = "job.json"
_LOST_CONNECTION = r"connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out waiting"


@dataclass(frozen=True)
class Start:
    """One start of a job.

    Attributes
    ----------
    job : number; "" without a cluster
    restart : how often SLURM had requeued it
    progress : what was saved then, see `saved_progress`
    time : seconds since 1970
    host : first node
    mark : see `work_mark`, before this start
    """

    job: str
    restart: int
    progress: int
    time: float
    host: str
    mark: str = ""


@dataclass
class JobRecord:
    """The story of a run as its jobs saw it; written by the first process only.

    Attributes
    ----------
    command : arguments of `dinocell`
    state : running, stopping, requeued, done, stopped, cancelled, stalled, refused (a wrong call),
        failed or out_of_memory
    reason : one sentence for everything but running and done
    starts : all of them, oldest first
    ends : state, reason and progress of each job that has left the run, by its number
    """

    command: list[str]
    state: str = "running"
    reason: str = ""
    starts: list[Start] = field(default_factory=list)
    ends: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def end_of(self, job: str) -> tuple[str, str, str] | None:
        """State, reason and progress with which a job has left the run; None if it has not."""
        end = self.ends.get(job)
        if end is None and self.starts and self.starts[-1].job == job:
            end = (self.state, self.reason, "")
        return None if end is None or end[0] in ("running", "stopping", "requeued") else end

    def stalled_starts(self, job: str, progress: int) -> int:
        """How many of a job's starts there were since its best progress was reached.

        0 if `progress`, what is saved now, is more than any start has found.
        """
        found = [start.progress for start in self.starts if start.job == job]
        if not found or progress > max(found):
            return 0
        return len(found) - found.index(max(found))


def write_record(run_dir: str | Path, record: JobRecord) -> None:
    """Replace RUN/job.json."""
    write_text_atomically(Path(run_dir) / _RECORD_NAME, json.dumps(asdict(record), indent=1))


def read_record(run_dir: str | Path) -> JobRecord | None:
    """RUN/job.json, None if there is none that can be read."""
    try:
        values = json.loads((Path(run_dir) / _RECORD_NAME).read_text(encoding="utf-8"))
        values["starts"] = [Start(**start) for start in values["starts"]]
        values["ends"] = {job: tuple(end) for job, end in values.get("ends", {}).items()}
        return JobRecord(**values)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def goes_on(command: Sequence[str], run_dir: str | Path) -> bool:
    """Whether a run was begun by this very command, and has not come to its end."""
    record = read_record(run_dir)
    return (
        record is not None
        and bool(record.starts)
        and record.command == list(command)
        and record.state not in ("done", "refused")
    )


def failures_folder(run_dir: str | Path, job: str, restart: int, step: int) -> Path:
    """Where the processes of a start tell why they failed, each in a file; the earliest knows best.

    `step` is SLURM's number of the `srun`: a script may have several.
    """
    return Path(run_dir) / "slurm" / f"failed_{job or 'local'}_{restart}_{step}"


def first_failure(
    run_dir: str | Path, job: str, restart: int, step: int | None = None
) -> tuple[str, str]:
    """State and sentence of the process that failed first, two "" if none did.

    Processes that lost their connection have failed because another one had, whatever the clocks say.
    Without `step`, those of the last step that had any.
    """
    if step is None:
        found = Path(run_dir, "slurm").glob(f"failed_{job or 'local'}_{restart}_*")
        steps = [int(path.name.split("_")[-1]) for path in found if path.name[-1].isdigit()]
        step = max(steps, default=0)
    notes = []
    for path in sorted(failures_folder(run_dir, job, restart, step).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):
            note = json.loads(path.read_text(encoding="utf-8"))
            notes.append((str(note["state"]), str(note["reason"])))
    causes = [note for note in notes if not re.search(_LOST_CONNECTION, note[1], re.IGNORECASE)]
    return (causes or notes or [("", "")])[0]


# --- how far a run is ---


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes
    ----------
    done, total : of `unit`; None where unknown
    eta_s : seconds that are left at the last known speed
    note : what is done beyond that
    """

    done: int
    total: int | None = None
    unit: str = ""
    eta_s: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.done} {self.unit}".strip()
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        note = f" {self.note}" if self.note else ""
        return f"{self.done}/{self.total}{share}{note}"


def saved_progress(command: Sequence[str], run_dir: str | Path) -> int:
    """What a new start of the run would not have to do again: steps, iterations or images."""
    folder = Path(run_dir)
    kind = command[0] if command else ""
    if kind == "pretrain":
        names = [path.name for path in (folder / "ckpt").glob("*")]
        return max((int(name) + 1 for name in names if name.isdigit()), default=0)
    if kind == "train":
        steps = [
            re.fullmatch(r"step_(\d+)", path.stem) for path in (folder / "checkpoints").glob("*.pt")
        ]
        return max((int(match[1]) for match in steps if match), default=0)
    return count_rows(folder / JOURNAL_NAME)


def work_mark(command: Sequence[str], run_dir: str | Path) -> str:
    """Tells whether a command that shall begin anew has done so: what it replaces is another file then.

    "" where there is nothing yet.  File systems use the numbers of files again, so the time counts too.
    """
    names = {"pretrain": "ckpt", "segment": "settings.json"}
    try:
        found = Path(run_dir, names[command[0]]).stat()
        return f"{found.st_ino}-{found.st_mtime_ns}"
    except (OSError, KeyError, IndexError):
        return ""


def run_progress(command: Sequence[str], run_dir: str | Path) -> RunProgress | None:
    """Progress from the run's own files, None before there is any, or if they are others' files."""
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        return _progress_of_files(command, Path(run_dir))
    return None


def _progress_of_files(command: Sequence[str], folder: Path) -> RunProgress | None:
    kind = command[0] if command else ""
    if kind == "pretrain":
        settings = _yaml(folder / "config.yaml")
        line = _last_line(folder / "training_metrics.json", "iter_time")
        if line is None or "optim" not in settings:
            return None
        total = settings["optim"]["epochs"] * settings["train"]["OFFICIAL_EPOCH_LENGTH"]
        # Lines come at intervals, checkpoints when a signal does.
        done = max(int(line["iteration"]) + 1, saved_progress(command, folder))
        return RunProgress(done, total, "iterations", line["iter_time"] * (total - done))
    if kind == "train":
        settings = _yaml(folder / "config.yaml")
        line = _last_line(folder / "metrics.jsonl", "crops_per_s")
        if line is None or "schedule" not in settings:
            return None
        total = int(settings["schedule"]["steps"])
        done = max(int(line["step"]), saved_progress(command, folder))
        if done >= total and not (folder / "model.safetensors").exists():
            return RunProgress(done, total, "steps", note="validating")
        step_s = line.get("global_batch_size", 0) / max(line["crops_per_s"], 1e-9)
        return RunProgress(done, total, "steps", step_s * (total - done))
    if kind == "segment" or tuple(command[:2]) == ("shards", "run"):
        done = count_rows(folder / JOURNAL_NAME)
        listed = folder / "manifest.csv"
        total = max(count_rows(listed) - 1, 0) if listed.is_file() else None
        return _paced(folder, RunProgress(done, total, "images"))
    return None


def _paced(folder: Path, progress: RunProgress) -> RunProgress:
    """The time that is left, from what was done since the job's last start."""
    record = read_record(folder)
    if record is None or not record.starts or progress.total is None:
        return progress
    start = record.starts[-1]
    new = progress.done - start.progress
    if new <= 0 or record.state != "running":
        return progress
    pace = (time.time() - start.time) / new
    left = pace * (progress.total - progress.done)
    return RunProgress(progress.done, progress.total, progress.unit, left)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _last_line(path: Path, key: str) -> dict[str, Any] | None:
    """The last JSON line with a key, from the end of a file that may be long."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65_536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            values = json.loads(line)
        except ValueError:
            continue  # cut: the first of the piece, or one that is being written
        if isinstance(values, dict) and key in values:
            return values
    return None


# --- the user's submissions ---


@dataclass(frozen=True)
class Submission:
    """One job or task of an array that was submitted from this account."""

    job: str
    name: str
    command: list[str]
    run_dir: str
    log: str
    submitted: float
    cluster: str = ""


def _list_path(environment: Mapping[str, str] = os.environ) -> Path:
    state = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "dinocell" / "jobs.jsonl"


def note_submission(submissions: Sequence[Submission]) -> None:
    """Add to the list that `dinocell jobs` reads.

    Raises
    ------
    OSError
        It cannot be written.
    """
    path = _list_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(item)) + "\n" for item in submissions)
    with path.open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line was cut: it must not swallow ours
                text = "\n" + text
        file.write(text.encode())  # at once: lines of two commands do not mix


def read_submissions() -> list[Submission]:
    """All submissions, oldest first; lines that cannot be read are passed over."""
    try:
        lines = _list_path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = {}
    for line in lines:
        try:
            item = Submission(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[item.cluster, item.job] = item  # numbers begin anew when a cluster is set up again
    return list(found.values())
