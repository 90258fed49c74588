"""Time of labels → distance map → labels, beside scikit-image and scipy, in one run.

A synthetic 2048 x 2048 scene with about 2,300 ragged, partly touching cells.  Its distance map is
blurred (sigma 1 px) and gets correlated noise (sigma 2 px, standard deviation 3 %), as a network's map
is never flat.  All contestants take turns, so that a busy machine slows them alike; every single time
is kept, by the clock and by the processor (the time this process really ran; all of it is one thread).

    python benchmarks/postprocess.py --size 2048 --repeats 7

writes benchmarks/results/postprocess.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from measure import processor_name, synthetic_cells
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import watershed

from dinocell.segmentation.distance_map import DEFAULT_TARGET, labels_to_distance_map
from dinocell.segmentation.levels import quantize
from dinocell.segmentation.markers import find_markers
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import flood, separate_cells

__all__ = ["main"]


def network_like(distance_map: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Blur of 1 px and 3 % of noise that is correlated over 2 px."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=distance_map.shape), 2)
    blurred = ndimage.gaussian_filter(distance_map, 1)
    return np.clip(blurred + 0.03 * noise / noise.std(), 0, 1).astype(np.float32)


def scipy_distance_map(labels: NDArray[np.uint32]) -> NDArray[np.float32]:
    """The same square-root map by scipy, one box per cell with a margin of one pixel."""
    distance_map = np.zeros(labels.shape, np.float32)
    for label, box in enumerate(ndimage.find_objects(labels.astype(np.int32)), start=1):
        if box is None:
            continue
        wide = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        inside = labels[wide] == label
        depth = ndimage.distance_transform_edt(inside)
        distance_map[wide][inside] = np.sqrt(depth / depth.max())[inside]
    return distance_map


def take_turns(
    functions: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds by clock and by processor, each function once per round; a first round is not counted."""
    clock: dict[str, list[float]] = {name: [] for name in functions}
    processor: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            begin, begin_processor = time.perf_counter(), time.process_time()
            function()
            if round_number:
                clock[name].append(time.perf_counter() - begin)
                processor[name].append(time.process_time() - begin_processor)
    return clock, processor


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def minima(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: min(taken) for name, taken in seconds.items()}


def main() -> None:
    """Run the comparison, print it and write the JSON file."""
    parser = argparse.ArgumentParser(description="Time post-processing against scikit-image.")
    parser.add_argument("--size", type=int, default=2048, help="side of the image in pixels")
    parser.add_argument("--spacing", type=int, default=43, help="one cell per square of this side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=0.6)
    parser.add_argument("--fill", type=float, default=0.25)
    parser.add_argument("--prominence", type=float, default=0.15)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "postprocess.json"
    )
    args = parser.parse_args()

    labels = synthetic_cells(args.size, args.spacing, args.seed)
    crop = np.ascontiguousarray(labels[:192, :192])
    begin = time.perf_counter()
    labels_to_distance_map(crop)
    first_map_s = time.perf_counter() - begin
    thresholds = Thresholds(args.peak, args.fill, args.prominence)
    distance_map = network_like(labels_to_distance_map(labels), args.seed)
    begin = time.perf_counter()
    separate_cells(distance_map[:192, :192], thresholds)
    first_labels_s = time.perf_counter() - begin

    found = separate_cells(distance_map, thresholds)
    markers = find_markers(distance_map, thresholds)
    mask = distance_map > args.fill
    levels = -quantize(distance_map).astype(np.int32)
    by_skimage = watershed(levels, markers, mask=mask)
    by_skimage_float = watershed(-distance_map, markers, mask=mask)

    functions: dict[str, Callable[[], Any]] = {
        "map to labels: dinocell, whole": lambda: separate_cells(distance_map, thresholds),
        "map to labels: dinocell find_markers alone": lambda: find_markers(
            distance_map, thresholds
        ),
        "map to labels: dinocell flood alone": lambda: flood(distance_map, markers, mask),
        "map to labels: scikit-image watershed alone, quantised map": lambda: watershed(
            levels, markers, mask=mask
        ),
        "map to labels: scikit-image watershed alone, float map": lambda: watershed(
            -distance_map, markers, mask=mask
        ),
        "labels to map: dinocell": lambda: labels_to_distance_map(labels),
        "labels to map: scipy, one box per cell": lambda: scipy_distance_map(labels),
    }
    packages = ["numpy", "numba", "scipy", "scikit-image"]
    try:
        import edt
    except ImportError:
        pass
    else:
        packages.append("edt")
        functions["labels to map: edt, distance alone"] = lambda: edt.edt(labels, parallel=1)
    clock, processor = take_turns(functions, args.repeats)
    crop_clock, crop_processor = take_turns({"crop": lambda: labels_to_distance_map(crop)}, 500)
    median = medians(processor)
    difference = np.abs(scipy_distance_map(labels) - labels_to_distance_map(labels)).max()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/postprocess.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "threads_used": 1,
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "scene": {
            "shape": labels.shape,
            "num_cells": int(np.unique(labels).size - 1),
            "foreground_percent": 100 * float(mask.mean()),
            "target": DEFAULT_TARGET,
            "thresholds": asdict(thresholds),
            "cells_found": int(found.max()),
        },
        "first_call_s": {"labels to map": first_map_s, "map to labels": first_labels_s},
        "median_processor_s": median,
        "median_clock_s": medians(clock),
        "min_processor_s": minima(processor),
        "min_clock_s": minima(clock),
        "labels_to_map_of_a_192_px_crop": {
            "median_processor_s": statistics.median(crop_processor["crop"]),
            "median_clock_s": statistics.median(crop_clock["crop"]),
        },
        "ratio_scikit_image_watershed_to_dinocell_whole": (
            median["map to labels: scikit-image watershed alone, quantised map"]
            / median["map to labels: dinocell, whole"]
        ),
        "pixels_unlike_scikit_image": {
            "quantised map": int(np.count_nonzero(by_skimage != found)),
            "float map": int(np.count_nonzero(by_skimage_float != found)),
            "of_foreground_pixels": int(np.count_nonzero(mask)),
        },
        "largest_difference_to_scipy_distance": float(difference),
        "all_processor_s": processor,
        "all_clock_s": clock,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['scene']['num_cells']} cells in {labels.shape}, {found.max()} found")
    print("processor: median, min   clock: median, min")
    columns = ("median_processor_s", "min_processor_s", "median_clock_s", "min_clock_s")
    for name in functions:
        print(" ".join(f"{result[column][name]:7.4f} s" for column in columns), "", name)
    crop_s = result["labels_to_map_of_a_192_px_crop"]
    print(
        f"{1e3 * crop_s['median_processor_s']:6.3f} ms {1e3 * crop_s['median_clock_s']:6.3f} ms  "
        "labels to map of a 192 px crop"
    )
    print(f"pixels unlike scikit-image: {result['pixels_unlike_scikit_image']}")


if __name__ == "__main__":
    main()
