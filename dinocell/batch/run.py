"""Many files through one model: resumable, one bad file stops nothing, each output written once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinocell import __version__
from dinocell.batch.journal import (
    FAILURES_NAME,
    JOURNAL_NAME,
    MAX_KILLS,
    begin_part,
    clear_suspicion,
    kills,
    mend_journal,
    note_begin,
    note_failure,
    read_journal,
)
from dinocell.errors import ConfigError, DINOCellError, UsageError
from dinocell.files import atomic_path, remove_temporary_files, write_text_atomically
from dinocell.network.model import DINOCell, load_model
from dinocell.pipeline import DEFAULT_MODEL, DINOCellPipeline, Segmentation
from dinocell.progress import progress
from dinocell.results.exports import EXPORT_FORMATS
from dinocell.results.report import ReportEntry, make_entry, write_report

__all__ = [
    "FREE_OPTIONS",
    "SETTINGS_NAME",
    "BatchResult",
    "SegmentOptions",
    "check_call",
    "check_options",
    "present_results",
    "refuse_results",
    "segment_files",
    "write_summary",
]

# Not part of what an image's result depends on, so a resumed run may change them (the model is known
# by the hash of its weights).
FREE_OPTIONS = (
    "model",
    "device",
    "batch_size",
    "tile_px",
    "workers",
    "report",
    "resume",
    "overwrite",
)
SETTINGS_NAME = "settings.json"
_REPORT_LIMIT = 500
# Of a full disk, a used-up quota, a folder that has become read-only.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_GIVEN_UP = (
    f"an image must fit into the memory, got {MAX_KILLS} ends of a process that had it in work: raise "
    "mem, take a smaller tile, or look at the file"
)
# What one image may fail with and the batch goes on; a GPU out of memory is a RuntimeError.
_IMAGE_ERRORS = (DINOCellError, ValueError, OSError, MemoryError, RuntimeError)


@dataclass(frozen=True)
class SegmentOptions:
    """The options of `dinocell segment`; None leaves the model's or the file's own value."""

    model: str = DEFAULT_MODEL
    device: str = "auto"
    formats: tuple[str, ...] = ("tif",)
    channels: tuple[int | str, ...] | None = None
    page: int | None = None
    pixel_size_um: float | None = None
    peak_threshold: float | None = None
    fill_threshold: float | None = None
    min_prominence: float | None = None
    min_area_px: int | None = None
    batch_size: int = 8
    tile_px: int | None = None
    precision: str = "fp32"
    workers: int = 1
    overlay: bool = True
    report: bool = False
    resume: bool = False
    overwrite: bool = False
    allow_mask: bool = False


@dataclass(frozen=True)
class BatchResult:
    """What a batch did.

    Attributes
    ----------
    out : folder of the results
    rows : one summary per image done, in input order, earlier runs included
    failures : (path, sentence) per image that failed
    skipped : images that were done before
    seconds : wall time of this run
    """

    out: Path
    rows: list[dict[str, Any]]
    failures: list[tuple[Path, str]]
    skipped: int
    seconds: float

    def text(self) -> str:
        """A few lines for the terminal."""
        cells = sum(row["num_cells"] for row in self.rows)
        lines = [
            f"{cells} cells in {len(self.rows)} image{'s' if len(self.rows) != 1 else ''} "
            f"({self.seconds:.1f} s{f', {self.skipped} done before' if self.skipped else ''}) → {self.out}"
        ]
        for row in self.rows:
            if row["warnings"]:
                lines.append(f"note: {row['name']}: {row['warnings']}")
        for path, sentence in self.failures:
            lines.append(f"failed: {path}: {sentence}")
        return "\n".join(lines)


def segment_files(
    paths: Sequence[Path],
    out: str | os.PathLike[str],
    options: SegmentOptions,
    *,
    model: DINOCell | None = None,
    shown: bool = True,
    part: Path | None = None,
) -> BatchResult:
    """Segment files into one folder.

    The network runs in this thread; finishing (watershed, measuring, writing) runs behind it in
    `options.workers` threads and does not change any result.

    Parameters
    ----------
    paths : sequence of paths
        As from `find_images`.
    out : folder
        Gets the files of `Segmentation.save` per image, `summary.csv`, `settings.json`, a journal
        (`images.jsonl`) that `resume` reads, and with `options.report` a `report.html`.
    model : DINOCell, optional
        In place of loading `options.model`.
    part : folder, optional
        The files are a part of a batch whose other parts may be at work in other processes: journal
        and failures go there, and no summary is written.

    Raises
    ------
    UsageError
        Nothing to do, two inputs of one name, an unknown format, results already present and
        neither `resume` nor `overwrite`, or both.
    ConfigError
        `resume` with other settings than those of the folder.
    DINOCellError
        The GPU has failed; what is done is kept.
    """
    started = time.monotonic()
    out = Path(out)
    check_call(paths, options)
    loaded = model if model is not None else load_model(options.model, device=options.device)
    pipeline = DINOCellPipeline(
        loaded,
        batch_size=options.batch_size,
        tile_px=options.tile_px,
        precision=options.precision,
        peak_threshold=options.peak_threshold,
        fill_threshold=options.fill_threshold,
        min_prominence=options.min_prominence,
        min_area_px=options.min_area_px,
    )
    settings = _settings(options, loaded)
    journal = (part or out) / JOURNAL_NAME
    done = _open_folder(out, journal, paths, settings, options, is_part=part is not None)
    todo = [path for path in paths if path.stem not in done]
    failures: list[tuple[Path, str]] = []
    suspects = {} if part is None else kills(part)
    if part is not None:
        begin_part(part)
    todo.sort(key=lambda path: suspects.get(path.stem, 0))
    entries: dict[str, ReportEntry] = {}
    rows = dict(done)

    def finish(path: Path, plane: NDArray, distance_map: NDArray, size_um: float | None) -> None:
        result = pipeline.finish(plane, distance_map, pixel_size_um=size_um, name=path.stem)
        rows[path.stem] = _write_result(out, journal, path, result, options, entries)

    pending: list[tuple[Path, Future[None]]] = []

    def collect(limit: int) -> None:
        while len(pending) > limit:
            path, future = pending.pop(0)
            try:
                future.result()
            except _IMAGE_ERRORS as error:
                _stop_without_machine(error)
                fail(path, str(error) or type(error).__name__)
            bar.advance(note=path.name)

    def fail(path: Path, sentence: str) -> None:
        failures.append((path, sentence))
        if part is not None:
            note_failure(part, path.stem)

    with (
        progress("segmenting", len(todo), shown=shown) as bar,
        ThreadPoolExecutor(max(1, options.workers)) as pool,
    ):
        for path in todo:
            if suspects.get(path.stem, 0) >= MAX_KILLS:
                failures.append((path, _GIVEN_UP))
                bar.advance(note=path.name)
                continue
            if path.stem in suspects:
                collect(0)  # alone, so that none is blamed for another
            if part is not None:
                note_begin(part, path.stem)
            try:
                plane, size_um, _ = pipeline.load(
                    path,
                    channels=options.channels,
                    page=options.page,
                    pixel_size_um=options.pixel_size_um,
                    allow_mask=options.allow_mask,
                )
                distance_map = pipeline.predict(plane)
            except _IMAGE_ERRORS as error:
                _stop_without_machine(error)
                fail(path, str(error) or type(error).__name__)
                bar.advance(note=path.name)
                continue
            pending.append((path, pool.submit(finish, path, plane, distance_map, size_um)))
            # Bounded, so that slow disks do not fill the memory with finished maps.
            collect(0 if path.stem in suspects else 2 * options.workers)
        collect(0)
    ordered = [rows[path.stem] for path in paths if path.stem in rows]
    places = {path: place for place, path in enumerate(paths)}
    failures.sort(key=lambda item: places[item[0]])
    if part is not None:
        _write_failures(part / FAILURES_NAME, failures)
        clear_suspicion(part)
    else:
        _finish_folder(out, paths, ordered, failures, entries, options)
        remove_temporary_files(out, before=time.time() - (time.monotonic() - started))
    return BatchResult(
        out=out,
        rows=ordered,
        failures=failures,
        skipped=len(done),
        seconds=time.monotonic() - started,
    )


def _stop_without_machine(error: Exception) -> None:
    """What has failed for good would fail every image that is left: none of them is to blame."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and re.search(r"CUDA error|cuDNN error|CUBLAS_STATUS", text):
        raise DINOCellError(
            f"the GPU must work, got {text}: run again on another device or node"
        ) from error
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None:  # writers say it in sentences of their own
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, OSError) and cause.errno in _LASTING for cause in causes):
        raise DINOCellError(
            f"the folder of the results must take files, got {text}: make room, or mend the mount, and "
            "run again"
        ) from error


