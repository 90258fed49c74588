"""Read TIFF, OME-TIFF and ImageJ TIFF files: planes, channel names and the size of a pixel."""

import contextlib
import logging
import math
import re
import struct
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dinocell.errors import ImageFileError
from dinocell.io.planes import (
    RGB_NAMES,
    RawImage,
    Selection,
    channel_positions,
    check_page,
    check_size,
    num_planes,
)
from dinocell.scratch import copied, is_large, new_image, picked, zeros_in_file

_METRIC = (
    *(("", "", 1e6), ("d", "deci", 1e5), ("c", "centi", 1e4), ("m", "milli", 1e3)),
    *(("u", "micro", 1.0), ("n", "nano", 1e-3), ("p", "pico", 1e-6)),
)
_UM_PER_UNIT: dict[str, float] = {
    **{f"{short}m": factor for short, _, factor in _METRIC},
    **{f"{long}meter": factor for _, long, factor in _METRIC},
    **dict.fromkeys(("umeter", "u", "micron"), 1.0),
    **dict.fromkeys(("å", "angstrom", "ångstrom"), 1e-4),
    **dict.fromkeys(("in", "inch", "inche", '"'), 25_400.0),
}
"""µm in a unit of length, as `_unit_key` writes it."""

_LARGE_TILE_PX = 2**26  # a larger tile needs a larger image: damage must not ask for all memory
_NO_LENGTH = ("", "none", "pixel", "px", "referenceframe")  # of a picture without calibration
_COARSEST_UM = 20.0  # an ImageJ scale in inch or cm coarser than this is a printing default


class _TiffLog(logging.Filter):
    """Keeps tifffile's complaints off the screen, and the serious ones for our message."""

    def __init__(self) -> None:
        super().__init__()
        self._local = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        kept: list[str] | None = getattr(self._local, "kept", None)
        if kept is None:
            return True
        if record.levelno >= logging.ERROR:
            kept.append(record.getMessage())
        return False

    @contextlib.contextmanager
    def collect(self) -> Iterator[list[str]]:
        self._local.kept = []
        try:
            yield self._local.kept
        finally:
            self._local.kept = None


_TIFF_LOG = _TiffLog()
logging.getLogger("tifffile").addFilter(_TIFF_LOG)


def _refuse_circle(tif: Any) -> None:
    """Raise ValueError if a page names an earlier one as the next: tifffile would read for ever."""
    file, layout = tif.filehandle, tif.tiff
    seen: set[int] = set()
    file.seek(8 if layout.is_bigtiff else 4)
    while content := file.read(layout.offsetsize):
        if len(content) < layout.offsetsize:
            return
        (offset,) = struct.unpack(layout.offsetformat, content)
        if offset in seen:
            raise ValueError("its pages refer to each other in a circle")
        seen.add(offset)
        file.seek(offset)
        number = file.read(layout.tagnosize)
        if not offset or len(number) < layout.tagnosize:
            return
        (tags,) = struct.unpack(layout.tagnoformat, number)
        file.seek(offset + layout.tagnosize + tags * layout.tagsize)


def read_tiff(path: Path, wanted: Selection) -> RawImage:
    """Read one plane of a TIFF with the wanted channels, and no more pages than that needs."""
    import tifffile

    with _TIFF_LOG.collect() as complaints, tifffile.TiffFile(path) as tif:
        _refuse_circle(tif)
        all_series = [s for s in tif.series if not s.keyframe.is_reduced] or list(tif.series)
        if not all_series:
            raise ValueError(complaints[0] if complaints else "it holds no image")
        layout = [_tiff_axes(s, wanted) for s in all_series]
        if complaints:
            raise ValueError(_without_object_names(complaints[0]))
        page = check_page(path, layout, wanted.page)
        number = 0
        while page >= (in_series := num_planes(*layout[number])):
            page -= in_series
            number += 1
        series, (axes, shape) = all_series[number], layout[number]
        if "C" in axes and "S" in axes:
            raise ImageFileError(
                f"An image must have one channel axis, '{path}' has axes {axes} with sizes "
                f"{' × '.join(map(str, shape))}: export the channels as one stack or as RGB"
            )
        sizes = dict(zip(axes, shape, strict=True))
        check_size(path, sizes["Y"], sizes["X"], wanted.max_pixels)
        keyframe = series.keyframe
        tile = keyframe.tilewidth * keyframe.tilelength * keyframe.tiledepth
        if tile > max(_LARGE_TILE_PX, 4 * sizes["Y"] * sizes["X"]):
            raise ValueError(f"its tiles should have {tile:,} pixels, more than the image")
        notes: list[str] = []
        size_um, names = _tiff_metadata(tif, tif.series.index(series), sizes.get("C", 1), notes)
        positions = None
        if wanted.channels is not None and "C" in axes:
            positions = channel_positions(sizes["C"], names, wanted.channels)
            names = tuple(names[i] for i in positions) if names else None
        pixels = _tiff_plane(series, axes, shape, page, positions, wanted.tile_px)
        if complaints:
            raise ValueError(_without_object_names(complaints[0]))
        is_rgb = "S" in axes
        if is_rgb:
            alpha = [
                i for i, kind in enumerate(reversed(keyframe.extrasamples)) if int(kind) in (1, 2)
            ]
            if alpha:
                keep = [i for i in range(pixels.shape[2]) if pixels.shape[2] - 1 - i not in alpha]
                pixels = picked(pixels, keep)
            is_rgb = int(keyframe.photometric) in (2, 6) and pixels.shape[2] == 3
            names = RGB_NAMES if is_rgb else None
            if pixels.shape[2] == 1:
                pixels = pixels[..., 0]
        if int(keyframe.photometric) == 0 and not wanted.as_labels:  # white is zero
            pixels = _inverted(pixels, keyframe.bitspersample)
        orientation = keyframe.tags.valueof(274, 1)
    return RawImage(
        pixels,
        is_rgb,
        positions is not None,
        size_um,
        names,
        orientation=int(orientation) if isinstance(orientation, int) else 1,
        notes=tuple(notes),
    )


