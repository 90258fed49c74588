"""A trained model adapted to a few labelled images: `dinocell adapt`.

What may learn is chosen by cross-validation.  The images are dealt into two folds; a candidate is
trained on one fold and predicts the other, each way round.  The thresholds for a fold's maps are
chosen on those of the other fold, so that no image's labels help to score it.  All candidates are
tried with a few steps, and the best of them again with many, so that most of the time is spent on
what will be delivered.  The trial that scores best is repeated on all images; where none beats the
model that it began with, that model is the result.
"""

import copy
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dinocell.errors import DataSetError, UsageError
from dinocell.evaluation.matching import overlap_table
from dinocell.evaluation.metrics import match_counts, pooled_ap
from dinocell.evaluation.tuning import tuned_values
from dinocell.files import require_writable
from dinocell.io import describe_image, write_labels
from dinocell.network.backbone import DINOv3Backbone
from dinocell.network.config import TUNED_THRESHOLDS
from dinocell.network.model import (
    DINOCell,
    load_trainable,
    resolve_device,
    round_weights,
    save_model,
    with_config,
)
from dinocell.network.precision import autocast
from dinocell.pairs import Pair, find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.progress import Progress, progress
from dinocell.segmentation.inference import predict_distance_map
from dinocell.segmentation.rescale import SAME_SCALE
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import separate_cells
from dinocell.settings import require_at_least
from dinocell.training.ablation import IOU_THRESHOLDS
from dinocell.training.config import (
    DataConfig,
    DatasetConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from dinocell.training.datasets import CropDataset, read_pair
from dinocell.training.final_model import training_statistics, typical_diameter
from dinocell.training.optimizer import learning_rate_factor, parameter_groups, step_seed
from dinocell.training.pace import LEAST_STEPS, Pace, first_steps
from dinocell.training.trainer import distance_loss
from dinocell.training.validation import Sample

CANDIDATES = ("decoder", "last", "all")
"""What may learn: the decoder; also the last third of the backbone; everything."""

# tried beside the model's own thresholds: few, because few cells choose among them
_TRIED = (0.45, 0.55, 0.65, 0.8), (0.1, 0.25, 0.4), (0.1, 0.2, 0.3)  # as `TUNED_THRESHOLDS`
_ap = attrgetter("ap")
_MEASURED = 3  # steps of each candidate that show its speed; the first one is not counted
_SHARE_OF_TIME = (
    0.95  # of the minutes; the rest is for steps that are slower than the measured ones
)
_BATCH_SIZE = 8
_MOST_PIXELS = 2_000_000  # of all images together, that are predicted to score a candidate


@dataclass(frozen=True)
class AdaptOptions:
    """How a model is adapted.

    `minutes` is how long all of it may take: what the predictions leave over, and the speed of the steps,
    give the number of steps, unless `steps` gives it.  All candidates are tried with 10 of them (from 160 on
    with 40), the best one with all; what is delivered has as many as the trial that scored best.
    `channels` are those of `segment`.
    """

    minutes: float = 5.0
    steps: int | None = None
    channels: tuple[str, ...] = ()
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        require_at_least("`minutes`", self.minutes, 0.1)
        require_at_least("`steps`", self.steps, 1)


@dataclass(frozen=True)
class Trial:
    """What learned (of `CANDIDATES`, or `start`: the model as it was, or `thresholds`: new ones only), with
    how many steps, and its pooled scores on images that it was not trained on: the mean AP at IoU 0.5, 0.75
    and 0.9, and the AP at 0.5.
    """

    name: str
    steps: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class AdaptResult:
    """All trials in their order, the one that was chosen, and the new thresholds.

    `hurried` says that the time allows the fewest steps only.  `notes` are on the images.
    """

    model_path: Path
    trials: tuple[Trial, ...]
    chosen: Trial
    thresholds: dict[str, float]
    hurried: bool = False
    notes: tuple[str, ...] = ()

    @property
    def most_steps(self) -> int:
        """Of all trials; as `AdaptOptions.steps` it repeats them."""
        return max(trial.steps for trial in self.trials)

    def text(self) -> str:
        """A table of the candidates and what was written."""
        from dinocell.results.table import align_columns

        rows = [["what learned", "steps", "AP (mean of IoU 0.5, 0.75, 0.9)", "AP at IoU 0.5"]]
        rows += [
            [trial.name, str(trial.steps), f"{trial.ap:.4f}", f"{trial.ap50:.4f}"]
            for trial in self.trials
        ]
        name, steps = self.chosen.name, self.chosen.steps
        values = ", ".join(f"{key} {value:g}" for key, value in self.thresholds.items())
        lines = ["scores of images that were held out:", *align_columns(rows)]
        if name == "start":
            lines.append("no training was better than the model as it was: the model is that one")
        else:
            trained = f", {steps} steps on all images" if name in CANDIDATES else " alone"
            lines.append(f"chosen: {name}{trained}; {values}")
        if self.hurried:
            lines.append(
                f"note: the time allows {self.most_steps} steps of each training, the fewest, "
                "which may have taught it little: allow more minutes, or use a smaller model"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"model: {self.model_path}"])


