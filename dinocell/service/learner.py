"""The process that adapts the model to corrected images; `dinocell.service.learning` starts it.

Its arguments are a folder and a JSON object of `start` (the model), `device` and `minutes`.  The folder
has `images`, `labels` and `about` to learn from, and `held_out` with an `image.npy`, `labels.tif` and
`about.json` that only judge; `about` says at which scale the network saw an image.  It writes
`model.safetensors`, three pictures of the image that was held out, and last `result.json`.  Its standard
error says how far it is, and why it failed.  When its standard input ends, the service is gone, and the
process leaves at once.
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
from dinocell.io import read_labels, write_image, write_labels
from dinocell.network.model import load_model
from dinocell.pipeline import DINOCellPipeline
from dinocell.results.pictures import draw_contours, to_display, write_png
from dinocell.segmentation.rescale import resample, rescaled_shape
from dinocell.training.adapt import AdaptOptions, adapt

PICTURES = ("truth", "before", "after")
"""The image that was held out with its corrected cells, and with those of both models."""
_IOUS = (0.5, 0.75, 0.9)


def learn(folder: Path, *, start: str, device: str, minutes: float) -> None:
    """Adapt, judge both models on the image that was held out, and write all of it.

    Raises DINOCellError (see `dinocell.training.adapt.adapt`).
    """
    bring_to_scale(folder)
    path = folder / "model.safetensors"
    options = AdaptOptions(minutes=minutes, device=device)
    result = adapt(folder / "images", folder / "labels", path, start=start, options=options)
    print("Comparing both models on the image that was held out", file=sys.stderr, flush=True)
    image = np.load(folder / "held_out" / "image.npy")
    truth = read_labels(folder / "held_out" / "labels.tif")
    rescale = _scale_of(folder / "held_out" / "about.json")[0]
    scores = {}
    cells = {"truth": truth}
    for name, model in (("before", start), ("after", str(path))):
        pipeline = DINOCellPipeline(load_model(model, device=device), rescale=rescale)
        cells[name] = pipeline.run(image, allow_mask=True).labels
        scores[name] = _scores(truth, cells[name])
    display = to_display(image)
    for name in PICTURES:
        write_png(folder / f"{name}.png", draw_contours(display, cells[name]))
    text = json.dumps({"chosen": result.chosen.name, **scores})
    write_text_atomically(folder / "result.json", text)


def bring_to_scale(folder: Path) -> None:
    """Resample the images to learn from, and their labels, to the scale at which the network saw them.

    Otherwise the model would learn cells of another size than `diameter_px` or the pixel size bring them to.
    An image of known pixel size becomes a TIFF that states it, for the model that is learned.
    """
    for about in sorted((folder / "about").iterdir()):
        path, labels = (
            folder / "images" / f"{about.stem}.npy",
            folder / "labels" / f"{about.stem}.tif",
        )
        factor, pixel_size_um = _scale_of(about)
        image = np.load(path)
        if factor != 1:
            shape = rescaled_shape(image.shape, factor)
            cells = read_labels(labels)
            rows, columns = (
                ((np.arange(new) + 0.5) * old / new).astype(int)  # the nearest pixel
                for old, new in zip(image.shape, shape, strict=True)
            )
            write_labels(labels, cells[rows][:, columns])
            image = _resampled(image, shape)
            np.save(path, image)
        if pixel_size_um is not None and image.dtype.itemsize < 8:  # TIFF has no longer numbers
            write_image(path.with_suffix(".tif"), image, pixel_size_um=pixel_size_um / factor)
            path.unlink()


def _scale_of(about: Path) -> tuple[float, float | None]:
    """How many times an image was enlarged for the network, and its pixel size in µm before that."""
    known = json.loads(about.read_text(encoding="utf-8"))
    return known.get("rescale", 1.0), known.get("pixel_size_um")


def _resampled(image: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """The image in another size; whole numbers stay whole, and in the range of their type."""
    seen = np.empty(shape, np.float32)
    resample(image.astype(np.float32), seen)
    if image.dtype.kind not in "iu":
        return seen
    limits = np.iinfo(image.dtype)
    return np.rint(seen.astype(np.float64)).clip(limits.min, limits.max).astype(image.dtype)


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
