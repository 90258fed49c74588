"""A small upstream with a history, and a small series for it; made once and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from upstream_doubles import CORE, HEADER, OURS, Repository, with_lines

from dinocell.upstream.rebase import refresh
from dinocell.upstream.series import Series, read_series


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with the repository `upstream` and the clone `clone`, whose series `refresh` made."""
    root = tmp_path_factory.mktemp("made")
    repository = Repository(root / "upstream")
    repository.git("init", "-q")
    head = repository.commit(
        "first",
        **{
            "dinov3/__init__.py": "",
            "dinov3/models/__init__.py": "",
            "dinov3/core.py": CORE,
            "README.md": "upstream\n",
            "notes/big.txt": "not exported\n",
        },
    )
    folder = root / "clone" / "patches"
    folder.mkdir(parents=True)
    (folder / "UPSTREAM").write_text(
        f"address: https://example.org/upstream\ncommit: {head}\ndate: 2025-01-01\n"
        f"oldest: {head}\nnewest: {head}\n"
    )
    (folder / "series").write_text("# order\nloading.patch\nloop.patch\n")
    (folder / "files").write_text("dinov3/ours.py\ndinov3/more/\n")
    (folder / "loading.patch").write_text(f"{HEADER}Hook: dinov3/core.py load first\n")
    (folder / "loop.patch").write_text(
        f"{HEADER}Hook: dinov3/core.py Trainer.run after total\n"
        "Hook: dinov3/core.py Trainer.run after step\n"
    )
    ours = Repository(root / "clone" / "dinov3_modified")
    ours.write("dinov3/ours.py", OURS)
    ours.write("dinov3/more/deep.py", OURS)
    ours.write("dinov3/more/__pycache__/deep.cpython-311.pyc", "compiled")
    repository.write("dinov3/core.py", with_lines(CORE))
    refresh(repository.folder, read_series(folder))
    repository.git("checkout", "-q", ".")
    return root


@pytest.fixture
def upstream(made, tmp_path) -> Repository:
    shutil.copytree(made / "upstream", tmp_path / "upstream")
    return Repository(tmp_path / "upstream")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """The folder of the series."""
    shutil.copytree(made / "clone", tmp_path / "clone")
    return tmp_path / "clone" / "patches"


@pytest.fixture
def series(folder) -> Series:
    return read_series(folder)