def adapt(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    start: str | Path = "dinocell-cells",
    options: AdaptOptions = AdaptOptions(),
    shown: bool = True,
) -> AdaptResult:
    """Adapt the model `start` to labelled images and write it to `out`.

    Parameters
    ----------
    images, labels : folders, paired by `dinocell.pairs.find_pairs`
        A single image is cut in two, so that one half can be held out.
    out : model file that does not exist yet
    start : bundled name or model file

    Raises UsageError (`out` exists or is no `.safetensors`; `start` is no model); DataSetError,
    ImageFileError (the images or labels cannot be used, or fewer than two cells could be held out).
    """
    path = Path(out)
    if path.suffix != ".safetensors" or path.exists():
        raise UsageError(
            f"`out` must be a new file that ends in .safetensors, got {path}: choose another name"
        )
    require_writable("out", path)
    model = load_trainable(start, device=options.device)
    round_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        found = find_pairs(images, labels, "images", options.channels)
        pairs = _several(found, model, folder)
        run = _Adaptation(model, pairs, options, shown=shown)
        result, adapted = run.result(path)
    result = replace(result, notes=_notes(len(found), run.num_empty))
    if model.config.pixel_size_um is not None:
        adapted = with_config(adapted, pixel_size_um=_common_pixel_size(found))
    adapted.card = {
        **{key: value for key, value in model.card.items() if key != "metrics"},
        "name": path.stem,
        "description": f"{model.card.get('name') or start}, adapted to {len(found)} images.",
        "licence": f"of the start: {model.card.get('licence') or 'unknown'}; of your images: not recorded",
        "data": {**model.card.get("data", {}), "your images": {"train_images": len(found)}},
        "start": str(start),
        "adapted": {
            "chosen": result.chosen.name,
            "steps": result.chosen.steps,
            "most_steps": result.most_steps,
            "seed": options.seed,
            "images": len(found),
        },
        "metrics": {
            f"held_out_ap50_{trial.name}_{trial.steps}_steps": trial.ap50 for trial in result.trials
        },
    }
    save_model(path, adapted, half=True)
    return result


def _notes(num_images: int, num_empty: int) -> tuple[str, ...]:
    if num_images == 1:
        return (
            "there is one image, which was cut in two: each half tested what was learned from the other, so "
            "the scores say little about other images",
        )
    if num_empty:
        return (
            f"{num_empty} of {num_images} label images show no cell, and count as images in which nothing is "
            "to be found: label their cells if they have some",
        )
    return ()


def _common_pixel_size(pairs: Sequence[Pair]) -> float | None:
    """Pixel size of the images in µm, which were learned as they are; None unless all state about the same."""
    sizes = [describe_image(pair.image_path).series[0].edge_um for pair in pairs]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes) or max(known) > SAME_SCALE * min(known):
        return None
    return float(np.median(known))


