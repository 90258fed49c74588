"""A service whose worker is a thread with a small network, so that a test starts it in milliseconds."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import uvicorn
from service_doubles import WorkerThread
from starlette.testclient import TestClient

from dinocell.service.app import create_app
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Queue
from dinocell.service.service import Service


@pytest.fixture
def start(tmp_path, mini_model):
    """Starts services in `tmp_path`; keywords are fields of `ServiceOptions`."""
    clients = []

    def make(**options) -> TestClient:
        given = ServiceOptions(**{"jobs": tmp_path / "jobs", "device": "cpu", **options})
        service = Service(given, Queue(given.jobs))
        service.queue.recover()
        service.worker = WorkerThread(service, mini_model)
        client = TestClient(create_app(service), base_url="http://127.0.0.1")
        client.service = service
        clients.append(client.__enter__())
        service.worker.wake()
        return client

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(start):
    return start()


@pytest.fixture
def picture(blob_data) -> Path:
    return sorted((blob_data / "images").iterdir())[0]


@pytest.fixture
def address(client):
    """The address of `client`'s service on a port of this computer."""
    config = uvicorn.Config(client.app, port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
