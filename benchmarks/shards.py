"""A hundred thousand images in shards: time and memory of dividing them, and of merging the results.

The files are made up (sparse, of sizes that vary fivefold), as are the results: ten cells an image.
What is measured is `plan_shards`, `shard_states` and `merge_shards`, as the commands call them.

    python benchmarks/shards.py --images 100000 --shards 64

writes benchmarks/results/shards.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from dinocell.batch.journal import FAILURES_NAME, JOURNAL_NAME, shard_folder
from dinocell.batch.merge import merge_shards
from dinocell.batch.options import SegmentOptions
from dinocell.batch.parts import plan_shards, shard_states
from dinocell.io import find_images

__all__ = ["main"]

_CELLS = "label,area,centroid_row,centroid_column\n" + "".join(
    f"{cell},{100 + cell},{cell}.5,{cell}.25\n" for cell in range(1, 11)
)


def make_images(folder: Path, count: int) -> None:
    """Sparse files of 1 to 5 MB in folders of a thousand."""
    sizes = np.random.default_rng(0).integers(1_000_000, 5_000_000, count)
    for index, size in enumerate(sizes):
        path = folder / f"{index // 1000:03d}" / f"image{index:06d}.tif"
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(int(size))


def make_results(out: Path, count: int) -> None:
    """What tasks would have left: journals and tables of cells."""
    for index in range(count):
        folder = shard_folder(out, index)
        lines = (folder / "manifest.csv").read_text(encoding="utf-8").splitlines()[1:]
        with (folder / JOURNAL_NAME).open("w", encoding="utf-8") as journal:
            for line in lines:
                path = Path(line.split(",", 2)[2])
                row = {"name": path.stem, "source": str(path), "num_cells": 10, "warnings": ""}
                journal.write(json.dumps(row) + "\n")
                (out / f"{path.stem}_cells.csv").write_text(_CELLS, encoding="utf-8")
        (folder / FAILURES_NAME).touch()


def peak_mb() -> float:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(work: Any) -> tuple[float, Any]:
    """Seconds by the clock, and the result."""
    begun = time.perf_counter()
    result = work()
    return time.perf_counter() - begun, result


def main() -> None:
    """Measure and write the raw file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/shards.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        images, out = Path(name) / "plate", Path(name) / "out"
        images.mkdir()
        make_images(images, arguments.images)
        before = peak_mb()
        find_s, paths = timed(lambda: find_images([str(images)], recursive=True))
        plan_s, plan = timed(lambda: plan_shards(paths, out, SegmentOptions(), arguments.shards))
        loads = []
        for index in range(plan.count):
            text = (shard_folder(out, index) / "manifest.csv").read_text(encoding="utf-8")
            loads.append(sum(int(line.split(",", 2)[1]) for line in text.splitlines()[1:]))
        make_results(out, plan.count)
        status_s, states = timed(lambda: shard_states(plan))
        merge_s, merged = timed(lambda: merge_shards(out, shown=False))
        assert merged.images == arguments.images
        assert all(state.complete for state in states)
        result = {
            "command": f"python benchmarks/shards.py --images {arguments.images} --shards {arguments.shards}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "system": platform.system(),
            },
            "images": arguments.images,
            "shards": plan.count,
            "find_s": find_s,
            "plan_s": plan_s,
            "status_s": status_s,
            "merge_s": merge_s,
            "cells": merged.cells,
            "largest_shard_over_mean": max(loads) / (sum(loads) / len(loads)),
            "memory_before_mb": before,
            "memory_peak_mb": peak_mb(),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