def _several(pairs: list[Pair], model: DINOCell, folder: str) -> list[Pair]:
    """`pairs`, or two pairs of files in `folder` with the halves of a single image."""
    if len(pairs) > 1:
        return pairs
    image, labels = read_pair(pairs[0], **model.config.intensity)
    axis = int(image.shape[1] > image.shape[0])
    halves = []
    for name, pixels, cells in zip(
        "ab", np.array_split(image, 2, axis), np.array_split(labels, 2, axis), strict=True
    ):
        pair = Pair("images", Path(folder, f"{name}.npy"), Path(folder, f"{name}.tif"))
        np.save(pair.image_path, pixels)
        write_labels(pair.labels_path, cells)
        halves.append(pair)
    return halves


class _Adaptation:
    def __init__(
        self, start: DINOCell, pairs: Sequence[Pair], options: AdaptOptions, *, shown: bool
    ) -> None:
        self.deadline = time.monotonic() + _SHARE_OF_TIME * 60 * options.minutes
        self.pace = Pace()
        self.start, self.options, self.shown = start, options, shown
        self.device = resolve_device(options.device)
        self.thresholds = _thresholds(start)
        self.pairs = list(pairs)
        read = [read_pair(pair, **start.config.intensity) for pair in self.pairs]
        self.num_empty = sum(not labels.any() for _, labels in read)
        self.samples = _middles(read, _MOST_PIXELS)
        self.crops = CropDataset(self.pairs, _training_config(start, 1, options.seed), length=0)
        self.truths = [truth for _, truth in self.samples]
        cells = [int(np.count_nonzero(np.unique(truth))) for truth in self.truths]
        order = np.argsort(cells, kind="stable")[::-1]  # both folds get images with many cells
        self.folds = order[::2].tolist(), order[1::2].tolist()
        if not all(sum(cells[index] for index in fold) for fold in self.folds):
            raise DataSetError(
                "Half of the images (of one image, half of it) tests what was learned from the others, so "
                f"both must show labelled cells, got {cells} cells in {len(cells)} parts: label all cells "
                "of one more image"
            )

    def result(self, path: Path) -> tuple[AdaptResult, DINOCell]:
        """Try every candidate, the best one with more steps, and train the best trial on all images."""
        started = time.monotonic()
        samples, own = self._by_start()
        found = self._counts(samples)
        predicting_s = time.monotonic() - started
        if self.options.steps is None:
            few = self._few_that_fit((2 + len(CANDIDATES)) * predicting_s)
        else:
            few = first_steps(self.options.steps)
        # of equal trials the first one counts
        trials = {
            Trial("start", 0, *_scores(found, own)): found,
            Trial("thresholds", 0, *self._cross_validated(found)): found,
        }
        total = 2 * len(CANDIDATES) * few
        with progress("adapting", total, shown=self.shown) as bar:
            bar.write(f"{len(self.pairs)} images, {len(CANDIDATES)} candidates, {few} steps each")
            first = [self._trial(name, few, bar, trials) for name in CANDIDATES]
            best = max(reversed(first), key=_ap)  # of equal ones that in which more learns
            # the predictions of another trial, and about as long for the statistics of the training images
            left_s = self.deadline - time.monotonic() - 2 * predicting_s
            steps = self.options.steps or self.pace.many_within(best.name, few, left_s)
            if steps > few:
                total += 2 * steps
                bar.expect(total + steps)
                self._trial(best.name, steps, bar, trials)
            chosen = max(trials, key=_ap)
            bar.expect(total + chosen.steps)
            hurried = self.options.steps is None and steps <= LEAST_STEPS
            everything = range(len(self.pairs))
            if chosen.name == "start":
                values = tuned_values(self.thresholds[0])
                return AdaptResult(path, tuple(trials), chosen, values, hurried), self.start
            adapted = self.start
            if chosen.name in CANDIDATES:
                adapted = self._train(chosen.name, everything, chosen.steps, bar)
            values = tuned_values(self.thresholds[_best(trials[chosen], everything)])
        adapted = with_config(adapted, **values)
        if chosen.name in CANDIDATES:
            adapted = with_config(adapted, diameter_px=typical_diameter(self.pairs))
            adapted.statistics = training_statistics(adapted, self.pairs, shown=self.shown)
        return AdaptResult(path, tuple(trials), chosen, values, hurried), adapted

    def _trial(
        self, name: str, steps: int, bar: Progress, trials: dict[Trial, NDArray[np.int64]]
    ) -> Trial:
        """Cross-validate a candidate and add it to the trials."""
        counts = self._counts(self._held_out(name, steps, bar))
        trial = Trial(name, steps, *self._cross_validated(counts))
        bar.write(f"{name}, {steps} steps: AP {trial.ap:.4f}, start {next(iter(trials)).ap:.4f}")
        trials[trial] = counts
        return trial

    def _few_that_fit(self, predicting_s: float) -> int:
        """With how many steps each candidate is tried."""
        with progress("measuring the speed", _MEASURED * len(CANDIDATES), shown=self.shown) as bar:
            for name in CANDIDATES:
                self._train(name, range(len(self.pairs)), _MEASURED, bar)
        return self.pace.few_within(self.deadline - time.monotonic() - predicting_s)

    def _held_out(self, name: str, steps: int, bar: Progress) -> list[Sample]:
        """Maps of all images by a model that was trained on the other fold."""
        samples: dict[int, Sample] = {}
        for fold, other in (self.folds, self.folds[::-1]):
            model = self._train(name, other, steps, bar)
            samples |= dict(zip(fold, self._predict(model, fold), strict=True))
        return [samples[index] for index in range(len(self.pairs))]

    def _by_start(self) -> tuple[list[Sample], NDArray[np.int64]]:
        """Maps of the model as it was, and which thresholds it has for each image."""
        pipeline = DINOCellPipeline(self.start)
        samples, own = [], []
        for image, truth in self.samples:
            loaded = pipeline.load(image, allow_mask=True)
            samples.append((pipeline.predict(loaded), truth))
            own.append(self.thresholds.index(pipeline.judge(loaded).thresholds))
        return samples, np.array(own)

    def _predict(self, model: DINOCell, chosen: Sequence[int]) -> list[Sample]:
        return [
            (predict_distance_map(model, self.samples[index][0]), self.truths[index])
            for index in chosen
        ]

    def _counts(self, samples: Sequence[Sample]) -> NDArray[np.int64]:
        """(thresholds, images, IoU, 3) found, false and missed cells."""
        return np.array(
            [[_counts_of(sample, given) for sample in samples] for given in self.thresholds]
        )

    def _cross_validated(self, counts: NDArray[np.int64]) -> tuple[float, float]:
        """Scores with the thresholds of each fold chosen on the other one."""
        chosen = np.zeros(len(self.pairs), int)
        for fold, other in (self.folds, self.folds[::-1]):
            chosen[fold] = _best(counts, other)
        return _scores(counts, chosen)

    def _train(self, name: str, chosen: Sequence[int], steps: int, bar: Progress) -> DINOCell:
        """A copy of the start, trained on some of the images, in eval mode."""
        self.pace.begin()
        model = copy.deepcopy(self.start)
        learning = _choose_learning(model, name)
        config = _training_config(self.start, steps, self.options.seed)
        crops = self.crops.only(chosen, length=steps * _BATCH_SIZE)
        groups = parameter_groups(model, config)
        optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr)
        parameters = [p for p in model.parameters() if p.requires_grad]
        for step in range(steps):
            torch.manual_seed(step_seed(config.seed, step))
            for module in learning:
                module.train()
            items = [crops[step * _BATCH_SIZE + item] for item in range(_BATCH_SIZE)]
            batch, target, weight = (
                torch.stack(list(part)).to(self.device) for part in zip(*items, strict=True)
            )
            factor = learning_rate_factor(step, config.optimizer, steps)
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr * group["lr_scale"] * factor
            with autocast("auto", self.device):
                predicted = model(batch)
            optimizer.zero_grad(set_to_none=True)
            distance_loss(predicted, target, weight, kind=config.loss.kind).backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_norm)
            optimizer.step()
            bar.advance(note=name)
            self.pace.stepped()
        self.pace.end(name)
        round_weights(model)
        return model.eval().requires_grad_(True)


