"""Labels and tables to the files other programs read.

Every file appears under its name when it is complete; a failure leaves the old file as it was, and
missing folders are made.  A label image without cells gives a valid file without cells.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import MissingExtraError
from dinocell.io import write_labels
from dinocell.labels import as_labels
from dinocell.results.outlines import Ring, labels_to_polygons
from dinocell.results.table import CellTable, writing

_OBJECT_TYPES = ("detection", "annotation", "cell")


def _write_text(path: str | os.PathLike[str], text: str) -> None:
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


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
        `dinocell.labels.as_labels`.
    DINOCellError
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


def _closed_xy(ring: Ring) -> list[list[int]]:
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
        See `dinocell.labels.as_labels`.
    DINOCellError
        `path` is a folder, or the disk refuses.
    """
    try:
        import roifile
    except ImportError as error:
        raise MissingExtraError(
            "Writing ImageJ ROIs needs the package roifile, which is not installed: run "
            "`pip install dinocell-segmentation[formats]`."
        ) from error
    polygons = labels_to_polygons(labels)
    with (
        writing(path) as temporary,
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


def _shape_path(ring: Ring) -> NDArray[np.float32]:
    """Ring of (x, y) to ImageJ's shape array: 0 x y (move), 1 x y (line) ..., 4 (close)."""
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
        See `dinocell.labels.as_labels`.
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
        See `dinocell.labels.as_labels`.
    DINOCellError
        `path` is a folder, or the disk refuses.

    Notes
    -----
    ``bbox`` is x, y, width, height in pixels; ``area`` counts pixels; ``iscrowd`` is 0.
    """
    labels = as_labels(labels)
    height, width = labels.shape
    annotations = []
    for label, counts in labels_to_rle(labels).items():
        # where the cell's runs begin and end in column order; a run may continue in the next column
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
        One line for the help text.
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
"""What `dinocell segment` writes, by name."""
