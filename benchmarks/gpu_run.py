"""Everything that waits for a GPU, in calls of at most ten minutes.

    python benchmarks/gpu_run.py                 # or: make gpu-run; again until it says that all is done
    python benchmarks/gpu_run.py --list          # what is done and what is next

The parts run one after the other.  What is done is noted in runs/gpu/done.json and not repeated.  When
the time is over, the part at work gets SIGTERM: a training saves its state and continues in the next call,
any other part starts again and must fit into one call (`--seconds`).  A part that fails is shown and left for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinocell.files import write_text_atomically

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "gpu"
_GRACE_S = 60.0  # for a checkpoint


def _trained(config: str, name: str, *changes: str) -> list[str]:
    folder = FOLDER / name
    workers = max(1, (os.cpu_count() or 2) - 2)
    command = [sys.executable, "-m", "dinocell", "train", f"configs/finetune/{config}.yaml"]
    return [*command, f"output_dir={folder}", f"data.num_workers={workers}", *changes]


def _measured(script: str, *options: str) -> list[str]:
    return [sys.executable, f"benchmarks/{script}.py", *options]


PARTS: dict[str, list[str]] = {
    "tests": [sys.executable, "-m", "pytest", "-m", "gpu", "-rs"],
    "ssl_step": _measured("ssl_step"),
    "cells": _trained("generalist_conv", "cells", "schedule.steps=60000"),
    "nuclei": _trained("nuclei_conv", "nuclei", "schedule.steps=20000"),
    "tiny": _trained("dsb2018_tiny", "tiny", "schedule.steps=60000", "schedule.eval_every=5000"),
    "throughput": _measured("throughput"),
    "quality": _measured(
        "quality",
        *(str(FOLDER / name / "model.safetensors") for name in ("cells", "nuclei", "tiny")),
    ),
}
if shutil.which("trtexec"):
    PARTS["tensorrt"] = _measured("tensorrt_engine")


def run_parts(parts: Mapping[str, Sequence[str]], folder: Path, *, seconds: float) -> list[str]:
    """Run what is not done yet, for at most `seconds`, and return the names of what is left."""
    ends = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    for name in left(parts, folder):
        if time.monotonic() >= ends:
            break
        print(f"{name}: {' '.join(parts[name])}", flush=True)
        code = _run(parts[name], ends)
        if code == 0:
            done = [*_done(folder), name]
            write_text_atomically(folder / "done.json", json.dumps(done) + "\n")
        print(
            f"{name}: {'done' if code == 0 else f'exit code {code}, to be continued'}", flush=True
        )
    return left(parts, folder)


def left(parts: Mapping[str, Sequence[str]], folder: Path) -> list[str]:
    """Names of the parts that are not done, in their order."""
    done = _done(folder)
    return [name for name in parts if name not in done]


def _done(folder: Path) -> list[str]:
    path = folder / "done.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _run(command: Sequence[str], ends: float) -> int:
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return _wait(process, ends)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _wait(process: subprocess.Popen, ends: float) -> int:
    return process.wait(max(0.0, ends - time.monotonic()))


def main() -> None:
    """Run the parts, or list them; exit code 75 while something is left."""
    parser = argparse.ArgumentParser(description="Run everything that waits for a GPU.")
    parser.add_argument("--seconds", type=float, default=530, help="time for this call")
    parser.add_argument("--list", action="store_true", help="only show what is left")
    options = parser.parse_args()
    if options.list:
        rest = left(PARTS, FOLDER)
    else:
        import torch

        if not torch.cuda.is_available():
            sys.exit("no CUDA device was found: run this on a machine with a GPU")
        rest = run_parts(PARTS, FOLDER, seconds=options.seconds)
    print(f"left: {', '.join(rest)}; run the same command again" if rest else "all is done")
    if rest and not options.list:
        sys.exit(75)


if __name__ == "__main__":
    main()
