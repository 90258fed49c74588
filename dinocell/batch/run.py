"""Segment many files with one model: resumable, one bad file stops nothing, each output written once."""

import errno
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from dinocell.batch.claims import Claimant, claimed, refuse_running
from dinocell.batch.folder import (
    SETTINGS_NAME,
    make_folder,
    open_folder,
    settings_of,
    write_summary,
)
from dinocell.batch.inputs import mark_input
from dinocell.batch.journal import (
    FAILURES_NAME,
    JOURNAL_NAME,
    MAX_KILLS,
    begin_part,
    clear_suspicion,
    kills,
    note_failure,
    note_start,
    read_journal,
    shard_folder,
)
from dinocell.batch.library_warnings import LibraryWarnings
from dinocell.batch.options import IMAGE_OPTIONS, PIPELINE_OPTIONS, SegmentOptions, check_call
from dinocell.batch.report import REPORT_LIMIT, write_report_page
from dinocell.batch.units import Unit, named_as_before, plate_notes, units_of
from dinocell.batch.watcher import Watcher
from dinocell.errors import DINOCellError, ImageFileError, ScratchSpaceError, some
from dinocell.files import (
    check_kept,
    kept_folder,
    remove_temporary_files,
    write_text_atomically,
)
from dinocell.io import refuse_long_names
from dinocell.network.model import DINOCell, load_model
from dinocell.pipeline import DINOCellPipeline, LoadedImage
from dinocell.progress import Progress, count_text, progress
from dinocell.results.formats import require_packages
from dinocell.results.report import ReportEntry, make_entry
from dinocell.results.segmented import Segmentation, output_paths
from dinocell.results.wells import write_wells

WHOLE_BATCH = "The batch of a folder"
"""What the claim of an output folder stands for, in messages."""

_MAX_WAITING_BYTES = 2**29
"""Of images that wait for their results to be written, beside at most two for each worker."""

# Of a full disk, a used-up quota, a folder that has become read-only or has gone.
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
_GIVEN_UP = (
    f"the image must fit into the memory, got a process killed {MAX_KILLS} times while it read or "
    "segmented this image: raise mem, set a smaller `tile_px`, or check the file"
)
# What costs one image and not the batch: anything, as decoders and OpenCV have errors of their own.
_IMAGE_ERRORS = (Exception,)


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
    notes : what a careful user should know of the whole run
    """

    out: Path
    rows: list[dict[str, Any]]
    failures: list[tuple[Path, str]]
    skipped: int
    seconds: float
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """A few lines for the terminal."""
        cells = sum(row["num_cells"] for row in self.rows)
        failed = [f"failed: {path}: {sentence}" for path, sentence in self.failures]
        if failed and not self.rows:
            notes = [f"note: {note}" for note in self.notes]
            return "\n".join([*notes, *failed, "No image was segmented: all of them failed."])
        before = f", {self.skipped} done before" if self.skipped else ""
        counts = f"{count_text(cells, 'cell')} in {count_text(len(self.rows), 'image')}"
        lines = [f"{counts} ({self.seconds:.1f} s{before}) → {self.out}"]
        noted = [row for row in self.rows if row["warnings"]]
        lines += [f"note: {row['name']}: {row['warnings']}" for row in noted]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + failed)


def segment_files(
    paths: Sequence[Path | Unit],
    out: str | os.PathLike[str],
    options: SegmentOptions,
    *,
    model: DINOCell | None = None,
    shown: bool = True,
    part: Path | None = None,
    claimant: Claimant = Claimant(),  # noqa: B008
    watcher: Watcher = Watcher(),  # noqa: B008
) -> BatchResult:
    """Segment files into one folder.

    The network runs in this thread.  One thread reads the next image meanwhile, and `options.workers`
    threads finish those before (watershed, measuring, writing); this does not change any result.

    Parameters
    ----------
    paths : sequence of paths or units
        As from `find_images`.  `dinocell.batch.units.units_of` says which planes they are, and the names of
        their results.
    out : folder
        Gets the files of `Segmentation.save` per image, `summary.csv`, `settings.json`, a journal
        (`images.jsonl`) that `resume` reads, and with `options.report` a `report.html`.
    model : DINOCell, optional
        In place of loading `options.model`.
    part : folder, optional
        The files are a part of a batch whose other parts other processes may segment now: journal
        and failures go there, and no summary is written.
    claimant : Claimant
        What is known here of jobs that may be writing to the folder.
    watcher : Watcher
        Is called at each step of an image.

    Raises
    ------
    UsageError
        Nothing to do, two inputs of one name, an unknown format, results already present and
        neither `resume` nor `overwrite`, or both.
    ConfigError
        `resume` with other settings than those of the folder, or of one of its images.
    DINOCellError
        The GPU has failed, or the folder takes no files or has gone; finished images are kept.  Another
        process writes to the folder.
    """
    started = time.monotonic()
    out = Path(out)
    check_call(paths, options)
    units = units_of(paths, options)
    require_packages(options.formats)  # missing, each image would fail after the network has run
    if out.exists() and not out.is_dir():
        make_folder(out)  # refuses, before the model is loaded
    loaded = model if model is not None else load_model(options.model, device=options.device)
    pipeline = DINOCellPipeline(  # refuses wrong thresholds before a folder is made
        loaded, **{name: getattr(options, name) for name in PIPELINE_OPTIONS}
    )
    make_folder(out)
    with (
        _saying_what_was_kept(how_to_continue(options, part)),
        _claimed_folder(out, part, claimant),
    ):
        batch = _Batch(pipeline, out, options, part, watcher)
        result = _segment_claimed(units, batch, shown=shown)
    return replace(result, seconds=time.monotonic() - started)


@contextmanager
def _saying_what_was_kept(again: str) -> Iterator[None]:
    """Turn what the system says of the journal, the summary, and other files of the whole batch into a sentence.

    `again` is the end of it, see `how_to_continue`.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(error, again) from error


