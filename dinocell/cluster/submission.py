"""Submit runs to SLURM through submitit, or run them here in the same way."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.cluster.ending import REQUEUE_REQUEST
from dinocell.cluster.plan import PlannedRun
from dinocell.cluster.record import Submission, note_submission, read_submissions
from dinocell.cluster.site import SiteProfile, minutes_of
from dinocell.cluster.slurm import (
    claimant,
    cluster_name,
    job_states,
    largest_array,
    objection,
    partitions,
    slurm_is_here,
)
from dinocell.cluster.supervisor import SupervisedJob, supervise
from dinocell.errors import MissingExtraError, StoppedError, UsageError

if TYPE_CHECKING:
    from dinocell.batch.parts import ShardPlan

_KINDS = (
    "after", "afterany", "afterburstbuffer", "aftercorr", "afternotok", "afterok", "singleton",
)  # fmt: skip


@dataclass(frozen=True)
class Submitted:
    """What SLURM has accepted."""

    job: str  # number of the job or array
    tasks: list[tuple[str, PlannedRun, Path]]  # (number, run, log file) of each
    notice: str  # why SLURM would not start it as it is, or ""

    def text(self, *, cancel: Sequence[str] | None = None) -> str:
        """Numbers, logs, how to follow, and how to cancel the jobs `cancel` that belong together."""
        several = len(self.tasks) > 1
        lines = [f"job {self.job}: {len(self.tasks)} tasks" if several else f"job {self.job}"]
        lines += [f"  {number}  {run.run_dir}  log {log}" for number, run, log in self.tasks[:10]]
        if len(self.tasks) > 10:
            lines.append(f"  ... {len(self.tasks) - 10} more")
        lines += [self.notice] if self.notice else []
        log = shlex.quote(str(self.tasks[0][2]))
        lines += [f"follow: tail -F {log}", "watch:  dinocell jobs"]
        if numbers := [self.job] if cancel is None else cancel:
            lines.append(f"cancel: scancel {' '.join(numbers)}")
        return "\n".join(lines)


def parse_dependency(text: str) -> str:
    """A dependency as sbatch wants it; a bare number waits for that job's success.

    Raises UsageError (not of SLURM's form).
    """
    if re.fullmatch(r"\d+(_\d+)?", text):
        return f"afterok:{text}"
    kinds = "|".join(_KINDS)
    one = rf"(?:singleton|(?:{kinds})(?::\d+(?:_\d+)?(?:\+\d+)?)+)"
    if not re.fullmatch(rf"{one}(?:[,?]{one})*", text):
        raise UsageError(
            f"`dependency` must be a job's number or like afterany:123, got {text!r}: SLURM knows "
            f"{', '.join(_KINDS)}"
        )
    return text


def _folder(runs: Sequence[PlannedRun], log_dir: Path | None) -> Path:
    """Where logs and submitit's files go: in the run, or for several above them."""
    if log_dir is None:
        log_dir = (runs[0].run_dir if len(runs) == 1 else runs[0].run_dir.parent) / "slurm"
    if "%" in str(log_dir.absolute()):
        raise UsageError(
            f"The folder of logs must be without %, which SLURM replaces, got {log_dir}: set `logs`"
        )
    return log_dir


def _parameters(
    site: SiteProfile, runs: Sequence[PlannedRun], dependency: str | None, folder: Path
) -> dict[str, Any]:
    """The arguments of submitit's `_make_sbatch_string`, see SlurmExecutor.update_parameters."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    names = {run.name for run in runs}
    extra: dict[str, Any] = {"requeue": True, "time": site.time}
    extra |= {name: True if value in ("", "true") else value for name, value in site.extra.items()}
    for name in ("reservation", "nice", "mem"):
        if (value := getattr(site, name)) is not None:
            extra[name] = value
    parameters = {
        "job_name": runs[0].name if len(names) == 1 else runs[0].run_dir.parent.name,
        "nodes": site.nodes,
        "ntasks_per_node": site.tasks_per_node or max(site.gpus_per_node, 1),
        "cpus_per_task": site.cpus_per_gpu,
        # In the argument's place the exact text: submitit counts whole minutes.
        "time": max(1, int(minutes_of(site.time))),
        "signal_delay_s": site.signal_ahead_s,
        "setup": [*lines, *site.setup] or None,
        "teardown": _requeue_lines(folder) if site.container else None,
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={site.cpus_per_gpu}"],
        "array_parallelism": site.array_parallelism,
        "additional_parameters": extra,
        "dependency": dependency,
    }
    # submitit's wckey would be refused where such keys are checked; one log file is easier to follow.
    fixed = {"wckey": None, "stderr_to_stdout": True}
    same = "partition account qos gres constraint exclude mail_user mail_type comment"
    parameters |= {name: getattr(site, name) for name in same.split()}
    return {name: value for name, value in parameters.items() if value is not None} | fixed


def _requeue_lines(folder: Path) -> list[str]:
    """Shell lines after the work: containers seldom have scontrol, so the job's script requeues.

    A job that was cancelled is no longer RUNNING by then.
    """
    return [
        "job=$SLURM_JOB_ID",
        '[ -z "$SLURM_ARRAY_JOB_ID" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID',
        f"request={shlex.quote(str(folder.absolute()))}/{REQUEUE_REQUEST}$job",
        'if [ -e "$request" ]; then',
        '  rm -f "$request"',
        '  if scontrol show job -o "$job" | grep -q "JobState=RUNNING"; then',
        '    scontrol requeue "$job" && sleep 120',
        "  fi",
        "fi",
    ]


def _python(site: SiteProfile) -> str:
    """The interpreter of the tasks, as shell words.

    Signals are ignored until the supervisor has its handlers: python takes seconds to start, and would
    end as a failure.  A preemption sends TERM again at its end; otherwise SLURM requeues by itself.
    """
    python = site.python or ("python3" if site.container else sys.executable)
    words = f"{site.container} {python}" if site.container else shlex.quote(python)
    return f'bash -c \'trap "" USR2 TERM; exec "$@"\' dinocell {words}'


def _executor(folder: Path, site: SiteProfile) -> Any:
    try:
        from submitit.slurm.slurm import SlurmExecutor
    except ImportError as error:
        raise MissingExtraError(
            "Submitting needs the package submitit, which is not installed: run pip install '.[slurm]' "
            "in the clone of DINOCell"
        ) from error

    class Executor(SlurmExecutor):
        """Also where there is no SLURM, to show what would be submitted."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    return Executor(folder=folder, python=_python(site))


def sbatch_text(
    runs: Sequence[PlannedRun], site: SiteProfile, dependency: str | None, log_dir: Path | None
) -> str:
    """The file that `submit` would hand to sbatch; nothing is written."""
    folder = _folder(runs, log_dir)
    executor = _executor(folder, site)
    parameters = _parameters(site, runs, dependency, folder)
    if len(runs) > 1:
        parameters["map_count"] = len(runs)
    executor.parameters.update(parameters)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def submit(
    runs: Sequence[PlannedRun],
    site: SiteProfile,
    *,
    dependency: str | None = None,
    behind: str | None = None,
    log_dir: Path | None = None,
    look: bool = True,
) -> Submitted:
    """Submit one job, or an array of several.

    Parameters
    ----------
    dependency : as `parse_dependency` gives it
    behind : a dependency of jobs that this one comes after in any case
    log_dir : folder of log files, in place of the runs' own
    look : whether jobs of a dependency must be known

    Raises UsageError (no SLURM here, a job has the run already, or SLURM refuses the job; the
    message has its reason).
    """
    if not slurm_is_here():
        raise UsageError(
            "Submitting needs SLURM, but this machine has no sbatch: log in to the cluster, or set "
            "`local` or `dry_run`"
        )
    # SLURM's own words for it, "Invalid job array specification", do not say how many it takes.
    largest = largest_array() if len(runs) > 1 else None
    if largest is not None and len(runs) > largest:
        raise UsageError(
            f"An array must have at most {largest} tasks on this cluster (MaxArraySize), got "
            f"{len(runs)}: take fewer shards, or divide the table"
        )
    if look:
        _refuse_unknown(dependency)
    refuse_busy([run.run_dir for run in runs], f"{dependency or ''},{behind or ''}")
    folder = _folder(runs, log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"The folder of logs must be one that can be made, got {folder} ({error.strerror}): set `logs`"
        ) from error
    executor = _executor(folder, site)
    executor.update_parameters(**_parameters(site, runs, dependency, folder))
    jobs = [
        SupervisedJob(run.command, str(run.run_dir), site.signal_ahead_s, site.max_stalled_starts)
        for run in runs
    ]
    kept = set(folder.glob("*"))
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of submitit, about what has no effect here
            contextlib.redirect_stderr(io.StringIO()),  # what sbatch prints is in the error, too
            executor.batch(),  # of one: a plain job
        ):
            accepted = [executor.submit(job) for job in jobs]
    except Exception as error:
        _clear(folder, kept)
        raise UsageError(_refusal(error, site)) from error
    tasks, noted = [], []
    now, cluster = time.time(), cluster_name()
    for job, run in zip(accepted, runs, strict=True):
        number, log = str(job.job_id), Path(str(job.paths.stdout))
        tasks.append((number, run, log))
        run_dir, shown = str(run.run_dir.resolve()), str(log.resolve())
        noted.append(Submission(number, run.name, [*run.command], run_dir, shown, now, cluster))
    try:
        note_submission(noted)
    except (OSError, UsageError) as error:
        print(f"dinocell: `dinocell jobs` will not know this job ({error})", file=sys.stderr)
    number = tasks[0][0].split("_")[0]
    notice = "" if dependency else objection(str(folder / f"{number}_submission.sh"))
    if notice:
        notice = f"note:   As things are, SLURM would not start it ({notice}): compare the site with sinfo"
    return Submitted(number, tasks, notice)


