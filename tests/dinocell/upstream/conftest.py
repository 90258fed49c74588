"""A small upstream with a history, and a small series for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from upstream_doubles import CORE, HEADER, OURS, Repository, with_lines

from dinocell.upstream.rebase import refresh
from dinocell.upstream.series import Series, read_series


@pytest.fixture
def upstream(tmp_path) -> Repository:
    repository = Repository(tmp_path / "upstream")
    repository.git("init", "-q")
    repository.commit(
        "first",
        **{
            "dinov3/__init__.py": "",
            "dinov3/models/__init__.py": "",
            "dinov3/core.py": CORE,
            "README.md": "upstream\n",
            "notes/big.txt": "not exported\n",
        },
    )
    return repository


@pytest.fixture
def folder(tmp_path, upstream) -> Path:
    """Folder of a series that `refresh` made from an edited checkout."""
    folder = tmp_path / "clone" / "patches"
    folder.mkdir(parents=True)
    head = upstream.git("rev-parse", "HEAD")
    (folder / "UPSTREAM").write_text(
        f"address: https://example.org/upstream\ncommit: {head}\ndate: 2025-01-01\n"
        f"oldest: {head}\nnewest: {head}\n"
    )
    (folder / "series").write_text("# order\nloading.patch\nloop.patch\n")
    (folder / "files").write_text("dinov3/ours.py\ndinov3/more/deep.py\n")
    (folder / "loading.patch").write_text(f"{HEADER}Hook: dinov3/core.py load first\n")
    (folder / "loop.patch").write_text(
        f"{HEADER}Hook: dinov3/core.py Trainer.run after total\n"
        "Hook: dinov3/core.py Trainer.run after step\n"
    )
    root = tmp_path / "clone" / "dinov3_modified"
    for name in ("dinov3/ours.py", "dinov3/more/deep.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(OURS)
    upstream.write("dinov3/core.py", with_lines(CORE))
    refresh(upstream.folder, read_series(folder))
    upstream.git("checkout", "-q", ".")
    return folder


@pytest.fixture
def series(folder) -> Series:
    return read_series(folder)
