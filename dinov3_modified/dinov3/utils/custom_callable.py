"""A function of a file by its name (matches `dinov3.utils.custom_callable`)."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_custom_callable(module_path: str | Path, callable_name: str) -> Callable[..., Any]:
    """Import a Python file and return one of its functions.

    `module_path`: of the file; its folder can be imported from while it is loaded.  Raises
    FileNotFoundError (no such file); AttributeError (it has no such function).
    """
    path = Path(module_path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"A script must be a file, got {module_path}: check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    if not hasattr(module, callable_name):
        raise AttributeError(
            f"{path} must have the function {callable_name}, got none of this name: see --callable-name"
        )
    return getattr(module, callable_name)
