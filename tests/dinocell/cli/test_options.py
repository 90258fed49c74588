"""Options as dataclasses, parameters in messages as options, errors as exit codes."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, fields
from importlib import metadata
from types import SimpleNamespace

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from dinocell.batch.options import SegmentOptions
from dinocell.cli import evaluate, jump, main, segment, weights
from dinocell.cli import inspect as inspecting
from dinocell.cli.app import app
from dinocell.cli.options import App, in_options, option
from dinocell.errors import CheckpointError, DINOCellError, StoppedError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.network.weights import convert_weights
from dinocell.pretraining.jump_index import IndexSource
from dinocell.probing.fields import FieldOptions
from dinocell.probing.inspection import InspectOptions
from dinov3.cells.streaming.shards import PackOptions
from dinov3.data.datasets.jump_s3 import StreamOptions

ROOT = get_command(app)


@dataclass(frozen=True)
class Toy:
    size: int = option("Edge.", ...)
    name: str = option("Name.", "a", names="--called -c")
    bright: bool = option("Bright.", True)


def test_a_dataclass_becomes_options_and_arrives_as_one_object():
    toys, received = App(), []

    @toys.command()
    def play(where: str, toy: Toy, loud: bool = option("Loud.", False)) -> None:
        received.append((where, toy, loud))

    for arguments in (
        ["x", "--size", "3"],
        ["x", "-c", "b", "--size", "4", "--no-bright", "--loud"],
    ):
        assert CliRunner().invoke(toys, arguments).exit_code == 0
    assert received == [("x", Toy(3), False), ("x", Toy(4, "b", False), True)]
    assert CliRunner().invoke(toys, ["x"]).exit_code == 2  # the field without default


# --- every option reaches the object or function below the command line ---


@pytest.mark.parametrize(
    ("flags", "target", "other"),
    [
        (segment.SegmentFlags, SegmentOptions, {"formats", "channels"}),
        (inspecting.Fields, FieldOptions, {"channels"}),
        (inspecting.Inspecting, InspectOptions, set()),
        (jump.Store, StreamOptions, set()),
        (jump.Source, IndexSource, set()),
        (jump.PackFlags, PackOptions, set()),
        (weights.Conversion, convert_weights, set()),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_options_have_the_names_and_defaults_of_what_they_set(flags, target, other):
    """`other`: fields with a type of their own, which the command converts."""
    known = inspect.signature(target).parameters
    for field in fields(flags):
        assert field.name in known
        if field.name not in other and field.default is not MISSING:
            assert field.default == known[field.name].default, field.name


def test_every_option_of_segment_reaches_its_field():
    assert {field.name for field in fields(segment.SegmentFlags)} == {
        field.name for field in fields(SegmentOptions)
    }
    given = {"formats": ["png", "roi"], "channels": "0, DNA", "percentiles": "2,98"}
    changed = {
        field.name: not field.default
        if isinstance(field.default, bool)
        else given.get(field.name, f"new {field.name}")
        for field in fields(segment.SegmentFlags)
    }
    options = segment.segment_options(changed)
    converted = {"formats": ("png", "roi"), "channels": (0, "DNA"), "percentiles": (2.0, 98.0)}
    assert vars(options) == changed | converted
    assert segment.SegmentFlags().for_batch() == SegmentOptions()


def test_scoring_reaches_both_kinds_of_evaluation():
    settings = evaluate.Scoring([0.6], 3.0).settings()
    assert settings == {"iou_thresholds": (0.6,), "boundary_tolerance_px": 3.0}
    # `evaluate_folders` and `evaluate_model` pass them on
    assert set(settings) <= set(inspect.signature(evaluate_pairs).parameters)


# --- messages ---


def context_of(*path: str, command: str | None = None):
    """A context as a command leaves it; `command` is the one that `submit` runs."""
    found = ROOT
    for name in path:
        found = found.commands[name]
    return SimpleNamespace(
        command=found,
        params={} if command is None else {"command": command},
        allow_extra_args=bool(found.context_settings.get("allow_extra_args")),
        find_root=lambda: SimpleNamespace(command=ROOT),
    )


def all_commands(group=None, path=()):
    for name, command in (group or ROOT).commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_parameter_of_every_command_is_spelled_as_it_is_typed():
    for path, command in all_commands():
        for parameter in command.params:
            text = in_options(f"`{parameter.name.rstrip('_')}` must be right", context_of(*path))
            spelled = text.removesuffix(" must be right")
            if parameter.param_type_name == "option":
                assert spelled in parameter.opts
                assert spelled.startswith("--") or len(parameter.opts) == 1
            else:
                assert spelled == (parameter.metavar or parameter.name.upper())


@pytest.mark.parametrize(
    ("path", "message", "shown"),
    [
        (["segment"], "lower `peak_threshold`", "lower --peak-threshold"),
        (["segment"], "set `overwrite=True`", "set --overwrite"),
        (["segment"], "set `overlay=False`", "set --no-overlay"),
        (["segment"], "use `precision=bf16`", "use --precision bf16"),
        (["segment"], "use `formats=png`", "use --format png"),
        (["pretrain"], "or `resume=False`", "or --no-resume"),
        (["jump", "index"], "`kind` and `table`", "--from and --table"),
        (["weights", "convert"], "`source` is `target`", "IN is OUT"),
        (["submit"], "`set` and `look=False`", "--set and --no-look"),
        (["segment"], "`optim.lr`, `n o`, `lr=1`, `x`", "`optim.lr`, `n o`, `lr=1`, `x`"),
        (["segment"], "`report=False`", "`report=False`"),  # no option turns it off
    ],
)
def test_a_message_as_a_command_shows_it(path, message, shown):
    assert in_options(message, context_of(*path)) == shown


def test_a_command_that_runs_another_one_knows_the_options_of_both():
    message = "`peak_threshold` or `partition`"
    assert in_options(message, context_of("submit", command="segment")) == (
        "--peak-threshold or --partition"
    )
    assert in_options(message, context_of("submit", command="train")) == (
        "`peak_threshold` or --partition"
    )
    assert in_options(message, context_of("shards", "plan")) == "--peak-threshold or `partition`"
    assert in_options(message, None) == message


# --- errors ---


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CheckpointError("`model` is damaged"), 1, "dinocell: error: --model is damaged\n"),
        (ValueError("`out` is bad"), 1, "dinocell: error: --out is bad\n"),
        (MemoryError(), 1, "dinocell: error: MemoryError\n"),
        (StoppedError("stopped: `out` has it all"), 75, "dinocell: stopped: --out has it all\n"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_an_error_inside_a_command_is_one_line_and_an_exit_code(
    monkeypatch, capsys, error, code, text
):
    monkeypatch.setattr("dinocell.demo.run_demo", raising(error))
    with pytest.raises(SystemExit) as stop:
        main(["demo"])
    assert (stop.value.code, capsys.readouterr().err) == (code, text)


def raising(error):
    def run(*arguments, **options):
        raise error

    return run


def test_tracebacks_when_they_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("dinocell.demo.run_demo", raising(DINOCellError("no")))
    for arguments, environment, shown in (
        (["demo"], "", False),
        (["-v", "demo"], "", True),
        (["demo"], "failures", True),
    ):
        monkeypatch.setenv("DINOCELL_TRACEBACKS", environment)
        with pytest.raises(SystemExit):
            main(arguments)
        assert ("Traceback" in capsys.readouterr().err) == shown


# --- another project of the same name ---


@pytest.mark.parametrize(("entry", "warned"), [("dinocell.cli:main", 0), ("other:run", 1)])
def test_another_package_of_this_name_is_named(monkeypatch, capsys, entry, warned):
    found = SimpleNamespace(version="0.74", entry_points=[SimpleNamespace(value=entry)])
    monkeypatch.setattr(metadata, "distribution", {"dinocell": found}.__getitem__)
    monkeypatch.setattr("dinocell.demo.run_demo", raising(DINOCellError("no")))
    for arguments in (["--version"], ["demo"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert capsys.readouterr().err.count("dinocell 0.74 of another project") == warned


def test_no_package_of_this_name(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().err == ""
