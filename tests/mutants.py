"""Mutation testing with cosmic-ray: small faults in a module, one at a time, and the tests that see them.

`make mutants FILES="dinocell/evaluation/matching.py"` mutates a copy of this clone, runs the module's
own tests on each mutant, and lists the mutants that survive.  A module has hundreds of mutants; a
seeded sample of them (`SAMPLE=150 SEED=1`) estimates the share that the tests kill, and `SAMPLE=all`
takes every one.

Left out, because no test can see them: mutants of annotations (never evaluated) and removed
decorators (numba's leave the result as it is; those of dataclasses and contexts break at import).

What makes it quick enough for modules with numba kernels: they run without compilation, which would
take seconds per mutant; tests that take more than `QUICK_S` so are left out, and the others run from
the quickest to the slowest until one fails; and each mutant is tested in a copy (fork) of a process
that has imported all that the tests import, but for what stands in this clone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
DINOV3 = "dinov3_modified/dinov3"
# Tests of a module that do not stand in a file of its name.
TESTS = {
    f"{DINOV3}/loss/dino_clstoken_loss.py": ["tests/dinov3/loss"],
    f"{DINOV3}/loss/gram_loss.py": ["tests/dinov3/loss"],
    f"{DINOV3}/loss/ibot_patch_loss.py": ["tests/dinov3/loss"],
    f"{DINOV3}/loss/koleo_loss.py": ["tests/dinov3/loss"],
    f"{DINOV3}/cells/sinkhorn.py": ["tests/dinov3/loss"],
    f"{DINOV3}/cells/patch_cross_entropy.py": ["tests/dinov3/loss"],
    f"{DINOV3}/cells/ssl_losses.py": ["tests/dinov3/train/test_ssl_meta_arch.py"],
    f"{DINOV3}/data/augmentations_multiview.py": ["tests/dinov3/data/test_multiview.py"],
    "dinocell/segmentation/levels.py": ["tests/dinocell/segmentation/test_watershed.py"],
    "dinocell/segmentation/markers.py": ["tests/dinocell/segmentation/test_watershed.py"],
    "dinocell/results/convex_hull.py": ["tests/dinocell/results/test_measure.py"],
    "dinocell/results/runs.py": ["tests/dinocell/results/test_measure.py"],
    "dinocell/results/shape_kernels.py": ["tests/dinocell/results/test_measure.py"],
    "dinocell/results/outlines.py": ["tests/dinocell/results/test_exports.py"],
    f"{DINOV3}/cells/photometrics.py": ["tests/dinov3/data/test_multiview.py"],
}
QUICK_S = 1.0
"""Tests that take more processor time are left out."""
SLOWEST = 4.0
"""A test that takes this many times as long as it may is stopped, and the mutant counts as killed."""
_TOO_LONG = "takes more processor time than quick tests may"
HANGS_S = 900.0
"""Tests that wait for so long are stopped as well."""


def tests_of(path: str) -> list[str]:
    """The test files of a module: those of `TESTS`, or all named `test_MODULE.py`."""
    if path in TESTS:
        return TESTS[path]
    found = sorted((ROOT / "tests").rglob(f"test_{Path(path).stem}.py"))
    if not found:
        raise SystemExit(f"{path} must have a test file test_{Path(path).stem}.py: add it to TESTS")
    return [file.relative_to(ROOT).as_posix() for file in found]


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last place (line, column) of every annotation."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                end = (part.end_lineno or 0, part.end_col_offset or 0)
                spans.append(((part.lineno, part.col_offset), end))
    return spans


def copied(folder: Path) -> Path:
    """The files that git tracks, or would track, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def prepare(tree: Path, source: str) -> None:
    """Let this process, and those it starts, import from the copy, the same way each time."""
    data = os.environ.get("DINOCELL_DATA", str(ROOT / ".." / "shared" / "data"))
    folders = [str(tree), str(tree / "dinov3_modified")]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.environ["PYTHONDONTWRITEBYTECODE"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DINOCELL_DATA"] = str(Path(data).resolve())
    if "njit" in source:
        os.environ["NUMBA_DISABLE_JIT"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:0] = folders
    os.chdir(tree)


class Timed:
    """Plugin of pytest that measures the processor time of each test, and signals if it is too long."""

    limit_s = SLOWEST * QUICK_S  # nobody handles the signal, and it ends the process

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.running, begun = item.nodeid, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self.limit_s)
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.seconds[item.nodeid], self.running = time.process_time() - begun, ""
        return result


