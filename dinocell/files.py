"""Write a file or a folder so that it appears whole or not at all.

Everything DINOCell writes gets its name here.  The content goes to a temporary name in the same folder
first, is flushed to the disk, and is then renamed: a rename inside one folder is a single step for the
file system, so that a reader, a killed process or a power cut meets the old content or the new one and
never a half.  At the end the folder is flushed too, because the new name is part of the folder.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from dinocell.errors import DINOCellError, UsageError

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}(\..*)?")
_kept: dict[Path, Path] = {}  # folder → the file that it must hold


@contextlib.contextmanager
def kept_folder(marker: Path) -> Iterator[None]:
    """While the block runs, `atomic_path` writes into the folder of `marker` only if `marker` exists.

    Without this a run whose network folder is unmounted would make the folder again below the mount
    point and continue there, and all that it writes would be hidden when the mount returns.  The inode
    of the folder would not do as its mark: FUSE may change it at any time.
    """
    folder = Path(os.path.realpath(marker.parent))
    _kept[folder] = folder / marker.name
    try:
        yield
    finally:
        del _kept[folder]


def check_kept(path: Path) -> None:
    """Raise OSError (ESTALE) if a folder above `path` is kept and has gone or been replaced."""
    for folder in path.parents:
        if folder in _kept and not _kept[folder].exists():
            raise OSError(
                errno.ESTALE, "the folder is gone or another one has its name", str(folder)
            )


def ensure_folder(folder: Path) -> None:
    """Make a folder and those above it; OSError if it is, or lies in, a kept folder that has gone."""
    check_kept(Path(os.path.realpath(folder)) / "file")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when it does not.

    Parameters
    ----------
    path : the file to write.  Missing folders above it are made.  A symbolic link is followed.

    Yields
    ------
    temporary : Path
        A hidden name in the same folder with the same suffix (`.ome.tif` and `.tar.gz` whole).  The
        block must write it, as a file.

    Raises DINOCellError (`path` is a folder); OSError (see `kept_folder`); RuntimeError (the block
    ended without writing the temporary file).

    Notes
    -----
    Any exception, `KeyboardInterrupt` included, removes the temporary file and leaves an older `path` as
    it was.
    """
    final = Path(os.path.realpath(path))
    if final.is_dir():
        raise DINOCellError(
            f"`path` must be the name of a file, got '{path}', which is a folder: add a file name"
        )
    ensure_folder(final.parent)
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


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`atomic_path` whose failures, DINOCellError, say which file was meant and what to do."""
    with saying_what_failed(path), atomic_path(path) as temporary:
        yield temporary


@contextlib.contextmanager
def writing_folder(
    path: str | os.PathLike[str], *, replaces: Callable[[Path], bool]
) -> Iterator[Path]:
    """`atomic_folder` whose failures, DINOCellError, say which folder was meant and what to do.

    Missing folders above it are made.  A folder that has the name and contents is replaced if
    `replaces(folder)` says that it may be, and is kept until the new one is complete; any other one is
    refused.
    """
    final = Path(os.path.realpath(path))
    with saying_what_failed(path):
        old = final.exists() and not (final.is_dir() and not any(final.iterdir()))
        if old and not (final.is_dir() and replaces(final)):
            raise DINOCellError(
                f"'{path}' exists and is no such result of DINOCell, so it is not replaced: choose "
                "another name"
            )
        ensure_folder(final.parent)
        if not old:
            with atomic_folder(final) as temporary:
                yield temporary
            return
        # Only between the two renames there is no folder of that name.
        new, aside = _temporary_beside(final, ""), _temporary_beside(final, "")
        try:
            with atomic_folder(new) as temporary:
                yield temporary
            os.replace(final, aside)
            os.replace(new, final)
        except BaseException:
            if aside.exists():
                os.replace(aside, final)
            shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def saying_what_failed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a DINOCellError for any OSError of the block, which writes the file or folder `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if isinstance(error, (FileExistsError, NotADirectoryError)):  # "File exists" of a folder
            reason = "a file has the name of its folder, or of one above it"
        raise DINOCellError(
            f"'{path}' cannot be written ({reason}): choose another folder or free some space"
        ) from error


def require_writable(name: str, path: Path) -> None:
    """Raise a UsageError unless a file could be written at `path`: before hours of work, not after.

    `name` is that of the parameter.
    """
    try:
        ensure_folder(path.parent)
        temporary = _temporary_beside(path, path.suffix)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UsageError(
            f"`{name}` must lie in a folder that can be written, got {path} ({error.strerror}): choose "
            "another place"
        ) from error


def write_text_atomically(
    path: str | os.PathLike[str], text: str, *, errors: str = "strict"
) -> None:
    """Write `text` as UTF-8, line ends as they are; raises as `atomic_path` does.

    `errors="surrogateescape"` keeps file names that are not UTF-8 for programs, "backslashreplace" makes
    them readable.
    """
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


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` that vanishes when the block ends, or by `remove_temporary_files` after a kill."""
    folder = _temporary_beside(parent / "folder", "")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_into_place(temporary: Path, final: Path, *, flush: bool = True) -> None:
    """Give a finished file or folder its name, replacing a file that has it; both lie on one file system.

    For what outlives a failure under its temporary name, such as a partial download; everything else is
    written with `atomic_path`.  A folder is not flushed with its files, and replaces an empty one only.
    Without `flush` a power cut may leave a damaged file: for caches, whose readers check what they read.
    """
    if flush and temporary.is_file():
        _flush_file(temporary)
    elif flush:
        _flush_folder(temporary)
    os.replace(temporary, final)
    if flush:
        _flush_folder(final.parent)


def as_utf8(name: str) -> str:
    """The name of a file for the content of another: bytes that are no UTF-8 become ``\\udcff`` and the like."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def home_folder() -> Path | None:
    """The user's home; None without HOME for a user number that the system does not know.

    `Path.home` raises RuntimeError there.
    """
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home)


def remove_temporary_files(folder: Path, *, before: float) -> None:
    """Delete what `atomic_path` and the folders of this module left in `folder` when their process was killed.

    `before` is in seconds since 1970: what is younger stays, another process may be writing it.  A
    `folder` that does not exist has none.
    """
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if not _TEMPORARY.fullmatch(path.name) or _last_change(path) >= before:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _last_change(path: Path) -> float:
    """Seconds since 1970, of a folder with all that it holds."""
    return max(inner.lstat().st_mtime for inner in (path, *path.rglob("*")))


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
