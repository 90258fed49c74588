"""`dinocell serve` as a program: the real worker, many requests at once, kills and restarts."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from ports import held_port
from service_doubles import noise
from waiting import wait_until

from dinocell.cli import main
from dinocell.demo import sample_paths
from dinocell.errors import UsageError
from dinocell.io import read_labels
from dinocell.network.model import save_model
from dinocell.service.options import ServiceOptions, check_service
from dinocell.service.serve import run_service
from dinocell.service.supervision import WorkerProcess


@contextlib.contextmanager
def serving(folder, *arguments, **environment):
    """A running `dinocell serve`, as (process, client)."""
    # Tests that run in the background (`nohup ... &`) ignore Ctrl-C, and a program would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with held_port() as port:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dinocell", "serve", "-o", str(folder)),
                *("--port", str(port), *arguments),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert "DINOCell is at" in process.stdout.readline()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
                yield process, client
        finally:
            process.send_signal(signal.SIGINT)
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def small_path(tmp_path_factory, small_model) -> str:
    """A model file whose network needs no time: these tests are about processes."""
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, small_model)
    return str(path)


@pytest.fixture(scope="module")
def running(tmp_path_factory, small_path):
    """A running service with a small network, as (process, client)."""
    with serving(tmp_path_factory.mktemp("jobs"), "--model", small_path) as service:
        yield service


def digest(labels: np.ndarray) -> str:
    return hashlib.sha256(labels.astype(np.uint32).tobytes()).hexdigest()


@pytest.mark.slow
def test_a_hundred_requests_at_once_are_neither_lost_nor_mixed_up(tmp_path, running):
    _, client = running
    before = _images_total(client)
    images = [noise(tmp_path / f"image{i}.tif", i, (24, 24 + i)) for i in range(100)]

    def ask(path):
        with path.open("rb") as file:
            answer = client.post("/api/v1/segment?format=tif", files={"image": (path.name, file)})
        assert answer.status_code == 200
        return answer

    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(ask, images))
    assert _images_total(client) == before + 100
    for index, answer in enumerate(answers):
        assert f'filename="image{index}_labels.tif"' in answer.headers["content-disposition"]
        target = tmp_path / "labels.tif"
        target.write_bytes(answer.content)
        assert read_labels(target).shape == (24, 24 + index)


@pytest.mark.slow
def test_labels_are_those_of_the_command_line(tmp_path):
    paths = [path for path, _ in sample_paths()][:3]
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "segment",
                *map(str, paths),
                "-o",
                str(tmp_path / "out"),
                "--no-overlay",
                "--device",
                "cpu",
            ]
        )
    assert ended.value.code in (0, None)
    with serving(tmp_path / "jobs", "--device", "cpu") as (_, client):
        for path in paths:
            answer = client.post("/api/v1/segment?format=npy", files={"image": path.read_bytes()})
            labels = np.load(io.BytesIO(answer.content))
            assert digest(labels) == digest(
                read_labels(tmp_path / "out" / f"{path.stem}_labels.tif")
            )


@pytest.mark.slow
def test_killed_amid_twenty_jobs_it_finishes_all_after_a_restart(tmp_path, small_path):
    images = [noise(tmp_path / f"image{i}.tif", i) for i in range(20)]
    with serving(tmp_path / "jobs", "--model", small_path) as (process, client):
        jobs = [
            client.post("/api/v1/jobs", files={"image": (path.name, path.read_bytes())}).json()[
                "id"
            ]
            for path in images
        ]
        while client.get(f"/api/v1/jobs/{jobs[2]}").json()["state"] != "done":
            time.sleep(0.02)
        process.kill()
    with serving(tmp_path / "jobs", "--model", small_path) as (_, client):
        for job in jobs:
            with client.stream("GET", f"/api/v1/jobs/{job}/events") as stream:
                *_, last = (line for line in stream.iter_lines() if line.startswith("data"))
            assert '"state":"done"' in last
        assert 'dinocell_jobs_total{state="done"} 20' in client.get("/metrics").text


@pytest.mark.slow
def test_killed_amid_an_upload_it_continues_after_a_restart(tmp_path, small_path):
    content = noise(tmp_path / "image.tif", 0, (1500, 1500)).read_bytes()
    hashed = hashlib.sha256(content).hexdigest()
    with serving(tmp_path / "jobs", "--model", small_path) as (process, client):
        about = {"name": "image.tif", "bytes": len(content), "sha256": hashed}
        upload = f"/api/v1/uploads/{client.post('/api/v1/uploads', json=about).json()['id']}"

        def blocks():
            for start in range(0, len(content) // 2, 100_000):
                yield content[start : start + 100_000]
            while client.get(upload).json()["offset"] < len(content) // 4:
                time.sleep(0.02)
            process.kill()
            yield content[:1]

        with pytest.raises(httpx.TransportError):
            httpx.put(f"{client.base_url}{upload}?offset=0", content=blocks(), timeout=120)
    with serving(tmp_path / "jobs", "--model", small_path) as (_, client):
        begun = client.get(upload).json()["offset"]
        assert len(content) // 4 <= begun <= len(content) // 2 + 100_000
        assert client.put(upload, params={"offset": begun}, content=content[begun:]).is_success
        job = client.post(f"{upload}/finish").json()
        with client.stream("GET", f"/api/v1/jobs/{job['id']}/events") as stream:
            *_, last = (line for line in stream.iter_lines() if line.startswith("data"))
        assert '"state":"done"' in last


@pytest.mark.slow
def test_paths_are_read_only_while_they_are_allowed(tmp_path, small_path):
    (tmp_path / "open").mkdir()
    path = noise(tmp_path / "open" / "image.tif", 0)
    common = (tmp_path / "jobs", "--model", small_path)
    with serving(*common, "--read-from", str(tmp_path / "open")) as (process, client):
        (worker,) = _children(process.pid)
        os.kill(worker, signal.SIGSTOP)  # the job waits
        answer = client.post("/api/v1/jobs/path", json={"path": str(path)})
        assert answer.status_code == 202
        process.kill()
        os.kill(worker, signal.SIGKILL)
    (tmp_path / "jobs" / "copies" / "dinocell-s3-left").mkdir()  # of the worker that was killed
    with serving(*common) as (_, client):
        assert list((tmp_path / "jobs" / "copies").iterdir()) == []
        assert client.post("/api/v1/jobs/path", json={"path": str(path)}).status_code == 403
        job = f"/api/v1/jobs/{answer.json()['id']}"
        wait_until(lambda: client.get(job).json()["state"] == "failed")
        assert "may not read" in client.get(job).json()["error"]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path, running):
    image = noise(tmp_path / "image.tif", 0)
    process, client = running
    (worker,) = _children(process.pid)
    os.kill(worker, signal.SIGKILL)
    answer = client.post("/api/v1/segment", files={"image": image.read_bytes()})
    assert answer.status_code == 200
    assert base64.b64decode(answer.json()["labels"]).startswith(b"\x89PNG")
    assert _children(process.pid) != [worker]


def _images_total(client) -> float:
    (line,) = re.findall(r"^dinocell_images_total (.*)$", client.get("/metrics").text, re.MULTILINE)
    return float(line)


def _children(pid: int) -> list[int]:
    tasks = f"/proc/{pid}/task"
    if not os.path.isdir(tasks):
        pytest.skip("processes are listed in /proc on Linux only")
    found = []
    for task in os.listdir(tasks):
        with open(f"{tasks}/{task}/children") as file:
            found += map(int, file.read().split())
    return found


@pytest.mark.slow
def test_the_description_of_the_api_is_true(tmp_path, small_path):
    """schemathesis sends what the description allows and what it forbids."""
    options = ("--queue", "5", "--model", small_path, "--read-from", str(tmp_path))
    with serving(tmp_path / "jobs", *options) as (_, client):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run"),
                *(f"{client.base_url}/api/v1/openapi.json", "--seed", "1", "--max-examples", "10"),
                *(
                    "--checks",
                    "not_a_server_error,response_schema_conformance,content_type_conformance",
                ),
                *("--phases", "examples,coverage,fuzzing", "--no-color"),
            ],
            capture_output=True,
            text=True,
            cwd=tmp_path,  # it keeps a cache there
        )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"host": "0.0.0.0"}, "`token` must be given"),
        ({"host": "0.0.0.0", "token": "short"}, "16 characters"),
        ({"token": "ö" * 20}, "ASCII"),
        ({"max_mb": 0.0}, "max_mb"),
        ({"keep_hours": float("nan")}, "keep_hours"),
        ({"wandb_seconds": 0.0}, "wandb_seconds"),
        ({"read_from": ("nowhere",)}, "`read_from` must be a folder"),
        ({"read_from": (__file__,)}, "`read_from` must be a folder"),
    ],
)
def test_what_is_refused_before_it_starts(options, word):
    with pytest.raises(UsageError, match=word):
        check_service(ServiceOptions(**options))


def test_hosts_of_this_computer_need_no_token():
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        check_service(ServiceOptions(host=host))


def test_the_command_passes_its_options_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("dinocell.service.serve.run_service", seen.append)
    monkeypatch.setenv("DINOCELL_TOKEN", "of the environment")
    given = {
        "jobs": tmp_path,
        "model": "m",
        "device": "cpu",
        "batch_size": 2,
        "precision": "fp32",
        "host": "::1",
        "port": 1,
        "token": "t" * 16,
        "queue": 3,
        "max_mb": 4.0,
        "max_megapixels": 5.0,
        "keep_hours": 6.0,
        "keep_gb": 7.0,
        "wandb": "cells",
        "wandb_seconds": 8.0,
    }
    places = ("a", "s3://b/c")
    repeated = [f"--read-from={place}" for place in places]
    for arguments in ([], [f"--{k.replace('_', '-')}={v}" for k, v in given.items()] + repeated):
        with pytest.raises(SystemExit):
            main(["serve", *arguments])
    assert seen == [
        ServiceOptions(token="of the environment"),
        ServiceOptions(**given, read_from=places),
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--host", "0.0.0.0"], "--token must be given"),
        (["--model", "nothing.safetensors"], "a bundled name"),
        (["--device", "tpu"], "--device must be"),
    ],
)
def test_the_command_refuses_in_one_sentence(tmp_path, capsys, monkeypatch, arguments, word):
    monkeypatch.delenv("DINOCELL_TOKEN", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "-o", str(tmp_path / "jobs"), *arguments])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_in_one_sentence(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SystemExit) as ended:
        main(["serve", "-o", str(tmp_path), "--port", str(other.getsockname()[1])])
    assert ended.value.code == 1
    assert "choose another --port" in capsys.readouterr().err


def test_the_start_says_how_long_results_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: None)
    monkeypatch.setattr(WorkerProcess, "start", lambda self: None)
    monkeypatch.setattr(WorkerProcess, "stop", lambda self: None)
    capsys.readouterr()
    run_service(ServiceOptions(jobs=tmp_path, port=0, keep_hours=36.0, keep_gb=5.0))
    _, kept = capsys.readouterr().out.splitlines()
    assert kept.startswith("Results are deleted 36 hours after they were made or last corrected")
    assert kept.endswith("more than 5 GB")


def test_requests_that_wait_hear_of_a_new_worker(tmp_path, monkeypatch):
    heard = []
    worker = WorkerProcess(tmp_path, {}, heard.append)
    monkeypatch.setattr(worker._stopped, "wait", lambda pause_s: False)
    monkeypatch.setattr(worker, "_launch", worker._stopped.set)
    worker._keep_alive()
    assert heard == [{"worker": "died"}, {"worker": "started"}]


def test_two_services_do_not_share_a_folder(tmp_path, capsys):
    from dinocell.batch.claims import Claimant, claimed

    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with claimed(tmp_path / "service", Claimant()):
        claim = tmp_path / "service" / "claim.json"
        claim.write_text(claim.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {other.pid}'))
        claim.write_text(claim.read_text().replace('"began"', '"ignored"'))
        with pytest.raises(SystemExit):
            main(["serve", "-o", str(tmp_path)])
    other.communicate(b"\n")
    assert "one process at a time" in capsys.readouterr().err
