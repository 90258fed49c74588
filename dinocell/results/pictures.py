"""Pictures of a segmentation: contours on the image, coloured cells, the distance map, one panel of all.

Every function returns (H, W, 3) uint8 RGB.  Nothing here needs a display or matplotlib.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.files import atomic_path
from dinocell.labels import as_labels, cell_borders
from dinocell.results.colors import color_distance_map, color_labels, number_cells

CONTOUR_COLOR = (255, 96, 0)
"""Default colour of contours: visible on black, gray and white."""

# Hues of channels when there are not three of them; two are green and magenta.
_CHANNEL_COLORS = (
    (0.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
    (0.0, 0.6, 1.0),
    (1.0, 0.6, 0.0),
    (0.6, 0.6, 0.6),
)

_LOW_PERCENT, _HIGH_PERCENT = 0.1, 99.8
_SAMPLED_PIXELS = 1 << 20
_PANEL_GAP_PX = 8
_MIN_PANEL_PX = 256
_BACKGROUND, _INK, _FAINT_INK = (16, 18, 22), (235, 235, 235), (160, 165, 172)

RGBImage = NDArray[np.uint8]


def to_display(
    image: ArrayLike, *, low_percent: float = _LOW_PERCENT, high_percent: float = _HIGH_PERCENT
) -> RGBImage:
    """Stretch an image of any type to 8-bit RGB for looking at.

    Parameters
    ----------
    image : (H, W) or (H, W, C) real ndarray
        Boolean, integer or float.  Each channel is stretched on its own.  One channel is gray, two are
        green and magenta, three are red, green and blue; four or more are added in fixed colours.
    low_percent, high_percent : float, 0 <= low < high <= 100
        Percentiles of the finite pixels that become black and full brightness.  Above a million
        pixels they are taken from an even sample.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        A constant channel is black, also where it is not zero; NaN and infinity are black and do not
        count.  Where both percentiles fall on one value (nearly all pixels equal), the full range is
        stretched.

    Raises
    ------
    TypeError, ValueError
        Not a real array of one of these shapes, no pixel, or percentiles out of order.
    """
    array = _image_array(image)
    if not 0.0 <= low_percent < high_percent <= 100.0:
        raise ValueError(
            f"`low_percent` and `high_percent` must satisfy 0 <= low < high <= 100, got "
            f"{low_percent:g} and {high_percent:g}: choose others."
        )
    return _compose(array, _limits(array, low_percent, high_percent))


def draw_contours(
    image: ArrayLike,
    labels: ArrayLike,
    *,
    color: tuple[int, int, int] | None = CONTOUR_COLOR,
    thickness_px: int = 1,
    stretch: bool = True,
) -> RGBImage:
    """Draw the border of every cell on the image.

    Parameters
    ----------
    image : (H, W) or (H, W, C) real ndarray
        See `to_display`.
    labels : (H, W) integer array_like
        0 background, other values cells.
    color : three int 0..255, or None
        None gives each cell its colour of `color_labels`.
    thickness_px : int
        Width of the line, which lies inside the cell: see `dinocell.labels.cell_borders`.
    stretch : bool
        False draws on the image as it is, which must be (H, W, 3) uint8.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        A new array.

    Raises
    ------
    ValueError
        Image and labels differ in height or width, or an argument is out of range.
    """
    array = _image_array(image)
    labels = as_labels(labels)
    _check_same_size(array, labels)
    if stretch:
        picture = to_display(array)
    elif array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        picture = array.astype(np.uint8)  # a copy
    else:
        raise ValueError(
            f"`image` must be (H, W, 3) uint8 when `stretch` is False, got {array.dtype} of shape "
            f"{array.shape}: pass it through `to_display`."
        )
    border = cell_borders(labels, thickness_px=thickness_px)
    if color is None:
        picture[border] = color_labels(labels)[border]
    else:
        picture[border] = _color(color)
    return picture


def shrink_labels(labels: ArrayLike, factor: int) -> NDArray[np.uint32]:
    """Shrink labels by a whole factor so that no cell gets lost between the pixels.

    Parameters
    ----------
    labels : (H, W) integer array_like
    factor : int >= 1
        Each block of factor × factor pixels becomes one pixel; blocks at the lower and right edge may
        be smaller.

    Returns
    -------
    (ceil(H / factor), ceil(W / factor)) uint32 ndarray
        The largest label of each block.  For pictures: areas grow by about half a block.
    """
    labels = as_labels(labels)
    if _factor(factor) == 1:
        return labels
    return _blocks(labels, factor, np.maximum).astype(np.uint32, copy=False)


def mean_blocks(array: NDArray[Any], factor: int) -> NDArray[Any]:
    """Shrink an image or map by a whole factor.

    Parameters
    ----------
    array : (H, W) or (H, W, C) real ndarray
    factor : int >= 1
        Each block of factor × factor pixels becomes one pixel; blocks at the lower and right edge may
        be smaller.

    Returns
    -------
    (ceil(H / factor), ceil(W / factor)[, C]) ndarray
        The mean of each block, float64; `array` itself when `factor` is 1.
    """
    if _factor(factor) == 1:
        return array
    total = _blocks(array.astype(np.float64), factor, np.add)
    rows = np.minimum(factor, array.shape[0] - np.arange(0, array.shape[0], factor))
    cols = np.minimum(factor, array.shape[1] - np.arange(0, array.shape[1], factor))
    counts = rows[:, None] * cols[None, :]
    return total / (counts if array.ndim == 2 else counts[..., None])


def overlay_panel(
    image: ArrayLike,
    labels: ArrayLike,
    distance_map: ArrayLike | None = None,
    *,
    title: str | None = None,
    pixel_size_um: float | None = None,
    max_panel_px: int = 2048,
) -> RGBImage:
    """Put image, contours, coloured labels and distance map side by side, with captions.

    Parameters
    ----------
    image : (H, W) or (H, W, C) real ndarray
        See `to_display`.
    labels : (H, W) integer array_like
        0 background, other values cells.
    distance_map : (H, W) real array_like, optional
        Adds the fourth picture.
    title : str, optional
        A line above the pictures; characters that the built-in font lacks become their plain form.
    pixel_size_um : float, optional
        Adds a scale bar to the first picture.
    max_panel_px : int >= 64
        An image with a longer side is shrunk by a whole factor, which the caption states; contours
        are drawn after shrinking, so they stay one pixel wide, and no cell vanishes.  An image below
        256 pixels is enlarged by a whole factor, stated too.

    Returns
    -------
    (H', W', 3) uint8 ndarray

    Raises
    ------
    ValueError
        Sizes differ, there is no pixel, or an argument is out of range.
    """
    from PIL import Image, ImageDraw

    array = _image_array(image)
    labels = as_labels(labels)
    _check_same_size(array, labels)
    if max_panel_px < 64:
        raise ValueError(f"`max_panel_px` must be 64 or more, got {max_panel_px}.")
    if pixel_size_um is not None and not (math.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise ValueError(f"`pixel_size_um` must be a finite number > 0, got {pixel_size_um}.")
    factor = math.ceil(max(labels.shape) / max_panel_px)
    repeat = max(1, min(_MIN_PANEL_PX // max(labels.shape), 64)) if factor == 1 else 1
    panels = _panels(array, labels, factor, repeat)
    if distance_map is not None:
        map_array = np.asarray(distance_map)
        _check_same_size(map_array, labels, "distance_map")
        colored_map = color_distance_map(mean_blocks(map_array, factor))
        panels.append(("distance map", _enlarge(colored_map, repeat)))

    font, title_font = _font(14), _font(16)
    height, width = panels[0][1].shape[:2]
    column = max(width, math.ceil(max(font.getlength(text) for text, _ in panels)))
    gap, line = _PANEL_GAP_PX, 22
    top = gap + (line + 4 if title else 0)
    canvas_size = (gap + len(panels) * (column + gap), top + line + height + gap)
    canvas = Image.new("RGB", canvas_size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        text = _fit(_plain(title), title_font, canvas_size[0] - 2 * gap)
        draw.text((gap, gap), text, font=title_font, fill=_INK)
    for number, (text, picture) in enumerate(panels):
        left = gap + number * (column + gap)
        draw.text((left, top), text, font=font, fill=_FAINT_INK)
        canvas.paste(Image.fromarray(picture), (left, top + line))
    if pixel_size_um is not None:
        step_um = pixel_size_um * factor / repeat
        _draw_scale_bar(draw, (gap, top + line, gap + width, top + line + height), step_um)
    return np.asarray(canvas).copy()


def _panels(
    array: NDArray[np.generic], labels: NDArray[np.uint32], factor: int, repeat: int
) -> list[tuple[str, RGBImage]]:
    """Captions and pictures of image, contours and labels, shrunk by `factor` or enlarged by `repeat`."""
    num_cells = len(number_cells(labels)[0])
    limits = _limits(array, _LOW_PERCENT, _HIGH_PERCENT)
    small_labels = shrink_labels(labels, factor)
    shown = _enlarge(_compose(mean_blocks(array, factor), limits), repeat)
    outlined = draw_contours(
        shown,
        _enlarge(small_labels, repeat),
        thickness_px=max(1, min(repeat // 2, 2)),
        stretch=False,
    )
    size = "" if factor == repeat == 1 else f" (1:{factor})" if factor > 1 else f" ({repeat}:1)"
    cells = "1 cell" if num_cells == 1 else f"{num_cells} cells"
    return [
        ("image" + size, shown),
        (f"contours: {cells}", outlined),
        ("labels", _enlarge(color_labels(small_labels), repeat)),
    ]


def write_png(path: str | os.PathLike[str], rgb: ArrayLike) -> None:
    """Write an 8-bit picture as PNG; the file appears whole or not at all.

    Parameters
    ----------
    path : path
        Missing folders above it are made; an older file is replaced.
    rgb : (H, W, 3) or (H, W) uint8 array_like

    Raises
    ------
    ValueError
        Not an 8-bit picture.
    ImageFileError
        `path` is a folder.
    """
    from PIL import Image

    array = np.asarray(rgb)
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not fits or array.size == 0:
        raise ValueError(
            f"`rgb` must be (H, W, 3) or (H, W) uint8, got {array.dtype} of shape {array.shape}: "
            "pass it through `to_display`."
        )
    with atomic_path(path) as temporary:
        picture = Image.fromarray(np.ascontiguousarray(array))
        picture.save(temporary, format="PNG", compress_level=4)


# ------------------------------------------------------------------------------------- intensities


def _image_array(image: ArrayLike) -> NDArray[np.generic]:
    array = np.asarray(image)
    if array.dtype.kind not in "buif":
        raise TypeError(f"`image` must hold real numbers, got {array.dtype}: convert it first.")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"`image` must be (H, W) or (H, W, C) with at least one pixel, got shape {array.shape}: "
            "choose one plane."
        )
    return array


def _check_same_size(
    array: NDArray[np.generic], labels: NDArray[np.uint32], name: str = "image"
) -> None:
    if array.shape[:2] != labels.shape:
        raise ValueError(
            f"`{name}` and `labels` must have the same height and width, got {array.shape[:2]} and "
            f"{labels.shape}: pass the pair that belongs together."
        )


def _limits(array: NDArray[np.generic], low: float, high: float) -> list[tuple[float, float]]:
    """Per channel: the values that become black and full brightness; equal when there is nothing to see."""
    channels = array[..., None] if array.ndim == 2 else array
    limits = []
    for number in range(channels.shape[2]):
        flat = channels[..., number].ravel()
        sample = flat[:: math.ceil(flat.size / _SAMPLED_PIXELS)].astype(np.float64)
        finite = sample[np.isfinite(sample)]
        if finite.size == 0:
            limits.append((0.0, 0.0))
            continue
        bottom, top = (float(v) for v in np.percentile(finite, [low, high]))
        if bottom == top:
            everything = flat[np.isfinite(flat)] if flat.dtype.kind == "f" else flat
            bottom, top = float(everything.min()), float(everything.max())
        limits.append((bottom, top))
    return limits


def _compose(array: NDArray[np.generic], limits: Sequence[tuple[float, float]]) -> RGBImage:
    """Stretch each channel between its limits and put the channels together in colour."""
    channels = array[..., None] if array.ndim == 2 else array
    count = channels.shape[2]
    stretched = []
    for number, (bottom, top) in enumerate(limits):
        plane = channels[..., number].astype(np.float32)
        plane[~np.isfinite(plane)] = bottom
        scale = 1.0 / (top - bottom) if top > bottom else 0.0
        stretched.append(np.clip((plane - bottom) * scale, 0.0, 1.0))
    if count == 1:
        stretched *= 3
    elif count != 3:
        mixed = np.zeros((*stretched[0].shape, 3), np.float32)
        for number, plane in enumerate(stretched):
            mixed += plane[..., None] * np.array(
                _CHANNEL_COLORS[number % len(_CHANNEL_COLORS)], np.float32
            )
        stretched = [np.clip(mixed[..., c], 0.0, 1.0) for c in range(3)]
    return np.stack([np.rint(255.0 * plane).astype(np.uint8) for plane in stretched], axis=-1)


def _blocks(array: NDArray, factor: int, combine: np.ufunc) -> NDArray:
    """Combine blocks of factor × factor pixels with a ufunc; the last ones may be smaller."""
    rows = combine.reduceat(array, np.arange(0, array.shape[0], factor), axis=0)
    return combine.reduceat(rows, np.arange(0, array.shape[1], factor), axis=1)


def _factor(factor: int) -> int:
    if isinstance(factor, bool) or not isinstance(factor, (int, np.integer)) or factor < 1:
        raise ValueError(f"`factor` must be an integer >= 1, got {factor!r}.")
    return int(factor)


def _enlarge(array: NDArray, repeat: int) -> NDArray:
    """Repeat each pixel `repeat` times along both axes."""
    return array if repeat == 1 else array.repeat(repeat, axis=0).repeat(repeat, axis=1)


def _color(color: Sequence[int]) -> NDArray[np.uint8]:
    values = np.asarray(color)
    if (
        values.shape != (3,)
        or values.dtype.kind not in "iu"
        or values.min() < 0
        or values.max() > 255
    ):
        raise ValueError(f"`color` must be three whole numbers 0..255, got {color!r}.")
    return values.astype(np.uint8)


# ---------------------------------------------------------------------------------------------- text


def _font(size: int) -> Any:
    """Pillow's built-in font: the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _plain(text: str) -> str:
    """Text in the characters that Pillow's built-in font has (ASCII)."""
    text = text.replace("µ", "u").replace("\u03bc", "u").replace("×", "x")
    text = text.replace("–", "-").replace("—", "-")
    parts = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in parts)


