"""Outlines of cells as a zip of ImageJ ROIs.

The bytes are those that the package roifile writes for the same outlines; it makes one object per cell, which
takes four times as long.
"""

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import ImageFileError
from dinocell.files import writing
from dinocell.labels import as_labels
from dinocell.results.outlines import trace_polygons
from dinocell.results.stored_zip import write_stored_zip

_MAX_ROI_PX = 60_535
"""ImageJ's `RoiDecoder` takes 16-bit positions from 0 to this; it reads those above as negative."""
_BUFFER = 2**20
_MAX_POINTS = 65_535  # of a polygon, whose header counts them in 16 bits
_TRACED, _COMPOSITE = 8, 1
_OPTIONS = 40  # of roifile: scale strokes, and show labels
_HEADER = np.dtype(
    [
        *(("magic", "S4"), ("version", ">u2"), ("type", "u1"), ("unused", "u1")),
        *(("top", ">u2"), ("left", ">u2"), ("bottom", ">u2"), ("right", ">u2")),
        *(("num_points", ">u2"), ("line", "V18"), ("num_floats", ">u4"), ("style", "V10")),
        *(("options", ">u2"), ("arrow", "V8"), ("second_header", ">u4")),
    ]
)
_SECOND_HEADER = np.dtype(
    [("place", "V16"), ("name", ">u4"), ("name_length", ">u4"), ("rest", "V40")]
)


def write_imagej_rois(path: str | os.PathLike[str], labels: ArrayLike) -> None:
    """Write the cells' outlines as a zip of ImageJ ROIs, for the ROI manager of ImageJ and Fiji.

    Parameters
    ----------
    path : path
        File to write, by custom ``RoiSet.zip``.
    labels : (H, W) integer array_like
        0 is background.  Each label becomes one ROI of that name: a traced polygon, or a
        composite where the cell has holes, several pieces or more than 65,535 corners.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`); ImageFileError (a side is longer than
    60,535 px, the last position that ImageJ reads); DINOCellError (`path` is a folder, or the disk refuses).

    Notes
    -----
    The entries are stored without compression, which would take longer than everything else.
    """
    labels = as_labels(labels)
    if max(labels.shape) > _MAX_ROI_PX:
        raise ImageFileError(
            f"ImageJ ROIs hold positions up to {_MAX_ROI_PX:,} px, '{path}' would need "
            f"{max(labels.shape):,}: write geojson or coco instead"
        )
    corners, stops, polygons = trace_polygons(labels)
    rings = [[ring for piece in pieces for ring in piece] for pieces in polygons.values()]
    names = [str(label) for label in polygons]
    begin = np.append(0, stops)
    places = _places(corners, begin, rings)
    paths = {
        number: b"".join(_shape_path(corners[begin[ring] : begin[ring + 1]]) for ring in own)
        for number, own in enumerate(rings)
        if len(own) > 1 or begin[own[0] + 1] - begin[own[0]] > _MAX_POINTS
    }
    before, after = _headers(begin, rings, places, names, paths)
    along_x, along_y = _from_first_corner(corners, begin)
    with writing(path) as temporary, temporary.open("wb", buffering=_BUFFER) as file:
        write_stored_zip(
            file, _entries(begin, rings, names, (before, after), (along_x, along_y), paths)
        )


def _entries(
    begin: NDArray[np.int64],
    rings: list[list[int]],
    names: list[str],
    headers: tuple[bytes, bytes],
    along: tuple[bytes, bytes],
    paths: dict[int, bytes],
) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each ROI."""
    bounds = (2 * begin).tolist()
    (before, after), (along_x, along_y) = headers, along
    for number, (own, name) in enumerate(zip(rings, names, strict=True)):
        shape = paths.get(number)
        if shape is None:
            first, stop = bounds[own[0]], bounds[own[0] + 1]
            shape = along_x[first:stop] + along_y[first:stop]
        at = 64 * number
        content = before[at : at + 64] + shape + after[at : at + 64] + name.encode("utf-16-be")
        yield f"{name}.roi", content


def _places(
    corners: NDArray[np.int64], begin: NDArray[np.int64], rings: list[list[int]]
) -> NDArray[np.int64]:
    """Top, left, bottom and right of each cell: where its outline ends."""
    if not rings:
        return np.empty((0, 4), np.int64)
    low, high = (fold.reduceat(corners, begin[:-1], axis=0) for fold in (np.minimum, np.maximum))
    first = np.cumsum([0, *map(len, rings)])[:-1]
    order = np.concatenate(rings)
    own_low, own_high = (
        np.minimum.reduceat(low[order], first),
        np.maximum.reduceat(high[order], first),
    )
    return np.concatenate([own_low, own_high], axis=1)


def _from_first_corner(corners: NDArray[np.int64], begin: NDArray[np.int64]) -> tuple[bytes, bytes]:
    """Positions along x and y of all corners, from the left and the top of their ring."""
    if not len(corners):
        return b"", b""
    low = np.minimum.reduceat(corners, begin[:-1], axis=0)
    near = (corners - np.repeat(low, np.diff(begin), axis=0)).astype(">u2")
    return near[:, 1].tobytes(), near[:, 0].tobytes()


def _headers(
    begin: NDArray[np.int64],
    rings: list[list[int]],
    places: NDArray[np.int64],
    names: list[str],
    paths: dict[int, bytes],
) -> tuple[bytes, bytes]:
    """The two headers of all ROIs, 64 bytes each: before the outline, and after it, before the name."""
    num_points = (begin[1:] - begin[:-1])[[own[0] for own in rings]] if rings else begin[:0]
    lengths = 4 * num_points
    header = np.zeros(len(rings), _HEADER)
    header["magic"], header["version"], header["options"] = b"Iout", 229, _OPTIONS
    header["type"], header["num_points"] = _TRACED, np.minimum(num_points, _MAX_POINTS)
    for number, path in paths.items():
        header[number]["type"], header[number]["num_points"] = _COMPOSITE, 0
        header[number]["num_floats"] = len(path) // 4
        lengths[number] = len(path)
    for side, name in enumerate(("top", "left", "bottom", "right")):
        header[name] = places[:, side]
    header["second_header"] = _HEADER.itemsize + lengths
    second = np.zeros(len(rings), _SECOND_HEADER)
    second["name"] = _HEADER.itemsize + lengths + _SECOND_HEADER.itemsize
    second["name_length"] = list(map(len, names))
    return header.tobytes(), second.tobytes()


def _shape_path(ring: NDArray[np.int64]) -> bytes:
    """Ring of (row, col) to ImageJ's shape array: 0 x y (move), 1 x y (line) ..., 4 (close)."""
    path = np.ones((len(ring), 3), ">f4")
    path[0, 0] = 0
    path[:, 1:] = ring[:, ::-1]
    return path.tobytes() + np.array(4, ">f4").tobytes()
