"""Does the score of a cell order the cells by their true IoU?

    python benchmarks/score.py --data DATA/dsb2018/val

segments the images with `dinocell-tiny` and writes benchmarks/results/score.json: score and best IoU
of every cell found, and Spearman's correlation over all cells, over the images on which the formula was
chosen (every second one, from the first) and over the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from measure import processor_name
from scipy.stats import spearmanr

from dinocell.evaluation.matching import overlap_table
from dinocell.io import read_labels
from dinocell.pairs import find_pairs
from dinocell.pipeline import DEFAULT_MODEL, DINOCellPipeline


def main() -> None:
    """Segment, compare and write the JSON file."""
    parser = argparse.ArgumentParser(description="Correlate scores of cells with their true IoU.")
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and labels/")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "score.json"
    )
    args = parser.parse_args()
    pipeline = DINOCellPipeline(args.model)
    images = []
    for pair in find_pairs(args.data / "images", args.data / "labels"):
        result = pipeline.run(pair.image_path)
        scores = np.zeros(0) if result.scores is None else result.scores
        table = overlap_table(read_labels(pair.labels_path), result.labels)
        best = np.zeros(result.num_cells + 1)
        np.maximum.at(best, table.pred_ids[table.pred_index].astype(int), table.iou)
        images.append(
            {
                "name": result.name,
                "score": scores.round(5).tolist(),
                "iou": best[1:].round(5).tolist(),
            }
        )
    sets = {"all images": images, "images of choice": images[::2], "other images": images[1::2]}
    found = {}
    for name, members in sets.items():
        score, iou = (np.concatenate([row[key] for row in members]) for key in ("score", "iou"))
        found[name] = {"cells": len(score), "spearman": float(spearmanr(score, iou)[0])}
        print(f"{name}: {len(score)} cells, Spearman {found[name]['spearman']:.3f}")
    found["model"], found["data"] = args.model, "/".join(args.data.parts[-2:])
    found["processor"], found["images"] = processor_name(), images
    args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
