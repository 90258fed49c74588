"""Arrays of whole images that are too large for the memory: in temporary files, read band by band.

An array in a file looks like any other, so every algorithm has one form for small and large images.
The operating system loads the pages that are used and writes others back to the file; it can always
take their memory, which it cannot do with ordinary arrays without swap space.  The price is the traffic
to the disk: a pass from row to row reads and writes each page once, and the flood of the watershed
stays near each pixel's neighbours.  What the functions here make of an array is stored as that array
is, so that whoever makes the first one decides for all of them.
"""

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dinocell.errors import ScratchSpaceError

TILE_PX = 4096
"""An image with more pixels than a square of this edge is kept in a temporary file."""

_BAND_PX = 2**22
_BLOCK_PX = 64
_CHUNK = bytes(2**20)


def is_large(shape: tuple[int, ...], tile_px: int | None = None) -> bool:
    """Whether an image of (H, W, ...) has more pixels than a square of edge `tile_px`."""
    return shape[0] * shape[1] > (TILE_PX if tile_px is None else tile_px) ** 2


def in_file(array: Any) -> bool:
    """Whether an array, or that of which it is a view, is stored in a file."""
    while isinstance(array, (np.ndarray, _Memory)) and array.base is not None:
        array = array.base
    return isinstance(array, (mmap.mmap, _Memory))


def zeros_in_file(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros in a temporary file without a name, which ends with the last view of the array.

    Raises
    ------
    ScratchSpaceError
        The folder for temporary files (TMPDIR) has no room for it, or cannot be written.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file, size)
            return _mapped(file, np.dtype(dtype), shape)
    except OSError as error:
        raise ScratchSpaceError(
            f"A large image needs {size / 1e9:.1f} GB more in the folder for temporary files "
            f"({os.environ.get('TMPDIR') or '/tmp'}), in all about 25 bytes for each pixel, but it cannot be "
            f"written ({error.strerror or error}): free space there, or set TMPDIR to a folder that has it"
        ) from error


class _Memory:
    """Memory that `np.asarray` takes for writable: a mapped file, or that of the array `base`."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype, base: Any) -> None:
        self.base = base
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": dtype.str,
            "data": (address, False),
        }


def as_if_writable(array: NDArray[Any]) -> NDArray[Any]:
    """A contiguous array under flags that say writable, for compiled functions that only read it.

    numba would compile once more for read-only arrays, and a writable copy of a memory map
    (`numpy.load(path, mmap_mode="r")`) would fill the memory.  Whoever writes kills the process.
    """
    if array.flags.writeable or not array.size:
        return array
    return np.asarray(_Memory(array.ctypes.data, array.shape, array.dtype, array))


def _mapped(file: Any, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    """The content of a file as an array that keeps no file descriptor.

    `mmap.mmap` duplicates the descriptor and keeps it, so that some hundred results of large images
    would use up those that a process may have; the system needs none.  Only POSIX has `mmap`.
    """
    if os.name != "posix":
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    system.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size, rights = os.fstat(file.fileno()).st_size, mmap.PROT_READ | mmap.PROT_WRITE
    address = system.mmap(None, size, rights, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = _Memory(address, shape, dtype, None)
    end = weakref.finalize(memory, system.munmap, address, size)
    end.atexit = False  # other threads may use it until the process ends
    return np.asarray(memory)


def _reserve(file: Any, size: int) -> None:
    """Give a file its blocks: with holes, the write that finds the disk full would kill the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        else:
            return
    for start in range(0, size, len(_CHUNK)):
        file.write(_CHUNK[: size - start])
    file.flush()


def zeros_like(array: NDArray[Any], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros of another shape and type, stored as `array` is."""
    return zeros_in_file(shape, dtype) if in_file(array) else np.zeros(shape, dtype)


def new_image(shape: tuple[int, ...], dtype: DTypeLike, tile_px: int | None) -> NDArray[Any]:
    """Zeros of shape (H, W, ...), in a file where `is_large` says so."""
    return zeros_in_file(shape, dtype) if is_large(shape, tile_px) else np.zeros(shape, dtype)


def contiguous(array: NDArray[Any], dtype: DTypeLike | None = None) -> NDArray[Any]:
    """The same values, C-contiguous and of `dtype`: `array` itself, or a copy stored as it is."""
    wanted = array.dtype if dtype is None else np.dtype(dtype)
    if not array.size or not in_file(array):
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


def sampled_blocks(image: NDArray[Any]) -> NDArray[Any]:
    """The image itself, or of a large one as many pixels as a square of edge `TILE_PX` has.

    These are blocks of 64 x 64 px on an even lattice, put side by side: percentiles need pixels from
    everywhere, while noise and spikes are measured within a neighbourhood, which single pixels lack.  The
    choice depends on the size alone, so that the same image is always seen alike.
    """
    if not is_large(image.shape):
        return image
    sides = [min(_BLOCK_PX, side) for side in image.shape[:2]]
    count = TILE_PX**2 // (sides[0] * sides[1])
    height, width = image.shape[:2]
    num_rows = min(max(1, round((count * height / width) ** 0.5)), height // sides[0])
    num_cols = min(max(1, count // num_rows), width // sides[1])
    tops = np.linspace(0, height - sides[0], num_rows).astype(int)
    lefts = np.linspace(0, width - sides[1], num_cols).astype(int)
    return np.concatenate(
        [
            np.concatenate(
                [image[top : top + sides[0], left : left + sides[1]] for left in lefts], 1
            )
            for top in tops
        ]
    )


def picked(array: NDArray[Any], channels: Sequence[int]) -> NDArray[Any]:
    """`array[..., channels]`, stored as the array is."""
    if not in_file(array):
        return array[..., list(channels)]
    chosen = zeros_in_file((*array.shape[:-1], len(channels)), array.dtype)
    for place, channel in enumerate(channels):
        copied(array[..., channel], chosen[..., place])
    return chosen
