"""What of a file becomes the image: the choice as it is given, and the channels."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from dinocell.errors import ImageFileError, UsageError
from dinocell.scratch import picked

MAX_PIXELS: int = 2 * 10**9
"""Largest height times width that is read: 44,721 × 44,721.  Pixels are numbered by 32-bit integers."""

RGB_NAMES = ("red", "green", "blue")

PROJECTIONS = ("max", "mean")
"""Words that are accepted in place of a number along z: the largest value or the mean of each pixel."""

ALL_CHANNELS = ("all", "mean")
"""Words for all channels, unless one has that name; several channels are averaged for segmentation."""

_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}
"""Orientation tag → what turns the stored rows upright (TIFF 6.0, tag 274; EXIF has the same)."""

SIDEWAYS = (5, 6, 7, 8)
"""Orientation tags of pictures whose rows become columns."""


class PlaneChoice(TypedDict, total=False):
    """Which plane of a file, as keyword arguments; see `dinocell.io.read_image`."""

    channels: Sequence[int | str] | int | str | None
    page: int | None
    z: int | str | None
    time: int | None
    scene: int | None


def channel_of(text: str) -> int | str:
    """A channel as a user writes it: a position where the text can be one (0 but not 01), else a name."""
    return int(text) if text.isdecimal() and text == str(int(text)) else text


@dataclass(frozen=True)
class Selection:
    """What of a file is wanted; see `dinocell.io.read_image` for the first seven.

    `as_labels` keeps the stored numbers: palettes and "white is zero" are not applied.

    Raises UsageError (a value cannot be, whatever the file holds, or `page` comes with one of `z`, `time`
    and `scene`).
    """

    channels: Sequence[int | str] | None = None
    page: int | None = None
    z: int | str | None = None
    time: int | None = None
    scene: int | None = None
    max_pixels: int = MAX_PIXELS
    tile_px: int | None = None
    as_labels: bool = False

    def __post_init__(self) -> None:
        _refuse_text(self.channels)
        if self.z not in (None, *PROJECTIONS) and not _is_place(self.z):
            raise UsageError(
                f"`z` must be max, mean or a number from 0, got {self.z}: choose one of these"
            )
        for name in ("time", "scene"):
            if (value := getattr(self, name)) is not None and not _is_place(value):
                raise UsageError(f"`{name}` must be a number from 0, got {value}: count from 0")
        if self.page is not None and (self.z, self.time, self.scene) != (None, None, None):
            raise UsageError(
                "`page` must come without `z`, `time` and `scene`, because it counts the planes through "
                "all of them: give it alone, or leave it out"
            )


@dataclass
class RawImage:
    """One plane with all or some of its channels, as stored; values are not checked yet."""

    pixels: np.ndarray  # (H, W) or (H, W, C)
    is_rgb: bool = False
    is_selected: bool = False  # only the wanted channels were read
    pixel_size_um: float | None = None
    channel_names: tuple[str, ...] | None = None
    orientation: int = 1  # the EXIF and TIFF tag 274 of the file
    notes: tuple[str, ...] = ()

    def turn_upright(self) -> None:
        """Apply the orientation that the file states, and note it."""
        if self.orientation in _UPRIGHT:
            self.pixels = _UPRIGHT[self.orientation](self.pixels)
            self.notes += (
                f"The file states that its picture is turned (orientation {self.orientation}): it was "
                "turned upright",
            )
            self.orientation = 1


def channel_positions(
    num_channels: int, names: Sequence[str] | None, channels: Sequence[int | str]
) -> list[int]:
    """Turn channel positions and names into positions; see `select_channels`."""
    if len(channels) == 0:
        raise UsageError(
            "`channels` must name at least one channel, got none: leave it out to keep all channels"
        )
    known = [name.casefold().strip() for name in names] if names else []
    if takes_all(channels) and str(channels[0]).casefold().strip() not in known:
        return list(range(num_channels))
    existing = f"channels 0 to {num_channels - 1}" if num_channels > 1 else "one channel, number 0"
    if names:
        existing += f" ({', '.join(names)})"
    positions: list[int] = []
    for channel in channels:
        text = str(channel).casefold().strip()
        same = [place for place, name in enumerate(known) if name == text]
        if len(same) > 1:
            raise UsageError(
                f"`channels` must name one channel each, got {channel!r}, which is the name of the "
                f"channels {' and '.join(map(str, same))}: give the position, for example {same[0]}"
            )
        position = same[0] if same else int(text) if text.isdecimal() else -1
        if not 0 <= position < num_channels:
            raise UsageError(
                f"`channels` must name channels of the image, got {channel!r}: the image has {existing}; "
                f"give for example {names[0] if names else 0}"
            )
        positions.append(position)
    if len(set(positions)) != len(positions):
        raise UsageError(
            f"`channels` must differ from each other, got {list(channels)}: name each once"
        )
    return positions


def takes_all(channels: Sequence[int | str] | None) -> bool:
    """Whether a choice is one of the words for all channels."""
    words = [str(channel).casefold().strip() for channel in channels or ()]
    return len(words) == 1 and words[0] in ALL_CHANNELS


def select_channels(
    pixels: np.ndarray, names: Sequence[str] | None, channels: Sequence[int | str]
) -> np.ndarray:
    """Keep some channels of an image.

    Parameters
    ----------
    pixels : (H, W) or (H, W, C) ndarray
    names : sequence of str, or None, one name per channel
    channels : sequence of int or str, names (case does not matter) or positions from 0; both may be
        text or a number.  A channel of that name comes first: where channels are named 405, 488 and
        561, 488 is the second one, and 1, which no channel is named, as well.  The only word `all` or
        `mean` stands for all channels.

    Returns (H, W) ndarray for one channel, else (H, W, len(channels)).

    Raises UsageError (a channel does not exist (the message names those that do), is repeated, or
    none is given).
    """
    _refuse_text(channels)
    stack = pixels[..., None] if pixels.ndim == 2 else pixels
    positions = channel_positions(stack.shape[2], names, channels)
    return stack[..., positions[0]] if len(positions) == 1 else picked(stack, positions)


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_text(channels: Sequence[int | str] | None) -> None:
    if isinstance(channels, str | int):
        raise TypeError(
            f"`channels` must be a sequence of positions or names, got {channels!r}: write it as a list"
        )


_CHANNELS_AT_MOST_PIXELS = 4
"""The largest images may be read with so many channels; smaller ones with more."""


def check_size(path: Path, height: int, width: int, channels: int, max_pixels: int) -> None:
    """Refuse an image of more than `max_pixels`, or with too many channels, before they are read."""
    pixels, values = height * width, height * width * channels
    if pixels > max_pixels:
        raise ImageFileError(
            f"An image may have up to {max_pixels:,} pixels, '{path}' claims {height:,} × "
            f"{width:,} = {pixels:,}: crop it, or read a smaller level of it"
        )
    if values > _CHANNELS_AT_MOST_PIXELS * max_pixels:
        raise ImageFileError(
            f"An image may have up to {_CHANNELS_AT_MOST_PIXELS * max_pixels:,} values in all channels, "
            f"'{path}' claims {height:,} × {width:,} × {channels:,} = {values:,}: choose fewer channels, "
            "or crop it"
        )


def known_colours(texts: Iterable[Any], num_channels: int) -> tuple[str, ...] | None:
    """Colours of all channels as #rrggbb, from `rrggbb` with or without `#`; None if one is not known."""
    found = [str(text or "").lower().lstrip("#") for text in texts]
    whole = len(found) == num_channels and all(re.fullmatch("[0-9a-f]{6}", one) for one in found)
    return tuple(f"#{one}" for one in found) if whole else None


def distinct_names(
    names: Sequence[str] | None, chosen: Sequence[int | str] | None, count: int
) -> tuple[str, ...]:
    """Names of `count` channels for columns: those of the file, or the positions that were chosen."""
    if not names:
        given = range(count) if takes_all(chosen) else chosen or ()
        return tuple(str(channel).strip() for channel in given)
    return tuple(
        name if names.count(name) == 1 else f"{name}_{place}" for place, name in enumerate(names)
    )
