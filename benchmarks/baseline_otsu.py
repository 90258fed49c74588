"""The floor: Otsu's threshold and a distance watershed, scored as our models are.

    python benchmarks/baseline_otsu.py --data ../shared/data/dsb2018/test

writes benchmarks/results/otsu_NAME.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.segmentation import watershed

from dinocell.evaluation import evaluate_pairs
from dinocell.io import find_images, read_image, read_labels


def otsu_watershed(image: np.ndarray) -> np.ndarray:
    """Gray image → labels: smooth, threshold, split at the peaks of the distance transform."""
    smooth = gaussian(image.astype(float), 1.0)
    mask = smooth > threshold_otsu(smooth)
    distance = gaussian(ndimage.distance_transform_edt(mask), 1.0)
    peaks = peak_local_max(distance, min_distance=5, labels=label(mask), exclude_border=False)
    markers = np.zeros(image.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask).astype(np.uint32)


def main() -> None:
    """Score one folder with images/ and labels/."""
    default = Path(os.environ.get("DINOCELL_DATA", "../shared/data")) / "dsb2018" / "test"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    images = find_images([options.data / "images"])
    truths = {path.stem: path for path in find_images([options.data / "labels"])}
    report = evaluate_pairs(
        (path.stem, read_labels(truths[path.stem]), otsu_watershed(read_image(path).pixels))
        for path in images
    )
    print("\n".join(report.table()))
    name = f"otsu_{options.data.parent.name}_{options.data.name}.json"
    report.to_json(options.out or Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    main()
