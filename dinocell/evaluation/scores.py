"""All scores of one predicted label image, and the counts that they are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from dinocell.evaluation import metrics
from dinocell.evaluation.ctc import CtcCounts, ctc_counts
from dinocell.evaluation.matching import overlap_table

DEFAULT_IOU_THRESHOLDS: tuple[float, ...] = (0.5, 0.75, 0.9)
DEFAULT_BOUNDARY_TOLERANCE_PX: float = 2.0


def threshold_name(score: str, iou_threshold: float) -> str:
    """Column name of a score at an IoU threshold: ``ap50``, ``f1_75``, ``pq62.5``."""
    percent = f"{round(100 * iou_threshold, 6):g}".rjust(2, "0")
    return f"{score}_{percent}" if score[-1].isdigit() else f"{score}{percent}"


@dataclass(frozen=True)
class ImageScores(metrics.Counts):
    """Counts of one image (or, added up, of several) and the scores they give.

    `name` is that of the image; of a sum, that of the first term.  `matches` has one item per IoU
    threshold.
    """

    name: str
    matches: tuple[metrics.MatchCounts, ...]
    ctc: CtcCounts
    aji_sums: metrics.AreaSums
    aji_plus_sums: metrics.AreaSums
    pixels: metrics.AreaSums
    boundary: metrics.BoundaryCounts
    count: metrics.CountError

    def __add__(self, other: ImageScores) -> ImageScores:
        matches = tuple(a + b for a, b in zip(self.matches, other.matches, strict=True))
        return replace(super().__add__(other), name=self.name, matches=matches)

    @property
    def num_truth(self) -> int:
        """True cells."""
        return self.count.num_truth

    @property
    def num_pred(self) -> int:
        """Predicted cells."""
        return self.count.num_pred

    @property
    def is_empty(self) -> bool:
        """Neither true nor predicted cells: most scores are nan."""
        return not (self.num_truth or self.num_pred)

    def counts(self) -> dict[str, int]:
        """Whole numbers behind the scores: objects, TP/FP/FN per threshold, NS/FN/FP of DET."""
        row = {"num_truth": self.num_truth, "num_pred": self.num_pred}
        for match in self.matches:
            for name in ("tp", "fp", "fn"):
                row[threshold_name(name, match.iou_threshold)] = getattr(match, name)
        ctc = self.ctc
        return row | {"det_splits": ctc.ns, "det_missed": ctc.fn, "det_extra": ctc.fp}

    def scores(self) -> dict[str, float]:
        """All scores by column name; nan where a score does not exist.

        Names: ``seg det op_csb``; for each IoU threshold ``ap50 precision50 recall50 f1_50 pq50
        sq50``; ``ap_avg``, the mean of AP over these thresholds; ``aji aji_plus boundary_f
        boundary_precision boundary_recall pixel_dice pixel_iou``; ``count_error`` (predicted −
        true), ``count_error_abs``, ``count_error_rel``.
        """
        row = {"seg": self.ctc.seg, "det": self.ctc.det, "op_csb": self.ctc.op_csb}
        for match in self.matches:
            for name in ("ap", "precision", "recall", "f1", "pq", "sq"):
                row[threshold_name(name, match.iou_threshold)] = getattr(match, name)
        return row | {
            "ap_avg": math.fsum(match.ap for match in self.matches) / len(self.matches),
            "aji": self.aji_sums.iou,
            "aji_plus": self.aji_plus_sums.iou,
            "boundary_f": self.boundary.f,
            "boundary_precision": self.boundary.precision,
            "boundary_recall": self.boundary.recall,
            "pixel_dice": self.pixels.dice,
            "pixel_iou": self.pixels.iou,
            "count_error": float(self.count.signed),
            "count_error_abs": float(self.count.absolute),
            "count_error_rel": self.count.relative,
        }


def evaluate_pair(
    truth: ArrayLike,
    pred: ArrayLike,
    *,
    iou_thresholds: Iterable[float] = DEFAULT_IOU_THRESHOLDS,
    boundary_tolerance_px: float = DEFAULT_BOUNDARY_TOLERANCE_PX,
    name: str = "",
) -> ImageScores:
    """Score one predicted label image.

    Parameters
    ----------
    truth, pred : (H, W) integer label images, 0 is background; the numbering does not matter
    iou_thresholds : in (0, 1], at which AP, precision, recall, F1, PQ and SQ are computed
    boundary_tolerance_px : distance that the boundary F forgives, see `boundary_counts`
    name : kept in the result

    Returns ImageScores: ``.scores()["ap50"]`` and so on.  Both images empty: all ratios nan.  One
    image empty: AP, F1, PQ, AJI, Dice 0.

    Raises TypeError (an image is not of an integer type); ValueError (the shapes differ, an image
    is not 2-D, labels are negative, thresholds are not distinct fractions, or the tolerance is
    negative).
    """
    thresholds = check_iou_thresholds(iou_thresholds)
    table = overlap_table(truth, pred)
    return ImageScores(
        name=name,
        matches=tuple(metrics.match_counts(table, threshold) for threshold in thresholds),
        ctc=ctc_counts(table),
        aji_sums=metrics.aji(table),
        aji_plus_sums=metrics.aji_plus(table),
        pixels=metrics.pixel_sums(table),
        boundary=metrics.boundary_counts(truth, pred, boundary_tolerance_px),
        count=metrics.count_error(table),
    )


def check_iou_thresholds(iou_thresholds: Iterable[float]) -> tuple[float, ...]:
    """The thresholds in ascending order; ValueError if none, out of (0, 1], or twice the same."""
    thresholds = tuple(float(threshold) for threshold in iou_thresholds)
    distinct = len({threshold_name("ap", threshold) for threshold in thresholds})
    in_range = all(0 < threshold <= 1 for threshold in thresholds)
    if not thresholds or not in_range or distinct < len(thresholds):
        raise ValueError(
            f"`iou_thresholds` must be one or more distinct numbers in (0, 1], got {thresholds}: "
            "give fractions such as 0.5"
        )
    return tuple(sorted(thresholds))
