"""Divide one batch of images into parts of about the same size, for many processes on many machines.

`plan_shards` divides a list of files once; any process can run a part, and run it again after it was
killed; `merge_shards` writes what one process would have written for all images.

Every output is written by one part only, under a temporary name that is then renamed; a part's
journal gets an image's line when all files of the image are written.  So a part that is killed anywhere
repeats only the images that it was processing, with the same results.
"""

import csv
import heapq
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dinocell.batch.claims import (
    CLAIM_NAME,
    Claimant,
    claimed,
    owner_of,
    read_claim,
    refuse_running,
)
from dinocell.batch.folder import forget_results, refuse_mixture, refuse_results
from dinocell.batch.inputs import is_unchanged, size_and_time
from dinocell.batch.journal import (
    FAILURES_NAME,
    JOURNAL_NAME,
    clear_suspicion,
    read_journal,
    shard_folder,
)
from dinocell.batch.options import FREE_OPTIONS, SegmentOptions, check_call
from dinocell.batch.remote import refuse_s3
from dinocell.batch.run import WHOLE_BATCH, BatchResult, segment_files
from dinocell.batch.units import Unit, named_as_before, units_of
from dinocell.errors import UsageError
from dinocell.files import write_text_atomically
from dinocell.io.s3 import S3Path, place_of

_PLAN_NAME = "plan.json"
_MANIFEST_NAME = "manifest.csv"


@dataclass(frozen=True)
class ShardPlan:
    """A divided batch.

    Attributes
    ----------
    out : folder of the results; the parts' own files are in `out/shards/NNNN`
    count : number of parts
    images, total_bytes : of all parts
    options : of `dinocell segment`, the same for all parts
    fresh : newly divided and not yet written, so that nothing is done
    """

    out: Path
    count: int
    images: int
    total_bytes: int
    options: SegmentOptions
    fresh: bool = False


@dataclass(frozen=True)
class ShardState:
    """How far a part is: images done, failed, and listed."""

    index: int
    done: int
    failed: int
    images: int

    @property
    def left(self) -> int:
        """Images that are neither done nor have failed."""
        return self.images - self.done - self.failed

    @property
    def complete(self) -> bool:
        """Whether every image is done or has failed."""
        return self.left <= 0


