"""What the files of commands share: their `App`, common options, and the spelling of parameters."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer
from typer.core import TyperCommand

from dinocell.errors import UsageError

if TYPE_CHECKING:
    from dinocell.io.planes import PlaneChoice

# What `submit`, `supervise` and `shards plan` do not know is an option of the command that they run.
PASSES_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def option(
    help: str,
    default: Any = None,
    names: str = "",
    *,
    kind: Callable[..., Any] = typer.Option,
    **settings: Any,
) -> Any:
    """Declare an option as the default of a parameter of a command or of a field of a dataclass.

    The annotation of the parameter or field is the type of the option.

    Parameters
    ----------
    default : `...` makes the option required; None means that it may be left out
    names : as they are typed, such as "--out -o"; without them --x for the name x, and --x/--no-x for
        a bool that is True
    settings : what else `kind` takes, such as `min` and `metavar`
    """
    declared = partial(kind, help=help, **settings)
    given = MISSING if default is ... else default
    return field(default=given, metadata={"names": names, "declared": declared})


argument = partial(option, default=..., kind=typer.Argument)

Device = Annotated[
    str,
    typer.Option(
        help="Compute on this device: auto (a GPU if one exists), cpu, cuda, cuda:N for the GPU with "
        "number N, or mps."
    ),
]
ModelOption = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Use this model: a model file or the name of a bundled model."
    ),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Write the results to this folder.")]
Which = Annotated[
    str, typer.Option(help="Take these weights of a training checkpoint: teacher or student.")
]


@dataclass
class Call:
    """What `main` must know of a call when it failed; each context has it as `obj`.

    `verbose` shows the traceback of a failure; `context` is that of the command that ran, None before.
    """

    verbose: bool = False
    context: Any = None


class _Command(TyperCommand):
    """A command that leaves its context to `main`."""

    def invoke(self, ctx: Any) -> Any:
        ctx.ensure_object(Call).context = ctx
        return super().invoke(ctx)


class App(typer.Typer):
    """A `typer.Typer` whose commands may take dataclasses of options."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """Register a function as a command; lists of commands show its first paragraph whole."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            short = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
            add = super(App, self).command(name, cls=_Command, short_help=short, **settings)
            return add(expand_dataclasses(function))

        return register


def expand_dataclasses(function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace parameters whose type is a dataclass by one parameter for each of its fields.

    `option` and `argument` declare fields and other parameters alike.  The function receives one
    instance of each dataclass.
    """
    signature = inspect.signature(function, eval_str=True)
    bundles: dict[str, type[Any]] = {}
    expanded = []
    for name, parameter in signature.parameters.items():
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
            bundles[name] = parameter.annotation
            types = get_type_hints(parameter.annotation, include_extras=True)
            expanded += [_parameter(f.name, types[f.name], f) for f in fields(parameter.annotation)]
        else:
            expanded.append(_parameter(name, parameter.annotation, parameter.default))

    @wraps(function)
    def command(**given: Any) -> Any:
        for name, bundle in bundles.items():
            given[name] = bundle(**{field.name: given.pop(field.name) for field in fields(bundle)})
        return function(**given)

    command.__signature__ = signature.replace(parameters=expanded)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in expanded}
    return command


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """What typer reads; `default` may be what `option` returned."""
    if isinstance(default, Field):
        declared, names = default.metadata.get("declared"), default.metadata.get("names", "")
        default = inspect.Parameter.empty if default.default is MISSING else default.default
        if declared is not None:
            if not names and annotation is bool and default is False:
                names = "--" + name.replace("_", "-")
            annotation = Annotated[annotation, declared(*names.split())]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def channel_names(text: str | None, example: str = "DNA,ER") -> list[str] | None:
    """The names in the text of an option of channels; None if it was left out."""
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    if text is not None and not names:
        raise UsageError(f"`channels` must name a channel, got nothing: give for example {example}")
    return names or None


def channel_choice(text: str | None) -> tuple[int | str, ...] | None:
    """`channel_names` with numbers where a name can be a position: 0 but not 01."""
    names = channel_names(text, example="0 or DNA,ER")
    if names is None:
        return None
    from dinocell.io.planes import channel_of

    return tuple(map(channel_of, names))


def plane_choice(flags: Any) -> "PlaneChoice":
    """The options of a command that say which plane of a file is read, as `read_image` takes them."""
    choice: dict[str, Any] = {"channels": channel_choice(flags.channels), "page": flags.page}
    for name in ("z", "time", "scene"):
        value = getattr(flags, name)
        choice[name] = int(value) if isinstance(value, str) and value.isdecimal() else value
    return cast("PlaneChoice", choice)


def in_options(text: str, context: Any) -> str:
    """Spell the parameters that a message names as the user of a command knows them.

    A message of the packages below names a parameter in backticks: `overwrite` becomes --overwrite,
    `overlay=False` --no-overlay, `source` of `weights convert` IN.  Other words stay as they are, and all
    if `context`, that of the command that ran, is None.
    """
    if context is None:
        return text
    spellings: dict[str, tuple[str, str]] = {}
    if context.allow_extra_args:  # they are arguments of the command that this one runs
        inner = context.find_root().command.commands.get(context.params.get("command", "segment"))
        spellings |= {} if inner is None else _spellings(inner)
    spellings |= _spellings(context.command)

    def spell(found: re.Match[str]) -> str:
        name, value = found.groups()
        on, off = spellings.get(name, ("", ""))
        if value == "False":
            return off or found[0]
        if not on or value in (None, "True"):
            return on or found[0]
        return f"{on} {value}"

    return re.sub(r"`(\w+)(?:=([^`]+))?`", spell, text)


def _spellings(command: Any) -> Mapping[str, tuple[str, str]]:
    """For each parameter what sets it on the command line, and what unsets it if anything does."""
    found = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            found[parameter.name] = (parameter.metavar or parameter.name.upper(), "")
            continue
        on, off = (
            next((name for name in names if name.startswith("--")), (names or [""])[0])
            for names in (parameter.opts, parameter.secondary_opts)
        )
        found[parameter.name.rstrip("_")] = (on, off)
        if on.startswith("--no-"):  # a flag that turns off what the packages call by its name
            found.setdefault(parameter.name.removeprefix("no_"), (on, on))
    return found


def parameters_of(commands: Any, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters of a command, by name, from its arguments as they were typed.

    `commands` is the group that has the command: `context.find_root().command`.  Raises UsageError with
    the text of the command itself if the arguments are wrong.
    """
    try:
        with commands.commands[name].make_context(f"dinocell {name}", list(arguments)) as context:
            return dict(context.params)
    except Exception as error:
        message = getattr(error, "format_message", None)  # of every error about a command line
        if message is None:
            raise
        raise UsageError(f"`dinocell {name}`: {message()} (see dinocell {name} --help)") from error
