"""Read OME-Zarr 0.1 to 0.5, a folder: the full resolution of its pyramid, chunk by chunk."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import ImageFileError
from dinocell.io.optional import library
from dinocell.io.planes import Selection, known_colours
from dinocell.io.s3 import S3Path
from dinocell.io.stacks import Series, Stack, by_plane, series_of
from dinocell.io.units import length_um, pixel_edges_um
from dinocell.scratch import new_image, row_bands

ZARR_LABELS = "cells"
"""Name of the label image below `labels/` that we write."""


@contextlib.contextmanager
def open_zarr(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Open a folder; the images of a collection (bioformats2raw, a well) are scenes."""
    zarr = library("zarr", "OME-Zarr images")
    attributes = _attributes(path)
    scenes = _scenes(path, attributes)
    try:
        places = [_inside(path, inner) for inner in scenes]
        images = [(place, _attributes(place)) for place in places]
        found = [_series(zarr, place, described) for place, described in images]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ImageFileError(
            f"The 'multiscales' of '{path}' must list arrays, axes and scales that fit each other, got others "
            f"({type(error).__name__}: {error}): export the image again"
        ) from error
    arrays = [array for array, _ in found]
    axes = [axes for _, (axes, _) in found]

    def plane(number: int, index: dict[str, int]) -> NDArray[Any]:
        array, letters = arrays[number], axes[number]
        order = [axis for axis in letters if axis in "YX"]
        place = [index.get(axis, slice(None) if axis in "YX" else 0) for axis in letters]
        height, width = (array.shape[letters.index(axis)] for axis in "YX")
        pixels = new_image((height, width), array.dtype.newbyteorder("="), wanted.tile_px)
        for rows in row_bands(pixels.shape):
            place[letters.index("Y")] = rows
            part = array[tuple(place)]
            pixels[rows] = part if order == ["Y", "X"] else part.T
        _check_kept(images[number][0])
        return pixels

    version = _ome(images[0][1])["multiscales"][0].get("version") or _ome(images[0][1]).get(
        "version"
    )
    name = f"OME-Zarr {version}" if version else "OME-Zarr"
    yield by_plane(name, [series for _, (_, series) in found], plane, wanted.tile_px)


