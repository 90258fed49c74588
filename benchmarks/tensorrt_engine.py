"""A model in TensorRT: does its parser take the graph, and how fast is the engine?

    python benchmarks/tensorrt_engine.py [MODEL]     # needs a GPU and trtexec, which TensorRT brings

Written to benchmarks/results/tensorrt_MODEL.json: for fp32 and fp16 the parser's answer, and trtexec's windows per
second and median milliseconds of a batch.  `make gpu-run` runs it where trtexec is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

BATCH = 8
WINDOW_PX = 256
PATCH_PX = 32
MOST_PX = 1024
PRECISIONS = {"fp32": [], "fp16": ["--stronglyTyped"]}  # types are those of the graph


def trtexec_command(graph: Path, precision: str) -> list[str]:
    """Build an engine for 1 to 16 windows of 64 to 1,024 px, tuned for 8 of 256 px, and time it."""
    shapes = {
        "min": (1, 2 * PATCH_PX),
        "opt": (BATCH, WINDOW_PX),
        "max": (2 * BATCH, MOST_PX),
    }
    profile = [f"--{name}Shapes=gray:{n}x1x{side}x{side}" for name, (n, side) in shapes.items()]
    shape = f"--shapes=gray:{BATCH}x1x{WINDOW_PX}x{WINDOW_PX}"
    engine = f"--saveEngine={graph.with_suffix('.engine')}"
    return ["trtexec", f"--onnx={graph}", *profile, shape, engine, *PRECISIONS[precision]]


def figures(text: str) -> dict[str, float]:
    """Windows per second and median milliseconds of a batch, from what trtexec prints."""
    throughput = re.search(r"Throughput: ([\d.]+) qps", text)
    latency = re.search(r"GPU Compute Time: .*?median = ([\d.]+) ms", text)
    if throughput is None or latency is None:
        raise SystemExit(f"trtexec printed no figures: {text[-2000:]}")
    return {
        "windows_per_s": round(BATCH * float(throughput[1]), 1),
        "batch_median_ms": float(latency[1]),
    }


def parser_errors(graph: Path) -> list[str] | None:
    """What TensorRT's parser says against the graph; None where its Python package is missing."""
    if importlib.util.find_spec("tensorrt") is None:
        return None
    import tensorrt

    logger = tensorrt.Logger()
    network = tensorrt.Builder(logger).create_network(0)
    parser = tensorrt.OnnxParser(network, logger)
    parser.parse_from_file(str(graph))
    return [parser.get_error(number).desc() for number in range(parser.num_errors)]


def main() -> None:
    """Export, check, build, time and write."""
    parser = argparse.ArgumentParser(description="Run a model in TensorRT.")
    parser.add_argument("model", nargs="?", default="dinocell-cells")
    options = parser.parse_args()
    if shutil.which("trtexec") is None:
        raise SystemExit("trtexec was not found: install TensorRT and put its folder into PATH")
    from dinocell.export import export_model

    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            graph = Path(folder, f"{precision}.onnx")
            export_model(options.model, graph, precision=precision)
            errors = parser_errors(graph)
            command = trtexec_command(graph, precision)
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[precision] = {"parser_errors": errors} | figures(done.stdout)
            print(precision, json.dumps(rows[precision]), flush=True)
    path = Path(__file__).parent / "results" / f"tensorrt_{Path(options.model).stem}.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
