"""The tree may not import `dinocell`, so it has a twin of `dinocell/files.py`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dinov3.cells.files import atomic_path

ROOT = Path(__file__).parents[3]


def functions(path: Path) -> dict[str, str]:
    """The code of a file's functions, without their docstrings."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            node.body = node.body[1 if ast.get_docstring(node) else 0 :]
            found[node.name] = ast.unparse(node)
    return found


def test_the_twins_have_one_code():
    """They differ in the class of the error for a folder, and in the folders that `dinocell` keeps."""
    theirs = functions(ROOT / "dinocell" / "files.py")
    ours = functions(ROOT / "dinov3_modified" / "dinov3" / "cells" / "files.py")
    assert "atomic_path" in ours
    for here, there in (
        ("DINOCellError", "ValueError"),
        ("ensure_folder(final.parent)", "final.parent.mkdir(parents=True, exist_ok=True)"),
    ):
        theirs = {name: code.replace(here, there) for name, code in theirs.items()}
    assert ours == {name: theirs[name] for name in ours}


def test_a_folder_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="`path` must be the name of a file"),
        atomic_path(tmp_path),
    ):
        raise AssertionError("The block must not run.")