def fields_of_plate(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Image and place (plate, well, site) of each field of a plate in OME-Zarr; empty for other folders.

    Raises ImageFileError (the plate names a well that it lacks, or names one twice).
    """
    plate = _ome(_attributes(path)).get("plate")
    if not plate:
        return []
    found: list[tuple[Path, dict[str, Any]]] = []
    seen: set[str] = set()
    for well in plate.get("wells") or ():
        row, _, column = well["path"].partition("/")
        if well["path"] in seen:
            raise ImageFileError(
                f"A plate must name each well once, '{path}' names {well['path']} twice: export it again"
            )
        seen.add(well["path"])
        folder = _inside(path, well["path"])
        images = (_ome(_attributes(folder)).get("well") or {}).get("images")
        if not images:
            raise ImageFileError(
                f"A plate must hold the wells that it names, '{path}' lacks {well['path']}: copy or export "
                "it again"
            )
        name = f"{row.upper()}{int(column):02d}" if column.isdecimal() else f"{row}{column}"
        for site, image in enumerate(images):
            place = {"plate": plate.get("name") or path.stem, "well": name, "site": site}
            found.append((_inside(folder, image["path"]), place))
    return found


def _attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a group: those of `zarr.json` (Zarr 3) or of `.zattrs` (Zarr 2)."""
    for name in ("zarr.json", ".zattrs"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        if not isinstance(content, dict):
            break
        found = content.get("attributes", {}) if name == "zarr.json" else content
        return found if isinstance(found, dict) else {}
    return {}


def is_one_image(path: Path) -> bool:
    """Whether a folder is an image itself, and no collection of images, plate or well."""
    return bool(_ome(_attributes(path)).get("multiscales"))


def label_image(path: Path) -> Path:
    """The folder of the labels that belong to an OME-Zarr image; `path` itself where it has none.

    Raises ImageFileError (there are several label images, and none is named as ours).
    """
    names = _ome(_attributes(path / "labels")).get("labels") or []
    if not names:
        return path
    if len(names) > 1 and ZARR_LABELS not in names:
        raise ImageFileError(
            f"One label image is needed, '{path}' has {', '.join(names)}: name one, for example "
            f"'{path / 'labels' / names[0]}'"
        )
    return _inside(path / "labels", ZARR_LABELS if ZARR_LABELS in names else names[0])


def _inside(path: Path, inner: Any) -> Path:
    """The folder below `path` that its metadata name.

    Raises ImageFileError where they lead out of `path`: who may read one image may not read others for that.
    """
    parts = re.split(r"[/\\]", inner)
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise ImageFileError(
            f"Folders that the metadata of '{path}' name must lie in it, got '{inner}': export the image again"
        )
    return path / inner


def _ome(attributes: Mapping[str, Any]) -> Any:
    """The part on images: since OME-Zarr 0.5 it has a key of its own."""
    return attributes.get("ome", attributes)


def _scenes(path: Path, attributes: Mapping[str, Any]) -> list[str]:
    """Folders, relative to `path`, of the images that a group holds; `.` for an image itself."""
    ome = _ome(attributes)
    if ome.get("multiscales"):
        return ["."]
    if "plate" in ome:
        wells = ome["plate"].get("wells") or [{"path": "A/1"}]
        raise ImageFileError(
            f"One image is needed, '{path}' holds a plate of {len(wells)} wells: name a well, for example "
            f"'{path / wells[0]['path']}'"
        )
    if "well" in ome:
        return [image["path"] for image in ome["well"]["images"]]
    if "bioformats2raw.layout" in ome:
        listed = _ome(_attributes(path / "OME")).get("series")
        inner = [one.name for one in path.iterdir() if one.name.isdecimal() and one.is_dir()]
        return listed or sorted(inner, key=int)
    raise ImageFileError(
        f"An OME-Zarr image must state its 'multiscales', '{path}' does not: name the folder of one image "
        "in it, or write it again as OME-Zarr"
    )


def _series(
    zarr: Any, path: Path, attributes: Mapping[str, Any]
) -> tuple[Any, tuple[list[str], Series]]:
    """The array of the full resolution, the letters of its axes, and what is known about it."""
    ome = _ome(attributes)
    if not ome.get("multiscales"):
        raise ImageFileError(
            f"An OME-Zarr image must state its 'multiscales', '{path}' does not: copy or export it again"
        )
    image = ome["multiscales"][0]
    level = image["datasets"][0]
    full = _inside(path, level["path"])
    if not any((full / name).is_file() for name in ("zarr.json", ".zarray")):
        raise ImageFileError(
            f"A pyramid must hold its full resolution, '{path}' lacks the array '{level['path']}': copy or "
            "export it again"
        )
    array = _opened(zarr, full)
    axes = image.get("axes") or list("tczyx")
    axes = [{"name": axis} if isinstance(axis, str) else axis for axis in axes]
    letters = [_letter(axis) for axis in axes]
    if (
        len(letters) != array.ndim
        or len(set(letters)) != len(letters)
        or not {"Y", "X"} <= set(letters)
    ):
        names = ", ".join(str(axis.get("name")) for axis in axes)
        raise ImageFileError(
            f"Axes must differ and have y and x, '{path}' has {names} for an array of {array.ndim} axes: "
            "export it again"
        )
    scale = np.ones(len(letters))
    for level_or_image in (level, image):
        for step in level_or_image.get("coordinateTransformations") or ():
            if step.get("type") == "scale":
                scale = scale * np.asarray(step["scale"], dtype=float)
    units = {
        letter: str(axis.get("unit") or "") for letter, axis in zip(letters, axes, strict=True)
    }
    edges = dict(zip(letters, scale.tolist(), strict=True))
    notes: list[str] = []
    square = pixel_edges_um((edges["X"], edges["Y"]), (units["X"], units["Y"]), notes)
    depth = length_um(edges.get("Z"), units.get("Z", ""))
    channels = (ome.get("omero") or {}).get("channels") or []
    labels = [channel.get("label") for channel in channels]
    sizes = dict(zip(letters, array.shape, strict=True))
    order = [letter for letter in letters if letter not in "YX"] + ["Y", "X"]
    series = series_of(
        order,
        [sizes[letter] for letter in order],
        array.dtype,
        name=str(image.get("name") or ""),
        channel_names=tuple(map(str, labels))
        if len(labels) == sizes.get("C", 1) and all(labels)
        else None,
        channel_colours=known_colours(
            [channel.get("color") for channel in channels], sizes.get("C", 1)
        ),
        pixel_size_um=(*(square or (None, None)), depth),
        notes=tuple(notes),
    )
    return array, (letters, series)


def _opened(zarr: Any, folder: Any) -> Any:
    """An array of a folder, or of S3, of which chunks are fetched when they are read."""
    if isinstance(folder, S3Path):
        store = zarr.storage.ObjectStore(folder.store(folder.key), read_only=True)
        return zarr.open_array(store, mode="r")
    return zarr.open_array(str(folder), mode="r")


def _check_kept(folder: Any) -> None:
    """Raise ImageFileError if an image has gone while it was read: missing chunks count as empty.

    A chunk that is missing has the fill value, and so have all that were deleted meanwhile.
    """
    if not any((folder / name).is_file() for name in ("zarr.json", ".zattrs")):
        raise ImageFileError(f"'{folder}' was deleted while it was read: copy or export it again")


def _letter(axis: Mapping[str, Any]) -> str:
    """T, C, Z, Y, X, or the first letter of another axis; S stands for samples elsewhere."""
    kind, name = axis.get("type"), str(axis.get("name") or "?")
    letter = {"time": "T", "channel": "C"}.get(str(kind), name[0].upper())
    return "P" if letter == "S" else letter