def _write_failures(path: Path, failures: Sequence[tuple[Path, str]]) -> None:
    lines = [
        json.dumps({"name": failed.stem, "source": str(failed), "error": sentence})
        for failed, sentence in failures
    ]
    write_text_atomically(path, "".join(line + "\n" for line in lines))


def _finish_folder(
    out: Path,
    paths: Sequence[Path],
    ordered: Sequence[dict[str, Any]],
    failures: Sequence[tuple[Path, str]],
    entries: dict[str, ReportEntry],
    options: SegmentOptions,
) -> None:
    """The files that look back on a batch."""
    stems = {path.stem for path in paths}
    earlier = {row["name"]: row for row in read_journal(out / JOURNAL_NAME)}
    others = [row for name, row in earlier.items() if name not in stems]
    write_summary(out / "summary.csv", [*others, *ordered], failures)
    if options.report:
        _write_report(out, paths, entries, failures, options)


def present_results(paths: Sequence[Path], out: Path, formats: Sequence[str]) -> list[Path]:
    """Those of the images that have results in a folder."""
    endings = [EXPORT_FORMATS[name].suffix for name in formats if name in EXPORT_FORMATS]
    return [path for path in paths if any((out / f"{path.stem}{end}").exists() for end in endings)]


def refuse_results(paths: Sequence[Path], out: Path, formats: Sequence[str]) -> None:
    """Finished work is not touched without being asked.

    Raises
    ------
    UsageError
        The folder has results of the images.
    """
    present = present_results(paths, out, formats)
    if present:
        raise UsageError(
            f"the output folder must not hold results of these images, got {len(present)} in {out}: "
            "add --resume to keep them, --overwrite to replace them, or choose another folder"
        )


