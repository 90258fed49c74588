"""What a batch notes of its images while it works: one JSON line each, read again by whoever goes on.

`images.jsonl` has the images that are done.  A part of a batch also notes those in work: when its
process is killed for its memory, these are suspected, tried again one at a time after all others,
and given up after `MAX_KILLS` such ends.  An image can cost itself only, never the batch.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = [
    "FAILURES_NAME",
    "JOURNAL_NAME",
    "MAX_KILLS",
    "begin_part",
    "clear_suspicion",
    "count_rows",
    "kills",
    "mend_journal",
    "note_begin",
    "note_failure",
    "read_journal",
    "suspect_images_in_work",
]

JOURNAL_NAME = "images.jsonl"
"""One JSON line per image that is done."""

FAILURES_NAME = "failures.jsonl"
"""One JSON line per image that failed; written when a part of a batch has seen all its images."""

MAX_KILLS = 3
"""Ends of a process, with an image in work, after which the image is given up."""

_IN_WORK_NAME = "in_work.jsonl"
_SUSPECTS_NAME = "suspects.jsonl"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Rows of a journal in the order in which they were written; cut lines are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off by a crash while it was written
    return rows


def count_rows(path: Path) -> int:
    """Lines of a file, 0 if there is none."""
    try:
        with path.open("rb") as file:
            return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def mend_journal(path: Path) -> None:
    """End a line that a crash has cut, so that the next one begins a line of its own."""
    try:
        with path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    except FileNotFoundError:
        return


def begin_part(part: Path) -> None:
    """Nothing is in work yet, whatever an earlier start had in work when it was told to stop."""
    (part / _IN_WORK_NAME).unlink(missing_ok=True)


def note_begin(part: Path, name: str) -> None:
    """An image is in work from here until it is in the journal, or `note_failure` is called."""
    _append(part / _IN_WORK_NAME, {"name": name, "in_work": True})


def note_failure(part: Path, name: str) -> None:
    """An image has failed by itself: it is not in work any more."""
    _append(part / _IN_WORK_NAME, {"name": name, "in_work": False})


def suspect_images_in_work(part: Path) -> int:
    """After a process was killed for its memory: one kill more for each image that it had in work.

    Returns
    -------
    int
        How many images these were.
    """
    state = {row["name"]: row["in_work"] for row in read_journal(part / _IN_WORK_NAME)}
    done = {row["name"] for row in read_journal(part / JOURNAL_NAME)}
    names = [name for name, in_work in state.items() if in_work and name not in done]
    for name in names:
        _append(part / _SUSPECTS_NAME, {"name": name})
    (part / _IN_WORK_NAME).unlink(missing_ok=True)
    return len(names)


def kills(part: Path) -> Counter[str]:
    """How often a process was killed while it had an image in work, by name of the image."""
    return Counter(row["name"] for row in read_journal(part / _SUSPECTS_NAME))


def clear_suspicion(part: Path) -> None:
    """A part has seen all its images; whoever runs it again tries them anew."""
    (part / _IN_WORK_NAME).unlink(missing_ok=True)
    (part / _SUSPECTS_NAME).unlink(missing_ok=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    mend_journal(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
