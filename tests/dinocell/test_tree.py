"""Which `dinov3` is imported."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

from dinocell.tree import TREE_VARIABLE, TreeError, install_finder, tree_imports

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


def test_no_other_finder_fills_the_gaps_of_the_chosen_one(other_tree, monkeypatch):
    """That of an editable installation offers every module of the bundled tree."""

    class Editable:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, None) if "." in name else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable()])
    monkeypatch.setenv(TREE_VARIABLE, str(other_tree))
    with pytest.raises(TreeError, match=r"No module named 'dinov3\.gap'"), tree_imports():
        importlib.import_module("dinov3.gap")  # no other test has imported it
    del sys.modules["dinov3"]


WHERE = """
import multiprocessing

def where():
    import dinov3
    return dinov3.__file__

if __name__ == "__main__":
    import dinocell
    where()
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            print(pool.apply(where))
"""


def test_worker_processes_import_the_chosen_one(other_tree, tmp_path):
    """Although another one stands before it on the path."""
    (tmp_path / "where.py").write_text(WHERE)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": f"{ROOT}:{BUNDLED}:{other_tree}",
        TREE_VARIABLE: str(other_tree),
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "where.py")],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout == f"{other_tree / 'dinov3' / '__init__.py'}\n" * 2


@pytest.fixture
def loaded(other_tree, monkeypatch):
    """The other tree, as if it had been imported."""
    module = types.ModuleType("dinov3")
    module.__file__ = str(other_tree / "dinov3" / "__init__.py")
    module.__path__ = [str(other_tree / "dinov3")]
    monkeypatch.setitem(sys.modules, "dinov3", module)
    return module


def test_one_that_was_imported_before_is_checked(loaded, other_tree, tmp_path, monkeypatch):
    """At the import of its next module, and where DINOCell begins to use it."""

    def refused(message: str) -> None:
        with pytest.raises(TreeError, match=message):
            importlib.import_module("dinov3.next_module")
        with pytest.raises(TreeError, match=message), tree_imports():
            pass

    refused("must be the one that comes with dinocell, got .*tree/dinov3/__init__.py")
    monkeypatch.setenv(TREE_VARIABLE, str(tmp_path))
    refused("must be set before dinov3 is imported, got .* after .*tree/dinov3/__init__.py was")
    monkeypatch.setenv(TREE_VARIABLE, str(other_tree))
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'dinov3\.next_module'"):
        importlib.import_module("dinov3.next_module")
    loaded.DINOCELL_TREE = True
    monkeypatch.delenv(TREE_VARIABLE)
    with tree_imports():
        pass


def test_what_a_tree_lacks_is_one_sentence(other_tree, loaded, monkeypatch):
    monkeypatch.setenv(TREE_VARIABLE, str(other_tree))
    (other_tree / "dinov3" / "wants.py").write_text("import no_such_package")
    for lacking in ("next_module", "wants"):
        with (
            pytest.raises(TreeError, match="must be DINOCell's or a compatible one"),
            tree_imports(),
        ):
            importlib.import_module(f"dinov3.{lacking}")
    with pytest.raises(ModuleNotFoundError, match="'no_such_package'"), tree_imports():
        importlib.import_module("no_such_package")


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
