"""The `dinocell` command: its groups of commands, its errors and its exit codes.

Exit codes: 0 done, 1 the work failed (for some files, perhaps), 2 the call was wrong, 75 stopped by
a signal after everything was saved (run the same command again), 130 stopped by Ctrl-C.
"""

import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata

import typer

from dinocell import DISTRIBUTION, __version__
from dinocell.cli import (
    cluster,
    convert,
    data,
    doctor,
    evaluate,
    export,
    info,
    inspect,
    jump,
    segment,
    serve,
    shards,
    train,
    upstream,
    weights,
)
from dinocell.cli.options import Call, expand_dataclasses, in_options, option
from dinocell.errors import DINOCellError, StoppedError, UsageError, how_to_load
from dinocell.tree import tree_imports

app = typer.Typer(
    name="dinocell",
    help="Segment cells in microscopy images; train and evaluate the networks that do it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's tables cut the names of options on a terminal of 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (
    segment,
    serve,
    info,
    convert,
    shards,
    evaluate,
    train,
    data,
    inspect,
    weights,
    export,
    jump,
    upstream,
    cluster,
    doctor,
):
    app.add_typer(group.app, short_help=group.app.info.help)  # whole: click would shorten it

_INTERRUPTED = 130  # what typer makes of a KeyboardInterrupt, without a word


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    call = Call()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        with tree_imports():
            app(args=arguments, prog_name="dinocell", obj=call)
    except StoppedError as error:
        print(f"dinocell: {in_options(str(error), call.context)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except DINOCellError as error:
        _fail(error, error.exit_code, call)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        _fail(error, 1, call)
    except ImportError as error:
        error.msg = how_to_load(error)
        _fail(error, 1, call)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("dinocell: stopped", file=sys.stderr)
        raise


def _fail(error: BaseException, exit_code: int, call: Call) -> None:
    in_job = os.environ.get("DINOCELL_TRACEBACKS") == "failures"
    if call.verbose or (in_job and exit_code != UsageError.exit_code):
        import traceback

        traceback.print_exception(error)
    text = in_options(str(error), call.context) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.strerror}: {error.filename}"  # and no number
    print(f"dinocell: error: {text}", file=sys.stderr)
    _warn_of_namesake()
    sys.exit(exit_code)


def _warn_of_namesake() -> None:
    """Tell of another project's distribution whose modules may stand in place of ours."""
    try:
        found = metadata.distribution("dinocell")  # a look-up of one name: milliseconds
    except metadata.PackageNotFoundError:
        return
    if any(point.value == "dinocell.cli:main" for point in found.entry_points):
        return  # this project, installed when its distribution had that name
    print(
        f"dinocell: warning: the package dinocell {found.version} of another project is installed and "
        f"may have replaced files of this one ({DISTRIBUTION}): uninstall both, then install "
        f"{DISTRIBUTION} again",
        file=sys.stderr,
    )


def _show_version(value: bool) -> None:
    if value:
        print(f"dinocell {__version__}")
        _warn_of_namesake()
        raise typer.Exit


@app.callback()
@expand_dataclasses
def _options(
    context: typer.Context,
    verbose: bool = option("Show the traceback when a command fails.", False, "--verbose -v"),
    version: bool = option(
        "Print the version and exit.", False, callback=_show_version, is_eager=True
    ),
) -> None:
    context.ensure_object(Call).verbose = verbose


if __name__ == "__main__":
    main()
