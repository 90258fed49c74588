"""An image whose channels are in files of their own, as microscopes for plates write them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinocell.errors import ImageFileError
from dinocell.io.planes import channel_positions
from dinocell.io.read import Image, read_image


@dataclass(frozen=True)
class ChannelFiles(os.PathLike[str]):
    """The files of one field; as a path it is that of the first.

    Attributes
    ----------
    files : (name of a channel, its file), in the order of the channels; one channel in each file
    """

    files: tuple[tuple[str, Path], ...]

    def __fspath__(self) -> str:
        return os.fspath(self.files[0][1])

    @property
    def paths(self) -> list[Path]:
        """The files without the names of the channels."""
        return [path for _, path in self.files]

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> "ChannelFiles":
        return cls(tuple(files.items()))

    def read(self, *, channels: Any = None, **choice: Any) -> Image:
        """The field as `read_image` gives it; files of channels that are not chosen are not read.

        Raises ImageFileError (a file has several channels, or another size than the first); and as
        `read_image` does.
        """
        names = tuple(name for name, _ in self.files)
        wanted = (
            range(len(names))
            if channels is None
            else channel_positions(len(names), names, channels)
        )
        planes = [read_image(self.paths[position], **choice) for position in wanted]
        first = planes[0]
        for plane in planes:
            if plane.pixels.ndim != 2:
                raise ImageFileError(
                    f"A file of one channel is needed, '{plane.path}' has {plane.pixels.shape[2]}: set `plate` "
                    "to off and segment such files alone"
                )
            check_one_size(first.pixels.shape, plane.pixels.shape, plane.path.name)
        pixels = [plane.pixels for plane in planes]
        return Image(
            pixels[0] if len(pixels) == 1 else np.stack(pixels, axis=-1),
            first.path,
            first.pixel_size_um,
            tuple(names[position] for position in wanted),
            tuple(dict.fromkeys(note for plane in planes for note in plane.notes)),
        )


def check_one_size(first: tuple[int, ...], other: tuple[int, ...], name: str) -> None:
    """Raise ImageFileError if two channels of a field have different numbers of rows or columns."""
    if first[:2] != other[:2]:
        raise ImageFileError(
            f"The channels of a field must have one size, got {first[0]} × {first[1]} and "
            f"{other[0]} × {other[1]} px ('{name}'): export them again"
        )
