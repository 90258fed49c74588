"""How many windows could be left out because they are dark, and how safely?

    python benchmarks/dark_windows.py [--model dinocell-cells]      # writes results/dark_windows.json

Windows of zeros are computed once already.  For every other window of real images this notes the
brightest 5 x 5 px mean of its normalised intensities, and the highest value of its map.  A window may be
left out only if its map stays below the fill threshold.  A limit on the brightness is safe if it lies well
below that of the darkest window whose map reaches half of the fill threshold: half of it is taken here.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
import torch

from dinocell.io import read_image
from dinocell.network.model import load_model
from dinocell.network.precision import autocast
from dinocell.segmentation.intensity import find_range, to_model_input
from dinocell.segmentation.tiles import predict_windows

HERE = Path(__file__).parent
DATA = Path(os.environ.get("DINOCELL_DATA", HERE / "../../shared/data"))
SETS = {
    "dsb2018/val": "dsb2018/val/images/*",
    "dsb2018/test": "dsb2018/test/images/*",
    "bbbc039, fields with cells": "bbbc039/[tv]*/images/*",
    "bbbc039, empty fields": "bbbc039/edge_cases/images/*",
    "mnfinder": "mnfinder/[vt][ae][ls]*/images/*",
    "mitocheck movie": "unlabelled/mitocheck_movie/*",
}


def main() -> None:
    """Look at every window and write what a limit would save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinocell-cells")
    name_of_model = parser.parse_args().model
    model = load_model(name_of_model)
    config, context = model.config, autocast("auto", model.device)
    seen: dict[str, list[list[float]]] = {name: [] for name in SETS}

    for name, pattern in SETS.items():

        def predict(windows: np.ndarray, rows: list = seen[name]) -> np.ndarray:
            with torch.inference_mode(), context:
                shown = np.stack([to_model_input(window[0]) for window in windows])
                maps = model(torch.from_numpy(shown))[:, 0].float().numpy()
            for window, one_map in zip(windows, maps, strict=True):
                brightest = cv2.blur(window[0], (5, 5)).max()
                rows.append([round(float(value), 4) for value in (brightest, one_map.max())])
            return maps

        paths = sorted(DATA.glob(pattern))
        for path in paths:
            pixels = read_image(path).pixels
            gray = pixels if pixels.ndim == 2 else pixels[..., :3].mean(axis=2)
            normalized = find_range(gray, **config.intensity).apply(gray)
            grid = {"window_px": config.window_px, "overlap_px": config.overlap_px}
            predict_windows(normalized[None], predict, **grid)
        print(f"{name}: {len(paths)} images, {len(seen[name])} windows", flush=True)

    lit = [b for rows in seen.values() for b, m in rows if b > 0 and m >= config.fill_threshold / 2]
    limit = min(lit) / 2
    record = {"model": name_of_model, "fill_threshold": config.fill_threshold, "sets": {}}
    record |= {"darkest_window_with_map": min(lit), "limit": round(limit, 4)}
    for name, rows in seen.items():
        record["sets"][name] = {
            "windows": len(rows),
            "of zeros": sum(b == 0 for b, _ in rows),
            "map below fill": sum(b > 0 and m < config.fill_threshold for b, m in rows),
            "below limit": sum(0 < b < limit for b, _ in rows),
            "brightness_and_map": rows,
        }
        print(
            name, {key: value for key, value in record["sets"][name].items() if key[-3:] != "map"}
        )
    text = json.dumps(record) + "\n"
    (HERE / "results" / "dark_windows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
