"""`dinocell submit`, `jobs` and `supervise`: runs on a SLURM cluster."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import typer

from dinocell.cli.evaluate import check_evaluation
from dinocell.cli.options import PASSES_ON, App, argument, in_options, option, parameters_of
from dinocell.cli.segment import segment_options
from dinocell.errors import StoppedError, UsageError

if TYPE_CHECKING:
    from dinocell.cluster.plan import PlannedRun
    from dinocell.cluster.site import SiteProfile

app = App()

_COMMAND = "Command to run, with its own arguments and options, as you would type it here."


@dataclass(frozen=True)
class Resources:
    """What a job asks the cluster for."""

    site: str | None = option(
        "Use this site file, which describes the jobs of your cluster; a name such as a100 means the file "
        "slurm/sites/a100.yaml.  [default: the one that the environment variable DINOCELL_SITE names, else "
        "the settings of the cluster]"
    )
    set_: list[str] | None = option(
        "Replace a key of the site file. Repeat the option for several keys.",
        names="--set",
        metavar="KEY=VALUE",
    )
    nodes: int | None = option("Request this many nodes.  [default: the site's]")
    gpus: int | None = option(
        "Request this many GPUs on each node; one process runs on each GPU.  [default: the site's]"
    )
    time: str | None = option(
        "Request this time limit for one run of the job, such as 12:00:00.  [default: the site's]"
    )
    partition: str | None = option("Request this partition.  [default: the site's]")

    def profile(self, command: str) -> "SiteProfile":
        """The profile of the site, changed as these options ask."""
        from dinocell.cluster.site import load_site

        changes = {"nodes": self.nodes, "time": self.time, "partition": self.partition}
        overrides = [f"{key}={value}" for key, value in changes.items() if value is not None]
        profile = load_site(self.site, [*(self.set_ or []), *overrides])
        if self.gpus is not None:
            profile = profile.with_gpus(self.gpus)
        if command in ("pretrain", "train"):
            return profile
        if (self.gpus or 1) > 1 or (self.nodes or 1) > 1:
            raise UsageError(
                f"{command} must have one process, got --gpus or --nodes above 1: leave them out, "
                "or divide images with --shards into several jobs (of ablate each run is one)"
            )
        return profile.for_one_process()


@dataclass(frozen=True)
class Division:
    """How a submission becomes several tasks."""

    array: Path | None = option(
        "Submit one task for each row of this CSV file. Its header names the configuration keys or "
        "options that a row changes.",
        metavar="TABLE",
    )
    shards: int | None = option(
        "Divide the images of the command segment into this many parts, one task for each; a last job "
        "merges their tables."
    )


@dataclass(frozen=True)
class Manner:
    """How, and whether, a job is submitted."""

    dependency: str | None = option(
        "Start the job only after job 123 has succeeded (give 123), or has ended in any way (give "
        "afterany:123; other dependencies of SLURM are possible, too)."
    )
    logs: Path | None = option(
        "Write the log files to this folder.  [default: the subfolder slurm of the run's folder]"
    )
    dry_run: bool = option("Print the sbatch file and submit nothing.", False)
    local: bool = option(
        "Run the command on this computer, as a job would run it; submit nothing.", False
    )
    look: bool = option(
        "Test before submitting whether models, weights and data exist. With --dependency this test is "
        "left out, because the earlier job may write them.",
        True,
    )

    def checked(self) -> Self:
        """The same, after options that exclude each other are refused."""
        from dinocell.cluster.submission import parse_dependency

        given = self
        if self.dependency is not None:
            given = replace(self, dependency=parse_dependency(self.dependency))
        if self.local and (self.dry_run or self.dependency is not None):
            other = "--dry-run" if self.dry_run else "--dependency"
            raise UsageError(f"--local must be without {other}, got both: leave out one of them")
        return given


@app.command(context_settings=PASSES_ON)
def submit(
    context: typer.Context,
    *,
    command: str = argument(_COMMAND, metavar="pretrain|train|ablate|segment|evaluate ..."),
    resources: Resources,
    division: Division,
    manner: Manner,
) -> None:
    """Submit a command to a SLURM cluster; it continues after time limits until it is complete.

    Of ablate each run becomes one task; a last job makes the tables.

    Mistakes in the command, its configuration and its files are reported now, not after the job has
    waited in the queue. `dinocell jobs` lists what was submitted; docs/cluster.md explains the rest.

    Example: `dinocell submit pretrain configs/ssl/jump_s3_multiview.yaml --site a100 --gpus 4`
    """
    from dinocell.cluster.commands import COMMANDS
    from dinocell.cluster.plan import (
        look_once,
        plan_ablation_runs,
        plan_runs,
        plan_shard_runs,
        read_table,
    )
    from dinocell.cluster.submission import plan_batch

    if command not in COMMANDS:
        raise UsageError(
            f"`submit` must get one of {', '.join(COMMANDS)}, got {command!r}: write for example "
            "dinocell submit pretrain CONFIG"
        )
    profile = resources.profile(command)
    manner = manner.checked()
    look_at = look_once() if manner.look and manner.dependency is None else None
    array, shards = division.array, division.shards

    def parse(given: Sequence[str]) -> dict[str, Any]:
        return checked_parameters(context.find_root().command, command, given)

    with _environment(profile.environment):  # configurations name data by variables
        if shards is not None:
            if command != "segment" or array is not None:
                raise UsageError(
                    "--shards must come with segment and without --array, got it with another command or with "
                    "--array: leave out --shards"
                )
            parameters = parse(context.args)
            if look_at is not None:
                look_at(command, parameters)
            plan = plan_batch(parameters, shards, manner.dependency, write=not manner.dry_run)
            runs, merging = plan_shard_runs(plan)
            if not runs:
                print("every shard is complete; merging", file=sys.stderr)
        elif command == "ablate" and array is None and parse(context.args)["only"] is None:
            runs, merging = plan_ablation_runs(context.args, parse, look_at)
            manner = replace(manner, logs=manner.logs or merging.run_dir / "slurm")
        else:
            rows = [] if array is None else read_table(array)
            runs = plan_runs(command, context.args, parse, table=rows, look=look_at)
            merging = None
    _hand_over(runs, merging, profile, manner)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables as the job will have them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _hand_over(
    runs: "Sequence[PlannedRun]",
    merging: "PlannedRun | None",
    profile: "SiteProfile",
    manner: Manner,
) -> None:
    """Print, run or submit the tasks, and the merging after them."""
    from dinocell.cluster.submission import run_here, sbatch_text
    from dinocell.cluster.submission import submit as hand_in

    # The tables of an ablation need the network, and train what has failed once more.
    of_shards = merging is None or merging.command[0] == "shards"
    alone = profile.for_merging() if of_shards else profile
    dependency, logs = manner.dependency, manner.logs
    if manner.dry_run:
        for run in runs:
            print(f"{run.run_dir}: dinocell {shlex.join(run.command)}", file=sys.stderr)
        if runs:
            print(sbatch_text(runs, profile, dependency, logs))
        if merging is not None:
            after = "afterany:JOB_ABOVE" if runs else None
            print(sbatch_text([merging], alone, after, logs))
        return
    if manner.local:
        code = run_here(runs, profile, log_dir=logs) if runs else 0
        if merging is not None and code != StoppedError.exit_code:
            code = max(code, run_here([merging], alone, log_dir=logs))
        if code:
            raise typer.Exit(code)
        return
    after = dependency
    together: list[str] = []
    if runs:
        accepted = hand_in(runs, profile, dependency=dependency, log_dir=logs, look=manner.look)
        print(accepted.text(cancel=None if merging is None else []))
        together = [accepted.job]
        after = f"afterany:{accepted.job}"
    if merging is not None:
        print("then, when all of them have ended, the tables of all:")
        try:
            order = {"dependency": after, "behind": dependency}
            last = hand_in([merging], alone, log_dir=logs, look=manner.look, **order)
            print(last.text(cancel=[*together, last.job]))
        except UsageError as error:
            raise UsageError(
                f"{error}; the other jobs were submitted, but not the one that makes the tables of all: when "
                f"they have ended, run dinocell {shlex.join(merging.command)}"
            ) from error


@app.command()
def jobs(
    context: typer.Context,
    folder: Path | None = argument(
        "List only runs in this folder and its subfolders.", default=None, metavar="FOLDER"
    ),
    everything: bool = option(
        "Include jobs that were submitted more than a week ago and jobs whose runs a later job continues.",
        False,
        "--all",
    ),
    json: bool = option("Print the list as JSON.", False),
) -> None:
    """List the jobs that you submitted: state, progress and reasons for failure.

    The column `left` is the time that the rest of the work needs at its last known speed. It is not
    the time until the limit of the job.

    Example: `dinocell jobs`
    """
    from dinocell.cluster.jobs import jobs_text, list_jobs

    rows = list_jobs(folder=folder, everything=everything)
    if json:
        print(dumps([asdict(row) for row in rows], indent=1))
    else:
        print(in_options(jobs_text(rows, everything=everything), context))


@app.command(context_settings=PASSES_ON)
def supervise(
    context: typer.Context,
    command: str = argument(_COMMAND, metavar="pretrain|train|ablate|segment|evaluate|shards ..."),
    signal_ahead: int = option(
        "Expect the signal this many seconds before the end of the job, as in the option --signal of "
        "sbatch.",
        120,
        min=10,
    ),
    max_stalled_starts: int = option(
        "Stop requeueing after this many starts without progress.", 5, min=1
    ),
) -> None:
    """Run a command inside your own SLURM job; save and requeue it when the job must stop.

    Use it in scripts that you submit with sbatch (see slurm/). `dinocell submit` does this by itself.

    Example: `srun dinocell supervise pretrain configs/ssl/jump_s3_multiview.yaml`
    """
    from dinocell.batch.journal import merging_folder, shard_folder
    from dinocell.cluster.commands import COMMANDS
    from dinocell.cluster.plan import run_dir_of
    from dinocell.cluster.supervisor import SupervisedJob
    from dinocell.cluster.supervisor import supervise as run

    arguments = context.args
    if command == "shards" and len(arguments) == 3 and arguments[0] == "run":
        index = arguments[2] if arguments[2].isdigit() else "0"  # the command reports a wrong one
        run_dir = shard_folder(arguments[1], int(index))
    elif command == "shards" and len(arguments) == 2 and arguments[0] == "merge":
        run_dir = merging_folder(arguments[1])
    elif command in COMMANDS:
        given = parameters_of(context.find_root().command, command, arguments)
        run_dir = run_dir_of(command, given)
    else:
        raise UsageError(
            f"`supervise` must get one of {', '.join(COMMANDS)} or shards run OUT PART, shards merge OUT, got "
            f"{' '.join([command, *arguments])!r}: write for example dinocell supervise pretrain CONFIG"
        )
    job = SupervisedJob((command, *arguments), str(run_dir), signal_ahead, max_stalled_starts)
    code = run(job)
    if code:
        raise typer.Exit(code)


def checked_parameters(commands: Any, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`parameters_of`, checked as the command does at once; with `options` of `segment` as one object."""
    parameters = parameters_of(commands, name, arguments)
    if name == "segment":
        from dinocell.batch.options import check_options

        parameters["options"] = segment_options(parameters)
        check_options(parameters["options"])
    elif name == "evaluate":
        check_evaluation(parameters)
        if parameters["tune"]:
            from dinocell.evaluation.tuning import check_metric

            try:
                check_metric(parameters["metric"])
            except ValueError as error:
                raise UsageError(str(error)) from error
    return parameters
