"""Read PNG, JPEG, BMP and `.npy` files, which hold one image or a plain array."""

import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dinocell.errors import ImageFileError, UsageError
from dinocell.io.planes import RGB_NAMES, RawImage, Selection, check_page, check_size
from dinocell.scratch import copied, new_image

_HEADER_LOCK = threading.Lock()


def read_npy(path: Path, wanted: Selection) -> RawImage:
    """Read a plane of an array; only the pages of the file that hold it are touched."""
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
    axes, shape = _npy_axes(path, shape, wanted.channels is not None)
    check_size(path, shape[axes.index("Y")], shape[axes.index("X")], wanted.max_pixels)
    page = check_page(path, [(axes, shape)], wanted.page)
    array = np.load(path, mmap_mode="r", allow_pickle=False).reshape(shape)
    if axes[0] == "Q":
        array = array.reshape(-1, *shape[axes.index("Y") :])[page]
    elif axes[0] == "C":
        array = np.moveaxis(array, 0, -1)
    return RawImage(copied(array, new_image(array.shape, array.dtype, wanted.tile_px)))


def _npy_axes(
    path: Path, shape: tuple[int, ...], planes_are_channels: bool
) -> tuple[str, tuple[int, ...]]:
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
    if len(shape) == 2:
        return "YX", shape
    if shape[-1] <= 16 and shape[-1] < shape[-3]:
        return "Q" * (len(shape) - 3) + "YXC", shape
    if len(shape) == 3 and planes_are_channels:
        return "CYX", shape
    return "Q" * (len(shape) - 2) + "YX", shape


def read_picture(path: Path, head: bytes, wanted: Selection) -> RawImage:
    """Read a PNG, JPEG or BMP that starts with the bytes `head` (at least 26)."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

    if wanted.page not in (None, 0):
        raise UsageError(
            f"`page` must be 0 for '{path}', which holds one plane, got {wanted.page}: leave it out"
        )
    bits, colour_type = 8, -1
    opener: Any
    if head.startswith(b"\x89PNG"):
        opener = PngImagePlugin.PngImageFile
        bits, colour_type = head[24], head[25]
    else:
        opener = (
            JpegImagePlugin.jpeg_factory if head[:1] == b"\xff" else BmpImagePlugin.BmpImageFile
        )
    with open(path, "rb") as file:
        # the plug-in itself, not PIL.Image.open: its size guard is a process-wide setting
        with _HEADER_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = opener(file)
        check_size(path, picture.height, picture.width, wanted.max_pixels)
        picture.load()
        orientation = _orientation(picture)
        if bits == 16 and colour_type in (2, 4, 6):
            raw = _read_png_16_bit_colour(path)
            raw.orientation = orientation
            return raw
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
    return RawImage(
        pixels, is_rgb, channel_names=RGB_NAMES if is_rgb else None, orientation=orientation
    )


def _orientation(picture: Any) -> int:
    """The EXIF orientation of a loaded picture; 1 (upright) where there is none that can be read."""
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
