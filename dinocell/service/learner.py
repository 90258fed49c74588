"""The process that adapts the model to corrected images; `dinocell.service.learning` starts it.

Its arguments are a folder and a JSON object of `start` (the model), `device` and `minutes`.  The folder
has `images` and `labels` to learn from, and `held_out` with an `image.npy` and `labels.tif` that only
judge.  It writes `model.safetensors`, three pictures of the image that was held out, and last
`result.json`.  Its standard error says how far it is, and why it failed.  When its standard input ends,
the service is gone, and the process leaves at once.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DINOCellError
from dinocell.evaluation.matching import overlap_table
from dinocell.evaluation.metrics import match_counts, pooled_ap
from dinocell.files import write_text_atomically
from dinocell.io import read_labels
from dinocell.network.model import load_model
from dinocell.pipeline import DINOCellPipeline
from dinocell.results.pictures import draw_contours, to_display, write_png
from dinocell.training.adapt import AdaptOptions, adapt

PICTURES = ("truth", "before", "after")
"""The image that was held out with its corrected cells, and with those of both models."""
_IOUS = (0.5, 0.75, 0.9)


def learn(folder: Path, *, start: str, device: str, minutes: float) -> None:
    """Adapt, judge both models on the image that was held out, and write all of it.

    Raises DINOCellError (see `dinocell.training.adapt.adapt`).
    """
    path = folder / "model.safetensors"
    options = AdaptOptions(minutes=minutes, device=device)
    result = adapt(folder / "images", folder / "labels", path, start=start, options=options)
    print("Comparing both models on the image that was held out", file=sys.stderr, flush=True)
    image = np.load(folder / "held_out" / "image.npy")
    truth = read_labels(folder / "held_out" / "labels.tif")
    scores = {}
    cells = {"truth": truth}
    for name, model in (("before", start), ("after", str(path))):
        pipeline = DINOCellPipeline(load_model(model, device=device))
        cells[name] = pipeline.run(image, allow_mask=True).labels
        scores[name] = _scores(truth, cells[name])
    display = to_display(image)
    for name in PICTURES:
        write_png(folder / f"{name}.png", draw_contours(display, cells[name]))
    text = json.dumps({"chosen": result.chosen, **scores})
    write_text_atomically(folder / "result.json", text)


def _scores(truth: NDArray[np.uint32], found: NDArray[np.uint32]) -> dict[str, Any]:
    table = overlap_table(truth, found)
    counts = [match_counts(table, iou) for iou in _IOUS]
    aps = pooled_ap(np.array([[(c.tp, c.fp, c.fn) for c in counts]]))
    return {"num_cells": int(found.max(initial=0)), "ap": float(aps.mean()), "ap50": float(aps[0])}


def _main() -> None:
    def leave_with_the_service() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=leave_with_the_service, daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)  # whoever segments comes first
    try:
        learn(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    except (DINOCellError, ValueError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    _main()
