"""Time of the per-cell table and of the polygon export, beside scikit-image, in one run.

A synthetic 2048 x 2048 label image with about 2,000 ragged, partly touching cells and a 16-bit
image of two channels.  Both sides compute the same properties (`SCIKIT_IMAGE_NAMES`); ours adds
neighbours, nearest border distance, circularity and kin.  scikit-image is timed with and without
`feret_diameter_max`, its slowest property.

    python benchmarks/measure.py --repeats 5

writes benchmarks/results/measure.json: every single time, not only medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import regionprops_table

from dinocell.results.exports import write_coco_rle, write_geojson
from dinocell.results.measure import SCIKIT_IMAGE_NAMES, measure_labels

__all__ = ["main", "synthetic_cells"]


def synthetic_cells(size_px: int, spacing_px: int, seed: int) -> NDArray[np.uint32]:
    """Return a (size_px, size_px) label image of ragged ellipses on a jittered grid.

    Parameters
    ----------
    size_px, spacing_px : int
        Side of the image and of one grid square; there is one cell per square.
    seed : int
        Of the generator.

    Returns
    -------
    (size_px, size_px) uint32 ndarray
        0 is background; about half of the image belongs to cells, many of which touch.
    """
    rng = np.random.default_rng(seed)
    labels = np.zeros((size_px, size_px), np.uint32)
    reach = spacing_px
    number = 0
    for row0 in range(spacing_px // 2, size_px, spacing_px):
        for col0 in range(spacing_px // 2, size_px, spacing_px):
            number += 1
            row, col = np.array([row0, col0]) + rng.normal(0, spacing_px / 8, 2)
            rows = np.arange(max(row0 - reach, 0), min(row0 + reach, size_px))
            cols = np.arange(max(col0 - reach, 0), min(col0 + reach, size_px))
            turn = rng.uniform(0, np.pi)
            stretch = rng.uniform(1, 1.6)
            d_row, d_col = np.meshgrid(rows - row, cols - col, indexing="ij")
            along = (d_row * np.cos(turn) + d_col * np.sin(turn)) / stretch
            across = d_col * np.cos(turn) - d_row * np.sin(turn)
            angle = np.arctan2(across, along)
            radius = spacing_px * rng.uniform(0.25, 0.45) * np.ones_like(angle)
            for order in range(2, 7):
                radius *= 1 + rng.normal(0, 0.05) * np.cos(order * angle + rng.uniform(0, 6.3))
            inside = np.hypot(along, across) < radius
            labels[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1][inside] = number
    return labels


def _seconds(work: Callable[[], Any], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return taken


def processor_name() -> str:
    """Name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the comparison, print it and write the JSON file."""
    parser = argparse.ArgumentParser(description="Time measurements against scikit-image.")
    parser.add_argument("--size", type=int, default=2048, help="side of the image in pixels")
    parser.add_argument("--spacing", type=int, default=45, help="one cell per square of this side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "measure.json"
    )
    args = parser.parse_args()

    labels = synthetic_cells(args.size, args.spacing, args.seed)
    rng = np.random.default_rng(args.seed)
    image = rng.integers(0, 2**16, (*labels.shape, 2), dtype=np.uint16)
    begin = time.perf_counter()
    measure_labels(labels[:64, :64], image[:64, :64])
    first_call_s = time.perf_counter() - begin

    shared = sorted({theirs.split("-")[0] for theirs in SCIKIT_IMAGE_NAMES.values()})
    fast = [name for name in shared if name != "feret_diameter_max"]
    table = measure_labels(labels, image)
    theirs = regionprops_table(labels, image, properties=shared)
    difference = {}
    for name, their_name in SCIKIT_IMAGE_NAMES.items():
        pairs = [(name, their_name)]
        if name.startswith("intensity"):
            pairs = [(f"{name}_{c}", f"{their_name}-{c}") for c in range(2)]
        for ours, other in pairs:
            difference[ours] = float(np.abs(table[ours] - theirs[other]).max())

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        seconds = {
            "dinocell, all columns, 2 channels": _seconds(
                lambda: measure_labels(labels, image), args.repeats
            ),
            "dinocell, all columns, no image": _seconds(
                lambda: measure_labels(labels), args.repeats
            ),
            "dinocell, neighbor_distance_px=50, no image": _seconds(
                lambda: measure_labels(labels, neighbor_distance_px=50), args.repeats
            ),
            "scikit-image, the shared properties, 2 channels": _seconds(
                lambda: regionprops_table(labels, image, properties=shared), 1
            ),
            "scikit-image, the same without feret_diameter_max": _seconds(
                lambda: regionprops_table(labels, image, properties=fast), min(args.repeats, 3)
            ),
            "CellTable.to_csv": _seconds(lambda: table.to_csv(out / "cells.csv"), args.repeats),
            "write_geojson with measurements": _seconds(
                lambda: write_geojson(out / "cells.geojson", labels, table), args.repeats
            ),
            "write_coco_rle": _seconds(
                lambda: write_coco_rle(out / "cells.json", labels), args.repeats
            ),
        }
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/measure.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "scikit-image")},
        },
        "labels": {
            "shape": labels.shape,
            "num_cells": len(table),
            "foreground_percent": 100 * np.count_nonzero(labels) / labels.size,
        },
        "first_call_s": first_call_s,
        "median_s": {name: statistics.median(taken) for name, taken in seconds.items()},
        "all_s": seconds,
        "largest_difference_to_scikit_image": difference,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{len(table)} cells in {labels.shape}, first call {first_call_s:.2f} s (compile or load)"
    )
    for name, median in result["median_s"].items():
        print(f"{median:9.3f} s  {name}")
    print(f"largest difference to scikit-image: {max(difference.values()):.2g}")


if __name__ == "__main__":
    main()
