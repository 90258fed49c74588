"""The demo and its samples: real images with truth, and folders of the user that stay untouched."""

from __future__ import annotations

import numpy as np
import pytest

from dinocell.demo import run_demo, sample_paths
from dinocell.errors import UsageError
from dinocell.io import read_image, read_labels

# Name: source below the folder of data, first row and column, channel of colour images.
SOURCES = {
    "empty": ("bbbc039/edge_cases", "IXMtest_L10_s6.tif", (100, 150), None),
    "nuclei": ("dsb2018/val", "295ac4ecf2ee0211.png", (0, 0), None),
    "nuclei_16bit": ("bbbc039/val", "IXMtest_N23_s2.tif", (100, 150), None),
    "nuclei_small": ("dsb2018/val", "358e47eaa1e92222.png", (0, 0), None),
    "phase_contrast": ("usiigaci_phase/val", "set17.png", (300, 300), None),
    "tissue": ("dsb2018_tissue/val", "5d75a63972ef643e.png", (0, 0), 1),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", device="cpu", shown=False)


def test_samples_are_small_and_hold_the_cells_that_their_table_names():
    pairs = sample_paths()
    assert [image.stem for image, _ in pairs] == sorted(SOURCES)
    assert sum(path.stat().st_size for pair in pairs for path in pair) < 500_000
    readme = (pairs[0][0].parent / "README.md").read_text(encoding="utf-8")
    for image, path in pairs:
        labels = read_labels(path)
        assert labels.shape == read_image(image).pixels.shape
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{image.name}`"))
        assert int(row.split("|")[3]) == labels.max() == np.unique(labels[labels > 0]).size


def test_samples_are_pieces_of_the_images_that_they_credit(data_dir):
    for image, _ in sample_paths():
        folder, name, (row, column), channel = SOURCES[image.stem]
        pixels = read_image(image).pixels
        rows, columns = pixels.shape
        source = read_image(data_dir / folder / "images" / name).pixels
        piece = source[row : row + rows, column : column + columns]
        assert np.array_equal(pixels, piece if channel is None else piece[:, :, channel])


def test_files(result):
    out = result.batch.out
    for image, _ in sample_paths():
        for ending in ("_labels.tif", "_cells.csv", "_overlay.png"):
            assert (out / f"{image.stem}{ending}").stat().st_size > 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "nuclei_small" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_finds_the_cells_of_all_kinds(result):
    """Measured: .94, .89, .74, .65 and .60; an empty field stays empty."""
    assert result.scores["nuclei"] >= 0.85
    assert result.scores["nuclei_16bit"] >= 0.8
    assert result.scores["nuclei_small"] >= 0.65
    assert result.scores["phase_contrast"] >= 0.5
    assert result.scores["tissue"] >= 0.5
    assert not read_labels(result.batch.out / "empty_labels.tif").any()
    assert not any(row["unfamiliar"] > 1 for row in result.batch.rows)


def test_samples_of_other_kinds_are_flagged(tmp_path):
    found = run_demo(tmp_path / "out", model="dinocell-nuclei", device="cpu", shown=False).batch
    flagged = {row["name"] for row in found.rows if row["unfamiliar"] > 1}
    assert flagged == {"phase_contrast", "tissue"}
    assert found.text().count("does not look like what dinocell-nuclei was trained on") == 2


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


def test_an_earlier_demo_is_replaced_and_nothing_else(result, monkeypatch):
    nuclei = [pair for pair in sample_paths() if pair[0].stem == "nuclei"]
    monkeypatch.setattr("dinocell.demo.sample_paths", lambda: nuclei)
    mine = result.batch.out / "notes.txt"
    mine.write_text("mine")
    labels = result.batch.out / "nuclei_labels.tif"
    before, content = labels.stat().st_mtime_ns, labels.read_bytes()
    labels.write_bytes(b"of an earlier version")
    run_demo(result.batch.out, device="cpu", shown=False)
    assert mine.read_text() == "mine"
    assert labels.stat().st_mtime_ns > before
    assert labels.read_bytes() == content
