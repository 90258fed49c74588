"""Does the score of a cell order the cells by their true IoU, with and without flips of the image?

    python benchmarks/score.py --data DATA/dsb2018/val

segments the images with `dinocell-tiny`, plainly and with `tta`, and writes benchmarks/results/score.json:
score and best IoU of every cell found, and Spearman's correlation over all cells, over the images on
which the plain formula was chosen (every second one, from the first) and over the others.  Intervals
hold 95 % of 2,000 draws of as many images with replacement; `gain` is that of `tta` over the plain
score, in the same draws.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import processor_name
from numpy.typing import NDArray
from scipy.stats import spearmanr

from dinocell.evaluation.matching import overlap_table
from dinocell.io import read_labels
from dinocell.pairs import find_pairs
from dinocell.pipeline import DEFAULT_MODEL, DINOCellPipeline, Segmentation


def compare(result: Segmentation, truth: NDArray) -> dict[str, list[float]]:
    """Score of each cell and its best IoU with a true one."""
    scores = np.zeros(0) if result.scores is None else result.scores
    table = overlap_table(truth, result.labels)
    best = np.zeros(result.num_cells + 1)
    np.maximum.at(best, table.pred_ids[table.pred_index].astype(int), table.iou)
    return {"score": scores.round(5).tolist(), "iou": best[1:].round(5).tolist()}


def correlation(images: Sequence[dict[str, Any]], variant: str) -> float:
    """Spearman's, over all cells of the images."""
    score, iou = (np.concatenate([row[variant][key] for row in images]) for key in ("score", "iou"))
    return float(spearmanr(score, iou)[0])


def summary(images: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Correlations of both variants, the gain, and their intervals."""
    rng = np.random.default_rng(0)
    draws = {"plain": [], "tta": []}
    for _ in range(2000):
        drawn = [images[k] for k in rng.integers(0, len(images), len(images))]
        for variant, values in draws.items():
            values.append(correlation(drawn, variant))
    found: dict[str, Any] = {}
    for variant, values in draws.items():
        found[variant] = {
            "cells": sum(len(row[variant]["iou"]) for row in images),
            "spearman": round(correlation(images, variant), 4),
            "interval": np.percentile(values, [2.5, 97.5]).round(4).tolist(),
        }
    gains = np.subtract(draws["tta"], draws["plain"])
    found["gain"] = {
        "spearman": round(found["tta"]["spearman"] - found["plain"]["spearman"], 4),
        "interval": np.percentile(gains, [2.5, 97.5]).round(4).tolist(),
    }
    return found


def main() -> None:
    """Segment, compare and write the JSON file."""
    parser = argparse.ArgumentParser(description="Correlate scores of cells with their true IoU.")
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "score.json"
    )
    args = parser.parse_args()
    variants = {"plain": {}, "tta": {"tta": True}}
    pipelines = {name: DINOCellPipeline(args.model, **how) for name, how in variants.items()}
    images = []
    for pair in find_pairs(args.data / "images", args.data / "labels"):
        truth = read_labels(pair.labels_path)
        row: dict[str, Any] = {"name": pair.image_path.stem}
        for name, pipeline in pipelines.items():
            row[name] = compare(pipeline.run(pair.image_path), truth)
        images.append(row)
    sets = {"all images": images, "images of choice": images[::2], "other images": images[1::2]}
    found: dict[str, Any] = {}
    for name, members in sets.items():
        found[name] = summary(members)
        print(f"{name}: {json.dumps(found[name])}")
    found["model"], found["data"] = args.model, "/".join(args.data.parts[-2:])
    found["processor"], found["images"] = processor_name(), images
    args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
