"""The figures of the service at Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time

import pytest
from service_doubles import noise, upload
from test_service_process import _children, serving, small_path  # noqa: F401  a fixture
from waiting import wait_until

from dinocell.errors import MissingExtraError
from dinocell.service.metrics import production_figures
from dinocell.service.options import ServiceOptions, check_service
from dinocell.service.production import Production

NAMES = {
    *("production/images", "production/cells"),
    *(f"production/jobs/{state}" for state in ("done", "failed", "cancelled")),
    *(f"production/seconds/{stage}" for stage in ("wait", "read", "network", "cells")),
    *(f"production/queue/{state}" for state in ("queued", "running")),
}


def test_figures_have_names_of_their_own():
    counters = {
        "cells_total": 7,
        'jobs_total{state="failed"}': 2,
        'seconds_total{stage="read"}': 0.5,
    }
    figures = production_figures(counters, {"queued": 3, "running": 1})
    assert set(figures) == NAMES
    given = {name: value for name, value in figures.items() if value}
    assert given == {
        "production/cells": 7,
        "production/jobs/failed": 2,
        "production/seconds/read": 0.5,
        "production/queue/queued": 3,
        "production/queue/running": 1,
    }


def test_without_the_package_it_is_refused(monkeypatch):
    check_service(ServiceOptions(wandb=None))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="`wandb` needs the package wandb"):
        check_service(ServiceOptions(wandb="cells"))


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "import time; time.sleep(100000)"])
def test_a_process_that_fails_or_hangs_stops_nothing(start, picture, monkeypatch, program):
    monkeypatch.setattr(Production, "program", ("-c", program))
    monkeypatch.setattr("dinocell.service.production._LONGEST_END_S", 0.2)
    client = start(wandb="cells", wandb_seconds=0.01)
    assert upload(client, picture).status_code == 200
    client.service.production.stop()  # pytest's limit ends a test that waits for the program
    assert client.service.production._process.returncode
    assert upload(client, picture).status_code == 200


def runs(folder) -> list:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def last_step(folder) -> int:
    state = folder / "wandb_state.json"
    return json.loads(state.read_text())["last_step"] if state.exists() else -1


@pytest.mark.slow
def test_figures_are_recorded_offline(tmp_path, small_path, read_history):  # noqa: F811
    image, jobs = noise(tmp_path / "image.tif", 0), tmp_path / "jobs"
    options = ("--model", small_path, "--wandb", "cells", "--wandb-seconds", "0.2")
    for _ in range(2):
        before = last_step(jobs)
        with serving(jobs, *options, WANDB_MODE="offline") as (_, client):
            wait_until(lambda: last_step(jobs) > before)  # noqa: B023
            assert client.post("/api/v1/segment", files={"image": image.read_bytes()}).is_success
    rows = [row for path in runs(jobs) for row in read_history(path)]
    assert set(rows[0]) >= NAMES
    assert rows[0]["production/images"] == 0
    assert rows[-1]["production/images"] == rows[-1]["production/jobs/done"] == 2
    assert rows[-1]["production/cells"] > 0
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert len({path.stem for path in runs(jobs)}) == 1  # one run, continued


@pytest.mark.slow
def test_the_interval_counts(tmp_path, small_path, read_history):  # noqa: F811
    jobs = tmp_path / "jobs"
    options = ("--model", small_path, "--wandb", "cells", "--wandb-seconds", "1000")
    with serving(jobs, *options, WANDB_MODE="offline"):
        wait_until(lambda: last_step(jobs) == 0)
        time.sleep(2)
    (path,) = runs(jobs)
    assert len(read_history(path)) == 2  # at the start and at the end


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_service_outlives_wandb(tmp_path, small_path, number):  # noqa: F811
    image, jobs = noise(tmp_path / "image.tif", 0), tmp_path / "jobs"
    options = ("--model", small_path, "--wandb", "cells", "--wandb-seconds", "0.2")
    with serving(jobs, *options, WANDB_MODE="offline") as (process, client):
        wait_until(lambda: last_step(jobs) >= 0)
        (recorder,) = [pid for pid in _children(process.pid) if "production" in _command(pid)]
        struck = [pid for pid in _children(recorder) if "wandb" in _command(pid)]
        assert struck
        for pid in struck:
            os.kill(pid, number)
        time.sleep(1)
        assert client.post("/api/v1/segment", files={"image": image.read_bytes()}).is_success
    for pid in struck:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 130  # as without wandb: the signal of Ctrl + C


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()
