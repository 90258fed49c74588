"""Overlapping windows: one fixed grid over an image, blended so smoothly that no seam is left.

A network sees windows of one size, which belongs to the model.  Where windows overlap, their
predictions are averaged with weights that fall smoothly towards the window's edge, and this happens
on the distance map, before anything is thresholded.  The grid depends on the size of the image, on
`window_px` and on `overlap_px` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np


class ReadableImage(Protocol):
    """A (C, H, W) array, or what gives the pixels of `image[:, rows, columns]`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, key: tuple[Any, Any, Any], /) -> np.ndarray: ...


@dataclass(frozen=True)
class WindowPlan:
    """The grid of windows over one image; made by `plan_windows`."""

    # height, width: size of the image in pixels
    height: int
    width: int
    # window_px, overlap_px: edge of the square windows, and their least overlap
    window_px: int
    overlap_px: int
    # row_starts, col_starts: first row (column) of the windows, ascending.  Negative
    # in one case only: the image is smaller than a window, there is one start, and the window
    # reaches over the image on both sides.
    row_starts: tuple[int, ...]
    col_starts: tuple[int, ...]


def _check_window(window_px: int, overlap_px: int) -> None:
    if window_px < 1:
        raise ValueError(
            f"`window_px` must be at least 1, got {window_px}: use the window of the model"
        )
    if not 0 <= overlap_px <= window_px // 2:
        raise ValueError(
            f"`overlap_px` must be 0 … {window_px // 2}, half of `window_px` {window_px}, got "
            f"{overlap_px}: choose a value in this range"
        )


def plan_windows(height: int, width: int, *, window_px: int, overlap_px: int) -> WindowPlan:
    """Lay square windows over an image: as few as give the overlap, evenly spread.

    Parameters
    ----------
    height, width : int, size of the image, at least 1 × 1
    window_px : int, edge of a window; the size the network runs at
    overlap_px : int, least overlap of neighbouring windows, 0 … `window_px` // 2

    Returns WindowPlan: the first window starts at the first row and column, the last ends with the
    image, so that no pixel is invented; only an image smaller than a window is surrounded by its
    reflection.

    Raises ValueError (a size is below 1, or the overlap is out of range).
    """
    _check_window(window_px, overlap_px)
    if height < 1 or width < 1:
        raise ValueError(
            f"An image must have at least one pixel, got {height} × {width}: give the whole image"
        )
    return WindowPlan(
        height,
        width,
        window_px,
        overlap_px,
        _starts(height, window_px, overlap_px),
        _starts(width, window_px, overlap_px),
    )


