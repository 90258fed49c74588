"""`dinocell submit`, `jobs` and `supervise`: runs on a SLURM cluster."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell.cli.evaluate import check_evaluation
from dinocell.cli.options import PASSES_ON, App, parameters_of
from dinocell.cli.segment import segment_options
from dinocell.errors import StoppedError, UsageError

__all__ = ["app", "checked_parameters"]

app = App()


@app.command(context_settings=PASSES_ON)
def submit(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(
            metavar="pretrain|train|segment|evaluate ...",
            help="The command as it would be typed here, with its own options.",
        ),
    ],
    site: Annotated[
        str | None,
        typer.Option(
            help="Site file, or its name in slurm/sites.  [default: DINOCELL_SITE, else the "
            "cluster's defaults]"
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the site; repeat."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each; one process a GPU.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one run, such as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="In place of the site's.")] = None,
    array: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE", help="CSV with a header; one task a line, columns are keys to change."
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="segment: so many parts as an array, then one merged table."),
    ] = None,
    dependency: Annotated[
        str | None, typer.Option(help="Wait for a job: its number, or afterany:123 and the like.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder of log files.  [default: slurm in the run's folder]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch file; submit nothing.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Run it here in the same way, without a cluster.")
    ] = False,
    look: Annotated[
        bool,
        typer.Option(
            "--look/--no-look",
            help="Look for models, weights and data before submitting; not for what a job that is "
            "waited for (--dependency) will make.",
        ),
    ] = True,
) -> None:
    """Run a command on a SLURM cluster; it is requeued and goes on until it is done.

    What is wrong with the call is told here, not by a job that has waited for hours.  See
    `dinocell jobs` for what became of it, and docs/cluster.md.

    Example: `dinocell submit pretrain configs/ssl/jump_s3_multiview.yaml --site a100 --gpus 4`
    """
    from dinocell.cluster.plan import COMMANDS, look_once, plan_runs, plan_shard_runs, read_table
    from dinocell.cluster.site import load_site
    from dinocell.cluster.submission import parse_dependency, plan_batch

    if command not in COMMANDS:
        raise UsageError(
            f"submit must get one of {', '.join(COMMANDS)}, got {command!r}: write for example "
            "dinocell submit pretrain CONFIG"
        )
    changes = {"nodes": nodes, "time": time, "partition": partition}
    overrides = [f"{key}={value}" for key, value in changes.items() if value is not None]
    profile = load_site(site, [*(set_ or []), *overrides])
    if gpus is not None:
        profile = profile.with_gpus(gpus)
    if dependency is not None:
        dependency = parse_dependency(dependency)
    if local and (dry_run or dependency is not None):
        raise UsageError(
            f"--local must be without {'--dry-run' if dry_run else '--dependency'}, got both: choose one"
        )
    if command in ("segment", "evaluate"):
        if (gpus or 1) > 1 or (nodes or 1) > 1:
            raise UsageError(
                f"{command} must have one process, got --gpus or --nodes above 1: divide images with "
                "--shards, which run at once"
            )
        profile = profile.for_one_process()
    look_at = look_once() if look and dependency is None else None

    def parse(given: Sequence[str]) -> dict[str, Any]:
        return checked_parameters(context.find_root().command, command, given)

    with _environment(profile.environment):  # configurations name data by variables
        if shards is not None:
            if command != "segment" or array is not None:
                raise UsageError(
                    "--shards must come with segment and without --array, got it elsewhere: leave it out"
                )
            parameters = parse(context.args)
            if look_at is not None:
                look_at(command, parameters)
            plan = plan_batch(parameters, shards, dependency, write=not dry_run)
            runs, merging = plan_shard_runs(plan)
            if not runs:
                print("every shard is complete; merging", file=sys.stderr)
        else:
            rows = [] if array is None else read_table(array)
            runs = plan_runs(command, context.args, parse, table=rows, look=look_at)
            merging = None
    _hand_over(runs, merging, profile, dependency, logs, dry_run=dry_run, local=local, look=look)


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
    runs: Sequence[Any],
    merging: Any,
    profile: Any,
    dependency: str | None,
    logs: Path | None,
    *,
    dry_run: bool,
    local: bool,
    look: bool,
) -> None:
    from dinocell.cluster.submission import run_here, sbatch_text
    from dinocell.cluster.submission import submit as hand_in

    alone = profile.for_merging()
    if dry_run:
        for run in runs:
            print(f"{run.run_dir}: dinocell {shlex.join(run.command)}", file=sys.stderr)
        if runs:
            print(sbatch_text(runs, profile, dependency=dependency, log_dir=logs))
        if merging is not None:
            after = "afterany:JOB_ABOVE" if runs else None
            print(sbatch_text([merging], alone, dependency=after, log_dir=logs))
        return
    if local:
        code = run_here(runs, profile, log_dir=logs) if runs else 0
        if merging is not None and code != StoppedError.exit_code:
            code = max(code, run_here([merging], alone, log_dir=logs))
        if code:
            raise typer.Exit(code)
        return
    after = dependency
    together: list[str] = []
    if runs:
        accepted = hand_in(runs, profile, dependency=dependency, log_dir=logs, look=look)
        print(accepted.text(cancel=None if merging is None else []))
        together = [accepted.job]
        after = f"afterany:{accepted.job}"
    if merging is not None:
        print("then, when all of them have ended, the merged table:")
        try:
            last = hand_in(
                [merging], alone, dependency=after, behind=dependency, log_dir=logs, look=look
            )
            print(last.text(cancel=[*together, last.job]))
        except UsageError as error:
            raise UsageError(
                f"{error}; the images are in work all the same: when their tasks have ended, run "
                f"dinocell {shlex.join(merging.command)}"
            ) from error


@app.command()
def jobs(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[FOLDER]", help="Only runs in this folder or below it."),
    ] = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Also jobs submitted more than a week ago, and those whose runs later ones have taken on.",
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List jobs that were submitted from this account: state, progress, reasons.

    `left` is the time that the work itself needs, at its last known speed, not that of the job's limit.

    Example: `dinocell jobs`
    """
    from dinocell.cluster.jobs import jobs_text, list_jobs

    rows = list_jobs(folder=folder, everything=everything)
    if json:
        import dataclasses
        from json import dumps

        print(dumps([dataclasses.asdict(row) for row in rows], indent=1))
        return
    print(jobs_text(rows))


