"""The tree may not import `dinocell`, so it has a twin of `dinocell/files.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov3.cells.files import atomic_path

ROOT = Path(__file__).parents[3]


def test_the_twins_have_one_text():
    """They differ in the class of the error for a folder, which is `dinocell`'s own there."""
    theirs = (ROOT / "dinocell" / "files.py").read_text(encoding="utf-8")
    ours = (ROOT / "dinov3_modified" / "dinov3" / "cells" / "files.py").read_text(encoding="utf-8")
    shared = theirs.replace("\nfrom dinocell.errors import DINOCellError\n", "")
    assert ours == shared.replace("DINOCellError", "ValueError")


def test_a_folder_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="`path` must be the name of a file"),
        atomic_path(tmp_path),
    ):
        raise AssertionError("The block must not run.")
