"""What all processes of a run share in files: lost fields, and counters to add up (ours)."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from dinov3.cells.files import write_text_atomically

logger = logging.getLogger("dinov3")


class LostFields:
    """What one process has read of the list so far; each call reads only the new lines.

    A field is lost from a position of the run on.  Its visits before that showed it, and show it again
    when the run is resumed from an earlier checkpoint.
    """

    def __init__(self) -> None:
        self.since: dict[int, int] = {}  # number of a lost field → first position without it
        self._bytes_read = 0

    def read(self, path: Path, is_field: Callable[[int, str], bool]) -> dict[int, int]:
        """`since` with the lines that were added to the file, which need not exist.

        `is_field` says whether a number and a name belong together in this data set.
        """
        if path.exists() and path.stat().st_size != self._bytes_read:
            with path.open("rb") as stream:
                stream.seek(self._bytes_read)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():
                entry = json.loads(line)
                if is_field(entry["number"], entry["field"]):
                    number, position = entry["number"], entry.get("position", 0)
                    self.since[number] = min(position, self.since.get(number, position))
            self._bytes_read += len(whole)
        return self.since


def append_lost(path: Path, number: int, name: str, reason: str, position: int) -> None:
    """Add a field to the list, in one write of one short line, so that lines of processes never mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"number": number, "field": name, "position": position, "reason": reason}
    line = json.dumps(entry) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def lost_names(path: Path) -> set[str]:
    """Names of all fields in the list; several processes may have added the same one."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {json.loads(line)["field"] for line in lines if line.endswith("}")}


def write_counts(folder: Path, counts: Counter[str]) -> None:
    """Replace this process's counters in a folder; a full disk costs the counters, not the run."""
    try:
        write_text_atomically(folder / f"counts-{os.getpid()}.json", json.dumps(counts))
    except OSError as error:
        logger.debug("The counters could not be written: %s", error)


def sum_of_counts(folder: Path) -> Counter[str]:
    """The counters of all processes that wrote into a folder, added up."""
    total: Counter[str] = Counter()
    for path in folder.glob("counts-*.json"):
        try:
            total.update(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # a process that ended takes its folder with it
            continue
    return total
