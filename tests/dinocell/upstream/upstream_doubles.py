"""A small upstream: its file, its repository, and the lines that two patches add."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CORE = '''"""Core."""

import os


def load(path):
    """Read a file."""
    data = os.fspath(path)
    checked = data.strip()
    return checked


def save(path, data):
    """Write a file."""
    target = os.fspath(path)
    return target, data


class Trainer:
    def run(self, steps):
        total = 0
        for step in range(steps):
            total += step
        return total
'''
OURS = "def added(*values):\n    return None\n"
HEADER = """What: a line more
Why: it is needed
Why not a new file: it is where things happen
Updated: 2026-01-02
"""
FIRST = (
    "    from dinov3.ours import added  # dinocell: loading\n    added(path)  # dinocell: loading\n"
)
LOOP = "            added(step, total)  # dinocell: loop\n"
BEFORE = "        from dinov3.ours import added  # dinocell: loop\n"


class Repository:
    """A git repository with short commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def git(self, *arguments: str) -> str:
        environment = {
            **os.environ,
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b", "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
            "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
        }  # fmt: skip
        done = subprocess.run(
            ["git", "-c", "init.defaultBranch=main", "-C", str(self.folder), *arguments],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def write(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def read(self, path: str) -> str:
        return (self.folder / path).read_text()

    def commit(self, message: str, **files: str) -> str:
        for path, text in files.items():
            self.write(path, text)
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)
        return self.git("rev-parse", "HEAD")

    def state(self) -> dict[str, str]:
        """Contents of all files but git's own."""
        return {
            str(path.relative_to(self.folder)): path.read_text()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(self.folder).parts
        }


def with_lines(text: str) -> str:
    """CORE with the two patches' lines."""
    text = text.replace('    """Read a file."""\n', '    """Read a file."""\n' + FIRST)
    text = text.replace("        total = 0\n", "        total = 0\n" + BEFORE)
    return text.replace("            total += step\n", "            total += step\n" + LOOP)