@app.command(context_settings=PASSES_ON)
def supervise(
    context: typer.Context,
    command: Annotated[
        str,
        typer.Argument(
            metavar="pretrain|train|segment|evaluate|shards ...",
            help="The command as it would be typed here, with its own options.",
        ),
    ],
    signal_ahead: Annotated[
        int, typer.Option(min=10, help="Seconds between the signal and the end, as in --signal.")
    ] = 120,
    max_stalled_starts: Annotated[
        int, typer.Option(min=1, help="Starts without progress after which the job is given up.")
    ] = 5,
) -> None:
    """Run a command inside a SLURM job of your own: it is saved and requeued when it must stop.

    For scripts that are submitted with sbatch (see slurm/); `dinocell submit` does this by itself.

    Example: `srun dinocell supervise pretrain configs/ssl/jump_s3_multiview.yaml`
    """
    from dinocell.cluster.plan import COMMANDS, run_dir_of
    from dinocell.cluster.record import merging_folder, shard_folder
    from dinocell.cluster.supervisor import SupervisedJob
    from dinocell.cluster.supervisor import supervise as run

    arguments = context.args
    if command == "shards" and len(arguments) == 3 and arguments[0] == "run":
        index = (
            arguments[2] if arguments[2].isdigit() else "0"
        )  # a wrong one is told by the command
        run_dir = shard_folder(arguments[1], int(index))
    elif command == "shards" and len(arguments) == 2 and arguments[0] == "merge":
        run_dir = merging_folder(arguments[1])
    elif command in COMMANDS:
        run_dir = run_dir_of(
            command, parameters_of(context.find_root().command, command, arguments)
        )
    else:
        raise UsageError(
            f"supervise must get one of {', '.join(COMMANDS)} or shards run OUT PART, shards merge OUT, got "
            f"{' '.join([command, *arguments])!r}: write for example dinocell supervise pretrain CONFIG"
        )
    job = SupervisedJob((command, *arguments), str(run_dir), signal_ahead, max_stalled_starts)
    code = run(job)
    if code:
        raise typer.Exit(code)


def checked_parameters(commands: Any, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """`parameters_of`, and what the command itself would refuse at once, whatever its files.

    Those of `segment` have its `SegmentOptions`, too, as `options`.
    """
    parameters = parameters_of(commands, name, arguments)
    if name == "segment":
        from dinocell.batch.run import check_options

        parameters["options"] = segment_options(parameters)
        check_options(parameters["options"])
    elif name == "evaluate":
        check_evaluation(parameters)
        if parameters["tune"]:
            from dinocell.evaluation.thresholds import check_metric

            try:
                check_metric(parameters["metric"])
            except ValueError as error:
                raise UsageError(str(error)) from error
    return parameters
