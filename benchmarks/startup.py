"""How long the program needs before it works: start of Python, import, help, first labels.

    python benchmarks/startup.py [--repeat 15]

Each is a process of its own, in turns, after one that is not counted; the image is a bundled sample.  Written to
benchmarks/results/startup.json: the median and the shortest wall-clock time, the median processor time, and
how many times that of `python -c pass` they are.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import processor_name

from dinocell.demo import sample_paths

GOALS_S = {"import dinocell": 0.3, "dinocell --help": 0.3, "first labels": 5.0}


def timed(command: list[str]) -> tuple[float, float]:
    """Wall-clock and processor seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure the start of the program.")
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    sample = next(path for path, _ in sample_paths() if path.stem == "nuclei")
    program = [sys.executable, "-m", "dinocell"]
    with tempfile.TemporaryDirectory() as folder:
        segment = [*program, "segment", str(sample), "-o", folder, "--overwrite"]
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import dinocell": [sys.executable, "-c", "import dinocell"],
            "dinocell --help": [*program, "--help"],
            "first labels": segment,
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for turn in range(options.repeat + 1):
            for name, command in commands.items():
                found = timed(command)
                if turn:
                    spent[name].append(found)
    rows: dict[str, dict[str, Any]] = {}
    for name, times in spent.items():
        walls, processors = zip(*times, strict=True)
        rows[name] = {
            "wall_s": round(statistics.median(walls), 3),
            "shortest_wall_s": round(min(walls), 3),
            "processor_s": round(statistics.median(processors), 3),
        }
        base = rows["python -c pass"]
        rows[name]["times_python"] = round(rows[name]["processor_s"] / base["processor_s"], 1)
        if name in GOALS_S:
            rows[name]["goal_s"] = GOALS_S[name]
        print(name, json.dumps(rows[name]), flush=True)
    record = {"processor": processor_name(), "repeat": options.repeat, "commands": rows}
    path = Path(__file__).parent / "results" / "startup.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
