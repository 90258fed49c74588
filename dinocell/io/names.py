"""Names of image files: which files a folder or a pattern stands for, in which order.

The suffixes that are read, and the endings of results, stand in `dinocell.pairs`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dinocell.errors import UsageError
from dinocell.pairs import IMAGE_SUFFIXES, OUTPUT_ENDINGS

UNREADABLE_KINDS: dict[str, str] = {
    ".czi": "Zeiss CZI",
    ".nd2": "Nikon ND2",
    ".lif": "Leica LIF",
    ".zarr": "Zarr",
    ".oib": "Olympus OIB",
    ".oif": "Olympus OIF",
    ".vsi": "Olympus VSI",
    ".ims": "Imaris",
    ".h5": "HDF5",
}
"""Suffix → name of formats of microscopes that are recognised but not read; some are folders."""


def find_images(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    include_outputs: bool = False,
) -> list[Path]:
    """List the image files that files, folders and patterns stand for.

    Parameters
    ----------
    inputs : sequence of paths
        A file is taken as it is, whatever its suffix.  Of a folder, or of a pattern (`*`, `?`, `[…]`,
        `**` for any depth) that is not itself the name of a file, the files with a suffix of
        `dinocell.pairs.IMAGE_SUFFIXES` (in any case) are taken.
    recursive : bool
        Look into the folders of folders too.
    include_outputs : bool
        Take files whose name ends (before the suffix) in one of `dinocell.pairs.OUTPUT_ENDINGS` also from
        folders and patterns; by default they are left out, so that a second run does not segment its own
        results.  Hidden files and folders (the name starts with a dot) are always left out.

    Returns
    -------
    paths : list of Path
        In the order of `inputs`, within a folder or pattern in natural order (2 before 10), each file
        once.

    Raises
    ------
    UsageError
        A path does not exist, or no image was found.
    """
    if isinstance(inputs, str | os.PathLike):
        raise TypeError(f"`inputs` must be a sequence of paths, got '{inputs}': put it in a list.")
    found: dict[str, Path] = {}
    unreadable: set[str] = set()
    for given in inputs:
        path = Path(given)
        if path.exists() and not (path.is_dir() and path.suffix.lower() not in UNREADABLE_KINDS):
            found.setdefault(os.path.realpath(path), path)
            continue
        for candidate in sorted(_candidates(given, recursive), key=natural_key):
            suffix = candidate.suffix.lower()
            if suffix in UNREADABLE_KINDS:
                unreadable.add(suffix)
            elif suffix in IMAGE_SUFFIXES and (
                include_outputs or not candidate.stem.endswith(OUTPUT_ENDINGS)
            ):
                found.setdefault(os.path.realpath(candidate), candidate)
    if not found:
        where = ", ".join(f"'{os.fspath(given)}'" for given in inputs) or "an empty list"
        hint = f" ({', '.join(sorted(unreadable))} files cannot be read yet)" if unreadable else ""
        if not recursive and any(Path(given).is_dir() for given in inputs):
            hint += "; set `recursive` to search the folders inside"
        raise UsageError(
            f"At least one image is needed, but {where} holds none: images end in "
            f"{', '.join(IMAGE_SUFFIXES)}{hint}."
        )
    return list(found.values())


def _candidates(given: str | os.PathLike[str], recursive: bool) -> Iterable[Path]:
    """All files of a folder or pattern that may be images, in any order."""
    path = Path(given)
    if path.is_dir():
        return _files_below(path, recursive)
    if not glob.has_magic(str(given)):
        raise UsageError(f"There is no file or folder '{path}': check the path.")
    candidates: list[Path] = []
    for name in glob.glob(os.path.expanduser(str(given)), recursive=True):
        match = Path(name)
        if any(parent.suffix.lower() in UNREADABLE_KINDS for parent in match.parents):
            continue  # inside a Zarr folder
        if not match.is_dir():
            candidates.append(match)
        elif recursive and match.suffix.lower() not in UNREADABLE_KINDS:
            candidates.extend(_files_below(match, recursive))
    return candidates


def _files_below(folder: Path, recursive: bool) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_file() or entry.suffix.lower() in UNREADABLE_KINDS:
            yield entry
        elif recursive and entry.is_dir():
            yield from _files_below(entry, recursive)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which `a2.tif` comes before `a10.tif`, and capitals do not matter."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p.casefold()) for p in parts] + [
        (2, 0, path.as_posix())
    ]
