"""Label images by DeepSea, the one peer whose weights come with its package.

It has an environment of its own, because its package knows nothing of ours:

    python -m venv deepsea-venv
    deepsea-venv/bin/pip install torch==2.13.0 deepsea==0.0.3 numpy scipy scikit-image pillow
    deepsea-venv/bin/python benchmarks/peers/run_deepsea.py IMAGES OUT

Each image becomes OUT/NAME.png (16 bit, 0 background), and OUT/seconds.csv has the processor seconds of
each.  Images are prepared as the package's `test_single_image_segmentation` does: stretched to 8 bits,
resized to 383 × 512 px whatever their shape, scaled to -1 to 1; regions of 20 px and more are cells.  The
labels are resized back to the image.  The package itself cannot be called: its modules import one
another as if they lay on the path, and its own function needs NumPy 1.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import deepsea.trained_models
import numpy as np
import torch
from deepsea.model import DeepSeaSegmentation
from PIL import Image
from scipy import ndimage
from skimage.morphology import remove_small_objects

_SIZE = (512, 383)  # columns, rows
_SMALLEST_CELL_PX = 20
_WEIGHTS = files(deepsea.trained_models) / "segmentation.pth"


def load() -> torch.nn.Module:
    """The network with the weights of the package."""
    model = DeepSeaSegmentation(n_channels=1, n_classes=2, bilinear=True)
    model.load_state_dict(torch.load(str(_WEIGHTS), map_location="cpu", weights_only=True))
    return model.eval()


def segment(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    """Gray image (H, W) → labels (H, W) uint16."""
    low, high = float(image.min()), float(image.max())
    stretched = (255 * ((image - low) / max(high - low, 1e-9))).astype(np.uint8)
    small = np.asarray(Image.fromarray(stretched).resize(_SIZE, Image.Resampling.BILINEAR))
    pixels = torch.from_numpy((small.astype(np.float32) / 255 - 0.5) / 0.5)
    with torch.inference_mode():
        scores, _ = model(pixels[None, None])  # [1, 2, 383, 512]
    cells = scores.argmax(dim=1)[0].numpy() > 0
    cells = remove_small_objects(cells, max_size=_SMALLEST_CELL_PX - 1, connectivity=1)
    labels, _ = ndimage.label(cells)
    picture = Image.fromarray(labels.astype(np.int32))
    size = (image.shape[1], image.shape[0])
    return np.asarray(picture.resize(size, Image.Resampling.NEAREST)).astype(np.uint16)


def main() -> None:
    """Segment a folder."""
    parser = argparse.ArgumentParser(description="Label images by DeepSea.")
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = load()
    weights = hashlib.sha256(_WEIGHTS.read_bytes()).hexdigest()[:12]
    print(f"deepsea {version('deepsea')}, weights {weights}")
    rows = []
    for path in sorted(options.images.iterdir()):
        image = np.asarray(Image.open(path).convert("I"))
        started = time.process_time()
        labels = segment(model, image)
        rows.append((path.stem, round(time.process_time() - started, 4), weights))
        Image.fromarray(labels).save(options.out / f"{path.stem}.png")
        print(path.name, labels.max(), flush=True)
    with open(options.out / "seconds.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "processor_s", "weights_sha256"), *rows])


if __name__ == "__main__":
    main()
