"""Which `dinov3` an `import dinov3` finds: the bundled tree, or the one that `DINOCELL_DINOV3` names.

Every module imports `dinov3` in the ordinary way.  A finder in front of Python's own decides, when
`dinov3` is first imported, where the package lies, and refuses any other package of that name.  Where
`dinov3` was imported before, the finder checks it when the next of its modules is imported.  The checks
wait until then because `import dinocell` must work (for `dinocell --help`) whatever is installed.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from dinocell.errors import UsageError

TREE_VARIABLE = "DINOCELL_DINOV3"
_BUNDLED_MARK = "DINOCELL_TREE"


class TreeError(UsageError, ImportError):
    """The package `dinov3` that was found is not one that DINOCell can use."""


class _TreeFinder:
    """A finder of `sys.meta_path` for the package `dinov3`; it finds nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        chosen = os.environ.get(TREE_VARIABLE)
        if name.startswith("dinov3."):
            _check_loaded_tree()
            if chosen and PathFinder.find_spec(name, path) is None:
                # The finder of an editable installation would take what is missing from the bundled tree.
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name != "dinov3":
            return None
        if chosen:
            return _spec_of_chosen_tree(chosen)
        spec = _spec_without(self, name)
        if spec is not None and not _is_bundled(spec.origin):
            raise _not_the_bundled(spec.origin or list(spec.submodule_search_locations or []))
        return spec


def _spec_of_chosen_tree(folder: str) -> ModuleSpec:
    if not (Path(folder) / "dinov3" / "models").is_dir():
        raise TreeError(
            f"{TREE_VARIABLE} must be a folder that holds the package dinov3, got {folder}: "
            "name the root of a DINOv3 checkout"
        )
    spec = PathFinder.find_spec("dinov3", [folder])
    if spec is None:
        raise TreeError(
            f"{TREE_VARIABLE} must hold a Python package dinov3, got {folder}: name another checkout"
        )
    # Worker processes that torch starts, and upstream's own scripts, look along this path and must find
    # the same tree.
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]
    return spec


def _check_loaded_tree() -> None:
    """Refuse a `dinov3` that was imported before and is not the tree to use."""
    loaded = sys.modules.get("dinov3")
    if loaded is None:
        return
    chosen = os.environ.get(TREE_VARIABLE)
    if chosen:
        roots = [Path(folder).resolve().parent for folder in getattr(loaded, "__path__", [])]
        if Path(chosen).resolve() not in roots:
            raise TreeError(
                f"{TREE_VARIABLE} must be set before dinov3 is imported, got {chosen} after "
                f"{_place(loaded)} was imported: set it in the environment of the process"
            )
    elif not getattr(loaded, _BUNDLED_MARK, False):
        raise _not_the_bundled(_place(loaded))


def _not_the_bundled(found: object) -> TreeError:
    return TreeError(
        f"The package dinov3 must be the one that comes with dinocell, got {found}: "
        f"uninstall the other, or set {TREE_VARIABLE} to its folder if you mean to use it"
    )


def _place(package: ModuleType) -> object:
    return getattr(package, "__file__", None) or list(getattr(package, "__path__", []))


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


@contextmanager
def tree_imports() -> Iterator[None]:
    """Around imports of `dinov3`: a tree that lacks what they need is a `TreeError`.

    Raises TreeError (the `dinov3` in memory is not the tree to use, or a module or name of it does
    not exist, or the tree that `DINOCELL_DINOV3` names needs a package that is not installed).
    """
    _check_loaded_tree()
    try:
        yield
    except TreeError:
        raise
    except ImportError as error:
        modules = [error.name or ""]
        if os.environ.get(TREE_VARIABLE):
            frames = traceback.walk_tb(error.__traceback__)
            modules += [str(frame.f_globals.get("__name__")) for frame, _ in frames]
        if all(module.partition(".")[0] != "dinov3" for module in modules):
            raise
        loaded = sys.modules.get("dinov3")
        found = "none" if loaded is None else _place(loaded)
        raise TreeError(
            f"The package dinov3 must be DINOCell's or a compatible one, got {found} ({error}): "
            f"uninstall the other, or set {TREE_VARIABLE} to the tree to use"
        ) from error


def tree_is_bundled() -> bool:
    """Whether `dinov3` is the tree that comes with DINOCell; imports it.

    Raises TreeError (`DINOCELL_DINOV3` names no DINOv3 tree, or another package `dinov3` is
    installed).
    """
    import dinov3

    return bool(getattr(dinov3, _BUNDLED_MARK, False))
