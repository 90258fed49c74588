"""The `dinocell` command: arguments and messages only, no image work.

Exit codes: 0 done, 1 the work failed (for some files, perhaps), 2 the call was wrong, 75 stopped by
a signal with everything saved (run the same command again).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dinocell import __version__
from dinocell.cli import (
    cluster,
    evaluate,
    inspect,
    jump,
    segment,
    shards,
    train,
    upstream,
    weights,
)
from dinocell.errors import DINOCellError, StoppedError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="dinocell",
    help="Segment cells in microscopy images; train and evaluate the networks that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for room in (segment, shards, evaluate, train, inspect, weights, jump, upstream, cluster):
    app.add_typer(room.app)

_verbose = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    try:
        app(args=arguments, prog_name="dinocell")
    except StoppedError as error:
        print(f"dinocell: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except DINOCellError as error:
        _fail(error, error.exit_code)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        print("dinocell: stopped", file=sys.stderr)
        sys.exit(1)


def _fail(error: BaseException, exit_code: int) -> None:
    in_job = os.environ.get("DINOCELL_TRACEBACKS") == "failures"
    if _verbose or (in_job and exit_code != UsageError.exit_code):
        import traceback

        traceback.print_exception(error)
    text = str(error) or type(error).__name__
    print(f"dinocell: error: {text}", file=sys.stderr)
    sys.exit(exit_code)


def _show_version(value: bool) -> None:
    if value:
        print(f"dinocell {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show a traceback when something fails.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    global _verbose
    _verbose = context.obj = verbose


if __name__ == "__main__":
    main()
