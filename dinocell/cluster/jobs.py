"""The user's jobs as a table: state, progress, time left, and why a job failed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinocell.cluster.record import (
    JobRecord,
    Submission,
    first_failure,
    list_path,
    read_record,
    read_submissions,
    run_progress,
)
from dinocell.cluster.slurm import JobState, cluster_name, job_states, slurm_is_here
from dinocell.errors import UsageError

_RECENT_S = 7 * 86_400
_SLURM_ENDS = {
    "TIMEOUT": "the time limit was reached before the work could save itself",
    "NODE_FAIL": "its node died",
    "OUT_OF_MEMORY": "it ran out of memory: raise mem, or lower batch size and workers",
    "PREEMPTED": "another job took its place",
    "BOOT_FAIL": "its node did not start",
    "DEADLINE": "its deadline passed",
    "CANCELLED": "it was cancelled",
    "FAILED": "it ended with an error before it could write down why: see its log",
}
_WAITS = {
    "Resources": "waits for free nodes (Resources)",
    "Priority": "others come first (Priority)",
    "Dependency": "waits for another job (Dependency)",
    "DependencyNeverSatisfied": "waits for a job that did not end as it should "
    "(DependencyNeverSatisfied): cancel it",
    "BeginTime": "starts again in a moment (BeginTime)",
    "JobArrayTaskLimit": "as many tasks run as array_parallelism allows (JobArrayTaskLimit)",
    "PartitionConfig": "asks for more than a node of its partition has (PartitionConfig)",
    "PartitionTimeLimit": "asks for more time than its partition allows (PartitionTimeLimit)",
}


@dataclass(frozen=True)
class JobRow:
    """One job or task."""

    # job, name, run_dir, log: as submitted
    job: str
    name: str
    state: str  # SLURM's while it waits or runs, else how it ended, in lower case
    progress: str  # such as 120/500 (24 %), "" before there is any
    eta_s: float | None  # seconds left at the last known speed, None where unknown
    restarts: int  # how often it was requeued
    reason: str  # why it waits, or why it ended so
    run_dir: str
    log: str


def list_jobs(*, folder: str | Path | None = None, everything: bool = False) -> list[JobRow]:
    """Jobs of this account that `dinocell submit` made, newest last.

    With a `folder` only those with runs in it or below it.  With `everything` also those that were
    submitted more than a week ago and have ended, and those after which another job has continued in
    the same folder.

    Raises UsageError (the user has no home, so nothing can be listed; or `folder` does not exist and
    no job has run in it).
    """
    list_path()
    here = cluster_name() if slurm_is_here() else ""
    wanted = None if folder is None else Path(folder).resolve()
    submissions = [
        item
        for item in read_submissions()
        if item.cluster == here or not here
        if wanted is None or wanted in (path := Path(item.run_dir), *path.parents)
    ]
    if wanted is not None and not submissions and not wanted.is_dir():
        raise UsageError(f"`folder` must be a folder that exists, got {folder}: check the path")
    newest = {item.run_dir: item.job for item in submissions}
    # What has its end on record need not be asked for: lists grow long.
    records = {item.run_dir: read_record(item.run_dir) for item in submissions}
    open_jobs = [
        item.job
        for item in submissions
        if (record := records[item.run_dir]) is None or record.end_of(item.job) is None
    ]
    states = job_states(open_jobs) if here else {}
    oldest = 0.0 if everything else time.time() - _RECENT_S
    return [
        _row(item, records[item.run_dir], states.get(item.job))
        for item in submissions
        if (item.job in states and states[item.job].waits_or_runs)
        or (item.submitted >= oldest and (everything or newest[item.run_dir] == item.job))
    ]


def _row(item: Submission, record: JobRecord | None, state: JobState | None) -> JobRow:
    record = record or JobRecord([])
    # A folder may have had other jobs since.
    ours = [start for start in record.starts if start.job == item.job]
    latest = bool(ours) and record.starts[-1] is ours[-1]
    restarts = state.restarts if state is not None else 0
    restarts = restarts or max((start.restart for start in ours), default=0)
    end, shown = record.end_of(item.job), ""
    name, reason = "unknown", "SLURM no longer knows it, and it left no record: see its log"
    if state is not None and state.waits_or_runs:
        name = state.state.lower()
        reason = _WAITS.get(state.reason, state.reason)
        if state.state == "PENDING" and latest and record.reason:
            reason = "; ".join(part for part in (record.reason, reason) if part)
    elif end is not None:
        name, reason, shown = end
    elif state is not None:
        # Killed before it could write down why; perhaps another of its processes has.
        name = state.state.lower()
        by_slurm = _SLURM_ENDS.get(state.state, "" if name == "completed" else state.reason)
        reason = first_failure(item.run_dir, item.job, restarts)[1] or by_slurm
    elif latest:
        name, reason = "lost", f"SLURM no longer knows it; its last known state is {record.state}"
    elif ours:
        name, reason = "ended", "another job has continued in its folder"
    progress = run_progress(item.command, item.run_dir) if latest else None
    running = state is not None and state.state == "RUNNING"
    shown = shown if progress is None else str(progress)
    eta_s = progress.eta_s if progress is not None and running else None
    return JobRow(item.job, item.name, name, shown, eta_s, restarts, reason, item.run_dir, item.log)


def jobs_text(rows: Sequence[JobRow], *, everything: bool = False) -> str:
    """Rows as aligned columns, a job's reason below it; `everything` as for `list_jobs`."""
    from dinocell.results.table import align_columns

    if not rows:
        when, hint = (
            ("", "")
            if everything
            else (" in the last week", "; set `everything` to list older jobs")
        )
        return f"No jobs were submitted{when}: submit one with `dinocell submit`{hint}."
    header = ("job", "name", "state", "progress", "left", "requeues", "run")
    cells = [
        (row.job, row.name, row.state, row.progress, _duration(row.eta_s), str(row.restarts),
         _near(row.run_dir))
        for row in rows
    ]  # fmt: skip
    head, *aligned = align_columns([header, *cells], numbers=False)
    reasons = [f"\n    {row.reason}" if row.reason else "" for row in rows]
    return "\n".join([head, *(a + b for a, b in zip(aligned, reasons, strict=True))])


def _near(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
