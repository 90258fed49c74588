"""The workflows of `examples/`: checked and run by Snakemake where it installs; Nextflow's commands run by a shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from dinocell.io import write_image

EXAMPLES = Path(__file__).parent.parent / "examples"
NEXTFLOW = EXAMPLES / "nextflow" / "main.nf"
SNAKEFILE = EXAMPLES / "snakemake" / "Snakefile"


@pytest.fixture
def plate(tmp_path: Path) -> Path:
    """Three images, and the program `dinocell` of this checkout in the folder `bin`."""
    rng = np.random.default_rng(0)
    for number in range(3):
        write_image(
            tmp_path / "plate" / f"a{number}.tif", rng.integers(0, 4000, (40, 48)).astype(np.uint16)
        )
    program = tmp_path / "bin" / "dinocell"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dinocell "$@"\n')
    program.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    paths = [str(EXAMPLES.parent), str(EXAMPLES.parent / "dinov3_modified")]
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
    }


def images_in(folder: Path) -> int:
    return len((folder / "summary.csv").read_text(encoding="utf-8").splitlines()) - 1


def processes() -> dict[str, str]:
    """Name → lines of the shell of each process of the Nextflow file."""
    text = NEXTFLOW.read_text(encoding="utf-8")
    found = re.findall(r'process (\w+) \{(.*?)"""(.*?)"""\n\}', text, re.S)
    assert len(found) == text.count("process ")
    for _, sections, _ in found:
        assert re.findall(r"^    (input|output|script):$", sections, re.M) == [
            "input",
            "output",
            "script",
        ]
    return {name: lines for name, _, lines in found}


def test_braces_and_processes_of_nextflow() -> None:
    """A structural check: Nextflow itself is not in the registries of packages."""
    text = NEXTFLOW.read_text(encoding="utf-8")
    for opening, closing in ("{}", "()", "[]"):
        assert text.count(opening) == text.count(closing)
    flow = text.partition("\nworkflow {")[2]
    assert sorted(re.findall(r"(DINOCELL_\w+)\(", flow)) == sorted(processes())
    given = set(re.findall(r"^params\.(\w+) = ", text, re.M))
    assert given == set(re.findall(r"params\.(\w+)", text))


@pytest.mark.slow
def test_the_commands_of_nextflow_segment_a_plate(plate: Path) -> None:
    """What its tasks run in a shell, with the values that Nextflow puts in."""
    shells = processes()
    values = {
        "params.parts": "2",
        "params.options": "-m dinocell-nuclei --device cpu --no-overlay",
        "images": "plate",
        "out": "results",
    }

    def run(name: str, more: str = "", **own: str) -> str:
        text = re.sub(
            r"(?<!\\)\$\{([\w.]+)\}", lambda found: (values | own)[found[1]], shells[name]
        )
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text.replace("\\$", "$") + more],
            cwd=plate, env=environment(plate), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    count = run("DINOCELL_PLAN", 'echo "count $COUNT"').split()[-1]
    assert count == "2"
    for part in range(int(count)):
        run("DINOCELL_RUN", part=str(part))
    assert "in 3 images" in run("DINOCELL_MERGE")
    assert images_in(plate / "results") == 3


@pytest.fixture(scope="session")
def snakemake(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program of the system, or from a virtual environment of its own: it brings fifty packages."""
    if found := shutil.which("snakemake"):
        return found
    folder = tmp_path_factory.mktemp("snakemake")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "snakemake>=8"], capture_output=True, text=True
    )
    if "No matching distribution" in done.stderr:  # no index of packages can be reached
        pytest.skip("snakemake does not install: no index of packages has it")
    assert done.returncode == 0, done.stderr
    return str(folder / "bin" / "snakemake")


@pytest.mark.slow
def test_snakemake_checks_and_runs_the_plate(snakemake: str, plate: Path) -> None:
    config = ["--config", "images=plate", "out=results", "parts=2"]
    config.append("options=-m dinocell-nuclei --device cpu --no-overlay")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [snakemake, "-s", str(SNAKEFILE), *arguments, *config],
            cwd=plate, env=environment(plate), capture_output=True, text=True,
        )  # fmt: skip

    linted = run("--lint")
    lints = set(re.findall(r"^    \* (.*?):?$", linted.stdout + linted.stderr, re.M))
    # The program is that of a clone; no published container or channel has it.
    assert lints <= {"Specify a conda environment or container for each rule."}
    assert "plan" in (dry := run("--dry-run")).stdout + dry.stderr
    done = run("--cores", "1")
    assert done.returncode == 0, done.stderr
    assert images_in(plate / "results") == 3
    again = run("--cores", "1")
    assert "Nothing to be done" in again.stdout + again.stderr
