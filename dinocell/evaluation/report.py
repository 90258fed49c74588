"""Scores of many images as tables: per image, pooled, and as means over images.

per image
    ``seg``, ``ap50``, ...: one row per image.
``*_pooled``
    All cells of all images as one big image: counts are summed before anything is divided.
``intervals``
    Of pooled AP: what another draw of as many images would give (`dinocell.evaluation.intervals`).
``*_mean``
    Mean of the per-image scores, each image with the same weight.  Scores that do not exist for an
    image (nan, for example AP of an image without true and predicted cells) are left out.
"""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np

from dinocell.evaluation.intervals import ap_intervals
from dinocell.evaluation.scores import DEFAULT_IOU_THRESHOLDS, ImageScores, threshold_name
from dinocell.files import saying_what_failed, write_text_atomically, writing
from dinocell.progress import count_text
from dinocell.results.table import align_columns


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of many images, at least one: per image, pooled, and as means over images.

    `missing_predictions` names images without one, which were scored as if nothing had been found;
    `notes` has what a careful user should know of an image, by its name.
    """

    images: tuple[ImageScores, ...]
    iou_thresholds: tuple[float, ...]
    boundary_tolerance_px: float
    missing_predictions: tuple[str, ...] = field(default=())
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

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

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """``ap50_pooled``, ...: bounds that hold 95 % of 2,000 draws of as many images.

        Images without true and predicted cells are not drawn; nothing where there are no others.
        """
        drawn = [image for image in self.images if not image.is_empty]
        if not drawn:
            return {}
        counts = np.array([[(m.tp, m.fp, m.fn) for m in image.matches] for image in drawn])
        names = [f"{threshold_name('ap', iou)}_pooled" for iou in self.iou_thresholds]
        bounds = ap_intervals(counts).tolist()
        return {name: (low, high) for name, (low, high) in zip(names, bounds, strict=True)}

    def image_rows(self) -> list[dict[str, str | int | float]]:
        """One row per image: `name`, the counts, the scores."""
        return [{"name": image.name} | image.counts() | image.scores() for image in self.images]

    def table(self, *, per_image: bool = False) -> list[str]:
        """The report as aligned lines of plain text.

        With `per_image` one line per image comes before the summary: counts of cells, SEG, DET, OP_CSB,
        AP at those of 0.5, 0.75 and 0.9 that were evaluated (else at the first three thresholds), F1
        and PQ at the first of them, AJI, boundary F.
        """
        lines = [*self._image_lines(), ""] if per_image else []
        total, skipped, missing = self.total, self.num_empty_images, len(self.missing_predictions)
        lines.append(
            f"{count_text(len(self.images), 'image')}, {count_text(total.num_truth, 'true cell')}, "
            f"{count_text(total.num_pred, 'predicted cell')}"
        )
        if missing:
            lines.append(
                f"Images without a prediction count as images without any found cell: {missing}"
            )
        rows = [("score", "pooled", "95 % interval", "mean over images")]
        for name in total.scores():
            pooled, mean = self.pooled[f"{name}_pooled"], self.mean[f"{name}_mean"]
            bounds = self.intervals.get(f"{name}_pooled")
            interval = "" if bounds is None else " to ".join(f"{bound:.3f}" for bound in bounds)
            rows.append((name, _as_text(name, pooled), interval, _as_text(name, mean)))
        lines += align_columns(rows)
        if skipped:
            lines.append(
                "Images without any true or predicted cell are left out of the means, except of the count "
                f"error: {skipped} of {len(self.images)}"
            )
        lines += [f"note: {name}: {'; '.join(notes)}" for name, notes in self.notes.items()]
        return lines

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `image_rows` atomically ("nan" where a score does not exist), without the summary.

        Raises DINOCellError (the file cannot be written), as `to_json` does.
        """
        rows = self.image_rows()
        with (
            writing(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write settings, pooled scores, means and all rows atomically; null where no score exists.

        The notes on an image are in its row, as `warnings`.
        """
        document = {
            "iou_thresholds": list(self.iou_thresholds),
            "boundary_tolerance_px": self.boundary_tolerance_px,
            "num_images": len(self.images),
            "num_empty_images": self.num_empty_images,
            "missing_predictions": list(self.missing_predictions),
            "totals": self.total.counts(),
            "pooled": _without_nan(self.pooled),
            "intervals": self.intervals,
            "mean": _without_nan(self.mean),
            "images": [
                _without_nan(row) | {"warnings": "; ".join(self.notes.get(str(row["name"]), ()))}
                for row in self.image_rows()
            ],
        }
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        with saying_what_failed(path):
            write_text_atomically(path, text + "\n", errors="backslashreplace")

    def _image_lines(self) -> list[str]:
        usual = [iou for iou in self.iou_thresholds if iou in DEFAULT_IOU_THRESHOLDS]
        shown = usual or self.iou_thresholds[:3]
        columns = [
            *("num_truth", "num_pred", "seg", "det", "op_csb"),
            *(threshold_name("ap", iou) for iou in shown),
            *(threshold_name("f1", shown[0]), threshold_name("pq", shown[0])),
            *("aji", "boundary_f"),
        ]
        cells = [("name", *columns)]
        for row in self.image_rows():
            cells.append((str(row["name"]), *(_as_text(name, row[name]) for name in columns)))
        return align_columns(cells)


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
