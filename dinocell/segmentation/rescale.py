"""The scale at which the network sees an image, and the way there and back.

A network knows cells of the size that its training images had.  An image of another scale is resampled for
the network, and the distance map is brought back to the pixels of the file before cells are separated, so
that labels and measurements never leave the file's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dinocell.errors import ConfigError, ImageFileError, UsageError
from dinocell.network.config import ModelConfig
from dinocell.scratch import row_bands

SAME_SCALE = 1.1
"""Scales that differ less count as equal: training varies them more, and resampling costs some detail."""

_FARTHEST = 8.0
"""Scales that differ more come from a wrong pixel size more often than from a microscope."""

_LARGEST = 32.0  # factor that can be asked for


class ScaleChoice(TypedDict, total=False):
    """Fields of `Scale` as keyword arguments; None keeps the default."""

    rescale: str | float | None
    diameter_px: float | None


@dataclass(frozen=True)
class Scale:
    """How images come to the scale of a model.

    rescale : `auto` (by the pixel sizes of file and model, where both are known), `off`, or how many
        times each side of the image is enlarged, 1/32 to 32
    diameter_px : typical diameter of a cell in the image, in place of `rescale`: it is brought to the
        model's `diameter_px`

    Raises UsageError (a value is out of its range, or both are given).
    """

    rescale: str | float = "auto"
    diameter_px: float | None = None

    def __post_init__(self) -> None:
        known = self.rescale in ("auto", "off")
        number = isinstance(self.rescale, int | float) and not isinstance(self.rescale, bool)
        if not known and not (number and 1 / _LARGEST <= float(self.rescale) <= _LARGEST):
            raise UsageError(
                f"`rescale` must be auto, off or a number from 1/32 to 32, got {self.rescale}: 2 enlarges "
                "the image two times for the network"
            )
        if self.diameter_px is None:
            return
        if not 0 < self.diameter_px < float("inf"):
            raise UsageError(
                f"`diameter_px` must be above 0, got {self.diameter_px}: give the diameter of a cell in pixels"
            )
        if self.rescale != "auto":
            raise UsageError(
                f"`diameter_px` must come without `rescale`, got {self.diameter_px:g} and {self.rescale}: "
                "leave one of them out"
            )

    def check_model(self, config: ModelConfig) -> None:
        """Raise ConfigError if the diameter of cells has no meaning for a model, or is far from its own."""
        if self.diameter_px is None:
            return
        if config.diameter_px is None:
            raise ConfigError(
                "`diameter_px` needs a model that knows the diameter of its training cells, got one "
                "without: give `rescale` in its place"
            )
        factor = config.diameter_px / self.diameter_px
        if not 1 / _LARGEST <= factor <= _LARGEST:
            raise UsageError(
                f"`diameter_px` must be within 32 times the model's {config.diameter_px:g}, got "
                f"{self.diameter_px:g}: give it in pixels of the image"
            )

    def of_image(
        self, pixel_size_um: float | None, config: ModelConfig
    ) -> tuple[float, tuple[str, ...]]:
        """How many times an image is enlarged for the network, 1.0 for not at all, and notes on that."""
        how = ""
        if self.diameter_px is not None and config.diameter_px is not None:
            factor = config.diameter_px / self.diameter_px
        elif isinstance(self.rescale, str):
            if self.rescale == "off" or pixel_size_um is None or config.pixel_size_um is None:
                return 1.0, ()
            factor = pixel_size_um / config.pixel_size_um
            how = f", from {pixel_size_um:.3g} to {config.pixel_size_um:.3g} µm per pixel"
            if not 1 / _FARTHEST <= factor <= _FARTHEST:
                note = (
                    f"The pixel size of {pixel_size_um:.3g} µm is too far from the model's "
                    f"{config.pixel_size_um:.3g} µm to be believed: the image was not rescaled; correct "
                    "`pixel_size_um`, or set `rescale`"
                )
                return 1.0, (note,)
        else:
            factor = float(self.rescale)
        if 1 / SAME_SCALE < factor < SAME_SCALE:
            return 1.0, ()
        done = f"enlarged {factor:.3g}" if factor > 1 else f"reduced {1 / factor:.3g}"
        return factor, (
            f"For the network the image was {done} times{how}; results are in pixels of the file",
        )


def rescaled_shape(
    shape: tuple[int, int], factor: float, max_pixels: int | None = None
) -> tuple[int, int]:
    """Height and width of an image that is enlarged `factor` times, each at least 1.

    Raises ImageFileError (the product is more than `max_pixels`).
    """
    height, width = (max(1, round(side * factor)) for side in shape)
    if max_pixels is not None and height * width > max_pixels:
        raise ImageFileError(
            f"An image may have up to {max_pixels:,} pixels at the scale of the model, got {height:,} × "
            f"{width:,} from {shape[0]:,} × {shape[1]:,}: set `rescale` to off, or crop the image"
        )
    return height, width


class Resampling:
    """The way from images of one size to another, band by band.

    Bicubic (Keys 1981, a = -1/2): a pixel of the result is a weighted mean of the pixels around its place,
    within two pixels of the image or of the result, whichever are wider, so that nothing aliases when an
    image is reduced.  Rows and columns are two sparse matrices, so the result of a band is that of the
    whole image.  Linear interpolation blurs: AP@0.5 of nuclei that had been reduced to half their size
    was 0.764 with it and 0.788 with this (dsb2018/val, 0.792 before).
    """

    def __init__(self, shape: tuple[int, int], new_shape: tuple[int, int]) -> None:
        self.shape, self.new_shape = shape, new_shape
        self._rows, columns = map(_weights, shape, new_shape)
        self._columns = columns.T.tocsc()

    def rows(
        self, read: Callable[[slice], NDArray[np.float32]], rows: slice
    ) -> NDArray[np.float32]:
        """Rows `start:stop` of the result, (stop − start, new width), from what `read` gives of the image."""
        weights = self._rows[rows]
        first, last = int(weights.indices.min()), int(weights.indices.max()) + 1
        band = weights[:, first:last] @ read(slice(first, last))
        return np.ascontiguousarray(band @ self._columns, dtype=np.float32)


def resample(images: NDArray[np.float32], results: NDArray[np.float32]) -> None:
    """Fill `results` (..., H', W') with `images` (..., H, W) in that size; a cubic may exceed their range."""
    way = Resampling(images.shape[-2:], results.shape[-2:])
    for place in np.ndindex(images.shape[:-2]):
        for rows in row_bands(results.shape[-2:]):
            results[place][rows] = way.rows(images[place].__getitem__, rows)


def _weights(size: int, new_size: int) -> sparse.csr_array:
    """(new_size, size) shares of pixels of the image in each pixel of the result; rows add up to 1."""
    step = size / new_size
    unit = max(1.0, step)
    centres = (np.arange(new_size) + 0.5) * step - 0.5
    near = np.ceil(centres - 2 * unit)[:, None] + np.arange(int(4 * unit) + 1)
    away = np.abs(near - centres[:, None]) / unit
    shares = np.where(
        away < 1,
        (1.5 * away - 2.5) * away**2 + 1,
        np.where(away < 2, ((-0.5 * away + 2.5) * away - 4) * away + 2, 0),
    )
    shares[(near < 0) | (near >= size)] = 0
    shares /= shares.sum(axis=1, keepdims=True)
    numbers, places = np.nonzero(shares)
    values = shares[numbers, places].astype(np.float32)
    columns = near[numbers, places].astype(np.int64)
    return sparse.csr_array((values, (numbers, columns)), shape=(new_size, size))
