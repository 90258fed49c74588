"""Fetching backbone files, over real connections that break."""

from __future__ import annotations

import hashlib
import http.server
import io
import socket
import threading

import pytest
import requests
import urllib3

from dinocell import download
from dinocell.errors import CheckpointError, DINOCellError, UsageError
from dinocell.network.fetching import fetch_weights
from dinocell.network.weights import RELEASED

CONTENT = bytes(range(256)) * 1_000
SHA = hashlib.sha256(CONTENT).hexdigest()
BLOCK = 10_000


class Server(http.server.BaseHTTPRequestHandler):
    """Gives CONTENT, breaks off after `cut` bytes a request, and notes what was asked for."""

    content = CONTENT
    cut = len(CONTENT)
    ranges = True
    status = 0
    etag = ""
    asked: list[str | None]
    tokens: list[str | None]

    def do_GET(self):
        type(self).asked.append(self.headers.get("Range"))
        type(self).tokens.append(self.headers.get("Authorization"))
        if self.status:
            self.send_error(self.status)
            return
        begin = 0
        same = self.headers.get("If-Range", self.etag) == self.etag
        if self.ranges and same and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if begin >= len(self.content) > 0:
            self.send_error(416)
            return
        rest = self.content[begin:]
        self.send_response(206 if begin else 200)
        if self.etag:
            self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.cut])
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(tmp_path / "cache"))
    for name in ("DINOCELL_WEIGHTS_MIRROR", "DINOCELL_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(download, "_BLOCK", BLOCK)


@pytest.fixture
def server():
    class Own(Server):
        asked = []  # noqa: RUF012
        tokens = []  # noqa: RUF012

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield Own, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def test_download_continues_after_breaks(server, tmp_path):
    handler, url = server
    handler.cut = 10 * BLOCK
    path = fetch_weights("w.pth", source=url, sha256=SHA)
    assert path == tmp_path / "cache" / "w.pth"
    assert path.read_bytes() == CONTENT
    assert handler.asked == [None, "bytes=100000-", "bytes=200000-"]
    assert fetch_weights("w.pth", source=url, sha256=SHA) == path, "from the cache"
    assert len(handler.asked) == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["w.pth"]


def test_download_continues_in_another_call(server, tmp_path):
    handler, url = server
    handler.cut = BLOCK
    with pytest.raises(DINOCellError, match="run the same command again to continue"):
        fetch_weights("w.pth", source=url)
    part = tmp_path / "cache" / "w.pth.part"
    assert part.stat().st_size == 6 * BLOCK
    handler.cut = len(CONTENT)
    assert fetch_weights("w.pth", source=url).read_bytes() == CONTENT
    assert handler.asked[-1] == "bytes=60000-"
    assert not part.exists()


def test_a_whole_part_needs_no_more_bytes(server, tmp_path):
    """The process was stopped between the last byte and the check."""
    handler, url = server
    cache = tmp_path / "cache"
    cache.mkdir()
    for begun, requests_needed in ((CONTENT, 1), (CONTENT + b"more", 2)):
        handler.asked.clear()
        (cache / "w.pth.part").write_bytes(begun)
        (cache / "w.pth.part.json").write_text('{"total": 256000, "validator": null}')
        assert fetch_weights("w.pth", source=url, sha256=SHA).read_bytes() == CONTENT
        assert len(handler.asked) == requests_needed
        (cache / "w.pth").unlink()


def test_server_without_ranges_starts_over(server):
    handler, url = server
    handler.cut, handler.ranges = BLOCK, False
    with pytest.raises(DINOCellError):
        fetch_weights("w.pth", source=url)
    handler.cut = len(CONTENT)
    assert fetch_weights("w.pth", source=url).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ["", '"1"'])
@pytest.mark.parametrize("length", [30 * BLOCK, BLOCK, len(CONTENT) + 5])
def test_another_file_at_the_source_is_not_joined_to_the_beginning(server, etag, length):
    """Recognised by its tag where the server gives one, else by its length."""
    handler, url = server
    handler.cut, handler.etag = BLOCK, etag
    with pytest.raises(DINOCellError):
        fetch_weights("w.pth", source=url)
    other = bytes(255 - value % 256 for value in range(length))
    handler.content, handler.cut, handler.etag = other, length, etag.replace("1", "2")
    assert fetch_weights("w.pth", source=url).read_bytes() == other


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><p>sign in", b""])
def test_a_page_in_place_of_a_file_is_refused(server, tmp_path, content):
    handler, url = server
    handler.content = content
    with pytest.raises(CheckpointError, match="must be a file of weights"):
        fetch_weights("w.pth", source=url)
    assert list((tmp_path / "cache").iterdir()) == []


