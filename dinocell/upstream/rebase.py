"""A series for another commit: made by merging, or from a checkout that somebody edited."""

from __future__ import annotations

import ast
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dinocell.errors import UsageError
from dinocell.upstream.git import Commit, Scratch, run_git
from dinocell.upstream.merge import Merged, merge_series
from dinocell.upstream.overlay import conflict_text, recover
from dinocell.upstream.placement import additions_in, misplaced, without_additions
from dinocell.upstream.series import (
    Addition,
    PatchError,
    Pin,
    Series,
    blob_id,
    read_series,
    write_series,
)


def rebase(
    checkout: str | Path,
    onto: str,
    series: Series,
    *,
    check: Callable[[Path], bool] | None = None,
    dry_run: bool = False,
) -> tuple[Merged, list[str]]:
    """Move the series onto a commit; the checkout is not touched.

    Parameters
    ----------
    onto : str
        Commit, tag or branch that the checkout knows.
    check : function, optional
        Receives the root of the tree with our additions; the series is written only if it returns
        true.
    dry_run : bool
        Only report the state that each patch would get.

    Returns
    -------
    Merged, list of str
        State of each patch, and the files of the series that were written: none after a
        conflict.
    """
    with Scratch(checkout) as scratch:
        commit = scratch.commit(onto)
        merged = merge_series(scratch, commit, series)
        if not merged.applies or dry_run:
            return merged, []
        if check is not None:
            tree = Path(tempfile.mkdtemp(prefix="dinocell-rebase-"))
            try:
                _write_tree(scratch, commit, merged, series, tree)
                if not check(tree):
                    raise PatchError(
                        "the tree with our additions must pass its verification, got checks that failed "
                        "or did not run: see the table; the series was not changed"
                    )
            finally:
                shutil.rmtree(tree, ignore_errors=True)
        there = [outcome.name for outcome in merged.outcomes if outcome.state == "there"]
        if there:
            raise PatchError(
                f"upstream must not have our lines yet, got {', '.join(there)} in {commit.id[:12]}: take "
                "them out of the series, or name a commit of upstream's own"
            )
        places = {outcome.name: outcome.places for outcome in merged.outcomes}
        written = write_series(series, merged.bases, places, _moved(scratch, series.pin, commit))
        read_series(series.folder, files_root=_files_root(series))
        return merged, written


def _files_root(series: Series) -> Path | None:
    """Folder that the listed files lie in."""
    for path, source in series.files.items():
        return Path(str(source)[: -len(path)])
    return None


def _moved(scratch: Scratch, pin: Pin, commit: Commit) -> Pin:
    """The pin on a commit; the known range grows by it."""
    oldest, newest = pin.oldest, pin.newest
    if scratch.is_ancestor(newest, commit.id):
        newest = commit.id
    elif scratch.is_ancestor(commit.id, oldest):
        oldest = commit.id
    return replace(pin, commit=commit.id, date=commit.date, oldest=oldest, newest=newest)


def _write_tree(
    scratch: Scratch, commit: Commit, merged: Merged, series: Series, tree: Path
) -> None:
    """The package of a commit with our additions."""
    for path, blob in scratch.entries(commit.id, ["dinov3"]).items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(scratch.read(blob))
    for path, text in merged.texts.items():
        (tree / path).write_bytes(text)
    for path, source in series.files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, tree / path)


def refresh(checkout: str | Path, series: Series) -> list[str]:
    """Make the series from the marked lines of a checkout that somebody edited.

    The lines are read from the work tree and counted on the commit that is checked out.

    Returns
    -------
    list of str
        Files of the series that were written.

    Raises
    ------
    UsageError
        A file has other changes than marked lines.
    PatchError
        Lines are marked with an unknown name, or stand elsewhere than their header says.
    """
    with Scratch(checkout) as scratch:
        recover(scratch)
        commit = scratch.commit("HEAD")
        pin = _moved(scratch, series.pin, commit)
        bases, texts = _edited_files(scratch, commit, series)
    found: dict[str, dict[str, tuple[Addition, ...]]] = {}
    for path, text in texts.items():
        for name, items in additions_in(text).items():
            found.setdefault(name, {})[path] = tuple(items)
    known = {patch.name for patch in series.patches}
    if unknown := sorted(set(found) - known):
        raise PatchError(
            f"lines must be marked with the name of a patch ({', '.join(sorted(known))}), got "
            f"{', '.join(unknown)}: correct the mark, or add {unknown[0]}.patch with its header and "
            "name it in series"
        )
    if lacking := sorted(known - set(found)):
        raise PatchError(
            f"each patch must have lines in the checkout, got none of {', '.join(lacking)}: apply the "
            "series first, or take them out of series"
        )
    edited = tuple(replace(patch, additions=found[patch.name]) for patch in series.patches)
    problems = []
    for path, text in texts.items():
        for patch in edited:
            if len(patch.hooks_of(path)) != len(patch.additions.get(path, ())):
                problems.append(
                    f"{patch.name}.patch has {len(patch.hooks_of(path))} lines 'Hook:' for {path}, the "
                    f"checkout {len(patch.additions.get(path, ()))} additions"
                )
        if not problems:
            problems += chain.from_iterable(misplaced(text, path, edited).values())
    if problems:
        raise PatchError(
            f"additions must stand where the headers say, got another place ({'; '.join(problems)}): "
            "correct 'Hook:' in the patch, or the checkout"
        )
    fresh = replace(series, patches=edited)
    return write_series(fresh, bases, {p.name: p.additions for p in edited}, pin)


def _edited_files(
    scratch: Scratch, commit: Commit, series: Series
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Path → contents in the commit, path → text in the checkout, of all patched or changed files.

    Raises
    ------
    UsageError
        A file differs from the commit by more than marked lines.
    """
    top = Path(run_git(scratch.checkout, "rev-parse", "--show-toplevel").stdout.decode().strip())
    listing = run_git(scratch.checkout, "diff", "--name-only", "-z", "HEAD").stdout.decode()
    paths = sorted({*filter(None, listing.split("\0")), *series.paths})
    entries = scratch.entries(commit.id, paths)
    bases: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for path in paths:
        if path not in entries or not (top / path).is_file():
            raise UsageError(
                f"patched files must exist in the commit and in the checkout, got {path} in one of "
                "them only: correct the checkout"
            )
        text = (top / path).read_text(encoding="utf-8")
        if blob_id(without_additions(text).encode()) != entries[path]:
            raise UsageError(
                f"changes must be marked added lines alone ('  # dinocell: NAME'), got others in "
                f"{path}: mark each new line, and restore upstream's"
            )
        bases[path] = scratch.read(entries[path])
        texts[path] = text
    return bases, texts


def conflicts(merged: Merged) -> str:
    """Each conflict with file, function and both sides, for a person to read."""
    lines = []
    for outcome in merged.outcomes:
        if outcome.applies:
            continue
        lines.append(f"{outcome.name}:")
        lines += [f"  {reason}" for reason in outcome.reasons]
        for path, sides in outcome.sides.items():
            for side in sides:
                where = _function_at(merged.bases.get(path, b""), side.line)
                lines.append(f"  {path}:{side.line}{where}")
                lines += [f"    upstream | {line}" for line in side.upstream]
                lines += [f"    ours     | {line}" for line in side.ours]
    return "\n".join(lines) or conflict_text(merged)


def _function_at(text: bytes, line: int) -> str:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    names = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return f" in {names[-1]}" if names else ""
