"""Choose the thresholds of the watershed on validation images, from one forward pass per image.

The distance maps are made once, before; here only the post-processing is repeated.  Use validation
images, never test images: the result is a choice, and its score is optimistic.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError
from dinocell.evaluation.ctc import ctc_counts
from dinocell.evaluation.matching import OverlapTable, overlap_table
from dinocell.evaluation.metrics import DSB2018_IOU_THRESHOLDS, match_counts
from dinocell.network.config import TUNED_THRESHOLDS
from dinocell.progress import count_text
from dinocell.segmentation.thresholds import Thresholds

_CTC_METRICS = ("seg", "det", "op_csb")
_AP_METRIC = re.compile(r"ap(\d{2,3}(?:\.\d+)?)")
_Index = tuple[int, int, int]


@dataclass(frozen=True)
class ThresholdGrids:
    """The values in [0, 1] that a search tries, in any order; those with fill ≥ peak are skipped."""

    peak_grid: Sequence[float] = (0.2, 0.3, 0.4, 0.47, 0.55, 0.62, 0.69, 0.76, 0.83)
    fill_grid: Sequence[float] = (0.05, 0.09, 0.13, 0.17, 0.22, 0.27, 0.32, 0.37, 0.43, 0.5)
    prominence_grid: Sequence[float] = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)

    def axes(self) -> list[list[float]]:
        """The three grids in ascending order.

        Raises ValueError (a grid is empty or holds a number that is not finite, or no fill value is
        below a peak value).
        """
        axes = []
        for name, grid in vars(self).items():
            values = sorted({float(value) for value in grid})
            if not values or not all(math.isfinite(value) for value in values):
                raise ValueError(
                    f"`{name}` must hold one or more finite numbers, got {list(grid)}: "
                    "give the thresholds to try"
                )
            axes.append(values)
        lowest_fill, highest_peak = axes[1][0], axes[0][-1]
        if lowest_fill >= highest_peak:
            raise ValueError(
                "Some value of `fill_grid` must be below some value of `peak_grid`, got fill from "
                f"{lowest_fill} and peak up to {highest_peak}: lower the first or raise the second"
            )
        return axes


@dataclass(frozen=True)
class TuningPoint:
    """One tried combination, its value of the metric in [0, 1], and the cells found in all images."""

    thresholds: Thresholds
    score: float
    num_pred: int


@dataclass(frozen=True)
class TuningResult:
    """The best thresholds and everything that was tried."""

    best: TuningPoint  # of equal scores the first in the order of `points`
    metric: str  # what was maximised: ``ap50_pooled``, ``op_csb_pooled``, ...
    # num_samples, num_truth: images, and true cells in all of them
    num_samples: int
    num_truth: int
    points: tuple[TuningPoint, ...]  # all tried combinations, sorted by peak, fill, prominence

    @property
    def thresholds(self) -> Thresholds:
        """The best thresholds; `min_area_px` is as given."""
        return self.best.thresholds

    def rows(self) -> list[dict[str, float | int]]:
        """The points as rows for a table; the score is in the column named like `metric`."""
        return [
            {**tuned_values(point.thresholds), self.metric: point.score, "num_pred": point.num_pred}
            for point in self.points
        ]


def tune_thresholds(
    samples: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    grids: ThresholdGrids | None = None,
    *,
    min_area_px: int = 0,
    metric: str = "ap50",
    search: str = "coordinate",
    to_labels: Callable[[NDArray[Any], Thresholds], NDArray[Any]] | None = None,
) -> TuningResult:
    """Find the thresholds that turn given distance maps into the best labels.

    Parameters
    ----------
    samples : iterable of (distance_map, truth)
        (H, W) float32 in [0, 1] and (H, W) integer labels.  All are kept in memory.
    min_area_px : cells with fewer pixels are dropped before scoring; not tuned
    metric : ``ap50`` (any ``apNN``: AP at that IoU in percent), ``ap`` (mean AP over IoU 0.50,
        0.55, ..., 0.95), ``seg``, ``det`` or ``op_csb``
        The counts of all images are added up before they are divided.
    search : ``grid`` tries every combination.  ``coordinate`` tries up to 27 spread combinations, then
        from the best one all values along one axis at a time (fill, peak, prominence in turn) until
        no axis brings a gain.  It needs some tens of combinations where the full default grid has 616,
        and finds a maximum that no single threshold can improve, which is not always the highest.
    to_labels : the post-processing: (distance_map, Thresholds) → (H, W) integer labels
        Default: `dinocell.segmentation.watershed.separate_cells`.

    Raises ValueError (as `ThresholdGrids.axes` and `Thresholds`; an option is unknown; the arrays
    of a sample differ in shape); DataSetError (there is no sample, or no true cell in any of them).
    """
    if to_labels is None:
        from dinocell.segmentation.watershed import separate_cells  # loads numba: only where needed

        to_labels = separate_cells
    if search not in ("coordinate", "grid"):
        raise ValueError(
            f"`search` must be 'coordinate' or 'grid', got {search!r}: choose one of these"
        )
    count, attribute = _metric_counter(metric)
    axes = (grids or ThresholdGrids()).axes()
    pairs, num_truth = _checked_samples(samples)
    tried: dict[_Index, TuningPoint] = {}

    def try_point(index: _Index) -> float:
        if index not in tried:
            peak, fill, prominence = (axis[i] for axis, i in zip(axes, index, strict=True))
            thresholds = Thresholds(peak, fill, prominence, min_area_px)
            tables = [overlap_table(truth, to_labels(found, thresholds)) for found, truth in pairs]
            counts = [reduce(add, column) for column in zip(*map(count, tables), strict=True)]
            score = math.fsum(getattr(item, attribute) for item in counts) / len(counts)
            tried[index] = TuningPoint(thresholds, score, sum(table.num_pred for table in tables))
        return tried[index].score

    everything = _valid_indices(axes, [range(len(axis)) for axis in axes])
    if search == "coordinate":
        _coordinate_search(axes, everything, try_point)
    else:
        list(map(try_point, everything))
    points = tuple(tried[index] for index in sorted(tried))
    best = max(points, key=lambda point: point.score)
    return TuningResult(best, f"{metric}_pooled", len(pairs), num_truth, points)


def tuned_values(thresholds: Thresholds) -> dict[str, float]:
    """The thresholds that the search varies, by name."""
    return {name: getattr(thresholds, name) for name in TUNED_THRESHOLDS}


def check_metric(metric: str) -> None:
    """Raise a ValueError, which names the known metrics, if `tune_thresholds` does not know this one."""
    _metric_counter(metric)


def _metric_counter(metric: str) -> tuple[Callable[[OverlapTable], list[Any]], str]:
    """A function that makes the counts of an image, and which of their ratios is the metric."""
    if metric in _CTC_METRICS:
        return lambda table: [ctc_counts(table)], metric
    percent = _AP_METRIC.fullmatch(metric)
    if metric == "ap":
        thresholds = DSB2018_IOU_THRESHOLDS
    elif percent and 0.0 < float(percent[1]) <= 100.0:
        thresholds = (float(percent[1]) / 100,)
    else:
        raise ValueError(
            f"`metric` must be 'ap', 'apNN' such as 'ap50', {', '.join(map(repr, _CTC_METRICS))}, "
            f"got {metric!r}: choose one of these"
        )
    return lambda table: [match_counts(table, iou) for iou in thresholds], "ap"


def _checked_samples(
    samples: Iterable[tuple[NDArray[Any], NDArray[Any]]],
) -> tuple[list[tuple[NDArray[Any], NDArray[Any]]], int]:
    """(distance map, truth) of every sample, and the number of true cells in all of them."""
    pairs = [(np.asarray(distance_map), np.asarray(truth)) for distance_map, truth in samples]
    for distance_map, truth in pairs:
        if distance_map.shape != truth.shape:
            raise ValueError(
                f"Distance map and truth of a sample must have the same shape, got "
                f"{distance_map.shape} and {truth.shape}: use the map of the same image"
            )
    num_truth = sum(int(np.count_nonzero(np.unique(truth))) for _, truth in pairs)
    if not num_truth:
        raise DataSetError(
            f"Thresholds must be tuned on images with cells, got {count_text(len(pairs), 'image')} without any "
            "true cell: give validation images whose labels hold cells"
        )
    return pairs, num_truth


def _valid_indices(
    axes: Sequence[Sequence[float]], choices: Sequence[Iterable[int]]
) -> list[_Index]:
    """All combinations of `choices` whose fill threshold is below the peak threshold."""
    peaks, fills, _ = axes
    return [(i, j, k) for i, j, k in product(*choices) if fills[j] < peaks[i]]


def _coordinate_search(
    axes: Sequence[Sequence[float]],
    everything: Sequence[_Index],
    try_point: Callable[[_Index], float],
) -> None:
    spread = [
        sorted({round(share * (len(axis) - 1)) for share in (1 / 6, 1 / 2, 5 / 6)}) for axis in axes
    ]
    starts = _valid_indices(axes, spread) or [everything[len(everything) // 2]]
    best = max(starts, key=try_point)
    gained = True
    while gained:
        gained = False
        for axis in (1, 0, 2):
            line: list[Iterable[int]] = [[i] for i in best]
            line[axis] = range(len(axes[axis]))
            winner = max(_valid_indices(axes, line), key=try_point)
            if try_point(winner) > try_point(best):
                best, gained = winner, True
