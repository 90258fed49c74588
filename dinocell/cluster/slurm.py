"""SLURM's own commands, asked in one place: what a job's state is, and its requeueing."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dinocell.batch.claims import Claimant

_TIMEOUT_S = 30


def slurm_is_here() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def _ask(command: Sequence[str]) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr.strip()


def own_job() -> str | None:
    """The job this process runs in, as SLURM's commands name it (`12`, `12_3`); None outside."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        # The plain number of one of the tasks is that of the whole array.
        return f"{array}_{task}"
    return os.environ.get("SLURM_JOB_ID")


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job."""

    job: str  # number, `12_3` for a task of an array
    # RUNNING, PENDING, COMPLETING, CANCELLED, TIMEOUT, PREEMPTED, ...; UNKNOWN if SLURM has
    # forgotten it
    state: str = "UNKNOWN"
    reason: str = ""  # why it waits or ended, "" if SLURM gives none
    restarts: int = 0  # how often it was requeued
    preempted: bool = False  # it has to make room for another job
    # run_s, limit_s: seconds that it has run, and its limit; None where unknown
    run_s: int | None = None
    limit_s: int | None = None
    log: str = ""  # file of its output, "" where unknown

    @property
    def waits_or_runs(self) -> bool:
        """Whether it is going to do more."""
        return self.state in ("PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING")


def job_states(jobs: Sequence[str]) -> dict[str, JobState]:
    """States of jobs, from the controller and, for those that it has forgotten, from accounting.

    Jobs that nobody knows are left out.
    """
    found: dict[str, JobState] = {}
    for job in dict.fromkeys(name.split("_")[0] for name in jobs):
        code, text, _ = _ask(["scontrol", "show", "job", "-o", job])
        for line in text.splitlines() if code == 0 else ():
            found |= {state.job: state for state in _parse(line)}
    missing = [job for job in jobs if job not in found]
    if missing and shutil.which("sacct"):
        # No field that older releases lack: sacct refuses the whole question.
        columns = "JobID,State,Reason"
        code, text, _ = _ask(["sacct", "-X", "-n", "-P", "-o", columns, "-j", ",".join(missing)])
        for line in text.splitlines() if code == 0 else ():
            job, words, reason = [*line.split("|"), "", ""][:3]
            if words:  # such as CANCELLED by 0
                found[job] = JobState(job, words.split()[0], "" if reason == "None" else reason)
    return found


def _parse(line: str) -> list[JobState]:
    """The job of a line; tasks of an array that wait share one."""
    # Values may have blanks, and what looks like a key in them: the comment stands at the end, and
    # the first one counts.
    found = re.findall(r"(\w+)=(\S*)", line)
    values = dict(reversed(found))
    log = re.search(r" StdOut=(.*?)(?= \w+=|$)", line.rstrip())
    if "JobId" not in values:
        return []
    jobs = [values["JobId"]]
    if "ArrayJobId" in values and "ArrayTaskId" in values:
        jobs = [f"{values['ArrayJobId']}_{task}" for task in _tasks(values["ArrayTaskId"])]
    reason = values.get("Reason", "")
    preempted = values.get("PreemptTime", "None") not in ("None", "Unknown", "")
    run_s, limit_s = (seconds_of(values.get(key, "")) for key in ("RunTime", "TimeLimit"))
    state, reason = values.get("JobState", "UNKNOWN"), "" if reason == "None" else reason
    restarts, shown = int(values.get("Restarts", 0)), "" if log is None else log[1]
    return [
        JobState(job, state, reason, restarts, preempted, run_s, limit_s, shown) for job in jobs
    ]


def _tasks(text: str) -> list[int]:
    """Numbers of `3`, `0-2,5`, `0-8:2%4`."""
    numbers: list[int] = []
    for part in text.split("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if match is not None:
            first, last, step = match.groups()
            numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def seconds_of(text: str) -> int | None:
    """Seconds of a time such as `90` (minutes), `30:00`, `24:00:00`, `2-12` or `2-12:30:00`; else None."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes[:seconds]
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def requeue(job: str) -> str:
    """Have SLURM run a job again from its start; "" if it will, else why not."""
    code, _, error = _ask(["scontrol", "requeue", job])
    return "" if code == 0 else error or f"scontrol ended with {code}"


def partitions() -> list[str]:
    """Names of the partitions, [] if SLURM does not answer."""
    code, text, _ = _ask(["sinfo", "-h", "-o", "%R"])
    return list(dict.fromkeys(text.split())) if code == 0 else []


def _setting(name: str) -> str:
    code, text, _ = _ask(["scontrol", "show", "config"])
    match = re.search(rf"^{name}\s*=\s*(\S+)", text, flags=re.M) if code == 0 else None
    return match[1] if match else ""


def cluster_name() -> str:
    """Name of this cluster, "" if SLURM does not answer: numbers of jobs are its own."""
    return _setting("ClusterName")


def largest_array() -> int | None:
    """How many tasks an array may have here (numbers from 0), None if SLURM does not say."""
    value = _setting("MaxArraySize")
    return int(value) if value.isdigit() and int(value) else None


def objection(script: str) -> str:
    """Why SLURM would not start a script on any of its nodes, "" if it would."""
    code, out, error = _ask(["sbatch", "--test-only", script])
    if code == 0:
        return ""
    lines = [x.removeprefix("sbatch: error: ").strip() for x in f"{out}\n{error}".splitlines()]
    return next((line for line in reversed(lines) if line), "")


def claimant() -> Claimant:
    """This process as a claimant of parts of a batch, which asks SLURM about the jobs of others."""

    def runs(job: str) -> bool:
        state = job_states([job]).get(job)
        return state is not None and state.state in ("RUNNING", "COMPLETING", "SUSPENDED")

    return Claimant(own_job() or "", runs)
