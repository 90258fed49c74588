"""A tree (`DINOCELL_DINOV3`, the bundled one by default) beside the bundled one.

Trees never meet in a process: each answers `probe.py` in its own, through files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "dinov3_modified"
PROBE = Path(__file__).with_name("probe.py")

Probe = Callable[[str, Path], Any]

MAKE_FILES = {"weights", "fields", "start", "save", "program"}
"""Questions whose answers are files in the folder, too."""


@pytest.fixture(scope="session")
def tree() -> Path:
    return Path(os.environ.get("DINOCELL_DINOV3") or BUNDLED).resolve()


def _ask(tree: Path, name: str, folder: Path, answers: dict[Any, Any]) -> Any:
    """The answer of a tree; the same question is asked once, as where the tree is the bundled one."""
    notes = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
    question = (tree, name, *((path.name, path.read_text()) for path in notes))
    if question not in answers or name in MAKE_FILES:
        answers[question] = _answer(tree, name, folder)
    return answers[question]


def _answer(tree: Path, name: str, folder: Path) -> Any:
    paths = [str(tree), str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "DINOCELL_DINOV3": str(tree),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROBE), name, str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        pytest.fail(f"{name}: {lines[-1] if lines else done.returncode}\n{done.stderr[-3000:]}")
    result = torch.load(folder / f"{name}.pt", weights_only=False)
    if set(result) == {"absent"}:
        pytest.skip(f"this part of the tree cannot be imported here: {result['absent']}")
    return result


@pytest.fixture(scope="session")
def answers() -> dict[Any, Any]:
    return {}


@pytest.fixture(scope="session")
def ask(tree: Path, answers: dict[Any, Any]) -> Probe:
    """Ask the tree under test."""
    return lambda name, folder: _ask(tree, name, folder, answers)


@pytest.fixture(scope="session")
def ask_bundled(answers: dict[Any, Any]) -> Probe:
    """Ask the bundled tree."""
    return lambda name, folder: _ask(BUNDLED, name, folder, answers)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory, ask_bundled: Probe) -> Callable[..., Path]:
    """A new folder with files that the bundled tree made: weights, start, fields."""
    made = tmp_path_factory.mktemp("given")
    done: set[str] = set()

    def folder(*names: str) -> Path:
        for name in names:
            if name not in done:
                ask_bundled(name, made)
                done.add(name)
        own = tmp_path_factory.mktemp("probe")
        for item in made.iterdir():
            (own / item.name).symlink_to(item)
        return own

    return folder
