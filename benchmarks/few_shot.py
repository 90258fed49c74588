"""What a few labelled images of a new kind give, with and without training.

    python benchmarks/few_shot.py START --data DATA/mnfinder [--images 1 5 10 50] [--minutes 5]

For each number of images (spread evenly over DATA/train) and each way the model is scored on
DATA/val and DATA/test (`--parts`):

start       as it was, with 0 images
adapt       `dinocell adapt`, which chooses what learns by cross-validation
decoder, all
            the same training of the decoder alone, and of everything, without that choice
prototypes  no training: a place is as deep as the mean features that it resembles (Snell et al. 2017,
            Prototypical networks), for background, rims and insides of cells
readout     no training: ridge regression of the distance map on the features
reptile     `all` from a start that learns fast on the data sets of `--meta` (Nichol et al. 2018, Reptile)
random      `all` from random weights, with as many steps as all trainings of `adapt` together

Writes benchmarks/results/few_shot_SET_START.json, where a row takes the place of one with the same
number of images and way and the others stay; steps are those of the row of `adapt`, or 100;
with `--steps` decoder, all and random get so many, and their rows stand beside the others.  AP is
pooled, with the bounds of 95 % of 2,000 draws of as many images.
"""

from __future__ import annotations

import argparse
import copy
import json
import operator
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import processor_name
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.tuning import tune_thresholds, tuned_values
from dinocell.io import read_labels
from dinocell.network.model import DINOCell, compress_intensities, load_model, with_config
from dinocell.pairs import Pair, find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.inference import predict_distance_map
from dinocell.segmentation.intensity import to_model_input
from dinocell.training import adapt as adaptation
from dinocell.training.datasets import read_pair, spread_evenly

WAYS = ("start", "adapt", "decoder", "all", "prototypes", "readout", "reptile", "random")
LAYERS = (0.01, 0.5)  # depths that part background, rims and insides
SHARPNESS = 20.0  # of the softmax over cosines
RIDGE = 1e-3
MOST_PIXELS = 6_000_000  # of all images together, that prototypes and read-out are made from
META_IMAGES, META_INNER, META_RATE = 4, 5, 0.3