def _middles(
    samples: Sequence[tuple[NDArray, NDArray[np.uint32]]], most_pixels: int
) -> list[tuple[NDArray, NDArray[np.uint32]]]:
    """Image and labels of each sample, or the middles of all where they have too many pixels together."""
    share = min(1.0, (most_pixels / sum(image.size for image, _ in samples)) ** 0.5)
    found = []
    for image, truth in samples:
        sides = [max(1, round(share * side)) for side in image.shape]
        starts = [(whole - side) // 2 for whole, side in zip(image.shape, sides, strict=True)]
        cut = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
        found.append((np.ascontiguousarray(image[cut]), truth[cut]))
    return found


def _thresholds(model: DINOCell) -> list[Thresholds]:
    """The model's own, those that it has for kinds of images, then those that are tried."""
    own = Thresholds.of(model.config)
    kinds = [] if model.statistics is None else [kind.thresholds for kind in model.statistics.kinds]
    tried = [dict(zip(TUNED_THRESHOLDS, values, strict=True)) for values in product(*_TRIED)]
    return [own, *(replace(own, **changes) for changes in [*kinds, *tried])]


def _counts_of(sample: Sample, thresholds: Thresholds) -> list[tuple[int, int, int]]:
    distance_map, truth = sample
    table = overlap_table(truth, separate_cells(distance_map, thresholds))
    counts = [match_counts(table, iou) for iou in IOU_THRESHOLDS]
    return [(item.tp, item.fp, item.fn) for item in counts]


def _best(counts: NDArray[np.int64], images: Sequence[int]) -> int:
    """Index of the thresholds with the highest mean AP over the IoU thresholds on these images."""
    return int(pooled_ap(counts[:, list(images)]).mean(axis=-1).argmax())


def _scores(counts: NDArray[np.int64], chosen: NDArray[np.int64]) -> tuple[float, float]:
    """Mean AP over the IoU thresholds and AP at 0.5, each image with its own chosen thresholds."""
    aps = pooled_ap(counts[chosen, np.arange(len(chosen))])
    return float(aps.mean()), float(aps[0])


def _choose_learning(model: DINOCell, name: str) -> list[nn.Module]:
    """Let the parameters of a candidate learn, and no others; returns the modules they are in."""
    backbone = model.backbone
    if isinstance(backbone, DINOv3Backbone):
        blocks = list(backbone.vit.blocks)
        last = [*blocks[-(len(blocks) // 3) :], backbone.vit.norm]
    else:
        last = list(backbone.levels[-2:])
    modules: dict[str, list[nn.Module]] = {
        "decoder": [model.decoder],
        "last": [model.decoder, *last],
        "all": [model],
    }
    model.requires_grad_(False)
    for module in modules[name]:
        module.requires_grad_(True)
    return modules[name]


def _training_config(start: DINOCell, steps: int, seed: int) -> TrainConfig:
    """As for a whole training, but short.

    With a third of this rate some tens of steps change too little: after 40 on ten images of phase contrast
    dinocell-nuclei has AP@0.5 .28 in place of .53; with twice the rate .53 (benchmarks/results/adapt_rates.json).
    """
    data = DataConfig(datasets=[DatasetConfig("images", "", "")])
    optimizer: dict[str, Any] = {"lr": 3e-3, "warmup_steps": min(20, steps // 4)}
    return TrainConfig(
        seed=seed,
        model=replace(start.config, init=None),
        data=data,
        optimizer=OptimizerConfig(**optimizer),
        schedule=ScheduleConfig(steps=steps, batch_size=_BATCH_SIZE),
    )
