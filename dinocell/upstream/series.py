"""The series of patches: its files, their form, and what each adds where.

A patch holds added lines only, with zero context, so that no line of upstream's text is in this
repository.  Each added line ends with `# dinocell: NAME`, the name of its patch.
"""

import datetime
import hashlib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import yaml

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import write_text_atomically

_MARK = re.compile(r"  # dinocell: ([a-z0-9-]+)$")
_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_INDEX = re.compile(r"^index ([0-9a-f]{40,64})\.\.([0-9a-f]{40,64})(?: (\d+))?$")
_FIELDS = ("What", "Why", "Why not a new file", "Updated")
_PLACES = ("first", "after", "before")


class PatchError(DINOCellError):
    """The series is malformed, or it does not give the tree that it must give."""


@dataclass(frozen=True)
class Hook:
    """Where an addition belongs."""

    path: str  # file, from the root of the tree
    function: str  # `name` or `Class.name`
    place: str  # "first" (statement of the function), "after" or "before"
    landmark: str = ""  # a name that the statement before, or after, uses; empty for "first"

    def __str__(self) -> str:
        return f"{self.path} {self.function} {self.place} {self.landmark}".rstrip()

    @classmethod
    def parse(cls, text: str, source: str) -> Self:
        """From a line of a patch's header: `FILE FUNCTION first|after NAME|before NAME`."""
        path, function, place, landmark = [*text.split(), "", "", "", ""][:4]
        right = place in _PLACES and bool(landmark) == (place != "first")
        if not right or len(text.split()) > 4:
            raise PatchError(
                f"A hook must be FILE FUNCTION first, after NAME or before NAME, got {text!r} in "
                f"{source}: correct the header"
            )
        return cls(path, function, place, landmark)


@dataclass(frozen=True)
class Addition:
    """Lines that a patch adds after a line of the base."""

    after: int  # number of that line, from 1; 0 is the top of the file
    lines: tuple[str, ...]  # without line ends


@dataclass(frozen=True)
class Patch:
    """One reason to touch upstream's code."""

    name: str  # of the file, without suffix; marks its lines
    header: Mapping[str, str]  # fields `What`, `Why`, `Why not a new file`, `Updated`
    hooks: tuple[Hook, ...]  # in the order of the additions
    additions: Mapping[str, tuple[Addition, ...]]  # by path, in the order of the file
    bases: Mapping[str, str]  # by path, the blob that the line numbers count
    text: str  # what git reads

    def hooks_of(self, path: str) -> list[Hook]:
        return [hook for hook in self.hooks if hook.path == path]


@dataclass(frozen=True)
class Pin:
    """The release that the series was made on."""

    address: str  # of the repository
    commit: str  # 40 digits
    date: str  # of the commit
    # oldest, newest: commits between which the series is known to apply
    oldest: str
    newest: str


@dataclass(frozen=True)
class Series:
    """Everything in the folder of patches."""

    folder: Path  # where it was read from
    pin: Pin
    patches: tuple[Patch, ...]
    # our files that go with the patches, path in the tree → path on the disk
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Files of upstream's that are patched."""
        return tuple(sorted({path for patch in self.patches for path in patch.additions}))


def default_series_folder() -> Path:
    """`patches/` of the clone that the package runs from.

    Raises UsageError (the package was installed from a wheel, which has no patches).
    """
    folder = Path(__file__).resolve().parents[2] / "patches"
    if not (folder / "series").is_file():
        raise UsageError(
            f"This command needs a clone of DINOCell, because the patches are not part of the installed "
            f"package (missing: {folder}): clone the repository and run pip install -e . there, or name the "
            "folder of patches of a clone with `series`"
        )
    return folder


def marked_name(line: str) -> str | None:
    """Name of the patch that a line is marked with."""
    found = _MARK.search(line)
    return found[1] if found else None


