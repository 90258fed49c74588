"""One self-contained HTML page about a segmentation run: pictures, counts, areas, tables, failures.

The text is `report.html.j2`; here its data is prepared.  The page needs no network and no other file: pictures are embedded, style and the few lines of
script stand inside.  Links lead only to files of the same run (CSV tables, overlays), relative to
the page.  It follows the reader's light or dark setting and works without script.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.files import write_text_atomically
from dinocell.labels import as_labels
from dinocell.results.report_numbers import area_histogram, count_text, number_text
from dinocell.results.report_pictures import Thumbnails, embedded_pictures
from dinocell.results.table import CellTable

_OPEN_CARDS = 12
_MAX_ROWS = 50
_ROW_BUDGET = 3000  # rows of all tables together


@dataclass(frozen=True, eq=False)
class ReportEntry:
    """What the page says about one image.

    Attributes
    ----------
    name : str
        Heading; any characters.
    image : (H, W) or (H, W, C) ndarray, or None
        Shown shrunk; 8-bit RGB as it is, anything else through `dinocell.results.pictures.to_display`.
    labels : (H, W) integer ndarray, or None
        0 background, other values cells.
    distance_map : (H, W) ndarray in [0, 1], or None
    table : CellTable or mapping of column name to (N,) array, or None
        One row per cell; the column `area_um2`, or else `area`, fills the histogram.
    summary : mapping of str to number or text
        `num_cells` and `confluency_percent` (see `dinocell.results.measure.summarize`) go to the overview;
        without them they are counted from `labels`.
    overlay_path, csv_path : path, or None
        Files to link to.
    label_paths : sequence of path
        Label files to link to, in every format that was written.
    truth_scores : mapping of metric name to number, or None
        Scores against truth.
    error : str, or None
        Why this image failed.
    warnings : tuple of str
    num_rows : int, or None
        Cells in the whole table, where `table` holds only its first rows.
    areas : mapping of unit ("px", "µm²") to (N,) array, or None
        All areas for the histogram, where `table` holds only its first rows.
    pictures : mapping, or None
        From `embedded_pictures`, in place of `image`, `labels` and `distance_map`.
    """

    name: str
    image: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None
    distance_map: NDArray[Any] | None = None
    table: CellTable | Mapping[str, ArrayLike] | None = None
    summary: Mapping[str, Any] | None = None
    overlay_path: str | os.PathLike[str] | None = None
    csv_path: str | os.PathLike[str] | None = None
    label_paths: Sequence[str | os.PathLike[str]] = ()
    truth_scores: Mapping[str, float] | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    num_rows: int | None = None
    areas: Mapping[str, ArrayLike] | None = None
    pictures: Mapping[str, Any] | None = None


class _Result(Protocol):
    """The part of `dinocell.pipeline.Segmentation` that the page needs."""

    @property
    def name(self) -> str: ...
    @property
    def image(self) -> NDArray[Any]: ...
    @property
    def labels(self) -> NDArray[Any]: ...
    @property
    def distance_map(self) -> NDArray[Any]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...


def make_entry(
    result: _Result,
    table: CellTable | Mapping[str, ArrayLike],
    summary: Mapping[str, Any],
    files: Mapping[str, str | os.PathLike[str]],
    *,
    truth_scores: Mapping[str, float] | None = None,
    num_images: int = 1,
) -> ReportEntry:
    """Make an entry that keeps only what the page shows, so that hundreds fit in memory.

    Parameters
    ----------
    result : Segmentation
        Its image, labels, distance map, name and warnings.
    table, summary : see `ReportEntry`
    files : mapping of kind to path
        All become links; those other than "csv" and "overlay" are label files.
    truth_scores : mapping, optional
    num_images : int
        Of the page, on which the size of the pictures depends.

    Returns
    -------
    ReportEntry
        With compressed pictures and the first rows of the table, which is all that `write_report`
        shows by default.
    """
    entry = ReportEntry(
        name=result.name,
        image=result.image,
        labels=result.labels,
        distance_map=result.distance_map,
        table=table,
        summary=summary,
        overlay_path=files.get("overlay"),
        csv_path=files.get("csv"),
        label_paths=[path for kind, path in files.items() if kind not in ("overlay", "csv")],
        truth_scores=truth_scores,
        warnings=tuple(result.warnings),
    )
    return _shrunk(entry, _thumbnail_px(num_images))


def write_report(
    path: str | os.PathLike[str],
    entries: Iterable[ReportEntry],
    *,
    title: str = "DINOCell report",
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    thumbnail_px: int | None = None,
    rows: int | None = None,
) -> None:
    """Write the page; the file appears whole or not at all.

    Parameters
    ----------
    path : path
        The `.html` file; missing folders are made.  Links are relative to its folder.
    entries : iterable of ReportEntry
        In the order of the page; may be empty.
    title : str
    summary : mapping of str to number or text, optional
        Facts about the run, shown at the top: model, device, seconds.
    notes : sequence of str
        Sentences shown above the images.
    thumbnail_px : int >= 32, optional
        Longest side of an embedded picture.  Default: 720 up to 20 images, 512 up to 100, then 400;
        pictures are shrunk by whole factors.
    rows : int >= 0, optional
        Rows of each table.  Default: 50, fewer when there are more than 60 images.

    Raises
    ------
    ValueError
        Image, labels and distance map of an entry differ in size, columns of a table differ in
        length, or an argument is out of range.
    ImageFileError
        `path` is a folder.
    """
    if thumbnail_px is not None and thumbnail_px < 32:
        raise ValueError(f"`thumbnail_px` must be 32 or more, got {thumbnail_px}.")
    if rows is not None and rows < 0:
        raise ValueError(f"`rows` must be 0 or more, got {rows}.")
    path = Path(path)
    all_entries = list(entries)
    count = len(all_entries)
    if thumbnail_px is None:
        thumbnail_px = _thumbnail_px(count)
    if rows is None:
        rows = _MAX_ROWS if count * _MAX_ROWS <= _ROW_BUDGET else max(5, _ROW_BUDGET // count)
    facts = [_Facts.of(entry) for entry in all_entries]
    areas, unit = _all_areas(facts)
    folder = Path(os.path.abspath(path)).parent
    page = _template().render(
        title=title,
        tiles=_tiles(all_entries, facts),
        summary=summary or {},
        notes=notes,
        problems=_problems(all_entries),
        areas=area_histogram(areas, unit, "all images"),
        overview=_overview(all_entries, facts),
        cards=(
            _card(entry, fact, folder, thumbnail_px, rows)
            | {"number": number, "is_open": number <= _OPEN_CARDS}
            for number, (entry, fact) in enumerate(zip(all_entries, facts, strict=True), start=1)
        ),
    )
    write_text_atomically(path, page, errors="backslashreplace")


def _thumbnail_px(num_images: int) -> int:
    return 720 if num_images <= 20 else 512 if num_images <= 100 else 400


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dinocell", "results"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["number"] = number_text
    return environment.get_template("report.html.j2")


# ------------------------------------------------------------------------------ numbers of an entry


@dataclass(frozen=True)
class _Facts:
    """Numbers of an entry, checked."""

    num_cells: int | None
    confluency_percent: float | None
    areas_by_unit: Mapping[str, NDArray[np.float64]]
    columns: Mapping[str, NDArray[Any]]
    num_rows: int

    @classmethod
    def of(cls, entry: ReportEntry) -> Self:
        columns = _columns(entry)
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            raise ValueError(
                f"columns of a table must be equally long, got lengths {sorted(lengths)} for "
                f"{entry.name!r}: pass one value per cell."
            )
        num_rows = entry.num_rows if entry.num_rows is not None else max(lengths, default=0)
        known = entry.areas
        if known is None:
            known = {
                unit: columns[name]
                for unit, name in (("µm²", "area_um2"), ("px", "area"))
                if name in columns
            }
        areas = {}
        for unit, values in known.items():
            array = np.asarray(values, dtype=np.float64)
            areas[unit] = array[np.isfinite(array)]
        summary = entry.summary or {}
        num_cells, confluency = summary.get("num_cells"), summary.get("confluency_percent")
        if entry.labels is not None:
            labels = as_labels(entry.labels)
            for what, plane in (("image", entry.image), ("distance_map", entry.distance_map)):
                if plane is not None and np.shape(plane)[:2] != labels.shape:
                    raise ValueError(
                        f"`{what}` and `labels` must have the same height and width, got "
                        f"{np.shape(plane)[:2]} and {labels.shape} for {entry.name!r}: pass what "
                        "belongs together."
                    )
            if num_cells is None:
                num_cells = len(np.unique(labels[labels > 0]))
            if confluency is None and labels.size:
                confluency = 100.0 * np.count_nonzero(labels) / labels.size
        elif num_cells is None and columns:
            num_cells = num_rows
        return cls(
            None if num_cells is None else int(num_cells),
            None if confluency is None else float(confluency),
            areas,
            columns,
            num_rows,
        )

    @property
    def area_unit(self) -> str:
        """µm² where known, else px."""
        return "µm²" if "µm²" in self.areas_by_unit else "px"

    @property
    def areas(self) -> NDArray[np.float64]:
        """Areas in `area_unit`, one per cell."""
        return self.areas_by_unit.get(self.area_unit, np.zeros(0))


def _columns(entry: ReportEntry) -> dict[str, NDArray[Any]]:
    if entry.table is None:
        return {}
    data = entry.table.data if isinstance(entry.table, CellTable) else entry.table
    return {str(name): np.asarray(values) for name, values in data.items()}


def _shrunk(entry: ReportEntry, side_px: int) -> ReportEntry:
    """The same entry with small pictures and the first rows of the table."""
    facts = _Facts.of(entry)
    summary = dict(entry.summary or {})
    if facts.num_cells is not None:
        summary.setdefault("num_cells", facts.num_cells)
    if facts.confluency_percent is not None:
        summary.setdefault("confluency_percent", facts.confluency_percent)
    return replace(
        entry,
        image=None,
        labels=None,
        distance_map=None,
        pictures=_pictures(entry, facts, side_px),
        table={name: values[:_MAX_ROWS].copy() for name, values in facts.columns.items()},
        summary=summary,
        num_rows=facts.num_rows,
        areas=facts.areas_by_unit,
    )


# ------------------------------------------------------------------------------- parts of the page


def _tiles(entries: Sequence[ReportEntry], facts: Sequence[_Facts]) -> list[tuple[str, str]]:
    """The main numbers of the run, and what each counts."""
    areas, unit = _all_areas(facts)
    total = sum(fact.num_cells or 0 for fact in facts)
    covered = [f.confluency_percent for f in facts if f.confluency_percent is not None]
    failed = sum(entry.error is not None for entry in entries)
    tiles = [(number_text(len(entries)), "image" if len(entries) == 1 else "images")]
    tiles.append((number_text(total), "cell" if total == 1 else "cells"))
    if len(areas):
        tiles.append((f"{number_text(float(np.median(areas)))} {unit}", "median area"))
    if covered:
        tiles.append((f"{number_text(float(np.mean(covered)))} %", "mean confluency"))
    if failed:
        tiles.append((number_text(failed), "failed"))
    return tiles


def _problems(entries: Sequence[ReportEntry]) -> list[dict[str, Any]]:
    problems = []
    for number, entry in enumerate(entries, start=1):
        texts = [] if entry.error is None else [(entry.error, True)]
        for text, failed in [*texts, *((warning, False) for warning in entry.warnings)]:
            problems.append({"number": number, "name": entry.name, "text": text, "failed": failed})
    return problems


def _all_areas(facts: Sequence[_Facts]) -> tuple[NDArray[np.float64], str]:
    """Areas of all cells in one unit: µm² where every image has it, else pixels; none if they differ."""
    filled = [fact.areas_by_unit for fact in facts if len(fact.areas)]
    for unit in ("µm²", "px"):
        if filled and all(unit in areas for areas in filled):
            return np.concatenate([areas[unit] for areas in filled]), unit
    return np.zeros(0), "px"


def _overview(entries: Sequence[ReportEntry], facts: Sequence[_Facts]) -> dict[str, Any]:
    """One row per image, with scores against truth and their mean where there are any."""
    scores = [entry.truth_scores or {} for entry in entries]
    metrics = list(dict.fromkeys(metric for found in scores for metric in found))
    rows = []
    for entry, fact, found in zip(entries, facts, scores, strict=True):
        median = (
            f"{number_text(float(np.median(fact.areas)))} {fact.area_unit}"
            if len(fact.areas)
            else "–"
        )
        cells = [number_text(fact.num_cells), number_text(fact.confluency_percent), median]
        cells += [number_text(found.get(metric)) for metric in metrics]
        state = "failed" if entry.error is not None else "warning" if entry.warnings else "done"
        rows.append({"name": entry.name, "cells": cells, "state": state})
    means = []
    for metric in metrics:
        values = [float(found[metric]) for found in scores if _is_known(found.get(metric))]
        means.append(
            f"{number_text(float(np.mean(values)))} (n = {len(values)})" if values else "–"
        )
    columns = ["image", "cells", "confluency %", "median area", *metrics, "state"]
    return {"columns": columns, "rows": rows, "means": means}


def _is_known(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))


def _card(
    entry: ReportEntry, fact: _Facts, folder: Path, side_px: int, rows: int
) -> dict[str, Any]:
    """Everything about one image."""
    known = [] if fact.num_cells is None else [count_text(fact.num_cells, "cell")]
    if fact.confluency_percent is not None:
        known.append(f"confluency {number_text(fact.confluency_percent)} %")
    if entry.error is not None:
        known.append("failed")
    return {
        "name": entry.name,
        "known": known,
        "error": entry.error,
        "warnings": entry.warnings,
        "pictures": entry.pictures or _pictures(entry, fact, side_px),
        "has_areas": bool(fact.columns) or len(fact.areas) > 0,
        "histogram": area_histogram(fact.areas, fact.area_unit, entry.name),
        "links": _links(entry, folder),
        "csv": _link(entry.csv_path, folder),
        "scores": entry.truth_scores,
        "summary": entry.summary,
        "table": _table(fact, rows) if fact.columns else None,
    }


def _pictures(entry: ReportEntry, fact: _Facts, side_px: int) -> dict[str, Any] | None:
    return embedded_pictures(
        Thumbnails.of(entry.image, entry.labels, entry.distance_map, side_px),
        f"{count_text(fact.num_cells or 0, 'cell')} in {entry.name}",
    )


def _table(fact: _Facts, rows: int) -> dict[str, Any]:
    """The first rows of the measurements."""
    available = max(len(values) for values in fact.columns.values())
    shown = min(rows, available, fact.num_rows)
    is_cut = shown != fact.num_rows
    if fact.num_rows == 0:
        caption = "No cell was found."
    elif is_cut:
        caption = f"The first {shown} of {count_text(fact.num_rows, 'cell')}"
    else:
        caption = f"All {count_text(shown, 'cell')}." if shown != 1 else "The one cell."
    lists = [values[:shown].tolist() for values in fact.columns.values()]
    return {
        "columns": list(fact.columns),
        "rows": list(zip(*lists, strict=True)),
        "caption": caption,
        "is_cut": is_cut,
    }


def _links(entry: ReportEntry, folder: Path) -> list[dict[str, str]]:
    """Address and text of each file of an image."""
    files = [
        (entry.overlay_path, "overlay in full size"),
        (entry.csv_path, "all measurements (CSV)"),
    ]
    files += [(path, f"labels ({Path(path).name})") for path in entry.label_paths]
    found = [(_link(path, folder), text) for path, text in files]
    return [link | {"text": text} for link, text in found if link]


def _link(target: str | os.PathLike[str] | None, folder: Path) -> dict[str, str] | None:
    """Address relative to the page, and the file's name."""
    if target is None:
        return None
    relative = os.path.relpath(os.path.abspath(target), folder)
    address = quote(os.fsencode(Path(relative).as_posix()))  # names may be no UTF-8
    return {"target": address, "name": Path(target).name}
