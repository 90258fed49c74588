"""Options that several commands share, and commands that take the options of another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dinocell.errors import UsageError

__all__ = ["PASSES_ON", "Device", "ModelOption", "parameters_of"]

Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", show_default=True)
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A model file, or the name of a bundled model.")
]

# What `submit`, `supervise` and `shards plan` do not know is an option of the command that they run.
PASSES_ON = {"ignore_unknown_options": True, "allow_extra_args": True}


def parameters_of(commands: Any, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters of a command, by name, from its arguments.

    Parameters
    ----------
    commands : group that has the command: `context.find_root().command`
    name : of the command
    arguments : as they were typed

    Raises
    ------
    UsageError
        The arguments are wrong; the text is that of the command itself.
    """
    try:
        with commands.commands[name].make_context(f"dinocell {name}", list(arguments)) as context:
            return dict(context.params)
    except Exception as error:
        message = getattr(error, "format_message", None)  # of every error about a command line
        if message is None:
            raise
        raise UsageError(f"dinocell {name}: {message()} (see dinocell {name} --help)") from error
