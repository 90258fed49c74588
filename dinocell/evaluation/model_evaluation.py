"""Run a model on a folder of images with truth: predict each image once, tune thresholds, score."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError, UsageError, raised_as
from dinocell.evaluation.errors import ErrorPictures
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.report import EvaluationReport
from dinocell.evaluation.tuning import TuningResult, tune_thresholds, tuned_values
from dinocell.files import require_writable
from dinocell.io import natural_key, read_label_file
from dinocell.io.planes import PlaneChoice
from dinocell.labels import require_cells
from dinocell.network.model import load_model, save_model, with_config
from dinocell.pairs import Pair, find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.progress import progress
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import separate_cells


@dataclass(frozen=True)
class ModelEvaluation:
    """Scores of a model and the thresholds behind them.

    Without `tuning` these are those of the model file.  `saved_to` is the file with the tuned ones.
    """

    report: EvaluationReport
    thresholds: Thresholds
    tuning: TuningResult | None
    saved_to: Path | None
    of_kinds: Mapping[str, str]  # kind of image that the model knows → its own thresholds

    def text(self) -> str:
        """One or two lines before the table."""
        tuned = tuned_values(self.thresholds)
        values = ", ".join(f"{name} {value:g}" for name, value in tuned.items())
        lines = [f"thresholds (of the model): {values}"]
        lines += [f"thresholds (for {kind}): {its}" for kind, its in self.of_kinds.items()]
        if self.tuning is not None:
            lines = [
                f"thresholds (tuned here on {self.tuning.metric}): {values}",
                "the thresholds were chosen on these same images: report the scores of other images",
            ]
        if self.saved_to is not None:
            lines.append(f"model with these thresholds: {self.saved_to}")
        return "\n".join(lines)


def check_data_folder(folder: Path) -> None:
    """Raise a DataSetError unless `folder` holds the folders `images` and `labels`."""
    for part in ("images", "labels"):
        if not (folder / part).is_dir():
            raise DataSetError(
                f"`data` must be a folder that holds the folders images and labels, got {folder} "
                f"without {part}: name the folder above them"
            )


_Prediction = tuple[Pair, str, NDArray[np.uint32], NDArray[np.float32], Thresholds]
"""Files, name, truth and distance map of an image."""


@dataclass(frozen=True)
class Reading:
    """How images are read and predicted: see `DINOCellPipeline`, and its `run` for `plane`."""

    device: str = "auto"
    precision: str = "auto"
    tta: bool = False
    plane: PlaneChoice = field(default_factory=PlaneChoice)


def evaluate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    reading: Reading = Reading(),
    tune_metric: str | None = None,
    save_to: str | os.PathLike[str] | None = None,
    errors_to: ErrorPictures | None = None,
    shown: bool = True,
    **how: Any,
) -> ModelEvaluation:
    """Run a model on `data/images` and score it against `data/labels`.

    Parameters
    ----------
    model : model file or bundled name
    data : folder with `images` and `labels`, paired by `dinocell.pairs.find_pairs`
    reading : device, precision, test-time augmentation, and which plane of an image
    tune_metric : first search the thresholds for the best value of this metric on these images
    save_to : with `tune_metric`: write the model with the found thresholds here
    errors_to : gets a picture of each image with its errors
    shown : show progress on standard error
    how : keyword arguments of `evaluate_pairs`

    Raises DataSetError (the folders are missing or do not fit together); UsageError (the metric is
    unknown, or `save_to` is the model itself or no `.safetensors`).
    """
    folder = Path(data)
    check_data_folder(folder)
    saved_to = None if save_to is None or tune_metric is None else Path(save_to)
    if saved_to is not None:
        _check_target(saved_to, Path(model))
        require_writable("save_to", saved_to)
    network = load_model(os.fspath(model), device=reading.device)
    running: dict[str, Any] = {"precision": reading.precision, "tta": reading.tta}
    pipeline = DINOCellPipeline(network, **running)
    notes: dict[str, tuple[str, ...]] = {}
    predictions = _predict(pipeline, folder, reading, notes, shown=shown)
    tuning = None
    if tune_metric is not None:
        predictions = list(predictions)  # to search thresholds, all maps are needed at a time
        samples = [(distance_map, truth) for _, _, truth, distance_map, _ in predictions]
        min_area_px = pipeline.thresholds.min_area_px
        with raised_as(UsageError, ValueError):
            tuning = tune_thresholds(samples, metric=tune_metric, min_area_px=min_area_px)
        pipeline = DINOCellPipeline(
            with_config(pipeline.model, **tuned_values(tuning.thresholds)), **running
        )
        if saved_to is not None:
            save_model(saved_to, pipeline.model, half=True)
    chosen = None if tuning is None else tuning.thresholds
    report = evaluate_pairs(_separated(predictions, chosen, pipeline, reading, errors_to), **how)
    report = replace(report, notes=notes)  # of the images that were read above
    known = pipeline.model.statistics
    of_kinds = {} if known is None else known.thresholds()
    return ModelEvaluation(report, pipeline.thresholds, tuning, saved_to, of_kinds)


def _separated(
    predictions: Iterable[_Prediction],
    chosen: Thresholds | None,
    pipeline: DINOCellPipeline,
    reading: Reading,
    errors_to: ErrorPictures | None,
) -> Iterator[tuple[str, NDArray[np.uint32], NDArray[np.uint32]]]:
    """Name, truth and cells found of each image, after its errors were drawn."""
    for pair, name, truth, distance_map, thresholds in predictions:
        cells = separate_cells(distance_map, chosen or thresholds)
        if errors_to is not None:
            shown = pipeline.load(pair.image_path, **reading.plane)
            errors_to.add(name, shown.plane, truth, cells)
        yield name, truth, cells


def _check_target(path: Path, model: Path) -> None:
    if path.suffix != ".safetensors":
        raise UsageError(f"`save_to` must end in .safetensors, got {path}: add the suffix")
    if path.resolve() == model.resolve():
        raise UsageError(
            f"`save_to` must be another file than the model, got {path} for both: choose another "
            "name"
        )


def _predict(
    pipeline: DINOCellPipeline,
    folder: Path,
    reading: Reading,
    notes: dict[str, tuple[str, ...]],
    *,
    shown: bool,
) -> Iterable[_Prediction]:
    """Every image in natural order of their names (2 before 10).

    Adds what was noted on an image and its labels to `notes`, by its name.
    """
    pairs = find_pairs(folder / "images", folder / "labels")
    pairs.sort(key=lambda pair: natural_key(pair.image_path))
    with progress("predicting", len(pairs), shown=shown) as bar:
        for pair in pairs:
            loaded = pipeline.load(pair.image_path, **reading.plane)
            plane, name = loaded.plane, loaded.name
            file = read_label_file(pair.labels_path, shape=plane.shape)
            truth = file.pixels
            require_cells(truth, pair.labels_path)
            if truth.shape != plane.shape:
                raise DataSetError(
                    f"An image and its labels must have the same size, got {plane.shape} and "
                    f"{truth.shape} for {name}: check that the names belong together"
                )
            distance_map = pipeline.predict(loaded)
            if reading.tta:
                distance_map = distance_map[0].copy()  # and not how far the flips differ
            of_labels = [f"labels: {note}" for note in file.notes]
            # no score needs a pixel size
            noted = [note for note in loaded.warnings if "`pixel_size_um`" not in note]
            judged = pipeline.judge(loaded)
            if found := (*noted, *judged.notes, *of_labels):
                notes[name] = found
            yield pair, name, truth, distance_map, judged.thresholds
            bar.advance(note=name)