def check_call(paths: Sequence[Path], options: SegmentOptions) -> None:
    """Refuse what cannot be done, before a model is loaded.

    Raises
    ------
    UsageError
        Nothing to do, two inputs of one name, an unknown or impossible value of an option.
    """
    if not paths:
        raise UsageError("segment must get at least one image, got none: name files or folders")
    check_options(options)
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise UsageError(
                f"inputs must differ in name without suffix, because outputs are named so, got {path} "
                f"and {seen[path.stem]}: segment them into two folders"
            )
        seen[path.stem] = path


def check_options(options: SegmentOptions) -> None:
    """The part of `check_call` that needs no images.

    Raises
    ------
    UsageError
        An unknown or impossible value, or two options that exclude each other.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        raise UsageError(
            f"the device must be auto, cpu, cuda, cuda:N or mps, got {options.device!r}: choose one"
        )
    unknown = [name for name in options.formats if name not in EXPORT_FORMATS]
    if unknown or not options.formats:
        raise UsageError(
            f"--format must be one of {', '.join(EXPORT_FORMATS)}, got "
            f"{', '.join(unknown) or 'none'}: choose one of them"
        )
    if options.precision not in ("fp32", "bf16"):
        raise UsageError(f"--precision must be fp32 or bf16, got {options.precision!r}: choose one")
    if options.tile_px is not None and options.tile_px < 1:
        raise UsageError(f"--tile-px must be at least 1, got {options.tile_px}: leave it out")
    if options.page is not None and options.page < 0:
        raise UsageError(f"--page must be at least 0, got {options.page}: count from 0")
    if options.pixel_size_um is not None and not 0 < options.pixel_size_um < float("inf"):
        raise UsageError(
            f"--pixel-size-um must be above 0, got {options.pixel_size_um}: give micrometres"
        )
    if options.resume and options.overwrite:
        raise UsageError("--resume and --overwrite exclude each other, got both: choose one")


def _settings(options: SegmentOptions, model: DINOCell) -> dict[str, Any]:
    """What the results depend on; kept beside them."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    kept = {key: value for key, value in asdict(options).items() if key not in FREE_OPTIONS}
    config = model.config
    for key in ("peak_threshold", "fill_threshold", "min_prominence", "min_area_px"):
        if kept[key] is None:
            kept[key] = getattr(config, key)
    kept["weights_sha256"] = digest.hexdigest()
    kept["dinocell_version"] = __version__
    return json.loads(json.dumps(kept))


