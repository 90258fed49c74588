"""Score predicted label images against the truth: any iterable of images, or two folders.

Memory stays small: only counts are kept of each image.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.errors import DataSetError
from dinocell.evaluation.errors import ErrorPictures
from dinocell.evaluation.report import EvaluationReport
from dinocell.evaluation.scores import (
    DEFAULT_BOUNDARY_TOLERANCE_PX,
    DEFAULT_IOU_THRESHOLDS,
    check_iou_thresholds,
    evaluate_pair,
)
from dinocell.io import read_label_file
from dinocell.labels import require_cells
from dinocell.pairs import pair_folders


def evaluate_pairs(
    pairs: Iterable[tuple[str, ArrayLike, ArrayLike]],
    *,
    iou_thresholds: Iterable[float] = DEFAULT_IOU_THRESHOLDS,
    boundary_tolerance_px: float = DEFAULT_BOUNDARY_TOLERANCE_PX,
) -> EvaluationReport:
    """Score many predicted label images.

    Parameters
    ----------
    pairs : iterable of (name, truth, pred), may be a generator: one pair is held at a time
    iou_thresholds, boundary_tolerance_px : as for `evaluate_pair`

    Raises DataSetError (the two label images of a pair differ in shape (the message has the name),
    or there is no pair); TypeError, ValueError (as for `evaluate_pair`).
    """
    thresholds = check_iou_thresholds(iou_thresholds)
    images = []
    for name, truth, pred in pairs:
        if np.shape(truth) != np.shape(pred):
            sizes = " and ".join(" × ".join(map(str, np.shape(labels))) for labels in (truth, pred))
            raise DataSetError(
                f"The truth and the prediction of '{name}' must have the same size, got {sizes}: "
                "predict on the image at its original size"
            )
        how: dict[str, Any] = {"boundary_tolerance_px": boundary_tolerance_px, "name": name}
        images.append(evaluate_pair(truth, pred, iou_thresholds=thresholds, **how))
    if not images:
        raise DataSetError(
            "An evaluation must have at least one pair of label images, got none: give folders "
            "with label images of the same names"
        )
    return EvaluationReport(tuple(images), thresholds, float(boundary_tolerance_px))


def evaluate_folders(
    pred_dir: str | os.PathLike[str],
    truth_dir: str | os.PathLike[str],
    *,
    allow_missing_predictions: bool = False,
    errors_to: ErrorPictures | None = None,
    **how: Any,
) -> EvaluationReport:
    """Score a folder of predicted label files against a folder of true ones.

    Files are paired by `dinocell.pairs.pair_folders` and read one pair at a time.

    Parameters
    ----------
    allow_missing_predictions : count a true image without prediction as one in which no cell was found
    errors_to : gets a picture of each pair with its errors, on black
    how : keyword arguments of `evaluate_pairs`

    Raises DataSetError (the names or the sizes do not match, or a file looks like no label image:
    see `require_cells`); ImageFileError (a file is unreadable or holds no integers).
    """
    paths = pair_folders(pred_dir, truth_dir, allow_missing_predictions=allow_missing_predictions)
    notes: dict[str, tuple[str, ...]] = {}

    def read() -> Iterator[tuple[str, ArrayLike, ArrayLike]]:
        for name, pred_path, truth_path in paths:
            truth, pred, found = _read(name, truth_path, pred_path)
            if found:
                notes[name] = tuple(found)
            if errors_to is not None and truth.shape == pred.shape:
                errors_to.add(name, np.zeros(truth.shape, np.uint8), truth, pred)
            yield name, truth, pred

    missing = tuple(name for name, pred_path, _ in paths if pred_path is None)
    report = evaluate_pairs(read(), **how)
    return replace(report, missing_predictions=missing, notes=notes)


def _read(
    name: str, truth_path: Path, pred_path: Path | None
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], list[str]]:
    """Truth, prediction (no cell, if there is none), and what was noted on them."""
    files = [("truth", truth_path)] + ([("prediction", pred_path)] if pred_path else [])
    files.sort(key=lambda file: file[1].suffix.lower() == ".zip")  # the other one has a size
    labels: dict[str, NDArray[np.uint32]] = {}
    notes = []
    for what, path in files:
        shape = next((known.shape for known in labels.values()), None)
        if path.suffix.lower() == ".zip" and shape is None:
            raise DataSetError(
                f"The truth or the prediction of '{name}' must be a label image, because a zip of ROIs does "
                f"not say how large its image is, got '{path}' alone: save one of them as TIFF or PNG"
            )
        file = read_label_file(path, shape=shape)
        require_cells(file.pixels, path)
        labels[what] = file.pixels
        notes += [f"{what}: {note}" for note in file.notes]
    truth = labels["truth"]
    return truth, labels.get("prediction", np.zeros_like(truth)), notes
