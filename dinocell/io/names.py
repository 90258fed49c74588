"""Names of image files: which files a folder or a pattern stands for, in which order.

The suffixes that are read, and the endings of results, stand in `dinocell.pairs`.
"""

import fnmatch
import glob
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.errors import DINOCellError, UsageError, some
from dinocell.io.s3 import S3Path, images_below, place_of
from dinocell.pairs import (
    IMAGE_SUFFIXES,
    LABEL_NAME_ENDINGS,
    OUTPUT_ENDINGS,
    SEG_NPY,
    TRACKS_NAME,
    is_zarr,
)

UNREADABLE_KINDS: dict[str, str] = {
    ".oib": "Olympus OIB",
    ".oif": "Olympus OIF",
    ".vsi": "Olympus VSI",
    ".ims": "Imaris",
    ".h5": "HDF5",
}
"""Suffix → name of formats of microscopes that are recognised but not read."""


@dataclass(frozen=True)
class FoundImages:
    """Image files in their order, and sentences on what was left out of folders and patterns."""

    paths: list[Path]
    notes: tuple[str, ...] = ()


def find_images(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    include_outputs: bool = False,
) -> list[Path]:
    """List the image files that files, folders and patterns stand for; see `search_images`."""
    return search_images(inputs, recursive=recursive, include_outputs=include_outputs).paths


def search_images(
    inputs: Sequence[str | os.PathLike[str]],
    *,
    recursive: bool = False,
    include_outputs: bool = False,
) -> FoundImages:
    """Find the image files that files, folders and patterns stand for.

    Parameters
    ----------
    inputs : sequence of paths, or of addresses on S3 (an image or a folder, no pattern): a file is taken
        as it is, whatever its suffix.  Of a folder, or of a
        pattern (`*`, `?`, `[…]`, `**` for any depth) that is not itself the name of a file, the
        files with a suffix of `dinocell.pairs.IMAGE_SUFFIXES` (in any case) are taken.
    recursive : bool
        Look into the folders of folders too; a folder that links lead back to is visited once.
    include_outputs : bool
        Take also the results of earlier runs, which are left out by default.  Of files whose name ends
        (before the suffix) in one of `dinocell.pairs.OUTPUT_ENDINGS` these are results: `a_labels.tif`
        (or the corrected `a_labels_v2.tif`) beside `a_cells.csv`, which every run writes, and, with a note, `a_labels.tif` where an image
        `a` was found.  Hidden files and folders (the name starts with a dot) are always left out.

    Returns FoundImages: paths in the order of `inputs`, within a folder or pattern in natural order
    (2 before 10), each file once.  Notes on folders that cannot be opened, on files that were left out,
    and on a folder in a given one that holds images and was not searched.

    Raises UsageError (a path does not exist, or no image was found).
    """
    if isinstance(inputs, str | os.PathLike):
        raise TypeError(f"`inputs` must be a sequence of paths, got '{inputs}': put it in a list")
    search = _Search(recursive)
    named: dict[str, Path] = {}  # given by their names
    listed: dict[str, Path] = {}
    for given in inputs:
        path = place_of(given)
        place: Any = path
        if isinstance(place, S3Path):
            found = sorted(images_below(place, recursive=recursive), key=natural_key)
            listed |= {str(image): image for image in found}
            continue
        if _is_one_file(path):
            named[os.path.realpath(path)] = path
            listed.setdefault(os.path.realpath(path), path)
            continue
        for candidate in sorted(search.candidates(given), key=natural_key):
            listed.setdefault(os.path.realpath(candidate), candidate)
    if not include_outputs:
        results = search.results_among(
            [path for real, path in listed.items() if real not in named], listed.values()
        )
        listed = {real: path for real, path in listed.items() if path not in results}
    if not listed:
        where = ", ".join(f"'{os.fspath(given)}'" for given in inputs) or "an empty list"
        kinds = ", ".join(sorted(search.unreadable))
        hint = f" ({kinds} files cannot be read yet)" if kinds else ""
        hint += "".join(f"; {note}" for note in search.notes)
        if not recursive and any(map(os.path.isdir, inputs)):
            hint += "; set `recursive` to search the folders inside"
        raise UsageError(
            f"At least one image is needed, but {where} holds none: images end in "
            f"{', '.join(IMAGE_SUFFIXES)}{hint}"
        )
    if not recursive:
        search.note_subfolder(inputs, listed)
    return FoundImages(list(listed.values()), tuple(search.notes))


