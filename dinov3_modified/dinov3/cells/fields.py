"""Multi-channel fields: co-registered planes with their names and intensity ranges (ours).

Where the bytes come from is not known here, so that folders and object stores share it.
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_SUBSAMPLE = 4  # every fourth pixel of each axis is enough for percentiles
_COARSE = 8  # pixels of a field per pixel of its foreground map


class FieldError(ValueError):
    """A field that cannot be used; the message names it."""


@dataclass(frozen=True)
class ChannelField:
    """Planes of one field of view."""

    name: str  # unique in its data set
    planes: np.ndarray  # (C, H, W), uint8, uint16 or float32, as read
    channels: tuple[str, ...]  # C names
    low: np.ndarray  # (C,) float32, intensities that become 0
    high: np.ndarray  # (C,) float32, intensities that become 1
    illumination: np.ndarray | None = None  # (C, H, W) float32 to divide by
    pixel_size_um: float | None = None  # edge of a pixel in the specimen
    # (H / 8, W / 8) booleans, where the mean of the channels is bright
    foreground: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), bool), repr=False)

    @property
    def nbytes(self) -> int:
        extra = 0 if self.illumination is None else self.illumination.nbytes
        return self.planes.nbytes + self.foreground.nbytes + extra

    def window(
        self,
        channel: int | tuple[int, ...] | None,
        top: int,
        left: int,
        height: int,
        width: int,
    ) -> np.ndarray:
        """Part of one channel, or of the mean of several, scaled to its range: (h, w) in [0, 1].

        `channel`: index, or several or None (all) for the mean of channels, each scaled before.
        float32.
        """
        rows, columns = slice(top, top + height), slice(left, left + width)
        if isinstance(channel, int):
            return self._scaled(channel, rows, columns)
        chosen = range(len(self.channels)) if channel is None else channel
        total = self._scaled(chosen[0], rows, columns)
        for index in chosen[1:]:
            total += self._scaled(index, rows, columns)
        total /= len(chosen)
        return total

    def _scaled(self, channel: int, rows: slice, columns: slice) -> np.ndarray:
        part = self.planes[channel, rows, columns].astype(np.float32)
        if self.illumination is not None:
            part /= self.illumination[channel, rows, columns]
        part -= self.low[channel]
        part *= 1.0 / (self.high[channel] - self.low[channel])
        return np.clip(part, 0.0, 1.0, out=part)

    def foreground_share(self, top: int, left: int, height: int, width: int) -> float:
        """Share of foreground in a window, from the coarse map."""
        rows = slice(top // _COARSE, -(-(top + height) // _COARSE))
        columns = slice(left // _COARSE, -(-(left + width) // _COARSE))
        part = self.foreground[rows, columns]
        return float(part.mean()) if part.size else 0.0


def decode_planes(data: bytes, name: str) -> np.ndarray:
    """Bytes of a TIFF, PNG or other image → planes (S, H, W) in their own type.

    A colour image has three planes, a stack one a page.  Raises FieldError (not an image, or of
    another type than 8 or 16 bits or float).
    """
    try:
        if data[:4] in TIFF_STARTS:
            array = _decode_plain_tiff(data)
            if array is None:
                import tifffile

                array = tifffile.imread(io.BytesIO(data))
        elif has_16_bits(data):  # PIL keeps the upper 8 bits of a colour picture
            import cv2

            array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if array is None:
                raise ValueError("the 16-bit colour PNG cannot be decoded")
            if array.ndim == 3:
                array = array[..., [2, 1, 0]]
        else:
            from PIL import Image

            array = np.asarray(Image.open(io.BytesIO(data)))
        if array.size == 0:
            raise ValueError("no pixel in it")
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FieldError(
            f"{name} must be a readable image, got {len(data)} bytes that are none ({reason}): repair or "
            "remove it"
        ) from error
    array = np.squeeze(array)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[2] in (3, 4) and array.shape[0] > 4:
        array = np.moveaxis(array[..., :3], 2, 0)
    if array.ndim != 3 or array.dtype not in (np.uint8, np.uint16, np.float32):
        raise FieldError(
            f"{name} must have planes of 8 or 16 bits, got shape {array.shape} of {array.dtype}: convert "
            "it to TIFF with one page a channel"
        )
    return np.ascontiguousarray(array)


def has_16_bits(data: bytes) -> bool:
    """Whether the header of a PNG or TIFF says 16 bits a channel."""
    if data[:8] == _PNG_START:
        return data[24:25] == b"\x10"  # fifth field of the first chunk
    if data[:4] not in TIFF_STARTS:
        return False
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        return bool(page.bitspersample == 16)


def _decode_plain_tiff(data: bytes) -> np.ndarray | None:
    """A single gray page of 8 or 16 bits by OpenCV, which takes half the time; None for all else.

    OpenCV takes the first page of several and what there is of a file that was cut off, so tifffile
    looks at the structure before.
    """
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    import cv2
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page: Any = file.pages[0]
        ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
        plain = (
            len(file.pages) == 1
            and page.bitspersample in (8, 16)
            and page.photometric == tifffile.PHOTOMETRIC.MINISBLACK
            and page.samplesperpixel == page.sampleformat == 1
            and not page.is_tiled
            and max(ends, default=0) <= len(data)
        )
    if not plain:
        return None
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # microscopes have own tags
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    return array if array is not None and array.ndim == 2 else None


def robust_range(plane: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float]:
    """Intensities at two percentiles of a quarter of rows and columns.

    `plane`: (H, W); `percentiles`: such as (0.1, 99.9), so that hot pixels do not set the range.
    """
    part = plane[::_SUBSAMPLE, ::_SUBSAMPLE]
    if part.dtype not in (np.uint8, np.uint16):
        low, high = np.percentile(part, percentiles)
        return float(low), float(high)
    # By counting, in a third of the time; the same numbers.
    below = np.cumsum(np.bincount(part.ravel()))
    found = []
    for share in percentiles:
        place = share / 100 * (part.size - 1)
        first = math.floor(place)
        left, right = np.searchsorted(below, [first, min(first + 1, part.size - 1)], side="right")
        found.append(float(left) + (place - first) * float(right - left))
    return found[0], found[1]


def is_constant(plane: np.ndarray) -> bool:
    """Whether all pixels are equal; a few pixels decide for most planes."""
    few = plane[::_COARSE, ::_COARSE]
    return bool(few.min() == few.max()) and bool(plane.min() == plane.max())


def make_field(
    name: str,
    planes: Mapping[str, np.ndarray],
    *,
    illumination: Mapping[str, np.ndarray] | None = None,
    pixel_size_um: float | None = None,
    percentiles: tuple[float, float] = (0.1, 99.9),
) -> ChannelField:
    """A field of planes by channel name.

    `planes`: (H, W) each, of one size and type.  `illumination`: (H, W) each, positive; divided by.
    Raises FieldError (no plane, sizes that differ, a constant plane).
    """
    if not planes:
        raise FieldError(f"Field {name} must have a channel, got none: check its files")
    shapes = {channel: plane.shape for channel, plane in planes.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{c} {s}" for c, s in shapes.items())
        raise FieldError(
            f"The channels of field {name} must have one size, got {listed}: they are not of one field"
        )
    channels = tuple(planes)
    kinds = {plane.dtype for plane in planes.values()}
    kind = kinds.pop() if len(kinds) == 1 else np.float32
    stack = np.stack([np.asarray(planes[c]).astype(kind, copy=False) for c in channels])
    flat = None
    if illumination is not None:
        missing = [c for c in channels if c not in illumination]
        if missing:
            raise FieldError(
                f"Field {name} must have an illumination image for each channel, got none for "
                f"{', '.join(missing)}: name them, or leave illumination out"
            )
        flat = np.stack([illumination[c].astype(np.float32) for c in channels])
        if flat.shape != stack.shape or not (flat > 0).all():
            raise FieldError(
                f"Illumination of field {name} must be positive and of its size {stack.shape[1:]}, got "
                f"{flat.shape[1:]} from {flat.min():.3g}: check the .npy files"
            )
    low, high = np.empty(len(channels), np.float32), np.empty(len(channels), np.float32)
    for index, channel in enumerate(channels):
        plane = stack[index]
        if plane.dtype.kind == "f" and not np.isfinite(plane).all():
            raise FieldError(
                f"Channel {channel} of field {name} must have finite values, got others: the file is "
                "damaged"
            )
        if is_constant(plane):
            raise FieldError(
                f"Channel {channel} of field {name} must have contrast, got {plane.flat[0]} everywhere: "
                "the file is empty or damaged"
            )
        if flat is not None:
            plane = plane / flat[index]
        low[index], high[index] = robust_range(plane, percentiles)
        if high[index] <= low[index]:
            low[index], high[index] = float(plane.min()), float(plane.max())
    made = ChannelField(name, stack, channels, low, high, flat, pixel_size_um)
    object.__setattr__(made, "foreground", _foreground(made))
    return made


def _coarse_mean(made: ChannelField, channel: int) -> np.ndarray:
    """Means of a scaled channel over squares, those at the edges filled up with the last pixels."""
    low, high = float(made.low[channel]), float(made.high[channel])
    plane = made.planes[channel]
    if made.illumination is not None or plane.dtype not in (np.uint8, np.uint16):
        plane = made.window(channel, 0, 0, *plane.shape)
        low, high = 0.0, 1.0
        clipped = plane
    else:
        # In the plane's own type: the ends of the range lose less than one of thousands of counts.
        clipped = np.clip(plane, math.floor(low), math.ceil(high))
    height, width = plane.shape
    fill = (-height % _COARSE, -width % _COARSE)
    if any(fill):
        clipped = np.pad(clipped, ((0, fill[0]), (0, fill[1])), mode="edge")
    kind = np.float32 if clipped.dtype.kind == "f" else np.uint32
    rows = clipped.reshape(-1, _COARSE, clipped.shape[1]).sum(axis=1, dtype=kind)
    sums = rows.reshape(len(rows), -1, _COARSE).sum(axis=2, dtype=kind)
    return (sums.astype(np.float32) / _COARSE**2 - low) / (high - low)


def _foreground(made: ChannelField) -> np.ndarray:
    """Where the coarse mean of the channels exceeds Otsu's threshold (Otsu 1979, eq. 12-18)."""
    coarse = _coarse_mean(made, 0)
    for index in range(1, len(made.channels)):
        coarse += _coarse_mean(made, index)
    counts, edges = np.histogram(coarse, bins=64)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centers)
    valid = (below > 0) & (above > 0)
    if not valid.any():  # one brightness everywhere: nothing stands out
        return np.zeros(coarse.shape, bool)
    between = np.zeros(len(centers))
    low, high = sums[valid] / below[valid], (sums[-1] - sums[valid]) / above[valid]
    between[valid] = below[valid] * above[valid] * (low - high) ** 2
    cut = edges[1 + int(np.argmax(between))]
    return coarse > cut


def split_channels(name: str, planes: np.ndarray, channel: str) -> dict[str, np.ndarray]:
    """Planes of one file by name: the channel itself, or CHANNEL_0, CHANNEL_1, ... of several.

    `planes`: (S, H, W).
    """
    if len(planes) == 1:
        return {channel: planes[0]}
    return {f"{channel}_{index}": plane for index, plane in enumerate(planes)}


def read_illumination(paths: Mapping[str, str | Path]) -> dict[str, np.ndarray]:
    """Illumination images (.npy) by channel; raises FieldError (a file is missing or no array)."""
    found = {}
    for channel, path in paths.items():
        try:
            found[channel] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise FieldError(
                f"Illumination of {channel} must be a .npy array, got {path} ({error}): check the path"
            ) from error
    return found