def scores(model: DINOCell, data: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Pooled AP of parts of the data, with intervals."""
    pipeline = DINOCellPipeline(model)
    found: dict[str, Any] = {}
    for part in parts:
        pairs = find_pairs(data / part / "images", data / part / "labels")
        report = evaluate_pairs(
            (
                pair.image_path.stem,
                read_labels(pair.labels_path),
                pipeline.run(pair.image_path).labels,
            )
            for pair in pairs
        )
        for name in ("ap50", "ap75"):
            found[f"{part}_{name}"] = round(report.pooled[f"{name}_pooled"], 4)
        found[f"{part}_ap50_interval"] = [round(x, 4) for x in report.intervals["ap50_pooled"]]
    return found


def folder_of(pairs: Sequence[Pair], folder: Path) -> Path:
    """A folder with the images and labels of these pairs."""
    for pair in pairs:
        for kind, path in (("images", pair.image_path), ("labels", pair.labels_path)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / kind / path.name)
    return folder


# --- without training ---


def joined(features: Sequence[Tensor]) -> Tensor:
    """Feature maps of all strides, each of length 1, on the finest grid: (B, D, h, w)."""
    size = features[0].shape[-2:]
    maps = [
        functional.interpolate(functional.normalize(level.float(), dim=1), size, mode="bilinear")
        for level in features
    ]
    return torch.cat(maps, dim=1)


class Prototypes(nn.Module):
    """Decoder that answers with the depths of the nearest mean features."""

    def __init__(self, prototypes: Tensor, depths: Tensor) -> None:
        super().__init__()
        self.register_buffer("prototypes", functional.normalize(prototypes, dim=1))  # [K, D]
        self.register_buffer("depths", depths)  # [K]

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Features and their image (B, 3, H, W) → (B, 1, H, W) logits."""
        cosine = torch.einsum(
            "bdhw,kd->bkhw", functional.normalize(joined(features), dim=1), self.prototypes
        )
        share = (SHARPNESS * cosine).softmax(dim=1)
        return upsampled(torch.einsum("bkhw,k->bhw", share, self.depths)[:, None], image)


class Readout(nn.Module):
    """Decoder that is one linear function of the features."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.slope = nn.Parameter(weights[:-1])  # [D]
        self.bias = nn.Parameter(weights[-1])

    def forward(self, features: Sequence[Tensor], image: Tensor) -> Tensor:
        """Features and their image (B, 3, H, W) → (B, 1, H, W) logits."""
        depth = torch.einsum("bdhw,d->bhw", joined(features), self.slope) + self.bias
        return upsampled(depth[:, None], image)


def upsampled(depth: Tensor, image: Tensor) -> Tensor:
    """Depths on a coarse grid → logits of the image's size."""
    depth = functional.interpolate(depth, image.shape[-2:], mode="bilinear")
    return depth.clamp(0.001, 0.999).logit()


def samples_of(model: DINOCell, pairs: Sequence[Pair]) -> list[tuple[NDArray, NDArray[np.uint32]]]:
    """Images and labels, of many pixels the middles."""
    read = [read_pair(pair, **model.config.intensity) for pair in pairs]
    return adaptation._middles(read, MOST_PIXELS)


def places(
    model: DINOCell, samples: Sequence[tuple[NDArray, NDArray]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (N, D) and depths (N,) of the finest grid, window by window."""
    patch = model.config.patch_size
    for image, labels in samples:
        tensor = torch.from_numpy(to_model_input(image.astype(np.float32)))  # [3, H, W]
        depth = torch.from_numpy(labels_to_distance_map(labels, target=model.config.target))
        sides = [min(side - side % patch, model.config.window_px) for side in image.shape]
        starts = [
            np.linspace(0, whole - side, -(-whole // side)).astype(int).tolist()
            for whole, side in zip(image.shape, sides, strict=True)
        ]
        for corner in product(*starts):
            cut = tuple(slice(at, at + side) for at, side in zip(corner, sides, strict=True))
            window = tensor[(slice(None), *cut)][None]
            if model.config.intensities == "compressed":
                window = compress_intensities(window)
            with torch.inference_mode():
                features = joined(model.backbone(window))[0]
            small = functional.avg_pool2d(depth[cut][None], sides[0] // features.shape[-2])
            yield features.flatten(1).T, small.flatten()


def without_training(way: str, start: DINOCell, pairs: Sequence[Pair]) -> DINOCell:
    """The start with another decoder, and thresholds chosen on the same images."""
    model, given = copy.deepcopy(start), samples_of(start, pairs)
    if way == "prototypes":
        sums: Tensor | float = 0.0
        for features, depth in places(start, given):
            layer = functional.one_hot(torch.bucketize(depth, torch.tensor(LAYERS)), 3).float()
            table = torch.cat([features, depth[:, None], torch.ones_like(depth)[:, None]], dim=1)
            sums = sums + layer.T @ table
        assert isinstance(sums, Tensor)
        model.decoder = Prototypes(sums[:, :-2], sums[:, -2] / sums[:, -1])
    else:
        gram: Tensor | float = 0.0
        right: Tensor | float = 0.0
        for features, depth in places(start, given):
            table = torch.cat([features, torch.ones_like(depth)[:, None]], dim=1).double()
            gram, right = (
                gram + table.T @ table / len(table),
                right + table.T @ depth.double() / len(table),
            )
        assert isinstance(gram, Tensor)
        assert isinstance(right, Tensor)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        model.decoder = Readout(torch.linalg.solve(gram + ridge, right).float())
    maps = [(predict_distance_map(model, image), labels) for image, labels in given]
    best = tune_thresholds(maps).thresholds
    return with_config(model, **tuned_values(best))


# --- with training ---


def adapted(
    options: argparse.Namespace, pairs: Sequence[Pair], folder: Path
) -> tuple[DINOCell, dict[str, Any]]:
    """What `dinocell adapt` makes, its choice and its steps."""
    folder_of(pairs, folder)
    out = folder / "adapted.safetensors"
    result = adaptation.adapt(
        folder / "images",
        folder / "labels",
        out,
        start=options.start,
        options=adaptation.AdaptOptions(minutes=options.minutes),
        shown=False,
    )
    trials = [
        [trial.name, trial.steps, round(trial.ap, 4), round(trial.ap50, 4)]
        for trial in result.trials
    ]
    chosen = result.chosen
    return load_model(out), {
        "chosen": chosen.name,
        "steps": chosen.steps,
        "all_steps": 2 * sum(trial.steps for trial in result.trials) + chosen.steps,
        "trials": trials,
    }


def trained(way: str, start: DINOCell, pairs: Sequence[Pair], steps: int) -> DINOCell:
    """Train without cross-validation; thresholds chosen on the same images."""
    options = adaptation.AdaptOptions(steps=steps)
    run = adaptation._Adaptation(start, pairs, options, shown=False)
    with adaptation.progress("training", steps, shown=False) as bar:
        everything = range(len(run.pairs))
        model = run._train("decoder" if way == "decoder" else "all", everything, steps, bar)
    found = run._counts(run._predict(model, everything))
    tuned = run.thresholds[adaptation._best(found, everything)]
    return with_config(model, **tuned_values(tuned))


def reptile(start: DINOCell, sets: Sequence[Path], steps: int) -> DINOCell:
    """A start from which a few steps on any of the data sets go far."""
    chance = np.random.default_rng(0)
    pairs = [
        find_pairs(folder / "train" / "images", folder / "train" / "labels", "images")
        for folder in sets
    ]
    model = copy.deepcopy(start)
    for _ in range(steps):
        among = pairs[chance.integers(len(pairs))]
        chosen = [among[index] for index in chance.choice(len(among), META_IMAGES, replace=False)]
        options = adaptation.AdaptOptions(steps=META_INNER, seed=int(chance.integers(2**31)))
        try:
            run = adaptation._Adaptation(model, chosen, options, shown=False)
        except adaptation.DataSetError:  # images without cells
            continue
        with adaptation.progress("training", META_INNER, shown=False) as bar:
            learned = run._train("all", range(len(run.pairs)), META_INNER, bar).state_dict()
        moved = {
            name: value + META_RATE * (learned[name] - value)
            if value.is_floating_point()
            else value
            for name, value in model.state_dict().items()
        }
        model.load_state_dict(moved)
    return model


# --- the table ---


class Table:
    """The rows of a result file, written at each new one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.data, self.parts = options.data, options.parts
        name = f"few_shot_{self.data.name}_{Path(options.start).stem}.json"
        self.path = Path(__file__).parent / "results" / name
        self.head = {"data": self.data.name, "start": Path(options.start).stem}
        self.rows: list[dict[str, Any]] = []
        if self.path.exists():
            self.rows = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
        self.behind = {
            "minutes": options.minutes,
            "commit": commit,
            "processor": processor_name(),
        }

    def steps(self, images: int, kind: str) -> int:
        """`steps` of the model that `adapt` made of as many images, or `all_steps` of its trainings."""
        found = (row[kind] for row in self.rows if (row["images"], row["way"]) == (images, "adapt"))
        return next(found, 100)

    def add(self, row: dict[str, Any], model: DINOCell) -> None:
        """Score a model; its row replaces that of the same images and way."""
        row |= scores(model, self.data, self.parts) | self.behind
        print(json.dumps(row), flush=True)
        place = operator.itemgetter("images", "way")
        self.rows = [
            *(
                other
                for other in self.rows
                if place(other) != place(row) or other.get("given_steps") != row.get("given_steps")
            ),
            row,
        ]
        self.rows.sort(key=lambda item: (item["images"], WAYS.index(item["way"])))
        text = json.dumps(self.head | {"rows": self.rows}, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Make, score and write the models of all ways."""
    parser = argparse.ArgumentParser(description="Score ways to learn from a few images.")
    parser.add_argument("start", help="model that has not seen the data set")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--meta", type=Path, nargs="+", default=[], help="data sets of `reptile`")
    parser.add_argument("--meta-steps", type=int, default=150, help="outer steps of `reptile`")
    parser.add_argument("--parts", nargs="+", choices=("val", "test"), default=("val", "test"))
    parser.add_argument(
        "--steps", type=int, help="of each training; these rows stand beside those with fewer"
    )
    parser.add_argument("--minutes", type=float, default=adaptation.AdaptOptions().minutes)
    options = parser.parse_args()
    table, start = Table(options), load_model(options.start)
    folder = options.data / "train"
    pairs = find_pairs(folder / "images", folder / "labels", "images")
    if "start" in options.ways:
        table.add({"images": 0, "way": "start"}, start)
    torch.manual_seed(0)
    starts = {"random": DINOCell(start.config)}
    if options.meta and "reptile" in options.ways:
        starts["reptile"] = reptile(start, options.meta, options.meta_steps)
    ways = [way for way in options.ways if way != "start" and (way != "reptile" or way in starts)]
    for count in sorted({min(count, len(pairs)) for count in options.images}):
        few = list(spread_evenly(pairs, count))
        with tempfile.TemporaryDirectory() as temporary:
            halves = adaptation._several(few, start, temporary)
            for way in sorted(ways, key=WAYS.index):  # `adapt` first: it gives the number of steps
                began = time.process_time()
                row: dict[str, Any] = {"images": count, "way": way}
                if way == "adapt":
                    model, more = adapted(options, few, Path(temporary))
                    row |= more
                elif way in ("prototypes", "readout"):
                    model = without_training(way, start, few)
                else:
                    row["steps"] = table.steps(count, "all_steps" if way == "random" else "steps")
                    if options.steps:
                        row["steps"] = row["given_steps"] = options.steps
                    if way == "reptile":
                        names = [folder.name for folder in options.meta]
                        row |= {"meta": names, "meta_steps": options.meta_steps}
                    model = trained(way, starts.get(way, start), halves, row["steps"])
                table.add(row | {"processor_s": round(time.process_time() - began, 1)}, model)


if __name__ == "__main__":
    main()
