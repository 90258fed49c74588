"""Exported graphs beside torch: maps, labels, AP and processor seconds, in one run.

    python benchmarks/runtimes.py [MODEL] [--threads 1 2] [--images 53]

The model is exported as ONNX in fp32, fp16 and int8 (calibrated on dsb2018/train, which it has seen) and runs on
images of dsb2018/val, runtimes taking turns image by image.  Written to benchmarks/results/runtimes_MODEL.json: the largest difference of a
map from torch's in fp32, the share of pixels with another label, pooled AP at IoU 0.5 and 0.75,
processor and wall seconds per megapixel of network and watershed, and the size of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import processor_name

from dinocell.evaluation.matching import overlap_table
from dinocell.evaluation.metrics import match_counts
from dinocell.export import export_model
from dinocell.io import read_labels
from dinocell.network.model import model_path
from dinocell.pairs import find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.training.datasets import spread_evenly

DATA = Path(os.environ.get("DINOCELL_DATA", "../shared/data")) / "dsb2018"
GRAPHS = {
    "onnx fp32": {},
    "onnx fp16": {"precision": "fp16"},
    "onnx int8": {"precision": "int8", "images": DATA / "train" / "images"},
}


def measured(pipelines: dict[str, DINOCellPipeline], images: int) -> dict[str, Any]:
    """Runtime → its figures, from images in turns."""
    pairs = spread_evenly(find_pairs(DATA / "val" / "images", DATA / "val" / "labels"), images)
    sums: dict[str, dict[str, Any]] = {
        name: {"map": 0.0, "other": 0, "cpu": 0.0, "wall": 0.0, "counts": []} for name in pipelines
    }
    pixels = 0
    for turn, pair in enumerate([pairs[0], *pairs]):  # the first compiles and is not counted
        truth, first = read_labels(pair.labels_path), None
        pixels += truth.size * bool(turn)
        for name, pipeline in pipelines.items():
            loaded = pipeline.load(pair.image_path, pixel_size_um=1.0)
            cpu, wall = time.process_time(), time.perf_counter()
            result = pipeline.finish(loaded, pipeline.predict(loaded))
            spent = time.process_time() - cpu, time.perf_counter() - wall
            first = first or result
            if turn:
                row = sums[name]
                row["cpu"], row["wall"] = row["cpu"] + spent[0], row["wall"] + spent[1]
                difference = float(np.abs(result.distance_map - first.distance_map).max())
                row["map"] = max(row["map"], difference)
                row["other"] += int((result.labels != first.labels).sum())
                table = overlap_table(truth, result.labels)
                row["counts"].append([match_counts(table, iou) for iou in (0.5, 0.75)])
    found = {}
    for name, row in sums.items():
        ap50, ap75 = (reduce(add, column).ap for column in zip(*row["counts"], strict=True))
        found[name] = {
            "largest_map_difference": row["map"],
            "share_of_other_labels": row["other"] / pixels,
            "ap50": round(ap50, 4),
            "ap75": round(ap75, 4),
            "processor_s_per_megapixel": round(row["cpu"] / pixels * 1e6, 3),
            "wall_s_per_megapixel": round(row["wall"] / pixels * 1e6, 3),
        }
    return found


def main() -> None:
    """Export, run and write the figures."""
    parser = argparse.ArgumentParser(description="Compare exported graphs with torch.")
    parser.add_argument("model", nargs="?", default="dinocell-cells")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--images", type=int, default=53)
    options = parser.parse_args()
    record: dict[str, Any] = {"model": options.model, "processor": processor_name(), "threads": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name.replace(' ', '_')}.onnx") for name in GRAPHS}
        for name, how in GRAPHS.items():
            print(export_model(options.model, files[name], **how), flush=True)
        record["file_mb"] = {
            name: round(path.stat().st_size / 1e6, 2) for name, path in files.items()
        }
        record["file_mb"]["torch"] = round(model_path(options.model).stat().st_size / 1e6, 2)
        for threads in options.threads:
            torch.set_num_threads(threads)
            pipelines = {
                "torch fp32": DINOCellPipeline(options.model, precision="fp32"),
                "torch auto": DINOCellPipeline(options.model),
                **{name: DINOCellPipeline(path) for name, path in files.items()},
            }
            record["threads"][threads] = measured(pipelines, options.images)
            for name, row in record["threads"][threads].items():
                print(threads, name, json.dumps(row), flush=True)
    path = Path(__file__).parent / "results" / f"runtimes_{Path(options.model).stem}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
