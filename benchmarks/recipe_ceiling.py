"""How good can the recipe be?  True maps in, labels out, on dsb2018; then maps with a network's errors.

Three rules for markers, each followed by the same flood: `persistence` (ours), one marker per connected
piece of ``map > peak`` (`components`), and the pixel at the centroid of each such piece (`centroids`,
as SAMCell, but without its loss of pieces of fewer than three points).  All scores are pooled over
images; all thresholds are those with the best mean AP over IoU 0.50, 0.55, ..., 0.95 on the images named.

ceiling
    All 485 images.  The map of the true labels goes straight to labels, per target and rule:
    thresholds chosen on train and val, and for the two other rules SAMCell's peak of 0.47 as well.
noise
    The true map blurred and with correlated noise (sigma 2 px, standard deviation in percent of the
    range).  Thresholds chosen on val; scores on test and stardist_test.  For persistence also val over
    `min_prominence`: how wide is the optimum?

    python benchmarks/recipe_ceiling.py --data ../shared/data

writes benchmarks/results/recipe_ceiling.json, with every combination of thresholds that was tried; some
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from dinocell.evaluation import (
    ThresholdGrids,
    ctc_counts,
    match_counts,
    overlap_table,
    tune_thresholds,
)
from dinocell.evaluation.metrics import DSB2018_IOU_THRESHOLDS
from dinocell.evaluation.tuning import tuned_values
from dinocell.io import read_labels
from dinocell.segmentation.distance_map import TARGETS, labels_to_distance_map
from dinocell.segmentation.watershed import distance_map_to_labels, flood

__all__ = ["main"]

SPLITS = ("train", "val", "test", "stardist_test")
TRUE_MAP_GRIDS = {
    "peak_grid": (0.3, 0.47, 0.6, 0.69, 0.8, 0.9, 0.99),
    "fill_grid": (0.0, 0.005, 0.02, 0.05, 0.09),
    "prominence_grid": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8),
}
SAMCELL = {
    "linear": {"peak_threshold": 0.47, "fill_threshold": 0.0},
    "sqrt": {"peak_threshold": 0.47**0.5, "fill_threshold": 0.0},
}
"""Peak of SAMCell, fill of 0: so that only the rule for markers differs."""
ERRORS = {
    "blur 1 px, noise 2 %": (1.0, 0.02),
    "blur 1.5 px, noise 4 %": (1.5, 0.04),
}
GRIDS = {
    "peak_grid": (0.3, 0.4, 0.47, 0.55, 0.62, 0.69, 0.76, 0.83, 0.9),
    "fill_grid": (0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.22, 0.26, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55),
    "prominence_grid": (0.0, 0.02, 0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4),
}
LabelImage = NDArray[np.uint32]
DistanceMap = NDArray[np.float32]


def scores(pairs: Iterable[tuple[LabelImage, LabelImage]]) -> dict[str, float]:
    """Pooled scores of (truth, prediction) pairs."""
    tables = [overlap_table(truth, pred) for truth, pred in pairs]
    counts = {
        iou: reduce(add, [match_counts(table, iou) for table in tables])
        for iou in DSB2018_IOU_THRESHOLDS
    }
    ap = {f"ap{round(100 * iou)}": count.ap for iou, count in counts.items()}
    ctc = reduce(add, [ctc_counts(table) for table in tables])
    half = counts[0.5]
    return {
        **ap,
        "ap_mean": float(np.mean(list(ap.values()))),
        "seg": ctc.seg,
        "det": ctc.det,
        "num_truth": half.tp + half.fn,
        "false_positives_at_50": half.fp,
        "missed_at_50": half.fn,
    }


def component_labels(
    distance_map: DistanceMap, *, peak_threshold: float, fill_threshold: float, **_: float
) -> LabelImage:
    """One marker per 8-connected piece above the peak threshold."""
    pieces = ndimage.label(distance_map > peak_threshold, np.ones((3, 3)))[0]
    return flood(distance_map, pieces, distance_map > fill_threshold).astype(np.uint32)


def centroid_labels(
    distance_map: DistanceMap, *, peak_threshold: float, fill_threshold: float, **_: float
) -> LabelImage:
    """One marker per piece, at the pixel of its centroid, wherever that lies (SAMCell)."""
    pieces, number = ndimage.label(distance_map > peak_threshold, np.ones((3, 3)))
    markers = np.zeros(distance_map.shape, np.int32)
    centroids = ndimage.center_of_mass(pieces > 0, pieces, range(1, number + 1))
    for label, (row, column) in enumerate(centroids, start=1):
        markers[round(row), round(column)] = label
    return flood(distance_map, markers, distance_map > fill_threshold).astype(np.uint32)


RULES: dict[str, Callable[..., LabelImage]] = {
    "persistence": distance_map_to_labels,
    "components": component_labels,
    "centroids": centroid_labels,
}


def with_errors(
    distance_map: DistanceMap, blur_px: float, noise: float, rng: np.random.Generator
) -> DistanceMap:
    """Blur, then noise that is correlated over 2 px and has the given standard deviation."""
    texture = ndimage.gaussian_filter(rng.normal(size=distance_map.shape), 2)
    blurred = ndimage.gaussian_filter(distance_map, blur_px)
    return np.clip(blurred + noise * texture / texture.std(), 0, 1).astype(np.float32)


def tuned(
    samples: list[tuple[DistanceMap, LabelImage]], rule: str, grids: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Thresholds with the best pooled mean AP, and what was tried."""
    if rule != "persistence":
        grids = {**grids, "prominence_grid": (0.0,)}
    result = tune_thresholds(
        samples,
        ThresholdGrids(**grids),
        metric="ap",
        to_labels=lambda found, thresholds: RULES[rule](found, **tuned_values(thresholds)),
    )
    return tuned_values(result.thresholds), {"grids": grids, "tried": result.rows()}


