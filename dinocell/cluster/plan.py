"""What is to be submitted: commands with the folders of their runs, checked before they wait."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dinocell.batch.parts import merging_folder, shard_folder
from dinocell.cluster.record import goes_on
from dinocell.errors import DINOCellError, UsageError
from dinocell.progress import progress

if TYPE_CHECKING:
    from dinocell.batch.parts import ShardPlan

__all__ = [
    "COMMANDS",
    "PlannedRun",
    "look_for_inputs",
    "look_once",
    "plan_runs",
    "plan_shard_runs",
    "read_table",
    "run_dir_of",
]

COMMANDS = ("pretrain", "train", "segment", "evaluate")
"""Commands that can be submitted."""

_ON_BY_DEFAULT = ("overlay",)
_ELSEWHERE = "mend the path, or add --no-look if it is on the nodes only"

Parse = Callable[[Sequence[str]], Mapping[str, Any]]
Look = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class PlannedRun:
    """One job, or one task of an array.

    Attributes
    ----------
    name : of the job
    command : arguments of `dinocell`
    run_dir : folder of the run; its log files go to a folder `slurm` in it
    """

    name: str
    command: tuple[str, ...]
    run_dir: Path


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
    look : refuses parameters of a command (its name, they) whose inputs are not there; then data,
        weights, results and other runs of the folder are looked at here, too

    Raises
    ------
    DINOCellError
        The configuration, a row of the table, or what it names is wrong.
    """
    if not table:
        parameters = parse(arguments)
        run_dir = run_dir_of(name, parameters)
        _check(name, parameters, run_dir, look, (name, *arguments))
        job = {"pretrain": "ssl"}.get(name, name)
        return [PlannedRun(f"{job}-{run_dir.name}", (name, *arguments), run_dir)]
    runs = []
    labels = [row.get("name") or f"{index:03d}" for index, row in enumerate(table)]
    base: Path | None = None
    with progress("checking", len(table)) as bar:
        for index, (label, row) in enumerate(zip(labels, table, strict=True)):
            values = {key: value for key, value in row.items() if key != "name" and value != ""}
            options = _row_options(name, values)
            try:
                given = parse([*arguments, *options])  # alone, the command may lack what rows give
                base = base or run_dir_of(name, given)
                run_dir = base / label
                whole = [*arguments, *options, *_folder_options(name, run_dir, given)]
                _check(name, parse(whole), run_dir, look, (name, *whole))
            except DINOCellError as error:
                raise type(error)(f"row {index + 1} of the table ({label}): {error}") from error
            runs.append(PlannedRun(f"{base.name}-{label}", (name, *whole), run_dir))
            bar.advance(note=label)
    twice = sorted(label for label, count in Counter(labels).items() if count > 1)
    if twice:
        raise UsageError(
            f"rows of the table must differ in name, got {', '.join(twice)} twice: rename one"
        )
    return runs


def plan_shard_runs(plan: ShardPlan) -> tuple[list[PlannedRun], PlannedRun]:
    """The parts of a divided batch that are not complete, and the merging that comes after them."""
    from dinocell.batch.parts import open_shards

    name = f"segment-{plan.out.name}"
    parts = [
        PlannedRun(
            name, ("shards", "run", str(plan.out), str(index)), shard_folder(plan.out, index)
        )
        for index in open_shards(plan)
    ]
    merging = PlannedRun(
        f"merge-{plan.out.name}", ("shards", "merge", str(plan.out)), merging_folder(plan.out)
    )
    return parts, merging


