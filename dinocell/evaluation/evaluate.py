"""Score predicted label images against the truth: one pair, many pairs, two folders.

`evaluate_pair` scores one image, `evaluate_pairs` any iterable of images, `evaluate_folders` two
folders of label files.  A report holds every score three times, and says which one it is:

per image
    ``seg``, ``ap50``, ...: one row per image.
``*_pooled``
    All cells of all images as one big image: counts are summed before anything is divided.
``*_mean``
    Mean of the per-image scores, each image with the same weight.  Scores that do not exist for an
    image (nan, for example AP of an image without true and predicted cells) are left out.

Memory stays small: only counts are kept of each image.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dinocell.errors import DataSetError
from dinocell.evaluation.ctc import CtcCounts, ctc_counts
from dinocell.evaluation.matching import overlap_table
from dinocell.evaluation.metrics import (
    AreaSums,
    BoundaryCounts,
    CountError,
    MatchCounts,
    aji,
    aji_plus,
    boundary_counts,
    count_error,
    match_counts,
    pixel_sums,
)
from dinocell.pairs import pair_folders
from dinocell.results.table import align_columns

__all__ = [
    "DEFAULT_BOUNDARY_TOLERANCE_PX",
    "DEFAULT_IOU_THRESHOLDS",
    "EvaluationReport",
    "ImageScores",
    "evaluate_folders",
    "evaluate_pair",
    "evaluate_pairs",
    "threshold_name",
]

DEFAULT_IOU_THRESHOLDS: tuple[float, ...] = (0.5, 0.75, 0.9)
DEFAULT_BOUNDARY_TOLERANCE_PX: float = 2.0


def threshold_name(score: str, iou_threshold: float) -> str:
    """Column name of a score at an IoU threshold: ``ap50``, ``f1_75``, ``pq62.5``."""
    percent = f"{round(100 * iou_threshold, 6):g}".rjust(2, "0")
    return f"{score}_{percent}" if score[-1].isdigit() else f"{score}{percent}"


@dataclass(frozen=True)
class ImageScores:
    """Counts of one image (or, added up, of several) and the scores they give.

    Attributes
    ----------
    name : str
        Name of the image; of a sum, that of the first term.
    matches : tuple of MatchCounts
        One per IoU threshold.
    ctc : CtcCounts
    aji_sums, aji_plus_sums, pixels : AreaSums
    boundary : BoundaryCounts
    count : CountError
    """

    name: str
    matches: tuple[MatchCounts, ...]
    ctc: CtcCounts
    aji_sums: AreaSums
    aji_plus_sums: AreaSums
    pixels: AreaSums
    boundary: BoundaryCounts
    count: CountError

    def __add__(self, other: ImageScores) -> ImageScores:
        return ImageScores(
            name=self.name,
            matches=tuple(a + b for a, b in zip(self.matches, other.matches, strict=True)),
            ctc=self.ctc + other.ctc,
            aji_sums=self.aji_sums + other.aji_sums,
            aji_plus_sums=self.aji_plus_sums + other.aji_plus_sums,
            pixels=self.pixels + other.pixels,
            boundary=self.boundary + other.boundary,
            count=self.count + other.count,
        )

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
        return row | {
            "det_splits": self.ctc.ns,
            "det_missed": self.ctc.fn,
            "det_extra": self.ctc.fp,
        }

    def scores(self) -> dict[str, float]:
        """All scores by column name; nan where a score does not exist.

        Names: ``seg det op_csb``; for each IoU threshold ``ap50 precision50 recall50 f1_50 pq50
        sq50``; ``ap_avg``, the mean of AP over these thresholds; ``aji aji_plus boundary_f boundary_precision boundary_recall pixel_dice pixel_iou``;
        ``count_error`` (predicted − true), ``count_error_abs``, ``count_error_rel``.
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


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of many images: per image, pooled, and as means over images.

    Attributes
    ----------
    images : tuple of ImageScores
        In the order they were given, at least one.
    iou_thresholds : tuple of float
    boundary_tolerance_px : float
    missing_predictions : tuple of str
        Names of images without a prediction that were scored as if nothing had been found.
    """

    images: tuple[ImageScores, ...]
    iou_thresholds: tuple[float, ...]
    boundary_tolerance_px: float
    missing_predictions: tuple[str, ...] = field(default=())

    @property
    def num_empty_images(self) -> int:
        """Images without true and without predicted cells; the means of most scores skip them."""
        return sum(image.is_empty for image in self.images)

    @cached_property
    def total(self) -> ImageScores:
        """Counts of all images added up."""
        return reduce(ImageScores.__add__, self.images)

    @cached_property
    def pooled(self) -> dict[str, float]:
        """``seg_pooled``, ``ap50_pooled``, ...: sums over all images before dividing."""
        return {f"{name}_pooled": value for name, value in self.total.scores().items()}

    @cached_property
    def mean(self) -> dict[str, float]:
        """``seg_mean``, ``ap50_mean``, ...: means of the per-image scores that exist, else nan."""
        rows = [image.scores() for image in self.images]
        means = {}
        for name in rows[0]:
            values = [row[name] for row in rows if not math.isnan(row[name])]
            means[f"{name}_mean"] = math.fsum(values) / len(values) if values else math.nan
        return means

    def summary_rows(self) -> list[tuple[str, float, float]]:
        """(score, pooled, mean over images) for every score."""
        return [
            (name, self.pooled[f"{name}_pooled"], self.mean[f"{name}_mean"])
            for name in self.total.scores()
        ]

    def image_rows(self) -> list[dict[str, str | int | float]]:
        """One row per image: `name`, the counts, the scores."""
        return [{"name": image.name} | image.counts() | image.scores() for image in self.images]

    def table(
        self,
        *,
        per_image: bool = False,
        image_columns: Sequence[str] | None = None,
    ) -> list[str]:
        """The report as aligned lines of plain text.

        Parameters
        ----------
        per_image : bool
            Put one line per image before the summary.
        image_columns : sequence of str, optional
            Columns of `image_rows` shown per image; default: counts of cells, SEG, DET, OP_CSB, AP at
            three thresholds (0.5, 0.75, 0.9 if in use), F1 and PQ at the first of them, AJI,
            boundary F.

        Raises
        ------
        ValueError
            A column is unknown.
        """
        lines: list[str] = []
        if per_image:
            lines += [*self._image_lines(image_columns), ""]
        total, skipped, missing = self.total, self.num_empty_images, len(self.missing_predictions)
        lines.append(
            f"{len(self.images)} images, {total.num_truth} true cells, "
            f"{total.num_pred} predicted cells"
        )
        if missing:
            lines.append(f"{missing} images have no prediction and count as empty predictions")
        rows = [("score", "pooled", "mean over images")]
        for name, pooled, mean in self.summary_rows():
            rows.append((name, _as_text(name, pooled), _as_text(name, mean)))
        lines += align_columns(rows)
        if skipped:
            lines.append(
                f"{skipped} of {len(self.images)} images have no true and no predicted cell: "
                "left out of the means, except of the count error"
            )
        return lines

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write one row per image (counts and scores, "nan" where a score does not exist).

        Pooled scores and means are not rows of this table; `to_json` holds them.  The file appears
        whole or not at all.
        """
        from dinocell.files import atomic_path

        rows = self.image_rows()
        with (
            atomic_path(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write settings, pooled scores, means and the rows of all images.

        A score that does not exist is null.  The file appears whole or not at all.
        """
        from dinocell.files import write_text_atomically

        document = {
            "iou_thresholds": list(self.iou_thresholds),
            "boundary_tolerance_px": self.boundary_tolerance_px,
            "num_images": len(self.images),
            "num_empty_images": self.num_empty_images,
            "missing_predictions": list(self.missing_predictions),
            "totals": self.total.counts(),
            "pooled": _without_nan(self.pooled),
            "mean": _without_nan(self.mean),
            "images": [_without_nan(row) for row in self.image_rows()],
        }
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        write_text_atomically(path, text + "\n")

    def _image_lines(self, columns: Sequence[str] | None) -> list[str]:
        rows = self.image_rows()
        if columns is None:
            usual = [iou for iou in self.iou_thresholds if iou in DEFAULT_IOU_THRESHOLDS]
            shown = usual or self.iou_thresholds[:3]
            columns = [
                *("num_truth", "num_pred", "seg", "det", "op_csb"),
                *(threshold_name("ap", iou) for iou in shown),
                *(threshold_name("f1", shown[0]), threshold_name("pq", shown[0])),
                *("aji", "boundary_f"),
            ]
        unknown = [name for name in columns if name not in rows[0]]
        if unknown:
            raise ValueError(
                f"`image_columns` must be columns of the image rows, got {', '.join(unknown)}: "
                f"choose among {', '.join(rows[0])}."
            )
        cells = [("name", *columns)]
        for row in rows:
            cells.append((str(row["name"]), *(_as_text(name, row[name]) for name in columns)))
        return align_columns(cells)


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
    truth, pred : (H, W) integer ndarrays
        Label images, 0 is background; the numbering does not matter.
    iou_thresholds : floats in (0, 1]
        Where AP, precision, recall, F1, PQ and SQ are taken.
    boundary_tolerance_px : float
        Distance that the boundary F forgives, see `dinocell.evaluation.metrics.boundary_counts`.
    name : str
        Kept in the result.

    Returns
    -------
    ImageScores
        ``.scores()["ap50"]`` and so on.  Both images empty: all ratios nan.  One image empty: AP, F1,
        PQ, AJI, Dice 0.

    Raises
    ------
    TypeError
        An image is not of an integer type.
    ValueError
        The shapes differ, an image is not 2-D, labels are negative, thresholds are not distinct
        fractions, or the tolerance is negative.
    """
    thresholds = _checked_thresholds(iou_thresholds)
    table = overlap_table(truth, pred)
    return ImageScores(
        name=name,
        matches=tuple(match_counts(table, threshold) for threshold in thresholds),
        ctc=ctc_counts(table),
        aji_sums=aji(table),
        aji_plus_sums=aji_plus(table),
        pixels=pixel_sums(table),
        boundary=boundary_counts(truth, pred, boundary_tolerance_px),
        count=count_error(table),
    )


def evaluate_pairs(
    pairs: Iterable[tuple[str, ArrayLike, ArrayLike]],
    *,
    iou_thresholds: Iterable[float] = DEFAULT_IOU_THRESHOLDS,
    boundary_tolerance_px: float = DEFAULT_BOUNDARY_TOLERANCE_PX,
    progress: Callable[[ImageScores], None] | None = None,
) -> EvaluationReport:
    """Score many predicted label images.

    Parameters
    ----------
    pairs : iterable of (name, truth, pred)
        May be a generator: one pair is held at a time.
    iou_thresholds, boundary_tolerance_px
        As for `evaluate_pair`.
    progress : callable, optional
        Called with the scores of each image as soon as they are known.

    Returns
    -------
    EvaluationReport

    Raises
    ------
    DataSetError
        The two label images of a pair differ in shape (the message has the name), or there is no pair.
    TypeError, ValueError
        As for `evaluate_pair`.
    """
    thresholds = _checked_thresholds(iou_thresholds)
    images = []
    for name, truth, pred in pairs:
        if np.shape(truth) != np.shape(pred):
            raise DataSetError(
                f"Truth and prediction must have the same size, for '{name}' they are "
                f"{_size_text(np.shape(truth))} and {_size_text(np.shape(pred))}: "
                "predict on the image at its original size."
            )
        scores = evaluate_pair(
            truth,
            pred,
            iou_thresholds=thresholds,
            boundary_tolerance_px=boundary_tolerance_px,
            name=name,
        )
        images.append(scores)
        if progress is not None:
            progress(scores)
    if not images:
        raise DataSetError(
            "At least one pair of label images is needed, got none: "
            "give folders that hold label images of the same names."
        )
    return EvaluationReport(tuple(images), thresholds, float(boundary_tolerance_px))


def evaluate_folders(
    pred_dir: str | os.PathLike[str],
    truth_dir: str | os.PathLike[str],
    *,
    allow_missing_predictions: bool = False,
    iou_thresholds: Iterable[float] = DEFAULT_IOU_THRESHOLDS,
    boundary_tolerance_px: float = DEFAULT_BOUNDARY_TOLERANCE_PX,
    progress: Callable[[ImageScores], None] | None = None,
) -> EvaluationReport:
    """Score a folder of predicted label files against a folder of true ones.

    Files are paired by `dinocell.pairs.pair_folders` and read one pair at a time.

    Raises
    ------
    DataSetError
        The names or the sizes do not match.
    ImageFileError
        A file is unreadable or holds no label image.
    """
    from dinocell.io import read_labels

    paths = pair_folders(pred_dir, truth_dir, allow_missing_predictions=allow_missing_predictions)

    def read() -> Iterator[tuple[str, ArrayLike, ArrayLike]]:
        for name, pred_path, truth_path in paths:
            truth = read_labels(truth_path)
            yield name, truth, np.zeros_like(truth) if pred_path is None else read_labels(pred_path)

    report = evaluate_pairs(
        read(),
        iou_thresholds=iou_thresholds,
        boundary_tolerance_px=boundary_tolerance_px,
        progress=progress,
    )
    missing = tuple(name for name, pred_path, _ in paths if pred_path is None)
    return EvaluationReport(
        report.images, report.iou_thresholds, report.boundary_tolerance_px, missing
    )


def _checked_thresholds(iou_thresholds: Iterable[float]) -> tuple[float, ...]:
    thresholds = tuple(float(threshold) for threshold in iou_thresholds)
    distinct = len({threshold_name("ap", threshold) for threshold in thresholds})
    in_range = all(0 < threshold <= 1 for threshold in thresholds)
    if not thresholds or not in_range or distinct < len(thresholds):
        raise ValueError(
            f"`iou_thresholds` must be one or more distinct numbers in (0, 1], got {thresholds}: "
            "give fractions such as 0.5."
        )
    return tuple(sorted(thresholds))


def _size_text(shape: tuple[int, ...]) -> str:
    return " × ".join(str(side) for side in shape)


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if name in ("count_error", "count_error_abs") else f"{value:.4f}"


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in row.items()
    }
