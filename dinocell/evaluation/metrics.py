"""Scores of a predicted label image: AP, F1, PQ, AJI, boundary F, pixel Dice, count error.

Each function returns *counts* that add up, and the ratios are properties of the counts.  So the same
code gives the score of one image and, after ``sum(counts, start)``, the pooled score of many.  A mean
over images differs from it whenever images hold unequal numbers of cells: results must say which it is.

One rule for all edges: a ratio of 0 to 0 is nan.  An image without true and without predicted cells
therefore has no AP, F1, PQ, AJI, Dice (and is left out of means); an image with cells on one side only
scores 0; precision is nan where nothing was predicted and recall where nothing was there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.evaluation.matching import OverlapTable, match, match_total_iou
from dinocell.labels import cell_borders

DSB2018_IOU_THRESHOLDS: tuple[float, ...] = tuple(percent / 100 for percent in range(50, 100, 5))
"""0.50, 0.55, ..., 0.95: the thresholds whose mean AP ranked the 2018 Data Science Bowl."""


_Counts = TypeVar("_Counts", bound="Counts")


class Counts:
    """Base of frozen dataclasses of which ``+`` adds up every field."""

    def __add__(self: _Counts, other: _Counts) -> _Counts:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return type(self)(**sums)


def ratio(numerator: float, denominator: float) -> float:
    """Quotient of two counts; nan where the denominator is 0."""
    return numerator / denominator if denominator else math.nan


@dataclass(frozen=True)
class MatchCounts(Counts):
    """True positives, false positives and misses at one IoU threshold."""

    # a pair counts from this IoU on (≥), as in `dinocell.evaluation.matching.match`
    iou_threshold: float
    # tp, fp, fn: matched pairs, predicted objects left over, true objects left over
    tp: int = 0
    fp: int = 0
    fn: int = 0
    iou_sum: float = 0.0  # sum of the IoU of the matched pairs

    def __add__(self, other: MatchCounts) -> MatchCounts:
        if self.iou_threshold != other.iou_threshold:
            raise ValueError(
                f"Counts must share one IoU threshold to be added, got {self.iou_threshold} and "
                f"{other.iou_threshold}: add counts of the same threshold"
            )
        return replace(super().__add__(other), iou_threshold=self.iou_threshold)

    @property
    def ap(self) -> float:
        """TP / (TP + FP + FN): "average precision" of the 2018 Data Science Bowl and of StarDist."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP); nan without predicted objects."""
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); nan without true objects."""
        return ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """2·TP / (2·TP + FP + FN)."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the matched pairs; nan without a pair."""
        return ratio(self.iou_sum, self.tp)

    @property
    def pq(self) -> float:
        """Panoptic quality of one class, SQ·RQ (Kirillov et al., CVPR 2019, Eq. 1); 0 without a pair."""
        return ratio(self.iou_sum, self.tp + 0.5 * self.fp + 0.5 * self.fn)


def match_counts(table: OverlapTable, iou_threshold: float) -> MatchCounts:
    """Match objects one to one and count the outcome; ValueError if the threshold is not in (0, 1]."""
    pairs = match(table, iou_threshold)
    tp, iou_sum = int(pairs.size), float(table.iou[pairs].sum())
    return MatchCounts(float(iou_threshold), tp, table.num_pred - tp, table.num_truth - tp, iou_sum)


