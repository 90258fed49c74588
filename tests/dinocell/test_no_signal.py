"""Cells are found in images with pixels that are no signal as in the same images without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from dinocell.io import write_labels
from dinocell.pipeline import DINOCellPipeline


@pytest.fixture
def cases(data_dir: Path) -> ModuleType:
    """The module that writes twelve kinds of such pixels into real images, and scores labels."""
    path = data_dir.parent / "cases" / "intensity.py"
    if not path.is_file():
        pytest.skip(f"the corrupted images are made by {path}, which is not there")
    spec = importlib.util.spec_from_file_location("intensity_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_cells_are_found_beside_pixels_that_are_no_signal(cases, data_dir, tmp_path):
    cases.write(data_dir, tmp_path)
    pipeline = DINOCellPipeline()
    for path in sorted((tmp_path / "images").glob("*.tif")):
        result = pipeline.run(path)
        write_labels(tmp_path / "pred" / f"{path.stem}_labels.tif", result.labels)
    found = cases.score(tmp_path, tmp_path / "pred")
    assert len(found) == 12
    for kind, row in found.items():
        assert row["ap50"] >= cases.GOALS.get(kind, 0.95), (kind, row)
