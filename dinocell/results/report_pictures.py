"""The pictures of a report: shrunk, coloured, and as text that a page can hold."""

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.labels import cell_borders
from dinocell.results.colors import color_distance_map, color_labels
from dinocell.results.pictures import CONTOUR_COLOR, mean_blocks, shrink_labels, to_display


def embedded_pictures(
    image: NDArray[Any] | None,
    labels: NDArray[Any] | None,
    distance_map: NDArray[Any] | None,
    side_px: int,
    cells: str,
) -> dict[str, Any] | None:
    """Photo, layers above it and distance map as data addresses, with their size; None without any.

    All are (H, W) of one size, and are shrunk by a whole factor to at most `side_px`.  `cells` says in
    words what the layers show ("6 cells in a.tif").
    """
    known = next((array for array in (image, labels, distance_map) if array is not None), None)
    if known is None:
        return None
    factor = math.ceil(max(known.shape) / side_px)
    height, width = (math.ceil(side / factor) for side in known.shape)
    layers = []
    if labels is not None:
        small = shrink_labels(labels, factor)
        contour = np.broadcast_to(np.array(CONTOUR_COLOR, np.uint8), (*small.shape, 3))
        layers = [
            {
                "kind": "colors",
                "switch": "colours",
                "shown": False,
                "alt": f"Coloured areas of {cells}",
                "source": _layer(color_labels(small), small > 0),
            },
            {
                "kind": "contours",
                "switch": "contours",
                "shown": True,
                "alt": f"Contours of {cells}",
                "source": _layer(contour, cell_borders(small)),
            },
        ]
    photo = None if image is None else _photo(to_display(image, factor))
    colored_map = None
    if distance_map is not None:
        small_map = mean_blocks(distance_map, factor).astype(np.float32)
        colored_map = _photo(color_distance_map(np.nan_to_num(small_map)))
    return {"height": height, "width": width, "photo": photo, "layers": layers, "map": colored_map}


def _data_uri(picture: Any, kind: str, **options: Any) -> str:
    """A Pillow image as a data address."""
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _photo(rgb: NDArray[np.uint8]) -> str:
    from PIL import Image

    gray = np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2])
    return _data_uri(Image.fromarray(rgb[..., 0] if gray else rgb), "jpeg", quality=88)


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
        return _data_uri(Image.fromarray(rgba), "png", optimize=True)
    indexed = np.zeros(seen.shape, np.uint8)
    indexed[seen] = index + 1
    picture = Image.fromarray(indexed)
    picture.putpalette(palette.tobytes())
    picture.info["transparency"] = 0
    return _data_uri(picture, "png", optimize=True)
