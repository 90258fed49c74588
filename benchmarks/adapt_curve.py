"""What a few labelled images of a new kind give: adapted models beside training from random weights.

    python benchmarks/adapt_curve.py --start dinocell-tiny --data DATA/mnfinder

For each number of images (spread evenly over DATA/train) the start is adapted by
`dinocell adapt` with its usual time, and a network of the same architecture with random weights for as
many steps and by the same code.  Both are scored on DATA/val and DATA/test.  Writes
benchmarks/results/adapt_curve_SET_START.json; AP is pooled, with the bounds of 95 % of 2,000 draws of
as many images.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import processor_name

from dinocell.evaluation.model_evaluation import evaluate_model
from dinocell.network.model import DINOCell, load_model, save_model
from dinocell.pairs import Pair, find_pairs
from dinocell.training.adapt import AdaptOptions, adapt
from dinocell.training.datasets import spread_evenly


def scores(model: str | Path, data: Path) -> dict[str, Any]:
    """Pooled AP of the parts val and test, with intervals."""
    found: dict[str, Any] = {}
    for part in ("val", "test"):
        report = evaluate_model(model, data / part, shown=False).report
        for name in ("ap50", "ap75"):
            found[f"{part}_{name}"] = round(report.pooled[f"{name}_pooled"], 4)
        found[f"{part}_ap50_interval"] = [round(x, 4) for x in report.intervals["ap50_pooled"]]
    return found


def folder_of(pairs: list[Pair], folder: Path) -> Path:
    """A folder with the images and labels of these pairs."""
    for pair in pairs:
        for kind, path in (("images", pair.image_path), ("labels", pair.labels_path)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / kind / path.name)
    return folder


def main() -> None:
    """Adapt, train, score and write the JSON file."""
    parser = argparse.ArgumentParser(description="Score models adapted to a few images.")
    parser.add_argument("--start", default="dinocell-tiny")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, val and test")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 5, 10, 50])
    parser.add_argument("--minutes", type=float, default=AdaptOptions().minutes)
    options = parser.parse_args()
    pairs = find_pairs(options.data / "train" / "images", options.data / "train" / "labels")
    rows = [{"images": 0, "from": "start", **scores(options.start, options.data)}]
    print(json.dumps(rows[-1]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        random = Path(temporary, "random.safetensors")
        torch.manual_seed(0)
        save_model(random, DINOCell(load_model(options.start).config))
        for count in sorted({min(count, len(pairs)) for count in options.images}):
            folder = folder_of(list(spread_evenly(pairs, count)), Path(temporary, str(count)))
            steps = None
            for name, start in (("start", options.start), ("random", str(random))):
                out = folder / f"{name}.safetensors"
                began = time.monotonic()
                how = AdaptOptions(minutes=options.minutes, steps=steps)
                result = adapt(
                    folder / "images", folder / "labels", out, start=start, options=how, shown=False
                )
                steps = result.steps
                row = {"images": count, "from": name, "chosen": result.chosen, "steps": steps}
                row |= {"seconds": round(time.monotonic() - began), **scores(out, options.data)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    found = {"data": options.data.name, "start": options.start, "processor": processor_name()}
    path = Path(__file__).parent / "results"
    path /= f"adapt_curve_{options.data.name}_{Path(options.start).stem}.json"
    path.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
