"""The pictures of a report: shrunk, coloured, and as text that a page can hold."""

import base64
import io
import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from dinocell.labels import cell_borders
from dinocell.results.colors import color_distance_map, color_labels
from dinocell.results.pictures import (
    CONTOUR_COLOR,
    mean_blocks,
    shrink_labels,
    shrunk_display,
)


class Thumbnails(NamedTuple):
    """Image (RGB), labels and distance map of one image, those that exist, for a page."""

    image: NDArray[np.uint8] | None
    labels: NDArray[np.uint32] | None
    distance_map: NDArray[np.float32] | None

    @classmethod
    def of(
        cls,
        image: NDArray[Any] | None,
        labels: NDArray[Any] | None,
        distance_map: NDArray[Any] | None,
        side_px: int,
    ) -> Self:
        """Shrink each by a whole factor to at most `side_px`; 8-bit RGB is not stretched."""
        small_image: NDArray[np.uint8] | None = None
        small_labels: NDArray[np.uint32] | None = None
        small_map: NDArray[np.float32] | None = None
        if image is not None and np.size(image):
            ready = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            factor = math.ceil(max(image.shape[:2]) / side_px)
            small_image = (
                np.rint(mean_blocks(image, factor)).astype(np.uint8)
                if ready
                else shrunk_display(image, factor)
            )
        if labels is not None and np.size(labels):
            small_labels = shrink_labels(labels, math.ceil(max(labels.shape) / side_px))
        if distance_map is not None and np.size(distance_map):
            factor = math.ceil(max(distance_map.shape) / side_px)
            small_map = mean_blocks(distance_map, factor).astype(np.float32)
        return cls(small_image, small_labels, small_map)


def embedded_pictures(thumbnails: Thumbnails, cells: str) -> dict[str, Any] | None:
    """Photo, layers above it and distance map as data addresses, with their size; None without any.

    `cells` says in words what the layers show ("6 cells in a.tif").
    """
    image, labels, distance_map = thumbnails
    known = next((array for array in thumbnails if array is not None), None)
    if known is None:
        return None
    layers = []
    if labels is not None:
        contour = np.broadcast_to(np.array(CONTOUR_COLOR, np.uint8), (*labels.shape, 3))
        layers = [
            {
                "kind": "colors",
                "switch": "colours",
                "shown": False,
                "alt": f"Coloured areas of {cells}",
                "source": _layer(color_labels(labels), labels > 0),
            },
            {
                "kind": "contours",
                "switch": "contours",
                "shown": True,
                "alt": f"Contours of {cells}",
                "source": _layer(contour, cell_borders(labels)),
            },
        ]
    photo = None if image is None else _photo(image)
    colored_map = (
        None if distance_map is None else _photo(color_distance_map(np.nan_to_num(distance_map)))
    )
    height, width = known.shape[:2]
    return {"height": height, "width": width, "photo": photo, "layers": layers, "map": colored_map}


def _data_uri(picture: Any, kind: str) -> str:
    """A Pillow image as a data address."""
    buffer = io.BytesIO()
    if kind == "jpeg":
        picture.save(buffer, format="JPEG", quality=88)
    else:
        picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _photo(rgb: NDArray[np.uint8]) -> str:
    from PIL import Image

    gray = np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2])
    return _data_uri(Image.fromarray(rgb[..., 0] if gray else rgb), "jpeg")


def _layer(rgb: NDArray[np.uint8], seen: NDArray[np.bool_]) -> str:
    """A picture with few colours that is transparent where `seen` is False."""
    from PIL import Image

    codes = (rgb.astype(np.uint32) * np.array([1 << 16, 1 << 8, 1], np.uint32)).sum(axis=-1)
    colors, index = np.unique(codes[seen], return_inverse=True)
    palette = np.zeros((len(colors) + 1, 3), np.uint8)
    for channel, shift in enumerate((16, 8, 0)):
        palette[1:, channel] = (colors >> shift) & 255
    if len(palette) > 256:
        rgba = np.dstack([rgb, np.where(seen, 255, 0).astype(np.uint8)])
        return _data_uri(Image.fromarray(rgba), "png")
    indexed = np.zeros(seen.shape, np.uint8)
    indexed[seen] = index + 1
    picture = Image.fromarray(indexed)
    picture.putpalette(palette.tobytes())
    picture.info["transparency"] = 0
    return _data_uri(picture, "png")
