"""Read TIFF, OME-TIFF and ImageJ TIFF files: planes, channel names and the size of a pixel."""

import contextlib
import logging
import math
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from dinocell.io.planes import RGB_NAMES, RawImage, Selection, known_colours
from dinocell.io.stacks import Choice, Series, Stack, series_of, stacked
from dinocell.io.units import length_um, pixel_edges_um
from dinocell.scratch import is_large, picked, zeros_in_file

_NO_OME = (
    "The OME metadata that the file should have is missing, damaged or in another file: names of channels "
    "and the size of a pixel may be lacking"
)
_LARGE_TILE_PX = 2**26  # a larger tile needs a larger image: damage must not ask for all memory


class _LibraryLog(logging.Filter):
    """Keeps the complaints of a library off the screen, and the serious ones for our message."""

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


LIBRARY_LOG = _LibraryLog()
for _name in ("tifffile", "liffile"):
    logging.getLogger(_name).addFilter(LIBRARY_LOG)


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


def _refuse_other_folders(tif: Any) -> None:
    """Raise ValueError if an OME-TIFF names a file outside its folder: tifffile would read any file."""
    with contextlib.suppress(ElementTree.ParseError):  # then tifffile follows no names either
        root = ElementTree.fromstring(tif.ome_metadata or "<OME/>")
        for part in root.iter():
            name, own = part.get("FileName", ""), part.text and part.text == root.get("UUID")
            if part.tag.endswith("UUID") and not own and name != PureWindowsPath(name).name:
                raise ValueError(f"its planes are in a file of another folder, {name!r}")