@contextmanager
def _claimed_folder(out: Path, part: Path | None, claimant: Claimant) -> Iterator[None]:
    """Hold the folder of a whole batch; who runs a part holds that part already."""
    if part is not None:
        yield
        return
    for folder in sorted(shard_folder(out, 0).parent.glob("[0-9]*")):
        refuse_running(folder, claimant)
    with claimed(out, claimant, WHOLE_BATCH):
        yield


def _segment_claimed(units: Sequence[Unit], batch: "_Batch", *, shown: bool) -> BatchResult:
    """`segment_files` after all checks of the call; the seconds are still to be filled in."""
    started = time.monotonic()
    out, options, pipeline, part = batch.out, batch.options, batch.pipeline, batch.part
    if part is None:
        units = named_as_before(units, out)
    settings = settings_of(options, pipeline.model)
    journal = (part or out) / JOURNAL_NAME
    done, changed = open_folder(out, journal, units, settings, options, is_part=part is not None)
    batch.rows, batch.num_images = dict(done), len(units)
    with kept_folder(out / SETTINGS_NAME):
        batch.segment([unit for unit in units if unit.name not in done], shown=shown)
        places = {unit.name: place for place, unit in enumerate(units)}
        batch.failures.sort(key=lambda item: places[item[0].name])
        ordered = [batch.rows[unit.name] for unit in units if unit.name in batch.rows]
        if part is not None:
            _write_failures(part / FAILURES_NAME, batch.failures)
            clear_suspicion(part)
        else:
            earlier = {row["name"]: row for row in read_journal(journal)}
            others = [row for name, row in earlier.items() if name not in places]
            write_summary(out / "summary.csv", [*others, *ordered], batch.failures)
            write_wells(out, [*others, *ordered], options.formats)
            if options.report:
                rows = {row["name"]: row for row in (*others, *ordered)}
                names = [row["name"] for row in others] + [unit.name for unit in units]
                write_report_page(
                    out, names, rows, batch.entries, batch.failures, pipeline, options
                )
            for folder in {out, *((out / unit.name).parent for unit in units)}:
                remove_temporary_files(folder, before=time.time() - (time.monotonic() - started))
    note = f"segmented again, because files have changed: {some(changed)}"
    failures = [(unit.path, sentence) for unit, sentence in batch.failures]
    notes = (*plate_notes(units, options.plate), *([note] if changed else ()))
    return BatchResult(out, ordered, failures, len(done), 0.0, notes)


class _JournalError(DINOCellError):
    """A finished image could not be noted."""


_Read = tuple[LoadedImage, dict[str, Any]]


