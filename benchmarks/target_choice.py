"""Which target should a network learn, linear or square root?  The same small network learns both.

A convolutional U-Net (8 to 64 channels, about 120,000 parameters) is trained on dsb2018/train to
predict one target or the other: same initial weights, same crops in the same order, same steps, mean
squared error.  Thresholds are tuned on dsb2018/val for mean AP; scores are of dsb2018/test and
dsb2018/stardist_test.  It is a comparison of targets, not a good model: minutes on one CPU core.

    DINOCELL_DATA=../shared/data python benchmarks/target_choice.py --seeds 0 1

writes benchmarks/results/target_choice.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocell.evaluation import (
    ThresholdGrids,
    ctc_counts,
    match_counts,
    overlap_table,
    tune_thresholds,
)
from dinocell.evaluation.metrics import DSB2018_IOU_THRESHOLDS
from dinocell.evaluation.tuning import tuned_values
from dinocell.io import read_image, read_labels
from dinocell.segmentation.distance_map import TARGETS, labels_to_distance_map
from dinocell.segmentation.intensity import normalize_intensity
from dinocell.segmentation.watershed import distance_map_to_labels

__all__ = ["main"]

SPLITS = ("train", "val", "test", "stardist_test")
GRIDS = ThresholdGrids(
    peak_grid=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    fill_grid=(0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    prominence_grid=(0.0, 0.02, 0.04, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3),
)
Images = list[tuple[NDArray[np.float32], NDArray[np.uint32]]]


class SmallUNet(nn.Module):
    """(B, 1, H, W) → (B, 1, H, W) in [0, 1]; H and W multiples of 8."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            _two_convolutions(before, after)
            for before, after in zip((1, *widths), widths, strict=False)
        )
        self.up = nn.ModuleList(
            _two_convolutions(deep + skip, skip)
            for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = []
        features = image
        for level, stage in enumerate(self.down):
            if level:
                features = nn.functional.max_pool2d(features, 2)
            features = stage(features)
            skips.append(features)
        skips.pop()
        for stage in self.up:
            features = nn.functional.interpolate(features, scale_factor=2.0, mode="bilinear")
            features = stage(torch.cat([features, skips.pop()], dim=1))
        return torch.sigmoid(self.head(features))


def _two_convolutions(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def read_split(folder: Path) -> Images:
    """Normalised images and labels of one split, in file-name order."""
    return [
        (
            normalize_intensity(read_image(folder / "images" / path.name).pixels),
            read_labels(path),
        )
        for path in sorted((folder / "labels").glob("*.png"))
    ]


def crops(images: Images, target: str, args: argparse.Namespace, seed: int) -> Iterator[Any]:
    """Batches of flipped and turned crops; the random numbers do not depend on `target`."""
    rng = np.random.default_rng(seed)
    shares = np.sqrt([labels.size for _, labels in images])
    for _ in range(args.steps):
        batch, maps = [], []
        for index in rng.choice(len(images), args.batch_size, p=shares / shares.sum()):
            image, labels = images[index]
            where = [int(rng.integers(max(side - args.crop_px, 0) + 1)) for side in image.shape]
            window = tuple(slice(begin, begin + args.crop_px) for begin in where)
            turn, flip = int(rng.integers(4)), bool(rng.integers(2))
            pixels, cells = image[window], labels[window]
            gain, offset = rng.uniform(0.7, 1.3), rng.uniform(-0.1, 0.1)
            pixels = np.rot90(pixels, turn)
            cells = np.rot90(cells, turn)
            if flip:
                pixels, cells = pixels[:, ::-1], cells[:, ::-1]
            batch.append(np.ascontiguousarray(pixels * gain + offset, dtype=np.float32))
            maps.append(labels_to_distance_map(cells, target=target))
        yield torch.from_numpy(np.stack(batch)[:, None]), torch.from_numpy(np.stack(maps)[:, None])


def train(images: Images, target: str, seed: int, args: argparse.Namespace) -> SmallUNet:
    torch.manual_seed(seed)
    network = SmallUNet()
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    network.train()
    running = 0.0
    for step, (batch, maps) in enumerate(crops(images, target, args, seed), start=1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(network(batch), maps)
        loss.backward()
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % 200 == 0:
            print(f"  {target} seed {seed} step {step} loss {running / 200:.5f}", flush=True)
            running = 0.0
    return network.eval()


def predict(network: SmallUNet, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map of an image of any size: reflected to a multiple of 8, cut back."""
    height, width = image.shape
    padded = np.pad(image, ((0, -height % 8), (0, -width % 8)), mode="reflect")
    with torch.inference_mode():
        return network(torch.from_numpy(padded)[None, None])[0, 0, :height, :width].numpy()


def scores(samples: Images, thresholds: dict[str, float]) -> dict[str, float]:
    """Pooled scores of maps with given thresholds."""
    tables = [
        overlap_table(truth, distance_map_to_labels(distance_map, **thresholds))
        for distance_map, truth in samples
    ]
    ap = {
        f"ap{round(100 * iou)}": reduce(add, [match_counts(table, iou) for table in tables]).ap
        for iou in DSB2018_IOU_THRESHOLDS
    }
    ctc = reduce(add, [ctc_counts(table) for table in tables])
    return {**ap, "ap_mean": float(np.mean(list(ap.values()))), "seg": ctc.seg, "det": ctc.det}


def main() -> None:
    """Train, tune, score, print, write the JSON file."""
    parser = argparse.ArgumentParser(description="Linear against square-root target.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop-px", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "target_choice.json"
    )
    args = parser.parse_args()
    root = Path(__file__).parent.parent
    data = Path(os.environ.get("DINOCELL_DATA", root / ".." / "shared" / "data")) / "dsb2018"
    if not data.is_dir():
        parser.error(f"dsb2018 is not at {data}: set DINOCELL_DATA to the folder that holds it")
    splits = {name: read_split(data / name) for name in SPLITS}

    runs = []
    for seed in args.seeds:
        for target in TARGETS:
            begin = time.perf_counter()
            network = train(splits["train"], target, seed, args)
            maps = {
                name: [(predict(network, image), truth) for image, truth in splits[name]]
                for name in SPLITS[1:]
            }
            tuned = tune_thresholds(maps["val"], GRIDS, metric="ap")
            thresholds = tuned_values(tuned.thresholds)
            run = {
                "target": target,
                "seed": seed,
                "thresholds": thresholds,
                "scores": {name: scores(maps[name], thresholds) for name in maps},
                "seconds": time.perf_counter() - begin,
            }
            runs.append(run)
            print(target, seed, thresholds)
            for name, score in run["scores"].items():
                shown = {key: round(score[key], 3) for key in ("ap50", "ap75", "ap90", "ap_mean")}
                print(f"  {name:14s}", shown, "seg", round(score["seg"], 3), flush=True)
    result = {
        "command": " ".join(["python", "benchmarks/target_choice.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "torch")},
        },
        "options": {key: value for key, value in vars(args).items() if key not in ("out", "seeds")},
        "network_parameters": sum(weight.numel() for weight in SmallUNet().parameters()),
        "averaging": "pooled over the images of a split",
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
