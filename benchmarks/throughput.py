"""Megapixels a second of the included models: the network on a device, the post-processing on the CPU.

    python benchmarks/throughput.py                  # the GPU if there is one, otherwise the CPU
    python benchmarks/throughput.py --device cpu --size-px 512 --models dinocell-cells

The image is the sample of nuclei, repeated to `--size-px`.  After a run that is not counted, wall-clock
seconds of `--repeats` runs; writes benchmarks/results/throughput_DEVICE.json with every single time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import processor_name

from dinocell.demo import sample_paths
from dinocell.files import write_text_atomically
from dinocell.io import read_image
from dinocell.network.model import resolve_device
from dinocell.pipeline import DINOCellPipeline

RESULTS = Path(__file__).parent / "results"
MODELS = ("dinocell-cells", "dinocell-nuclei", "dinocell-tiny")


def measured(model: str, device: str, image: np.ndarray, batch_size: int, repeats: int) -> Any:
    """Seconds of the network and of the rest, run by run, and megapixels a second from the shortest."""
    pipeline = DINOCellPipeline(model, device=device, batch_size=batch_size)
    seconds: dict[str, list[float]] = {"network": [], "post_processing": []}
    for run in range(repeats + 1):
        loaded = pipeline.load(image, pixel_size_um=None)
        started = time.perf_counter()
        prediction = pipeline.predict(loaded)  # a map in memory: the device has finished
        predicted = time.perf_counter()
        cells = pipeline.finish(loaded, prediction).num_cells
        if run:
            seconds["network"].append(predicted - started)
            seconds["post_processing"].append(time.perf_counter() - predicted)
    rate = {name: image.size / 1e6 / min(values) for name, values in seconds.items()}
    return {"model": model, "cells": cells, "seconds": seconds, "megapixels_per_s": rate}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Megapixels a second of the included models.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size-px", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = resolve_device(args.device)
    sample = next(path for path, _ in sample_paths() if path.stem == "nuclei")
    tile = read_image(sample).pixels
    times = -(-args.size_px // min(tile.shape[:2]))
    image = np.tile(tile, (times, times))[: args.size_px, : args.size_px]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    result = {
        "processor": name,
        "threads": torch.get_num_threads(),
        "size_px": args.size_px,
        "batch_size": args.batch_size,
        "models": [
            measured(model, str(device), image, args.batch_size, args.repeats)
            for model in args.models
        ],
    }
    path = RESULTS / f"throughput_{device.type}.json"
    write_text_atomically(path, json.dumps(result, indent=1) + "\n")
    for row in result["models"]:
        rates = ", ".join(f"{key} {value:.2f}" for key, value in row["megapixels_per_s"].items())
        print(f"{row['model']} on {name}: megapixels a second: {rates}", flush=True)


if __name__ == "__main__":
    main()