def ceiling(truth: dict[str, list[LabelImage]]) -> dict[str, Any]:
    """Scores of true maps, per target, rule and split."""
    found: dict[str, Any] = {}
    for target in TARGETS:
        maps = {
            split: [(labels_to_distance_map(image, target=target), image) for image in images]
            for split, images in truth.items()
        }
        found[target] = {}
        for name, rule in RULES.items():
            best, tuning = tuned(maps["train"] + maps["val"], name, TRUE_MAP_GRIDS)
            choices = {name: (best, {"tuning_on_train_and_val": tuning})}
            if name != "persistence":
                choices[f"{name}, peak of SAMCell"] = (SAMCELL[target], {})
            for title, (thresholds, details) in choices.items():
                pairs = {
                    split: [(image, rule(depth, **thresholds)) for depth, image in samples]
                    for split, samples in maps.items()
                }
                everything = [pair for split in pairs.values() for pair in split]
                found[target][title] = {
                    "thresholds": thresholds,
                    "all": scores(everything),
                    "test and stardist_test": scores(pairs["test"] + pairs["stardist_test"]),
                    **{split: scores(of_split) for split, of_split in pairs.items()},
                    **details,
                }
                print(f"ceiling, {target}, {title}", thresholds)
                show("  all", found[target][title]["all"])
                show("  test and stardist_test", found[target][title]["test and stardist_test"])
    return found


def noise(truth: dict[str, list[LabelImage]], seed: int) -> list[dict[str, Any]]:
    """Thresholds tuned on val, scores on test and stardist_test, per error, target and rule."""
    runs = []
    for error, (blur_px, amplitude) in ERRORS.items():
        for target in TARGETS:
            rng = np.random.default_rng(seed)
            maps = {
                split: [
                    (
                        with_errors(
                            labels_to_distance_map(image, target=target), blur_px, amplitude, rng
                        ),
                        image,
                    )
                    for image in truth[split]
                ]
                for split in SPLITS[1:]
            }
            for name, rule in RULES.items():
                best, tuning = tuned(maps["val"], name, GRIDS)
                run: dict[str, Any] = {
                    "error": error,
                    "target": target,
                    "rule": name,
                    "thresholds": best,
                    "scores": {
                        split: scores((image, rule(depth, **best)) for depth, image in samples)
                        for split, samples in maps.items()
                    },
                    "tuning_on_val": tuning,
                }
                print(error, target, name, best)
                for split, score in run["scores"].items():
                    show(f"  {split}", score)
                if name == "persistence":
                    run["val_over_prominence"] = over_prominence(maps["val"], best)
                runs.append(run)
    return runs


def over_prominence(
    samples: list[tuple[DistanceMap, LabelImage]], best: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """AP at 0.5 and mean AP for every prominence of the grid, with the best peak and fill."""
    found = {}
    for prominence in GRIDS["prominence_grid"]:
        changed = {**best, "min_prominence": prominence}
        score = scores(
            (image, distance_map_to_labels(depth, **changed)) for depth, image in samples
        )
        found[str(prominence)] = {name: score[name] for name in ("ap50", "ap_mean")}
    return found


def show(title: str, score: dict[str, float]) -> None:
    names = ("ap50", "ap75", "ap85", "ap90", "ap95", "seg", "det")
    print(f"{title:38s}", *(f"{name} {score[name]:.4f}" for name in names), flush=True)


def main() -> None:
    """Run the experiments, print them and write the JSON file."""
    parser = argparse.ArgumentParser(description="Ceiling of the recipe on dsb2018.")
    root = Path(__file__).parent.parent
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("DINOCELL_DATA", root / ".." / "shared" / "data")),
        help="folder that holds dsb2018 (default: $DINOCELL_DATA or ../shared/data)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "recipe_ceiling.json"
    )
    args = parser.parse_args()
    data = args.data / "dsb2018"
    if not data.is_dir():
        parser.error(f"dsb2018 is not at {data}: give --data the folder that holds it")
    truth = {
        split: [read_labels(path) for path in sorted((data / split / "labels").glob("*.png"))]
        for split in SPLITS
    }
    result = {
        "command": " ".join(["python", "benchmarks/recipe_ceiling.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "scipy", "scikit-image")},
        },
        "images": {split: len(images) for split, images in truth.items()},
        "averaging": "pooled over images",
        "ceiling": ceiling(truth),
        "noise": noise(truth, args.seed),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
