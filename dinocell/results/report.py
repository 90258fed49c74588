"""One self-contained HTML page about a segmentation run: pictures, counts, areas, tables, failures.

The text is `report.html.j2`; here its data is prepared.  The page needs no network and no other file:
pictures are embedded, style and the few lines of script stand inside.  Links lead only to files of the
same run (CSV tables, overlays), relative to the page.  It follows the reader's light or dark setting and
works without script.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dinocell.files import write_text_atomically
from dinocell.io.plates import row_letters
from dinocell.progress import count_text
from dinocell.results.report_numbers import area_histogram, number_text
from dinocell.results.report_pictures import embedded_pictures

_OPEN_CARDS = 12
_MAX_ROWS = 50
_ROW_BUDGET = 3000  # rows of all tables together
_FILE_TEXTS = {"overlay": "overlay in full size", "csv": "all measurements (CSV)"}

_Path = str | os.PathLike[str]
_Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReportEntry:
    """What the page says about one image.  `make_entry` makes it, of a failed image name and error suffice.

    Attributes
    ----------
    name : heading; any characters
    error : why this image failed
    warnings : sentences
    summary : see `dinocell.results.measure.summarize`
    files : kind → file to link to
    areas_by_unit : unit ("µm²", "px²") → areas of all cells
    columns : name → the first rows of a column of the table
    num_rows : rows of the whole table
    pictures : as `embedded_pictures` returns them
    """

    name: str
    error: str | None = None
    warnings: Sequence[str] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, _Path] = field(default_factory=dict)
    areas_by_unit: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    columns: Mapping[str, _Array] = field(default_factory=dict)
    num_rows: int = 0
    pictures: Mapping[str, Any] | None = None

    @property
    def area_unit(self) -> str:
        """µm² where known, else px²."""
        return "µm²" if "µm²" in self.areas_by_unit else "px²"

    @property
    def areas(self) -> NDArray[np.float64]:
        """Areas in `area_unit`, one per cell."""
        return self.areas_by_unit.get(self.area_unit, np.zeros(0))


def make_entry(
    name: str,
    arrays: tuple[_Array | None, _Array | None, _Array | None],
    columns: Mapping[str, _Array],
    summary: Mapping[str, Any],
    files: Mapping[str, _Path],
    *,
    warnings: Sequence[str] = (),
    num_images: int = 1,
) -> ReportEntry:
    """Make an entry that keeps only what the page shows, so that hundreds fit in memory.

    Parameters
    ----------
    arrays : image, labels and distance map, each (H, W) or None
    columns : of the table of cells; `area_um2`, or else `area`, fills the histogram
    files : those of other kinds than "csv" and "overlay" are label files
    num_images : of the page, on which the size of the pictures depends
    """
    areas = {}
    for unit, column in (("µm²", "area_um2"), ("px²", "area")):
        if column in columns:
            values = np.asarray(columns[column], dtype=np.float64)
            areas[unit] = values[np.isfinite(values)]
    side_px = 720 if num_images <= 20 else 512 if num_images <= 100 else 400
    cells = f"{count_text(summary.get('num_cells') or 0, 'cell')} in {name}"
    return ReportEntry(
        name,
        warnings=warnings,
        summary=summary,
        files=files,
        areas_by_unit=areas,
        columns={key: values[:_MAX_ROWS].copy() for key, values in columns.items()},
        num_rows=len(next(iter(columns.values()), ())),
        pictures=embedded_pictures(*arrays, side_px, cells),
    )


def write_report(
    path: _Path,
    entries: Sequence[ReportEntry],
    *,
    title: str = "DINOCell report",
    summary: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    plates: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page; the file appears whole or not at all.

    Parameters
    ----------
    path : the `.html` file; missing folders are made.  Links are relative to its folder.
    entries : in the order of the page; may be empty
    summary : facts about the run, shown at the top: model, device, seconds
    notes : sentences shown above the images
    plates : as `dinocell.results.wells.heat_maps` returns them

    Raises DINOCellError (`path` is a folder).
    """
    rows = min(_MAX_ROWS, max(5, _ROW_BUDGET // max(len(entries), 1)))
    areas, unit = _all_areas(entries)
    folder = Path(os.path.abspath(path)).parent
    page = _template().render(
        title=title,
        tiles=_tiles(entries),
        summary=summary or {},
        notes=notes,
        problems=_problems(entries),
        areas=area_histogram(areas, unit, "all images"),
        plates=plates,
        overview=_overview(entries),
        cards=(
            _card(entry, folder, rows) | {"number": number, "is_open": number <= _OPEN_CARDS}
            for number, entry in enumerate(entries, start=1)
        ),
    )
    write_text_atomically(path, page, errors="backslashreplace")


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
    environment.filters["row_letters"] = row_letters
    return environment.get_template("report.html.j2")


def _tiles(entries: Sequence[ReportEntry]) -> list[tuple[str, str]]:
    """The main numbers of the run, and what each counts."""
    areas, unit = _all_areas(entries)
    total = sum(entry.summary.get("num_cells") or 0 for entry in entries)
    shares = [entry.summary.get("confluency_percent") for entry in entries]
    covered = [share for share in shares if share is not None]
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


def _all_areas(entries: Sequence[ReportEntry]) -> tuple[NDArray[np.float64], str]:
    """Areas of all cells in one unit: µm² where every image has it, else pixels; none if they differ."""
    filled = [entry.areas_by_unit for entry in entries if len(entry.areas)]
    for unit in ("µm²", "px²"):
        if filled and all(unit in areas for areas in filled):
            return np.concatenate([areas[unit] for areas in filled]), unit
    return np.zeros(0), "px²"


def _overview(entries: Sequence[ReportEntry]) -> dict[str, Any]:
    """One row per image."""
    rows = []
    for entry in entries:
        median = "–"
        if len(entry.areas):
            median = f"{number_text(float(np.median(entry.areas)))} {entry.area_unit}"
        known = [number_text(entry.summary.get(k)) for k in ("num_cells", "confluency_percent")]
        state = "failed" if entry.error is not None else "warning" if entry.warnings else "done"
        rows.append({"name": entry.name, "cells": [*known, median], "state": state})
    return {"columns": ["image", "cells", "confluency %", "median area", "state"], "rows": rows}


def _card(entry: ReportEntry, folder: Path, rows: int) -> dict[str, Any]:
    """Everything about one image."""
    num_cells, covered = (entry.summary.get(k) for k in ("num_cells", "confluency_percent"))
    known = [] if num_cells is None else [count_text(num_cells, "cell")]
    if covered is not None:
        known.append(f"confluency {number_text(covered)} %")
    if entry.error is not None:
        known.append("failed")
    kinds = sorted(entry.files, key=[*_FILE_TEXTS, *entry.files].index)
    return {
        "name": entry.name,
        "known": known,
        "error": entry.error,
        "warnings": entry.warnings,
        "pictures": entry.pictures,
        "has_areas": bool(entry.columns),
        "histogram": area_histogram(entry.areas, entry.area_unit, entry.name),
        "links": [_link(entry.files[kind], folder, kind) for kind in kinds],
        "csv": _link(entry.files["csv"], folder) if "csv" in entry.files else None,
        "summary": entry.summary,
        "table": _table(entry, rows) if entry.columns else None,
    }


def _table(entry: ReportEntry, rows: int) -> dict[str, Any]:
    """The first rows of the measurements."""
    shown = min(rows, entry.num_rows)
    is_cut = shown != entry.num_rows
    if entry.num_rows == 0:
        caption = "No cell was found."
    elif is_cut:
        caption = f"The first {shown} of {count_text(entry.num_rows, 'cell')}"
    else:
        caption = f"All {count_text(shown, 'cell')}." if shown != 1 else "The one cell."
    lists = [values[:shown].tolist() for values in entry.columns.values()]
    return {
        "columns": list(entry.columns),
        "rows": list(zip(*lists, strict=True)),
        "caption": caption,
        "is_cut": is_cut,
    }


def _link(target: _Path, folder: Path, kind: str = "") -> dict[str, str]:
    """Address relative to the page, the file's name, and the text of the link."""
    relative = os.path.relpath(os.path.abspath(target), folder)
    address = quote(os.fsencode(Path(relative).as_posix()))  # names may be no UTF-8
    name = Path(target).name
    return {"target": address, "name": name, "text": _FILE_TEXTS.get(kind, f"labels ({name})")}