def _open_folder(
    out: Path,
    journal_path: Path,
    paths: Sequence[Path],
    settings: dict[str, Any],
    options: SegmentOptions,
    *,
    is_part: bool,
) -> dict[str, dict[str, Any]]:
    """Check the folder, and return the rows of images that are done and need not be repeated.

    Whether the files of a part may be there has been asked when the batch was divided.
    """
    settings_path = out / SETTINGS_NAME
    label_names = [EXPORT_FORMATS[name].suffix for name in options.formats]
    if not (options.resume or options.overwrite):
        refuse_results(paths, out, options.formats)
    journal = read_journal(journal_path)
    if settings_path.exists() and not options.overwrite:
        try:
            there = json.loads(settings_path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            there = {}
        differing = sorted(key for key in settings if settings[key] != there.get(key))
        if differing:
            raise ConfigError(
                f"results in one folder must share their settings, got other values of "
                f"{', '.join(differing)} than {settings_path}: choose another folder or --overwrite"
            )
    elif options.resume and not is_part and present_results(paths, out, options.formats):
        raise UsageError(
            f"--resume must find the settings of the results, got no {settings_path}: choose another "
            "folder or --overwrite"
        )
    done: dict[str, dict[str, Any]] = {}
    if options.resume:
        wanted = {path.stem: path.resolve() for path in paths}
        for row in journal:
            name = row["name"]
            if name not in wanted:
                continue
            if not all((out / f"{name}{suffix}").exists() for suffix in label_names):
                continue
            if Path(row["source"]).resolve() != wanted[name]:
                raise UsageError(
                    f"--resume must continue the same images, got {wanted[name]} where {out} holds "
                    f"results of {row['source']}: choose another folder"
                )
            done[name] = row
    out.mkdir(parents=True, exist_ok=True)
    mend_journal(journal_path)
    if options.overwrite and journal:
        stems = {path.stem for path in paths}
        kept = [row for row in journal if row["name"] not in stems]
        write_text_atomically(journal_path, "".join(json.dumps(row) + "\n" for row in kept))
    write_text_atomically(settings_path, json.dumps(settings, indent=1, sort_keys=True))
    return done


def _write_result(
    out: Path,
    journal: Path,
    path: Path,
    result: Segmentation,
    options: SegmentOptions,
    entries: dict[str, ReportEntry],
) -> dict[str, Any]:
    from dinocell.results.measure import summarize

    table = result.measure()
    files = result.save(out, formats=options.formats, table=table, overlay=options.overlay)
    summary = summarize(result.labels, table)
    row = {
        "name": result.name,
        "source": str(path.resolve()),
        **summary,
        "warnings": "; ".join(result.warnings),
    }
    if options.report and len(entries) < _REPORT_LIMIT:
        entries[result.name] = make_entry(result, table, summary, files)
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def write_summary(
    path: Path, rows: Sequence[dict[str, Any]], failures: Sequence[tuple[Path, str]]
) -> None:
    """One line per image; failed ones have their sentence in the last column `error`."""
    import csv

    columns = ["name", "source"]
    for row in rows:
        columns += [key for key in row if key not in columns]
    columns.append("error")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
        for failed, sentence in failures:
            writer.writerow({"name": failed.stem, "source": str(failed), "error": sentence})


def _write_report(
    out: Path,
    paths: Sequence[Path],
    entries: dict[str, ReportEntry],
    failures: Sequence[tuple[Path, str]],
    options: SegmentOptions,
) -> None:
    """`report.html` over the images of this run, in input order."""
    errors = {path.stem: sentence for path, sentence in failures}
    listed = []
    for path in paths:
        if path.stem in entries:
            listed.append(entries[path.stem])
        elif path.stem in errors:
            listed.append(ReportEntry(name=path.stem, error=errors[path.stem]))
    notes = []
    left_out = len(paths) - len(listed)
    if left_out:
        notes.append(
            f"{left_out} images are not shown: done in an earlier run, or beyond the first "
            f"{_REPORT_LIMIT}. All are in summary.csv."
        )
    write_report(
        out / "report.html",
        listed,
        title="DINOCell: segmented cells",
        summary={"model": options.model, "images": len(paths)},
        notes=notes,
    )