@contextlib.contextmanager
def open_tiff(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Open a TIFF; `read` reads no more pages than a plane with the chosen channels needs."""
    import tifffile

    with LIBRARY_LOG.collect() as complaints, tifffile.TiffFile(path) as tif:
        _refuse_circle(tif)
        _refuse_other_folders(tif)
        all_series = [s for s in tif.series if not s.keyframe.is_reduced] or list(tif.series)
        if not all_series:
            raise ValueError(complaints[0] if complaints else "it holds no image")
        described = _Description(tif)
        found = [described.series(s, tif.series.index(s)) for s in all_series]
        if complaints:
            raise ValueError(_without_object_names(complaints[0]))

        def read(choice: Choice, page: int) -> RawImage:
            raw = _read_plane(all_series[choice.number], choice, page, wanted)
            if complaints:
                raise ValueError(_without_object_names(complaints[0]))
            return raw

        kind = "OME-TIFF" if tif.is_ome else "ImageJ TIFF" if tif.is_imagej else "TIFF"
        yield Stack(kind, found, read)


def _read_plane(series: Any, choice: Choice, page: int, wanted: Selection) -> RawImage:
    sizes, keyframe = choice.series.sizes, series.keyframe
    tile = keyframe.tilewidth * keyframe.tilelength * keyframe.tiledepth
    if tile > max(_LARGE_TILE_PX, 4 * sizes["Y"] * sizes["X"]):
        raise ValueError(f"its tiles should have {tile:,} pixels, more than the image")
    pixels = _tiff_plane(series, choice, page, wanted.tile_px)
    names, is_rgb = choice.channel_names, False
    if "S" in sizes:
        alpha = _alpha(keyframe)
        if alpha:
            keep = [i for i in range(pixels.shape[2]) if pixels.shape[2] - 1 - i not in alpha]
            pixels = picked(pixels, keep)
        is_rgb = names is not None
        if pixels.shape[2] == 1:
            pixels = pixels[..., 0]
    if int(keyframe.photometric) == 0 and not wanted.as_labels:  # white is zero
        pixels = _inverted(pixels, keyframe.bitspersample)
    return RawImage(
        pixels,
        is_rgb,
        choice.positions is not None,
        choice.series.edge_um,
        names,
        orientation=choice.series.orientation,
        notes=choice.series.notes,
    )


def _alpha(keyframe: Any) -> list[int]:
    """Samples of a pixel that are its opacity, counted from the last."""
    return [i for i, kind in enumerate(reversed(keyframe.extrasamples)) if int(kind) in (1, 2)]


def _inverted(pixels: np.ndarray, bits: int) -> np.ndarray:
    if pixels.dtype == np.bool_:
        return ~pixels
    return np.subtract(2**bits - 1, pixels, out=pixels) if pixels.dtype.kind == "u" else pixels


def _without_object_names(message: str) -> str:
    """tifffile's log lines start with the repr of an object, which says nothing to a reader."""
    return re.sub(r"<[^>]*>\s*", "", message).strip() or message


def _tiff_plane(series: Any, choice: Choice, page: int, tile_px: int | None) -> np.ndarray:
    """Plane `page` of a series as (H, W) or (H, W, C), reading no more pages than it needs."""
    axes, shape = choice.series.axes, choice.series.shape
    leading = [(a, n) for a, n in zip(axes, shape, strict=True) if a not in "YXS"]
    numbers = np.arange(math.prod(n for _, n in leading)).reshape([n for _, n in leading])
    order = [a for a, _ in leading]
    if "C" in order:
        numbers = np.moveaxis(numbers, order.index("C"), -1).reshape(-1, dict(leading)["C"])
    else:
        numbers = numbers.reshape(-1, 1)
    chosen = numbers[page] if choice.positions is None else numbers[page, list(choice.positions)]
    wanted = chosen.tolist()
    pages = series.pages
    one_plane_per_page = len(pages) == numbers.size and set(series.keyframe.axes) <= set("YXS")
    if one_plane_per_page:
        planes = (
            _channel_last(_page_pixels(pages[i], tile_px), series.keyframe.axes) for i in wanted
        )
    else:
        if any(one_page is None for one_page in pages):
            raise ValueError("some of its planes are in other files, which are missing")
        for one_page in pages:
            _check_bytes_present(one_page)
        whole = series.asarray(out=_output(shape, series.dtype, axes, tile_px)).reshape(shape)
        moved = np.moveaxis(whole, [axes.index(a) for a in order], range(len(order)))
        inner = "".join(a for a in axes if a in "YXS")
        moved = moved.reshape(-1, *(shape[axes.index(a)] for a in inner))
        planes = (_channel_last(moved[i], inner) for i in wanted)
    return stacked(planes, len(wanted), tile_px)


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


class _Description:
    """What the metadata of a TIFF says on its images: OME-XML, or that of ImageJ."""

    def __init__(self, tif: Any) -> None:
        self.tif = tif
        self.images: list[Any] = []
        self.is_ome = bool(tif.is_ome and tif.ome_metadata)
        if self.is_ome:
            with contextlib.suppress(ElementTree.ParseError):
                self.images = ElementTree.fromstring(tif.ome_metadata).findall("{*}Image")

    def series(self, series: Any, place: int) -> Series:
        """Axes, names and sizes of one image; `place` is its number among all of the file."""
        sizes = dict(
            zip(str(series.axes), map(int, series.shape), strict=True)
        )  # C and S occur once
        keyframe, channels = series.keyframe, sizes.get("C", 1)
        described: dict[str, Any] = {}
        turned = keyframe.tags.valueof(274, 1)
        if self.is_ome:
            if place < len(self.images):
                described = _of_ome(self.images[place], channels)
        elif self.tif.is_imagej and self.tif.imagej_metadata:
            described = _of_imagej(self.tif, channels)
        if sizes.get("S", 1) > 1:
            is_rgb = int(keyframe.photometric) in (2, 6) and sizes["S"] - len(_alpha(keyframe)) == 3
            described["channel_names"] = RGB_NAMES if is_rgb else None
        # tifffile's kinds for pages without a description that it can use
        should_be_ome = self.is_ome or self.tif.filename.lower().endswith((".ome.tif", ".ome.tiff"))
        if should_be_ome and series.kind in ("generic", "uniform"):
            described["notes"] = (*described.get("notes", ()), _NO_OME)
        described["orientation"] = turned if isinstance(turned, int) else 1
        return series_of(str(series.axes), map(int, series.shape), series.dtype, **described)


def _of_imagej(tif: Any, num_channels: int) -> dict[str, Any]:
    described = tif.imagej_metadata
    labels, names = described.get("Labels"), None
    if labels and len(labels) == num_channels and len(set(labels)) == num_channels > 1:
        names = tuple(str(label).strip() for label in labels)
    unit = str(described.get("unit", ""))
    tables = [np.asarray(table) for table in described.get("LUTs") or ()]  # (3, 256), black first
    brightest = ["".join(f"{part:02x}" for part in table[:, -1]) for table in tables]
    found = {"channel_names": names, "channel_colours": known_colours(brightest, num_channels)}
    try:
        # stored as a fraction of two 32-bit numbers: no more than nine digits are meant
        edges = [float(f"{1.0 / float(value):.9g}") for value in tif.pages[0].resolution]
    except (ZeroDivisionError, ValueError, TypeError):
        return found
    units = [unit, str(described.get("yunit", unit))]  # ImageJ writes the second where it differs
    step = length_um(_number(described.get("spacing")), str(described.get("zunit", unit)))
    return found | _sizes(edges, units, step)


def _of_ome(image: Any, num_channels: int) -> dict[str, Any]:
    acquired = image.findtext("{*}AcquisitionDate")
    described: dict[str, Any] = {"name": image.get("Name") or "", "acquired": acquired}
    pixels = image.find("{*}Pixels")
    if pixels is None:
        return described
    channels = pixels.findall("{*}Channel")
    found = [channel.get("Name") for channel in channels]
    if len(found) == num_channels and all(found):
        described["channel_names"] = tuple(str(name) for name in found)
    with contextlib.suppress(TypeError, ValueError):  # red, green, blue, alpha in a signed number
        colours = [f"{int(one.get('Color')) % 2**32:08x}"[:6] for one in channels]
        described["channel_colours"] = known_colours(colours, num_channels)
    edges = [_number(pixels.get(f"PhysicalSize{axis}")) for axis in "XY"]
    if None in edges:
        return described
    units = [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "XY"]
    step = _number(pixels.get("PhysicalSizeZ"))
    return described | _sizes(edges, units, length_um(step, pixels.get("PhysicalSizeZUnit", "µm")))


def _sizes(edges: list[Any], units: list[str], step_um: float | None) -> dict[str, Any]:
    notes: list[str] = []
    found = pixel_edges_um(edges, units, notes) or (None, None)
    return {"pixel_size_um": (*found, step_um), "notes": tuple(notes)}


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None
