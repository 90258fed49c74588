"""Labels and tables to the files other programs read.

Every file appears under its name when it is complete; a failure leaves the old file as it was, and
missing folders are made.  A label image without cells gives a valid file without cells.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.errors import ImageFileError
from dinocell.io import write_labels
from dinocell.io.projects import import_roifile
from dinocell.labels import as_labels
from dinocell.results.number_texts import objects_of_numbers
from dinocell.results.outlines import Polygons, Ring, labels_to_polygons, trace_polygons, xy_texts
from dinocell.results.table import CellTable, write_text, writing

_MAX_ROI_PX = 60_535
"""ImageJ's `RoiDecoder` takes 16-bit positions from 0 to this; it reads those above as negative."""
_WRITTEN_CELLS = 1024
"""Cells whose text is made at a time: of a large image, all of it would fill the memory."""


def write_geojson(
    path: str | os.PathLike[str], labels: ArrayLike, table: CellTable | None = None
) -> None:
    """Write the cells' outlines as a GeoJSON FeatureCollection that QuPath opens.

    Parameters
    ----------
    path : path
        File to write.
    labels : (H, W) integer array_like
        0 is background.
    table : CellTable, optional
        `measure_labels(labels, ...)`: every column becomes a measurement of the cell; missing and infinite
        values are left out, booleans are 0 and 1.

    Raises
    ------
    ValueError
        `table` does not hold the same labels.  Also see `dinocell.labels.as_labels`.
    DINOCellError
        `path` is a folder, or the disk refuses.

    Notes
    -----
    One Feature per label, which becomes a detection: a Polygon, or a MultiPolygon for a cell in pieces
    (diagonal contact separates pieces).  Positions are (x, y) = (col, row) in pixels from the corner of
    the image; rings are closed, outer ones counter-clockwise in (x, y) as RFC 7946 section 3.1.6 asks.
    """
    corners, stops, polygons = trace_polygons(labels)
    if table is not None and table["label"].tolist() != list(polygons):
        raise ValueError(
            f"`table` must hold the same labels as the image, got {len(table)} rows for "
            f"{len(polygons)} cells: call `measure_labels` on these labels"
        )
    rings = _split_letters(*xy_texts(corners, stops))
    middle = '},"properties":{"objectType":"detection","name":"'
    cells = iter(polygons.items())
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(b'{"type":"FeatureCollection","features":[')
        for first in range(0, len(polygons), _WRITTEN_CELLS):
            heads = [
                f',\n{{"type":"Feature","geometry":{{"type":{_geometry(pieces, rings)}{middle}{label}",'
                f'"label":{label}'
                for label, pieces in islice(cells, _WRITTEN_CELLS)
            ]
            if not first:
                heads[0] = heads[0][1:]
            file.write(_with_measurements(heads, table, first))
        file.write(b"\n]}\n" if polygons else b"\n\n]}\n")


def _geometry(pieces: Polygons, rings: list[str]) -> str:
    """Type and coordinates of a cell in JSON."""
    if len(pieces) == 1:
        return f'"Polygon","coordinates":[{",".join([rings[ring] for ring in pieces[0]])}]'
    parts = ["[" + ",".join([rings[ring] for ring in piece]) + "]" for piece in pieces]
    return f'"MultiPolygon","coordinates":[{",".join(parts)}]'


def _with_measurements(heads: list[str], table: CellTable | None, first: int) -> Any:
    """The letters of features whose text lacks its end, which the table continues from row `first`."""
    if table is None:
        return ("}}".join(heads) + "}}").encode("ascii")
    columns = [column[first : first + len(heads)] for column in table.data.values()]
    types = {"f": np.float64, "u": np.uint64}
    columns = [column.astype(types.get(column.dtype.kind, np.int64)) for column in columns]
    kinds = np.array([ord(column.dtype.kind) for column in columns], np.uint8)
    rows = np.stack([column.view(np.uint64) for column in columns], 1)
    starts = [head + ',"measurements":' for head in heads]
    return objects_of_numbers(starts, rows, kinds, table.columns, "}}").data


def _split_letters(letters: NDArray[np.uint8], ends: NDArray[np.int64]) -> list[str]:
    """Texts that follow one another as ASCII letters, and end where `ends` says."""
    text, stop = letters.tobytes().decode("ascii"), ends.tolist()
    return [text[begin:end] for begin, end in zip([0, *stop], stop, strict=False)]


def write_imagej_rois(path: str | os.PathLike[str], labels: ArrayLike) -> None:
    """Write the cells' outlines as a zip of ImageJ ROIs, for the ROI manager of ImageJ and Fiji.

    Parameters
    ----------
    path : path
        File to write, by custom ``RoiSet.zip``.
    labels : (H, W) integer array_like
        0 is background.  Each label becomes one ROI of that name: a traced polygon, or a
        composite where the cell has holes or several pieces.

    Raises MissingExtraError (the package `roifile` is not installed); TypeError, ValueError (see
    `dinocell.labels.as_labels`); ImageFileError (a side is longer than 60,535 px, the last position that
    ImageJ reads); DINOCellError (`path` is a folder, or the disk refuses).
    """
    labels = as_labels(labels)
    if max(labels.shape) > _MAX_ROI_PX:
        raise ImageFileError(
            f"ImageJ ROIs hold positions up to {_MAX_ROI_PX:,} px, '{path}' would need "
            f"{max(labels.shape):,}: write geojson or coco instead"
        )
    roifile = import_roifile()
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


