"""What a file holds, by named axes, and which of its planes become the image.

Every format is opened as a `Stack`: a list of `Series`, of which nothing is loaded yet, and a function that
reads one plane.  The choice among planes, the projection along z and the refusals are the same for all.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dinocell.errors import ImageFileError, UsageError
from dinocell.io.planes import (
    RGB_NAMES,
    SIDEWAYS,
    RawImage,
    Selection,
    channel_positions,
    check_size,
)
from dinocell.io.units import is_square
from dinocell.scratch import copied, new_image, row_bands

_OPTION_OF_AXIS = {"Z": "z", "T": "time"}
_UNKNOWN = "QI"  # how tifffile names an axis of which a TIFF does not say what it is
_LETTERS = "IQABDEFGHJKLMNOPRUVW"  # for axes whose letter is taken


@dataclass(frozen=True)
class Series:
    """One image of a file: a scene, a position, a series.

    Attributes
    ----------
    axes : str
        One letter for each axis that is longer than 1, and for rows and columns: T time, C channel, Z,
        Y rows, X columns, S samples of a colour; Q and I are axes that the file does not describe, other
        letters those that only its format knows.
    shape : tuple of int, sizes along `axes`
    dtype : data type of the pixels
    name : str, as in the file
    channel_names : tuple of str, or None; red, green and blue for colours
    channel_colours : tuple of str, or None: in which colour to show each channel, as #rrggbb
    pixel_size_um : (x, y, z) in µm, each None where the file does not say
    acquired : str or None, date and time of the first plane as in ISO 8601
    notes : tuple of str, such as that a pixel size is not used
    orientation : int, the EXIF and TIFF tag 274 of the file; `shape` is that of the stored pixels
    """

    axes: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    name: str = ""
    channel_names: tuple[str, ...] | None = None
    pixel_size_um: tuple[float | None, float | None, float | None] = (None, None, None)
    acquired: str | None = None
    notes: tuple[str, ...] = ()
    channel_colours: tuple[str, ...] | None = None
    orientation: int = 1

    @property
    def upright_shape(self) -> tuple[int, int]:
        """Rows and columns of a plane after it was turned upright."""
        height, width = self.sizes["Y"], self.sizes["X"]
        return (width, height) if self.orientation in SIDEWAYS else (height, width)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis."""
        return dict(zip(self.axes, self.shape, strict=True))

    @property
    def stacked(self) -> dict[str, int]:
        """Sizes of the axes along which planes are counted, in the order of the file."""
        return {axis: size for axis, size in self.sizes.items() if axis not in "CYXS"}

    @property
    def num_planes(self) -> int:
        """Number of planes, each of which has all channels."""
        return math.prod(self.stacked.values())

    @property
    def edge_um(self) -> float | None:
        """Edge of a pixel in µm; None where it is not known or pixels are not square."""
        x, y, _ = self.pixel_size_um
        return x if x is not None and y is not None and is_square(x, y) else None

    def text(self) -> str:
        """Its axes but rows and columns: "T 3 × Z 10 × C 2"; "5 planes" along one without a meaning."""
        sizes = {("C" if a == "S" else a): n for a, n in self.sizes.items() if a not in "YX"}
        return " × ".join(
            f"{size} planes" if axis in _UNKNOWN else f"{axis} {size}"
            for axis, size in sizes.items()
        )


def series_of(
    axes: Iterable[str], shape: Iterable[int], dtype: DTypeLike, **described: Any
) -> Series:
    """A `Series` without the axes of size 1 that are not rows or columns, each letter used once."""
    sizes: dict[str, int] = {}
    for axis, size in zip(axes, shape, strict=True):
        if size == 1 and axis not in "YX":
            continue
        letter = axis if axis not in sizes else next(a for a in _LETTERS if a not in sizes)
        sizes[letter] = int(size)
    return Series("".join(sizes), tuple(sizes.values()), dtype, **described)


@dataclass(frozen=True)
class Choice:
    """Planes to read: `series` is number `number` of the file, its `pages` become one plane.

    `projection` is `max` or `mean` where there are several; `positions` are the channels, None for all.
    """

    number: int
    series: Series
    pages: tuple[int, ...]
    projection: str = ""
    positions: tuple[int, ...] | None = None

    def index(self, page: int) -> dict[str, int]:
        """Place of a page along each axis that is counted."""
        sizes = self.series.stacked
        places = np.unravel_index(page, tuple(sizes.values())) if sizes else ()
        return {axis: int(place) for axis, place in zip(sizes, places, strict=True)}

    @property
    def channel_names(self) -> tuple[str, ...] | None:
        """Names of the channels that are read."""
        names = self.series.channel_names
        if names is None or self.positions is None:
            return names
        return tuple(names[position] for position in self.positions)


