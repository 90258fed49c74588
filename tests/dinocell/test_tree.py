"""Which `dinov3` is imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from dinocell.tree import TREE_VARIABLE, TreeError, install_finder

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "dinov3_modified"


@pytest.fixture(autouse=True)
def nothing_imported_yet(monkeypatch):
    monkeypatch.delenv(TREE_VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "dinov3", raising=False)
    monkeypatch.setattr(sys, "path", [str(BUNDLED), *sys.path])
    install_finder()


def found() -> Path:
    spec = importlib.util.find_spec("dinov3")
    assert spec is not None
    return Path(str(spec.origin)).parents[1]


@pytest.fixture
def other_tree(tmp_path):
    (tmp_path / "tree" / "dinov3" / "models").mkdir(parents=True)
    (tmp_path / "tree" / "dinov3" / "__init__.py").write_text("")
    return tmp_path / "tree"


def test_the_bundled_one():
    assert found() == BUNDLED


def test_another_one_by_the_variable(other_tree, monkeypatch):
    monkeypatch.setenv(TREE_VARIABLE, str(other_tree))
    assert found() == other_tree
    assert sys.path[0] == str(other_tree), "for the processes that torch starts"


def test_another_one_by_accident_is_refused(other_tree, monkeypatch):
    monkeypatch.syspath_prepend(other_tree)
    with pytest.raises(TreeError, match="must be the one that comes with dinocell") as error:
        found()
    assert str(other_tree) in str(error.value)


def test_a_folder_without_a_tree_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(TREE_VARIABLE, str(tmp_path))
    with pytest.raises(TreeError, match="must be a folder that holds the package dinov3"):
        found()


def test_the_finder_is_installed_once_and_by_importing_dinocell():
    install_finder()
    assert sum(type(finder).__name__ == "_TreeFinder" for finder in sys.meta_path) == 1
    code = "import dinocell, sys; print([type(f).__name__ for f in sys.meta_path][0])"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "_TreeFinder\n"
