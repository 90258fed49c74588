"""Read the files of microscopes (CZI, ND2, LIF) with the libraries of the extra `formats`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from dinocell.io.optional import library
from dinocell.io.planes import RGB_NAMES, Selection, known_colours
from dinocell.io.stacks import Series, Stack, by_plane, series_of
from dinocell.io.tiff import LIBRARY_LOG
from dinocell.io.units import length_um, pixel_edges_um
from dinocell.scratch import new_image, row_bands

_CZI_TYPES = {
    "Gray8": np.uint8, "Gray16": np.uint16, "Gray32Float": np.float32,
    "Bgr24": np.uint8, "Bgr48": np.uint16, "Bgr96Float": np.float32,
}  # fmt: skip
_MAX_CHANNELS = 1000  # more come from damage; the library would look up each of them
_UNIX_EPOCH_JULIAN_DAY = 2440587.5  # 1970-01-01 00:00 UTC


def sizes_um(edges: Mapping[str, float | None], unit: str) -> dict[str, Any]:
    """`pixel_size_um` and `notes` of a `Series` from lengths of a voxel by axis, all in one unit."""
    notes: list[str] = []
    x, y = edges.get("X"), edges.get("Y")
    found = None if x is None or y is None else pixel_edges_um((x, y), (unit, unit), notes)
    step = length_um(edges.get("Z"), unit)
    return {"pixel_size_um": (*(found or (None, None)), step), "notes": tuple(notes)}


@contextlib.contextmanager
def _open_czi(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Zeiss CZI: tiles of a mosaic are put together, scenes stay apart, reduced copies are not used."""
    czi = library("pylibCZIrw.czi", "CZI files")
    with czi.open_czi(str(path)) as file:
        ranges = dict(file.total_bounding_box_no_pyramid)
        first_channel, end = ranges.get("C", (0, 1))
        if end - first_channel > _MAX_CHANNELS:
            raise ValueError(f"it claims {end - first_channel:,} channels")
        scenes = dict(sorted(file.scenes_bounding_rectangle_no_pyramid.items()))
        whole = file.total_bounding_rectangle_no_pyramid
        rectangles = list(scenes.values()) or [whole]
        kinds = set(file.pixel_types.values())
        colours = {kind.startswith("Bgr") for kind in kinds}
        if len(colours) != 1 or not kinds <= _CZI_TYPES.keys():
            raise ValueError(f"its pixels are of the kinds {', '.join(sorted(kinds)) or 'none'}")
        dtype = np.result_type(*(_CZI_TYPES[kind] for kind in kinds))
        about = _about_czi(file.raw_metadata, end - first_channel)
        stacked = sorted(ranges.keys() - set("TZCYX")) + [a for a in "TZC" if a in ranges]
        # S is that of samples here; scenes are listed by their rectangles
        axes = [axis for axis in stacked if axis != "S"]
        sizes = [ranges[axis][1] - ranges[axis][0] for axis in axes]
        is_colour = colours == {True}
        if is_colour and end - first_channel == 1:
            about["channel_names"] = RGB_NAMES
        series = [
            series_of(
                [*axes, *"YX", *"S" * is_colour],
                [*sizes, one.h, one.w, *[3] * is_colour],
                dtype,
                **about,
            )
            for one in rectangles
        ]

        def plane(number: int, index: dict[str, int]) -> NDArray[Any]:
            place = {axis: ranges[axis][0] + index.get(axis, 0) for axis in axes}
            scene, one = list(scenes)[number] if scenes else None, rectangles[number]
            tiles: list[int] = []

            def first_tile(tile: int, _: Any) -> bool:
                tiles.append(tile)
                return False  # one is enough

            known = {axis: place[axis] for axis in index}  # a tile need not name the others
            region = (one.x, one.y, one.w, one.h)
            file.enumerate_subblocks_subset(first_tile, known or None, region, only_layer0=True)
            _require(tiles)
            shape = (one.h, one.w, 3) if is_colour else (one.h, one.w)
            pixels = new_image(shape, dtype, wanted.tile_px)
            for rows in row_bands(shape):
                part = (one.x, one.y + rows.start, one.w, rows.stop - rows.start)
                read = file.read(roi=part, plane=place, scene=scene)
                pixels[rows] = read[..., ::-1] if is_colour else read[..., 0]
            return pixels

        yield by_plane("CZI", series, plane, wanted.tile_px)


def _about_czi(xml: str, num_channels: int) -> dict[str, Any]:
    """What the XML of a CZI says; its lengths are in metres."""
    try:
        tree = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return {}
    edges = {}
    for axis in "XYZ":
        text = tree.findtext(f".//Scaling/Items/Distance[@Id='{axis}']/Value")
        with contextlib.suppress(TypeError, ValueError):
            edges[axis] = float(text)  # type: ignore[arg-type]
    image = tree.find(".//Information/Image")
    if image is None:
        return sizes_um(edges, "m")
    names = [one.get("Name") for one in image.findall("Dimensions/Channels/Channel")]
    known = len(names) == num_channels and all(names)
    shown = tree.findall(".//DisplaySetting/Channels/Channel/Color")  # alpha, red, green, blue
    colours = [(one.text or "").strip()[3:] for one in shown]
    return {
        **sizes_um(edges, "m"),
        "channel_names": tuple(map(str, names)) if known else None,
        "channel_colours": known_colours(colours, num_channels),
        "acquired": image.findtext("AcquisitionDateAndTime"),
    }


