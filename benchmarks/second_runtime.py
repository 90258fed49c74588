"""OpenVINO beside onnxruntime on the same exported graphs: the network alone.

    pip install openvino && python benchmarks/second_runtime.py [MODEL] [--threads 1 2]

Both run batches of four windows of 256 px of images of dsb2018/val, in turns.  Written to
benchmarks/results/second_runtime.json: processor and wall seconds per megapixel, medians of the rounds, and the
largest difference of the maps.  Without OpenVINO nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from measure import processor_name
from runtimes import DATA, GRAPHS

from dinocell.export import calibration_windows, export_model
from dinocell.network.model import load_model

ROUNDS = 15
RESULT = Path(__file__).parent / "results" / "second_runtime.json"


def runners(path: Path, threads: int) -> dict[str, Any]:
    """Runtime → function from windows (4, 1, 256, 256) to their maps."""
    import openvino

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return {
        "onnxruntime": lambda batch: session.run(["map"], {"gray": batch})[0],
        "openvino": lambda batch: compiled({"gray": batch})["map"],
    }


def main() -> None:
    """Export, run and write the figures."""
    parser = argparse.ArgumentParser(description="Compare OpenVINO with onnxruntime.")
    parser.add_argument("model", nargs="?", default="dinocell-cells")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if importlib.util.find_spec("openvino") is None:
        print("openvino is not installed: nothing is measured (pip install openvino)")
        return
    windows = list(calibration_windows(load_model(options.model), DATA / "val" / "images"))
    whole = [window for window in windows if window.shape[2:] == (256, 256)]
    batches = [np.concatenate(whole[start : start + 4]) for start in range(0, len(whole) - 3, 4)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, how in GRAPHS.items():
            path = Path(folder, f"{name.replace(' ', '_')}.onnx")
            export_model(options.model, path, **how)
            for threads in options.threads:
                both = runners(path, threads)
                spent: dict[str, list[tuple[float, float]]] = {runtime: [] for runtime in both}
                largest = 0.0
                for number in range(-2, ROUNDS):  # the first two warm up
                    batch = batches[number % len(batches)]
                    maps = []
                    for runtime, run in both.items():
                        cpu, wall = time.process_time(), time.perf_counter()
                        maps.append(run(batch))
                        took = time.process_time() - cpu, time.perf_counter() - wall
                        if number >= 0:
                            spent[runtime].append(took)
                    largest = max(largest, float(np.abs(maps[0] - maps[1]).max()))
                for runtime, times in spent.items():
                    cpu, wall = np.median(times, axis=0) / (4 * 256 * 256 / 1e6)
                    rows.append(
                        {
                            "graph": name,
                            "threads": threads,
                            "runtime": runtime,
                            "processor_s_per_megapixel": round(float(cpu), 3),
                            "wall_s_per_megapixel": round(float(wall), 3),
                            "largest_map_difference": largest,
                        }
                    )
                    print(rows[-1], flush=True)
    record = {"model": options.model, "processor": processor_name(), "rows": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