@dataclass(frozen=True)
class Stack:
    """An open file: the name of its format, what it holds, and what reads one page of a choice."""

    format: str
    series: list[Series]
    read: Callable[[Choice, int], RawImage]

    def image(self, path: Path, wanted: Selection) -> RawImage:
        """The plane that `wanted` chooses.

        Raises UsageError (it does not exist); ImageFileError (it is not chosen, or too large).
        """
        choice = choose(path, self.series, wanted)
        first, *others = choice.pages
        raw = self.read(choice, first)
        if others:
            planes = (self.read(choice, page).pixels for page in others)
            raw.pixels = _projected(raw.pixels, planes, choice.projection, wanted.tile_px)
        return raw


def by_plane(
    format_name: str,
    series: list[Series],
    plane: Callable[[int, dict[str, int]], NDArray[Any]],
    tile_px: int | None,
) -> Stack:
    """A `Stack` of a format that is read plane by plane.

    `plane` takes the number of a series and the place along each of its axes (C too, if there is one)
    and returns (H, W), or (H, W, S) for colours.
    """

    def read(choice: Choice, page: int) -> RawImage:
        one = choice.series
        letters = dict(
            zip(one.axes, series[choice.number].axes, strict=True)
        )  # as the format has them
        index = {letters[axis]: place for axis, place in choice.index(page).items()}
        if "C" in one.axes:
            channels = choice.positions or range(one.sizes["C"])
            planes = (
                plane(choice.number, {**index, letters["C"]: channel}) for channel in channels
            )
            pixels = stacked(planes, len(channels), tile_px)
        else:
            pixels = plane(choice.number, index)
        return RawImage(
            pixels,
            one.channel_names == RGB_NAMES and "S" in one.axes,
            choice.positions is not None,
            one.edge_um,
            choice.channel_names,
            notes=one.notes,
        )

    return Stack(format_name, series, read)


def stacked(planes: Iterable[NDArray[Any]], count: int, tile_px: int | None) -> NDArray[Any]:
    """`count` planes (H, W) as (H, W, count), or the only one; no more than two are held at a time."""
    stack: NDArray[Any] | None = None
    for channel, plane in enumerate(planes):
        if count == 1:
            return plane
        if stack is None:
            stack = new_image((*plane.shape, count), plane.dtype, tile_px)
        copied(plane, stack[..., channel])
    assert stack is not None
    return stack


def choose(path: Path, series: Sequence[Series], wanted: Selection) -> Choice:
    """The planes that `wanted` names.

    Raises ImageFileError (there are several and none is named, or the image is too large); UsageError (it
    does not exist).
    """
    if wanted.page is None:
        number = _scene(path, series, wanted)
        one = _described(series[number], wanted)
        pages, projection = _pages(path, one, wanted)
    else:
        number, page = _counted(path, series, wanted.page)
        one, pages, projection = series[number], (page,), ""
    if "C" in one.axes and "S" in one.axes:
        raise ImageFileError(
            f"An image must have one channel axis, '{path}' has axes {one.axes} with sizes "
            f"{' × '.join(map(str, one.shape))}: export the channels as one stack or as RGB"
        )
    positions = None
    if wanted.channels is not None and "C" in one.axes:
        found = channel_positions(one.sizes["C"], one.channel_names, wanted.channels)
        positions = tuple(found)
    channels = one.sizes.get("C", 1) if positions is None else len(positions)
    channels *= one.sizes.get("S", 1)
    check_size(path, one.sizes["Y"], one.sizes["X"], channels, wanted.max_pixels)
    return Choice(number, one, pages, projection, positions)


def _described(series: Series, wanted: Selection) -> Series:
    """The series with a meaning for its only axis that has none, where `wanted` gives one."""
    unknown = [axis for axis in series.axes if axis in _UNKNOWN]
    if len(unknown) != 1:
        return series
    for axis, given in (("Z", wanted.z), ("T", wanted.time), ("C", wanted.channels)):
        if (
            given is not None
            and axis not in series.axes
            and not (axis == "C" and "S" in series.axes)
        ):
            return replace(series, axes=series.axes.replace(unknown[0], axis))
    return series