@contextlib.contextmanager
def _open_nd2(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Nikon ND2; positions are scenes."""
    nd2 = library("nd2", "ND2 files")
    with nd2.ND2File(path) as file:
        sizes = dict(file.sizes)
        places = [axis for axis in sizes if axis not in "CYXS"]
        frames = {
            tuple(loop.get(axis, 0) for axis in places): i
            for i, loop in enumerate(file.loop_indices)
        }
        names = [channel.channel.name for channel in file.metadata.channels or ()]
        about = _about_nd2(file)
        parts = [channel.channel.color for channel in file.metadata.channels or ()]
        colours = [f"{one.r:02x}{one.g:02x}{one.b:02x}" for one in parts]
        about["channel_colours"] = known_colours(colours, sizes.get("C", 1))
        if "S" in sizes and sizes["S"] == 3:
            about["channel_names"] = RGB_NAMES
        elif len(names) == sizes.get("C", 1) and all(names):
            about["channel_names"] = tuple(names)
        scenes = sizes.get("P", 1)
        axes = [axis for axis in sizes if axis != "P"]
        series = [
            series_of(axes, [sizes[axis] for axis in axes], file.dtype, **about)
            for _ in range(scenes)
        ]

        def plane(number: int, index: dict[str, int]) -> NDArray[Any]:
            place = {**index, "P": number}
            frame_number = frames.get(tuple(place.get(axis, 0) for axis in places))
            _require(frame_number is not None)
            chunks = getattr(
                getattr(file, "_rdr", None), "chunkmap", None
            )  # zeros stand for a missing one
            _require(chunks is None or f"ImageDataSeq|{frame_number}!".encode() in chunks)
            frame = np.asarray(file.read_frame(frame_number))
            parts = [sizes.get(axis, 1) for axis in "CYXS"]
            pixels = frame.reshape(parts)[index.get("C", 0)]
            return (pixels if "S" in sizes else pixels[..., 0]).copy()  # the file will be closed

        yield by_plane("ND2", series, plane, wanted.tile_px)


def _about_nd2(file: Any) -> dict[str, Any]:
    """Size of a voxel and time of the first frame, as far as the file says them."""
    about: dict[str, Any] = {}
    channels = file.metadata.channels or ()
    if channels:
        volume = channels[0].volume
        edges = zip("XYZ", volume.axesCalibration, volume.axesCalibrated, strict=True)
        about = sizes_um({axis: edge for axis, edge, known in edges if known}, "µm")
    with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
        day = file.frame_metadata(0).channels[0].time.absoluteJulianDayNumber
        days = timedelta(days=day - _UNIX_EPOCH_JULIAN_DAY)
        about["acquired"] = _iso(datetime.fromtimestamp(0, UTC) + days)
    return about


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


@contextlib.contextmanager
def _open_lif(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Leica LIF; its images are scenes."""
    liffile = library("liffile", "LIF files")
    with LIBRARY_LOG.collect(), liffile.LifFile(path) as file:
        images = [
            image
            for image in file.images
            if {"Y", "X"} <= image.sizes.keys() and all(len(axis) == 1 for axis in image.sizes)
        ]
        if not images:
            raise ValueError("it holds no image with rows and columns")

        def plane(number: int, index: dict[str, int]) -> NDArray[Any]:
            frame: NDArray[Any] = images[number].frame(**index)
            return frame

        series = [_lif_series(image) for image in images]
        yield by_plane("LIF", series, plane, wanted.tile_px)


def _lif_series(image: Any) -> Series:
    sizes = dict(image.sizes)
    description = image.xml_element.find("./Data/Image/ImageDescription")
    edges: dict[str, float | None] = {}
    unit = "m"
    for axis, number in (("X", 1), ("Y", 2), ("Z", 3)):
        one = description.find(f"./Dimensions/DimensionDescription[@DimID='{number}']")
        if one is not None and (count := int(one.get("NumberOfElements"))) > 1:
            edges[axis] = abs(float(one.get("Length"))) / (count - 1)  # from first to last element
            unit = one.get("Unit") or unit
    about = sizes_um(edges, unit)
    names = [one.get("LUTName") for one in description.findall("./Channels/ChannelDescription")]
    if sizes.get("S") == 3:
        about["channel_names"] = RGB_NAMES
    elif len(names) == sizes.get("C", 1) and all(names):
        about["channel_names"] = tuple(names)
    times = image.timestamps
    if times is not None and len(times):
        about["acquired"] = f"{np.datetime_as_string(times[0], unit='s')}Z"
    return series_of(sizes, sizes.values(), image.dtype, name=image.name, **about)


def _require(present: Any) -> None:
    if not present:
        raise ValueError("this plane is missing in it")


MICROSCOPE_FILES: dict[bytes, Callable[[Path, Selection], AbstractContextManager[Stack]]] = {
    b"ZISRAWFILE": _open_czi,
    b"\xda\xce\xbe\x0a": _open_nd2,
    b"p\0\0\0": _open_lif,
}
"""First bytes of a file → what opens it."""
