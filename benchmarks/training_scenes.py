"""Write generated images with exact labels, as additional data for a training.

    python benchmarks/training_scenes.py runs/scenes

120 images of 320 x 320 px (`tests/scenes.py`): 70 of bright nuclei, 20 of dim ones, 30 in phase contrast, of
several pixel sizes, with 20 to 80 % of the cells against another.  configs/ablation/generalist_conv.yaml uses them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from dinocell.io import write_image

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from scenes import make_scene

SIZE_PX = 320
KINDS = {  # images, and the range of the pixel size in um
    "fluorescence_nuclei": (70, (0.45, 1.3)),
    "fluorescence_dim": (20, (0.3, 0.9)),
    "phase_contrast": (30, (0.5, 0.9)),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="gets the folders images and labels")
    folder: Path = parser.parse_args().folder
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)  # the same files are written again
    rng = np.random.default_rng(0)
    kinds = [kind for kind, (count, _) in KINDS.items() for _ in range(count)]
    for seed, kind in enumerate(kinds):
        scene = make_scene(
            kind,
            height_px=SIZE_PX,
            width_px=SIZE_PX,
            seed=seed,
            pixel_size_um=float(rng.uniform(*KINDS[kind][1])),
            touching=float(rng.uniform(0.2, 0.8)),
        )
        write_image(folder / "images" / f"{seed:03}.tif", scene.image)
        write_image(folder / "labels" / f"{seed:03}.tif", scene.labels.astype(np.uint16))


if __name__ == "__main__":
    main()
