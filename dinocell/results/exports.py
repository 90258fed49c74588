"""Labels and tables to the files other programs read.

Every writer is atomic (`dinocell.files.atomic_path`): the file appears under its name when it
is complete, a failure leaves what was there before, missing folders are made.  A label image without cells gives a valid file without cells.

Outlines run along the sides of pixels, with pixel (row, col) covering ``row..row + 1`` by
``col..col + 1``.  So the area of an outline equals the number of pixels, a program that fills
outlines by pixel centres gets the same labels back, and neighbours share their common side.
"""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import DINOCellError, MissingExtraError
from dinocell.files import atomic_path, write_text_atomically
from dinocell.io.images import write_labels
from dinocell.results.measure import CellTable, as_labels

__all__ = [
    "EXPORT_FORMATS",
    "Exporter",
    "compress_rle",
    "labels_to_polygons",
    "labels_to_rle",
    "write_coco_rle",
    "write_geojson",
    "write_imagej_rois",
    "write_table_csv",
]

_Ring = NDArray[np.int64]

_OBJECT_TYPES = ("detection", "annotation", "cell")


def _write_text(path: str | os.PathLike[str], text: str) -> None:
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> DINOCellError:
    return DINOCellError(
        f"'{path}' cannot be written ({error.strerror or error}): choose another folder or free "
        "some space."
    )


