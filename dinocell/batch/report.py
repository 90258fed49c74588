"""`report.html` over all images of a folder, those of earlier runs included."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.batch.inputs import image_of, is_unchanged
from dinocell.batch.options import IMAGE_OPTIONS, SegmentOptions
from dinocell.batch.units import Unit
from dinocell.errors import DINOCellError
from dinocell.io import read_labels
from dinocell.pipeline import DINOCellPipeline
from dinocell.results.report import ReportEntry, make_entry, write_report
from dinocell.results.segmented import output_paths
from dinocell.results.wells import heat_maps

REPORT_LIMIT = 500
"""Images that a report shows."""


def write_report_page(
    out: Path,
    names: Sequence[str],
    rows: Mapping[str, Mapping[str, Any]],
    entries: Mapping[str, ReportEntry],
    failures: Sequence[tuple[Unit, str]],
    pipeline: DINOCellPipeline,
    options: SegmentOptions,
) -> None:
    """Write `report.html`.

    Parameters
    ----------
    out : folder of the results
    names : of all images, in the order of the page
    rows : by name, of images that are done
    entries : by name, of images of this run; those of other images are made from their files
    failures : unit and sentence of each image that failed
    pipeline : reads the images again, and holds the thresholds that the page names
    """
    errors = {unit.name: sentence for unit, sentence in failures}
    shown = set([name for name in names if name in rows][:REPORT_LIMIT])
    listed = []
    for name in names:
        if name in errors:
            listed.append(ReportEntry(name=name, error=errors[name]))
        elif name in shown:
            entry = entries.get(name)
            listed.append(
                entry or _entry_from_files(out, rows[name], pipeline, options, len(names))
            )
    known = pipeline.model.statistics
    of_kinds = {} if known is None else known.thresholds()
    notes = []
    if len(shown) < len(rows):
        notes.append(
            f"{len(rows) - len(shown)} images beyond the first {REPORT_LIMIT} are not shown: all are in "
            "summary.csv"
        )
    write_report(
        out / "report.html",
        listed,
        title="DINOCell: segmented cells",
        summary={
            "model": options.model,
            "images": len(names),
            **vars(pipeline.thresholds),
            **{f"thresholds for {kind}": text for kind, text in of_kinds.items()},
            "min_score": options.min_score,
            **({"tta": True} if options.tta else {}),
        },
        notes=notes,
        plates=heat_maps([rows[name] for name in names if name in rows]),
    )


def _entry_from_files(
    out: Path,
    row: Mapping[str, Any],
    pipeline: DINOCellPipeline,
    options: SegmentOptions,
    num_images: int,
) -> ReportEntry:
    """Entry of an image of an earlier run, without what cannot be read any more."""
    files = output_paths(out, row["name"], options.formats, overlay=True, nuclei=True)
    files = {kind: path for kind, path in files.items() if path.exists()}
    labels = image = None
    try:
        label_file = files.get("tif", files.get("png"))
        labels = None if label_file is None else read_labels(label_file)
        source = image_of(dict(row))
        if is_unchanged(source, dict(row)):
            mark = row.get("input", {})
            how = {name: mark[name] for name in IMAGE_OPTIONS if name in mark}
            image = pipeline.load(source, **how).plane
    except (DINOCellError, ValueError, OSError):
        pass  # the page shows what is left
    if image is not None and labels is not None and image.shape != labels.shape:
        image = None
    left_out = ("name", "source", "warnings", "input")
    return make_entry(
        row["name"],
        (image, labels, None),
        _columns(files["csv"]) if "csv" in files else {},
        {key: value for key, value in row.items() if key not in left_out},
        files,
        warnings=(row["warnings"],) if row["warnings"] else (),
        num_images=num_images,
    )


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    """Columns of a table of cells; an empty field is NaN."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    values = list(zip(*lines, strict=True)) or [()] * len(header)
    return {name: _numbers(column) for name, column in zip(header, values, strict=True)}


def _numbers(column: Sequence[str]) -> NDArray[Any]:
    if set(column) <= {"true", "false"}:
        return np.array([value == "true" for value in column])
    for kind in (int, float):
        try:
            return np.array([kind(value or "nan") for value in column])
        except ValueError:
            continue
    return np.array(column)