def _column_runs(labels: NDArray[np.uint32]) -> tuple[NDArray[Any], ...]:
    """Labels, ascending; begin and end of the runs of each, in column order; each label's first run."""
    columns = labels.T.reshape(-1)
    change = np.flatnonzero(columns[1:] != columns[:-1]) + 1
    begin = np.append(0, change)[: len(columns)]
    end = np.append(change, len(columns))[: len(columns)]
    label = columns[begin]
    order = np.argsort(label, kind="stable")
    order = order[np.searchsorted(label[order], 1) :]  # background comes first
    values, first = np.unique(label[order], return_index=True)
    return values, begin[order], end[order], first


def _run_lengths(
    begin: NDArray[Any], end: NDArray[Any], first: NDArray[Any], num_pixels: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lengths outside and inside in turn, of all labels one after the other, and where each ends."""
    before = np.append(0, end)[:-1]
    before[first] = 0
    counts = np.stack([begin - before, end - begin], axis=1).reshape(-1)
    stops = 2 * np.append(first, len(begin))[1:]
    rest = num_pixels - end[stops // 2 - 1]
    counts = np.insert(counts, stops[rest > 0], rest[rest > 0])
    return counts, stops + np.cumsum(rest > 0)


@njit
def _rle_letters(counts: NDArray[Any], stops: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Pack run lengths, lists one after the other that end at `stops`, into the letters that COCO tools use.

    From the fourth of a list on, a length is stored as its difference to the one two before.  A number
    is written in groups of 5 bits, lowest first; bit 6 of a group says that more follow, 48 is added,
    and the sign is that of the last group's top bit.  Returns the letters, and where each list's end.
    """
    letters = np.empty(13 * len(counts), np.uint8)  # 64 bits in groups of 5
    ends = np.empty(len(stops), np.int64)
    at = 0
    begin = 0
    for k in range(len(stops)):
        for i in range(begin, stops[k]):
            number = counts[i] - (counts[i - 2] if i > begin + 2 else 0)
            while True:
                group = number & 31
                number >>= 5
                last = number == (-1 if group & 16 else 0)
                letters[at] = (group if last else group | 32) + 48
                at += 1
                if last:
                    break
        begin = stops[k]
        ends[k] = at
    return letters[:at], ends


def write_coco_rle(path: str | os.PathLike[str], labels: ArrayLike) -> None:
    """Write the cells of one image as a COCO instance file with run-length masks (JSON).

    Parameters
    ----------
    path : path
        File to write.
    labels : (H, W) integer array_like
        0 is background.  The label becomes the annotation's id.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`); DINOCellError (`path` is a folder, or
    the disk refuses).

    Notes
    -----
    A mask holds the lengths of alternating runs outside and inside the cell, reading the image column by
    column, as COCO's string; the first may be 0, and they add up to H * W.  ``bbox`` is x, y, width,
    height in pixels; ``area`` counts pixels; ``iscrowd`` is 0.
    """
    labels = as_labels(labels)
    height, width = labels.shape
    values, begin, end, first = _column_runs(labels)
    counts, stops = _run_lengths(begin, end, first, labels.size)
    masks = [json.dumps(text) for text in _split_letters(*_rle_letters(counts, stops))]
    numbers = zip(
        values.tolist(), _areas_and_boxes(begin, end, first, height).tolist(), masks, strict=True
    )
    texts = [
        f'{{"id":{label},"image_id":1,"category_id":1,"segmentation":{{"size":[{height},{width}],'
        f'"counts":{mask}}},"area":{area},"bbox":[{x},{y},{w},{h}],"iscrowd":0}}'
        for label, (area, x, y, w, h), mask in numbers
    ]
    write_text(
        path,
        f'{{"images":[{{"id":1,"file_name":"","height":{height},"width":{width}}}],"annotations":'
        f'[{",".join(texts)}],"categories":[{{"id":1,"name":"cell"}}]}}\n',
    )


def _areas_and_boxes(
    begin: NDArray[Any], end: NDArray[Any], first: NDArray[Any], height: int
) -> NDArray[np.int64]:
    """(area, x, y, width, height) of each cell in px, from its runs in column order."""
    if not len(first):
        return np.empty((0, 5), np.int64)
    last = end - 1
    wraps = np.logical_or.reduceat(begin // height != last // height, first)  # into the next column
    min_col = begin[first] // height
    max_col = last[np.append(first, len(end))[1:] - 1] // height
    min_row = np.where(wraps, 0, np.minimum.reduceat(begin % height, first))
    max_row = np.where(wraps, height - 1, np.maximum.reduceat(last % height, first))
    area = np.add.reduceat(end - begin, first)
    return np.stack([area, min_col, min_row, max_col - min_col + 1, max_row - min_row + 1], axis=1)


class Exporter(NamedTuple):
    """One format of `EXPORT_FORMATS`.

    `suffix` follows the image's name in the file name: ``_outlines.geojson``.  Of the table, which may
    be None, the outlines take the measurements and TIFF takes the pixel size.
    """

    suffix: str
    write: Callable[[Path, NDArray[Any], CellTable | None], None]


def _export_label_image(path: Path, labels: NDArray[Any], table: CellTable | None) -> None:
    write_labels(path, labels, pixel_size_um=table.pixel_size_um if table is not None else None)


EXPORT_FORMATS: Mapping[str, Exporter] = MappingProxyType(
    {
        "tif": Exporter("_labels.tif", _export_label_image),  # 16 bit, or 32 above 65,535 cells
        "png": Exporter("_labels.png", _export_label_image),  # 16 bit, at most 65,535 cells
        "geojson": Exporter("_outlines.geojson", write_geojson),
        "roi": Exporter("_RoiSet.zip", lambda path, labels, _: write_imagej_rois(path, labels)),
        "coco": Exporter("_coco.json", lambda path, labels, _: write_coco_rle(path, labels)),
    }
)
"""What `dinocell segment` writes, by name."""
