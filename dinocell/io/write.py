"""Write label images, images and maps as TIFF, PNG or `.npy`; a file appears whole or not at all."""

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np

from dinocell.errors import ImageFileError
from dinocell.files import atomic_path
from dinocell.labels import as_labels
from dinocell.scratch import contiguous, is_large

_TILE_EDGE_PX = 512
_CLASSIC_BYTES = 2**32 - 2**25  # what a TIFF with 32-bit offsets holds beside its header


def write_labels(
    path: str | os.PathLike[str],
    labels: np.ndarray,
    *,
    compression: str = "deflate",
    pixel_size_um: float | None = None,
) -> np.dtype[Any]:
    """Write a label image as TIFF, PNG or `.npy`, with the narrowest data type that holds it.

    Parameters
    ----------
    path : path, the suffix chooses the kind: `.tif`, `.tiff`, `.png` or `.npy`
    labels : (H, W) integer ndarray, 0 background, cells 1..n
    compression : {"deflate", "none"}
        Of TIFF files; both are lossless and readable by every TIFF reader.
    pixel_size_um : float, optional, written into TIFF files

    Returns numpy.dtype that was written: uint16 when no label is above 65,535, else uint32.

    Raises TypeError, ValueError (`labels` is not a 2-D integer array, holds negative numbers, or an
    option is unknown); ImageFileError (PNG with labels above 65,535 (use `.tif`); the file cannot
    be written).

    Notes
    -----
    16-bit TIFFs carry an ImageJ description with the display range 0 … n, so that Fiji does not show
    them black; 32-bit TIFFs, which ImageJ's own description cannot state, carry an OME description, and so
    do images of more than 4096 × 4096 pixels, which are stored in tiles (BigTIFF above 4 GB).
    """
    path = Path(path)
    array = np.asarray(labels)
    labels = as_labels(array.astype(np.uint8) if array.dtype == np.bool_ else array)
    if labels.size == 0:
        raise ValueError(
            f"`labels` must have at least one pixel, got shape {labels.shape}: give the whole array"
        )
    high = int(labels.max())
    dtype = np.dtype(np.uint16 if high <= np.iinfo(np.uint16).max else np.uint32)
    if path.suffix.lower() == ".png" and dtype != np.uint16:
        raise ImageFileError(
            f"PNG holds labels up to 65,535, '{path}' would need {high:,}: write a .tif instead"
        )
    _write_array(
        path,
        contiguous(labels, dtype),
        compression=compression,
        pixel_size_um=pixel_size_um,
        note=f"Label image: 0 is background, 1 to {high} are cells. Stretch the contrast to see it.",
        shown=(0, max(high, 1)),
    )
    return dtype


def write_image(
    path: str | os.PathLike[str],
    pixels: np.ndarray,
    *,
    compression: str = "deflate",
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] | None = None,
) -> None:
    """Write an image or a map as TIFF, PNG or `.npy`.

    Parameters
    ----------
    path : path, the suffix chooses the kind.  PNG takes uint8 gray or RGB and uint16 gray; TIFF
        whole numbers of up to 32 bit and floating point (booleans are stored as 0 and 255, float16
        as float32); `.npy` every boolean, integer and floating-point type.
    pixels : (H, W) or (H, W, C) ndarray
        Three uint8 channels without names are written as RGB, other channels as a stack.
    compression : {"deflate", "none"}, of TIFF files
    pixel_size_um : float, optional, written into TIFF files
    channel_names : sequence of str, optional, one per channel, written into TIFF files

    Raises TypeError, ValueError (the array or an option does not fit); ImageFileError (the file
    cannot be written).
    """
    pixels = np.asarray(pixels)
    if pixels.dtype.kind not in "buif":
        raise TypeError(f"`pixels` must be real numbers, got {pixels.dtype}: convert them first")
    if pixels.ndim not in (2, 3) or pixels.size == 0:
        raise ValueError(
            f"`pixels` must be (H, W) or (H, W, C), not empty, got {pixels.shape}: move its axes"
        )
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    num_channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if channel_names is not None and len(channel_names) != num_channels:
        raise ValueError(
            f"`channel_names` must name each of the {num_channels} channels, got "
            f"{list(channel_names)}: give one name for each channel"
        )
    _write_array(
        Path(path),
        pixels,
        compression=compression,
        pixel_size_um=pixel_size_um,
        channel_names=channel_names,
    )


