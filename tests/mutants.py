"""Mutation testing with cosmic-ray: small faults in a module, one at a time, and the tests that see them.

`make mutants FILES="dinocell/evaluation/matching.py"` mutates a copy of this clone, runs the module's
own tests on each mutant, and lists the mutants that survive.  A module has hundreds of mutants; a
seeded sample of them estimates the share that the tests kill, and `--all` takes every one.

Left out, because no test can see them: mutants of annotations (never evaluated) and removed
decorators (numba's leave the result as it is; those of dataclasses and contexts break at import).
Modules with numba kernels are tested without compilation, which would take seconds per mutant.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

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
SLOWEST = 4.0  # a mutant that takes this many times as long as the tests do is stopped, and killed


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


def environment(tree: Path, source: str) -> dict[str, str]:
    data = os.environ.get("DINOCELL_DATA", str(ROOT / ".." / "shared" / "data"))
    found = {
        **os.environ,
        "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'dinov3_modified'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "DINOCELL_DATA": str(Path(data).resolve()),
    }
    return {**found, "NUMBA_DISABLE_JIT": "1"} if "numba" in source else found


def leave_out(database: WorkDB, source: str, sample: int | None, seed: int) -> int:
    """Mark the mutants that are not run; the number of those that are."""
    spans = annotated(source)
    items: list[WorkItem] = []
    for item in database.work_items:
        (mutation,) = item.mutations
        start = tuple(mutation.start_pos)
        equal = "Decorator" in mutation.operator_name or any(a <= start < b for a, b in spans)
        if equal:
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
        else:
            items.append(item)
    items.sort(key=lambda item: item.job_id)
    items.sort(key=lambda item: (item.mutations[0].start_pos, item.mutations[0].operator_name,
                                 item.mutations[0].occurrence))  # fmt: skip
    chosen = items if sample is None else random.Random(seed).sample(items, min(sample, len(items)))
    for item in items:
        if item not in chosen:
            database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return len(chosen)


def mutate(path: str, sample: int | None, seed: int) -> tuple[int, int]:
    """(killed, run) mutants of one module; prints those that survive."""
    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        tree = copied(Path(folder) / "tree")
        source = (tree / path).read_text(encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "--assert=plain",
                   "-p", "no:cacheprovider",
                   *tests_of(path)]  # fmt: skip
        variables = environment(tree, source)
        begun = time.monotonic()
        if subprocess.run(command, cwd=tree, env=variables, check=False).returncode:
            raise SystemExit(f"the tests of {path} must pass before it is mutated: run them")
        seconds = time.monotonic() - begun
        (tree / "session.toml").write_text(
            f'[cosmic-ray]\nmodule-path = "{path}"\ntimeout = {SLOWEST * seconds + 10:.0f}\n'
            f"excluded-modules = []\ntest-command = '''{' '.join(command)}'''\n"
            '[cosmic-ray.distributor]\nname = "local"\n'
        )
        run = [sys.executable, "-m", "cosmic_ray.cli"]
        subprocess.run([*run, "init", "session.toml", "session.sqlite"], cwd=tree, env=variables,
                       check=True)  # fmt: skip
        with use_db(str(tree / "session.sqlite"), WorkDB.Mode.open) as database:
            count = leave_out(database, source, sample, seed)
        print(f"{path}: {count} mutants, about {count * seconds / 60:.0f} minutes", flush=True)
        subprocess.run([*run, "exec", "session.toml", "session.sqlite"], cwd=tree, env=variables,
                       check=True)  # fmt: skip
        with use_db(str(tree / "session.sqlite"), WorkDB.Mode.open) as database:
            results = dict(database.results)
            survivors = [
                item
                for item in database.work_items
                if results[item.job_id].test_outcome == TestOutcome.SURVIVED
            ]
            for item in survivors:
                print(f"survived: {item.mutations[0].operator_name}")
                print(results[item.job_id].diff, flush=True)
    print(f"{path}: {count - len(survivors)} of {count} killed", flush=True)
    return count - len(survivors), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="modules, from the top of the clone")
    parser.add_argument("--sample", type=int, default=50, help="mutants per module (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--all", action="store_true", help="every mutant instead of a sample")
    options = parser.parse_args()
    totals = [mutate(file, None if options.all else options.sample, options.seed)
              for file in options.files]  # fmt: skip
    killed, count = (sum(column) for column in zip(*totals, strict=True))
    print(f"all: {killed} of {count} killed ({killed / count:.0%})")


if __name__ == "__main__":
    main()
