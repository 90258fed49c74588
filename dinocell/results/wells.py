"""A plate by wells: one row per well, and heat maps for the report."""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.files import writing
from dinocell.progress import count_text
from dinocell.results.report_numbers import number_text
from dinocell.results.table import CellTable
from dinocell.results.table_files import write_parquet

_PLATES = (
    (2, 3),
    (3, 4),
    (4, 6),
    (6, 8),
    (8, 12),
    (16, 24),
    (32, 48),
)  # rows and columns that exist
_HEAT = "0, 114, 178"

Row = Mapping[str, Any]


def well_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per well from the rows of `summary.csv` that have a well, by plate, row and column.

    `images`; `num_cells`, their sum; `confluency_percent`, the mean over images; all other columns are
    means over cells: `quality`, `area_mean`, `area_um2_mean`, and `intensity_mean` (of each channel).  None
    where nothing is known.
    """
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        if row.get("well"):
            groups.setdefault((row.get("plate"), row["well"]), []).append(row)
    cellwise = dict.fromkeys(
        name
        for row in rows
        for name in row
        if name in ("quality", "area_mean", "area_um2_mean") or name.startswith("intensity_mean")
    )
    found = []
    for (plate, well), members in sorted(
        groups.items(), key=lambda item: (str(item[0][0]), _key(item[0][1]))
    ):
        counts = [int(row.get("num_cells") or 0) for row in members]
        one: dict[str, Any] = {} if plate is None else {"plate": plate}
        one |= {"well": well, "images": len(members), "num_cells": sum(counts)}
        one["confluency_percent"] = _mean([(row.get("confluency_percent"), 1) for row in members])
        for name in cellwise:
            one[name] = _mean([(row.get(name), n) for row, n in zip(members, counts, strict=True)])
        found.append(one)
    return found


def _mean(values: Sequence[tuple[Any, int]]) -> float | None:
    known = [(float(value), weight) for value, weight in values if value is not None and weight]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def _key(well: str) -> tuple[int, str, int, str]:
    parts = re.fullmatch(r"([A-Z]+)(\d+)", well)
    return (len(parts[1]), parts[1], int(parts[2]), "") if parts else (9, "", 0, well)


def write_wells(folder: Path, rows: Sequence[Row], formats: Iterable[str] = ()) -> None:
    """Write `well_rows` as `wells.csv`, and with the format `parquet` also as `wells.parquet`.

    Nothing is written if no image has a well.  Raises DINOCellError (the disk refuses).
    """
    wells = well_rows(rows)
    if not wells:
        return
    columns = list(dict.fromkeys(name for row in wells for name in row))
    with (
        writing(folder / "wells.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(wells)
    if "parquet" in formats:
        data = {name: _column(name, [row.get(name) for row in wells]) for name in columns}
        write_parquet(folder / "wells.parquet", CellTable(data))


def _column(name: str, values: Sequence[Any]) -> NDArray[Any]:
    """int64 for counts, texts (or None) for names, else float64 with NaN for what is not known."""
    if name in ("images", "num_cells"):
        return np.array(values, np.int64)
    if name in ("plate", "well"):
        return np.array(values, object)
    return np.array(values, np.float64)


def heat_maps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each plate and number of `well_rows`: title, columns, and rows of fields with text and colour.

    A field without an image is None.  Wells that are not a letter and a number are left out.
    """
    wells = [row for row in well_rows(rows) if re.fullmatch(r"[A-Z]+\d+", row["well"])]
    maps = []
    for plate in dict.fromkeys(row.get("plate") for row in wells):
        members = {row["well"]: row for row in wells if row.get("plate") == plate}
        places = {well: (_row_number(well), int(re.sub(r"\D", "", well))) for well in members}
        height = max(row for row, _ in places.values())
        width = max(column for _, column in places.values())
        shape = next((s for s in _PLATES if s[0] >= height and s[1] >= width), (height, width))
        by_place = {place: members[well] for well, place in places.items()}
        names = [
            name for name in next(iter(members.values())) if name not in ("plate", "well", "images")
        ]
        if "area_um2_mean" in names:
            names.remove("area_mean")
        for name in names:
            values = [row.get(name) for row in members.values()]
            known = [value for value in values if value is not None]
            if known:
                fields = [
                    [
                        _field(by_place.get((row, column)), name, known)
                        for column in range(1, shape[1] + 1)
                    ]
                    for row in range(1, shape[0] + 1)
                ]
                title = f"{plate}: {name}" if plate else name
                maps.append({"title": title, "columns": shape[1], "rows": fields})
    return maps


def _row_number(well: str) -> int:
    number = 0
    for letter in re.sub(r"\d", "", well):
        number = 26 * number + ord(letter) - 64
    return number


def _field(row: Row | None, name: str, known: Sequence[float]) -> dict[str, str] | None:
    if row is None:
        return None
    value, low, high = row.get(name), min(known), max(known)
    share = 0.0 if value is None or high <= low else (value - low) / (high - low)
    text = number_text(value)
    images = count_text(row["images"], "image")
    return {
        "text": text,
        "style": f"background: rgba({_HEAT}, {0.08 + 0.87 * share:.2f})"
        + ("; color: #ffffff" if share > 0.85 else ""),
        "title": f"{row['well']}: {text} ({images})",
    }
