"""The pixels that are segmented: read from a file, or given as an array, and checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import ImageFileError, UsageError
from dinocell.io import Image, read_image, select_channels
from dinocell.io.channel_files import ChannelFiles
from dinocell.io.planes import MAX_PIXELS, RGB_NAMES, PlaneChoice, distinct_names
from dinocell.labels import looks_like_labels
from dinocell.segmentation.intensity import check_values

_COLOUR_NOTE = (
    "This is a colour picture: the mean of red, green and blue was segmented, each normalised; if one of "
    "them shows the cells, choose it with `channels`"
)
_CHANNEL_HINT = "choose one with `channels`, or several, which are averaged"


@dataclass(frozen=True)
class Source:
    """An image as it is read, before its intensities are scaled.

    Attributes
    ----------
    pixels : (H, W) ndarray, or (H, W, C) whose channels are to be averaged
    name : stem of the file, or "image"
    pixel_size_um : float or None, from the file
    names : names of the channels in the file, or None
    column_names : one name per channel, its position where the file has no names; empty for the only channel
        of a file without names
    notes : what was noted on the file
    """

    pixels: NDArray[Any]
    name: str = "image"
    pixel_size_um: float | None = None
    names: Sequence[str] | None = None
    column_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_source(
    image: NDArray[Any] | str | os.PathLike[str],
    *,
    max_pixels: int = MAX_PIXELS,
    tile_px: int | None = None,
    allow_mask: bool = False,
    **choice: Unpack[PlaneChoice],
) -> Source:
    """Read the chosen plane of a file, or take an array, and check that it can be segmented.

    Parameters
    ----------
    image : path, `ChannelFiles`, or (H, W) or (H, W, C) ndarray of any real data type
    max_pixels, tile_px, choice : as for `dinocell.io.read_image`; of an array only `channels` can be
        chosen, and one name or number need not be in a list.  All channels of a colour picture are taken
        by default.
    allow_mask : accept an image that looks like a label image or a binary mask

    Raises UsageError and ImageFileError (the file cannot be read, or no plane or channel is chosen where
    there are several); ValueError (the array does not fit).
    """
    chosen = _listed(choice.get("channels"))
    if isinstance(image, str | os.PathLike):
        choice["channels"] = chosen
        read = image.read if isinstance(image, ChannelFiles) else partial(read_image, image)
        file = read(max_pixels=max_pixels, tile_px=tile_px, **choice)
        return source_of(file, chosen, allow_mask=allow_mask)
    given = [name for name, value in choice.items() if name != "channels" and value is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` chooses a plane of a file, got an array: give that plane of the array alone"
        )
    return source_of(np.asarray(image), chosen, allow_mask=allow_mask)


def source_of(
    image: Image | NDArray[Any],
    channels: Sequence[int | str] | int | str | None,
    *,
    allow_mask: bool = False,
) -> Source:
    """`read_source` for a file that was read with these `channels`, or for an array."""
    chosen = _listed(channels)
    failure: type[Exception] = ValueError
    if isinstance(image, Image):
        failure = ImageFileError
        pixels, names, stem, notes = image.pixels, image.channel_names, image.path.stem, image.notes
        size_um = image.pixel_size_um
        if image.is_colour and chosen is None:
            chosen = RGB_NAMES
            notes = (*notes, _COLOUR_NOTE)
    else:
        pixels, names, stem, notes, size_um = image, None, "image", (), None
    where = f" in {stem}" if stem != "image" else ""
    if pixels.ndim not in (2, 3) or 0 in pixels.shape:
        raise failure(
            f"The image must be (H, W) or (H, W, C) and not empty, got shape {pixels.shape}{where}: "
            "choose one plane of a stack"
        )
    if pixels.dtype.kind not in "buif":
        raise failure(
            f"The image must hold real numbers, got dtype {pixels.dtype}{where}: convert it first"
        )
    check_values(pixels, where, failure)
    if chosen is not None and failure is ValueError:
        pixels = select_channels(pixels, None, chosen)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.ndim == 3 and chosen is None:
        described = f" ({', '.join(names)})" if names else ""
        raise UsageError(
            f"The image must be gray, got {pixels.shape[2]} channels{described}{where}: "
            f"{_CHANNEL_HINT}"
        )
    if not allow_mask and pixels.ndim == 2 and looks_like_labels(pixels):
        raise failure(
            f"An image of intensities is needed, got what looks like a mask or label image{where}: "
            "give the raw image, or set `allow_mask` if it is the raw image"
        )
    columns = distinct_names(names, chosen, pixels.shape[2] if pixels.ndim == 3 else 1)
    return Source(pixels, stem, size_um, names, columns, notes)


def _listed(channels: Sequence[int | str] | int | str | None) -> Sequence[int | str] | None:
    return [channels] if isinstance(channels, int | str) else channels
