"""A model on a folder of images with truth: one forward pass per image, scores, tuned thresholds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dinocell.errors import DataSetError, UsageError
from dinocell.evaluation.evaluate import (
    DEFAULT_BOUNDARY_TOLERANCE_PX,
    DEFAULT_IOU_THRESHOLDS,
    EvaluationReport,
    evaluate_pairs,
)
from dinocell.evaluation.thresholds import TuningResult, tune_thresholds
from dinocell.io import natural_key, read_labels
from dinocell.network.model import load_model, save_model, with_config
from dinocell.pairs import find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.progress import progress

__all__ = ["ModelEvaluation", "check_data_folder", "evaluate_model"]


@dataclass(frozen=True)
class ModelEvaluation:
    """Scores of a model, the thresholds they were reached with, and where these come from."""

    report: EvaluationReport
    thresholds: dict[str, float]
    tuning: TuningResult | None
    saved_to: Path | None

    def text(self) -> str:
        """One or two lines before the table."""
        values = ", ".join(f"{name} {value:g}" for name, value in self.thresholds.items())
        origin = "of the model" if self.tuning is None else f"tuned here on {self.tuning.metric}"
        lines = [f"thresholds ({origin}): {values}"]
        if self.tuning is not None:
            lines.append(
                "these scores are on the images the thresholds were chosen on: report others"
            )
        if self.saved_to is not None:
            lines.append(f"model with these thresholds: {self.saved_to}")
        return "\n".join(lines)


def check_data_folder(folder: Path) -> None:
    """A folder of images with truth has `images/` and `labels/`.

    Raises
    ------
    DataSetError
        One of them is not there.
    """
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise DataSetError(
                f"--data must be a folder with images and labels, got {folder} without {part}: name "
                "the folder above them"
            )


def evaluate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    device: str = "auto",
    tune: bool = False,
    metric: str = "ap",
    save_to: str | os.PathLike[str] | None = None,
    iou_thresholds: Iterable[float] = DEFAULT_IOU_THRESHOLDS,
    boundary_tolerance_px: float = DEFAULT_BOUNDARY_TOLERANCE_PX,
    shown: bool = True,
) -> ModelEvaluation:
    """Run a model on `data/images` and score it against `data/labels`.

    Parameters
    ----------
    model : model file or bundled name
    data : folder
        With `images` and `labels`, paired by `dinocell.pairs.find_pairs`.
    tune : bool
        Search peak, fill and prominence thresholds for the best `metric` on these images first.
    metric : str
        As for `tune_thresholds`.
    save_to : path, optional
        With `tune`: write the model with the found thresholds here.

    Raises
    ------
    DataSetError
        The folders are missing or do not fit together.
    UsageError
        The metric is unknown, or `save_to` is the model itself or no `.safetensors`.
    """
    folder = Path(data)
    check_data_folder(folder)
    if save_to is not None and Path(save_to).suffix != ".safetensors":
        raise UsageError(f"a model file must end in .safetensors, got {save_to}: add the suffix")
    if save_to is not None and Path(save_to).resolve() == Path(model).resolve():
        raise UsageError(
            f"the tuned model must go to another file than the model, got {save_to} for both: choose "
            "another name"
        )
    loaded = load_model(os.fspath(model), device=device)
    pipeline = DINOCellPipeline(loaded)
    pairs = find_pairs(folder / "images", folder / "labels")
    pairs.sort(key=lambda pair: natural_key(pair.image_path))
    planes, maps, labels = {}, {}, {}
    with progress("predicting", len(pairs), shown=shown) as bar:
        for pair in pairs:
            name = pair.image_path.stem
            planes[name], _, _ = pipeline.load(pair.image_path)
            labels[name] = read_labels(pair.labels_path)
            if labels[name].shape != planes[name].shape:
                raise DataSetError(
                    f"an image and its labels must have one size, got {planes[name].shape} and "
                    f"{labels[name].shape} for {name}: check that the names belong together"
                )
            maps[name] = pipeline.predict(planes[name])
            bar.advance(note=name)
    tuning, saved_to = None, None
    if tune:
        try:
            tuning = tune_thresholds(
                [(maps[name], labels[name]) for name in maps],
                metric=metric,
                min_area_px=loaded.config.min_area_px,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        tuned_model = with_config(
            loaded,
            peak_threshold=tuning.peak_threshold,
            fill_threshold=tuning.fill_threshold,
            min_prominence=tuning.min_prominence,
        )
        pipeline = DINOCellPipeline(tuned_model)
        if save_to is not None:
            saved_to = Path(save_to)
            save_model(saved_to, tuned_model, half=True)
    config = pipeline.model.config
    report = evaluate_pairs(
        ((name, labels[name], pipeline.finish(planes[name], maps[name]).labels) for name in maps),
        iou_thresholds=iou_thresholds,
        boundary_tolerance_px=boundary_tolerance_px,
    )
    return ModelEvaluation(
        report=report,
        thresholds={
            "peak_threshold": config.peak_threshold,
            "fill_threshold": config.fill_threshold,
            "min_prominence": config.min_prominence,
        },
        tuning=tuning,
        saved_to=saved_to,
    )
