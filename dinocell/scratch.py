"""Arrays of whole images that are too large for the memory: in temporary files, read band by band.

An array in a file looks like any other: the operating system loads what is used and writes back what
is not, within the memory that a job has.  What is computed from it by the functions here is stored as
it is itself, so that whoever makes the first array decides for all of them.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dinocell.errors import DINOCellError

TILE_PX = 4096
"""An image with more pixels than a square of this edge is kept in a temporary file."""

_BAND_PX = 2**22
_SAMPLE_BANDS = 32


def is_large(shape: tuple[int, ...], tile_px: int | None = None) -> bool:
    """Whether an image of (H, W, ...) has more pixels than a square of edge `tile_px`."""
    return shape[0] * shape[1] > (TILE_PX if tile_px is None else tile_px) ** 2


def in_file(array: Any) -> bool:
    """Whether an array, or that of which it is a view, is stored in a file."""
    while isinstance(array, np.ndarray):
        if isinstance(array, np.memmap):
            return True
        array = array.base
    return isinstance(array, mmap.mmap)


def zeros_in_file(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros in a temporary file without a name, which ends with the last view of the array.

    Raises
    ------
    DINOCellError
        The folder for temporary files (TMPDIR) has no room for it, or cannot be written.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile() as file:
            # A file with holes would kill the process at the write that finds the disk full.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise DINOCellError(
            f"a large image needs {size / 1e9:.1f} GB in '{tempfile.gettempdir()}', which cannot be written "
            f"({error.strerror or error}): free space there, or set TMPDIR to a folder that has it"
        ) from error


def zeros_like(array: NDArray[Any], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros of another shape and type, stored as `array` is."""
    return zeros_in_file(shape, dtype) if in_file(array) else np.zeros(shape, dtype)


def empty_image(shape: tuple[int, ...], dtype: DTypeLike, tile_px: int | None) -> NDArray[Any]:
    """An (H, W, ...) array to write to, in a file where `is_large` says so."""
    return zeros_in_file(shape, dtype) if is_large(shape, tile_px) else np.empty(shape, dtype)


def contiguous(array: NDArray[Any], dtype: DTypeLike | None = None) -> NDArray[Any]:
    """The same values, C-contiguous and of `dtype`: `array` itself, or a copy stored as it is."""
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if not in_file(array):
        return np.ascontiguousarray(array, wanted)
    if array.flags.c_contiguous and array.dtype == wanted:
        return array
    return copied(array, zeros_in_file(array.shape, wanted))


def copied(array: NDArray[Any], copy: NDArray[Any]) -> NDArray[Any]:
    """`copy`, once it holds the values of `array`."""
    for rows in row_bands(array.shape):
        copy[rows] = array[rows]
    return copy


def row_bands(shape: tuple[int, ...], rows_px: int | None = None) -> Iterator[slice]:
    """Rows of an (H, W, ...) array from the first to the last, some four million values at a time.

    A smaller array is one band.  `rows_px` gives the number of rows instead.
    """
    size = rows_px or max(1, _BAND_PX // max(1, int(np.prod(shape[1:]))))
    for top in range(0, shape[0], size):
        yield slice(top, min(top + size, shape[0]))


def all_finite(array: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(np.isfinite(array[rows]).all()) for rows in row_bands(array.shape))


def sampled_rows(image: NDArray[Any]) -> NDArray[Any]:
    """The image itself, or of a large one 32 bands of rows, from the first to the last, one below the other.

    The choice depends on the size alone, so that the same image is always seen alike.
    """
    if not is_large(image.shape):
        return image
    height, width = image.shape[:2]
    rows = max(1, TILE_PX**2 // width // _SAMPLE_BANDS)
    starts = np.linspace(0, height - rows, _SAMPLE_BANDS).astype(int)
    return np.concatenate([image[start : start + rows] for start in starts])
