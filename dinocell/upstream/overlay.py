"""Our additions in a checkout: added completely, removed completely, never half.

Everything is made and checked beside the checkout first.  Then the new contents and a journal are
written into git's folder, and the files are renamed into place.  If the program ends in between, the
next command finds the journal and restores the old files.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import UsageError, some
from dinocell.files import atomic_folder, move_into_place, write_text_atomically
from dinocell.upstream.git import Commit, Scratch, run_git
from dinocell.upstream.merge import Merged, Outcome, merge_series
from dinocell.upstream.placement import additions_in, misplaced, without_additions
from dinocell.upstream.series import Patch, PatchError, Series, blob_id

_STAGING = "dinocell-upstream"  # in git's folder: on the same disk, and git status ignores it
_JOURNAL = "journal.json"
_RECORD = "dinocell-upstream.json"  # the files that were written, and their blobs


@dataclass(frozen=True)
class Status:
    """State of a checkout with respect to the series."""

    commit: Commit  # what is checked out
    described: str  # nearest tag or branch
    relation: str  # of the commit to the pin and the known range, in words
    changed: tuple[str, ...]  # files with changes that are not ours
    in_place: tuple[str, ...]  # patches whose lines the checkout has
    files: Mapping[str, str]  # path → "there", "missing" or "other" of our files
    outcomes: tuple[Outcome, ...]  # of each patch on the commit

    @property
    def applied(self) -> bool:
        return len(self.in_place) == len(self.outcomes) and set(self.files.values()) == {"there"}

    @property
    def ready(self) -> bool:
        return not self.changed and all(outcome.applies for outcome in self.outcomes)


def status_of(checkout: str | Path, series: Series) -> Status:
    """Examine a checkout.  Only an application that was interrupted is undone; nothing else changes."""
    with Scratch(checkout) as scratch:
        recover(scratch)
        commit = scratch.commit("HEAD")
        merged = merge_series(scratch, commit, series)
        top = scratch.top()
        read = {path: _read(top / path) or b"" for path in series.paths}
        texts = {path: content.decode("utf-8", "replace") for path, content in read.items()}

        def has(path: str, patch: Patch) -> bool:
            text = texts[path]
            return patch.name in additions_in(text) and not misplaced(text, path, [patch])

        in_place = tuple(p.name for p in series.patches if all(has(x, p) for x in p.additions))
        return Status(
            commit,
            scratch.describe(commit.id),
            _relation(scratch, commit, series),
            tuple(_foreign_changes(scratch, series)),
            in_place,
            {path: _compared(top / path, source) for path, source in series.files.items()},
            merged.outcomes,
        )


def _relation(scratch: Scratch, commit: Commit, series: Series) -> str:
    pin = series.pin
    if commit.id == pin.commit:
        return "the commit that the series was made on"
    if commit.id in (pin.oldest, pin.newest):
        return "the end of the range on which the series is known to apply"
    if scratch.is_ancestor(pin.oldest, commit.id) and scratch.is_ancestor(commit.id, pin.newest):
        return "within the range on which the series is known to apply"
    if scratch.is_ancestor(pin.newest, commit.id):
        return "newer than the range on which the series is known to apply"
    return "outside the range on which the series is known to apply"


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _compared(path: Path, source: Path) -> str:
    content = _read(path)
    if content is None:
        return "missing"
    return "there" if content == source.read_bytes() else "other"


def _plain(text: bytes) -> bytes:
    how = ("utf-8", "surrogateescape")
    return without_additions(text.decode(*how)).encode(*how)


def _foreign_changes(scratch: Scratch, series: Series) -> list[str]:
    """Changes in the checkout that are not our additions."""
    listing = run_git(
        scratch.checkout, "status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames"
    ).stdout.decode("utf-8", "surrogateescape")
    items = [item for item in listing.split("\0") if item]
    tracked = [item[3:] for item in items if not item.startswith("??")]
    untracked = [item[3:] for item in items if item.startswith("??")]
    entries = scratch.entries("HEAD", tracked) if tracked else {}
    top = scratch.top()
    foreign = []
    carriage = [path for path in tracked if _has_other_line_ends(top / path, entries.get(path))]
    if carriage:
        raise UsageError(
            f"The checkout must have the line ends of its repository, got CRLF in {len(carriage)} files "
            f"such as {carriage[0]}: clone it again with `git clone -c core.autocrlf=false`"
        )
    for path in tracked:
        staged = run_git(scratch.checkout, "diff", "--cached", "--quiet", "--", str(top / path))
        same = blob_id(_plain(_read(top / path) or b"")) == entries.get(path)
        if path not in series.paths or not same or staged.returncode:
            foreign.append(path)
    written = _written(scratch)
    ours = [path for path in untracked if path in series.files and path not in written]
    foreign += [path for path in ours if _compared(top / path, series.files[path]) != "there"]
    return sorted(foreign)


def _has_other_line_ends(path: Path, blob: str | None) -> bool:
    """Whether git wrote a file with CRLF that has LF in the commit (core.autocrlf)."""
    content = _read(path) or b""
    unix = content.replace(b"\r\n", b"\n")
    return content != unix and blob_id(_plain(unix)) == blob


def _written(scratch: Scratch) -> list[str]:
    """Files that an earlier application wrote and nobody has changed since."""
    try:
        record = json.loads((scratch.git_dir / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    top = scratch.top()
    return [path for path, blob in record.items() if blob_id(_read(top / path) or b"") == blob]


# --- adding ---


def apply_series(
    checkout: str | Path, series: Series, *, out: str | Path | None = None
) -> tuple[Merged, Path]:
    """Add the series to a checkout, or to a copy of its commit.

    With `out`, a new folder gets the package `dinov3` and the files of the top folder, and the checkout
    is left alone.  Returns the state of each patch, and the root of the tree.

    Raises UsageError (the checkout has changes, or the new folder exists), or PatchError (a patch
    does not apply; nothing was done).
    """
    with Scratch(checkout) as scratch:
        recover(scratch)
        commit = scratch.commit("HEAD")
        if out is None and (changed := _foreign_changes(scratch, series)):
            raise UsageError(
                f"The checkout must have no changes of its own, got {len(changed)} ({some(changed)}): commit or "
                "stash them, or write a copy with `out`"
            )
        merged = merge_series(scratch, commit, series)
        if not merged.applies:
            raise PatchError(conflict_text(merged))
        new = {path: source.read_bytes() for path, source in series.files.items()}
        theirs = scratch.entries(commit.id, sorted(new))
        if clash := [path for path, blob in theirs.items() if blob != blob_id(new[path])]:
            raise PatchError(
                f"Files of ours must be new to upstream, got {', '.join(clash[:3])} in another form"
            )
        contents = {**merged.texts, **new}
        if out is not None:
            return merged, export_tree(scratch, commit, contents, Path(out).resolve())
        top = scratch.top()
        # Files of an earlier version that are no longer ours are removed.
        stale = dict.fromkeys(path for path in _written(scratch) if path not in contents)
        _replace_all(scratch, top, {**contents, **stale})
        record = {path: blob_id(content) for path, content in new.items()}
        write_text_atomically(scratch.git_dir / _RECORD, json.dumps(record, indent=1))
        return merged, top


def conflict_text(merged: Merged) -> str:
    """One sentence for all patches that do not apply."""
    failed = [f"{one.name}: {one.reasons[0]}" for one in merged.outcomes if not one.applies]
    return (
        f"All patches must apply to {merged.commit.id[:12]}, got {len(failed)} that do not "
        f"({'; '.join(failed)}): see dinocell upstream rebase"
    )


def export_tree(scratch: Scratch, commit: Commit, contents: Mapping[str, bytes], out: Path) -> Path:
    """Write the package of a commit, the files of its top folder and `contents` to a new folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"`out` must be a new folder, got {out}, which has contents: choose another name"
        )
    listed = scratch.run("ls-tree", "-z", commit.id).stdout.decode().split("\0")
    top = [item.partition("\t")[2] for item in listed if item.split(" ", 2)[1:2] == ["blob"]]
    done = scratch.run("archive", "--format=tar", commit.id, "--", "dinov3", *top)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip()
        raise PatchError(
            f"The checkout must hold the whole package ({reason}): clone it again, without a filter"
        )
    with atomic_folder(out) as temporary:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(temporary, filter="data")
        for path, content in contents.items():
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).write_bytes(content)
    return out