def walk_folders(top: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders in `top` and below with what they hold besides folders; links are followed, hidden files left out.

    Raises DINOCellError (a folder cannot be opened).
    """
    search = _Search(recursive=True)
    yield from search._walk(top, recursive=True)
    if search.notes:
        raise DINOCellError(
            f"All folders in '{top}' must be readable, got one that is not ({search.notes[0]}): change its "
            "rights"
        )


def _is_one_file(path: Path) -> bool:
    """Whether a given path exists and is to be read as one image, as a file or a folder of a known kind."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        if glob.has_magic(str(path)):
            return False
        raise UsageError(
            f"'{path}' cannot be opened ({error.strerror}): check the path and its rights"
        ) from error
    return not is_folder or is_zarr(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


class _Search:
    """Looks into folders; one that cannot be opened stops nothing and is noted."""

    def __init__(self, recursive: bool) -> None:
        self.recursive = recursive
        self.notes: list[str] = []
        self.unreadable: set[str] = set()

    def candidates(self, given: str | os.PathLike[str]) -> Iterator[Path]:
        """Files of a folder or pattern that are images by their suffix, in any order."""
        if os.path.isdir(given):  # no image itself, see `search_images`
            matches: Iterable[Path] = self._files_below(Path(given))
        elif glob.has_magic(str(given)):
            parts = Path(os.path.expanduser(given)).parts
            absolute = bool(parts) and os.path.isabs(parts[0])
            matches = self._matching(Path(parts[0] if absolute else "."), parts[absolute:])
        else:
            raise UsageError(f"There is no file or folder '{given}': check the path")
        for path in matches:
            suffix = path.suffix.lower()
            if path.name.endswith(SEG_NPY):  # a project of Cellpose, no image
                continue
            if suffix in UNREADABLE_KINDS:
                self.unreadable.add(suffix)
            elif (suffix in IMAGE_SUFFIXES and os.path.isfile(path)) or is_zarr(path):
                yield path
            elif suffix in IMAGE_SUFFIXES and not os.path.isdir(path):
                self._note(f"'{path}' was left out: it is not a file, or a link to nothing")

    def results_among(self, paths: Iterable[Path], images: Iterable[Path]) -> set[Path]:
        """Files that an earlier run wrote, as far as their names and neighbours tell."""
        stems = {path.stem for path in images if not path.stem.endswith(OUTPUT_ENDINGS)}
        results, likely = set(), []
        for path in paths:
            stem = re.sub(r"_v\d+$", "", path.stem.removesuffix(".ome"))  # corrected labels
            ending = next((end for end in OUTPUT_ENDINGS if stem.endswith(end)), "")
            name = stem.removesuffix(ending)
            if path.name.startswith("mask") and os.path.lexists(path.with_name(TRACKS_NAME)):
                results.add(path)
            if not ending or not name:
                continue
            if os.path.lexists(path.with_name(f"{name}_cells.csv")):
                results.add(path)
            elif name in stems:
                likely.append(path)
        if likely:
            shown = some([path.name for path in likely])
            count = "1 file was" if len(likely) == 1 else f"{len(likely)} files were"
            self._note(
                f"{count} left out, because the names say that they belong to other images ({shown}): "
                "name a file itself to segment it"
            )
        return results.union(likely)

    def note_subfolder(
        self, inputs: Iterable[str | os.PathLike[str]], listed: Collection[str]
    ) -> None:
        """Note the first folder in a given one that holds an image, unless that is `listed`, too."""
        for given in map(place_of, inputs):
            if isinstance(given, S3Path) or not os.path.isdir(given) or is_zarr(given):
                continue
            for entry in self._entries(given):
                folder = given / entry.name
                # An entry may be called a folder that nobody may look into.
                if not _is_folder(entry) or not os.path.isdir(folder) or is_zarr(folder):
                    continue
                inner = _Search(recursive=False)  # whose notes nobody needs
                if any(
                    os.path.realpath(path) not in listed
                    for path in inner.candidates(folder)
                    if not path.stem.endswith(LABEL_NAME_ENDINGS)
                    and not inner.results_among([path], [path])
                ):
                    self._note(
                        f"Images in folders inside '{given}' were left out, such as those in "
                        f"'{entry.name}': set `recursive` to segment them, too"
                    )
                    return

    def _matching(self, base: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Files (with `recursive` also of folders) whose path below `base` matches a pattern."""
        if not parts:
            if os.path.isdir(base) and not is_zarr(base):
                yield from self._files_below(base) if self.recursive else ()
            elif os.path.lexists(base):
                yield base
        elif parts[0] == "**":
            for folder, files in self._walk(base, recursive=True):
                yield from self._matching(folder, parts[1:]) if parts[1:] else files
        elif not glob.has_magic(parts[0]):
            yield from self._matching(base / parts[0], parts[1:])
        elif os.path.isdir(base) and not is_zarr(base):
            for entry in self._entries(base, hidden=parts[0].startswith(".")):
                if fnmatch.fnmatchcase(entry.name, parts[0]):
                    yield from self._matching(base / entry.name, parts[1:])

    def _files_below(self, folder: Path) -> Iterator[Path]:
        for _, files in self._walk(folder, recursive=self.recursive):
            yield from files

    def _walk(self, top: Path, *, recursive: bool) -> Iterator[tuple[Path, list[Path]]]:
        """Folders with what they hold besides folders; real folders first, then those behind links.

        Every real folder is visited once, so links that lead back to a folder above end there.
        """
        seen: set[str] = set()
        waiting = [top]
        linked: list[Path] = []
        while waiting or linked:
            folder = waiting.pop() if waiting else linked.pop(0)
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            files = []
            for entry in self._entries(folder):
                path = folder / entry.name
                if not _is_folder(entry) or is_zarr(path):
                    files.append(path)
                elif recursive:
                    (linked if entry.is_symlink() else waiting).append(path)
            yield folder, files

    def _entries(self, folder: Path, *, hidden: bool = False) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                found = [e for e in entries if hidden or not e.name.startswith(".")]
                return sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            self._note(
                f"The folder '{folder}' was left out: it cannot be opened ({error.strerror})"
            )
            return []

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key by which `a2.tif` comes before `a10.tif`, and capitals do not matter."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p.casefold()) for p in parts] + [
        (2, 0, path.as_posix())
    ]


def refuse_long_names(paths: Iterable[Path]) -> None:
    """Refuse files, all for one folder, whose names are longer than its file system allows.

    Raises DINOCellError (names the longest).
    """
    longest = max(paths, key=lambda path: len(os.fsencode(path.name)))
    try:
        allowed = os.pathconf(longest.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not on Windows
        allowed = 255
    if len(os.fsencode(longest.name)) > allowed:
        raise DINOCellError(
            f"A file name may have up to {allowed} bytes in '{longest.parent}', got "
            f"{len(os.fsencode(longest.name))} for '{longest.name}': shorten the name of the image"
        )
