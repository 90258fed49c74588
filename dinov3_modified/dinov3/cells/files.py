"""Write a file or a folder so that it appears whole or not at all.

These are functions of `dinocell/files.py`, which says why this is safe; this tree may not import it.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path that becomes the file `path` when the block ends well, and vanishes when not.

    Missing folders are made; a symbolic link is followed.  An older file stays as it was until then.
    Raises ValueError (`path` is a folder); RuntimeError (the block wrote no file).
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise ValueError(
            f"`path` must be the name of a file, got '{path}', which is a folder: add a file name"
        )
    final.parent.mkdir(parents=True, exist_ok=True)
    inner = Path(final.stem).suffix.lower() if final.suffix else ""
    temporary = _temporary_beside(
        final, (inner if inner in (".ome", ".tar") else "") + final.suffix
    )
    try:
        yield temporary
        if not temporary.is_file():
            raise RuntimeError(
                f"The block must write '{temporary}', got no such file: write to the path that the block receives"
            )
        move_into_place(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text_atomically(
    path: str | os.PathLike[str], text: str, *, errors: str = "strict"
) -> None:
    """Write `text` as UTF-8, line ends as they are; raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors, newline="")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that becomes `path`, new or empty, when the block ends well; else it vanishes.

    Raises OSError (`path` is a file or a folder with contents by then).
    """
    final = Path(os.path.realpath(path))
    temporary = _temporary_beside(final, "")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush_file(file)
        if final.exists():
            final.rmdir()
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush_folder(final.parent)


def move_into_place(temporary: Path, final: Path, *, flush: bool = True) -> None:
    """Give a finished file or folder its name, replacing a file that has it; both lie on one file system.

    A folder is not flushed with its files, and replaces an empty one only.  Without `flush` a power cut
    may leave a damaged file: for caches, whose readers check what they read.
    """
    if flush and temporary.is_file():
        _flush_file(temporary)
    elif flush:
        _flush_folder(temporary)
    os.replace(temporary, final)
    if flush:
        _flush_folder(final.parent)


def _temporary_beside(final: Path, suffix: str) -> Path:
    return final.with_name(f".tmp-{secrets.token_hex(8)}{suffix}")


def _flush_file(path: Path) -> None:
    """Errors count: a network file system reports a full disk here at the earliest."""
    with open(path, "rb+" if os.access(path, os.W_OK) else "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            # Some mounted file systems cannot flush a file; what was written is complete all the same.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def _flush_folder(folder: Path) -> None:
    """Some systems do not flush folders; the rename is done all the same."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