def undo(checkout: str | Path, series: Series) -> list[str]:
    """Remove our lines and files again, touching nothing else; returns the paths that changed.

    Raises UsageError (a file has other changes beside ours).
    """
    with Scratch(checkout) as scratch:
        recovered = recover(scratch)
        top = scratch.top()
        if changed := _foreign_changes(scratch, series):
            raise UsageError(
                f"Files must be upstream's with our lines alone, got other changes in "
                f"{', '.join(changed[:5])}: commit or stash them"
            )
        contents: dict[str, bytes | None] = {}
        for path in series.paths:
            text = _read(top / path)
            if text is not None and (plain := _plain(text)) != text:
                contents[path] = plain
        ours = {p for p, source in series.files.items() if _compared(top / p, source) == "there"}
        ours |= set(_written(scratch))
        tracked = scratch.entries("HEAD", sorted(ours)) if ours else {}
        contents |= {path: None for path in ours if path not in tracked}
        if contents:
            _replace_all(scratch, top, contents)
        (scratch.git_dir / _RECORD).unlink(missing_ok=True)
        return sorted({*contents, *recovered})


# --- all or nothing ---


def _replace_all(scratch: Scratch, top: Path, contents: Mapping[str, bytes | None]) -> None:
    """Give files new contents (None: remove them); if anything fails, the old ones are restored."""
    staging = scratch.git_dir / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    entries = []
    try:
        staging.mkdir()
        for number, (path, content) in enumerate(sorted(contents.items())):
            before = _read(top / path)
            if before == content:
                continue
            if before is not None:
                _write(staging / f"{number}.before", before)
            if content is not None:
                _write(staging / f"{number}.after", content)
            entries.append({"number": number, "path": path, "new": before is None})
        journal = {"top": str(top), "entries": entries}
        write_text_atomically(staging / _JOURNAL, json.dumps(journal))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    try:
        for entry in entries:
            _put(staging / f"{entry['number']}.after", top / str(entry["path"]), top)
    except BaseException:
        recover(scratch)
        raise
    shutil.rmtree(staging)


def recover(scratch: Scratch) -> list[str]:
    """Restore the files that an interrupted application had changed; returns their paths."""
    staging = scratch.git_dir / _STAGING
    try:
        journal = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        shutil.rmtree(staging, ignore_errors=True)  # nothing had been renamed yet
        return []
    top = Path(journal["top"])
    for entry in journal["entries"]:
        before, after = (staging / f"{entry['number']}.{side}" for side in ("before", "after"))
        # A new file was renamed into place if it is no longer here.
        moved = not after.exists() if entry["new"] else before.exists()
        if moved:
            _put(before, top / entry["path"], top)
    shutil.rmtree(staging)
    return [str(entry["path"]) for entry in journal["entries"]]


def _put(prepared: Path, target: Path, top: Path) -> None:
    """Give a file its prepared contents, or remove it and the folders that held it alone."""
    if not prepared.exists():
        target.unlink(missing_ok=True)
        _remove_empty(target.parent, top)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.copymode(target, prepared)
    move_into_place(prepared, target)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove folders that held only our files, and what Python compiled from them."""
    while folder != top and folder.is_dir():
        if {item.name for item in folder.iterdir()} - {"__pycache__"}:
            return
        shutil.rmtree(folder)
        folder = folder.parent
