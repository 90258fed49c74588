"""Training checkpoints: written whole or not at all, a few newest kept, read without pickle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dinocell.errors import CheckpointError
from dinocell.files import atomic_path

_NAME = re.compile(r"step_(\d+)\.pt")


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint in `folder`, oldest first; empty when there is none."""
    found = []
    for path in Path(folder).glob("step_*.pt"):
        match = _NAME.fullmatch(path.name)
        if match:
            found.append((int(match.group(1)), path))
    return sorted(found)


def save_checkpoint(folder: str | Path, step: int, state: dict[str, Any], *, keep: int) -> Path:
    """Write `step_NNNNNNNN.pt` under a temporary name, rename, then drop all but the newest `keep`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.pt"
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    for _, old in find_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary that `save_checkpoint` was given, tensors on the CPU.

    Raises CheckpointError (truncated, or with objects other than tensors, numbers, text, lists and
    dicts).
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"a training checkpoint must be complete, got {path} ({reason}): delete it to "
            "continue from the one before"
        ) from error
