"""`njit`: numba's compiler with a cache on disk, on machines where numba finds no folder for it as well.

numba caches compiled functions beside the source or in the user's cache folder, and a function whose
cache cannot be written stops the program: on import where neither folder is writable (a container with
a read-only installation and no home), and at the first call where the disk or the quota is full.  Here
the cache is a help and never a condition: the next place is a private folder for temporary files, and
without any place the functions are compiled again in each process.  `NUMBA_CACHE_DIR` comes first.
"""

import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba

from dinocell.files import home_folder

logger = logging.getLogger("dinocell")


def njit(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, keep the result on disk if possible, and run it without the GIL."""
    compiled = numba.njit(nogil=True)(function)
    if hasattr(compiled, "enable_caching"):  # NUMBA_DISABLE_JIT gives the function itself
        _keep_on_disk(compiled)
    return compiled


def cache_folder() -> Path | None:
    """Where compiled functions are kept; None where no folder can be written."""

    def compiled_nowhere() -> None: ...

    probe: Any = numba.njit(compiled_nowhere)
    if hasattr(probe, "enable_caching") and (
        _keep_where_numba_does(probe) or _keep_in_temporary_folder(probe)
    ):
        return Path(probe._cache.cache_path)
    return None


def _keep_on_disk(compiled: Any) -> None:
    """Give a compiled function a cache, whose faults then cost time and nothing else."""
    if not _keep_where_numba_does(compiled) and not _keep_in_temporary_folder(compiled):
        _warn_of_compiling_again()
        return
    kept = compiled._cache
    kept.load_overload = _forgiving(kept.load_overload)
    kept.save_overload = _forgiving(kept.save_overload)


def _keep_where_numba_does(compiled: Any) -> bool:
    """True if numba found a folder that it can write."""
    settings: Any = numba.config
    if not settings.CACHE_DIR and home_folder() is None:
        return False  # without a home numba would make a folder named ~ wherever the process runs
    try:
        compiled.enable_caching()
    except RuntimeError:
        return False
    return True


def _keep_in_temporary_folder(compiled: Any) -> bool:
    """True if the cache could be placed in a folder of temporary files that this user alone can write.

    numba runs what it finds in its cache, so a folder that another user made is not used.
    """
    if not hasattr(os, "getuid"):
        return False
    settings: Any = numba.config
    chosen = settings.CACHE_DIR
    try:
        folder = Path(tempfile.gettempdir()) / f"dinocell-numba-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            return False
        settings.CACHE_DIR = str(folder)
        compiled.enable_caching()
    except (OSError, RuntimeError):
        return False
    finally:
        settings.CACHE_DIR = chosen
    return True


@cache
def _warn_of_compiling_again() -> None:
    logger.warning(
        "Compiled functions cannot be kept, so each start takes longer: set NUMBA_CACHE_DIR to a folder "
        "that you can write"
    )


def _forgiving(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a cache; where its files cannot be read or written, as if nothing were stored."""

    def attempt(*arguments: Any) -> Any:
        try:
            return method(*arguments)
        except (OSError, EOFError, pickle.UnpicklingError):
            return None

    return attempt
