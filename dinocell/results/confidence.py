"""How well the distance map supports each cell: a score that needs no truth."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.labels import as_labels
from dinocell.scratch import row_bands
from dinocell.segmentation.distance_map import DEFAULT_TARGET, labels_to_distance_map
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import separate_cells

_CORE = 0.4
"""Twice the fill threshold of `dinocell-tiny`: the part of a cell that a higher threshold would keep."""


def cell_scores(
    labels: ArrayLike,
    distance_map: ArrayLike,
    *,
    target: str = DEFAULT_TARGET,
    spread: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Score each cell from 0 to 1; the higher, the better it is likely to match the true cell.

    Parameters
    ----------
    labels : (H, W) integer array_like
        Cells 1..n without gaps.
    distance_map : (H, W) array_like of values in [0, 1]
        The map that the labels were made from.
    target : {"sqrt", "linear"}
        What the network predicts.
    spread : (H, W) array_like, optional
        Of a map that is the mean of several flips of the image: their standard deviation.

    Returns
    -------
    (n,) float64 ndarray

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`; or the shapes differ).

    Notes
    -----
    The product of three shares.  *Agreement*: the map that these labels should have given
    (`labels_to_distance_map`) and the predicted one, sum of the lower values over sum of the higher
    ones.  *Core*: share of the cell's pixels above 0.4 in the predicted map.  *Valley*: one less the
    highest value where the cell touches another, relative to the cell's peak; to the power 1/4, so
    that only a shallow valley counts.  With `spread` a fourth one, *flips*: sum of the map less the
    spread over sum of the map plus the spread, to the power 4.  A score orders cells; it is no estimate
    of their IoU.

    The formula was chosen among 20 on every second image of dsb2018/val with `dinocell-tiny`: peak,
    mean, depth of the valley, mean and squared difference from the ideal map, correlation with it,
    shares above five thresholds, and products of them.  The fourth share was chosen on all of it, among
    forms with the spread, with the lowest and highest map, and with the cells of each flip.  Spearman's
    correlation with the true IoU by image set: `benchmarks/score.py`.
    """
    array = as_labels(labels)
    predicted = np.ascontiguousarray(distance_map, dtype=np.float32)
    if predicted.shape != array.shape:
        raise ValueError(
            f"`distance_map` must have the shape of the labels {array.shape}, got {predicted.shape}: "
            "give the map of the same image"
        )
    num_cells = int(array.max(initial=0))
    if not num_cells:
        return np.zeros(0)
    ideal = labels_to_distance_map(array, target=target)
    lower, higher, core, area, peak, saddle = _sums(array, predicted, ideal, num_cells)[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = lower / higher * (core / area) * np.clip(1 - saddle / peak, 0, 1) ** 0.25
        if spread is not None:
            apart = _sums_in_cells(array, np.ascontiguousarray(spread, np.float32), num_cells)
            total = _sums_in_cells(array, predicted, num_cells)
            shares *= np.clip((total - apart) / (total + apart), 0, 1) ** 4
    return np.where(higher * peak > 0, shares, 0.0)


def scored_cells(
    distance_map: NDArray[np.float32],
    thresholds: Thresholds,
    *,
    target: str = DEFAULT_TARGET,
    min_score: float = 0.0,
) -> tuple[NDArray[np.uint32], NDArray[np.float64], tuple[str, ...]]:
    """Separate and score the cells of a distance map; needs no network.

    Parameters
    ----------
    distance_map : (H, W) float32 ndarray in [0, 1], or (2, H, W) with the spread of test-time augmentation
    target : {"sqrt", "linear"}
        What the network predicts.
    min_score : float in [0, 1]
        Cells of a lower score become background.

    Returns
    -------
    labels : (H, W) uint32 ndarray, 0 background, cells 1..n
    scores : (n,) float64 ndarray, see `cell_scores`
    notes : how many cells `min_score` has removed, if any

    Raises ValueError (see `separate_cells`).
    """
    mean, spread = distance_map if distance_map.ndim == 3 else (distance_map, None)
    labels = separate_cells(mean, thresholds)
    scores = cell_scores(labels, mean, target=target, spread=spread)
    kept = scores >= min_score
    if kept.all():
        return labels, scores, ()
    numbers = np.append(0, np.where(kept, np.cumsum(kept), 0)).astype(np.uint32)
    for rows in row_bands(labels.shape):
        labels[rows] = numbers[labels[rows]]
    note = (
        f"{np.count_nonzero(~kept)} of {len(kept)} cells were left out, because their scores are below "
        f"{min_score:g}"
    )
    return labels, scores[kept], (note,)


@njit
def _sums_in_cells(labels: NDArray[Any], values: NDArray[Any], num_cells: int) -> NDArray[Any]:
    sums = np.zeros(num_cells + 1, np.float64)
    for row in range(labels.shape[0]):
        for col in range(labels.shape[1]):
            sums[labels[row, col]] += values[row, col]
    return sums[1:]


@njit
def _sums(
    labels: NDArray[Any], predicted: NDArray[Any], ideal: NDArray[Any], num_cells: int
) -> NDArray[Any]:
    """Per cell: sums of the lower and the higher map, pixels above `_CORE`, pixels, highest value, and
    highest value at a contact with another cell."""
    height, width = labels.shape
    sums = np.zeros((6, num_cells + 1), np.float64)
    for row in range(height):
        for col in range(width):
            label = labels[row, col]
            if label == 0:
                continue
            value = np.float64(predicted[row, col])
            due = np.float64(ideal[row, col])
            sums[0, label] += min(value, due)
            sums[1, label] += max(value, due)
            sums[2, label] += value > _CORE
            sums[3, label] += 1
            sums[4, label] = max(sums[4, label], value)
            for d_row, d_col in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                r, c = row + d_row, col + d_col
                if 0 <= r < height and 0 <= c < width:
                    other = labels[r, c]
                    if other and other != label:
                        sums[5, label] = max(sums[5, label], value)
    return sums