def plan_shards(
    paths: Sequence[Path],
    out: str | Path,
    options: SegmentOptions,
    count: int,
    *,
    write: bool = True,
    claimant: Claimant = Claimant(),  # noqa: B008
) -> ShardPlan:
    """Divide files into parts of about as many bytes and write the plan, or find the same plan again.

    Parameters
    ----------
    paths : sequence of paths
        As from `find_images`; their planes are divided where the options want each.
    out : folder
        Of the results.
    options : SegmentOptions
    count : int
        Parts; at most as many as there are files.
    write : bool
        Otherwise only return the plan.
    claimant : Claimant
        What is known here of jobs that may be running parts.

    Raises
    ------
    ConfigError
        `overwrite` with other settings, and the folder has results of images that are not given.
    UsageError
        Nothing to do, two files of one name in one folder, or `out` has another plan or results and there is no
        `overwrite`, which discards what was done; or a process is running a part that would be
        discarded.
    """
    refuse_s3(Path(out))
    if count < 1:
        raise UsageError(
            f"The number of shards must be at least 1, got {count}: give a larger number"
        )
    check_call(paths, options)
    if options.report:
        raise UsageError(
            "`report` must be False for shards, got True: the merged summary.csv has every image"
        )
    out = Path(out)
    units = named_as_before(units_of(paths, options), out)
    if not options.overwrite and has_begun(out):
        plan = replace(read_plan(out), options=options)  # device and the like may change
        _refuse_another(plan, units, count)
        files = {out / "shards" / _PLAN_NAME: _plan_text(plan)}
    else:
        planes = Counter(unit.path for unit in units)
        sizes = {unit.path: size_and_time(unit.image)[0] for unit in units}
        shares = [sizes[unit.path] // planes[unit.path] for unit in units]
        parts = _divide(shares, min(count, len(units)))
        plan = ShardPlan(out, len(parts), len(units), sum(sizes.values()), options, fresh=True)
        if not options.overwrite:
            refuse_results(units, out, options.formats, resumable=False)
        _refuse_running(out, claimant)
        if options.overwrite:
            refuse_mixture(out, units, options)
        files = {
            shard_folder(out, index) / _MANIFEST_NAME: _manifest_text(part, units, shares)
            for index, part in enumerate(parts)
        }
        files[out / "shards" / _PLAN_NAME] = _plan_text(plan)
    if not write:
        return plan
    if plan.fresh:
        _forget(out)
        if options.overwrite:
            forget_results(out, units)
    for path, text in files.items():  # the plan last: it says that the manifests are written
        write_text_atomically(path, text, errors="surrogateescape")
    return replace(plan, fresh=False)


def has_begun(out: str | Path) -> bool:
    """Whether a folder has a plan of which something was done; until then it can be replaced."""
    if not (Path(out) / "shards" / _PLAN_NAME).exists():
        return False
    folders = [shard_folder(out, index) for index in range(read_plan(out).count)]
    return any((f / JOURNAL_NAME).exists() or (f / CLAIM_NAME).exists() for f in folders)


def _folders(out: Path) -> list[Path]:
    """Folders of all parts of this and earlier plans."""
    return [path for path in sorted((out / "shards").glob("[0-9]*")) if path.name.isdigit()]


def _forget(out: Path) -> None:
    """Remove the notes of earlier parts; results are replaced one by one later, logs stay."""
    (out / "shards" / _PLAN_NAME).unlink(missing_ok=True)
    for folder in _folders(out):
        for name in (JOURNAL_NAME, FAILURES_NAME, CLAIM_NAME, _MANIFEST_NAME):
            (folder / name).unlink(missing_ok=True)
        clear_suspicion(folder)


def _refuse_running(out: Path, claimant: Claimant) -> None:
    """No part is discarded while a process runs it."""
    for folder in _folders(out):
        other = read_claim(folder / CLAIM_NAME)
        if other and claimant.finds_running(other):
            raise UsageError(
                f"`overwrite` must wait until no process runs the images, got {folder}, which "
                f"{owner_of(other)} is running: wait for it, or cancel it"
            )


def _divide(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Places of the files of each part: the largest file left goes to the part with least bytes
    (Graham 1969: at most 4/3 of the best possible)."""
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    # A file costs something beyond its bytes; without that, empty files would all go to one part.
    for place in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, index = heapq.heappop(loads)
        parts[index].append(place)
        heapq.heappush(loads, (load + sizes[place] + 4096, index))
    return [sorted(part) for part in parts]


def _manifest_text(part: Sequence[int], units: Sequence[Unit], sizes: Sequence[int]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", "bytes", "path", "unit"])
    for place in part:
        unit = units[place]
        writer.writerow([place, sizes[place], _whole(unit.path), unit.to_text()])
    return text.getvalue()


def _whole(path: Any) -> str:
    """The path from the root on, without `..`; an address of S3 as it is."""
    return str(path) if isinstance(path, S3Path) else os.path.abspath(path)


def _plan_text(plan: ShardPlan) -> str:
    values = {"count": plan.count, "images": plan.images, "bytes": plan.total_bytes}
    return json.dumps(values | {"options": asdict(plan.options)}, indent=1, sort_keys=True) + "\n"


def _refuse_another(plan: ShardPlan, units: Sequence[Unit], count: int) -> None:
    """Only the same batch can continue.  Files that were deleted since are reported as failures later."""
    there = asdict(read_plan(plan.out).options)
    new = asdict(plan.options)
    differing = [
        name for name, old in there.items() if name not in FREE_OPTIONS and old != new[name]
    ]
    if differing:
        raise UsageError(
            f"A batch must continue with its options, got other values of {', '.join(differing)} than "
            f"{plan.out / 'shards' / _PLAN_NAME}: undo that, choose another folder, or set `overwrite`"
        )
    if plan.count != min(count, plan.images):
        raise UsageError(
            f"A batch must continue with its {plan.count} shards, got {count}: set `shards` to "
            f"{plan.count}, choose another folder, or set `overwrite`"
        )
    listed = {str(unit.path) for index in range(plan.count) for _, unit in _listed(plan.out, index)}
    others = [unit.path for unit in units if _whole(unit.path) not in listed]
    if others:
        raise UsageError(
            f"A batch must continue with its images, got {len(others)} that {plan.out / 'shards'} does not "
            f"list, such as {others[0]}: choose another folder for them, or set `overwrite`"
        )


def read_plan(out: str | Path) -> ShardPlan:
    """The plan of a folder.

    Raises UsageError (there is none, or it cannot be read).
    """
    path = Path(out) / "shards" / _PLAN_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        options = values["options"]
        for name in ("formats", "channels", "percentiles"):
            options[name] = None if options[name] is None else tuple(options[name])
        return ShardPlan(
            Path(out), values["count"], values["images"], values["bytes"], SegmentOptions(**options)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"`out` must hold a plan of shards, got none that can be read at {path} ({error}): make it "
            "with `dinocell shards plan`"
        ) from error


def _listed(out: Path, index: int) -> list[tuple[int, Unit]]:
    """(place in the batch, unit) of a part."""
    path = shard_folder(out, index) / _MANIFEST_NAME
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["place"]), Unit.of_text(place_of(row["path"]), row.get("unit"))) for row in rows
    ]


def open_shards(plan: ShardPlan) -> list[int]:
    """Parts with images that are not done, or whose files have changed since."""
    if plan.fresh:
        return list(range(plan.count))
    found = []
    for index in range(plan.count):
        state, rows, _, listed = part_state(plan.out, index)
        if state.done < state.images or not all(
            is_unchanged(unit.image, rows[unit.name]) for _, unit in listed
        ):
            found.append(index)
    return found


def shard_states(plan: ShardPlan) -> list[ShardState]:
    """How far each part is."""
    return [part_state(plan.out, index)[0] for index in range(plan.count)]


def part_state(
    out: Path, index: int
) -> tuple[ShardState, dict[str, dict[str, Any]], dict[str, str], list[tuple[int, Unit]]]:
    """State, rows by name, failures by name, and units of a part."""
    folder = shard_folder(out, index)
    listed = _listed(out, index)
    rows = {row["name"]: row for row in read_journal(folder / JOURNAL_NAME)}
    failed_rows = read_journal(folder / FAILURES_NAME)
    failures = {row["name"]: row["error"] for row in failed_rows if row["name"] not in rows}
    done = sum(unit.name in rows for _, unit in listed)
    failed = sum(unit.name in failures for _, unit in listed)
    return ShardState(index, done, failed, len(listed)), rows, failures, listed


def run_shard(
    out: str | Path,
    index: int,
    *,
    shown: bool = True,
    claimant: Claimant = Claimant(),  # noqa: B008
) -> BatchResult:
    """Segment the images of a part that are not done yet.

    Raises UsageError (no plan, no such part); DINOCellError (another process runs it).
    """
    plan = read_plan(out)
    if not 0 <= index < plan.count:
        raise UsageError(
            f"The shard must be one of 0 to {plan.count - 1}, got {index}: see `dinocell shards status`"
        )
    folder = shard_folder(plan.out, index)
    refuse_running(plan.out, claimant, WHOLE_BATCH)
    with claimed(folder, claimant):
        (folder / FAILURES_NAME).unlink(missing_ok=True)  # they are tried again
        return segment_files(
            [unit for _, unit in _listed(plan.out, index)],
            plan.out,
            replace(plan.options, resume=True, overwrite=False),
            shown=shown,
            part=folder,
        )