def run_dir_of(name: str, parameters: Mapping[str, Any]) -> Path:
    """Folder of a command's run: its own output folder, or one below runs/ for what has none.

    Parameters
    ----------
    name : one of `COMMANDS`
    parameters : of the command, parsed

    Raises
    ------
    ConfigError
        The configuration of `train` is wrong.
    """
    if name == "pretrain":
        given = parameters["output_dir"]
        return Path(given) if given else Path("runs/ssl") / Path(parameters["config"]).stem
    if name == "train":
        from dinocell.settings import load_settings
        from dinocell.training.config import TrainConfig

        return Path(
            load_settings(
                TrainConfig, parameters["config"], parameters["overrides"] or []
            ).output_dir
        )
    if name == "segment":
        return Path(parameters["out"])
    given = [parameters[key] for key in ("out", "model", "data", "pred", "truth")]
    paths = [str(Path(value).resolve()) for value in given if value is not None]
    # Two models of one name, or one on two sets of data, are two runs.
    digest = hashlib.sha256("\n".join(paths).encode()).hexdigest()[:8]
    return Path("runs/evaluate") / f"{Path(paths[0]).stem}-{digest}"


def _row_options(name: str, values: Mapping[str, str]) -> list[str]:
    """A row's values as arguments of the command."""
    if name in ("pretrain", "train"):
        return [f"{key}={value}" for key, value in values.items()]
    options: list[str] = []
    for key, value in values.items():
        option = key.replace("_", "-")
        if value.lower() == "true":
            options.append(f"--{option}")
        elif value.lower() != "false":
            options += [f"--{option}", value]
        elif option in _ON_BY_DEFAULT:
            options.append(f"--no-{option}")
    return options


def _folder_options(name: str, run_dir: Path, parameters: Mapping[str, Any]) -> list[str]:
    """What sends the results of a command to a folder of its own."""
    if name == "train":
        return [f"output_dir={run_dir}"]
    if name == "pretrain":
        return ["--output-dir", str(run_dir)]
    if name == "segment":
        return ["--out", str(run_dir)]
    suffix = Path(parameters["out"]).suffix if parameters["out"] else ".json"
    return ["--out", str(run_dir / f"scores{suffix}")]


def _check(
    name: str,
    parameters: Mapping[str, Any],
    run_dir: Path,
    look: Look | None,
    command: Sequence[str],
) -> None:
    """Read the configuration as the job will, and look for what it names."""
    above = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UsageError(
            f"the folder of a run must be one that can be made, got {run_dir} where {above} is a file: "
            "choose another one"
        )
    if look is not None:
        look(name, parameters)
        if name == "segment" and not goes_on(command, run_dir):
            _refuse_results(parameters, run_dir)
    overrides = list(parameters.get("overrides") or [])
    if name == "train":
        from dinocell.settings import load_settings
        from dinocell.training.config import TrainConfig

        config = load_settings(TrainConfig, parameters["config"], overrides)
        if look is not None:
            from dinocell.training.datasets import split_pairs

            split_pairs(config.data, config.seed)
            _look_for_weights("backbone.weights", config.backbone.weights)
            if (run_dir / "config.yaml").exists():
                from dinocell.training.trainer import refuse_other_run

                refuse_other_run(config)
    elif name == "pretrain":
        from dinocell.tree import tree_is_bundled

        path = Path(parameters["config"])
        if not path.is_file():
            raise UsageError(f"the configuration must be a file, got {path}: see configs/ssl")
        from dinov3 import configs

        if not tree_is_bundled():
            return
        arguments = SimpleNamespace(config_file=str(path), output_dir=str(run_dir), opts=overrides)
        try:
            settings = configs.get_cfg_from_args(arguments, strict=True)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        if look is not None:
            _look_for_weights("student.pretrained_weights", settings.student.pretrained_weights)
            _look_for_fields(str(settings.train.dataset_path))
            if (run_dir / "ckpt").is_dir() and not parameters["no_resume"]:
                from dinov3.train import train as program

                try:
                    program.check_resumption(settings, run_dir, resume=True)
                except ValueError as error:
                    raise UsageError(str(error)) from error


def _refuse_results(parameters: Mapping[str, Any], out: Path) -> None:
    """What the job would refuse: results of the images without --resume or --overwrite."""
    if not out.is_dir() or parameters["resume"] or parameters["overwrite"]:
        return
    from dinocell.batch.folder import refuse_results
    from dinocell.io import find_images

    paths = find_images(parameters["images"], recursive=parameters["recursive"])
    refuse_results(paths, out, parameters["options"].formats)


