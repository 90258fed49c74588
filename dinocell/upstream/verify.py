"""Run the conformance suite on a tree, and show its result as a table."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from dinocell.errors import UsageError

_SUITE = Path(__file__).resolve().parents[2] / "tests" / "conformance"


@dataclass(frozen=True)
class Check:
    """One test: its subject, its name, `passed`, `failed` or `skipped`, and why."""

    subject: str
    name: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """Result of the suite on a tree."""

    tree: Path
    checks: tuple[Check, ...]
    output: str

    @property
    def passed(self) -> bool:
        """Every check ran and succeeded.  A tree with a skipped check is not verified."""
        return bool(self.checks) and all(check.state == "passed" for check in self.checks)

    def text(self) -> str:
        """One line per subject with its counts, then everything that failed or was skipped."""
        subjects: dict[str, list[Check]] = {}
        for check in self.checks:
            subjects.setdefault(check.subject, []).append(check)
        lines = [f"tree {self.tree}", f"{'subject':<24}{'passed':>8}{'failed':>8}{'skipped':>9}"]
        for subject, checks in subjects.items():
            counts = [sum(c.state == s for c in checks) for s in ("passed", "failed", "skipped")]
            lines.append(f"{subject:<24}{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}")
        for state in ("failed", "skipped"):
            chosen = [check for check in self.checks if check.state == state]
            lines += [f"{state}: {check.subject} {check.name}: {check.reason}" for check in chosen]
        total = [sum(c.state == s for c in self.checks) for s in ("passed", "failed", "skipped")]
        lines.append(f"{total[0]} passed, {total[1]} failed, {total[2]} skipped")
        if total[2]:
            lines.append(f"not verified: {total[2]} checks did not run")
        return "\n".join(lines)


def verify_tree(tree: str | Path, *, keyword: str = "") -> Verification:
    """Run `tests/conformance` on a tree, in a process of its own.

    Parameters
    ----------
    tree : path
        Folder that holds the package `dinov3`.
    keyword : str
        As pytest's -k.

    Raises
    ------
    UsageError
        The tree, the suite (if the package was installed from a wheel) or pytest is missing.
    """
    tree = Path(tree).resolve()
    if not (tree / "dinov3" / "models").is_dir():
        raise UsageError(
            f"`tree` must be a folder that holds the package dinov3, got {tree}: name the root of a "
            "checkout"
        )
    if not _SUITE.is_dir():
        raise UsageError(
            f"verification needs a clone of DINOCell, because the conformance suite is not part of the "
            f"installed package (missing: {_SUITE}): clone the repository and run pip install -e '.[test]' "
            "there"
        )
    with tempfile.TemporaryDirectory(prefix="dinocell-verify-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", str(_SUITE), "-q", "--no-header", "--tb=short",
            "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}",
        ]  # fmt: skip
        if keyword:
            command += ["-k", keyword]
        done = subprocess.run(
            command,
            cwd=_SUITE.parents[1],
            env={**os.environ, "DINOCELL_DINOV3": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
        output = f"{done.stdout}{done.stderr}"
        if "No module named pytest" in output:
            raise UsageError(
                "verification needs pytest, which is not installed: pip install -e '.[test]'"
            )
        checks = _read_report(report) if report.is_file() else ()
    if not checks:
        tail = "\n".join(output.strip().splitlines()[-5:])
        raise UsageError(
            f"`keyword` must match a test of the suite, but none ran ({tail}): correct it"
        )
    return Verification(tree, checks, output)


def _read_report(path: Path) -> tuple[Check, ...]:
    """JUnit's XML as pytest writes it."""
    checks = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        subject = case.get("classname", "").rpartition(".")[2].removeprefix("test_")
        name = case.get("name", "").removeprefix("test_").replace("_", " ")
        state, reason = "passed", ""
        for inner in case:
            if inner.tag in ("failure", "error"):
                state, reason = "failed", _line(inner.get("message") or inner.text or "")
            elif inner.tag == "skipped":
                state, reason = "skipped", _line(inner.get("message") or "")
        checks.append(Check(subject.replace("_", " "), name, state, reason))
    return tuple(checks)


def _line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else ""
