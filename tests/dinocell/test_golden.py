"""The same image gives the same cells in every version, for each model that is shipped.

A deliberate change of a model is another version of it (`card["version"]`), and these files are written
again: `python tests/dinocell/test_golden.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dinocell.demo import sample_paths
from dinocell.evaluation.scores import evaluate_pair
from dinocell.io import read_labels, write_labels
from dinocell.network.model import bundled_models, load_model, model_path
from dinocell.pipeline import DINOCellPipeline

FOLDER = Path(__file__).parent / "golden"


def marks(name: str) -> dict[str, str | int]:
    """Version and checksum of a shipped model."""
    digest = hashlib.sha256(model_path(name).read_bytes()).hexdigest()
    return {"version": load_model(name).card.get("version", 1), "sha256": digest}


@pytest.mark.parametrize("name", bundled_models())
def test_cells_and_weights_of_shipped_models_stay(name):
    assert json.loads((FOLDER / name / "model.json").read_text()) == marks(name)
    # Other processors round otherwise: some pixels of a border may move, and the smallest cells have
    # 15 pixels; no cell may come or go.
    pipeline = DINOCellPipeline(name, device="cpu", precision="fp32")
    for image, _ in sample_paths():
        expected = read_labels(FOLDER / name / f"{image.stem}.png")
        found = pipeline.run(image).labels
        assert np.unique(found).size == np.unique(expected).size
        if expected.any():
            (match,) = evaluate_pair(expected, found, iou_thresholds=[0.8]).matches
            assert match.ap == 1.0, image.stem


def write() -> None:
    """Write the expected labels of every shipped model."""
    for name in bundled_models():
        (FOLDER / name).mkdir(parents=True, exist_ok=True)
        (FOLDER / name / "model.json").write_text(json.dumps(marks(name)) + "\n")
        pipeline = DINOCellPipeline(name, device="cpu", precision="fp32")
        for image, _ in sample_paths():
            write_labels(FOLDER / name / f"{image.stem}.png", pipeline.run(image).labels)


if __name__ == "__main__":
    write()