def pooled_ap(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(..., images, IoU, 3) counts → (..., IoU) AP of the cells of all images together."""
    total = counts.sum(axis=-3)
    return total[..., 0] / np.maximum(total.sum(axis=-1), 1)


@dataclass(frozen=True)
class AreaSums(Counts):
    """Pixels of intersections and unions; behind AJI, AJI+ and the pixel scores.

    `intersection` and `union` are sums over objects for AJI (a pixel may count more than once) and
    areas of the foreground for `pixel_sums`.
    """

    intersection: int = 0
    union: int = 0

    @property
    def iou(self) -> float:
        """intersection / union in [0, 1]; nan when both are 0."""
        return ratio(self.intersection, self.union)

    @property
    def dice(self) -> float:
        """2·intersection / (intersection + union) in [0, 1]; nan when both are 0."""
        return ratio(2 * self.intersection, self.intersection + self.union)


def aji(table: OverlapTable) -> AreaSums:
    """Sums of the aggregated Jaccard index; the index is `AreaSums.iou` of the result.

    Each true object takes the predicted object of highest IoU, and their intersection and union are
    added up.  A predicted object may be taken more than once.  True objects without any overlap and
    predicted objects that were never taken add their area to the union.  Equal IoU: the larger
    intersection, then the predicted object that comes first in the image.

    References
    ----------
    Kumar et al., "A dataset and a technique for generalized nuclear segmentation for computational
    pathology", IEEE Trans. Med. Imaging 36 (2017), Algorithm 1.
    """
    # Within one true object the last pair of this order is the best one.
    order = np.lexsort((-table.pred_index, table.intersection, table.iou, table.truth_index))
    truth_sorted = table.truth_index[order]
    is_last = np.ones(order.size, bool)
    is_last[:-1] = truth_sorted[1:] != truth_sorted[:-1]
    return _sums_over_pairs(table, order[is_last])


def aji_plus(table: OverlapTable) -> AreaSums:
    """Sums of AJI+, which pairs objects one to one; the index is `AreaSums.iou` of the result.

    The pairing has the highest total IoU.  Objects of either side without a partner add their area to
    the union.

    References
    ----------
    Graham et al., "HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue
    histology images", Medical Image Analysis 58 (2019).
    """
    return _sums_over_pairs(table, match_total_iou(table))


def _sums_over_pairs(table: OverlapTable, pairs: NDArray[np.int64]) -> AreaSums:
    without_pair = np.setdiff1d(np.arange(table.num_truth), table.truth_index[pairs])
    never_taken = np.setdiff1d(np.arange(table.num_pred), table.pred_index[pairs])
    union = table.union[pairs].sum()
    union += table.truth_areas[without_pair].sum() + table.pred_areas[never_taken].sum()
    return AreaSums(int(table.intersection[pairs].sum()), int(union))


def pixel_sums(table: OverlapTable) -> AreaSums:
    """Intersection and union of the two foregrounds (all cells together); for pixel IoU and Dice."""
    intersection = int(table.intersection.sum())
    areas = int(table.truth_areas.sum() + table.pred_areas.sum())
    return AreaSums(intersection, areas - intersection)


@dataclass(frozen=True)
class BoundaryCounts(Counts):
    """Boundary pixels of truth and prediction.

    `truth_hit_px` and `pred_hit_px` are those within the tolerance of one of the other side.
    """

    truth_px: int = 0
    truth_hit_px: int = 0
    pred_px: int = 0
    pred_hit_px: int = 0

    @property
    def precision(self) -> float:
        """Share of predicted boundary that lies near true boundary; nan without predicted boundary."""
        return ratio(self.pred_hit_px, self.pred_px)

    @property
    def recall(self) -> float:
        """Share of true boundary that lies near predicted boundary; nan without true boundary."""
        return ratio(self.truth_hit_px, self.truth_px)

    @property
    def f(self) -> float:
        """Harmonic mean of `precision` and `recall`: 0 with a boundary on one side only, nan with none."""
        if not (self.truth_px and self.pred_px):
            return 0.0 if self.truth_px or self.pred_px else math.nan
        precision, recall = self.precision, self.recall
        both = precision + recall
        return 2 * precision * recall / both if both else 0.0


def boundary_counts(truth: ArrayLike, pred: ArrayLike, tolerance_px: float) -> BoundaryCounts:
    """Compare cell boundaries, forgiving displacements of up to `tolerance_px`.

    Boundaries are those of `dinocell.labels.cell_borders`, of two (H, W) label images.  The tolerance is
    the greatest Euclidean distance, in px between pixel centres, that still counts as near (≤).

    Raises ValueError (an image is not 2-D, the shapes differ, or the tolerance is negative or not
    finite).

    Notes
    -----
    It is the boundary F measure with a fixed tolerance.  Cellpose's ``boundary_scores`` is another
    measure (overlap of boundaries widened by a share of the cell diameter): do not mix the two.

    References
    ----------
    Csurka et al., "What is a good evaluation measure for semantic segmentation?", BMVC 2013
    (precision and recall of boundaries at a distance threshold, after Martin et al., TPAMI 2004).
    """
    if not (tolerance_px >= 0 and math.isfinite(tolerance_px)):
        raise ValueError(
            f"`tolerance_px` must be a finite number of pixels, 0 or more, got {tolerance_px}: "
            "use about 2"
        )
    true_boundary, pred_boundary = cell_borders(truth), cell_borders(pred)
    if true_boundary.shape != pred_boundary.shape:
        raise ValueError(
            f"`truth` and `pred` must have the same shape, got {true_boundary.shape} and "
            f"{pred_boundary.shape}: compare label images of the same field"
        )
    return BoundaryCounts(
        truth_px=int(np.count_nonzero(true_boundary)),
        truth_hit_px=_num_near(true_boundary, pred_boundary, tolerance_px),
        pred_px=int(np.count_nonzero(pred_boundary)),
        pred_hit_px=_num_near(pred_boundary, true_boundary, tolerance_px),
    )


def _num_near(pixels: NDArray[np.bool_], others: NDArray[np.bool_], tolerance_px: float) -> int:
    """Number of `pixels` with one of `others` within the tolerance.

    Around each pixel the disc is looked through row by row: running sums along a row tell at once
    whether a stretch of it holds any of the others.
    """
    height, width = others.shape
    sums = np.zeros((height, width + 1), np.int32)
    np.cumsum(others, axis=1, out=sums[:, 1:])
    rows, columns = np.nonzero(pixels)
    num_pixels = rows.size
    # Rounding of a tolerance such as √13 must not lose the pixels at exactly that distance.
    squared = min(tolerance_px, height + width) ** 2 * (1 + 1e-12)
    reach = math.isqrt(int(squared))
    for step in sorted(range(-reach, reach + 1), key=abs):
        half_width = math.isqrt(int(squared - step * step))
        other_rows = rows + step
        first = np.maximum(columns - half_width, 0)
        last = np.minimum(columns + half_width + 1, width)
        inside = (other_rows >= 0) & (other_rows < height)
        other_rows = np.where(inside, other_rows, 0)
        near = inside & (sums[other_rows, last] > sums[other_rows, first])
        rows, columns = rows[~near], columns[~near]
    return num_pixels - rows.size


@dataclass(frozen=True)
class CountError(Counts):
    """How far the number of predicted objects is from the truth.

    `absolute` is |predicted − true|, added up image by image: errors of opposite sign do not cancel.
    """

    num_truth: int = 0
    num_pred: int = 0
    absolute: int = 0

    @property
    def signed(self) -> int:
        """predicted − true; above 0 means too many."""
        return self.num_pred - self.num_truth

    @property
    def relative(self) -> float:
        """(predicted − true) / true; nan without true objects."""
        return ratio(self.signed, self.num_truth)


def count_error(table: OverlapTable) -> CountError:
    """Compare the numbers of objects.  Two empty images have a count error of 0, not nan."""
    return CountError(table.num_truth, table.num_pred, abs(table.num_pred - table.num_truth))
