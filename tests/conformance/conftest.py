"""A tree (`DINOCELL_DINOV3`, the bundled one by default) beside the bundled one.

Trees never meet in a process: each answers `probe.py` in its own, through files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
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


class Respondent:
    """A tree that answers questions; the same one is asked once, as where the tree is the bundled one."""

    def __init__(self, tree: Path) -> None:
        paths = [str(tree), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "DINOCELL_DINOV3": str(tree),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(PROBE)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answers: dict[Any, Any] = {}

    def __call__(self, name: str, folder: Path) -> Any:
        notes = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt"))
        question = (name, *((path.name, path.read_text()) for path in notes))
        if question not in self.answers or name in MAKE_FILES:
            self.answers[question] = self._answer(name, folder)
        return self.answers[question]

    def _answer(self, name: str, folder: Path) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {folder}\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        if code != "0":
            errors = folder / f"{name}.err"
            text = errors.read_text() if errors.exists() else f"the tree does not start ({code})"
            pytest.fail(f"{name}: {text.strip().splitlines()[-1]}\n{text[-3000:]}")
        result = torch.load(folder / f"{name}.pt", weights_only=False)
        if set(result) == {"absent"}:
            pytest.skip(f"this part of the tree cannot be imported here: {result['absent']}")
        return result


@pytest.fixture(scope="session")
def ask_bundled() -> Iterator[Probe]:
    """Ask the bundled tree."""
    respondent = Respondent(BUNDLED)
    yield respondent
    respondent.process.communicate()


@pytest.fixture(scope="session")
def ask(tree: Path, ask_bundled: Probe) -> Iterator[Probe]:
    """Ask the tree under test."""
    respondent = ask_bundled if tree == BUNDLED else Respondent(tree)
    yield respondent
    if tree != BUNDLED:
        respondent.process.communicate()


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