def blob_id(data: bytes) -> str:
    """The name that git gives this content (SHA-1)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# --- reading ---


def read_series(folder: str | Path, *, files_root: str | Path | None = None) -> Series:
    """Read `UPSTREAM`, `series`, `files` and the patches of a folder such as `patches`.

    The listed files lie in `files_root`, by default `dinov3_modified` beside the folder.

    Raises PatchError (a file is missing or malformed).
    """
    folder = Path(folder)
    root = Path(files_root) if files_root is not None else folder.parent / "dinov3_modified"
    pin = _read_pin(folder / "UPSTREAM")
    files: dict[str, Path] = {}
    for name in _lines(folder / "files"):
        found = _files_of(root, name)
        if not found:
            raise PatchError(
                f"Entries of {folder / 'files'} must exist in {root}, got {name}: correct the list"
            )
        files |= {path.relative_to(root).as_posix(): path for path in found}
    patches = tuple(_read_patch(folder / name) for name in _lines(folder / "series"))
    return Series(folder, pin, patches, files)


def _files_of(root: Path, name: str) -> list[Path]:
    """The file of an entry, or all files of a folder (`NAME/`) but what Python compiled."""
    if not name.endswith("/"):
        return [root / name] if (root / name).is_file() else []
    return sorted(
        path
        for path in (root / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(
            f"A series must have the file {path.name}, got an error from {path} ({error}): restore the file"
        ) from error


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _read_pin(path: Path) -> Pin:
    try:
        content = yaml.safe_load(_text(path))
        pin = Pin(**{key: str(value) for key, value in content.items()})
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise PatchError(
            f"{path} must hold address, commit, date, oldest and newest, got another form ({error}): "
            "restore the file"
        ) from error
    for commit in (pin.commit, pin.oldest, pin.newest):
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise PatchError(
                f"Commits in {path} must have 40 digits, got {commit}: restore the file"
            )
    return pin


def _read_patch(path: Path) -> Patch:
    if path.suffix != ".patch" or not re.fullmatch(r"[a-z0-9-]+", path.stem):
        raise PatchError(
            f"A patch must be named with small letters, digits and -, got {path.name}: rename the file"
        )
    text = _text(path)
    head, _, _ = text.partition("\ndiff --git ")
    header, hooks = _read_header(head, path)
    additions: dict[str, list[Addition]] = {}
    bases: dict[str, str] = {}
    current = ""
    lines = text[len(head) + 1 :].splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("diff --git a/"):
            current = line.split(" b/")[-1]
            additions[current] = []
        elif found := _INDEX.match(line):
            bases[current] = found[1]
        elif found := _HUNK.match(line):
            count = int(found[4] or 1)
            added = lines[number : number + count]
            if int(found[2] or 1) or any(not item.startswith("+") for item in added):
                raise PatchError(
                    f"Hunks must hold added lines alone, got {line} of {current} in {path.name}: make "
                    "the patch again with dinocell upstream refresh"
                )
            number += count
            block = tuple(item[1:] for item in added)
            for item in block:
                if marked_name(item) != path.stem:
                    raise PatchError(
                        f"Each added line must end with '  # dinocell: {path.stem}', got {item!r} in "
                        f"{path.name}: add this mark"
                    )
            additions[current].append(Addition(int(found[1]), block))
    blocks = {name: tuple(items) for name, items in additions.items()}
    patch = Patch(path.stem, header, hooks, blocks, bases, text)
    for name, items in patch.additions.items():
        if len(items) != len(patch.hooks_of(name)) or name not in bases:
            raise PatchError(
                f"Each hunk must have a line 'Hook:' and a full index line, got {len(items)} hunks and "
                f"{len(patch.hooks_of(name))} hooks of {name} in {path.name}: correct the header"
            )
    return patch


def _read_header(head: str, path: Path) -> tuple[dict[str, str], tuple[Hook, ...]]:
    header: dict[str, str] = {}
    hooks: list[Hook] = []
    key = ""
    for line in head.splitlines():
        if line.startswith(" ") and key:
            header[key] += f" {line.strip()}"
            continue
        key, colon, value = line.partition(":")
        if not colon:
            key = ""
        elif key == "Hook":
            hooks.append(Hook.parse(value.strip(), path.name))
            key = ""
        else:
            header[key] = value.strip()
    missing = [name for name in _FIELDS if not header.get(name)]
    if missing:
        raise PatchError(
            f"The header of {path.name} must have {', '.join(_FIELDS)} and Hook, got none for "
            f"{', '.join(missing)}: add it"
        )
    return header, tuple(hooks)


# --- writing ---


def patch_text(
    patch: Patch, bases: Mapping[str, bytes], places: Mapping[str, Sequence[Addition]]
) -> str:
    """A patch's file, with its line numbers counted on other bases.

    By path, `bases` are upstream's files without any addition, `places` where the lines belong in them.
    """
    parts = [f"{name}: {_wrapped(patch.header[name])}" for name in _FIELDS]
    parts += [f"Hook: {hook}" for hook in patch.hooks]
    for path in sorted(places):
        base = bases[path]
        lines = base.decode("utf-8").splitlines(keepends=True)
        made: list[str] = []
        hunks: list[str] = []
        done = 0
        for item in sorted(places[path], key=lambda one: one.after):
            made += lines[done : item.after]
            hunks.append(f"@@ -{item.after},0 +{len(made) + 1},{len(item.lines)} @@")
            hunks += [f"+{line}" for line in item.lines]
            made += [f"{line}\n" for line in item.lines]
            done = item.after
        made += lines[done:]
        after = blob_id("".join(made).encode())
        parts += [f"diff --git a/{path} b/{path}", f"index {blob_id(base)}..{after} 100644"]
        parts += [f"--- a/{path}", f"+++ b/{path}", *hunks]
    return "\n".join(parts) + "\n"


def _wrapped(text: str) -> str:
    return "\n  ".join(
        textwrap.wrap(" ".join(text.split()), 96, break_long_words=False, break_on_hyphens=False)
    )


def write_series(
    series: Series,
    bases: Mapping[str, bytes],
    places: Mapping[str, Mapping[str, Sequence[Addition]]],
    pin: Pin,
) -> list[str]:
    """Write the patches that have changed, and `UPSTREAM`; returns the names of the files written.

    The line numbers count `bases`, upstream's files by path; `places` are by patch and path.
    """
    today = datetime.date.today().isoformat()
    texts: dict[str, str] = {}
    for patch in series.patches:
        if patch_text(patch, bases, places[patch.name]) != patch.text:
            dated = replace(patch, header={**patch.header, "Updated": today})
            texts[f"{patch.name}.patch"] = patch_text(dated, bases, places[patch.name])
    upstream = (
        "# What the series was made on.  `dinocell upstream rebase` and `refresh` write this file.\n"
        f"address: {pin.address}\n"
        f"commit: {pin.commit}\n"
        f'date: "{pin.date}"\n'
        "# It is known to apply to the commits between these two (docs/upstream.md).\n"
        f"oldest: {pin.oldest}\n"
        f"newest: {pin.newest}\n"
    )
    if upstream != _text(series.folder / "UPSTREAM"):
        texts["UPSTREAM"] = upstream
    for name, text in texts.items():
        write_text_atomically(series.folder / name, text)
    return sorted(texts)