def _look_for_weights(key: str, name: str | None) -> None:
    from dinocell.network.weights import find_weights

    if name and not find_weights(name).exists():
        raise UsageError(f"{key} must be a file that exists, got {name}: {_ELSEWHERE}")


def _look_for_fields(dataset: str) -> None:
    """The folder or index of a data set such as `JUMPS3MultiView:index=pilot.arrow`."""
    given = dict(part.partition("=")[::2] for part in dataset.split(":")[1:])
    for key in ("root", "index"):
        value = given.get(key, "")
        # A relative index may be in the root.
        if value and not (Path(value).exists() or Path(given.get("root", ""), value).exists()):
            raise UsageError(
                f"train.dataset_path must have a root or index that exists, got {key}={value}: "
                f"{_ELSEWHERE}"
            )


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of a table of tasks: CSV or TSV with a header, one line a task.

    Raises
    ------
    UsageError
        Not a file, no rows, a row of another length, an empty or repeated column name.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--array must be a table in a text file, got {path} ({error}): write a CSV with a header"
        ) from error
    separator = "\t" if path.suffix == ".tsv" or "\t" in text.split("\n", 1)[0] else ","
    lines = [
        [cell.strip() for cell in line]
        for line in csv.reader(text.splitlines(), delimiter=separator)
        if any(cell.strip() for cell in line)
    ]
    if len(lines) < 2:
        raise UsageError(
            f"--array must have a header and a line for each task, got {len(lines)} lines in {path}: "
            "write for example optim.lr and below it 1e-4"
        )
    header, *rows = lines
    if len(set(header)) < len(header) or not all(header):
        raise UsageError(
            f"columns of --array must have names, each its own, got {', '.join(header)} in {path}: "
            "rename them"
        )
    if len(header) == 1 and ";" in header[0]:
        raise UsageError(
            f"columns of --array must be divided by commas or tabs, got semicolons in {path}: save it "
            "as CSV with commas"
        )
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UsageError(
                f"lines of --array must have {len(header)} values, got {len(row)} in line {number} of "
                f"{path}: quote values with commas"
            )
    for number, row in enumerate(rows, start=2):
        label = dict(zip(header, row, strict=True)).get("name", "")
        if "/" in label or label in (".", ".."):
            raise UsageError(
                f"names of tasks must be names of folders, got {label!r} in line {number} of {path}: "
                "leave out /"
            )
    return [dict(zip(header, row, strict=True)) for row in rows]


def look_once() -> Callable[[str, Mapping[str, Any]], None]:
    """`look_for_inputs`, once for all rows of a table with the same inputs."""
    seen = set()

    def look(name: str, parameters: Mapping[str, Any]) -> None:
        inputs = ("images", "recursive", "model", "pred", "truth", "data")
        key = tuple(str(parameters.get(option)) for option in inputs)
        if key not in seen:
            seen.add(key)
            look_for_inputs(name, parameters)

    return look


def look_for_inputs(name: str, parameters: Mapping[str, Any]) -> None:
    """Whether what `segment` and `evaluate` read is there."""
    if name == "segment":
        from dinocell.batch.options import check_call
        from dinocell.io import find_images

        paths = find_images(parameters["images"], recursive=parameters["recursive"])
        check_call(paths, parameters["options"])
    elif name == "evaluate":
        for option in ("pred", "truth", "data"):
            folder = parameters[option]
            if folder is not None and not folder.is_dir():
                raise UsageError(
                    f"`{option}` must be a folder that exists, got {folder}: correct the path, or use "
                    "`look=False` if it exists only on the nodes"
                )
        if parameters["data"] is not None:
            from dinocell.evaluation.model_evaluation import check_data_folder

            check_data_folder(parameters["data"])
    if name in ("segment", "evaluate") and parameters["model"] is not None:
        from dinocell.network.model import read_model_header

        read_model_header(parameters["model"])
