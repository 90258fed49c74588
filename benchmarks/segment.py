"""Processor and wall seconds per megapixel of `segment`, stage by stage, beside an older checkout.

    python benchmarks/segment.py --data ../shared/data/dsb2018/test --before OLD_CHECKOUT

Images of a folder (every n-th, up to `--megapixels`) are segmented with `dinocell-tiny` at one thread,
two, and all.  Every thread count of either checkout runs in a process of its own, checkouts taking turns
`--repeats` times.  Written to benchmarks/results/segment.json: each time of each stage, ratios of the
medians of all processor seconds (before / now), and the share of pixels whose label is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STAGES = ("read", "network", "watershed", "measure", "write", "overlay")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def child(images: list[Path], threads: int, labels_path: Path) -> None:
    """Segment in this process with the `dinocell` on the path; print seconds by stage as JSON."""
    import torch

    torch.set_num_threads(threads)
    from dinocell.pipeline import DINOCellPipeline

    pipeline = DINOCellPipeline("dinocell-tiny", device="cpu")
    seconds = {stage: [0.0, 0.0] for stage in STAGES}
    found, pixels = [], 0
    with tempfile.TemporaryDirectory() as folder:
        for turn, path in enumerate([images[0], *images]):  # the first compiles and is not counted
            marks = [(time.process_time(), time.perf_counter())]

            def mark(into: list[tuple[float, float]] = marks) -> None:
                into.append((time.process_time(), time.perf_counter()))

            loaded = pipeline.load(path)
            mark()
            old = not hasattr(pipeline, "judge")
            distance_map = pipeline.predict(loaded[0] if old else loaded)
            mark()
            named = {"name": path.stem} if old else {}
            result = pipeline.finish(loaded[0] if old else loaded, distance_map, **named)
            mark()
            table = result.measure()
            mark()
            result.save(folder, table=table, overlay=False)
            mark()
            result.save(folder, table=table, overlay=True)
            mark()
            if turn:
                pixels += loaded[0].size
                found.append(result.labels.ravel())
                for number, stage in enumerate(STAGES):
                    for clock in (0, 1):
                        seconds[stage][clock] += marks[number + 1][clock] - marks[number][clock]
    # the last stage wrote labels and table again
    for clock in (0, 1):
        seconds["overlay"][clock] = max(seconds["overlay"][clock] - seconds["write"][clock], 0.0)
    np.save(labels_path, np.concatenate(found))
    print(json.dumps({"megapixels": pixels / 1e6, "seconds": seconds}))


def run(checkout: Path, images: list[Path], threads: int, labels: Path) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": f"{checkout}{os.pathsep}{checkout / 'dinov3_modified'}",
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
    }
    command = [sys.executable, __file__, "--child", str(threads), str(labels), *map(str, images)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def choose_images(folder: Path, megapixels: float) -> list[Path]:
    """Files spread evenly over the folder, of about `megapixels` in all."""
    from dinocell.io import read_image

    files = sorted(path for path in folder.iterdir() if path.is_file())
    size = np.mean(
        [read_image(path).pixels.shape[:2] for path in files[:: len(files) // 5 or 1]], 0
    )
    count = int(min(len(files), max(1, megapixels * 1e6 // (size[0] * size[1]))))
    return [files[number * len(files) // count] for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the folder images")
    parser.add_argument("--before", type=Path, help="an older checkout to compare with")
    parser.add_argument("--megapixels", type=float, default=2.0)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, 2, os.cpu_count() or 1})
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "segment.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child([Path(p) for p in args.child[2:]], int(args.child[0]), Path(args.child[1]))
        return
    data = args.data or Path(os.environ.get("DINOCELL_DATA", "../shared/data")) / "dsb2018/test"
    images = choose_images(data / "images", args.megapixels)
    from measure import processor_name

    checkouts = {"now": HERE.parent} | ({"before": args.before.resolve()} if args.before else {})
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    record: dict[str, Any] = {
        "processor": processor_name(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "python": platform.python_version(),
        "images": len(images),
        "runs": [],
        "per_megapixel": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads:
            for _ in range(args.repeats):
                for name, checkout in checkouts.items():
                    answer = run(checkout, images, threads, Path(folder, f"{name}.npy"))
                    record["runs"].append({"checkout": name, "threads": threads} | answer)
        if args.before:
            now, before = (np.load(Path(folder, f"{name}.npy")) for name in ("now", "before"))
            record["same_labels"] = float((now == before).mean())
    for threads in args.threads:
        row: dict[str, Any] = {}
        for name in checkouts:
            runs = [r for r in record["runs"] if (r["checkout"], r["threads"]) == (name, threads)]
            for clock, kind in ((0, "processor"), (1, "wall")):
                row[f"{name}_{kind}_s"] = {
                    stage: round(
                        statistics.median(
                            r["seconds"][stage][clock] / r["megapixels"] for r in runs
                        ),
                        3,
                    )
                    for stage in STAGES
                }
                row[f"{name}_{kind}_s"]["all"] = round(sum(row[f"{name}_{kind}_s"].values()), 3)
        if args.before:
            row["ratio"] = round(
                row["before_processor_s"]["all"] / row["now_processor_s"]["all"], 3
            )
        record["per_megapixel"][threads] = row
        print(threads, "threads:", json.dumps(row))
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
