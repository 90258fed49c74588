"""Cells around nuclei, with the numbers of the nuclei: grown in the map of a cell channel, or by a ring."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import UsageError
from dinocell.io.planes import channel_of
from dinocell.labels import as_labels
from dinocell.segmentation.watershed import flood

_RING = re.compile(r"ring:(\d+(?:\.\d+)?)(um|µm|px)")


@dataclass(frozen=True)
class CellChoice:
    """What the cells around nuclei are made from: `channels` of the image, or a ring of `width` in `unit`."""

    channels: tuple[int | str, ...] = ()
    width: float = 0.0
    unit: str = "px"

    @classmethod
    def of(cls, text: str) -> "CellChoice":
        """From ``AGP``, ``AGP,ER``, ``mean``, ``ring:5um`` or ``ring:12px``.

        Raises UsageError (a ring without a width above 0).
        """
        if not text.startswith("ring"):
            return cls(tuple(channel_of(name.strip()) for name in text.split(",") if name.strip()))
        found = _RING.fullmatch(text)
        if found is None or float(found[1]) == 0:
            raise UsageError(
                f"`cells` must be channels or a ring such as ring:5um or ring:12px, got {text}: give the width "
                "of the ring"
            )
        return cls((), float(found[1]), "px" if found[2] == "px" else "um")

    def width_px(self, pixel_size_um: float | None) -> float:
        """Width of the ring in px.

        Raises UsageError (it is given in µm, and the pixel size is not known).
        """
        if self.unit == "px":
            return self.width
        if pixel_size_um is None:
            raise UsageError(
                f"`cells` in µm needs the pixel size, which the image does not state, got ring:{self.width:g}um:"
                " set `pixel_size_um`, or give the width in px"
            )
        return self.width / pixel_size_um


def check_compartments(nuclei: int | str | None, cells: str | None, channels: Any) -> None:
    """Raise UsageError if these options do not fit together."""
    if nuclei is not None and channels is not None:
        raise UsageError(
            f"`nuclei` and `channels` exclude each other, got {nuclei} and {channels}: leave one of them out"
        )
    if cells is not None and nuclei is None:
        raise UsageError(
            f"`cells` needs `nuclei`, the channel from which cells grow, got {cells} alone: name it"
        )
    if cells is not None and not CellChoice.of(cells).channels and "ring" not in cells:
        raise UsageError(f"`cells` must be channels or a ring, got {cells!r}: name one")


@dataclass
class Surroundings:
    """How cells grow around the nuclei of one image: a ring of `width_px`, or `image`, whose distance map
    is set when it has been predicted."""

    width_px: float = 0.0
    image: Any = None
    distance_map: NDArray[np.float32] | None = None

    def grow(self, nuclei: NDArray[np.uint32], fill_threshold: float) -> NDArray[np.uint32]:
        """Cells of the numbers of `nuclei`."""
        if self.distance_map is None:
            return grow_ring(nuclei, self.width_px)
        return grow_cells(nuclei, self.distance_map, fill_threshold=fill_threshold)


def grow_cells(
    nuclei: ArrayLike, distance_map: ArrayLike, *, fill_threshold: float
) -> NDArray[np.uint32]:
    """Let each nucleus grow to its cell by watershed on the distance map of cells.

    Parameters
    ----------
    nuclei : (H, W) integer array_like, 0 is background
    distance_map : (H, W) array_like in [0, 1], predicted for the channel of cells
    fill_threshold : pixels above it belong to cells

    Returns (H, W) uint32 ndarray: every cell has the number of its nucleus and holds all its pixels; what no
    nucleus reaches is background.

    Raises TypeError, ValueError (see `dinocell.segmentation.watershed.flood`).
    """
    seeds = as_labels(nuclei, "nuclei")
    inside = (np.asarray(distance_map) > fill_threshold) | (seeds > 0)
    return flood(distance_map, seeds, inside).astype(np.uint32)


def grow_ring(nuclei: ArrayLike, width_px: float) -> NDArray[np.uint32]:
    """Let each nucleus grow by a ring; where rings meet, a pixel belongs to the nearer nucleus.

    Returns (H, W) uint32 ndarray: `nuclei`, and pixels whose centre is at most `width_px` from that of one
    of their pixels.
    """
    from skimage.segmentation import expand_labels

    return expand_labels(as_labels(nuclei, "nuclei"), width_px).astype(np.uint32)