def _write_array(
    path: Path,
    pixels: np.ndarray,
    *,
    compression: str,
    pixel_size_um: float | None,
    channel_names: Sequence[str] | None = None,
    note: str = "",
    shown: tuple[int, int] | None = None,
) -> None:
    suffix = path.suffix.lower()
    if suffix not in (".tif", ".tiff", ".png", ".npy"):
        raise ValueError(
            f"The name of an image must end in .tif, .tiff, .png or .npy, got '{path}': change the ending"
        )
    if compression not in ("deflate", "none"):
        raise ValueError(
            f"`compression` must be 'deflate' or 'none', got {compression!r}: choose one of these"
        )
    if pixel_size_um is not None and not (math.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise ValueError(f"`pixel_size_um` must be above 0, got {pixel_size_um}: give micrometres")
    if suffix != ".npy" and pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if suffix in (".tif", ".tiff") and pixels.dtype in (np.int64, np.uint64):
        raise ValueError(
            f"TIFF takes whole numbers of up to 32 bit, got {pixels.dtype}: convert them, or write "
            "a .npy instead"
        )
    if suffix == ".png":
        rgb = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
        if not (rgb or (pixels.ndim == 2 and pixels.dtype in (np.uint8, np.uint16))):
            raise ValueError(
                f"PNG takes uint8 gray or RGB and uint16 gray, got {pixels.dtype} of shape "
                f"{pixels.shape}: write a .tif instead"
            )
    try:
        with atomic_path(path) as temporary:
            if suffix == ".npy":
                np.save(temporary, np.ascontiguousarray(pixels), allow_pickle=False)
            elif suffix == ".png":
                from PIL import Image as PillowImage

                PillowImage.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
            else:
                _write_tiff(
                    temporary, pixels, compression, pixel_size_um, channel_names, note, shown
                )
    except OSError as err:
        raise ImageFileError(
            f"'{path}' cannot be written ({err.strerror or err}): choose another folder or free "
            "some space"
        ) from err


def _write_tiff(
    path: Path,
    pixels: np.ndarray,
    compression: str,
    pixel_size_um: float | None,
    channel_names: Sequence[str] | None,
    note: str,
    shown: tuple[int, int] | None,
) -> None:
    import tifffile

    if pixels.dtype == np.float16:
        pixels = pixels.astype(np.float32)
    is_rgb = (
        pixels.ndim == 3
        and pixels.shape[2] == 3
        and pixels.dtype == np.uint8
        and channel_names is None
    )
    axes = "YX" if pixels.ndim == 2 else "YXS" if is_rgb else "CYX"
    if axes == "CYX":
        pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    options: dict[str, Any] = {
        "photometric": "rgb" if is_rgb else "minisblack",
        "compression": "zlib" if compression == "deflate" else None,
        "software": "DINOCell",
    }
    metadata: dict[str, Any] = {"axes": axes}
    height, width = pixels.shape[-2:] if axes != "YXS" else pixels.shape[:2]
    tiled = is_large((height, width))
    if tiled:  # so that viewers open a part of it
        options |= {
            "tile": (_TILE_EDGE_PX, _TILE_EDGE_PX),
            "bigtiff": pixels.nbytes > _CLASSIC_BYTES,
        }
    for_imagej = (
        not tiled
        and pixels.dtype in (np.uint8, np.uint16, np.float32)
        and not path.name.lower().endswith((".ome.tif", ".ome.tiff"))
        and not (axes == "CYX" and 1 in pixels.shape)  # tifffile would fold the channels into rows
    )
    if for_imagej:
        if shown:
            metadata |= {"min": float(shown[0]), "max": float(shown[1])}
        if note:
            metadata["Info"] = note
        if channel_names and axes == "CYX":
            metadata |= {"Labels": list(channel_names), "mode": "grayscale"}
        if pixel_size_um is not None:
            metadata["unit"] = "um"
            options["resolution"] = (1.0 / pixel_size_um, 1.0 / pixel_size_um)
            options["resolutionunit"] = "NONE"
    else:
        # of the content in place of tifffile's random one, so that the same image gives the same bytes
        content = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        metadata["UUID"] = f"urn:uuid:{uuid5(NAMESPACE_OID, content)}"
        if note:
            metadata["Description"] = note
        if channel_names:
            metadata["Channel"] = {"Name": list(channel_names)}
        if pixel_size_um is not None:
            for axis in "XY":
                metadata[f"PhysicalSize{axis}"] = pixel_size_um
                metadata[f"PhysicalSize{axis}Unit"] = "µm"
    tifffile.imwrite(
        path, pixels, imagej=for_imagej, ome=not for_imagej, metadata=metadata, **options
    )
