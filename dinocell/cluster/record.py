"""Records of jobs: one `job.json` beside each run, and one list of the user's submissions."""

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dinocell.batch.journal import complete_last_line
from dinocell.cluster.commands import command_of
from dinocell.errors import UsageError
from dinocell.files import home_folder, write_text_atomically
from dinocell.submitted import RunProgress

_RECORD_NAME = "job.json"
_LOST_CONNECTION = r"(?i)connection (closed|reset|refused)|broken pipe|gloo|nccl|timed out waiting"


@dataclass(frozen=True)
class Start:
    """One start of a job."""

    job: str  # number; "" without a cluster
    restart: int  # how often SLURM had requeued it
    progress: int  # steps, iterations or images that a new start would not repeat
    time: float  # seconds since 1970
    host: str  # first node
    mark: str = ""  # see `work_mark`, before this start


@dataclass
class JobRecord:
    """The history of a run: its starts and ends; written by the first process only."""

    command: list[str]  # arguments of `dinocell`
    # running, stopping, requeued, done, stopped, cancelled, stalled, refused (a wrong call), failed
    # or out_of_memory
    state: str = "running"
    reason: str = ""  # one sentence for everything but running and done
    starts: list[Start] = field(default_factory=list)  # all of them, oldest first
    # state, reason and progress of each job of the run that has ended, by its number
    ends: dict[str, tuple[str, str, str]] = field(default_factory=dict)

    def end_of(self, job: str) -> tuple[str, str, str] | None:
        """State, reason and progress with which a job has ended; None if it has not."""
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


def continues_run(command: Sequence[str], run_dir: str | Path) -> bool:
    """Whether a run was started by this very command and is not finished."""
    record = read_record(run_dir)
    if record is None or not record.starts or record.command != list(command):
        return False
    return record.state not in ("done", "refused")


def failures_folder(run_dir: str | Path, job: str, restart: int, step: int) -> Path:
    """Folder in which each process of a start writes why it failed; the earliest one is the cause.

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
    causes = [note for note in notes if not re.search(_LOST_CONNECTION, note[1])]
    return (causes or notes or [("", "")])[0]


# --- how far a run is ---


def work_mark(command: Sequence[str], run_dir: str | Path) -> str:
    """Identity of what a command replaces when it starts over: another one afterwards.

    "" if it does not exist yet.  File systems use the numbers of files again, so the time counts too.
    """
    with contextlib.suppress(OSError):
        if name := command_of(command).replaced_name:
            found = Path(run_dir, name).stat()
            return f"{found.st_ino}-{found.st_mtime_ns}"
    return ""


def run_progress(command: Sequence[str], run_dir: str | Path) -> RunProgress | None:
    """Progress from the run's own files; None before they exist, or if they are other files."""
    known = command_of(command)
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
        progress = known.progress(Path(run_dir))
        return _paced(Path(run_dir), progress) if progress and known.has_pace else progress
    return None


def _paced(folder: Path, progress: RunProgress) -> RunProgress:
    """With the time that is left, from what was done since the job's last start."""
    record = read_record(folder)
    if record is None or not record.starts or progress.total is None or record.state != "running":
        return progress
    new = progress.done - record.starts[-1].progress
    if new <= 0:
        return progress
    pace = (time.time() - record.starts[-1].time) / new
    return replace(progress, eta_s=pace * (progress.total - progress.done))


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


def list_path() -> Path:
    """`XDG_STATE_HOME`/dinocell/jobs.jsonl, else below `~/.local/state`; UsageError without a home."""
    state = os.environ.get("XDG_STATE_HOME")
    home = Path(state) if state else home_folder()
    if home is None:
        raise UsageError(
            "The home folder of this user is not known: set XDG_STATE_HOME to the folder for the list of "
            "submitted jobs"
        )
    return (home if state else home / ".local" / "state") / "dinocell" / "jobs.jsonl"


def note_submission(submissions: Sequence[Submission]) -> None:
    """Add to the list that `dinocell jobs` reads.

    Raises OSError (it cannot be written), UsageError (see `list_path`).
    """
    path = list_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    complete_last_line(path)  # if it was cut, it must not swallow ours
    text = "".join(json.dumps(asdict(item)) + "\n" for item in submissions)
    with path.open("ab") as file:
        file.write(text.encode())  # at once: lines of two commands do not mix


def read_submissions() -> list[Submission]:
    """All submissions, oldest first, none without a list; lines that cannot be read are skipped."""
    try:
        lines = list_path().read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, UsageError):
        return []
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            item = Submission(**json.loads(line))
            # A cluster that is set up again starts over with its numbers: the newest counts.
            found[item.cluster, item.job] = item
    return list(found.values())
