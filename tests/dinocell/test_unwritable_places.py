"""What the Python interface writes, where nothing can be written: one sentence of ours."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dinocell.errors import DINOCellError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.export import export_model
from dinocell.network.weights import convert_weights
from dinocell.pipeline import segment
from dinocell.results.measure import measure_labels
from dinocell.results.pictures import write_png

LABELS = np.eye(8, dtype=np.uint32)


@pytest.fixture(scope="module")
def writers(mini_model):
    """What is written → a function that writes it to a path."""
    cells = segment(np.zeros((8, 8), np.uint8), model=mini_model)
    scores = evaluate_pairs([("a", LABELS, LABELS)])
    return {
        "cells": cells.save,
        "model": lambda path: mini_model.save(path.with_suffix(".safetensors")),
        "table": measure_labels(LABELS).to_csv,
        "scores": scores.to_csv,
        "document": scores.to_json,
        "picture": lambda path: write_png(path, np.zeros((2, 2, 3), np.uint8)),
        "export": lambda path: export_model(
            "dinocell-nuclei", path.with_suffix(".pt2"), to="torch"
        ),
        "weights": lambda path: convert_weights("dinocell-tiny", path.with_suffix(".pth")),
    }


KINDS = ("cells", "model", "table", "scores", "document", "picture", "export", "weights")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["file/out", "file/deep/out", f"{'n' * 300}/out"])
def test_a_place_that_cannot_be_written_is_one_sentence(writers, tmp_path, kind, place):
    (tmp_path / "file").write_text("a user's own")
    with pytest.raises(DINOCellError) as caught:
        writers[kind](tmp_path / place)
    text = str(caught.value)
    assert place in text
    assert "choose another" in text
    assert "\n" not in text
    assert "Errno" not in text
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "a user's own"


@pytest.mark.parametrize("kind", ["model", "export", "weights"])
def test_a_name_that_is_too_long_is_one_sentence(writers, tmp_path, kind):
    with pytest.raises(DINOCellError, match=r"cannot be written .*choose another"):
        writers[kind](tmp_path / ("n" * 254))
    assert os.listdir(tmp_path) == []


def test_a_folder_of_results_that_is_a_file_is_named(writers, tmp_path):
    (tmp_path / "out").touch()
    reason = r"out' cannot be written \(a file has the name of its folder, or of one above it\)"
    with pytest.raises(DINOCellError, match=reason):
        writers["cells"](tmp_path / "out")


def test_a_disk_that_fills_up_is_one_sentence(writers, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for kind in KINDS:
        with pytest.raises(DINOCellError, match=r"cannot be written \(No space left on device\)"):
            writers[kind](tmp_path / kind)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()], kind
