"""Read PNG, JPEG, BMP and `.npy` files, which hold one image or a plain array."""

import contextlib
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinocell.errors import ImageFileError
from dinocell.io.planes import RGB_NAMES, RawImage, Selection
from dinocell.io.stacks import Choice, Series, Stack, by_plane, series_of
from dinocell.scratch import copied, new_image

_HEADER_LOCK = threading.Lock()
_DTYPES = {"F": np.float32, "I": np.int32, "I;16": np.uint16}  # of Pillow's modes; others are uint8


@contextlib.contextmanager
def open_npy(path: Path, wanted: Selection) -> Iterator[Stack]:
    """Open an array; only the pages of the file that hold a plane are touched."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
    if dtype.hasobject:
        raise ImageFileError(
            f"A .npy image must hold numbers, '{path}' holds Python objects, which are not loaded "
            "because that could run code: save it with a numeric data type"
        )
    if 0 in shape:
        raise ImageFileError(
            f"An image must have at least one pixel, '{path}' has shape {shape}: export it again"
        )
    series = _npy_series(path, shape, dtype)

    def plane(number: int, index: dict[str, int]) -> np.ndarray:
        array = np.load(path, mmap_mode="r", allow_pickle=False).reshape(series.shape)
        chosen = array[tuple(index.get(axis, slice(None)) for axis in series.axes)]
        return copied(chosen, new_image(chosen.shape, chosen.dtype, wanted.tile_px))

    yield by_plane("npy", [series], plane, wanted.tile_px)


def _npy_series(path: Path, shape: tuple[int, ...], dtype: Any) -> Series:
    """Axes and sizes of an array without a description: a short last axis holds the channels."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 2:
        raise ImageFileError(
            f"A .npy image must have two or three axes, '{path}' has shape {shape}: save (H, W) or "
            "(H, W, C)"
        )
    has_channels = len(shape) > 2 and shape[-1] <= 16 and shape[-1] < shape[-3]
    inner = "YXC" if has_channels else "YX"
    return series_of("Q" * (len(shape) - len(inner)) + inner, shape, dtype)


@contextlib.contextmanager
def open_picture(path: Path, head: bytes, wanted: Selection) -> Iterator[Stack]:
    """Open a PNG, JPEG or BMP that starts with the bytes `head` (at least 26)."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

    bits, colour_type = 8, -1
    opener: Any
    if head.startswith(b"\x89PNG"):
        kind, opener = "PNG", PngImagePlugin.PngImageFile
        bits, colour_type = head[24], head[25]
    elif head[:1] == b"\xff":
        kind, opener = "JPEG", JpegImagePlugin.jpeg_factory
    else:
        kind, opener = "BMP", BmpImagePlugin.BmpImageFile
    with open(path, "rb") as file:
        # the plug-in itself, not PIL.Image.open: its size guard is a process-wide setting
        with _HEADER_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = opener(file)
        gray = picture.mode in ("1", "L", "LA", "La", "F") or picture.mode.startswith("I")
        gray |= picture.mode == "P" and wanted.as_labels
        wide = np.uint16 if bits == 16 else _DTYPES.get(picture.mode, np.uint8)
        axes, shape = ("YX", ()) if gray else ("YXS", (3,))
        series = series_of(axes, (picture.height, picture.width, *shape), wide)
        series = series if gray else replace(series, channel_names=RGB_NAMES)
        if kind == "JPEG" or "exif" in picture.info:  # else Pillow would read the pixels to find it
            series = replace(series, orientation=_orientation(picture))

        def read(choice: Choice, page: int) -> RawImage:
            picture.load()
            if bits == 16 and colour_type in (2, 4, 6):
                raw = _read_png_16_bit_colour(path)
            else:
                raw = _loaded(picture, bits, colour_type, wanted)
            raw.orientation = _orientation(picture)
            return raw

        yield Stack(kind, [series], read)


def _loaded(picture: Any, bits: int, colour_type: int, wanted: Selection) -> RawImage:
    """The pixels of a loaded picture, without alpha."""
    mode = picture.mode
    if mode == "P" and not wanted.as_labels:
        picture, mode = picture.convert("RGBA"), "RGBA"
    elif mode in ("PA", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        picture, mode = picture.convert("RGB"), "RGB"
    pixels = np.asarray(picture)
    if mode in ("LA", "La"):
        pixels = pixels[..., 0]
    elif mode in ("RGBA", "RGBa"):
        pixels = pixels[..., :3]
    if bits == 16 and pixels.dtype == np.int32:
        pixels = pixels.astype(np.uint16)
    if wanted.as_labels and colour_type == 0 and bits in (2, 4):
        pixels = pixels // (255 // (2**bits - 1))  # gray PNGs of 2 and 4 bit arrive stretched to 8
    is_rgb = pixels.ndim == 3
    return RawImage(pixels, is_rgb, channel_names=RGB_NAMES if is_rgb else None)


def _orientation(picture: Any) -> int:
    """The EXIF orientation of a picture; 1 (upright) where there is none that can be read."""
    with _HEADER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return int(picture.getexif().get(274, 1))
        except Exception:  # a damaged EXIF block raises anything; the pixels are whole
            return 1


def _read_png_16_bit_colour(path: Path) -> RawImage:
    """Pillow cuts 16-bit colour to 8 bit; OpenCV keeps it (and gives blue first)."""
    import cv2

    content = path.read_bytes()
    _check_png_chunks(content)  # of what is damaged, libpng would complain on the screen
    pixels = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("the 16-bit colour PNG cannot be decoded")
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., 2::-1]
    is_rgb = pixels.ndim == 3
    return RawImage(pixels, is_rgb, channel_names=RGB_NAMES if is_rgb else None)


def _check_png_chunks(content: bytes) -> None:
    """Raise unless every chunk to the end of the picture is whole (PNG, section 5.3)."""
    place, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(content[place : place + 4], "big")
        body = content[place + 4 : place + 8 + length]
        check = content[place + 8 + length : place + 12 + length]
        if len(check) < 4 or zlib.crc32(body) != int.from_bytes(check, "big"):
            raise ValueError("the end of the file is missing or a chunk is damaged")
        kind, place = body[:4], place + 12 + length
