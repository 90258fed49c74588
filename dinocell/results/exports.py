"""Outlines and run lengths of cells as files that other programs read: GeoJSON and COCO.

Every file appears under its name when it is complete; a failure leaves the old file as it was, and
missing folders are made.  A label image without cells gives a valid file without cells.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.files import writing
from dinocell.labels import as_labels
from dinocell.results.colors import CELL_COLORS
from dinocell.results.outlines import Polygons, trace_polygons
from dinocell.results.table import CellTable

_BUFFER = 2**20
_CELLS_AT_A_TIME = 1024
"""Rows of the table that are Python values at a time: all of a large image would fill the memory."""


def write_geojson(
    path: str | os.PathLike[str],
    labels: ArrayLike,
    table: CellTable | None = None,
    nuclei: ArrayLike | None = None,
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
    nuclei : (H, W) integer array_like, optional
        The nucleus of each cell, with its number: becomes its ``nucleusGeometry``.

    Raises
    ------
    ValueError
        `table` does not hold the same labels.  Also see `dinocell.labels.as_labels`.
    DINOCellError
        `path` is a folder, or the disk refuses.

    Notes
    -----
    One Feature per label, which becomes a cell of that name with a colour of `CELL_COLORS`: a Polygon, or a MultiPolygon for a cell in pieces
    (diagonal contact separates pieces).  Positions are (x, y) = (col, row) in pixels from the corner of
    the image; rings are closed, outer ones counter-clockwise in (x, y) as RFC 7946 section 3.1.6 asks.
    """
    corners, stops, polygons = trace_polygons(labels)
    if table is not None and table["label"].tolist() != list(polygons):
        raise ValueError(
            f"`table` must hold the same labels as the image, got {len(table)} rows for "
            f"{len(polygons)} cells: call `measure_labels` on these labels"
        )
    inner = {} if nuclei is None else dict(_geometries(*trace_polygons(nuclei)))
    features = _features(_geometries(corners, stops, polygons), table, inner)
    with writing(path) as temporary, temporary.open("wb", buffering=_BUFFER) as file:
        file.write(b'{"type":"FeatureCollection","features":[')
        _write_objects(file, features, b"\n", b",\n")
        file.write(b"\n]}\n" if polygons else b"\n\n]}\n")


def _geometries(
    corners: NDArray[np.int64], stops: NDArray[np.int64], polygons: Mapping[int, Polygons]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield label and geometry of each cell of `trace_polygons`."""
    first, number = np.append(0, stops)[:-1], np.arange(len(stops))
    xy = np.insert(corners[:, ::-1], stops, corners[first, ::-1], axis=0)  # closed rings
    bounds = np.stack([first + number, stops + number + 1], axis=1).tolist()
    for label, pieces in polygons.items():
        rings = [[xy[slice(*bounds[ring])] for ring in piece] for piece in pieces]
        kind, coordinates = ("Polygon", rings[0]) if len(rings) == 1 else ("MultiPolygon", rings)
        yield label, {"type": kind, "coordinates": coordinates}


def _features(
    geometries: Iterable[tuple[int, dict[str, Any]]],
    table: CellTable | None,
    nuclei: Mapping[int, dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield the feature of each cell."""
    measured = _measurements(table) if table is not None else None
    for label, geometry in geometries:
        properties = {
            "objectType": "cell",
            "name": str(label),
            "label": label,
            "color": CELL_COLORS[label % len(CELL_COLORS)],
        }
        if measured is not None:
            properties["measurements"] = next(measured)
        inner = {"nucleusGeometry": nuclei[label]} if label in nuclei else {}
        yield {"type": "Feature", "geometry": geometry, **inner, "properties": properties}


def _measurements(table: CellTable) -> Iterator[dict[str, Any]]:
    """Yield the finite measurements of each cell, in one dictionary that the next cell changes."""
    names = table.columns
    every: dict[str, Any] = dict.fromkeys(names)
    finite = np.all([np.isfinite(column) for column in table.data.values()], axis=0)
    for begin in range(0, len(table), _CELLS_AT_A_TIME):
        columns = [column[begin : begin + _CELLS_AT_A_TIME] for column in table.data.values()]
        columns = [c.astype(np.int64) if c.dtype == np.bool_ else c for c in columns]
        rows = zip(*[column.tolist() for column in columns], strict=True)
        whole = finite[begin : begin + _CELLS_AT_A_TIME].tolist()
        for row, is_finite in zip(rows, whole, strict=True):
            every.update(zip(names, row, strict=True))
            yield every if is_finite else {n: v for n, v in every.items() if math.isfinite(v)}


def _write_objects(
    file: BinaryIO, objects: Iterable[dict[str, Any]], before: bytes, between: bytes
) -> None:
    """Write objects of JSON one after the other: the text of all would fill the memory."""
    for item in objects:
        file.write(before)
        file.write(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY))
        before = between


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


def write_coco_rle(path: str | os.PathLike[str], labels: ArrayLike, *, file_name: str = "") -> None:
    """Write the cells of one image as a COCO instance file with run-length masks (JSON).

    Parameters
    ----------
    path : path
        File to write.
    labels : (H, W) integer array_like
        0 is background.  The label becomes the annotation's id.
    file_name : name of the image's file

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
    letters, ends = _rle_letters(counts, stops)
    text = letters.tobytes().decode("ascii")
    shapes = _areas_and_boxes(begin, end, first, height).tolist()
    annotations = (
        {
            "id": label,
            "image_id": 1,
            "category_id": 1,
            "segmentation": {"size": (height, width), "counts": text[start:stop]},
            "area": area,
            "bbox": box,
            "iscrowd": 0,
        }
        for label, (area, *box), start, stop in zip(
            values.tolist(), shapes, np.append(0, ends)[:-1].tolist(), ends.tolist(), strict=True
        )
    )
    image = {"id": 1, "file_name": file_name, "height": height, "width": width}
    with writing(path) as temporary, temporary.open("wb", buffering=_BUFFER) as file:
        file.write(b'{"images":[' + orjson.dumps(image) + b'],"annotations":[')
        _write_objects(file, annotations, b"", b",")
        file.write(b'],"categories":[{"id":1,"name":"cell"}]}\n')


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
