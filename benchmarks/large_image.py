"""Memory and time of `segment` on large images, measured in a control group of Linux.

    python benchmarks/large_image.py                        # 2,000, 8,000 and 20,000 px, stand-in network
    python benchmarks/large_image.py --network dinocell-cells

Each image is a 16-bit TIFF with one cell per 56 x 56 px; each runs in a process of its own (one worker)
in a control group with `--limit-gb` of memory, page cache included, so that a run that needs more is
killed.  The stand-in network answers with the image itself, which looks like a distance map: reading,
windows, watershed, measurements, and files are the real ones, and only the arithmetic that takes no
memory of the image's size is left out.  Needs root, for the control group.

`scratch_peak_mb` is the most that deleted files of the process, which are its temporary ones, took on
the disk: the blocks of those that it has mapped or open, sampled 20 times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "large_image.jsonl"
SPACING_PX = 56
GROUP = "dinocell-benchmark"


def make_image(path: Path, side: int) -> None:
    """Cells of 17 to 23 px radius with noise, one in each square, written band by band."""
    import tifffile

    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:SPACING_PX, :SPACING_PX] - SPACING_PX / 2 + 0.5
    depth = np.clip(1 - np.hypot(rows, cols) / np.array([17, 19, 21, 23])[:, None, None], 0, 1)
    pictures = 300 + 20_000 * np.sqrt(depth)
    image = tifffile.memmap(path, shape=(side, side), dtype=np.uint16)
    for top in range(0, side, SPACING_PX):
        chosen = pictures[rng.integers(0, 4, -(-side // SPACING_PX))]
        band = chosen.transpose(1, 0, 2).reshape(SPACING_PX, -1)[: side - top, :side]
        image[top : top + SPACING_PX] = band + rng.integers(0, 200, band.shape)
    image.flush()


def child(image: Path, out: Path, network: str | None) -> None:
    """Segment in this process; print seconds and cells as JSON."""
    import torch

    from dinocell.batch.options import SegmentOptions
    from dinocell.batch.run import segment_files
    from dinocell.network.model import DINOCell, load_model

    torch.set_num_threads(1)

    class StandIn(DINOCell):
        def map_and_features(
            self, batch: torch.Tensor
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            gray = batch[:, :1] * 0.229 + 0.485
            return gray, (gray,)

    model = load_model(network or "dinocell-tiny")
    if network is None:
        model.__class__ = StandIn
    wall, cpu = time.monotonic(), time.process_time()
    result = segment_files([image], out, SegmentOptions(overwrite=True), model=model, shown=False)
    if result.failures:
        raise SystemExit(f"failed: {result.failures[0][1]}")
    print(
        json.dumps(
            {
                "wall_s": round(time.monotonic() - wall, 1),
                "processor_s": round(time.process_time() - cpu, 1),
                "cells": result.rows[0]["num_cells"],
                "max_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
        )
    )


class ControlGroup:
    """A memory limit for child processes, in version 1 or 2 of control groups."""

    def __init__(self, limit_bytes: int) -> None:
        first = Path("/sys/fs/cgroup/memory")
        self.folder = (first if first.is_dir() else first.parent) / GROUP
        self.peak_file = "memory.max_usage_in_bytes" if first.is_dir() else "memory.peak"
        limit_file = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
        if self.folder.exists():
            self.folder.rmdir()
        self.folder.mkdir()
        (self.folder / limit_file).write_text(str(limit_bytes))

    def enter(self) -> None:
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> float:
        peak = int((self.folder / self.peak_file).read_text()) / 1e6
        self.folder.rmdir()
        return round(peak)


def scratch_bytes(pid: int) -> int:
    """Bytes on the disk of the deleted files that a process has mapped or open; 0 if it has ended."""
    sizes: dict[str, int] = {}  # by inode
    try:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if line.endswith("(deleted)"):
                addresses, _, _, _, inode = line.split()[:5]
                begin, end = (int(address, 16) for address in addresses.split("-"))
                sizes[inode] = end - begin  # `scratch` reserves all blocks before it maps a file
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(handle).endswith("(deleted)"):
                state = handle.stat()
                sizes[str(state.st_ino)] = 512 * state.st_blocks
    except OSError:  # of the process, or of a file that was closed meanwhile
        pass
    return sum(sizes.values())


def watched(command: list[str], enter: Callable[[], None]) -> tuple[subprocess.Popen[str], int]:
    """Run a command to its end; also the peak of `scratch_bytes`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, preexec_fn=enter, text=True, **pipes)
    peak = 0
    while process.poll() is None:
        peak = max(peak, scratch_bytes(process.pid))
        time.sleep(0.05)
    return process, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[2000, 8000, 20_000])
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--network", metavar="MODEL", help="run this model, not the stand-in")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child, args.network)
        return
    rows = []
    for side in args.sides:
        with tempfile.TemporaryDirectory() as folder:
            image, out = Path(folder, "image.tif"), Path(folder, "out")
            make_image(image, side)
            group = ControlGroup(int(args.limit_gb * 1e9))
            command = [sys.executable, __file__, "--child"]
            command[2:2] = ["--network", args.network] if args.network else []
            try:
                done, scratch = watched([*command, str(image), str(out)], group.enter)
                printed, complaint = done.communicate()
            finally:
                peak = group.close()
            row = {"side_px": side, "network": args.network, "group_peak_mb": peak}
            row["scratch_peak_mb"] = round(scratch / 1e6)
            row["scratch_bytes_per_px"] = round(scratch / side**2, 1)
            if done.returncode:
                row["failed"] = f"exit {done.returncode}: {complaint[-300:]}"
            else:
                row |= json.loads(printed.splitlines()[-1])
                row["files_mb"] = round(sum(f.stat().st_size for f in out.rglob("*")) / 1e6)
        print(row, flush=True)
        rows.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        record = {"limit_gb": args.limit_gb, "machine": platform.machine(), "rows": rows}
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
