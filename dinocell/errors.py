"""The exceptions DINOCell raises for things outside the code: files, options, checkpoints, data sets.

Each message is one sentence in three parts: what must hold, what came, what to do.  Wrong *arguments*
of Python functions stay plain `ValueError` and `TypeError`; the classes here also know the exit
code that the command line ends with: 2 for a wrong call, 1 for work that failed, 75 for work that was told
to stop, saved itself and goes on when the same command is run again.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DINOCellError",
    "DataSetError",
    "ImageFileError",
    "MissingExtraError",
    "StoppedError",
    "UsageError",
]


class DINOCellError(Exception):
    """Base class of all errors a user can cause or meet.

    `exit_code` is the process exit code of the command line: 1, the work failed.
    """

    exit_code: int = 1


class UsageError(DINOCellError):
    """The call itself is wrong: a path that does not exist, an unknown option value."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or `key=value` override is wrong; unknown keys name the known ones."""


class DataSetError(UsageError):
    """A folder of images and labels does not fit together: names that do not match, sizes that differ."""


class ImageFileError(DINOCellError):
    """An image file is missing, unreadable, truncated, or does not hold a 2-D image."""


class CheckpointError(DINOCellError):
    """A model file or checkpoint is truncated, pickled, or of another architecture."""


class MissingExtraError(DINOCellError):
    """An optional dependency is not installed; the message names the `pip install` that brings it."""


class StoppedError(DINOCellError):
    """A signal ended the work after its state was saved; the same command goes on from there.

    The exit code is `EX_TEMPFAIL` of sysexits.h: try again.
    """

    exit_code = 75
