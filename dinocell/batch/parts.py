"""One batch of images in parts of about the same size, for many processes on many machines.

`plan_shards` divides a list of files once; each part is run, killed and run again by whoever has it,
and `merge_shards` makes of the parts what one process would have left.

Every output is written by one part only, under a temporary name that is then renamed; a part's
journal gets an image's line when all its files are there.  So a part that is killed anywhere repeats
at most the images that it had in work, and they come out the same.
"""

from __future__ import annotations

import contextlib
import csv
import heapq
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dinocell.batch.journal import FAILURES_NAME, JOURNAL_NAME, clear_suspicion, read_journal
from dinocell.batch.run import (
    FREE_OPTIONS,
    SETTINGS_NAME,
    BatchResult,
    SegmentOptions,
    check_call,
    present_results,
    segment_files,
    write_summary,
)
from dinocell.cluster.record import shard_folder
from dinocell.cluster.slurm import job_states, own_job
from dinocell.errors import DINOCellError, UsageError
from dinocell.files import atomic_path, remove_temporary_files, write_text_atomically
from dinocell.progress import progress

__all__ = [
    "MergedShards",
    "ShardPlan",
    "ShardState",
    "has_begun",
    "merge_shards",
    "open_shards",
    "plan_shards",
    "read_plan",
    "run_shard",
    "shard_states",
]

_PLAN_NAME = "plan.json"
_MANIFEST_NAME = "manifest.csv"
_CLAIM_NAME = "claim.json"
_YOUNG_S = 60.0  # of a claim that is still being written


