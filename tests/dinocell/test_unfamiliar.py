"""Images of another kind are flagged, images of the training's kind are not: on real images."""

import numpy as np
import pytest

from dinocell.io import find_images
from dinocell.pipeline import DINOCellPipeline

# Set → least and largest share of flagged images; `benchmarks/unfamiliar.py` looks at more.
SETS = {
    "dsb2018/test/images": (0.0, 0.04),
    "bbbc039/test/images": (0.0, 0.0),
    "bbbc039/edge_cases/images": (0.0, 0.0),
    "dsb2018_tissue/test/images": (0.95, 1.0),
    "usiigaci_phase/test/images": (0.95, 1.0),
    "ctc/c2c12_phase/01": (0.95, 1.0),
}


@pytest.mark.slow
def test_shares_of_flagged_images(data_dir):
    pipeline = DINOCellPipeline("dinocell-nuclei")
    for name, (least, most) in SETS.items():
        flagged = []
        paths = find_images([data_dir / name])
        for path in paths[:: 3 if len(paths) > 9 else 1]:
            flagged.append(pipeline.run(path).unfamiliar > 1)
        assert len(flagged) >= 3
        assert least <= np.mean(flagged) <= most, name