def write_table_csv(path: str | os.PathLike[str], table: CellTable) -> None:
    """Write a table as CSV: UTF-8, one header line, comma, ``\\n``.

    Parameters
    ----------
    path : path
        File to write.
    table : CellTable
        A missing value (NaN) becomes an empty field, booleans become ``true`` and ``false``,
        floats are written with all their digits, so that reading gives the same numbers.

    Raises
    ------
    ImageFileError, DINOCellError
        `path` is a folder, or the disk refuses.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    columns = [
        ["true" if value else "false" for value in values] if column.dtype == np.bool_ else values
        for column, values in zip(table.data.values(), table.to_dict().values(), strict=True)
    ]
    writer.writerows(zip(*columns, strict=True))
    _write_text(path, text.getvalue())


def labels_to_polygons(labels: ArrayLike) -> dict[int, list[list[_Ring]]]:
    """Outline every cell along the sides of its pixels.

    Parameters
    ----------
    labels : (H, W) integer array_like
        0 is background.

    Returns
    -------
    dict of int to list of polygons
        Per label, ascending, one polygon per 4-connected piece.  A polygon is a list of rings, the
        outer border first, then its holes.  A ring is an (N, 2) int64 array of corners
        (row, col), not repeating the first one; no ring visits a corner twice.  With x = col and
        y = row, outer borders have positive signed area and holes negative, and the sum of a cell's signed
        areas is its number of pixels.  An image without cells gives an empty dict.

    Raises
    ------
    TypeError, ValueError
        See `dinocell.results.measure.as_labels`.
    """
    padded = np.pad(as_labels(labels), 1)
    corners, stops, ring_labels, pinched = _trace_rings(padded)
    polygons: dict[int, list[list[_Ring]]] = {}
    holes: list[tuple[int, _Ring]] = []
    begin = 0
    for stop, label, is_pinched in zip(
        stops.tolist(), ring_labels.tolist(), pinched.tolist(), strict=True
    ):
        ring = corners[begin:stop]
        begin = stop
        for simple in _split_ring(ring) if is_pinched else [ring]:
            if _signed_area(simple) > 0:
                polygons.setdefault(label, []).append([simple])
            else:
                holes.append((label, simple))
    for label, hole in holes:
        pieces = polygons[label]
        home = pieces[0]
        if len(pieces) > 1:
            home = next(piece for piece in pieces if _encloses(piece[0], hole))
        home.append(hole)
    return dict(sorted(polygons.items()))


def _signed_area(ring: _Ring) -> float:
    """Shoelace formula with x = col, y = row."""
    row, col = ring[:, 0], ring[:, 1]
    following_row = np.append(row[1:], row[0])
    following_col = np.append(col[1:], col[0])
    return float(np.sum(col * following_row - following_col * row)) / 2


def _split_ring(ring: _Ring) -> list[_Ring]:
    """Cut a ring that visits a corner twice into rings that do not."""
    simple = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for corner in map(tuple, ring.tolist()):
        if corner in place:
            begin = place[corner]
            simple.append(np.array(path[begin:], dtype=np.int64))
            for left in path[begin:]:
                del place[left]
            del path[begin:]
        place[corner] = len(path)
        path.append(corner)
    simple.append(np.array(path, dtype=np.int64))
    return simple


def _encloses(ring: _Ring, hole: _Ring) -> bool:
    """Tell whether the centre of a pixel beside the hole lies inside the ring (even-odd rule)."""
    # a hole is traced with its cell on the right: step right from the middle of the first pixel side
    ahead = np.sign(hole[1] - hole[0])
    row, col = hole[0] + ahead / 2 + np.array([ahead[1], -ahead[0]]) / 2
    following = np.roll(ring, -1, axis=0)
    crosses = (ring[:, 0] > row) != (following[:, 0] > row)
    return bool(np.count_nonzero(crosses & (ring[:, 1] > col)) % 2)


@njit(cache=True)
def _trace_rings(
    padded: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Follow the borders of all labels, the cell on the right hand (in image coordinates).

    `padded` has one background pixel on every side.  Returns the corners (row, col) of all rings
    one after the other, without the padding; where each ring stops; its label; and whether it
    touches itself at a corner.  Where two pixels of a label meet in a corner only, the path stays
    with its pixel, which keeps pieces that touch in corners apart.
    """
    height, width = padded.shape
    sides = 0
    for row in range(1, height - 1):
        for col in range(1, width - 1):
            label = padded[row, col]
            if label != 0:
                sides += padded[row - 1, col] != label
                sides += padded[row + 1, col] != label
                sides += padded[row, col - 1] != label
                sides += padded[row, col + 1] != label
    corners = np.empty((sides, 2), np.int64)
    stops = np.empty(sides // 4 + 1, np.int64)
    labels = np.empty(sides // 4 + 1, np.int64)
    pinched = np.zeros(sides // 4 + 1, np.bool_)
    seen = np.zeros((height, width), np.bool_)  # the upper side of this pixel
    # headings: east along the upper side, south along the right, west along the lower, north
    step_row = (0, 1, 0, -1)
    step_col = (1, 0, -1, 0)
    end_row = (0, 1, 1, 0)
    end_col = (1, 1, 0, 0)
    count = 0
    rings = 0
    for row0 in range(1, height - 1):
        for col0 in range(1, width - 1):
            label = padded[row0, col0]
            if label == 0 or padded[row0 - 1, col0] == label or seen[row0, col0]:
                continue
            row, col, heading = row0, col0, 0
            while True:
                if heading == 0:
                    seen[row, col] = True
                left = (heading + 3) % 4
                ahead_row = row + step_row[heading]
                ahead_col = col + step_col[heading]
                beside_row = ahead_row + step_row[left]
                beside_col = ahead_col + step_col[left]
                turn = True
                next_row, next_col, next_heading = row, col, (heading + 1) % 4
                if padded[ahead_row, ahead_col] != label:
                    if padded[beside_row, beside_col] == label:
                        pinched[rings] = True
                elif padded[beside_row, beside_col] == label:
                    next_row, next_col, next_heading = beside_row, beside_col, left
                else:
                    next_row, next_col, next_heading = ahead_row, ahead_col, heading
                    turn = False
                if turn:
                    corners[count, 0] = row + end_row[heading] - 1
                    corners[count, 1] = col + end_col[heading] - 1
                    count += 1
                row, col, heading = next_row, next_col, next_heading
                if row == row0 and col == col0 and heading == 0:
                    break
            stops[rings] = count
            labels[rings] = label
            rings += 1
    return corners[:count], stops[:rings], labels[:rings], pinched[:rings]


def write_geojson(
    path: str | os.PathLike[str],
    labels: ArrayLike,
    table: CellTable | None = None,
    *,
    object_type: str = "detection",
) -> None:
    """Write the cells' outlines as a GeoJSON FeatureCollection that QuPath opens.

    Parameters
    ----------
    path : path
        File to write.
    labels : (H, W) integer array_like
        0 is background.
    table : CellTable, optional
        `measure_labels(labels, ...)`: every column becomes a measurement of the cell; missing
        values are left out, booleans are 0 and 1.
    object_type : {"detection", "annotation", "cell"}
        What QuPath makes of a cell.

    Raises
    ------
    ValueError
        `object_type` is unknown, or `table` does not hold the same labels.  Also see
        `dinocell.results.measure.as_labels`.
    ImageFileError, DINOCellError
        `path` is a folder, or the disk refuses.

    Notes
    -----
    One Feature per label: a Polygon, or a MultiPolygon for a cell in pieces (diagonal contact
    separates pieces).  Positions are (x, y) = (col, row) in pixels from the corner of the image;
    rings are closed, outer ones counter-clockwise in (x, y) as RFC 7946 section 3.1.6 asks.
    """
    if object_type not in _OBJECT_TYPES:
        raise ValueError(
            f"`object_type` must be one of {', '.join(_OBJECT_TYPES)}, got {object_type!r}: "
            "choose one of them."
        )
    polygons = labels_to_polygons(labels)
    rows = _rows_by_label(table, list(polygons))
    features = []
    for label, pieces in polygons.items():
        coordinates = [[_closed_xy(ring) for ring in piece] for piece in pieces]
        one = len(coordinates) == 1
        properties: dict[str, Any] = {
            "objectType": object_type,
            "name": str(label),
            "label": label,
        }
        if rows is not None:
            properties["measurements"] = rows[label]
        feature = {
            "type": "Feature",
            "geometry": {
                "type": "Polygon" if one else "MultiPolygon",
                "coordinates": coordinates[0] if one else coordinates,
            },
            "properties": properties,
        }
        features.append(json.dumps(feature, separators=(",", ":"), allow_nan=False))
    _write_text(
        path, '{"type":"FeatureCollection","features":[\n' + ",\n".join(features) + "\n]}\n"
    )


def _closed_xy(ring: _Ring) -> list[list[int]]:
    points: list[list[int]] = ring[:, ::-1].tolist()
    points.append(points[0])
    return points


def _rows_by_label(
    table: CellTable | None, labels: list[int]
) -> dict[int, dict[str, float]] | None:
    if table is None:
        return None
    if table["label"].tolist() != labels:
        raise ValueError(
            f"`table` must hold the same labels as the image, got {len(table)} rows for "
            f"{len(labels)} cells: call `measure_labels` on these labels."
        )
    return {
        row["label"]: {
            name: int(value) if isinstance(value, bool) else value
            for name, value in row.items()
            if value is not None and math.isfinite(value)
        }
        for row in table.rows()
    }


def write_imagej_rois(path: str | os.PathLike[str], labels: ArrayLike) -> None:
    """Write the cells' outlines as a zip of ImageJ ROIs, for the ROI manager of ImageJ and Fiji.

    Parameters
    ----------
    path : path
        File to write, by custom ``RoiSet.zip``.
    labels : (H, W) integer array_like
        0 is background.  Each label becomes one ROI of that name: a traced polygon, or a
        composite where the cell has holes or several pieces.

    Raises
    ------
    MissingExtraError
        The package `roifile` is not installed.
    TypeError, ValueError
        See `dinocell.results.measure.as_labels`.
    ImageFileError, DINOCellError
        `path` is a folder, or the disk refuses.
    """
    try:
        import roifile
    except ImportError as error:
        raise MissingExtraError(
            "Writing ImageJ ROIs needs the package roifile, which is not installed: run "
            "`pip install dinocell[formats]`."
        ) from error
    polygons = labels_to_polygons(labels)
    try:
        with (
            atomic_path(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for label, pieces in polygons.items():
                rings = [ring[:, ::-1] for piece in pieces for ring in piece]
                roi = roifile.ImagejRoi.frompoints(np.concatenate(rings), name=str(label))
                # the bounds end where the outline does: corners, not pixels
                roi.right -= 1
                roi.bottom -= 1
                if len(rings) == 1:
                    roi.roitype = roifile.ROI_TYPE.TRACED
                else:
                    roi.roitype = roifile.ROI_TYPE.RECT
                    roi.n_coordinates = 0
                    roi.integer_coordinates = None
                    roi.subpixel_coordinates = None
                    roi.multi_coordinates = np.concatenate([_shape_path(ring) for ring in rings])
                    roi.shape_roi_size = len(roi.multi_coordinates)
                # a fixed date keeps the file the same from run to run
                entry = zipfile.ZipInfo(f"{label}.roi", date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(entry, roi.tobytes())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _shape_path(ring: _Ring) -> NDArray[np.float32]:
    """_Ring of (x, y) to ImageJ's shape array: 0 x y (move), 1 x y (line) ..., 4 (close)."""
    path = np.ones((len(ring), 3), np.float32)
    path[0, 0] = 0
    path[:, 1:] = ring
    return np.append(path.reshape(-1), np.float32(4))


def labels_to_rle(labels: ArrayLike) -> dict[int, NDArray[np.int64]]:
    """Encode every cell as COCO run lengths over the whole image.

    Parameters
    ----------
    labels : (H, W) integer array_like
        0 is background.

    Returns
    -------
    dict of int to (N,) int64 ndarray
        Per label, ascending, the lengths of alternating runs outside and inside the cell,
        reading the image column by column; the first may be 0, and they add up to H * W.

    Raises
    ------
    TypeError, ValueError
        See `dinocell.results.measure.as_labels`.
    """
    columns = as_labels(labels).T.reshape(-1)
    change = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    begin = np.append(0, change)[: len(columns)]
    end = np.append(change, len(columns))[: len(columns)]
    label = columns[begin]
    order = np.argsort(label, kind="stable")
    order = order[np.searchsorted(label[order], 1) :]  # background comes first
    values, first = np.unique(label[order], return_index=True)
    turns = np.stack([begin[order], end[order]], axis=1)
    encoded = {}
    for value, part in zip(values.tolist(), np.split(turns, first[1:]), strict=False):
        counts = np.diff(part.reshape(-1), prepend=0)
        rest = len(columns) - int(part[-1, 1])
        encoded[value] = np.append(counts, rest) if rest else counts
    return encoded


def compress_rle(counts: ArrayLike) -> str:
    """Pack COCO run lengths into the printable string that COCO tools use.

    Parameters
    ----------
    counts : (N,) integer array_like
        Run lengths, as `labels_to_rle` gives them.

    Returns
    -------
    str
        From the fourth on, a length is stored as its difference to the one two before.  A number
        is written in groups of 5 bits, lowest first; bit 6 of a group says that more follow,
        48 is added, and the sign is that of the last group's top bit.
    """
    lengths = np.asarray(counts, dtype=np.int64)
    stored = lengths.copy()
    stored[3:] -= lengths[1:-2]
    letters = bytearray()
    for number in stored.tolist():
        while True:
            group = number & 31
            number >>= 5
            if number == (-1 if group & 16 else 0):
                letters.append(group + 48)
                break
            letters.append((group | 32) + 48)
    return letters.decode("ascii")


def write_coco_rle(
    path: str | os.PathLike[str],
    labels: ArrayLike,
    *,
    file_name: str = "",
    image_id: int = 1,
    category: str = "cell",
    compressed: bool = True,
) -> None:
    """Write the cells of one image as a COCO instance file with run-length masks.

    Parameters
    ----------
    path : path
        File to write (JSON).
    labels : (H, W) integer array_like
        0 is background.  The label becomes the annotation's id.
    file_name : str
        Name of the image the labels belong to, for the ``images`` entry.
    image_id : int
        Id of that entry.
    category : str
        Name of the only category, id 1.
    compressed : bool
        True: run lengths as COCO's string; False: as a list of numbers.

    Raises
    ------
    TypeError, ValueError
        See `dinocell.results.measure.as_labels`.
    ImageFileError, DINOCellError
        `path` is a folder, or the disk refuses.

    Notes
    -----
    ``bbox`` is x, y, width, height in pixels; ``area`` counts pixels; ``iscrowd`` is 0.
    """
    labels = as_labels(labels)
    height, width = labels.shape
    annotations = []
    for label, counts in labels_to_rle(labels).items():
        # where the cell's runs begin and end in column order; a run may go on in the next column
        ends = np.cumsum(counts)
        begin, last = ends[0:-1:2] if len(ends) % 2 else ends[0::2], ends[1::2] - 1
        min_col, max_col = int(begin[0]) // height, int(last[-1]) // height
        wraps = bool(np.any(begin // height != last // height))
        min_row = 0 if wraps else int(np.min(begin % height))
        max_row = height - 1 if wraps else int(np.max(last % height))
        annotations.append(
            {
                "id": label,
                "image_id": image_id,
                "category_id": 1,
                "segmentation": {
                    "size": [height, width],
                    "counts": compress_rle(counts) if compressed else counts.tolist(),
                },
                "area": int(counts[1::2].sum()),
                "bbox": [min_col, min_row, max_col - min_col + 1, max_row - min_row + 1],
                "iscrowd": 0,
            }
        )
    document = {
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": category}],
    }
    _write_text(path, json.dumps(document, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class Exporter:
    """One format of `EXPORT_FORMATS`.

    Attributes
    ----------
    suffix : str
        What follows the image's name in the file name: ``_outlines.geojson``.
    description : str
        One line for ``--help``.
    write : callable
        ``write(path, labels, table)``; the table may be None.  Of the table, the outlines take the
        measurements and TIFF takes the pixel size; the other formats hold neither.
    """

    suffix: str
    description: str
    write: Callable[[Path, NDArray[Any], CellTable | None], None]


def _export_label_image(path: Path, labels: NDArray[Any], table: CellTable | None) -> None:
    write_labels(path, labels, pixel_size_um=table.pixel_size_um if table is not None else None)


def _export_rois(path: Path, labels: NDArray[Any], table: CellTable | None) -> None:
    write_imagej_rois(path, labels)


def _export_coco(path: Path, labels: NDArray[Any], table: CellTable | None) -> None:
    write_coco_rle(path, labels)


EXPORT_FORMATS: Mapping[str, Exporter] = MappingProxyType(
    {
        "tif": Exporter(
            "_labels.tif", "label image, TIFF, 16 bit or above 65,535 cells 32", _export_label_image
        ),
        "png": Exporter(
            "_labels.png", "label image, 16 bit PNG, at most 65,535 cells", _export_label_image
        ),
        "geojson": Exporter(
            "_outlines.geojson", "outlines and measurements, for QuPath", write_geojson
        ),
        "roi": Exporter("_RoiSet.zip", "outlines, for the ImageJ ROI manager", _export_rois),
        "coco": Exporter("_coco.json", "run-length masks, COCO instances", _export_coco),
    }
)
"""What `dinocell segment --format` takes, by name."""
