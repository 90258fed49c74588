"""Stand-ins for a bucket: its content, and a proxy that does to requests what networks do."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import io
import random
import socket
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

import numpy as np
import tifffile

from dinov3.cells.streaming.index import FieldRecord, IndexWriter

CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")


def plane(seed: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(100, 4000, (size, size)).astype(np.uint16)


def tiff(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array)
    return stream.getvalue()


def field_keys(plate: str, number: int) -> dict[str, str]:
    base = f"cpg0000/source_4/images/batch/images/{plate}__2020/Images"
    site = f"r{1 + number // 9:02d}c01f{1 + number % 9:02d}p01"
    return {c: f"{base}/{site}-ch{i + 1}sk1fk1fl1.tiff" for i, c in enumerate(CHANNELS)}


def write_bucket(root: Path, plates: int = 3, per_plate: int = 8) -> list[FieldRecord]:
    """A folder laid out as the gallery; plane (plate p, field f, channel c) has a seed of its own."""
    records = []
    for p in range(plates):
        for f in range(per_plate):
            keys = field_keys(f"BR{p}", f)
            total = 0
            for c, key in enumerate(keys.values()):
                path = root / key
                path.parent.mkdir(parents=True, exist_ok=True)
                data = tiff(plane(1000 * p + 10 * f + c))
                path.write_bytes(data)
                total += len(data)
            records.append(
                FieldRecord(
                    f"cpg0000/source_4/batch/BR{p}",
                    f"{chr(65 + f // 9)}01",
                    str(1 + f % 9),
                    keys,
                    total,
                )
            )
    return records


def write_index(path: Path, records: list[FieldRecord], store: str) -> Path:
    writer = IndexWriter(store)
    for record in records:
        writer.add(record)
    writer.write(path)
    return path


def wait_for_port(port: int) -> None:
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)


KINDS = ("503", "500", "reset", "reset_late", "truncate", "slow", "zeroed", "swapped")


class FaultProxy:
    """Passes requests on; some it breaks, drawn by (seed, key, attempt), whatever their order.

    Attributes:
        share: of the requests that are broken; `kinds` are drawn evenly.
        always: key → kind, at every attempt.
        down: no request is answered.
        down_between: numbers of the first request that is not answered and of the next that is.
        latency_s: of each answer, times 0.5 to 1.5.
        counts: faults by kind, and "requests".
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.target = urllib.parse.urlsplit(target).netloc
        self.seed = seed
        self.share = 0.0
        self.kinds: tuple[str, ...] = KINDS
        self.always: dict[str, str] = {}
        self.down = False
        self.down_between = (0, 0)
        self.latency_s = 0.0
        self.counts: Counter[str] = Counter()
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                proxy.handle(self)

            def log_message(self, *_) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def draw(self, key: str) -> tuple[str, random.Random]:
        with self.lock:
            self.attempts[key] += 1
            attempt = self.attempts[key]
        text = f"{self.seed}/{key}/{attempt}"
        numbers = random.Random(hashlib.md5(text.encode()).hexdigest())
        if key in self.always:
            return self.always[key], numbers
        return (numbers.choice(self.kinds) if numbers.random() < self.share else ""), numbers

    def handle(self, request: http.server.BaseHTTPRequestHandler) -> None:
        key = urllib.parse.unquote(request.path.split("?")[0]).removeprefix("/bucket/")
        kind, numbers = self.draw(key)
        with self.lock:
            self.counts["requests"] += 1
            first, end = self.down_between
            down = self.down or first <= self.counts["requests"] < end
            if kind:
                self.counts[kind] += 1
        if self.latency_s:
            time.sleep(self.latency_s * numbers.uniform(0.5, 1.5))
        if down or kind == "reset":
            self.reset(request)
            return
        if kind in ("500", "503"):
            code = "SlowDown" if kind == "503" else "InternalError"
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            self.answer(request, int(kind), {"Content-Type": "application/xml"}, body)
            return
        status, headers, body = self.fetch(request)
        if status in (200, 206) and kind == "zeroed":
            body = bytes(len(body))
        elif status in (200, 206) and kind == "swapped":
            # What a shared connection delivers: a good object of the same size, but another one.
            other = tiff(plane(10**6 + numbers.randrange(100)))
            body = other if len(other) == len(body) else bytes(len(body))
        if status in (200, 206) and kind in ("truncate", "reset_late", "slow"):
            self.answer(request, status, headers, body, cut=len(body) // 2)
            if kind == "slow":  # silent until the client gives up
                with contextlib.suppress(OSError):
                    while request.connection.recv(1024):
                        pass
            self.reset(request, politely=kind == "truncate")
            return
        self.answer(request, status, headers, body)

    def fetch(self, request) -> tuple[int, dict[str, str], bytes]:
        passed = {n: v for n, v in request.headers.items() if n.lower() == "range"}
        with contextlib.closing(http.client.HTTPConnection(self.target)) as connection:
            connection.request("GET", request.path, headers=passed)
            answer = connection.getresponse()
            headers = dict(answer.getheaders())
            # rclone answers parts with 200; S3 itself does not.
            status = 206 if "Content-Range" in headers else answer.status
            return status, headers, answer.read()

    def answer(self, request, status, headers, body, cut=None) -> None:
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() in ("content-type", "etag", "last-modified", "content-range"):
                request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        with contextlib.suppress(OSError):
            request.wfile.write(body[:cut])
            request.wfile.flush()

    def reset(self, request, politely: bool = False) -> None:
        request.close_connection = True
        with contextlib.suppress(OSError):
            if not politely:
                request.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00"
                )
            request.connection.shutdown(socket.SHUT_WR) if politely else request.connection.close()


if __name__ == "__main__":  # for the benchmark: TARGET LATENCY_S SHARE, the URL on the first line
    import sys

    alone = FaultProxy(sys.argv[1])
    alone.latency_s, alone.share = float(sys.argv[2]), float(sys.argv[3])
    print(alone.url, flush=True)
    sys.stdin.read()
