"""Merge the parts of a batch: one summary, one journal, one table of all cells."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.batch.claims import CLAIM_NAME
from dinocell.batch.folder import write_summary
from dinocell.batch.journal import JOURNAL_NAME, read_journal, shard_folder
from dinocell.batch.parts import ShardState, part_state, read_plan
from dinocell.batch.units import Unit
from dinocell.files import atomic_path, remove_temporary_files, write_text_atomically
from dinocell.progress import count_text, progress
from dinocell.results.wells import write_wells


@dataclass(frozen=True)
class MergedShards:
    """The outcome of all parts.

    Attributes
    ----------
    out : folder of the results
    images, cells : done, and counted in them
    failures : (file, sentence) per image that failed
    missing : parts with images that are neither done nor failed
    """

    out: Path
    images: int
    cells: int
    failures: list[tuple[Path, str]]
    missing: list[ShardState]

    def text(self) -> str:
        """A few lines for the terminal."""
        counts = f"{count_text(self.cells, 'cell')} in {count_text(self.images, 'image')}"
        lines = [f"{counts} → {self.out / 'summary.csv'}"]
        lines += [f"failed: {path}: {sentence}" for path, sentence in self.failures[:50]]
        if len(self.failures) > 50:
            lines.append(f"... {len(self.failures) - 50} more in summary.csv")
        for state in self.missing:
            lines.append(f"not done: {state.left} of {state.images} images of shard {state.index}")
        return "\n".join(lines)

    def missing_sentence(self) -> str:
        """What is not done, if anything is `missing`."""
        names = ", ".join(str(state.index) for state in self.missing[:10])
        more = ", ..." if len(self.missing) > 10 else ""
        left = sum(state.left for state in self.missing)
        return (
            f"All images must be done or have failed, got {left} that are neither (shards {names}{more}): "
            "run the same command again to continue with them"
        )


def merge_shards(out: str | Path, *, shown: bool = True) -> MergedShards:
    """Write the files that `dinocell segment` writes at its end: `summary.csv` and the journal
    `images.jsonl` of all images in their order; and `cells.csv`, all cells with their image in the first
    column.

    Can be run at any time; images that are not finished have a sentence in the column `error`.

    Raises UsageError (no plan).
    """
    plan = read_plan(out)
    rows: dict[int, dict[str, Any]] = {}
    failures: dict[int, tuple[Unit, str]] = {}
    unfinished: dict[int, tuple[Unit, str]] = {}
    missing, is_running = [], False
    for index in range(plan.count):
        state, done, failed, listed = part_state(plan.out, index)
        is_running = is_running or (shard_folder(plan.out, index) / CLAIM_NAME).exists()
        if not state.complete:
            missing.append(state)
        for place, unit in listed:
            if unit.name in done:
                rows[place] = done[unit.name]
            elif unit.name in failed:
                failures[place] = (unit, failed[unit.name])
            else:
                unfinished[place] = (unit, f"not done: shard {index} is not finished")
    without = failures | unfinished
    # A folder may have had images before that are not of this plan.
    names = {str(row["name"]) for row in rows.values()}
    names |= {unit.name for unit, _ in without.values()}
    others = [row for row in read_journal(plan.out / JOURNAL_NAME) if row["name"] not in names]
    ordered = [*others, *(rows[place] for place in sorted(rows))]
    write_summary(plan.out / "summary.csv", ordered, [without[place] for place in sorted(without)])
    write_wells(plan.out, ordered, plan.options.formats)
    write_text_atomically(
        plan.out / JOURNAL_NAME, "".join(json.dumps(row) + "\n" for row in ordered)
    )
    _merge_cells(plan.out, [str(row["name"]) for row in ordered], shown=shown)
    if not missing and not is_running:
        folders = {(plan.out / str(row["name"])).parent for row in ordered} | {plan.out}
        for folder in folders:
            remove_temporary_files(folder, before=time.time())
    return MergedShards(
        plan.out,
        len(rows),
        sum(int(row["num_cells"]) for row in rows.values()),
        [(unit.path, sentence) for _, (unit, sentence) in sorted(failures.items())],
        missing,
    )


def _merge_cells(out: Path, names: Sequence[str], *, shown: bool) -> None:
    """`cells.csv` of all NAME_cells.csv, read one by one: a plate has millions of cells."""
    columns = ["image"]
    tables = [out / f"{name}_cells.csv" for name in names]
    for path in tables:
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                columns += [name for name in next(csv.reader(file), []) if name not in columns]
    with (
        atomic_path(out / "cells.csv") as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as target,
        progress("merging tables", len(tables), shown=shown) as bar,
    ):
        writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for name, path in zip(names, tables, strict=True):
            if path.exists():
                with path.open(encoding="utf-8", newline="") as file:
                    writer.writerows({"image": name, **row} for row in csv.DictReader(file))
            bar.advance()
