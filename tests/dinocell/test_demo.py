"""The demo: what it leaves, what it says, and what it refuses to touch."""

from __future__ import annotations

import pytest

from dinocell.demo import run_demo
from dinocell.errors import UsageError
from dinocell.io.images import read_labels
from dinocell.scenes import sample_paths


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", device="cpu", shown=False)


def test_files(result):
    out = result.batch.out
    for image, _ in sample_paths():
        for ending in ("_labels.tif", "_cells.csv", "_overlay.png"):
            assert (out / f"{image.stem}{ending}").stat().st_size > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "nuclei_clustered" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_finds_the_nuclei(result):
    """The bundled model on our own scenes: the numbers are its real ones, with some room."""
    assert result.scores["nuclei"] >= 0.6
    assert result.scores["nuclei_clustered"] >= 0.5
    empty = read_labels(result.batch.out / "empty_labels.tif")
    assert not empty.any()


def test_text(result):
    text = result.text()
    assert "cells found in 6 images" in text
    assert "report.html" in text
    assert "AP@0.5" in text


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(UsageError, match="other files in it"):
        run_demo(tmp_path, shown=False)
    assert (tmp_path / "thesis.doc").exists()
    with pytest.raises(UsageError, match="got the file"):
        run_demo(tmp_path / "thesis.doc", shown=False)


def test_an_earlier_demo_is_replaced_and_nothing_else(result):
    mine = result.batch.out / "notes.txt"
    mine.write_text("mine")
    before = (result.batch.out / "nuclei_labels.tif").stat().st_mtime_ns
    run_demo(result.batch.out, device="cpu", shown=False)
    assert mine.read_text() == "mine"
    assert (result.batch.out / "nuclei_labels.tif").stat().st_mtime_ns > before
