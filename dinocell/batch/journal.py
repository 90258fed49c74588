"""The journal of a batch: one JSON line for each image, read again when the batch is resumed.

`images.jsonl` lists the images that are done.  A part of a batch also notes the images that it has
started: when its process is killed for using too much memory, the unfinished ones are suspected, tried
again one at a time after all others, and given up after `MAX_KILLS` kills.  An image that needs too much
memory can therefore fail by itself, but not stop the batch.
"""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

JOURNAL_NAME = "images.jsonl"
"""One JSON line per image that is done."""

FAILURES_NAME = "failures.jsonl"
"""One JSON line per image that failed; written when a part of a batch has tried all its images."""

MAX_KILLS = 3
"""An image is given up after so many kills of processes that had started and not finished it."""

_STARTED_NAME = "started.jsonl"
_SUSPECTS_NAME = "suspects.jsonl"


def shard_folder(out: str | Path, index: int) -> Path:
    """Folder of a part of a batch: manifest, journal and record."""
    return Path(out) / "shards" / f"{index:04d}"


def merging_folder(out: str | Path) -> Path:
    """Folder of the job that merges the parts of a batch."""
    return Path(out) / "shards" / "merge"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Rows of a journal in the order in which they were written; damaged lines are left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # cut by a crash while it was written
                row = json.loads(line)
                if isinstance(row, dict) and "name" in row:
                    rows.append(row)
    return rows


def count_rows(path: Path) -> int:
    """Lines of a file, 0 if there is none."""
    try:
        with path.open("rb") as file:
            return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return 0


def complete_last_line(path: Path) -> None:
    """End a line that a crash has cut, so that the next entry starts on a line of its own."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def begin_part(part: Path) -> None:
    """Forget the images that an earlier start had not finished when it was asked to stop."""
    (part / _STARTED_NAME).unlink(missing_ok=True)


def note_start(part: Path, name: str) -> None:
    """An image was started; it is finished when it is in the journal or `note_failure` is called."""
    _append(part / _STARTED_NAME, {"name": name, "unfinished": True})


def note_failure(part: Path, name: str) -> None:
    """An image has failed by itself, and not because its process was killed."""
    _append(part / _STARTED_NAME, {"name": name, "unfinished": False})


def suspect_unfinished_images(part: Path) -> int:
    """After a process was killed for its memory: count a kill for each image that it had not finished.

    Returns how many images these were.
    """
    state = {row["name"]: row["unfinished"] for row in read_journal(part / _STARTED_NAME)}
    done = {row["name"] for row in read_journal(part / JOURNAL_NAME)}
    names = [name for name, unfinished in state.items() if unfinished and name not in done]
    for name in names:
        _append(part / _SUSPECTS_NAME, {"name": name})
    (part / _STARTED_NAME).unlink(missing_ok=True)
    return len(names)


def kills(part: Path) -> Counter[str]:
    """How often a process was killed before it had finished an image, by name of the image."""
    return Counter(row["name"] for row in read_journal(part / _SUSPECTS_NAME))


def clear_suspicion(part: Path) -> None:
    """A part has tried all its images; the next run of the part tries the failed ones again."""
    (part / _STARTED_NAME).unlink(missing_ok=True)
    (part / _SUSPECTS_NAME).unlink(missing_ok=True)


def _append(path: Path, row: dict[str, Any]) -> None:
    complete_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