def _scene(path: Path, series: Sequence[Series], wanted: Selection) -> int:
    if wanted.scene is None and len(series) > 1:
        raise ImageFileError(_which(path, series, wanted))
    scene = wanted.scene or 0
    if scene >= len(series):
        raise _no_such(path, "scene", scene, len(series))
    return scene


def _pages(path: Path, series: Series, wanted: Selection) -> tuple[tuple[int, ...], str]:
    """Numbers of the planes of a series, and how they become one."""
    sizes = series.stacked
    places: dict[str, Any] = {"Z": wanted.z, "T": wanted.time}
    if any(places.get(axis) is None for axis in sizes):
        raise ImageFileError(_which(path, [series], wanted))
    for axis, place in places.items():
        size = sizes.get(axis, 1)
        if isinstance(place, int) and place >= size:
            raise _no_such(path, _OPTION_OF_AXIS[axis], place, size)
    ranges = [
        range(size) if isinstance(places[axis], str) else (places[axis],)
        for axis, size in sizes.items()
    ]
    shape = tuple(sizes.values())
    pages = tuple(
        int(np.ravel_multi_index(index, shape)) if shape else 0 for index in product(*ranges)
    )
    return pages, wanted.z if isinstance(wanted.z, str) else ""


def _counted(path: Path, series: Sequence[Series], page: int) -> tuple[int, int]:
    """Series and plane within it of a plane that is counted through all of the file."""
    total = sum(one.num_planes for one in series)
    if not 0 <= page < total:
        raise _no_such(path, "page", page, total)
    number = 0
    while page >= series[number].num_planes:
        page -= series[number].num_planes
        number += 1
    return number, page


def _no_such(path: Path, name: str, value: int, count: int) -> UsageError:
    if count == 1:
        return UsageError(
            f"`{name}` must be 0 for '{path}', which holds one plane, got {value}: leave it out"
        )
    return UsageError(
        f"`{name}` must be 0 … {count - 1} for '{path}', got {value}: it counts from 0"
    )


def _which(path: Path, series: Sequence[Series], wanted: Selection) -> str:
    """What the file holds, and the options that choose one plane of it."""
    total = sum(one.num_planes for one in series)
    by_page = f"`page`, 0 … {total - 1}"
    first = series[0]
    text = first.text()
    if len(series) > 1:
        shapes = {one.shape for one in series}
        held = f"{len(series)} scenes"
        height, width = first.sizes["Y"], first.sizes["X"]
        if len(shapes) > 1:
            held += (
                f" of different sizes, the first of {text or 'one plane'} ({height} × {width} px)"
            )
        else:
            held += f" of {text} each" if text else ""
    else:
        held = text
    given = {"Z": wanted.z, "T": wanted.time}
    axes = {axis for one in series for axis in one.stacked if given.get(axis) is None}
    if wanted.as_labels:
        way = by_page
    elif axes - {"Z", "T"}:
        unknown = len(series) == 1 and len(axes & set(_UNKNOWN)) == 1 and len(first.stacked) == 1
        way = by_page + ", or with `z`, `time` or `channels` if they are that" * unknown
    else:
        names = ["`scene`"] * (len(series) > 1)
        names += [f"`{_OPTION_OF_AXIS[axis]}`" for axis in "TZ" if axis in axes]
        way = " and ".join(names)
    return f"One 2-D image is needed, '{path}' holds {held}: choose with {way}, or save one plane"


def _projected(
    first: NDArray[Any], others: Iterator[NDArray[Any]], how: str, tile_px: int | None
) -> NDArray[Any]:
    """Largest value (in its data type) or mean (float32) of each pixel over several planes."""
    total = new_image(first.shape, first.dtype if how == "max" else np.float64, tile_px)
    copied(first, total)
    count = 1
    for plane in others:
        for rows in row_bands(total.shape):
            if how == "max":
                np.maximum(total[rows], plane[rows], out=total[rows])
            else:
                total[rows] += plane[rows]
        count += 1
    if how == "max":
        return total
    mean = new_image(first.shape, np.float32, tile_px)
    for rows in row_bands(total.shape):
        mean[rows] = total[rows] / count
    return mean
