"""Time of the neighbour search in ragged regions and of GeoJSON and COCO, beside an older checkout.

    python benchmarks/exports.py --before OLD_CHECKOUT

runs the same cases on both checkouts, each in a process of its own, and writes
benchmarks/results/exports.json: processor seconds, ratios, and whether results are identical.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import processor_name, synthetic_cells
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent


def ragged(size_px: int, num_cells: int) -> NDArray[np.uint32]:
    """Pixels of `num_cells` cells scattered over half of the image."""
    rng = np.random.default_rng(0)
    labels = rng.integers(1, num_cells + 1, (size_px, size_px))
    return (labels * (rng.random(labels.shape) < 0.5)).astype(np.uint32)


def comb(size_px: int) -> NDArray[np.uint32]:
    """Two combs whose teeth of one pixel stand in each other's gaps."""
    labels = np.ones((size_px, size_px), np.uint32)
    labels[1:, ::2] = 2
    return labels


def measure_here(small: bool) -> dict[str, dict[str, object]]:
    """Processor seconds and a checksum of each case with the `dinocell` that this process imports."""
    from dinocell.results.exports import write_coco_rle, write_geojson
    from dinocell.results.measure import measure_labels

    tiny = ragged(8, 3)
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_geojson(path, tiny, measure_labels(tiny))  # compile
        write_coco_rle(path, tiny)

        def timed(name: str, work: object) -> None:
            begin = time.process_time()
            made = work()  # type: ignore[operator]
            taken = time.process_time() - begin
            content = path.read_bytes()
            if made is not None:
                content = (
                    made["num_neighbors"].tobytes() + made["nearest_border_distance"].tobytes()
                )
            results[name] = {"s": taken, "sha256": hashlib.sha256(content).hexdigest()}

        for size in (256, 512) if small else (512, 1024):
            timed(
                f"measure, two ragged cells, {size}²", lambda n=size: measure_labels(ragged(n, 2))
            )
            timed(f"measure, comb, {size}²", lambda n=size: measure_labels(comb(n)))
        labels = synthetic_cells(512 if small else 4096, 12, 0)
        image = np.random.default_rng(0).integers(0, 2**16, labels.shape).astype(np.uint16)
        table = measure_labels(labels, image, pixel_size_um=0.325)
        count = f"{len(table):,} cells"
        timed(f"GeoJSON, {count}", lambda: write_geojson(path, labels))
        timed(f"GeoJSON with measurements, {count}", lambda: write_geojson(path, labels, table))
        timed(f"COCO, {count}", lambda: write_coco_rle(path, labels))
    return results


def main() -> None:
    """Run both checkouts, print the figures and write the JSON file."""
    parser = argparse.ArgumentParser(
        description="Compare measuring and exports with an older commit."
    )
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--here", action="store_true", help="print the results of this process only"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "exports.json")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure_here(args.small)))
        return
    if args.before is None:
        parser.error("--before must name a checkout")
    found = {}
    for name, root in (("before", args.before.resolve()), ("now", HERE.parent)):
        command = [sys.executable, __file__, "--here", *(["--small"] * args.small)]
        paths = os.pathsep.join([str(root), str(root / "dinov3_modified"), str(HERE)])
        run = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": paths},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found[name] = json.loads(run.stdout)
    cases = {
        case: {
            "before_s": found["before"][case]["s"],
            "now_s": now["s"],
            "times_faster": found["before"][case]["s"] / now["s"],
            "identical": found["before"][case]["sha256"] == now["sha256"],
        }
        for case, now in found["now"].items()
    }
    commits = {
        name: subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        for name, root in (("before", args.before), ("now", HERE))
    }
    result = {
        "command": "python benchmarks/exports.py --before OLD_CHECKOUT",
        "machine": {"processor": processor_name(), "python": platform.python_version()},
        "commits": commits,
        "processor_seconds": cases,
    }
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for case, row in cases.items():
        same = "identical" if row["identical"] else "DIFFERENT"
        print(
            f"{row['before_s']:8.2f} s → {row['now_s']:6.2f} s  {row['times_faster']:6.1f}×  {same}  {case}"
        )


if __name__ == "__main__":
    main()
