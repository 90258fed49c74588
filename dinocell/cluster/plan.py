"""Plan a submission: commands with the folders of their runs, checked before they wait in the queue."""

import csv
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinocell.batch.journal import merging_folder, shard_folder
from dinocell.cluster.commands import command_of
from dinocell.cluster.record import continues_run
from dinocell.errors import DINOCellError, UsageError
from dinocell.progress import progress
from dinocell.submitted import SubmittedCommand

if TYPE_CHECKING:
    from dinocell.batch.parts import ShardPlan

Parse = Callable[[Sequence[str]], Mapping[str, Any]]
Look = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class PlannedRun:
    """One job, or one task of an array."""

    name: str  # of the job
    command: tuple[str, ...]  # arguments of `dinocell`
    run_dir: Path  # folder of the run; its log files go to a folder `slurm` in it


def plan_runs(
    name: str,
    arguments: Sequence[str],
    parse: Parse,
    *,
    table: Sequence[Mapping[str, str]] = (),
    look: Look | None = None,
) -> list[PlannedRun]:
    """The runs of a submission, each checked before it waits for hours.

    Parameters
    ----------
    name : one of `COMMANDS`
    arguments : of the command, as they were typed
    parse : gives the command's parameters by name, or raises what is wrong with its arguments
    table : rows of an array: of `pretrain` and `train` keys of the configuration, of `segment` and
        `evaluate` options (`true` and `false` of those without a value); the column `name` names the
        task, "" leaves a value as it is
    look : called with the command's name and parameters, refuses missing inputs; if given, the data,
        weights, results and runs that the folder has are checked here, too

    Raises DINOCellError (the configuration, a row of the table, or what it names is wrong).
    """
    command = command_of([name])
    if not table:
        parameters = command.read(parse(arguments))
        run = _checked(command, arguments, parameters, command.run_dir(parameters), look)
        job = {"pretrain": "ssl"}.get(name, name)
        return [replace(run, name=f"{job}-{run.run_dir.name}")]
    runs = []
    labels = [row.get("name") or f"{index:03d}" for index, row in enumerate(table)]
    base: Path | None = None
    with progress("checking", len(table)) as bar:
        for index, (label, row) in enumerate(zip(labels, table, strict=True)):
            values = {key: value for key, value in row.items() if key != "name" and value != ""}
            options = command.options_of_row(values)
            try:
                # Without the row, the command may lack required options.
                given = parse([*arguments, *options])
                base = base or command.run_dir(command.read(given))
                run_dir = base / label
                whole = [*arguments, *options, *command.options_of_folder(run_dir, given)]
                run = _checked(command, whole, command.read(parse(whole)), run_dir, look)
            except DINOCellError as error:
                raise type(error)(f"Row {index + 1} of the table ({label}): {error}") from error
            runs.append(replace(run, name=f"{base.name}-{label}"))
            bar.advance(note=label)
    twice = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twice:
        raise UsageError(
            f"Rows of the table must differ in name, got {', '.join(twice)} twice: rename one of the rows"
        )
    return runs


def plan_shard_runs(plan: "ShardPlan") -> tuple[list[PlannedRun], PlannedRun]:
    """The incomplete parts of a divided batch, and the merging that follows them."""
    from dinocell.batch.parts import open_shards

    out, name = str(plan.out), plan.out.name
    parts = [
        PlannedRun(f"segment-{name}", ("shards", "run", out, str(k)), shard_folder(out, k))
        for k in open_shards(plan)
    ]
    return parts, PlannedRun(f"merge-{name}", ("shards", "merge", out), merging_folder(out))


def plan_ablation_runs(
    arguments: Sequence[str], parse: Parse, look: Look | None = None
) -> tuple[list[PlannedRun], PlannedRun]:
    """A task for each run of `ablate` that has no model yet, and the tables that follow them.

    Raises DINOCellError (as `plan_runs`).
    """
    tables = plan_runs("ablate", arguments, parse, look=look)[0]
    command = command_of(["ablate"])
    parameters = command.read(parse(arguments))
    name = f"ablate-{tables.run_dir.name}"
    tasks = []
    for index, run in enumerate(parameters["runs"]):
        folder = Path(run.config.output_dir)
        if not (folder / "model.safetensors").exists():
            tasks.append(PlannedRun(name, (*tables.command, "--only", str(index)), folder))
    return tasks, replace(tables, name=f"tables-{tables.run_dir.name}")


def run_dir_of(name: str, parameters: Mapping[str, Any]) -> Path:
    """Folder of a command's run: its own output folder, or one below runs/ for what has none.

    Raises ConfigError (the configuration of `train` is wrong).
    """
    command = command_of([name])
    return command.run_dir(command.read(parameters))


def _checked(
    command: SubmittedCommand,
    arguments: Sequence[str],
    parameters: Mapping[str, Any],
    run_dir: Path,
    look: Look | None,
) -> PlannedRun:
    """The run, after everything that can be known before the job starts was checked."""
    above = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UsageError(
            f"The folder of a run must be one that can be made, got {run_dir} where {above} is a file: choose another one"
        )
    if look is not None:
        look(command.name, parameters)
    whole = (command.name, *arguments)
    continues = continues_run(whole, run_dir)
    command.check(parameters, run_dir, look=look is not None, continues=continues)
    return PlannedRun("", whole, run_dir)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of a table of tasks: CSV or TSV with a header, one line a task.

    Raises UsageError (not a file, no rows, a row of another length, an empty or repeated column
    name).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"`array` must be a table in a text file, got {path} ({error}): write a CSV with a header"
        ) from error
    separator = "\t" if path.suffix == ".tsv" or "\t" in text.split("\n", 1)[0] else ","
    table = csv.reader(text.splitlines(), delimiter=separator)
    lines = [line for line in ([cell.strip() for cell in row] for row in table) if any(line)]
    if len(lines) < 2:
        raise UsageError(
            f"`array` must have a header and a line for each task, got {len(lines)} lines in {path}: "
            "add what is missing"
        )
    header, *rows = lines
    if len(set(header)) < len(header) or not all(header):
        raise UsageError(
            f"Columns of `array` must have different names, got {', '.join(header)} in {path}: "
            "rename a column"
        )
    if len(header) == 1 and ";" in header[0]:
        raise UsageError(
            f"Columns of `array` must be divided by commas or tabs, got semicolons in {path}: "
            "save the table with commas"
        )
    found = []
    for number, row in enumerate(rows, start=2):
        where = f"in line {number} of {path}"
        if len(row) != len(header):
            raise UsageError(
                f"Lines of `array` must have {len(header)} values, got {len(row)} {where}: quote values "
                "with commas"
            )
        found.append(dict(zip(header, row, strict=True)))
        label = found[-1].get("name", "")
        if "/" in label or label in (".", ".."):
            raise UsageError(
                f"Names of tasks must be names of folders, got {label!r} {where}: leave out the slashes"
            )
    return found


def look_once() -> Callable[[str, Mapping[str, Any]], None]:
    """Refuse missing or unusable inputs of a command, once for all rows of a table with the same ones."""
    seen = set()
    inputs = ("images", "recursive", "model", "pred", "truth", "data")

    def look(name: str, parameters: Mapping[str, Any]) -> None:
        key = tuple(str(parameters.get(option)) for option in inputs)
        if key not in seen:
            seen.add(key)
            command_of([name]).check_inputs(parameters)

    return look
