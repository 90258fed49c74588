"""What `dinocell upstream` prints."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dinocell.upstream.merge import Merged, Outcome
from dinocell.upstream.overlay import Status
from dinocell.upstream.rebase import conflicts

# As the two commands name the same states.
_REBASED = {
    "clean": "applied",
    "offset": "merged",
    "there": "already there",
    "conflict": "CONFLICT",
}
_SHOWN = {**_REBASED, "clean": "clean", "offset": "with offset"}


def outcome_lines(outcomes: Iterable[Outcome], words: dict[str, str]) -> list[str]:
    """A line a patch: state, and how far its additions moved."""
    lines = []
    for outcome in outcomes:
        moved = ", ".join(f"{where} {by:+d}" for where, by in outcome.offsets.items())
        lines.append(f"  {outcome.name:<22} {words[outcome.state]:<13} {moved}".rstrip())
        lines += [f"      {reason}" for reason in outcome.reasons]
    return lines


def status_text(status: Status) -> str:
    """Commit, patches, files, and what to do next."""
    commit = status.commit
    named = f" ({status.described})" if status.described else ""
    shown = [
        replace(one, state="there", offsets={}) if one.name in status.in_place else one
        for one in status.outcomes
    ]
    lines = [
        f"commit   {commit.id}{named}",
        f"         {commit.date}  {commit.subject}",
        f"         {status.relation}",
        "patches",
        *outcome_lines(shown, _SHOWN),
    ]
    counts = Counter(status.files.values())
    lines.append(
        f"in place {len(status.in_place)} of {len(status.outcomes)} patches, {counts['there']} of "
        f"{len(status.files)} files of ours ({counts['missing']} missing, {counts['other']} different)"
    )
    if status.changed:
        lines.append(f"changes  {len(status.changed)} files with changes that are not ours:")
        lines += [f"  {path}" for path in status.changed[:10]]
        if len(status.changed) > 10:
            lines.append("  ...")
    if status.applied:
        lines.append("the tree has all our additions: dinocell upstream verify tests it")
    elif status.ready:
        lines.append("dinocell upstream apply puts them in")
    elif status.changed:
        lines.append("commit or stash the changes, or let dinocell upstream apply write a copy")
    else:
        lines.append("see docs/upstream.md for conflicts")
    return "\n".join(lines)


def merged_text(merged: Merged) -> str:
    """Each patch on a commit, and its conflicts."""
    commit = merged.commit
    lines = [f"onto {commit.id}", f"     {commit.date}  {commit.subject}"]
    lines += outcome_lines(merged.outcomes, _REBASED)
    if not merged.applies:
        lines += ["", conflicts(merged)]
    return "\n".join(lines)