def _are_small(read: Future[_Read], following: Path) -> bool:
    """Whether the next image may wait in memory for the network, judged by its file and the last image."""
    try:
        sizes = [following.stat().st_size, read.result()[0].plane.nbytes]
    except _IMAGE_ERRORS:
        return True  # who uses them says why
    return max(sizes) < _MAX_WAITING_BYTES // 8


class _Batch:
    """The images of one call: what is done, what has failed, and what other threads still write."""

    def __init__(
        self,
        pipeline: DINOCellPipeline,
        out: Path,
        options: SegmentOptions,
        part: Path | None,
        watcher: Watcher,
    ) -> None:
        self.pipeline, self.watcher = pipeline, watcher
        self.out, self.options, self.part = out, options, part
        self.rows: dict[str, dict[str, Any]] = {}
        self.failures: list[tuple[Unit, str]] = []
        self.num_images = 0
        self.entries: dict[str, ReportEntry] = {}
        self.pending: list[tuple[Unit, int, Future[None]]] = []  # unit, bytes, its work
        self.warned = LibraryWarnings()

    def segment(self, units: Sequence[Unit], *, shown: bool) -> None:
        """Fill `rows`, `failures` and `entries`; images under suspicion come last and alone."""
        suspects = {} if self.part is None else kills(self.part)
        if self.part is not None:
            begin_part(self.part)
        with (
            self.warned.watched(),
            progress("segmenting", len(units), shown=shown) as bar,
            ThreadPoolExecutor(max(1, self.options.workers)) as pool,
            ThreadPoolExecutor(1) as reader,
        ):
            ordered = sorted(units, key=lambda unit: suspects.get(unit.name, 0))
            ahead: dict[str, Future[_Read]] = {}
            for unit, following in zip(ordered, [*ordered, None][1:], strict=True):
                alone = unit.name in suspects
                if suspects.get(unit.name, 0) >= MAX_KILLS:
                    self.failures.append((unit, unit.described(_GIVEN_UP)))
                    bar.advance(note=unit.path.name)
                    continue
                if alone:
                    self._collect(0, bar)  # so that none is blamed for another
                read = ahead.pop(unit.name, None) or reader.submit(self._read, unit)
                wait([read])
                if (
                    following
                    and following.name not in suspects
                    and _are_small(read, following.path)
                ):
                    ahead[following.name] = reader.submit(self._read, following)
                predicted = self._predict(unit, read)
                if predicted is None:
                    bar.advance(note=unit.path.name)
                    continue
                arrays = (predicted[0].plane, predicted[0].channels, predicted[1])
                size = sum(array.nbytes for array in arrays if array is not None)
                self.pending.append((unit, size, pool.submit(self._finish, unit, *predicted)))
                del predicted  # held by the other thread alone, until it is done
                # Bounded, so that slow disks do not fill the memory with finished maps.
                self._collect(0 if alone else 2 * self.options.workers, bar)
            self._collect(0, bar)

    def _read(self, unit: Unit) -> _Read:
        """An image and the mark of its file; raises one of `_IMAGE_ERRORS` if it cannot be read."""
        if self.part is not None:
            note_start(self.part, unit.name)
        if unit.error:
            raise ImageFileError(unit.error)
        options = unit.options(self.options)
        outputs = output_paths(
            *(self.out, unit.name, options.formats),
            overlay=options.overlay,
            nuclei=options.cells is not None,
        )
        refuse_long_names(outputs.values())  # before the work, not after it
        mark = mark_input(unit.image, options)
        with self.warned.of_image() as kept:
            loaded = self.pipeline.load(
                unit.image,
                max_pixels=options.max_pixels,
                **{name: getattr(options, name) for name in IMAGE_OPTIONS},
            )
        return loaded._replace(name=unit.name, warnings=(*loaded.warnings, *kept)), mark

    def _predict(
        self, unit: Unit, read: Future[_Read]
    ) -> tuple[LoadedImage, NDArray, dict[str, Any]] | None:
        """What was read of a file, its distance map, its mark; None if the image has failed."""
        try:
            loaded, mark = read.result()
            with self.warned.of_image() as kept:
                self.watcher.loaded(loaded)
                distance_map = self.pipeline.predict(loaded, progress=self.watcher.progressed)
            loaded = loaded._replace(warnings=(*loaded.warnings, *kept))
            self.watcher.predicted(self.pipeline, loaded, distance_map)
            return loaded, distance_map, mark
        except _IMAGE_ERRORS as error:
            self._fail(unit, error)
            return None

    def _finish(
        self, unit: Unit, loaded: LoadedImage, distance_map: NDArray, mark: dict[str, Any]
    ) -> None:
        """Separate, measure and write the cells; the line in the journal says that all is written."""
        with self.warned.of_image() as kept:
            result = self.pipeline.finish(loaded, distance_map)
            row = self._write(unit, result, kept) | {"input": mark}
        self.rows[unit.name] = row
        journal = (self.part or self.out) / JOURNAL_NAME
        try:
            check_kept(Path(os.path.realpath(journal)))
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # no later image could be noted
            again = how_to_continue(self.options, self.part)
            raise _JournalError(str(_not_written(error, again))) from error

    def _write(self, unit: Unit, result: Segmentation, warned: Sequence[str]) -> dict[str, Any]:
        """Write the files of an image; `warned` may grow meanwhile."""
        from dinocell.results.measure import summarize

        table = replace(result.measure(), place=unit.place)
        files = result.save(
            self.out, formats=self.options.formats, table=table, overlay=self.options.overlay
        )
        summary = summarize(result.labels, table) | result.seen()
        result = replace(result, warnings=(*result.warnings, *warned))
        if self.options.report and len(self.entries) < REPORT_LIMIT:
            self.entries[result.name] = make_entry(
                result.name,
                (result.image, result.labels, result.distance_map),
                table.data,
                summary,
                files,
                warnings=result.warnings,
                num_images=self.num_images,
            )
        self.watcher.written(files.values())
        return {
            "name": result.name,
            "source": str(unit.path.resolve()),
            **unit.place,
            **summary,
            # Who reads the row takes them apart again.
            "warnings": "; ".join(note.replace("; ", ": ") for note in result.warnings),
        }

    def _collect(self, limit: int, bar: Progress) -> None:
        """Wait until at most `limit` images are being written, which do not hold too many bytes."""
        while len(self.pending) > limit or (
            sum(size for _, size, _ in self.pending) > _MAX_WAITING_BYTES
        ):
            unit, _, future = self.pending.pop(0)
            try:
                future.result()
            except _IMAGE_ERRORS as error:
                self._fail(unit, error)
            bar.advance(note=unit.path.name)

    def _fail(self, unit: Unit, error: Exception) -> None:
        _stop_if_all_would_fail(error, how_to_continue(self.options, self.part))
        self.failures.append((unit, unit.described(str(error) or type(error).__name__)))
        if self.part is not None:
            note_failure(self.part, unit.name)