def _inverted(pixels: np.ndarray, bits: int) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return ~pixels
    return np.subtract(2**bits - 1, pixels, out=pixels) if pixels.dtype.kind == "u" else pixels


def _without_object_names(message: str) -> str:
    """tifffile's log lines start with the repr of an object, which says nothing to a reader."""
    return re.sub(r"<[^>]*>\s*", "", message).strip() or message


def _tiff_axes(series: Any, wanted: Selection) -> tuple[str, tuple[int, ...]]:
    """Axes longer than 1 and their sizes; planes without a meaning are channels if these are wanted."""
    axes, shape = str(series.axes), tuple(int(n) for n in series.shape)
    kept = [(a, n) for a, n in zip(axes, shape, strict=True) if n != 1 or a in "YX"]
    axes, shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
    unknown = len(axes) == 3 and axes[0] in "QI" and axes[1:] == "YX"
    if unknown and wanted.channels is not None and wanted.page is None:
        axes = "CYX"
    return axes, shape


def _tiff_plane(
    series: Any,
    axes: str,
    shape: tuple[int, ...],
    page: int,
    positions: list[int] | None,
    tile_px: int | None,
) -> np.ndarray:
    """Plane `page` of a series as (H, W) or (H, W, C), reading no more pages than it needs."""
    leading = [(a, n) for a, n in zip(axes, shape, strict=True) if a not in "YXS"]
    numbers = np.arange(math.prod(n for _, n in leading)).reshape([n for _, n in leading])
    order = [a for a, _ in leading]
    if "C" in order:
        numbers = np.moveaxis(numbers, order.index("C"), -1).reshape(-1, dict(leading)["C"])
    else:
        numbers = numbers.reshape(-1, 1)
    wanted = numbers[page if positions is None else (page, positions)].tolist()
    pages = series.pages
    one_plane_per_page = len(pages) == numbers.size and set(series.keyframe.axes) <= set("YXS")
    if one_plane_per_page:
        planes = [
            _channel_last(_page_pixels(pages[i], tile_px), series.keyframe.axes) for i in wanted
        ]
    else:
        if any(one_page is None for one_page in pages):
            raise ValueError("some of its planes are in other files, which are missing")
        for one_page in pages:
            _check_bytes_present(one_page)
        whole = series.asarray(out=_output(shape, series.dtype, axes, tile_px)).reshape(shape)
        moved = np.moveaxis(whole, [axes.index(a) for a in order], range(len(order)))
        inner = "".join(a for a in axes if a in "YXS")
        moved = moved.reshape(-1, *(shape[axes.index(a)] for a in inner))
        planes = [_channel_last(moved[i], inner) for i in wanted]
    if len(planes) == 1:
        return planes[0]
    stack = new_image((*planes[0].shape, len(planes)), planes[0].dtype, tile_px)
    for channel, plane in enumerate(planes):
        copied(plane, stack[..., channel])
    return stack


def _output(shape: tuple[int, ...], dtype: Any, axes: str, tile_px: int | None) -> Any:
    """An array in a file for the pixels of a large image; None lets tifffile make one."""
    sizes = dict(zip(axes, shape, strict=True))
    large = is_large((sizes["Y"], sizes["X"]), tile_px)
    return zeros_in_file(shape, np.dtype(dtype).newbyteorder("=")) if large else None


