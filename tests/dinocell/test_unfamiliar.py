"""Images of another kind are flagged, images of the training's kind are not: on real images."""

from pathlib import Path

import numpy as np
import pytest
import skimage

from dinocell.io import find_images
from dinocell.pipeline import DINOCellPipeline

# Model → set → least and largest share of flagged images; `benchmarks/unfamiliar.py` looks at more.
NUCLEI = {
    "dsb2018/test/images": (0.0, 0.06),  # of 54 one is flagged, which is among the 18 seen here
    "bbbc039/test/images": (0.0, 0.0),
    "bbbc039/edge_cases/images": (0.0, 0.0),
    "ctc/c2c12_phase/01": (0.95, 1.0),
}
SETS = {
    "dinocell-nuclei": NUCLEI
    | {"dsb2018_tissue/test/images": (0.95, 1.0), "usiigaci_phase/test/images": (0.95, 1.0)},
    "dinocell-cells": NUCLEI
    | {"dsb2018_tissue/test/images": (0.0, 0.0), "usiigaci_phase/test/images": (0.0, 0.0)},
}


@pytest.mark.slow
@pytest.mark.parametrize("model", SETS)
def test_shares_of_flagged_images(model, data_dir):
    pipeline = DINOCellPipeline(model)
    for name, (least, most) in SETS[model].items():
        flagged = []
        paths = find_images([data_dir / name])
        for path in paths[:: 3 if len(paths) > 9 else 1]:
            flagged.append(pipeline.run(path).unfamiliar > 1)
        assert len(flagged) >= 3
        assert least <= np.mean(flagged) <= most, name


@pytest.mark.slow
def test_photographs_are_flagged():
    pipeline = DINOCellPipeline("dinocell-cells")
    folder = Path(skimage.__file__).parent / "data"
    for name in ("brick", "clock_motion", "coins", "grass", "gravel", "moon"):
        result = pipeline.run(skimage.io.imread(folder / f"{name}.png"))
        assert result.unfamiliar > 1, name
