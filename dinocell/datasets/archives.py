"""Data sets in NumPy files: TissueNet, LyNSeC."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from dinocell.datasets.folders import files_below
from dinocell.datasets.sample import Content, Sample, split_of
from dinocell.errors import DataSetError, ImageFileError
from dinocell.labels import all_whole

_DAMAGED = (
    *(OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error),
)  # what NumPy and zipfile raise
_CHANNELS = ("nuclei", "membrane")
_RGB = ("red", "green", "blue")


class _ArrayInArchive:
    """An array of an npz file, read one item at a time, also if it is compressed."""

    def __init__(self, path: Path, key: str) -> None:
        self._name = f"{key}.npy"
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(self._name) as file:
                version = np.lib.format.read_magic(file)
                read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                self.shape, fortran, self.dtype = read(file)
                self._start = file.tell()
                size = archive.getinfo(self._name).file_size
        except _DAMAGED as error:
            raise ImageFileError(
                f"'{path}' must be an npz archive with the array {key} ({type(error).__name__}: {error}): "
                "check that the download is complete"
            ) from error
        if fortran or self.dtype.hasobject or len(self.shape) != 4:
            raise DataSetError(
                f"The array {key} of '{path}' must be numbers of shape (N, H, W, C), got "
                f"{self.dtype} of shape {self.shape}: is it TissueNet?"
            )
        self._item_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        if size != self._start + self._item_bytes * self.shape[0]:
            raise ImageFileError(
                f"The array {key} of '{path}' must have {self._item_bytes * self.shape[0]:,} bytes, got "
                f"{size - self._start:,}: the archive is cut short, download it again"
            )
        self._file: IO[bytes] | None = None

    def item(self, index: int) -> NDArray:
        """Item `index`; rising numbers are read without going back."""
        try:
            if self._file is None:
                archive = zipfile.ZipFile(self.path)
                self._file = archive.open(self._name)
            self._file.seek(self._start + index * self._item_bytes)
            data = self._file.read(self._item_bytes)
            return np.frombuffer(data, self.dtype).reshape(self.shape[1:])
        except _DAMAGED as error:
            raise ImageFileError(
                f"Item {index} of '{self.path}' cannot be read ({error}): the archive is damaged, "
                "download it again"
            ) from error


def tissuenet(source: Path, notes: list[str], *, labels: int) -> Iterator[Sample]:
    """`tissuenet_v1.1_{train,val,test}.npz`: X (N, H, W, 2) nuclei and membrane, y cells and nuclei.

    `labels` is the channel of y: 0 whole cells, 1 nuclei.
    """
    paths = [source] if source.is_file() else files_below(source, (".npz",))
    for path in paths:
        images, truth = _ArrayInArchive(path, "X"), _ArrayInArchive(path, "y")
        if images.shape[:3] != truth.shape[:3] or images.shape[3] != 2 or truth.shape[3] <= labels:
            raise DataSetError(
                f"X and y of '{path}' must be (N, H, W, 2) of the same N, H and W, got {images.shape} and "
                f"{truth.shape}: is it TissueNet?"
            )
        for index in range(images.shape[0]):
            read = partial(_read_item, images, truth, index, labels)
            yield Sample(f"{path.stem}_{index:05d}", path, read, split_of(path.stem))


def _read_item(
    images: _ArrayInArchive, truth: _ArrayInArchive, index: int, channel: int
) -> Content:
    labels = truth.item(index)[..., channel]
    if labels.dtype.kind == "f" or labels.dtype.itemsize > 4:
        labels = labels.astype(np.int64)
    return Content(images.item(index), labels, None, _CHANNELS)


_LYNSEC_NAME = re.compile(r"(\d+)_(l[123])")
_LYNSEC_WRONG = ("l2", 34)  # so torch-em, which leaves them out, too


def lynsec(source: Path, notes: list[str]) -> Iterator[Sample]:
    """`lynsec 1/0_l1.npy` to `lynsec 3`: (H, W, 4 or 5) red, green, blue, number of the nucleus, class."""
    left_out = 0
    for path in files_below(source, (".npy",)):
        found = _LYNSEC_NAME.fullmatch(path.stem)
        if found is None:
            continue
        part, last = _LYNSEC_WRONG
        if found[2] == part and int(found[1]) <= last:
            left_out += 1
            continue
        yield Sample(path.stem, path, partial(_read_colours_and_nuclei, path), stratum=found[2])
    if left_out:
        notes.append(
            "Images of lynsec 2 (0_l2 to 34_l2) were left out, because their labels belong to other images: "
            f"{left_out}"
        )


def _read_colours_and_nuclei(path: Path) -> Content:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ImageFileError(
            f"'{path}' must be an array of NumPy ({error}): the download is damaged, repeat it"
        ) from error
    if array.ndim != 3 or array.shape[2] not in (4, 5) or array.dtype.kind not in "iuf":
        raise DataSetError(
            f"'{path}' must be numbers of shape (H, W, 4) or (H, W, 5), got {array.dtype} of shape "
            f"{array.shape}: is it LyNSeC?"
        )
    image, labels = array[..., :3], array[..., 3].astype(np.int64)
    if image.dtype != np.uint8 and 0 <= image.min() <= image.max() <= 255 and all_whole(image):
        image = image.astype(np.uint8)
    return Content(np.array(image), labels, None, _RGB)
