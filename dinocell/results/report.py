"""One self-contained HTML page about a segmentation run: pictures, counts, areas, tables, failures.

The page needs no network and no other file: pictures are embedded, style and the few lines of
script stand inside.  Links lead only to files of the same run (CSV tables, overlays), relative to
the page.  It follows the reader's light or dark setting and works without script.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.files import write_text_atomically
from dinocell.labels import as_labels, cell_borders
from dinocell.results.pictures import (
    CONTOUR_COLOR,
    color_distance_map,
    color_labels,
    mean_blocks,
    shrink_labels,
    to_display,
)
from dinocell.results.table import CellTable

__all__ = ["ReportEntry", "make_entry", "write_report"]

_OPEN_CARDS = 12
_MAX_ROWS = 50
_ROW_BUDGET = 3000  # rows of all tables together
_LARGEST_THUMBNAIL_PX = 720


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
    truth_scores : mapping of metric name to number, or None
        Scores against truth.
    error : str, or None
        Why this image failed.
    warnings : tuple of str
    num_rows : int, or None
        Cells in the whole table, where `table` holds only its first rows.
    areas : mapping of unit ("px", "µm²") to (N,) array, or None
        All areas for the histogram, where `table` holds only its first rows.
    """

    name: str
    image: NDArray[Any] | None = None
    labels: NDArray[Any] | None = None
    distance_map: NDArray[Any] | None = None
    table: CellTable | Mapping[str, ArrayLike] | None = None
    summary: Mapping[str, Any] | None = None
    overlay_path: str | os.PathLike[str] | None = None
    csv_path: str | os.PathLike[str] | None = None
    truth_scores: Mapping[str, float] | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    num_rows: int | None = None
    areas: Mapping[str, ArrayLike] | None = None


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
) -> ReportEntry:
    """Make an entry that keeps only what the page shows, so that hundreds fit in memory.

    Parameters
    ----------
    result : Segmentation
        Its image, labels, distance map, name and warnings.
    table, summary : see `ReportEntry`
    files : mapping of kind to path
        "csv" and "overlay" become links.
    truth_scores : mapping, optional

    Returns
    -------
    ReportEntry
        With pictures of at most 720 pixels a side and the first rows of the table, which is all that
        `write_report` shows by default.
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
        truth_scores=truth_scores,
        warnings=tuple(result.warnings),
    )
    return _shrunk(entry, _LARGEST_THUMBNAIL_PX)


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
        thumbnail_px = _LARGEST_THUMBNAIL_PX if count <= 20 else 512 if count <= 100 else 400
    if rows is None:
        rows = _MAX_ROWS if count * _MAX_ROWS <= _ROW_BUDGET else max(5, _ROW_BUDGET // count)
    facts = [_Facts.of(entry) for entry in all_entries]
    folder = Path(os.path.abspath(path)).parent
    parts = [_head(title), _top(title, all_entries, facts, summary or {}, notes)]
    if all_entries:
        parts.append(_overview(all_entries, facts))
        parts.append('<section aria-label="Images">')
        for number, (entry, fact) in enumerate(zip(all_entries, facts, strict=True), start=1):
            parts.append(_card(number, entry, fact, folder, thumbnail_px, rows))
        parts.append("</section>")
    parts.append(_FOOT)
    write_text_atomically(path, "\n".join(parts))


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
    def of(cls, entry: ReportEntry) -> _Facts:
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
    image, labels, distance_map = _thumbnails(entry, side_px)
    summary = dict(entry.summary or {})
    if facts.num_cells is not None:
        summary.setdefault("num_cells", facts.num_cells)
    if facts.confluency_percent is not None:
        summary.setdefault("confluency_percent", facts.confluency_percent)
    return replace(
        entry,
        image=image,
        labels=labels,
        distance_map=distance_map,
        table={name: values[:_MAX_ROWS].copy() for name, values in facts.columns.items()},
        summary=summary,
        num_rows=facts.num_rows,
        areas=facts.areas_by_unit,
    )


# --------------------------------------------------------------------------------------- pictures


def _thumbnails(
    entry: ReportEntry, side_px: int
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint32] | None, NDArray[np.float32] | None]:
    """Image (RGB), labels and distance map, shrunk by a whole factor to at most `side_px`."""
    image, labels, distance_map = entry.image, entry.labels, entry.distance_map
    small_image: NDArray[np.uint8] | None = None
    small_labels: NDArray[np.uint32] | None = None
    small_map: NDArray[np.float32] | None = None
    if image is not None and np.size(image):
        ready = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        picture = image if ready else to_display(image)
        factor = math.ceil(max(picture.shape[:2]) / side_px)
        small_image = np.rint(mean_blocks(picture, factor)).astype(np.uint8)
    if labels is not None and np.size(labels):
        small_labels = shrink_labels(labels, math.ceil(max(labels.shape) / side_px))
    if distance_map is not None and np.size(distance_map):
        factor = math.ceil(max(distance_map.shape) / side_px)
        small_map = mean_blocks(distance_map, factor).astype(np.float32)
    return small_image, small_labels, small_map


def _data_uri(picture: Any, kind: str) -> str:
    """A Pillow image as a data address."""
    buffer = io.BytesIO()
    if kind == "jpeg":
        picture.save(buffer, format="JPEG", quality=88)
    else:
        picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _photo(rgb: NDArray[np.uint8]) -> str:
    from PIL import Image

    gray = np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2])
    return _data_uri(Image.fromarray(rgb[..., 0] if gray else rgb), "jpeg")


def _layer(rgb: NDArray[np.uint8], seen: NDArray[np.bool_]) -> str:
    """A picture with few colours that is transparent where `seen` is False."""
    from PIL import Image

    codes = (rgb.astype(np.uint32) * np.array([1 << 16, 1 << 8, 1], np.uint32)).sum(axis=-1)
    colors, index = np.unique(codes[seen], return_inverse=True)
    palette = np.zeros((len(colors) + 1, 3), np.uint8)
    for channel, shift in enumerate((16, 8, 0)):
        palette[1:, channel] = (colors >> shift) & 255
    if len(palette) > 256:
        rgba = np.dstack([rgb, np.where(seen, 255, 0).astype(np.uint8)])
        return _data_uri(Image.fromarray(rgba), "png")
    indexed = np.zeros(seen.shape, np.uint8)
    indexed[seen] = index + 1
    picture = Image.fromarray(indexed)
    picture.putpalette(palette.tobytes())
    picture.info["transparency"] = 0
    return _data_uri(picture, "png")


def _viewer(number: int, entry: ReportEntry, fact: _Facts, side_px: int) -> str:
    """The stacked pictures of one image with the switches of their layers; the histogram beside."""
    image, labels, distance_map = _thumbnails(entry, side_px)
    histogram = ""
    if fact.columns or len(fact.areas):
        histogram = _histogram(fact.areas, fact.area_unit, entry.name)
    if image is None and labels is None and distance_map is None:
        return histogram
    name = _text(entry.name)
    cells = _count(fact.num_cells or 0, "cell")
    known = next(array for array in (image, labels, distance_map) if array is not None)
    size = f'width="{known.shape[1]}" height="{known.shape[0]}" loading="lazy" decoding="async"'
    layers, switches = [], []
    if image is not None:
        layers.append(f'<img src="{_photo(image)}" alt="Image {name}" {size}>')
    else:
        layers.append(
            f'<div class="blank" style="aspect-ratio:{known.shape[1]}/{known.shape[0]}"></div>'
        )
    if labels is not None:
        colored = _layer(color_labels(labels), labels > 0)
        border = cell_borders(labels)
        flat = np.broadcast_to(np.array(CONTOUR_COLOR, np.uint8), (*labels.shape, 3))
        outlines = _layer(flat, border)
        for kind, source, alt, text, state in (
            ("colors", colored, f"Coloured areas of {cells} in {name}", "colours", ""),
            ("contours", outlines, f"Contours of {cells} in {name}", "contours", " checked"),
        ):
            layers.append(f'<img class="layer {kind}" src="{source}" alt="{alt}" {size}>')
            switches.append(
                f'<input type="checkbox" class="{kind}" id="{kind}-{number}"{state}>'
                f'<label for="{kind}-{number}">{text}</label>'
            )
    hint = '<span class="hint">point at the picture to see it without layers</span>'
    parts = ['<div class="viewer">', *switches, hint if switches else ""]
    parts.append(f'<div class="pictures"><div class="stack">{"".join(layers)}</div>')
    parts.append('<div class="side">')
    if distance_map is not None:
        source = _photo(color_distance_map(np.nan_to_num(distance_map)))
        parts.append(
            f'<figure class="map"><img src="{source}" alt="Distance map of {name}" {size}>'
            "<figcaption>distance map: dark 0, light 1</figcaption></figure>"
        )
    parts.append(f"{histogram}</div></div></div>")
    return "".join(parts)


def _histogram(areas: NDArray[np.float64], unit: str, what: str) -> str:
    """Inline SVG histogram of cell areas; a sentence when there is no cell."""
    if len(areas) == 0:
        return '<p class="quiet">No cell, so no histogram of areas.</p>'
    top = _nice_ceiling(max(float(np.percentile(areas, 99.5)), 1e-12))
    bins = int(np.clip(round(2 * math.sqrt(len(areas))), 8, 30))
    counts = np.histogram(np.minimum(areas, top), bins=bins, range=(0.0, top))[0]
    above = int((areas > top).sum())
    width, height, left, right, base = 520, 190, 46, 30, 150
    plot = width - left - right
    highest = max(int(counts.max()), 1)
    bars = []
    for k, value in enumerate(counts.tolist()):
        x, bar = left + plot * k / bins, (base - 14) * value / highest
        low, high = top * k / bins, top * (k + 1) / bins
        bars.append(
            f'<rect x="{x + 0.5:.1f}" y="{base - bar:.1f}" width="{plot / bins - 1:.1f}" '
            f'height="{bar:.1f}"><title>{_number(low)} to {_number(high)} {unit}: '
            f"{_count(value, 'cell')}</title></rect>"
        )
    ticks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + plot * share
        ticks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 5}"/>'
            f'<text x="{x:.1f}" y="{base + 18}" text-anchor="middle">{_number(top * share)}</text>'
        )
    median = float(np.median(areas))
    at = left + plot * min(median / top, 1.0)
    mark = f'<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="8" y2="{base}"/>'
    rest = f"; the last bar holds {above} larger" if above else ""
    described = (
        f"Histogram of the areas of {_count(len(areas), 'cell')} in {what}: median "
        f"{_number(median)} {unit}, from {_number(float(areas.min()))} to "
        f"{_number(float(areas.max()))} {unit}{rest}."
    )
    return (
        f'<figure class="histogram"><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{_text(described)}"><g class="bars">{"".join(bars)}</g>{mark}'
        f'<g class="axis"><line x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>'
        f'{"".join(ticks)}<text x="{left - 6}" y="18" text-anchor="end">{highest}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{left + plot / 2:.1f}" y="{base + 36}" text-anchor="middle">area in {unit}</text>'
        f"</g></svg><figcaption>{_text(described)}</figcaption></figure>"
    )


def _nice_ceiling(value: float) -> float:
    """The smallest of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 × 10^k that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)
    return next(s * power for s in steps if s * power >= value * (1 - 1e-9))