def _starts(size: int, window_px: int, overlap_px: int) -> tuple[int, ...]:
    room = size - window_px
    if room <= 0:
        return (room // 2,)
    steps = -(-room // (window_px - overlap_px))
    return tuple(i * room // steps for i in range(steps + 1))


def edge_ramp(window_px: int, overlap_px: int) -> np.ndarray:
    """Weights (window_px,) in (0, 1] along an axis of a window, when windows are averaged.

    A raised cosine over `overlap_px`, 0 … `window_px` // 2, at both ends, sin²(π/2 · (i + ½) /
    overlap_px) for i = 0, 1, …: at half-integer positions, so that even the outermost pixel has weight
    above 0 and the ramps of two windows that overlap by `overlap_px` add up to 1.  All ones when
    `overlap_px` is 0.  Raises ValueError (the overlap is out of range).
    """
    _check_window(window_px, overlap_px)
    ramp = np.ones(window_px)
    slope = np.sin(np.pi / 2 * (np.arange(overlap_px) + 0.5) / max(overlap_px, 1)) ** 2
    ramp[:overlap_px] = slope
    ramp[window_px - overlap_px :] = slope[::-1]
    return ramp


def _shares(starts: tuple[int, ...], size: int, window_px: int, overlap_px: int) -> np.ndarray:
    """Per window start, each position's share of the average: (num_starts, window_px) float32.

    At every row (column) of the image the shares of the windows over it add up to 1; positions outside
    the image have 0.  The weights of a window are a product of rows and columns and the windows form
    a grid, so the average over windows is one along rows times one along columns.
    """
    ramp = edge_ramp(window_px, overlap_px)
    total = np.zeros(size)
    spans = []
    for start in starts:
        first, last = max(start, 0), min(start + window_px, size)
        total[first:last] += ramp[first - start : last - start]
        spans.append((first, last))
    shares = np.zeros((len(starts), window_px), dtype=np.float32)
    for share, start, (first, last) in zip(shares, starts, spans, strict=True):
        share[first - start : last - start] = ramp[first - start : last - start] / total[first:last]
    return shares


def _reflected(start: int, window_px: int, size: int) -> np.ndarray:
    """Positions in 0 … size − 1 that a window reads, mirrored at the edges as often as needed."""
    positions = np.arange(start, start + window_px)
    if size == 1:
        return np.zeros_like(positions)
    period = 2 * (size - 1)
    positions %= period
    return np.minimum(positions, period - positions)


def predict_windows(
    image: ReadableImage,
    predict: Callable[[np.ndarray], np.ndarray],
    *,
    window_px: int,
    overlap_px: int,
    batch_size: int = 8,
    blended: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Run a network over an image window by window and blend its maps into one.

    Parameters
    ----------
    image : (C, H, W) ndarray, H and W ≥ 1
        Already normalised as a whole.  Windows are read in reading order, one by one.
    predict : callable, takes (B, C, window_px, window_px) float32, 1 ≤ B ≤ `batch_size`, which it
        may keep or change; returns (B, window_px, window_px), or K maps of each window,
        (B, K, window_px, window_px)
    window_px, overlap_px : int, the grid, see `plan_windows`
    batch_size : int, windows per call; the last call may get fewer
    blended : (H, W) or (K, H, W) float32 ndarray of zeros, optional, receives the result
    progress : callable, optional, called as `progress(done, total)`, in windows, after each batch

    Returns float32 ndarray of the shape of `blended`: at each pixel the weighted mean of the windows
    over it (`edge_ramp` along rows times that along columns).  Equal for every `batch_size` up to the
    rounding of float32 sums, as far as `predict` itself treats each window alone.

    Raises ValueError (`image` is not (C, H, W), an option is out of range, or `predict` returns
    another shape).

    Notes
    -----
    Beside the result, memory is needed for one batch of windows and what `predict` makes of it.
    """
    if len(image.shape) != 3 or image.shape[0] < 1:
        raise ValueError(f"`image` must be (C, H, W), got shape {image.shape}: put channels first")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}: 8 is usual")
    channels, height, width = image.shape
    plan = plan_windows(height, width, window_px=window_px, overlap_px=overlap_px)
    if blended is None:
        blended = np.zeros((height, width), dtype=np.float32)
    row_shares = _shares(plan.row_starts, height, window_px, overlap_px)
    col_shares = _shares(plan.col_starts, width, window_px, overlap_px)
    grid = list(product(range(len(plan.row_starts)), range(len(plan.col_starts))))
    for first in range(0, len(grid), batch_size):
        places = grid[first : first + batch_size]
        windows = np.empty((len(places), channels, window_px, window_px), dtype=np.float32)
        for window, place in zip(windows, places, strict=True):
            _read_window(image, plan, place, window)
        maps = np.asarray(predict(windows))
        expected = (len(places), *blended.shape[:-2], window_px, window_px)
        if maps.shape != expected:
            raise ValueError(f"`predict` must return shape {expected}, it returned {maps.shape}")
        for one_map, (row, col) in zip(maps, places, strict=True):
            top, left = plan.row_starts[row], plan.col_starts[col]
            rows = slice(max(top, 0), min(top + window_px, height))
            cols = slice(max(left, 0), min(left + window_px, width))
            inside = np.s_[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
            share = np.outer(row_shares[row, inside[0]], col_shares[col, inside[1]])
            blended[..., rows, cols] += share * one_map[..., *inside]
        if progress is not None:
            progress(first + len(places), len(grid))
    return blended


def _read_window(
    image: ReadableImage, plan: WindowPlan, place: tuple[int, int], window: np.ndarray
) -> None:
    """Write the pixels of one window, reflected where it reaches over an image smaller than it."""
    rows = _reflected(plan.row_starts[place[0]], plan.window_px, plan.height)
    cols = _reflected(plan.col_starts[place[1]], plan.window_px, plan.width)
    if plan.height >= plan.window_px and plan.width >= plan.window_px:
        window[:] = image[:, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    else:
        window[:] = image[:, rows[:, None], cols]
