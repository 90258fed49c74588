"""The end of a training run: final thresholds, statistics of its images, model file, curves."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dinocell import __version__
from dinocell.evaluation.tuning import ThresholdGrids, tune_thresholds, tuned_values
from dinocell.files import atomic_path
from dinocell.network.familiarity import (
    Appearance,
    KnownKinds,
    fit_statistics,
)
from dinocell.network.model import DINOCell, save_model, with_config
from dinocell.pairs import Pair
from dinocell.progress import progress
from dinocell.segmentation.inference import predict_distance_map, start_appearance
from dinocell.segmentation.intensity import find_range
from dinocell.training.datasets import read_pair, spread_evenly
from dinocell.training.run_folder import RunFolder
from dinocell.training.validation import Sample

_GRIDS = ThresholdGrids(
    peak_grid=np.arange(0.30, 0.86, 0.05).round(2).tolist(),
    fill_grid=np.arange(0.05, 0.61, 0.05).round(2).tolist(),
    prominence_grid=(0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4),
)
_MAX_IMAGES = 200  # of a data set, whose appearance and cells are described
_LEAST_CELLS = 100  # of validation images that choose thresholds for their kind


@dataclass(frozen=True)
class TrainResult:
    """Where the model is and how it did on the validation images."""

    model_path: Path
    step: int
    val_ap50: float
    thresholds: dict[str, float]
    stopped_early: bool


def write_final_model(
    folder: RunFolder,
    best: DINOCell,
    samples: Sequence[Sample],
    pairs: tuple[Sequence[Pair], Sequence[Pair]],
    *,
    best_step: int,
    step: int,
    stopped_early: bool,
    shown: bool = False,
) -> TrainResult:
    """Choose the final thresholds, describe the images, write the model in float16, draw the curves.

    `best` is rounded to float16 already: the thresholds suit the weights that are written.  `samples` are
    its distance map and the truth of every validation image; the training and validation `pairs` are
    counted in the model card and described together (`training_statistics`).
    """
    config = folder.config
    min_area_px = config.model.min_area_px
    tuned = tune_thresholds(samples, _GRIDS, metric="ap", min_area_px=min_area_px)
    chosen = tuned_values(tuned.thresholds)
    grids = ThresholdGrids(*([value] for value in chosen.values()))
    final = tune_thresholds(samples, grids, metric="ap50", min_area_px=min_area_px)
    train_pairs, val_pairs = pairs
    model = with_config(best, **chosen, diameter_px=typical_diameter(train_pairs))
    model.card = {
        "name": config.name,
        "description": config.description,
        "licence": config.licence,
        "dinocell_version": __version__,
        "torch_version": torch.__version__,
        "commit": _commit(),
        "data": {
            dataset.name: {
                "train_images": sum(pair.dataset == dataset.name for pair in train_pairs),
                "val_images": sum(pair.dataset == dataset.name for pair in val_pairs),
            }
            for dataset in config.data.datasets
        },
        "start": config.model.init or config.backbone.weights or "random weights",
        "best_step": best_step,
        "seed": config.seed,
        "metrics": {"val_ap50_pooled": final.best.score, "val_ap_mean_pooled": tuned.best.score},
    }
    known = training_statistics(model, [*train_pairs, *val_pairs], shown=shown)
    names = [pair.dataset for pair in val_pairs]
    model.statistics = known and thresholds_by_kind(known, names, samples, min_area_px)
    save_model(folder.model, model, half=True)
    draw_curves(folder.metrics, folder.curves)
    return TrainResult(folder.model, step, final.best.score, chosen, stopped_early)


def _commit() -> str | None:
    """The commit of the code that runs, where it runs from a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def draw_curves(log_path: str | Path, out_path: str | Path) -> None:
    """Loss (logarithmic) and validation AP over steps → PNG, from JSON lines that have `step`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = Path(log_path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], row["val_ap50_pooled"]) for row in rows if "val_ap50_pooled" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    if losses:
        axes[0].plot(*zip(*losses, strict=True), color="#1b6ca8", linewidth=0.8)
        axes[0].set_yscale("log")
    axes[0].set(xlabel="step", ylabel="training loss")
    if scores:
        axes[1].plot(*zip(*scores, strict=True), color="#c0392b", marker="o", markersize=3)
        axes[1].set_ylim(0, 1)
    axes[1].set(xlabel="step", ylabel="validation AP@0.5 (pooled)")
    for axis in axes:
        axis.grid(alpha=0.3)
    with atomic_path(Path(out_path)) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def thresholds_by_kind(
    known: KnownKinds, names: Sequence[str], samples: Sequence[Sample], min_area_px: int
) -> KnownKinds:
    """The kinds with thresholds that suit their own validation images.

    `names` are the data sets of the `samples`.  One kind alone, and a kind whose images have few cells,
    keep the thresholds of the model.
    """
    kinds = []
    for kind in known.kinds:
        own = [sample for name, sample in zip(names, samples, strict=True) if name == kind.name]
        cells = sum(int(np.count_nonzero(np.unique(truth))) for _, truth in own)
        if len(set(names)) > 1 and cells >= _LEAST_CELLS:
            tuned = tune_thresholds(own, _GRIDS, metric="ap", min_area_px=min_area_px)
            kind = replace(kind, thresholds=tuned_values(tuned.thresholds))
        kinds.append(kind)
    return KnownKinds(tuple(kinds))


def training_statistics(
    model: DINOCell, pairs: Sequence[Pair], *, shown: bool = False
) -> KnownKinds | None:
    """Statistics of up to 200 images of each data set, spread evenly over its `pairs`.

    A data set with too few is not described; None where none has enough.

    The network sees the middle of each image, two windows high and wide, in the intensities of the
    whole.  Raises DataSetError, ImageFileError (an image or its labels cannot be used).
    """
    config = model.config
    side = 2 * config.window_px - config.overlap_px
    chosen = _spread_over_sets(pairs)
    seen: dict[str, list[Appearance]] = {pair.dataset: [] for pair in chosen}
    with progress("looking at training images", len(chosen), shown=shown) as bar:
        for pair in chosen:
            image, _ = read_pair(pair, **config.intensity)
            intensity = find_range(image, **config.intensity)
            top, left = (max(0, (size - side) // 2) for size in image.shape)
            middle = np.ascontiguousarray(image[top : top + side, left : left + side])
            appearance = start_appearance(intensity, image.dtype, config)
            predict_distance_map(model, middle, intensity=intensity, appearance=appearance)
            seen[pair.dataset].append(appearance)
            bar.advance()
        fitted = {name: fit_statistics(images) for name, images in seen.items()}
        kinds = tuple(replace(kind, name=name) for name, kind in fitted.items() if kind is not None)
        if not kinds:
            bar.write("too few images to describe: the model will not flag images of another kind")
    return KnownKinds(kinds) if kinds else None


def typical_diameter(pairs: Sequence[Pair]) -> float | None:
    """Typical diameter of the cells of training images in px; None without a cell.

    The median, over up to 200 images of each data set, of the median diameter of the cells of an image,
    each taken as a disc of the same area: every image counts once, however many cells it has.

    Raises DataSetError, ImageFileError (an image or its labels cannot be used).
    """
    diameters = []
    for pair in _spread_over_sets(pairs):
        areas = np.bincount(read_pair(pair)[1].ravel())[1:]
        if areas.any():
            diameters.append(np.sqrt(4 / np.pi * np.median(areas[areas > 0])))
    return round(float(np.median(diameters)), 1) if diameters else None


def _spread_over_sets(pairs: Sequence[Pair]) -> list[Pair]:
    """Up to `_MAX_IMAGES` of each data set, spread evenly."""
    return [
        pair
        for name in dict.fromkeys(pair.dataset for pair in pairs)
        for pair in spread_evenly([pair for pair in pairs if pair.dataset == name], _MAX_IMAGES)
    ]
