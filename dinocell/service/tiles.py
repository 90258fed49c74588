"""What the page builds its picture of: channels, and parts of large images and labels at several scales."""

import zlib
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Response
from numpy.typing import NDArray

from dinocell.errors import UsageError
from dinocell.service.history import TOUCHED
from dinocell.service.routes import PROBLEMS, Result, npy_bytes
from dinocell.service.schemas import ChannelInfo

TILE_PX = 512
"""Edge of a tile; the page knows this number, too."""

MOST_CHANNELS = 16
"""Of one answer; the page knows this number, too."""

tile_routes = APIRouter(responses=PROBLEMS)
Place = Annotated[int, Query(ge=0, le=2**16)]
Level = Annotated[int, Query(ge=0, le=16, description="Every 2**level-th pixel is sent.")]
Channels = Annotated[
    Sequence[Annotated[int, Query(ge=0, le=9999)]],
    Query(max_length=MOST_CHANNELS, description="Channels of the file, in place of that plane."),
]
_BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "A numpy file (npy)."}
}


def tile_of(pixels: NDArray, level: int, row: int, column: int) -> NDArray:
    """Every 2**level-th pixel of a tile.

    Parameters
    ----------
    pixels : (H, W) ndarray, usually in a file
    level, row, column : the tile covers `TILE_PX` · 2**level pixels from `row` and `column` times that on

    Returns (h, w) ndarray, h and w at most `TILE_PX`.

    Raises UsageError (the tile is outside of the image).
    """
    step = 2**level
    size = TILE_PX * step
    if row * size >= pixels.shape[0] or column * size >= pixels.shape[1]:
        raise UsageError(
            f"A tile must be inside the image of {pixels.shape[0]} × {pixels.shape[1]} pixels, got row "
            f"{row}, column {column} of level {level}: choose smaller numbers"
        )
    rows = slice(row * size, (row + 1) * size, step)
    return np.ascontiguousarray(pixels[rows, column * size : (column + 1) * size : step])


def _packed(*tiles: NDArray, **more: str) -> Response:
    """A numpy file for each tile, one after the other, compressed on their way."""
    headers = {"cache-control": "no-store", "content-encoding": "deflate", **more}
    body = zlib.compress(b"".join(map(npy_bytes, tiles)), 1)
    return Response(body, media_type="application/octet-stream", headers=headers)


@tile_routes.get("/jobs/{job_id}/channels", summary="The channels of the file")
def get_channels(result: Result) -> list[ChannelInfo]:
    """In the order of the file, which is what `channel` of `image` counts; empty where it has one."""
    return [ChannelInfo(**one) for one in result.channels()]


@tile_routes.get(
    "/jobs/{job_id}/image/tile",
    summary="A tile of the pixels that were segmented",
    responses=_BINARY,
    response_class=Response,
)
def get_image_tile(
    result: Result, level: Level, row: Place, column: Place, channel: Channels = ()
) -> Response:
    """At most 512 × 512 pixels, as in `image`; of several channels, each once, one numpy file after the other."""
    planes = map(result.stored_pixels, dict.fromkeys(channel) or (None,))
    return _packed(*(tile_of(plane, level, row, column) for plane in planes))


@tile_routes.get(
    "/jobs/{job_id}/labels/tile",
    summary="A tile of the labels as corrections number them",
    responses=_BINARY,
    response_class=Response,
)
def get_labels_tile(result: Result, level: Level, row: Place, column: Place) -> Response:
    """At most 512 × 512 pixels, uint32, as in `labels/npy`; the header ETag has their revision."""
    revision, labels = result.stored_labels()
    return _packed(tile_of(labels, level, row, column) & ~TOUCHED, etag=f'"{revision}"')