def _refuse_unknown(dependency: str | None) -> None:
    """SLURM takes a job that it does not know for one that has ended."""
    numbers = _jobs_named(dependency)
    here = cluster_name()
    if not numbers or not here:
        return
    known = {job.split("_")[0] for job in job_states(sorted(numbers))}
    known |= {item.job.split("_")[0] for item in read_submissions() if item.cluster == here}
    if numbers - known:
        raise UsageError(
            f"`dependency` must name jobs that SLURM knows, got {', '.join(sorted(numbers - known))}: "
            "leave out what has ended long ago, or set `look=False`"
        )


def _jobs_named(dependency: str | None) -> set[str]:
    """Numbers of the jobs in a dependency; `+N` is a delay, `_N` a task."""
    return set(re.findall(r"\d+", re.sub(r"[+_]\d+", "", dependency or "")))


def refuse_busy(
    folders: Sequence[Path],
    dependency: str | None = None,
    *,
    below: bool = False,
    may_wait: bool = True,
) -> None:
    """Refuse a second job in one folder, which would mix checkpoints; it may wait for the first one.

    `dependency` is of the job that is to be submitted, and helps unless something is written at once
    (not `may_wait`).  `below`: also runs in folders of these.  Raises UsageError (a job that waits or
    runs, and that the dependency does not name, has one of the folders).
    """
    here = cluster_name()
    ours = {folder.resolve() for folder in folders}
    awaited = _jobs_named(dependency) if may_wait else set()
    earlier = {
        item.job: path
        for item in read_submissions()
        if item.cluster == here and item.job.split("_")[0] not in awaited
        if (path := Path(item.run_dir)) in ours or (below and not ours.isdisjoint(path.parents))
    }
    states = job_states([*earlier]) if earlier else {}
    busy = [
        job
        for job in earlier
        if job in states and states[job].waits_or_runs and states[job].state != "COMPLETING"
    ]
    if busy:
        first = busy[0]
        numbers = list(dict.fromkeys(job.split("_")[0] for job in busy))
        after = f"or submit yours to start after it (`dependency=afterany:{':'.join(numbers)}`), "
        raise UsageError(
            f"Only one job at a time can use a folder, got {earlier[first]}, which job {first} uses "
            f"({states[first].state.lower()}): wait for it, {after if may_wait else ''}or cancel it "
            f"(scancel {' '.join(numbers)})"
        )