def _fit(text: str, font: Any, width_px: float) -> str:
    """Shorten a text in its middle until it fits."""
    if font.getlength(text) <= width_px:
        return text

    def cut(keep: int) -> str:
        return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]

    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(cut(middle)) <= width_px:
            fits = middle
        else:
            too_long = middle
    return cut(fits) if fits else ""


def _draw_scale_bar(draw: Any, box: tuple[int, int, int, int], step_um: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten µm, near a fifth of the width, in the lower right."""
    left, _, right, bottom = box
    length_um = _round_length(step_um * (right - left) / 5.0)
    length_px = max(1, round(length_um / step_um))
    text = f"{length_um:g} um" if length_um < 1000 else f"{length_um / 1000:g} mm"
    font = _font(13)
    x1, y1 = right - 10, bottom - 10
    draw.rectangle((x1 - length_px - 1, y1 - 4, x1, y1 + 1), fill=(0, 0, 0))
    draw.rectangle((x1 - length_px, y1 - 3, x1 - 1, y1), fill=(255, 255, 255))
    anchor = (x1 - length_px / 2, y1 - 6)
    draw.text(
        anchor,
        text,
        font=font,
        fill=(255, 255, 255),
        anchor="mb",
        stroke_width=1,
        stroke_fill=(0, 0, 0),
    )


def _round_length(wanted_um: float) -> float:
    """The largest of 1, 2, 5 × 10^k that is not above the wanted length."""
    power = 10.0 ** math.floor(math.log10(wanted_um))
    return max(f * power for f in (1.0, 2.0, 5.0) if f * power <= wanted_um * (1 + 1e-9))