@dataclass(frozen=True)
class ShardPlan:
    """A divided batch.

    Attributes
    ----------
    out : folder of the results; the parts' own files are in `out/shards/NNNN`
    count : number of parts
    images, total_bytes : of all parts
    options : of `dinocell segment`, the same for all parts
    fresh : divided anew and not written down, so that nothing is done
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
) -> ShardPlan:
    """Divide files into parts of about as many bytes, and write that down; or find the same plan.

    Parameters
    ----------
    paths : sequence of paths
        As from `find_images`.
    out : folder
        Of the results.
    options : SegmentOptions
    count : int
        Parts; at most as many as there are files.
    write : bool
        Otherwise only tell.

    Raises
    ------
    UsageError
        Nothing to do, two files of one name, or `out` has another plan or results and there is no
        `overwrite`, which forgets what was done; or a process has a part in work that it would
        forget.
    """
    if count < 1:
        raise UsageError(f"the number of shards must be at least 1, got {count}: raise it")
    check_call(paths, options)
    if options.report:
        raise UsageError(
            "--report must be left out with shards, got it: the merged summary.csv has every image"
        )
    out = Path(out)
    if not options.overwrite and has_begun(out):
        plan = replace(read_plan(out), options=options)  # device and the like may change
        _refuse_another(plan, paths, count)
        files = {out / "shards" / _PLAN_NAME: _plan_text(plan)}
    else:
        sizes = [path.stat().st_size for path in paths]
        parts = _divide(sizes, min(count, len(paths)))
        plan = ShardPlan(out, len(parts), len(paths), sum(sizes), options, fresh=True)
        _refuse_results(plan, paths)
        _refuse_work(out)
        files = {
            shard_folder(out, index) / _MANIFEST_NAME: _manifest_text(part, paths, sizes)
            for index, part in enumerate(parts)
        }
        files[out / "shards" / _PLAN_NAME] = _plan_text(plan)
    if not write:
        return plan
    if plan.fresh:
        _forget(out)
        if options.overwrite:
            (out / SETTINGS_NAME).unlink(missing_ok=True)
    for path, text in files.items():  # the plan last: it says that all is there
        write_text_atomically(path, text, errors="surrogateescape")
    return replace(plan, fresh=False)


def has_begun(out: str | Path) -> bool:
    """Whether a folder has a plan of which something was done; until then it can be replaced."""
    if not (Path(out) / "shards" / _PLAN_NAME).exists():
        return False
    folders = [shard_folder(out, index) for index in range(read_plan(out).count)]
    return any((f / JOURNAL_NAME).exists() or (f / _CLAIM_NAME).exists() for f in folders)


def _folders(out: Path) -> list[Path]:
    """Of all parts that there have been."""
    return [path for path in sorted((out / "shards").glob("[0-9]*")) if path.name.isdigit()]


def _forget(out: Path) -> None:
    """What earlier parts have noted; results themselves are replaced one by one, logs stay."""
    (out / "shards" / _PLAN_NAME).unlink(missing_ok=True)
    for folder in _folders(out):
        for name in (JOURNAL_NAME, FAILURES_NAME, _CLAIM_NAME, _MANIFEST_NAME):
            (folder / name).unlink(missing_ok=True)
        clear_suspicion(folder)


def _refuse_work(out: Path) -> None:
    """No part is forgotten in somebody's hands."""
    for folder in _folders(out):
        other = _read_claim(folder / _CLAIM_NAME)
        if other and _is_at_work(other, _claim()):
            raise UsageError(
                f"--overwrite must wait until nobody works on the images, got {folder} in the hands of "
                f"{_whose(other)}: wait for it, or cancel it"
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


def _manifest_text(part: Sequence[int], paths: Sequence[Path], sizes: Sequence[int]) -> str:
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", "bytes", "path"])
    for place in part:
        writer.writerow([place, sizes[place], os.path.abspath(paths[place])])
    return text.getvalue()


def _plan_text(plan: ShardPlan) -> str:
    values = {
        "count": plan.count,
        "images": plan.images,
        "bytes": plan.total_bytes,
        "options": asdict(plan.options),
    }
    return json.dumps(values, indent=1, sort_keys=True) + "\n"


def _refuse_results(plan: ShardPlan, paths: Sequence[Path]) -> None:
    """Finished work is not touched."""
    present = present_results(paths, plan.out, plan.options.formats)
    if present and not plan.options.overwrite:
        raise UsageError(
            f"the output folder must not hold results of these images, got {len(present)} in "
            f"{plan.out}: add --overwrite to replace them, or choose another folder"
        )


def _refuse_another(plan: ShardPlan, paths: Sequence[Path], count: int) -> None:
    """Only the same batch goes on.  Files that are gone since will be told as failures."""
    there = asdict(read_plan(plan.out).options)
    new = asdict(plan.options)
    differing = [
        name for name, old in there.items() if name not in FREE_OPTIONS and old != new[name]
    ]
    if differing:
        raise UsageError(
            f"a batch must go on with its options, got other values of {', '.join(differing)} than "
            f"{plan.out / 'shards' / _PLAN_NAME}: undo that, choose another folder, or --overwrite"
        )
    if plan.count != min(count, plan.images):
        raise UsageError(
            f"a batch must go on with its {plan.count} shards, got {count}: give --shards "
            f"{plan.count}, choose another folder, or --overwrite"
        )
    listed = {str(path) for index in range(plan.count) for _, path in _listed(plan.out, index)}
    others = [path for path in paths if os.path.abspath(path) not in listed]
    if others:
        raise UsageError(
            f"a batch must go on with its images, got {len(others)} that {plan.out / 'shards'} does not "
            f"list, such as {others[0]}: choose another folder for them, or --overwrite"
        )


def read_plan(out: str | Path) -> ShardPlan:
    """The plan of a folder.

    Raises
    ------
    UsageError
        There is none, or it cannot be read.
    """
    path = Path(out) / "shards" / _PLAN_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        options = values["options"]
        for name in ("formats", "channels"):
            options[name] = None if options[name] is None else tuple(options[name])
        return ShardPlan(
            Path(out), values["count"], values["images"], values["bytes"], SegmentOptions(**options)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"OUT must hold a plan of shards, got none that can be read at {path} ({error}): make it "
            "with `dinocell shards plan` or `dinocell submit segment --shards N`"
        ) from error


def _listed(out: Path, index: int) -> list[tuple[int, Path]]:
    """(place in the batch, file) of a part."""
    path = shard_folder(out, index) / _MANIFEST_NAME
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return [(int(row["place"]), Path(row["path"])) for row in csv.DictReader(file)]


def open_shards(plan: ShardPlan) -> list[int]:
    """Parts with images that are not done."""
    if plan.fresh:
        return list(range(plan.count))
    return [state.index for state in shard_states(plan) if state.done < state.images]


def shard_states(plan: ShardPlan) -> list[ShardState]:
    """How far each part is."""
    return [_state(plan.out, index)[0] for index in range(plan.count)]


def _state(
    out: Path, index: int
) -> tuple[ShardState, dict[str, dict[str, Any]], dict[str, str], list[tuple[int, Path]]]:
    """State, rows by name, failures by name, and files of a part."""
    folder = shard_folder(out, index)
    listed = _listed(out, index)
    rows = {row["name"]: row for row in read_journal(folder / JOURNAL_NAME)}
    failures = {
        row["name"]: row["error"]
        for row in read_journal(folder / FAILURES_NAME)
        if row["name"] not in rows
    }
    done = sum(path.stem in rows for _, path in listed)
    failed = sum(path.stem in failures for _, path in listed)
    return ShardState(index, done, failed, len(listed)), rows, failures, listed


def run_shard(out: str | Path, index: int, *, shown: bool = True) -> BatchResult:
    """Segment the images of a part that are not done yet.

    Raises
    ------
    UsageError
        No plan, no such part.
    DINOCellError
        Another process has it in work.
    """
    plan = read_plan(out)
    if not 0 <= index < plan.count:
        raise UsageError(
            f"the shard must be one of 0 to {plan.count - 1}, got {index}: see `dinocell shards status`"
        )
    folder = shard_folder(plan.out, index)
    with _claimed(folder):
        (folder / FAILURES_NAME).unlink(missing_ok=True)  # they are tried again
        return segment_files(
            [path for _, path in _listed(plan.out, index)],
            plan.out,
            replace(plan.options, resume=True, overwrite=False),
            shown=shown,
            part=folder,
        )


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a part; the claim of a process that was killed is taken over."""
    path = folder / _CLAIM_NAME
    mine = _claim()
    text = json.dumps(mine)
    try:
        _make_claim(path, text)
    except FileExistsError:
        other = _read_claim(path)
        if _is_at_work(other, mine) if other else _is_young(path):
            raise DINOCellError(
                f"a shard must be run by one process, got {folder} in the hands of {_whose(other)} on "
                f"{other.get('host')}: wait for it, or delete {path} if it is gone"
            ) from None
        try:
            _take_away(path, other)
            _make_claim(path, text)
        except (FileNotFoundError, FileExistsError):
            raise DINOCellError(
                f"a shard must be run by one process, got two for {folder}: the other goes on"
            ) from None
    try:
        yield
    finally:
        if _read_claim(path) == mine:
            path.unlink(missing_ok=True)


def _claim() -> dict[str, Any]:
    """Who this process is."""
    return {
        "job": own_job() or "",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "time": time.time(),
    }


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; "" if there is none, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _whose(claim: dict[str, Any]) -> str:
    return f"job {claim['job']}" if claim.get("job") else f"process {claim.get('pid')}"


def _take_away(path: Path, judged: dict[str, Any]) -> None:
    """Remove a claim that was found left; of several that find it so, one succeeds.

    Raises
    ------
    FileNotFoundError, FileExistsError
        Another process was first.
    """
    left = path.with_name(f".tmp-{secrets.token_hex(8)}")
    os.rename(path, left)
    try:
        if _read_claim(left) != judged:  # the new one of a process that was first
            try:
                os.link(left, path)
            except OSError:  # a file system without hard links, or a third process
                if not path.exists():
                    os.rename(left, path)
            raise FileExistsError(path)
    finally:
        left.unlink(missing_ok=True)


def _is_young(path: Path) -> bool:
    """Whether a claim that cannot be read may be one that is being written."""
    try:
        return time.time() - path.stat().st_mtime < _YOUNG_S
    except OSError:
        return False


def _make_claim(path: Path, text: str) -> None:
    """Write a file that must not be there yet; it is whole as soon as it is seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    finally:
        temporary.unlink(missing_ok=True)


def _read_claim(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _is_at_work(other: dict[str, Any], mine: dict[str, Any]) -> bool:
    job = other.get("job")
    if job:
        if job == mine["job"]:
            return False  # its earlier start: a job runs once at a time
        state = job_states([job]).get(job)
        return state is not None and state.state in ("RUNNING", "COMPLETING", "SUSPENDED")
    if other.get("host") != mine["host"]:
        return True  # cannot be known from here
    try:
        os.kill(int(other["pid"]), 0)
    except (ProcessLookupError, KeyError, ValueError):
        return False
    except PermissionError:
        pass
    # Numbers of processes come again, in a container at once.
    return other.get("began", "") in ("", _began(int(other["pid"])))


@dataclass(frozen=True)
class MergedShards:
    """What the parts came to.

    Attributes
    ----------
    out : folder of the results
    images, cells : done, and counted in them
    failures : (file, sentence) per image that failed
    missing : parts with images that nobody has finished
    """

    out: Path
    images: int
    cells: int
    failures: list[tuple[Path, str]]
    missing: list[ShardState]

    def text(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.cells} cells in {self.images} images → {self.out / 'summary.csv'}"]
        lines += [f"failed: {path}: {sentence}" for path, sentence in self.failures[:50]]
        if len(self.failures) > 50:
            lines.append(f"... {len(self.failures) - 50} more in summary.csv")
        for state in self.missing:
            lines.append(f"not done: {state.left} of {state.images} images of shard {state.index}")
        return "\n".join(lines)

    def missing_sentence(self) -> str:
        """What is not done, "" if nothing."""
        if not self.missing:
            return ""
        names = ", ".join(str(state.index) for state in self.missing[:10])
        more = ", ..." if len(self.missing) > 10 else ""
        left = sum(state.left for state in self.missing)
        return (
            f"all images must be done or have failed, got {left} that are neither (shards {names}{more}): "
            "run the same command again, it goes on with them"
        )


def merge_shards(out: str | Path, *, shown: bool = True) -> MergedShards:
    """Make of the parts what `dinocell segment` leaves: `summary.csv` and the journal `images.jsonl`
    of all images in their order; and `cells.csv`, all cells with their image in the first column.

    Can be run at any time; images that nobody has finished have a sentence in the column `error`.

    Raises
    ------
    UsageError
        No plan.
    """
    plan = read_plan(out)
    rows: dict[int, dict[str, Any]] = {}
    failures: dict[int, tuple[Path, str]] = {}
    unfinished: dict[int, tuple[Path, str]] = {}
    missing, at_work = [], False
    for index in range(plan.count):
        state, done, failed, listed = _state(plan.out, index)
        at_work = at_work or (shard_folder(plan.out, index) / _CLAIM_NAME).exists()
        if not state.complete:
            missing.append(state)
        for place, path in listed:
            if path.stem in done:
                rows[place] = done[path.stem]
            elif path.stem in failed:
                failures[place] = (path, failed[path.stem])
            else:
                unfinished[place] = (path, f"not done: shard {index} has not come to its end")
    without = failures | unfinished
    # A folder may have had images before that are not of this plan.
    names = {str(row["name"]) for row in rows.values()}
    names |= {path.stem for path, _ in without.values()}
    others = [row for row in read_journal(plan.out / JOURNAL_NAME) if row["name"] not in names]
    ordered = [*others, *(rows[place] for place in sorted(rows))]
    write_summary(plan.out / "summary.csv", ordered, [without[place] for place in sorted(without)])
    write_text_atomically(
        plan.out / JOURNAL_NAME, "".join(json.dumps(row) + "\n" for row in ordered)
    )
    _merge_cells(plan.out, [str(row["name"]) for row in ordered], shown=shown)
    if not missing and not at_work:
        remove_temporary_files(plan.out, before=time.time())
    return MergedShards(
        plan.out,
        len(rows),
        sum(int(row["num_cells"]) for row in rows.values()),
        [failures[place] for place in sorted(failures)],
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
        temporary.open("w", encoding="utf-8", newline="") as target,
        progress("merging tables", len(tables), shown=shown) as bar,
    ):
        writer = csv.DictWriter(target, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for name, path in zip(names, tables, strict=True):
            if path.exists():
                with path.open(encoding="utf-8", newline="") as file:
                    writer.writerows({"image": name, **row} for row in csv.DictReader(file))
            bar.advance()
