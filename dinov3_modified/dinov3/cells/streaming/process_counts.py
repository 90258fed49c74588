"""Counters of all processes that read fields, in files that the main process adds up (ours)."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

from dinov3.cells.files import write_text_atomically

logger = logging.getLogger("dinov3")


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
