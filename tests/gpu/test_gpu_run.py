"""`make gpu-run` in small: parts are done once, in order; what is cut continues in the next call."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from benchmarks import gpu_run, tensorrt_engine
from benchmarks.gpu_run import PARTS, ROOT, left, run_parts

# Counts its calls in the file that it is given; with "cut" the first call waits for SIGTERM.
PROGRAM = """
import signal, sys
from pathlib import Path

path, how = Path(sys.argv[1]), sys.argv[2]
calls = int(path.read_text()) + 1 if path.exists() else 1
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
path.write_text(str(calls))
if how == "cut" and calls == 1:
    signal.pause()
sys.exit(3 if how == "fail" and calls == 1 else 0)
"""


def parts_in(folder: Path, **kinds: str) -> dict[str, list[str]]:
    return {
        name: [sys.executable, "-c", PROGRAM, str(folder / name), kind]
        for name, kind in kinds.items()
    }


def test_parts_are_done_once_and_failures_are_left(tmp_path, capfd):
    parts = parts_in(tmp_path, first="plain", second="fail", third="plain")
    assert run_parts(parts, tmp_path, seconds=600) == ["second"]
    assert "second: exit code 3" in capfd.readouterr().out
    assert run_parts(parts, tmp_path, seconds=600) == []
    calls = {name: (tmp_path / name).read_text() for name in parts}
    assert calls == {"first": "1", "second": "2", "third": "1"}
    assert json.loads((tmp_path / "done.json").read_text()) == ["first", "third", "second"]


def test_a_part_that_is_cut_continues(tmp_path, capfd, monkeypatch):
    parts = parts_in(tmp_path, training="cut", after="plain")
    calls = tmp_path / "training"

    def time_is_over(process, ends):
        wait_until(
            lambda: calls.exists() and calls.read_text()
        )  # signalled before, it may be empty
        raise subprocess.TimeoutExpired(process.args, 0)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_run, "_wait", time_is_over)
        assert run_parts({"training": parts["training"]}, tmp_path, seconds=600) == ["training"]
    assert "training: exit code 75, to be continued" in capfd.readouterr().out
    assert run_parts(parts, tmp_path, seconds=0) == ["training", "after"]  # no time: nothing starts
    assert run_parts(parts, tmp_path, seconds=600) == []
    assert (tmp_path / "training").read_text() == "2"


@pytest.mark.parametrize("name", PARTS)
def test_every_part_names_files_that_exist(name):
    command = PARTS[name]
    named = [part for part in command if part.endswith((".py", ".yaml"))]
    assert named or "pytest" in command
    assert all((ROOT / part).is_file() for part in named)
    assert left(PARTS, Path("nowhere")) == list(PARTS)


def test_tensorrt_runs_where_it_is_installed(tmp_path, monkeypatch):
    (tmp_path / "trtexec").write_text("#!/bin/sh\n")
    (tmp_path / "trtexec").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with_it = importlib.reload(gpu_run).PARTS
    monkeypatch.setenv("PATH", "")
    without = importlib.reload(gpu_run).PARTS
    assert with_it.keys() - without.keys() == {"tensorrt"}
    assert (ROOT / with_it["tensorrt"][1]).is_file()


def test_the_command_of_tensorrt_is_that_of_the_page():
    """And its figures are read as trtexec 10 prints them."""
    command = " ".join(tensorrt_engine.trtexec_command(Path("dinocell-cells_fp16.onnx"), "fp16"))
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8").replace("\\\n", "")
    assert command in " ".join(page.split())
    printed = (
        "[I] Throughput: 512.25 qps\n"
        "[I] GPU Compute Time: min = 1.9 ms, max = 2.4 ms, mean = 2.0 ms, median = 1.95 ms, percentile(90%) = 2"
    )
    assert tensorrt_engine.figures(printed) == {"windows_per_s": 4098.0, "batch_median_ms": 1.95}
    with pytest.raises(SystemExit, match="no figures"):
        tensorrt_engine.figures("error")
