"""The front door: read an image or a label image from a file.

An image leaves this module as a `(H, W)` or `(H, W, C)` array in the data type of its file, channel
last; a label image as `(H, W)` uint32.  Everything a file can be wrong about (absent, empty, cut
short, a stack, a text with an image's suffix, not-a-number pixels) ends in one sentence of
`dinocell.errors`, never in a half-read array, and the libraries' own warnings stay inside.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from dinocell.errors import DINOCellError, ImageFileError, MissingExtraError, UsageError
from dinocell.io.annotations import read_json_labels
from dinocell.io.challenge import challenge_frame
from dinocell.io.microscopes import MICROSCOPE_FILES
from dinocell.io.names import UNREADABLE_KINDS
from dinocell.io.ome_zarr import label_image, open_zarr
from dinocell.io.planes import (
    MAX_PIXELS,
    RGB_NAMES,
    PlaneChoice,
    RawImage,
    Selection,
    channel_positions,
    select_channels,
)
from dinocell.io.projects import read_roi_labels, read_seg_npy
from dinocell.io.raster import open_npy, open_picture
from dinocell.io.s3 import S3Error, S3Path, local_copy, place_of, refusal
from dinocell.io.stacks import Series, Stack
from dinocell.io.tiff import open_tiff
from dinocell.labels import all_whole
from dinocell.pairs import IMAGE_SUFFIXES, SEG_NPY, is_zarr
from dinocell.scratch import all_finite, contiguous, row_bands


@dataclass(frozen=True)
class Image:
    """One 2-D image as read from a file.

    Attributes
    ----------
    pixels : (H, W) or (H, W, C) ndarray in the data type of the file (native byte order), channel
        last, C ≥ 2; 1-bit images are uint8 with 0 and 255.  Finite everywhere.
    path : Path of the file
    pixel_size_um : float or None
        Edge of one pixel in µm, from OME or ImageJ metadata alone; None when they do not say, or say
        two different edges.  The bare TIFF resolution (dots per inch or cm) is not used: it holds
        printing defaults, or the camera's pixel without the objective's magnification.
    channel_names : tuple of str, or None
        One name per channel when the file has them (and for RGB: red, green, blue), else None.
    notes : tuple of str
        What a careful user should know: the picture was turned upright, a pixel size was not used.
    """

    pixels: np.ndarray
    path: Path
    pixel_size_um: float | None = None
    channel_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_colour(self) -> bool:
        """Whether it is a picture in red, green and blue, of which one is no more the image than another."""
        return self.channel_names == RGB_NAMES


def read_image(
    path: str | os.PathLike[str],
    *,
    max_pixels: int = MAX_PIXELS,
    tile_px: int | None = None,
    **choice: Unpack[PlaneChoice],
) -> Image:
    """Read one 2-D image from a file, or from a folder in Zarr format; see `describe_image` for formats.

    The content decides which reader is used, not the suffix.  Only the chosen planes are read.

    Parameters
    ----------
    path : path of the file, or its address on S3 (``s3://BUCKET/KEY``): of OME-Zarr the chunks of the
        chosen planes are fetched, of other formats the file
    channels : sequence of int or str, optional
        Channels to keep, in this order: names (case does not matter) or positions from 0, see
        `select_channels`.  One channel gives `(H, W)`.
    z : int, `max` or `mean`, optional
        Which plane along z to read, counted from 0, or the largest value or mean (float32) of each
        pixel over all of them.
    time, scene : int, optional
        Which point in time, and which scene (position, series) to read, counted from 0.
    page : int, optional
        In place of `z`, `time` and `scene`: which plane to read, counted from 0 through all scenes and
        all axes other than channel, row and column, in the order of the file.
    max_pixels : int, refuse images of more pixels (height times width) than this
    tile_px : int, optional: a TIFF or `.npy` image of more pixels than a square of this edge
        (default: `scratch.TILE_PX`) is kept in a file, not in memory.

    Where a file holds more than one plane, the choice must leave one.  Planes whose meaning the file does not
    say (a plain multi-page TIFF, a `.npy` of shape `(n, H, W)`) are what the choice takes them for: z, time
    or channels.

    Returns Image: pixels keep the data type of the file.  Alpha is dropped; PNG and BMP palettes
    become colours; a colour image with three equal channels becomes `(H, W)`; 1-bit becomes uint8 0
    and 255; TIFF "white is zero" is inverted.  TIFF palettes are display tables and are ignored:
    the stored numbers are the intensities.  A picture with an orientation tag (EXIF, TIFF) is
    turned upright, as viewers show it; `notes` says so.

    Raises UsageError (the file does not exist, or it has no such channel or plane); ImageFileError (the
    file is empty, cut short, unreadable or of a kind that cannot be read; it holds several planes and
    none is chosen; pixels are NaN, infinite or complex; a side is 0; it is too large);
    MissingExtraError (the format or its compression needs an optional package).
    """
    wanted = Selection(max_pixels=max_pixels, tile_px=tile_px, **choice)  # type: ignore[arg-type]
    path, channels = _existing_file(path), wanted.channels
    with local_copy(path) as here:
        raw = _read_raw(here, wanted)
    pixels, names = raw.pixels, raw.channel_names
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if channels is not None and not raw.is_selected:
        positions = channel_positions(1 if pixels.ndim == 2 else pixels.shape[2], names, channels)
        pixels = select_channels(pixels, names, channels)
        names = tuple(names[i] for i in positions) if names else None
    if raw.is_rgb and _all_channels_equal(pixels):
        pixels, names = pixels[..., 0], None
    if pixels.dtype.kind == "f" and not all_finite(pixels):
        bad = sum(
            int(np.count_nonzero(~np.isfinite(pixels[rows]))) for rows in row_bands(pixels.shape)
        )
        raise ImageFileError(
            f"Pixels of '{path}' must be finite numbers, {bad:,} of {pixels.size:,} are NaN or "
            "infinite: replace them (for example by the background value) before segmenting"
        )
    return Image(contiguous(pixels), path, raw.pixel_size_um, names, raw.notes)


@dataclass(frozen=True)
class Contents:
    """What a file holds: the name of its format, and its scenes; see `Series`."""

    path: Path
    format: str
    series: tuple[Series, ...]


def describe_image(path: str | os.PathLike[str]) -> Contents:
    """What a file holds, by named axes, without its pixels.

    Read are TIFF, OME-TIFF, ImageJ TIFF, PNG, JPEG, BMP, `.npy`; with the extra `formats` also CZI, ND2, LIF
    and OME-Zarr (a folder).

    Raises UsageError, ImageFileError and MissingExtraError as `read_image` does.
    """
    path = _existing_file(path)
    with local_copy(path) as here, _one_sentence(here), _opened(here, Selection()) as stack:
        return Contents(path, stack.format, tuple(stack.series))


def read_labels(
    path: str | os.PathLike[str],
    *,
    page: int | None = None,
    max_pixels: int = MAX_PIXELS,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """`read_label_file` without its notes: (H, W) uint32."""
    return read_label_file(path, page=page, max_pixels=max_pixels, shape=shape).pixels


def read_label_file(
    path: str | os.PathLike[str],
    *,
    page: int | None = None,
    max_pixels: int = MAX_PIXELS,
    shape: tuple[int, int] | None = None,
) -> Image:
    """Read a label image: 0 is background, every other number one cell.

    Parameters
    ----------
    path : path of a PNG, TIFF, BMP or `.npy` of whole numbers; floating point is accepted when every
        value is whole.  Palette PNGs give their palette positions, 1-bit files 0 and 1, and colours
        with three equal channels count as gray.  Or OME-Zarr, a `_seg.npy` file of Cellpose, a zip of
        ImageJ ROIs, GeoJSON (`.geojson`), COCO of one image (`.json`), or a folder of the Cell Tracking
        Challenge.
    page : int, optional, which plane of a stack, as in `read_image`, or which frame of such a folder
    max_pixels : int, refuse files of more pixels than this
    shape : (H, W), optional, size of the image that the labels belong to: ROIs and GeoJSON need it, other
        files do not use it

    Returns Image: its pixels (H, W) are uint32, the numbers as stored; gaps and unconnected parts stay.
    Turned upright, as images are; `notes` says so, and what of outlines was left out.

    Raises UsageError (the file or the page does not exist); ImageFileError (as for `read_image`;
    also colours, negative or fractional numbers, numbers above 2³² − 1).
    """
    path = Path(path)
    if path.is_dir():
        path = label_image(path) if is_zarr(path) else challenge_frame(path, page)
        page = page if is_zarr(path) else None
    path, suffix = _existing_file(path), path.suffix.lower()
    if page and (suffix in (".zip", ".json", ".geojson") or path.name.endswith(SEG_NPY)):
        raise UsageError(
            f"`page` must be 0 for '{path}', whose labels lie in one plane, got {page}: leave it out"
        )
    found: list[str] = []
    if suffix == ".zip":
        return Image(read_roi_labels(path, shape, found), path, notes=tuple(found))
    if suffix in (".json", ".geojson"):
        return Image(read_json_labels(path, shape, max_pixels, found), path, notes=tuple(found))
    if path.name.endswith(SEG_NPY):
        raw = RawImage(read_seg_npy(path))
    else:
        raw = _read_raw(path, Selection(page=page, max_pixels=max_pixels, as_labels=True))
    pixels = raw.pixels
    if pixels.ndim == 3 and raw.is_rgb and _all_channels_equal(pixels):
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        what = "a colour picture" if raw.is_rgb else f"an image of {pixels.shape[2]} channels"
        raise ImageFileError(
            f"A label image is needed (one channel, 0 background, one whole number per cell), but "
            f"'{path}' is {what}: export the labels as 16-bit gray PNG or TIFF"
        )
    if pixels.dtype.kind == "f" and not all_whole(pixels):
        raise ImageFileError(
            f"A label image must hold whole numbers, '{path}' ({pixels.dtype}) holds fractions or "
            "NaN: it looks like an intensity image or a distance map, give the labels"
        )
    low, high = pixels.min().item(), pixels.max().item()  # float16 cannot hold the bound
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise ImageFileError(
            f"Labels must lie in 0 … 4,294,967,295, '{path}' holds {low} … {high}: renumber them "
            "from 1 with background 0"
        )
    notes = tuple(note for note in raw.notes if "`pixel_size_um`" not in note)
    return Image(contiguous(pixels, np.uint32), path, raw.pixel_size_um, notes=notes)


def _existing_file(path: str | os.PathLike[str]) -> Path:
    path = place_of(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as err:
        raise UsageError(f"There is no file '{path}': check the path") from err
    except S3Error:
        raise
    except OSError as err:
        raise ImageFileError(
            f"'{path}' cannot be opened ({err.strerror}): check the path and its rights"
        ) from err
    if stat.S_ISDIR(mode):
        if path.is_zarr() if isinstance(path, S3Path) else is_zarr(path):
            return path
        raise UsageError(f"An image file is needed, '{path}' is a folder: name the files in it")
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its other end
        raise ImageFileError(
            f"An image file is needed, '{path}' is a pipe, a socket or a device: save the image to a "
            "file and give that"
        )
    return path


def _not_read_message(path: Path, kind: str) -> str:
    return (
        f"{kind} files cannot be read yet, got '{path}': export the image as OME-TIFF or PNG "
        "(for example in Fiji or in the microscope's software)"
    )


def _all_channels_equal(pixels: np.ndarray) -> bool:
    return pixels.ndim == 3 and all(
        np.array_equal(pixels[..., 0], pixels[..., i]) for i in range(1, pixels.shape[2])
    )


def _read_raw(path: Path, wanted: Selection) -> RawImage:
    with _one_sentence(path), _opened(path, wanted) as stack:
        raw = stack.image(path, wanted)
    pixels = raw.pixels
    if pixels.dtype.kind not in "buif":
        raise ImageFileError(
            f"Pixels must be whole or floating-point numbers, '{path}' holds {pixels.dtype}: "
            "store the magnitude or one real part"
        )
    if not pixels.dtype.isnative:
        raw.pixels = contiguous(pixels, pixels.dtype.newbyteorder("="))
    raw.turn_upright()
    return raw


def _opened(path: Path, wanted: Selection) -> AbstractContextManager[Stack]:
    """The file, opened by the reader that its first bytes choose."""
    if path.is_dir():
        return open_zarr(path, wanted)
    with open(path, "rb") as file:
        head = file.read(32)
    if not head:
        raise ImageFileError(f"'{path}' is empty (0 bytes): copy or export it again")
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return open_tiff(path, wanted)
    if head.startswith(b"\x93NUMPY"):
        return open_npy(path, wanted)
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM")):
        return open_picture(path, head, wanted)
    for start, opener in MICROSCOPE_FILES.items():
        if head.startswith(start):
            return opener(path, wanted)
    raise ImageFileError(_unknown_content_message(path, head))


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turn whatever a reader raises into one sentence."""
    try:
        yield
    except DINOCellError:
        raise
    except PermissionError as err:
        raise ImageFileError(
            f"You have no permission to read '{path}': change the rights of the file"
        ) from err
    except MemoryError as err:
        raise ImageFileError(
            f"'{path}' needs more memory than this machine has: crop it or use a larger machine"
        ) from err
    except Exception as err:  # decoders raise anything on damaged bytes
        place: Any = path
        if isinstance(place, S3Path) and (sentence := refusal(place, err)):
            raise S3Error(sentence) from err
        if "requires the 'imagecodecs' package" in str(err):
            raise MissingExtraError(
                f"The compression of '{path}' needs the package imagecodecs, which is not "
                "installed: run `pip install imagecodecs`"
            ) from err
        raise ImageFileError(
            f"'{path}' must be a whole image file, it is damaged or cut short "
            f"({_first_line(err)}): copy or export it again"
        ) from err


def _first_line(err: BaseException) -> str:
    text = str(err).strip().splitlines()
    return (text[0] if text else type(err).__name__).rstrip(".:")[:160]


def _unknown_content_message(path: Path, head: bytes) -> str:
    if kind := UNREADABLE_KINDS.get(path.suffix.lower()):
        return _not_read_message(path, kind)
    text = all(byte in b"\t\n\r\f" or byte >= 32 for byte in head)
    try:
        head.decode()
    except UnicodeDecodeError as err:
        text = text and err.start > 28  # the last letter has several bytes and is cut
    return (
        f"'{path}' must be an image, but its content is {'text' if text else 'of an unknown kind'}: "
        f"give an image file ({', '.join(IMAGE_SUFFIXES)})"
    )