def answered(monkeypatch, answers: dict[str, dict]) -> list[requests.PreparedRequest]:
    """Requests that were sent; `answers` holds what each URL gives."""
    sent = []

    def send(_adapter, request, **_):
        sent.append(request)
        answer = requests.Response()
        answer.status_code, answer.url, answer.request = 200, request.url, request
        answer.raw = urllib3.HTTPResponse(io.BytesIO(CONTENT), preload_content=False)
        for name, value in answers[request.url.split("?")[0]].items():
            setattr(answer, name, value)
        return answer

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    return sent


def test_token_of_the_hub_goes_nowhere_else(server, monkeypatch):
    handler, url = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch_weights("w.pth", source=url)
    assert handler.tokens == [None]
    hub, store = "https://huggingface.co/x/model.safetensors", "https://store.example/model"
    moved = {"status_code": 302, "headers": requests.structures.CaseInsensitiveDict(location=store)}
    sent = answered(monkeypatch, {hub: moved, store: {}})
    assert fetch_weights("model.safetensors", source=hub).read_bytes() == CONTENT
    assert [request.headers.get("Authorization") for request in sent] == ["Bearer secret", None]


@pytest.mark.parametrize("target", ["http://store.example/w.pth", "//store.example/w.pth"])
def test_a_redirect_from_https_to_http_is_refused(monkeypatch, target):
    url = "https://mirror.example/w.pth"
    headers = requests.structures.CaseInsensitiveDict(location=target)
    moved = {"status_code": 302, "headers": headers}
    sent = answered(monkeypatch, {url: moved, "https://store.example/w.pth": {}})
    if target.startswith("//"):  # of the same scheme
        assert fetch_weights("w.pth", source=url).read_bytes() == CONTENT
        return
    with pytest.raises(UsageError, match="must stay on https, got a redirect to http://store"):
        fetch_weights("w.pth", source=url + "?Signature=a")
    assert len(sent) <= 1


@pytest.mark.parametrize(
    ("status", "message"), [(403, "gated"), (404, "must exist"), (503, "interrupted 6 times.*503")]
)
def test_refusals(server, status, message):
    handler, url = server
    handler.status = status
    with pytest.raises(DINOCellError, match=message):
        fetch_weights("w.pth", source=url)
    assert len(handler.asked) == (6 if status == 503 else 1)


def test_no_answer_names_the_computer():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            DINOCellError, match=r"^127\.0\.0\.1 must be within reach, got no connection in 6 tries"
        ):
            fetch_weights("w.pth", source=url)


def test_an_unknown_certificate_says_what_to_set(monkeypatch):
    def send(*_, **__):
        raise requests.exceptions.SSLError("self-signed certificate")

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    with pytest.raises(UsageError, match=r"self-signed.*SSL_CERT_FILE"):
        fetch_weights("w.pth", source="https://mirror.example")


def test_a_full_disk_is_seen_before_the_download(server, monkeypatch):
    _, url = server
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="room"):
        fetch_weights("w.pth", source=url)


def test_wrong_checksum_is_not_kept(server, tmp_path):
    _, url = server
    with pytest.raises(CheckpointError, match="must have a SHA-256 that begins with 08c60483"):
        fetch_weights("dinov3_vits16", source=url)
    assert list((tmp_path / "cache").iterdir()) == []


def test_personal_url_of_a_released_file(server, tmp_path):
    """The e-mail's URL names the file itself and carries a signature."""
    handler, url = server
    file = RELEASED["dinov3_vits16"]
    fetch_weights("dinov3_vits16", source=f"{url}/{file}?Signature=a", sha256=SHA)
    assert (tmp_path / "cache" / file).is_file()
    assert handler.asked == [None]


def test_folder_and_mirror_variable(tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "w.pth").write_bytes(CONTENT)
    assert fetch_weights("w.pth", source=str(mirror)).read_bytes() == CONTENT
    monkeypatch.setenv("DINOCELL_WEIGHTS_MIRROR", mirror.as_uri())
    out = fetch_weights("w.pth", out=tmp_path / "elsewhere")
    assert out == tmp_path / "elsewhere" / "w.pth"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_offline_opens_no_connection(tmp_path, monkeypatch, way):
    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    url = "http://127.0.0.1:9"
    if way == "variable":
        monkeypatch.setenv("DINOCELL_OFFLINE", "1")
    with pytest.raises(UsageError, match="when offline"):
        fetch_weights("w.pth", source=url, offline=way == "option")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "w.pth").write_bytes(CONTENT)
    assert fetch_weights("w.pth", source=url, offline=way == "option").is_file()
