"""Pictures of a segmentation: contours on the image, coloured cells, the distance map, one panel of all.

Pictures are (H, W, 3) uint8 RGB.  Nothing here needs a display or matplotlib.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from dinocell.files import writing
from dinocell.labels import as_labels, cell_borders
from dinocell.progress import count_text
from dinocell.results.captions import draw_scale_bar, fitted, load_font, plain_text
from dinocell.results.colors import color_distance_map, color_labels
from dinocell.scratch import row_bands

CONTOUR_COLOR = (255, 96, 0)
"""Colour of contours: visible on black, gray and white."""

# Hues of channels when there are not three of them; two are green and magenta.
_CHANNEL_COLORS = (
    (0.0, 1.0, 0.0),
    (1.0, 0.0, 1.0),
    (0.0, 0.6, 1.0),
    (1.0, 0.6, 0.0),
    (0.6, 0.6, 0.6),
)

_PERCENTILES = (0.1, 99.8)  # that become black and full brightness
_SAMPLED_PIXELS = _BAND_PX = 1 << 20
_PANEL_GAP_PX = 8
_MIN_PANEL_PX, _MAX_PANEL_PX = 256, 2048
_DETAIL_FACTOR, _DETAIL_PX = 3, 512
_BACKGROUND, _INK, _FAINT_INK = (16, 18, 22), (235, 235, 235), (160, 165, 172)

RGBImage = NDArray[np.uint8]


def to_display(image: ArrayLike, factor: int = 1) -> RGBImage:
    """Stretch an image of any type to 8-bit RGB for looking at.

    Parameters
    ----------
    image : (H, W) or (H, W, C) real ndarray
        Boolean, integer or float.  Each channel is stretched on its own, from the percentile 0.1 of its
        finite pixels (black) to 99.8 (full brightness); above a million pixels these are taken from an
        even sample.  One channel is gray, two are green and magenta, three are red, green and blue; four
        or more are added in fixed colours.
    factor : int >= 1
        Shrinks the picture by `mean_blocks`; the percentiles are those of the whole image.

    Returns
    -------
    (ceil(H / factor), ceil(W / factor), 3) uint8 ndarray
        A constant channel is black, also where it is not zero; NaN and infinity are black and do not
        count.  Where both percentiles fall on one value (nearly all pixels equal), the full range is
        stretched.

    Raises TypeError, ValueError (not a real array of one of these shapes, or no pixel).
    """
    array = _image_array(image)
    return _compose(mean_blocks(array, factor), _limits(array))


def draw_contours(picture: RGBImage, labels: ArrayLike, *, thickness_px: int = 1) -> RGBImage:
    """A copy of a picture with the border of every cell, which lies inside the cell: see `cell_borders`.

    Raises ValueError (picture and labels differ in height or width).
    """
    labels = as_labels(labels)
    _check_same_size(picture, labels)
    drawn = picture.copy()
    drawn[cell_borders(labels, thickness_px=thickness_px)] = CONTOUR_COLOR
    return drawn


def shrink_labels(labels: ArrayLike, factor: int) -> NDArray[np.uint32]:
    """Shrink labels by a whole factor so that no cell gets lost between the pixels.

    Each block of factor × factor pixels, at the lower and right edge perhaps a smaller one, becomes one
    pixel with the largest label of the block.  For pictures: areas grow by about half a block.
    """
    labels = as_labels(labels)
    return labels if factor == 1 else _blocks(labels, factor, np.maximum, np.uint32)


def mean_blocks(array: NDArray[Any], factor: int) -> NDArray[Any]:
    """Shrink an (H, W) or (H, W, C) image or map by a whole factor, to the mean of each block, float64.

    Blocks are those of `shrink_labels`; `array` itself is returned when `factor` is 1.
    """
    if factor == 1:
        return array
    total = _blocks(array, factor, np.add, np.float64)
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
) -> RGBImage:
    """Put image, contours, coloured labels and distance map side by side, with captions.

    Parameters
    ----------
    image : (H, W) or (H, W, C) real ndarray
        See `to_display`.
    labels : (H, W) integer array_like
        0 background, cells 1..n.
    distance_map : (H, W) real array_like, optional
        Adds the fourth picture.
    title : str, optional
        A line above the pictures; characters that the built-in font lacks become their plain form.
    pixel_size_um : float > 0, optional
        Adds a scale bar to the first picture.

    Returns
    -------
    (H', W', 3) uint8 ndarray
        An image with a side above 2048 px is shrunk by a whole factor, which the caption states;
        contours are drawn after shrinking, so they stay one pixel wide, and no cell vanishes; from a
        factor of 3 on, a second row shows some places at full size.  An image below 256 pixels is
        enlarged by a whole factor, stated too.

    Raises ValueError (sizes differ, or there is no pixel).
    """
    from PIL import Image, ImageDraw

    array = _image_array(image)
    labels = as_labels(labels)
    _check_same_size(array, labels)
    factor = math.ceil(max(labels.shape) / _MAX_PANEL_PX)
    repeat = max(1, min(_MIN_PANEL_PX // max(labels.shape), 64)) if factor == 1 else 1
    panels = _panels(array, labels, factor, repeat)
    if distance_map is not None:
        map_array = np.asarray(distance_map)
        _check_same_size(map_array, labels, "distance_map")
        colored_map = color_distance_map(mean_blocks(map_array, factor))
        panels.append(("distance map", _enlarge(colored_map, repeat)))

    font, title_font = load_font(14), load_font(16)
    height, width = panels[0][1].shape[:2]
    column = max(width, math.ceil(max(font.getlength(text) for text, _ in panels)))
    gap, line = _PANEL_GAP_PX, 22
    top = gap + (line + 4 if title else 0)
    details = _details(array, labels, len(panels), column) if factor >= _DETAIL_FACTOR else []
    detail_top = top + line + height + gap
    detail_height = line + max(picture.shape[0] for _, picture in details) + gap if details else 0
    canvas_size = (gap + len(panels) * (column + gap), detail_top + detail_height)
    canvas = Image.new("RGB", canvas_size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    if title:
        text = fitted(plain_text(title), title_font, canvas_size[0] - 2 * gap)
        draw.text((gap, gap), text, font=title_font, fill=_INK)
    for row_top, pictures in ((top, panels), (detail_top, details)):
        for number, (text, picture) in enumerate(pictures):
            left = gap + number * (column + gap)
            draw.text((left, row_top), text, font=font, fill=_FAINT_INK)
            canvas.paste(Image.fromarray(picture), (left, row_top + line))
    if pixel_size_um is not None:
        step_um = pixel_size_um * factor / repeat
        draw_scale_bar(draw, (gap, top + line, gap + width, top + line + height), step_um)
    return np.asarray(canvas).copy()


def _details(
    array: NDArray[np.generic], labels: NDArray[np.uint32], count: int, side_px: int
) -> list[tuple[str, RGBImage]]:
    """Captions and contours at full size of squares from the fullest part to one of few cells."""
    side_px = min(side_px, _DETAIL_PX, *labels.shape)
    rows = row_bands(labels.shape, side_px)
    covered = np.concatenate(
        [mean_blocks((labels[band] != 0).astype(np.float32), side_px) for band in rows]
    )
    covered = covered[: labels.shape[0] // side_px, : labels.shape[1] // side_px]
    order = np.argsort(-covered, axis=None, kind="stable")[: max(1, np.count_nonzero(covered))]
    limits = _limits(array)
    details = []
    for place in order[np.linspace(0, len(order) - 1, count).astype(int)]:
        row, col = (int(at) * side_px for at in np.unravel_index(place, covered.shape))
        square = np.s_[row : row + side_px, col : col + side_px]
        picture = _compose(array[square], limits)
        outlined = draw_contours(picture, np.ascontiguousarray(labels[square]))
        details.append((f"1:1 at row {row}, column {col}", outlined))
    return details


def _panels(
    array: NDArray[np.generic], labels: NDArray[np.uint32], factor: int, repeat: int
) -> list[tuple[str, RGBImage]]:
    """Captions and pictures of image, contours and labels, shrunk by `factor` or enlarged by `repeat`."""
    num_cells = int(labels.max(initial=0))
    small_labels = shrink_labels(labels, factor)
    shown = _enlarge(to_display(array, factor), repeat)
    line_px = max(1, min(repeat // 2, 2))
    outlined = draw_contours(shown, _enlarge(small_labels, repeat), thickness_px=line_px)
    size = "" if factor == repeat == 1 else f" (1:{factor})" if factor > 1 else f" ({repeat}:1)"
    cells = count_text(num_cells, "cell")
    return [
        ("image" + size, shown),
        (f"contours: {cells}", outlined),
        ("labels", _enlarge(color_labels(small_labels), repeat)),
    ]


def write_png(path: str | os.PathLike[str], rgb: RGBImage) -> None:
    """Write a picture as PNG; the file appears whole or not at all, and replaces an older one.

    Raises DINOCellError (`path` is a folder, or the disk refuses).
    """
    from PIL import Image

    with writing(path) as temporary:
        Image.fromarray(rgb).save(temporary, format="PNG", compress_level=2)


# ------------------------------------------------------------------------------------- intensities


def _image_array(image: ArrayLike) -> NDArray[np.generic]:
    array = np.asarray(image)
    if array.dtype.kind not in "buif":
        raise TypeError(f"`image` must hold real numbers, got {array.dtype}: convert it first")
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"`image` must be (H, W) or (H, W, C) with at least one pixel, got shape {array.shape}: "
            "choose one plane"
        )
    return array


def _check_same_size(
    array: NDArray[np.generic], labels: NDArray[np.uint32], name: str = "image"
) -> None:
    if array.shape[:2] != labels.shape:
        raise ValueError(
            f"`{name}` and `labels` must have the same height and width, got {array.shape[:2]} and "
            f"{labels.shape}: pass the pair that belongs together"
        )


def _limits(array: NDArray[np.generic]) -> list[tuple[float, float]]:
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
        bottom, top = (float(v) for v in np.percentile(finite, _PERCENTILES))
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


def _blocks(array: NDArray, factor: int, combine: np.ufunc, dtype: DTypeLike) -> NDArray:
    """Combine blocks of factor × factor pixels with a ufunc; the last ones may be smaller."""
    rows_px = max(1, _BAND_PX // (factor * array[0].size)) * factor
    bands = []
    for rows in row_bands(array.shape, rows_px):
        band = _combined_rows(array[rows].astype(dtype, copy=False), factor, combine)
        bands.append(_combined_rows(band.swapaxes(0, 1), factor, combine).swapaxes(0, 1))
    return np.concatenate(bands)


def _combined_rows(array: NDArray, factor: int, combine: np.ufunc) -> NDArray:
    whole = len(array) // factor * factor
    blocks = array[:whole].reshape(-1, factor, *array.shape[1:])
    rest = [combine.reduce(array[whole:], axis=0)[None]] if whole < len(array) else []
    return np.concatenate([combine.reduce(blocks, axis=1), *rest])


def _enlarge(array: NDArray, repeat: int) -> NDArray:
    """Repeat each pixel `repeat` times along both axes."""
    return array if repeat == 1 else array.repeat(repeat, axis=0).repeat(repeat, axis=1)
