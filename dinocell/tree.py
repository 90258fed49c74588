"""Which `dinov3` an `import dinov3` finds: the bundled tree, or the one that `DINOCELL_DINOV3` names.

Every module imports `dinov3` in the ordinary way.  A finder in front of Python's own decides, when
`dinov3` is first imported, where the package lies, and refuses any other package of that name.  The check
waits until then because `import dinocell` must work (for `dinocell --help`) whatever is installed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from dinocell.errors import UsageError

__all__ = ["TREE_VARIABLE", "TreeError", "install_finder", "tree_is_bundled"]

TREE_VARIABLE = "DINOCELL_DINOV3"
_BUNDLED_MARK = "DINOCELL_TREE"


class TreeError(UsageError, ImportError):
    """The package `dinov3` that was found is not one that DINOCell can use."""


class _TreeFinder:
    """A finder of `sys.meta_path` for the package `dinov3` and nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "dinov3":
            return None
        chosen = os.environ.get(TREE_VARIABLE)
        if chosen:
            return _spec_of_chosen_tree(chosen)
        spec = _spec_without(self, name)
        if spec is not None and not _is_bundled(spec.origin):
            found = spec.origin or list(spec.submodule_search_locations or [])
            raise TreeError(
                f"the package dinov3 must be the one that comes with dinocell, got {found}: "
                f"uninstall the other, or set {TREE_VARIABLE} to its folder if you mean to use it"
            )
        return spec


def _spec_of_chosen_tree(folder: str) -> ModuleSpec:
    if not (Path(folder) / "dinov3" / "models").is_dir():
        raise TreeError(
            f"{TREE_VARIABLE} must be a folder that holds the package dinov3, got {folder}: "
            "name the root of a DINOv3 checkout"
        )
    spec = PathFinder.find_spec("dinov3", [folder])
    if spec is None:
        raise TreeError(f"{TREE_VARIABLE} must hold a Python package dinov3, got {folder}")
    if folder not in sys.path:
        # Worker processes that torch starts, and upstream's own scripts, look along this path.
        sys.path.insert(0, folder)
    return spec


def _spec_without(finder: _TreeFinder, name: str) -> ModuleSpec | None:
    """What the other finders know of `name`."""
    for other in sys.meta_path:
        if other is not finder and (spec := other.find_spec(name, None, None)) is not None:
            return spec
    return None


def _is_bundled(origin: str | None) -> bool:
    return origin is not None and _BUNDLED_MARK in Path(origin).read_text(encoding="utf-8")


def install_finder() -> None:
    """Put the finder in front of Python's own, once."""
    if not any(type(finder).__name__ == _TreeFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _TreeFinder())


def tree_is_bundled() -> bool:
    """Whether `dinov3` is the tree that comes with DINOCell; imports it.

    Raises
    ------
    TreeError
        `DINOCELL_DINOV3` names no DINOv3 tree, or another package `dinov3` is installed.
    """
    import dinov3

    return bool(getattr(dinov3, _BUNDLED_MARK, False))