def _page_pixels(page: Any, tile_px: int | None) -> np.ndarray:
    if page is None:
        raise ValueError("some of its planes are in other files, which are missing")
    file = page.parent.filehandle
    if not file.closed:
        return _decoded(page, tile_px)
    file.open()  # another file of the same multi-file OME image
    try:
        return _decoded(page, tile_px)
    finally:
        file.close()


def _decoded(page: Any, tile_px: int | None) -> np.ndarray:
    _check_bytes_present(page)
    pixels: np.ndarray = page.asarray(out=_output(page.shape, page.dtype, page.axes, tile_px))
    return pixels


def _channel_last(plane: np.ndarray, axes: str) -> np.ndarray:
    plane = plane.reshape(
        [n for n, a in zip(plane.shape, axes, strict=True) if n != 1 or a in "YX"]
    )
    if plane.ndim == 3 and axes.index("S") < axes.index("Y"):
        plane = np.moveaxis(plane, 0, -1)
    return plane


def _check_bytes_present(page: Any) -> None:
    """Raise when pixels lie beyond the end of the file (tifffile may fill with zeros)."""
    spans = zip(page.dataoffsets, page.databytecounts, strict=False)
    end = max((offset + count for offset, count in spans), default=0)
    size = page.parent.filehandle.size
    if end > size:
        raise ValueError(f"its pixels should reach byte {end:,}, the file has {size:,}")


def _tiff_metadata(
    tif: Any, series_index: int, num_channels: int, notes: list[str]
) -> tuple[float | None, tuple[str, ...] | None]:
    if tif.is_ome and tif.ome_metadata:
        return _ome_metadata(tif.ome_metadata, series_index, num_channels, notes)
    described = tif.imagej_metadata if tif.is_imagej else None
    if not described:
        return None, None
    labels, names = described.get("Labels"), None
    if labels and len(labels) == num_channels and len(set(labels)) == num_channels > 1:
        names = tuple(str(label).strip() for label in labels)
    try:
        # stored as a fraction of two 32-bit numbers: no more than nine digits are meant
        edges = [float(f"{1.0 / float(value):.9g}") for value in tif.pages[0].resolution]
    except (ZeroDivisionError, ValueError, TypeError):
        return None, names
    unit = str(described.get("unit", ""))
    units = [unit, str(described.get("yunit", unit))]  # ImageJ writes the second where it differs
    return _pixel_size_um(edges, units, notes), names


def _ome_metadata(
    xml: str, series_index: int, num_channels: int, notes: list[str]
) -> tuple[float | None, tuple[str, ...] | None]:
    try:
        images = ElementTree.fromstring(xml).findall("{*}Image")
        pixels = images[series_index].find("{*}Pixels") if series_index < len(images) else None
    except ElementTree.ParseError:
        return None, None
    if pixels is None:
        return None, None
    found = [channel.get("Name") for channel in pixels.findall("{*}Channel")]
    names = None
    if len(found) == num_channels and all(found):
        names = tuple(str(name) for name in found)
    try:
        edges = [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "XY"]
    except (KeyError, ValueError):
        return None, names
    units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XY"]
    return _pixel_size_um(edges, units, notes), names


def _unit_key(unit: str) -> str:
    """A unit of length in one spelling: `Micrometres`, `µm` and `\\u00B5m` → `micrometer`, `um`, `um`."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), unit)
    text = unicodedata.normalize("NFKC", text).lower().replace("\u03bc", "u")
    text = re.sub(r"[\s._-]", "", text).replace("metre", "meter").replace("ström", "strom")
    return text.removesuffix("s")


def _pixel_size_um(edges: Sequence[float], units: Sequence[str], notes: list[str]) -> float | None:
    """The edge of a square pixel in µm; None, and why in `notes`, where the file does not give it."""
    sizes: list[float] = []
    for edge, unit in zip(edges, units, strict=True):
        key = _unit_key(unit)
        if key in _NO_LENGTH:
            return None
        if key not in _UM_PER_UNIT:
            notes.append(
                f"The file gives the size of a pixel in {unit!r}, which is not a known unit of length: no "
                "pixel size is used; set `pixel_size_um`"
            )
            return None
        size = edge * _UM_PER_UNIT[key]
        if not math.isfinite(size) or size <= 0:
            notes.append(
                f"The file gives {edge:g} {unit} as the size of a pixel, which cannot be: no pixel size is "
                "used; set `pixel_size_um`"
            )
            return None
        if key in ("inch", "inche", "in", '"', "cm", "centimeter") and size > _COARSEST_UM:
            return None
        sizes.append(size)
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        notes.append(
            f"Pixels must be square for measurements in µm, the file gives {sizes[0]:g} × {sizes[1]:g} "
            "µm: no pixel size is used; set `pixel_size_um`"
        )
        return None
    return sizes[0]