def _clear(folder: Path, kept: set[Path]) -> None:
    """Remove what submitit leaves of a submission that was refused; `kept` was there before."""
    for path in [*folder.glob("submission_file_*.sh"), *folder.glob("*.pkl")]:
        if path not in kept and re.fullmatch(r"(submission_file_)?[0-9a-f]{32}", path.stem):
            path.unlink(missing_ok=True)
    for link in folder.glob(".submission_file_*.sh"):
        if not (link.is_symlink() and link.exists()):  # of a job that was accepted
            link.unlink()


def _refusal(error: Exception, site: SiteProfile) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = re.findall(r"sbatch: error: (.+)", text) or lines
    hint = "change the site profile, or `set` one of its keys"
    known = partitions()
    if not known and not cluster_name():
        hint = "no SLURM answers here; log in to the cluster, or set `local`"
    if "partition" in " ".join(reasons).lower() and known:
        hint = f"partitions here are {', '.join(known)}; {hint}"
    return f"SLURM must accept the job, got a refusal ({'; '.join(reasons[-3:])}): {hint}"


def run_here(runs: Sequence[PlannedRun], site: SiteProfile, *, log_dir: Path | None = None) -> int:
    """Run jobs one after the other on this machine, as a cluster would; the highest exit code.

    The site's environment holds here too; its set-up lines and container are of its nodes.  An
    interrupted run leaves those after it alone.  Raises UsageError (the site wants several nodes).
    """
    if site.nodes > 1:
        raise UsageError(f"`local` must have one node, got `nodes={site.nodes}`: set `nodes=1`")
    if site.setup or site.container:
        print(
            "dinocell: `setup` and `container` of the site are left out on this machine",
            file=sys.stderr,
        )
    worst = 0
    for run in runs:
        folder = _folder([run], log_dir)
        log = folder / f"{run.run_dir.name}_{time.strftime('%Y%m%d_%H%M%S')}.log"
        job = SupervisedJob(run.command, str(run.run_dir), processes=site.tasks)
        code = supervise(job, log=log, in_slurm=False, environment=site.environment)
        print(f"{run.run_dir}: exit code {code}, log {log}", file=sys.stderr)
        worst = max(worst, code)
        if code == StoppedError.exit_code:
            break
    return worst


def plan_batch(
    parameters: Mapping[str, Any], count: int, dependency: str | None = None, *, write: bool = True
) -> "ShardPlan":
    """The plan of a batch in parts; none that a job waits with changes under it."""
    from dinocell.batch.parts import has_begun, plan_shards
    from dinocell.io import find_images

    options = parameters["options"]
    paths = find_images(parameters["images"], recursive=parameters["recursive"])
    if write:
        fixed = not options.overwrite and has_begun(parameters["out"])
        folder = Path(parameters["out"]) / "shards"
        refuse_busy([folder], dependency, below=True, may_wait=fixed)
    return plan_shards(paths, parameters["out"], options, count, write=write, claimant=claimant())