class Record(Timed):
    """Plugin that stops tests that are not quick, and writes what it saw."""

    limit_s = QUICK_S

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.failed: dict[str, str] = {}
        self.modules: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.seconds]

    def pytest_sessionstart(self) -> None:
        def stop(*_: Any) -> None:
            pytest.fail(_TOO_LONG)

        signal.signal(signal.SIGPROF, stop)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext

    def pytest_sessionfinish(self) -> None:
        self.modules = [
            name
            for name, module in sys.modules.items()
            if not str(getattr(module, "__file__", "")).startswith(os.getcwd())
        ]
        self.file.write_text(json.dumps([self.seconds, self.failed, self.modules, self.running]))

    def read(self) -> bool:
        """Take over what the process wrote; whether it ran all tests, as a stop may end it."""
        self.seconds, self.failed, self.modules, stopped = json.loads(self.file.read_text())
        if stopped:
            self.seconds[stopped], self.failed[stopped] = math.inf, _TOO_LONG
        return not stopped


class Order(Timed):
    """Plugin that runs some of the tests, the quickest first."""

    def __init__(self, chosen: dict[str, float]) -> None:
        super().__init__()
        self.chosen = chosen

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = [item for item in items if item.nodeid in self.chosen]
        items[:] = sorted(found, key=lambda item: self.chosen[item.nodeid])


def tested(paths: list[str], plugin: Timed, *options: str) -> bool:
    """Whether the tests pass, in a copy of this process."""

    def run() -> None:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = (open(os.devnull, "w") for _ in range(2))  # noqa: SIM115
        arguments = ["-q", "-n0", "--assert=plain", "-p", "no:cacheprovider",
                     "--hypothesis-seed=0", *options, *paths]  # fmt: skip
        os._exit(pytest.main(arguments, plugins=[plugin]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(HANGS_S)
    passed = process.exitcode == 0
    assert process.pid
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
    process.join()
    return passed


def quick_tests(path: str, folder: Path) -> dict[str, float]:
    """Seconds of each test of a module that is quick; imports what the tests import."""
    record = Record(folder / "record.json")
    finished = False
    while not finished:
        tested(tests_of(path), record)
        finished = record.read()
    seconds, failed = record.seconds, record.failed
    for test, report in failed.items():
        if _TOO_LONG not in report:
            raise SystemExit(
                f"the tests of {path} must pass before it is mutated:\n{test}\n{report}"
            )
        del seconds[test]
    print(f"{path}: {len(seconds)} tests, {sum(seconds.values()):.0f} s", flush=True)
    print("".join(f"  left out, takes too long: {test}\n" for test in failed), end="", flush=True)
    for name in record.modules:
        with contextlib.suppress(Exception):  # a part that a package imports in its own way
            importlib.import_module(name)
    return seconds


def mutants(source: str) -> list[tuple[tuple[int, int], str, int]]:
    """Place, operator and occurrence of each mutant, but for those that no test can see."""
    spans = annotated(source)
    tree = get_ast(source)
    found = []
    for name in operator_names():
        if "Decorator" in name or get_operator(name).arguments():
            continue
        operator = get_operator(name)()
        starts = [
            start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)
        ]
        found += [
            (start, name, occurrence)
            for occurrence, start in enumerate(starts)
            if not any(first <= start < last for first, last in spans)
        ]
    return sorted(found)


def mutate(path: str, sample: int | None, seed: int) -> tuple[int, int]:
    """(killed, run) mutants of one module; prints those that survive."""
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = copied(Path(folder).resolve() / "tree")
        source = (tree / path).read_text(encoding="utf-8")
        prepare(tree, source)
        seconds = quick_tests(path, Path(folder))
        found = mutants(source)
        chosen = found if sample is None else random.Random(seed).sample(
            found, min(sample, len(found)))  # fmt: skip
        print(f"{path}: {len(chosen)} of {len(found)} mutants", flush=True)
        begun = time.monotonic()
        if not tested(tests_of(path), Order(seconds), "-x"):
            raise SystemExit(f"the quick tests of {path} must pass in a copy of the process")
        survivors = 0
        for _, name, occurrence in sorted(chosen):
            code = mutate_code(source, get_operator(name)(), occurrence)
            (tree / path).write_text(code, encoding="utf-8")
            if tested(tests_of(path), Order(seconds), "-x"):
                survivors += 1
                print(f"survived: {name} {occurrence}")
                lines = difflib.unified_diff(source.split("\n"), code.split("\n"), lineterm="")
                print("\n".join(list(lines)[2:]), flush=True)
        killed, minutes = len(chosen) - survivors, (time.monotonic() - begun) / 60
    print(f"{path}: {killed} of {len(chosen)} killed, {minutes:.0f} minutes", flush=True)
    return killed, len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="modules, from the top of the clone")
    parser.add_argument("--sample", default="50", help="mutants per module, or all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    options = parser.parse_args()
    sample = None if options.sample == "all" else int(options.sample)
    # Each module gets a process that has imported nothing yet.
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        totals = list(pool.map(mutate, options.files, [sample] * len(options.files),
                               [options.seed] * len(options.files)))  # fmt: skip
    killed, count = (sum(column) for column in zip(*totals, strict=True))
    print(f"all: {killed} of {count} killed ({killed / count:.0%})")


if __name__ == "__main__":
    main()
