"""Time and memory of the writers of results, and time of some of them beside an older checkout.

    python benchmarks/exports.py --writers

writes 200,000 cells in every format, each in a process of its own, and keeps processor seconds and peak
memory in benchmarks/results/writers.json.

    python benchmarks/exports.py --before OLD_CHECKOUT

runs the neighbour search in ragged regions, GeoJSON and COCO on both checkouts, each in a process of its
own, and writes benchmarks/results/exports.json: processor seconds, ratios, and whether results are
identical.
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


def write_here(kind: str, prepared: Path) -> dict[str, object]:
    """Write the prepared cells in one format in this process: seconds, peak memory, bytes.

    The peak of the process counts labels, table and image, which are there before; `added_mb` is what the
    writer adds to them.
    """
    from dinocell.results.formats import EXPORT_FORMATS, Cells
    from dinocell.results.measure import measure_labels
    from dinocell.results.table import CellTable

    def memory_mb(line: str) -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split(f"{line}:")[1].split()[0]) / 1024

    write = EXPORT_FORMATS[kind].write if kind != "csv" else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{EXPORT_FORMATS[kind].suffix if write else '_cells.csv'}"
        tiny = ragged(8, 3)
        warm = Cells(tiny, measure_labels(tiny), image=tiny.astype(np.uint16))
        if write:  # compile and import
            write(path, warm)
        labels, image = np.load(prepared / "labels.npy"), np.load(prepared / "image.npy")
        with np.load(prepared / "table.npz") as columns:
            table = CellTable(dict(columns), 0.325)
        cells = Cells(labels, table, 0.325, "a", "a.tif", image)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = memory_mb("VmRSS")
        begin, wall = time.process_time(), time.perf_counter()
        if write:
            write(path, cells)
        else:
            table.to_csv(path)
        taken, waited = time.process_time() - begin, time.perf_counter() - wall
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        return {
            "processor_s": round(taken, 2),
            "wall_s": round(waited, 2),
            "peak_mb": round(memory_mb("VmHWM")),
            "added_mb": round(memory_mb("VmHWM") - before),
            "written_mb": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        }


def measure_writers(size_px: int, out: Path) -> None:
    """Every format, each in a process of its own."""
    from dinocell.results.formats import EXPORT_FORMATS
    from dinocell.results.measure import measure_labels

    labels = synthetic_cells(size_px, 12, 0).astype(np.uint32)
    image = np.random.default_rng(0).integers(0, 2**16, labels.shape).astype(np.uint16)
    table = measure_labels(labels, image, pixel_size_um=0.325)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder)
        np.save(prepared / "labels.npy", labels)
        np.save(prepared / "image.npy", image)
        np.savez(prepared / "table.npz", **table.data)
        for kind in ("csv", *EXPORT_FORMATS):
            command = [sys.executable, __file__, "--write", kind, folder]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sentence = run.stderr.strip().splitlines()[-1].partition(": ")[2]
                rows[kind] = {"refused": sentence.partition(", '")[0]}
            else:
                rows[kind] = json.loads(run.stdout)
            print(f"{kind:10} {rows[kind]}", flush=True)
    result = {
        "command": "python benchmarks/exports.py --writers",
        "machine": {"processor": processor_name(), "python": platform.python_version()},
        "load": round(os.getloadavg()[0], 1),
        "image": f"{size_px} × {size_px} px, {len(table)} cells, {len(table.columns)} columns",
        "writers": rows,
    }
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run both checkouts, print the figures and write the JSON file."""
    parser = argparse.ArgumentParser(
        description="Measure the writers, or compare them with an older commit."
    )
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--here", action="store_true", help="print the results of this process only"
    )
    parser.add_argument("--writers", action="store_true", help="measure every format")
    parser.add_argument("--write", nargs=2, metavar=("FORMAT", "PREPARED"), help="one of them here")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "exports.json")
    args = parser.parse_args()
    if args.write:
        print(json.dumps(write_here(args.write[0], Path(args.write[1]))))
        return
    if args.writers:
        measure_writers(512 if args.small else 5400, args.out.with_name("writers.json"))
        return
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
