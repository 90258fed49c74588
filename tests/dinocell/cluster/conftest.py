"""A SLURM that answers what a test has written down, and an account of its own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

# The name of a file cannot hold a slash, so that arguments with paths are looked up with _.
ANSWERING = """#!/bin/sh
words="${0##*/} $*"
printf '%s\\n' "$words" >> FOLDER/calls
answer=FOLDER/answers/$(printf %s "$words" | tr / _)
[ -f "$answer" ] || answer=FOLDER/answers/${0##*/}
[ -f "$answer" ] || { echo "nothing is known of: $words" >&2; exit 1; }
. "$answer"
"""


class FakeSlurm:
    """Commands of SLURM on PATH that note their arguments and give the answers that a test sets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        (folder / "answers").mkdir()
        for name in ("sbatch", "srun", "scontrol", "sacct", "sinfo", "squeue"):
            script = self.bin / name
            script.write_text(ANSWERING.replace("FOLDER", shlex.quote(str(folder))))
            script.chmod(0o755)
        self.answer("scontrol show config", "ClusterName             = north\n")

    def answer(self, words: str, out: str = "", *, error: str = "", code: int = 0) -> None:
        """To a command with these arguments, or with any for its name alone."""
        self.script(
            words,
            f"printf %s {shlex.quote(out)}; printf %s {shlex.quote(error)} >&2; exit {code}",
        )

    def script(self, words: str, text: str) -> None:
        """Lines of shell in place of an answer."""
        path = self.folder / "answers" / words.replace("/", "_")
        path.with_suffix(".new").write_text(text + "\n")
        path.with_suffix(".new").replace(path)  # at once: a supervisor may be asking

    def job(self, number: str, **values: object) -> None:
        """What the controller says of one job."""
        shown = {"JobId": number, "JobState": "RUNNING", "Reason": "None", "Restarts": 0} | values
        line = " ".join(f"{key}={value}" for key, value in shown.items())
        self.answer(f"scontrol show job -o {number.split('_')[0]}", line + "\n")

    def calls(self) -> list[str]:
        """Commands in the order in which they were called."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture(autouse=True)
def _account_of_its_own(monkeypatch, tmp_path_factory) -> None:
    """No test sees the jobs or sites of whoever runs it, nor the job that the tests may run in."""
    home = tmp_path_factory.mktemp("account")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("DINOCELL_SITE", "DINOCELL_SITES"):
            monkeypatch.delenv(name)


@pytest.fixture
def slurm(monkeypatch, tmp_path_factory) -> FakeSlurm:
    fake = FakeSlurm(tmp_path_factory.mktemp("slurm"))
    monkeypatch.setenv("PATH", f"{fake.bin}:{os.environ['PATH']}")
    return fake


@pytest.fixture
def no_slurm(monkeypatch, tmp_path_factory) -> None:
    """A machine without SLURM, also where this one has it."""
    monkeypatch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
