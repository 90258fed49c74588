"""Run the conformance suite on a tree, and show its result as a table."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from dinocell.errors import UsageError
from dinocell.results.table import align_columns

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

        kinds = ("passed", "failed", "skipped")

        def counts(checks: Iterable[Check]) -> list[int]:
            states = [check.state for check in checks]
            return [states.count(state) for state in kinds]

        table: list[tuple[str, ...]] = [("subject", *kinds)]
        for subject in dict.fromkeys(check.subject for check in self.checks):
            found = counts(c for c in self.checks if c.subject == subject)
            table.append((subject, *map(str, found)))
        lines = [f"tree {self.tree}", *align_columns(table)]
        for state in ("failed", "skipped"):
            chosen = [check for check in self.checks if check.state == state]
            lines += [f"{state}: {check.subject} {check.name}: {check.reason}" for check in chosen]
        passed, failed, skipped = counts(self.checks)
        lines.append(f"{passed} passed, {failed} failed, {skipped} skipped")
        if skipped:
            lines.append(f"not verified: {skipped} checks did not run")
        return "\n".join(lines)


def verify_tree(tree: str | Path, *, keyword: str = "") -> Verification:
    """Run `tests/conformance` on a tree, in a process of its own.

    `tree` is the folder that holds the package `dinov3`; `keyword` is as pytest's -k.

    Raises UsageError (the tree, the suite (if the package was installed from a wheel) or pytest is
    missing).
    """
    tree = Path(tree).resolve()
    if not (tree / "dinov3" / "models").is_dir():
        raise UsageError(
            f"`tree` must be the root of a checkout, with the package dinov3 in it, got {tree}: "
            "check the path"
        )
    if not _SUITE.is_dir():
        raise UsageError(
            f"Verification needs a clone of DINOCell, because the conformance suite is not part of the "
            f"installed package (missing: {_SUITE}): clone the repository and run pip install -e '.[test]' "
            "there"
        )
    with tempfile.TemporaryDirectory(prefix="dinocell-verify-") as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable, "-m", "pytest", str(_SUITE), "-q", "--no-header", "--tb=short",
            "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", f"--junitxml={report}",
        ]  # fmt: skip
        if keyword:
            command += ["-k", keyword]
        environment = {**os.environ, "DINOCELL_DINOV3": str(tree)}
        how: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
        done = subprocess.run(command, cwd=_SUITE.parents[1], env=environment, **how)
        output = f"{done.stdout}{done.stderr}"
        if "No module named pytest" in output:
            raise UsageError(
                "Verification needs pytest, which is not installed: run pip install -e '.[test]' in the "
                "clone of DINOCell"
            )
        checks = _read_report(report) if report.is_file() else ()
    if not checks:
        tail = "\n".join(output.strip().splitlines()[-5:])
        raise UsageError(
            f"`keyword` must match a test of the suite, but none ran ({tail}): correct the expression"
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
            if inner.tag in ("failure", "error", "skipped"):
                state = "skipped" if inner.tag == "skipped" else "failed"
                text = inner.get("message") or inner.text or ""
                reason = text.strip().partition("\n")[0][:300]
        checks.append(Check(subject.replace("_", " "), name, state, reason))
    return tuple(checks)
