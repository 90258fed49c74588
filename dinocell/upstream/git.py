"""Git merges, on a copy of the index and with an object store of its own.

Nothing here writes to a checkout, its index or its objects.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dinocell.errors import UsageError
from dinocell.upstream.series import PatchError, marked_name

_OLDEST_GIT = (2, 32)  # before it, --3way tried the line numbers first
_SETTINGS = (
    "core.autocrlf=false", "core.quotepath=false", "apply.whitespace=nowarn",
    "apply.ignorewhitespace=no", "merge.conflictstyle=merge", "core.fsmonitor=false",
)  # fmt: skip


def run_git(
    folder: Path, *arguments: str, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder, with fixed values of the settings that change merges.

    Raises UsageError (git is not installed).
    """
    command = ["git", "-C", str(folder), *(x for setting in _SETTINGS for x in ("-c", setting))]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    variables |= {"LC_ALL": "C", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    variables["GIT_OPTIONAL_LOCKS"] = "0"  # looking does not refresh the index
    variables |= environment
    try:
        return subprocess.run(
            [*command, *arguments], input=stdin, capture_output=True, env=variables, check=False
        )
    except FileNotFoundError as error:
        raise UsageError("Git must be installed, but no folder of PATH holds it") from error


def _check_version() -> None:
    answer = run_git(Path("."), "--version").stdout.decode(errors="replace")
    found = re.search(r"(\d+)\.(\d+)", answer)
    if found is None or (int(found[1]), int(found[2])) < _OLDEST_GIT:
        raise UsageError(
            f"Git must be {'.'.join(map(str, _OLDEST_GIT))} or newer, got {answer.strip()}: older versions "
            "place additions by their line numbers; update git"
        )


@dataclass(frozen=True)
class Commit:
    """A commit: its 40 digits, its date (YYYY-MM-DD) and the first line of its message."""

    id: str
    date: str
    subject: str


@dataclass(frozen=True)
class ThreeSides:
    """One place of a merge conflict: its line in upstream's file, upstream's lines and ours."""

    line: int
    upstream: tuple[str, ...]
    ours: tuple[str, ...]


class Scratch:
    """A temporary repository for trial merges, on top of that of a checkout.

    Use it as a context manager; what it wrote is deleted afterwards.

    Raises UsageError (`checkout` is not a git checkout, or git is too old).
    """

    def __init__(self, checkout: str | Path) -> None:
        self.checkout = Path(checkout)
        _check_version()
        if not self.checkout.is_dir():
            raise UsageError(f"`checkout` must be a folder, got {checkout}: clone upstream there")
        found = run_git(self.checkout, "rev-parse", "--absolute-git-dir")
        if found.returncode:
            raise UsageError(
                f"`checkout` must be a git checkout of DINOv3, got {checkout} "
                f"({_last_line(found.stderr)}): clone upstream there"
            )
        self.git_dir = Path(os.fsdecode(found.stdout.strip()))
        objects = run_git(self.checkout, "rev-parse", "--git-path", "objects").stdout.strip()
        self._objects = (self.checkout / os.fsdecode(objects)).resolve()
        self._folder = Path(tempfile.mkdtemp(prefix="dinocell-upstream-"))
        (self._folder / "objects" / "pack").mkdir(parents=True)
        self._environment = {
            "GIT_DIR": str(self.git_dir),
            "GIT_INDEX_FILE": str(self._folder / "index"),
            "GIT_OBJECT_DIRECTORY": str(self._folder / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(self._objects),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self, *arguments: str, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return run_git(self._folder, *arguments, stdin=stdin, **self._environment)

    def top(self) -> Path:
        """Root of the work tree; UsageError for a bare repository."""
        found = run_git(self.checkout, "rev-parse", "--show-toplevel")
        if found.returncode:
            raise UsageError(
                f"`checkout` must have a work tree, got the bare repository {self.checkout}: clone it"
            )
        return Path(os.fsdecode(found.stdout.rstrip(b"\n")))

    def commit(self, reference: str) -> Commit:
        """The commit that a reference names; UsageError if the repository does not know it."""
        found = self.run("log", "-1", "--format=%H%n%cs%n%s", f"{reference}^{{commit}}", "--")
        if found.returncode:
            raise UsageError(
                f"{self.checkout} must know the commit, got {reference}: git fetch it there"
            )
        name, date, subject = found.stdout.decode("utf-8", "replace").split("\n")[:3]
        return Commit(name, date, subject)

    def is_ancestor(self, older: str, newer: str) -> bool:
        return self.run("merge-base", "--is-ancestor", older, newer).returncode == 0

    def describe(self, commit: str) -> str:
        """Nearest tag before a commit, or the branches that end with it; empty if neither exists."""
        tag = self.run("describe", "--tags", commit)
        if tag.returncode == 0:
            return tag.stdout.decode().strip()
        heads = self.run("for-each-ref", "--points-at", commit, "--format=%(refname:short)")
        return ", ".join(heads.stdout.decode().split()[:3])

    def entries(self, commit: str, paths: Sequence[str] = ()) -> dict[str, str]:
        """Path → blob of a commit's files, of all or of some."""
        found = self.run("ls-tree", "-r", "-z", commit, "--", *paths)
        entries = {}
        for item in found.stdout.decode("utf-8", "surrogateescape").split("\0"):
            facts, _, path = item.partition("\t")
            if path and facts.split()[1] == "blob":
                entries[path] = facts.split()[2]
        return entries

    def has(self, blob: str) -> bool:
        return self.run("cat-file", "-e", blob).returncode == 0

    def read(self, blob: str) -> bytes:
        """Contents of an object; PatchError if the repository lacks it, as partial clones do."""
        found = self.run("cat-file", "blob", blob)
        if found.returncode:
            raise PatchError(
                f"The checkout must hold its files, got none for {blob} "
                f"({_last_line(found.stderr)}): clone {self.checkout} again, without a filter"
            )
        return found.stdout

    def renamed(self, old: str, new: str, path: str) -> str:
        """New path of a file that was renamed between two commits; empty if it was not renamed."""
        found = self.run("diff", "-M", "--diff-filter=R", "--name-status", "-z", old, new)
        parts = found.stdout.decode("utf-8", "surrogateescape").split("\0")
        for place in range(0, len(parts) - 2, 3):
            if parts[place + 1] == path:
                return parts[place + 2]
        return ""

    # --- merging ---

    def begin(self, commit: str) -> None:
        """An index with the files of a commit; PatchError if git cannot read it."""
        done = self.run("read-tree", commit)
        if done.returncode:
            reason = _last_line(done.stderr)
            raise PatchError(f"The checkout must hold commit {commit} ({reason}): git fetch it")

    def apply(self, patch: str) -> bool:
        """Merge a patch into the index; true if every hunk found its place."""
        done = self.run("apply", "--3way", "--cached", "--unidiff-zero", "-", stdin=patch.encode())
        return done.returncode == 0

    def staged(self, path: str, stage: int = 0) -> bytes | None:
        found = self.run("cat-file", "blob", f":{stage}:{path}")
        return found.stdout if found.returncode == 0 else None

    def sides(self, path: str) -> list[ThreeSides]:
        """The places of a file where the last merge met a conflict."""
        names = []
        for stage in (2, 1, 3):  # upstream's, the base, ours
            version = self.staged(path, stage)
            if version is None:
                return []
            names.append(str(self._folder / f"side-{stage}"))
            Path(names[-1]).write_bytes(version)
        labels = ["-L", "upstream", "-L", "base", "-L", "ours"]
        merged = self.run("merge-file", "-p", *labels, *names)
        return _conflicts(merged.stdout.decode("utf-8", "replace"))


def _conflicts(text: str) -> list[ThreeSides]:
    found = []
    upstream, ours, side, line, start = list[str](), list[str](), None, 0, 0
    for item in text.splitlines():
        if item.startswith("<<<<<<< upstream"):
            upstream, ours, start = [], [], line + 1
            side = upstream
        elif item == "=======" and side is upstream:
            side = ours
        elif item.startswith(">>>>>>> ours") and side is ours:
            found.append(ThreeSides(start, tuple(upstream), tuple(ours)))
            side = None
        elif side is not None:
            side.append(item)
            line += side is upstream
        else:
            line += marked_name(item) is None  # else it is ours, merged before
    return found


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no message"