# ------------------------------------------------------------------------------------------- text


def _text(value: object) -> str:
    """Any value as text that is safe inside HTML elements and attributes."""
    return html.escape(str(value), quote=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _number(value: Any) -> str:
    """A table cell: whole numbers as they are, others with four digits, nothing known as a dash."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if not math.isfinite(value):
            return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
        if value == round(value) and abs(value) < 1e15:
            return f"{round(value):,}"
        if 1e3 <= abs(value) < 1e15:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    return _text(value)


def _link(target: str | os.PathLike[str], folder: Path, text: str) -> str:
    """A link relative to the page."""
    relative = os.path.relpath(os.path.abspath(target), folder)
    return f'<a href="{_text(quote(Path(relative).as_posix()))}">{_text(text)}</a>'


def _anchor(number: int) -> str:
    return f"image-{number}"


def _facts_list(facts: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_number(value)}</dd></div>" for key, value in facts.items()
    )
    return f"<dl>{rows}</dl>" if rows else ""


def _head(title: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    )


def _top(
    title: str,
    entries: Sequence[ReportEntry],
    facts: Sequence[_Facts],
    summary: Mapping[str, Any],
    notes: Sequence[str],
) -> str:
    """Heading, the main numbers, problems, histogram of all cells."""
    failed = sum(entry.error is not None for entry in entries)
    areas, unit = _all_areas(facts)
    total = sum(fact.num_cells or 0 for fact in facts)
    covered = [f.confluency_percent for f in facts if f.confluency_percent is not None]
    tiles = [(_number(len(entries)), "image" if len(entries) == 1 else "images")]
    tiles.append((_number(total), "cell" if total == 1 else "cells"))
    if len(areas):
        tiles.append((f"{_number(float(np.median(areas)))} {unit}", "median area"))
    if covered:
        tiles.append((f"{_number(float(np.mean(covered)))} %", "mean confluency"))
    if failed:
        tiles.append((_number(failed), "failed"))
    parts = [f"<header><h1>{_text(title)}</h1>"]
    boxes = "".join(f"<li><b>{value}</b> {name}</li>" for value, name in tiles)
    parts.append(f'<ul class="tiles">{boxes}</ul>')
    parts.append(_facts_list(summary))
    parts.extend(f"<p>{_text(note)}</p>" for note in notes)
    parts.append("</header>")
    problems = []
    for number, entry in enumerate(entries, start=1):
        link = f'<a href="#{_anchor(number)}">{_text(entry.name)}</a>'
        if entry.error is not None:
            problems.append(f'<li class="bad">{link}: {_text(entry.error)}</li>')
        problems.extend(f"<li>{link}: {_text(warning)}</li>" for warning in entry.warnings)
    if problems:
        parts.append(
            '<section class="problems"><h2>Failures and warnings</h2>'
            f"<ul>{''.join(problems)}</ul></section>"
        )
    if not entries:
        parts.append("<p>No image was given, so there is nothing to show.</p>")
    elif len(entries) > 1:
        parts.append(f"<section><h2>Areas of all cells</h2>{_histogram(areas, unit, 'all images')}")
        parts.append("</section>")
    return "\n".join(parts)


def _all_areas(facts: Sequence[_Facts]) -> tuple[NDArray[np.float64], str]:
    """Areas of all cells in one unit: µm² where every image has it, else pixels; none if they differ."""
    filled = [fact.areas_by_unit for fact in facts if len(fact.areas)]
    for unit in ("µm²", "px"):
        if filled and all(unit in areas for areas in filled):
            return np.concatenate([areas[unit] for areas in filled]), unit
    return np.zeros(0), "px"


def _overview(entries: Sequence[ReportEntry], facts: Sequence[_Facts]) -> str:
    """One row per image, with scores against truth and their mean where there are any."""
    metrics: list[str] = []
    for entry in entries:
        metrics += [key for key in entry.truth_scores or {} if key not in metrics]
    header = ["image", "cells", "confluency %", "median area", *metrics, "state"]
    rows = []
    for number, (entry, fact) in enumerate(zip(entries, facts, strict=True), start=1):
        median = (
            f"{_number(float(np.median(fact.areas)))} {fact.area_unit}" if len(fact.areas) else "–"
        )
        scores = entry.truth_scores or {}
        state = "failed" if entry.error is not None else "warning" if entry.warnings else "done"
        cells = [
            _number(fact.num_cells),
            _number(fact.confluency_percent),
            median,
            *(_number(scores.get(metric)) for metric in metrics),
            state,
        ]
        rows.append(
            f'<tr class="{state}"><th scope="row"><a href="#{_anchor(number)}">{_text(entry.name)}'
            f"</a></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    foot = ""
    if metrics:
        means = []
        for metric in metrics:
            values = [
                float(e.truth_scores[metric])
                for e in entries
                if e.truth_scores and _is_known(e.truth_scores.get(metric))
            ]
            shown = f"{_number(float(np.mean(values)))} (n = {len(values)})" if values else "–"
            means.append(f"<td>{shown}</td>")
        foot = (
            '<tfoot><tr><th scope="row">mean over images</th><td></td><td></td><td></td>'
            f"{''.join(means)}<td></td></tr></tfoot>"
        )
    columns = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    is_open = " open" if len(entries) <= 40 else ""
    return (
        f"<section><details{is_open}><summary><h2>Overview</h2></summary>"
        '<div class="scroll" role="region" aria-label="Overview" tabindex="0"><table>'
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}</table></div>"
        "</details></section>"
    )


def _is_known(value: Any) -> bool:
    return value is not None and math.isfinite(float(value))


def _card(
    number: int, entry: ReportEntry, fact: _Facts, folder: Path, side_px: int, rows: int
) -> str:
    """Everything about one image; collapsed after the first dozen."""
    name = _text(entry.name)
    known = [] if fact.num_cells is None else [_count(fact.num_cells, "cell")]
    if fact.confluency_percent is not None:
        known.append(f"confluency {_number(fact.confluency_percent)} %")
    if entry.error is not None:
        known.append("failed")
    is_open = " open" if number <= _OPEN_CARDS else ""
    parts = [
        f'<article id="{_anchor(number)}"><details{is_open}><summary><h2>{name}</h2> '
        f'<span class="quiet">{", ".join(known)}</span></summary>'
    ]
    if entry.error is not None:
        parts.append(f'<p class="bad" role="alert">Failed: {_text(entry.error)}</p>')
    parts.extend(f'<p class="warn">Warning: {_text(warning)}</p>' for warning in entry.warnings)
    parts.append(_viewer(number, entry, fact, side_px))
    links = []
    if entry.overlay_path is not None:
        links.append(_link(entry.overlay_path, folder, "overlay in full size"))
    if entry.csv_path is not None:
        links.append(_link(entry.csv_path, folder, "all measurements (CSV)"))
    if links:
        parts.append(f'<p class="links">{" · ".join(links)}</p>')
    if entry.truth_scores:
        parts.append(f"<h3>Against truth</h3>{_facts_list(entry.truth_scores)}")
    if entry.summary:
        parts.append(
            f"<details><summary>Summary of the image</summary>{_facts_list(entry.summary)}</details>"
        )
    if fact.columns:
        parts.append(_table(entry, fact, folder, rows))
    parts.append("</details></article>")
    return "\n".join(part for part in parts if part)


def _table(entry: ReportEntry, fact: _Facts, folder: Path, rows: int) -> str:
    """The first rows of the measurements."""
    available = max((len(values) for values in fact.columns.values()), default=0)
    shown = min(rows, available, fact.num_rows)
    header = "".join(f'<th scope="col">{_text(column)}</th>' for column in fact.columns)
    lists = [values[:shown].tolist() for values in fact.columns.values()]
    body = "".join(
        "<tr>" + "".join(f"<td>{_number(value)}</td>" for value in row) + "</tr>"
        for row in zip(*lists, strict=True)
    )
    if fact.num_rows == 0:
        caption = "No cell was found."
    elif shown == fact.num_rows:
        caption = f"All {_count(shown, 'cell')}." if shown != 1 else "The one cell."
    else:
        where = (
            f"all are in {_link(entry.csv_path, folder, Path(entry.csv_path).name)}"
            if entry.csv_path is not None
            else "the rest is left out"
        )
        caption = f"The first {shown} of {_count(fact.num_rows, 'cell')}; {where}."
    return (
        "<details><summary>Measurements</summary>"
        f'<div class="scroll" role="region" aria-label="Measurements of {_text(entry.name)}" '
        f'tabindex="0"><table><caption>{caption}</caption><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #57606a; --paper: #ffffff; --box: #f4f6f8;
  --line: #d0d7de; --link: #0550ae; --bar: #0072b2; --mark: #bc4c00; --bad: #b42318; --warn: #7a4d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --quiet: #9aa4af; --paper: #101418;
  --box: #1a2027; --line: #343c45; --link: #79b8ff; --bar: #56b4e9; --mark: #ff8f4d; --bad: #ff8f85;
  --warn: #f0c05a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0; display: inline; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
section, article { margin: 1.4rem 0; }
article { background: var(--box); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  content-visibility: auto; contain-intrinsic-size: auto 4rem; }
article > details > summary { list-style-position: outside; margin-left: 1.1rem; }
article > details[open] > summary { margin-bottom: .8rem; }
details details { margin: .6rem 0; }
summary { cursor: pointer; }
a { color: var(--link); }
.quiet, .hint, figcaption, caption, dt { color: var(--quiet); }
.hint, figcaption, caption { font-size: .85rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; list-style: none; padding: 0; margin: 0 0 1rem; }
.tiles li { background: var(--box); border: 1px solid var(--line); border-radius: 10px;
  padding: .6rem 1rem; color: var(--quiet); }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; color: var(--ink);
  font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .2rem 1.5rem;
  margin: .5rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line); }
dt { font-size: .9rem; overflow-wrap: anywhere; }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; text-align: right; }
.problems { border-left: 4px solid var(--mark); padding-left: 1rem; }
.problems ul { margin: .4rem 0; padding-left: 1.1rem; }
.bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); }
.viewer label { margin: 0 1rem 0 .3rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: .5rem; align-items: flex-start; }
.stack { position: relative; flex: 3 1 22rem; max-width: 46rem; background: #000; border-radius: 6px;
  overflow: hidden; }
.stack img, .stack .blank { display: block; width: 100%; height: auto; image-rendering: auto; }
.stack .layer { position: absolute; inset: 0; height: 100%; image-rendering: pixelated; }
.stack .colors { opacity: .55; }
.stack:hover .layer { opacity: 0; }
input.contours:not(:checked) ~ .pictures .layer.contours { display: none; }
input.colors:not(:checked) ~ .pictures .layer.colors { display: none; }
figure { margin: 0; }
.side { flex: 1 1 16rem; max-width: 28rem; }
.map img { width: 100%; height: auto; border-radius: 6px; display: block; }
.histogram { max-width: 36rem; margin: .8rem 0; }
.histogram svg { width: 100%; height: auto; display: block; }
.bars rect { fill: var(--bar); }
.axis line { stroke: var(--quiet); }
.axis text { fill: var(--quiet); font-size: 12px; }
.median { stroke: var(--mark); stroke-width: 2; stroke-dasharray: 5 3; }
.scroll { overflow: auto; max-height: 28rem; margin-top: .5rem; border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; padding: .4rem .6rem; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--box); border-top: 0; }
tbody th, tfoot th, thead th:first-child { text-align: left; }
tbody th { font-weight: 500; }
tfoot td, tfoot th { font-weight: 600; }
tr.failed td:last-child { color: var(--bad); font-weight: 600; }
tr.warning td:last-child { color: var(--warn); }
footer { color: var(--quiet); font-size: .85rem; margin-top: 2rem; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media print { article { break-inside: avoid; content-visibility: visible; } .hint { display: none; } }
"""

# A link to a collapsed image opens it; everything else works without script.
_FOOT = """<footer><p>Made by DINOCell. Pictures are shrunk to fit the page; numbers are of the full images.
A dashed line in a histogram is the median.</p></footer>
<script>
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  const details = target && target.querySelector("details");
  if (details) { details.open = true; target.scrollIntoView(); }
}
addEventListener("hashchange", openTarget);
openTarget();
</script>
</body>
</html>
"""
