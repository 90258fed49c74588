"""A series for another commit: made by merging, or from a checkout that somebody edited."""

import ast
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from dinocell.errors import UsageError
from dinocell.upstream.git import Commit, Scratch, run_git
from dinocell.upstream.merge import Merged, merge_series
from dinocell.upstream.overlay import conflict_text, export_tree, recover
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
    onto : commit, tag or branch that the checkout knows
    check : receives the root of the tree with our additions; the series is written only if it returns
        true
    dry_run : only report the state that each patch would get

    Returns the state of each patch, and the files of the series that were written: none after a conflict.
    """
    with Scratch(checkout) as scratch:
        commit = scratch.commit(onto)
        merged = merge_series(scratch, commit, series)
        if not merged.applies or dry_run:
            return merged, []
        if check is not None:
            ours = {path: source.read_bytes() for path, source in series.files.items()}
            with tempfile.TemporaryDirectory(prefix="dinocell-rebase-") as folder:
                tree = Path(folder).resolve() / "tree"
                if not check(export_tree(scratch, commit, {**merged.texts, **ours}, tree)):
                    raise PatchError(
                        "The tree with our additions must pass its verification, got checks that failed "
                        "or did not run: see the table; the series was not changed"
                    )
        if there := [outcome.name for outcome in merged.outcomes if outcome.state == "there"]:
            raise PatchError(
                f"Upstream must not have our lines yet, got {', '.join(there)} in {commit.id[:12]}: take "
                "them out of the series, or name a commit of upstream's own"
            )
        places = {outcome.name: outcome.places for outcome in merged.outcomes}
        written = write_series(series, merged.bases, places, _moved(scratch, series.pin, commit))
        # Folder that the listed files lie in.
        roots = [Path(str(source)[: -len(path)]) for path, source in series.files.items()]
        read_series(series.folder, files_root=roots[0] if roots else None)
        return merged, written


def _moved(scratch: Scratch, pin: Pin, commit: Commit) -> Pin:
    """The pin on a commit; the known range grows by it."""
    oldest, newest = pin.oldest, pin.newest
    if scratch.is_ancestor(newest, commit.id):
        newest = commit.id
    elif scratch.is_ancestor(commit.id, oldest):
        oldest = commit.id
    return replace(pin, commit=commit.id, date=commit.date, oldest=oldest, newest=newest)


def refresh(checkout: str | Path, series: Series) -> list[str]:
    """Make the series from the marked lines of a checkout that somebody edited; the files written.

    The lines are read from the work tree and counted on the commit that is checked out.

    Raises UsageError (a file has other changes than marked lines), or PatchError (lines are marked
    with an unknown name, or stand elsewhere than their header says).
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
            f"Lines must be marked with the name of a patch ({', '.join(sorted(known))}), got "
            f"{', '.join(unknown)}: correct the mark, or add {unknown[0]}.patch with its header and "
            "name it in series"
        )
    if lacking := sorted(known - set(found)):
        raise PatchError(
            f"Each patch must have lines in the checkout, got none of {', '.join(lacking)}: apply the "
            "series first, or take them out of series"
        )
    edited = tuple(replace(patch, additions=found[patch.name]) for patch in series.patches)
    problems = []
    for path, text in texts.items():
        for patch in edited:
            hooks, has = len(patch.hooks_of(path)), len(patch.additions.get(path, ()))
            if hooks != has:
                problems.append(
                    f"{patch.name} has {hooks} hooks for {path}, the checkout {has} additions"
                )
        if not problems:
            problems += chain.from_iterable(misplaced(text, path, edited).values())
    if problems:
        raise PatchError(
            f"Additions must stand where the headers say, got another place ({'; '.join(problems)}): "
            "correct 'Hook:' in the patch, or the checkout"
        )
    fresh = replace(series, patches=edited)
    return write_series(fresh, bases, {p.name: p.additions for p in edited}, pin)


def _edited_files(
    scratch: Scratch, commit: Commit, series: Series
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Path → contents in the commit, path → text in the checkout, of all patched or changed files."""
    top = scratch.top()
    listing = run_git(scratch.checkout, "diff", "--name-only", "-z", "HEAD").stdout.decode()
    paths = sorted({*filter(None, listing.split("\0")), *series.paths})
    entries = scratch.entries(commit.id, paths)
    bases: dict[str, bytes] = {}
    texts: dict[str, str] = {}
    for path in paths:
        if path not in entries or not (top / path).is_file():
            raise UsageError(
                f"Patched files must exist in the commit and in the checkout, got {path} in one of "
                "them only: correct the checkout"
            )
        text = (top / path).read_text(encoding="utf-8")
        if blob_id(without_additions(text).encode()) != entries[path]:
            raise UsageError(
                f"Changes must be marked added lines alone ('  # dinocell: NAME'), got others in "
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
        lines += [f"{outcome.name}:", *(f"  {reason}" for reason in outcome.reasons)]
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
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    names = [node.name for node in found if node.lineno <= line <= (node.end_lineno or 0)]
    return f" in {names[-1]}" if names else ""