def _stop_if_all_would_fail(error: Exception, again: str) -> None:
    """Raise if the machine has failed, not the image: every image that is left would fail, too."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, RuntimeError) and re.search(r"CUDA error|cuDNN error|CUBLAS_STATUS", text):
        raise DINOCellError(
            f"The GPU has failed ({text}); finished images were kept; run again on another device or node"
        ) from error
    causes: list[BaseException | None] = [error]
    while causes[-1] is not None:  # writers wrap it in sentences of their own
        causes.append(causes[-1].__cause__)
    if isinstance(error, _JournalError):
        raise error
    if isinstance(error, ScratchSpaceError):
        return  # a smaller image may fit
    if any(isinstance(cause, OSError) and cause.errno in _LASTING for cause in causes):
        raise _not_written(error, again) from error


def how_to_continue(options: SegmentOptions, part: Path | None = None) -> str:
    """What to do to continue a batch, or a part of one, that has stopped.

    Without `resume` its results would be refused, and with `overwrite` be replaced once more.
    """
    if part is not None or options.resume:
        return "run the same command again"
    instead = " in place of `overwrite`" if options.overwrite else ""
    return f"run the same command again with `resume`{instead}"


def _not_written(error: Exception, again: str) -> DINOCellError:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename2 or error.filename or 'a file of the batch'}"
    return DINOCellError(
        f"The results could not be written ({text}); finished images were kept; free space, repair the "
        f"mount or change the rights, then {again}"
    )


def _write_failures(path: Path, failures: Sequence[tuple[Unit, str]]) -> None:
    rows = [
        {"name": unit.name, "source": str(unit.path), "error": sentence}
        for unit, sentence in failures
    ]
    write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
