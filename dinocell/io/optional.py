"""Packages that an extra brings, imported when they are first used."""

import importlib
from typing import Any

from dinocell.errors import MissingExtraError


def library(name: str, of: str, extra: str = "formats") -> Any:
    """A module of the extra `extra`, imported; `of` is what needs it.

    Raises MissingExtraError (the package is not installed).
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingExtraError(
            f"{of} need the package {package}, which is not installed: run pip install '.[{extra}]' in "
            "the clone of DINOCell"
        ) from error
