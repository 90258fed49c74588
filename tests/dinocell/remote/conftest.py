"""A server of the S3 protocol on loopback, that may be stopped."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from ports import held_port
from waiting import wait_until

from dinocell.io import s3


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class Server:
    """moto's server with the bucket `bucket`, which anybody may use who signs."""

    def __init__(self, port: int) -> None:
        boto3 = pytest.importorskip("boto3", reason="boto3 is not installed: extra [s3]")
        for name in ("moto", "obstore"):
            pytest.importorskip(name, reason=f"{name} is not installed: extras [s3] and [test]")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: _answers(port))
        self.url = f"http://127.0.0.1:{port}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        self.client.create_bucket(Bucket="bucket")

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="bucket", Key=key, Body=content)

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket="bucket", Key=key)["Body"].read())

    def listed(self, prefix: str = "") -> list[str]:
        found = self.client.list_objects_v2(Bucket="bucket", Prefix=prefix)
        return sorted(one["Key"] for one in found.get("Contents", ()))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    with _serving() as server:
        yield server


@pytest.fixture
def server(running_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Empty, named by the environment, and asked with little patience."""
    _use(running_server, monkeypatch)
    for key in running_server.listed():
        running_server.client.delete_object(Bucket="bucket", Key=key)
    return running_server


@pytest.fixture
def mortal_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of its own, for a test that stops it."""
    with _serving() as server:
        _use(server, monkeypatch)
        yield server


@contextlib.contextmanager
def _serving() -> Iterator[Server]:
    with held_port() as port:
        server = Server(port)
        yield server
        server.client.close()
        server.stop()


def _use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(s3, "_RETRY_S", 0.3)
    s3._store.cache_clear()
