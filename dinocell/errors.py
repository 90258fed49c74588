"""The exceptions DINOCell raises for things outside the code: files, options, checkpoints, data sets.

A message about a wrong value is one sentence in three parts: what must hold, what came, what to do.  A
message about an event says what happened, what was kept and what to do next.  A parameter is named in
backticks; the command line spells it as the option of the command that ran.

Wrong *arguments* of Python functions stay plain `ValueError` and `TypeError`.  The classes here also hold
the exit code of the command line: 2 for a wrong call, 1 for work that failed, 75 for work that a signal
stopped after its state was saved, so that the same command continues it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DINOCellError(Exception):
    """Base class of all errors that a user can cause or meet."""

    exit_code: int = 1


class UsageError(DINOCellError):
    """The call itself is wrong: a path that does not exist, an unknown option value."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or `key=value` override is wrong; unknown keys name the known ones."""


class DataSetError(UsageError):
    """A folder of images and labels does not fit together: names that do not match, sizes that differ."""


class ImageFileError(DINOCellError):
    """A file of images or labels is missing, damaged, cut short, or of another kind than it must be."""


class ScratchSpaceError(DINOCellError):
    """The folder for temporary files has no room for the planes of a large image."""


class CheckpointError(DINOCellError):
    """A model file or checkpoint is truncated, pickled, or of another architecture."""


class MissingExtraError(DINOCellError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""


class StoppedError(DINOCellError):
    """A signal ended the work after its state was saved; the same command continues from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, which asks to try again


@contextmanager
def raised_as(kind: type[DINOCellError], *foreign: type[Exception]) -> Iterator[None]:
    """Errors of a library as one of ours, with their text."""
    try:
        yield
    except foreign as error:
        raise kind(str(error)) from error


def how_to_load(error: ImportError) -> str:
    """What to do about a package that cannot be loaded, in one sentence."""
    if isinstance(error, ModuleNotFoundError):
        cure = "install what is missing with pip"
    elif "cannot open shared object file" in str(error):
        cure = (
            "install this library of the system; what OpenCV needs comes with `apt install libgl1 "
            "libglib2.0-0 libxcb1`, and without administrator's rights opencv-python-headless in place of "
            "opencv-python needs none"
        )
    else:
        cure = "remove and install it once more with pip"
    return f"A package cannot be loaded ({error}): {cure}"


def some(names: Sequence[str]) -> str:
    """Up to five names for a sentence, and dots if there are more."""
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)
