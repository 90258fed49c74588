"""Images that the service fetches over HTTP: only from below what it was started with, and not for ever."""

from __future__ import annotations

import errno
import ipaddress
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from service_doubles import finished, noise, upload

from dinocell.errors import UsageError
from dinocell.service import web
from dinocell.service.options import ServiceOptions, check_service
from dinocell.service.queue import QueueFullError
from dinocell.service.reading import ForbiddenError
from dinocell.service.web import Address, allowed, web_places


class Other(BaseHTTPRequestHandler):
    """A server that answers by the last part of the path."""

    image = b""
    asked: list[str] = []  # noqa: RUF012  a list for each test

    def do_GET(self) -> None:
        self.asked.append(self.path)
        what = self.path.rpartition("/")[2]
        if what in self.moved:
            self.send_response(302)
            self.send_header("location", self.moved[what])
            self.end_headers()
            return
        if what == "missing.tif":
            self.send_error(404)
            return
        if what == "private.tif":
            self.send_error(401)
            return
        self.send_response(200)
        if what in ("field%20%C2%B5.tif", "cut.tif", "announced.tif"):
            size = {"cut.tif": len(self.image) + 9, "announced.tif": 10**12}.get(what)
            self.send_header("content-length", str(size or len(self.image)))
        self.end_headers()
        if what == "slow.tif":
            self.write_slowly()
        while what == "endless.tif":
            self.wfile.write(b"x" * 2**16)
        if what != "empty.tif":
            self.wfile.write(self.image)

    def write_slowly(self) -> None:
        while True:
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.05)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the service has closed the connection
            self.close_connection = True

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def other(tmp_path):
    """The address of a server on this computer, with an image below `/open`."""
    kind = type("Server", (Other,), {"asked": [], "moved": {}})
    kind.image = noise(tmp_path / "field.tif", 1).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    kind.address = f"http://127.0.0.1:{server.server_port}"
    kind.moved |= {
        "near.tif": "field%20%C2%B5.tif",
        "out.tif": "/closed/field.tif",
        "away.tif": "http://localhost:1/open/field.tif",
        "file.tif": "file:///etc/passwd",
        "signed.tif": "field%20%C2%B5.tif?token=1",
        "round.tif": "round.tif",
    }
    yield kind
    server.shutdown()
    server.server_close()


def fetched(client, path: str):
    return client.post("/api/v1/jobs/path", json={"path": path})


def test_an_image_is_fetched(start, other, tmp_path):
    client = start(read_from=(f"{other.address}/open/",))
    expected = upload(client, tmp_path / "field.tif").json()["num_cells"]
    for name in ("field%20µ.tif", "field%20%C2%B5.tif", "near.tif"):
        answer = fetched(client, f"{other.address}/open/{name}")
        assert answer.status_code == 202, answer.text
        job = finished(client, answer.json()["id"])
        assert (job["state"], job["summary"]["num_cells"]) == ("done", expected)
    assert {job["name"] for job in client.get("/api/v1/jobs").json()} == {
        "field µ",
        "near",
        "field",
    }


def certificate(folder: Path, host: str) -> Path:
    """A file with a new private key and a certificate for an IP address, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "both.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + signed.public_bytes(Encoding.PEM)
    )
    return folder / "both.pem"


@pytest.mark.parametrize(
    ("host", "is_trusted", "status"),
    [("127.0.0.1", True, 202), ("127.0.0.1", False, 502), ("127.0.0.2", True, 502)],
)
def test_only_trusted_certificates_of_the_host_count(
    start, other, tmp_path, monkeypatch, host, is_trusted, status
):
    pem = certificate(tmp_path, host)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    server = ThreadingHTTPServer(("127.0.0.1", 0), other)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: (
        None
    )  # the service hangs up on a certificate that it does not trust
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    if is_trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    address = f"https://127.0.0.1:{server.server_port}/open"
    try:
        client = start(read_from=(address,))
        answer = fetched(client, f"{address}/field%20µ.tif")
        assert answer.status_code == status, answer.text
        if status == 202:
            assert finished(client, answer.json()["id"])["state"] == "done"
        else:
            assert "certificate" in answer.json()["detail"]
            assert other.asked == []
    finally:
        server.shutdown()
        server.server_close()


def test_addresses_elsewhere_are_never_asked(start, other):
    client = start(read_from=(f"{other.address}/open",))
    port = other.address.rpartition(":")[2]
    for wrong in (
        *(f"{other.address}/closed/field.tif", f"{other.address}/opened/field.tif"),
        *(
            f"{other.address}/open",
            f"{other.address}/Open/field.tif",
            "http://127.0.0.1/open/a.tif",
        ),
        *(f"https://127.0.0.1:{port}/open/a.tif", f"http://localhost:{port}/open/a.tif"),
    ):
        assert fetched(client, wrong).status_code == 403, wrong
    for trick in (
        *("/open/../closed/field.tif", "/open/%2e%2e/closed/field.tif", "/open/..%2fclosed/a.tif"),
        *("/open/%252e%252e/a.tif", "/open/..\\closed/a.tif", "/open/./a.tif", "/open//a.tif"),
        *("/open/..;/closed/a.tif", "/open/a.tif?b=c", "/open/a.tif#b", "/open/a%00.tif"),
        *("/open/a\n.tif", "/open/a.tif ", "/open/", "/open/%ff.tif", "x:y/open/a.tif"),
    ):
        answer = fetched(client, f"{other.address}{trick}")
        assert answer.status_code == 422, trick
        assert "An address must be" in answer.json()["detail"]
    user = f"http://127.0.0.1:{port}@example.org/open/a.tif"
    assert fetched(client, user).status_code == 422
    assert other.asked == []
    assert client.get("/api/v1/jobs").json() == []


def test_redirects_stay_below_the_address(start, other):
    client = start(read_from=(f"{other.address}/open",))
    for name in ("out", "away", "file", "signed"):
        answer = fetched(client, f"{other.address}/open/{name}.tif")
        assert answer.status_code == 403, name
        assert "redirects" in answer.json()["detail"]
    assert other.asked == [f"/open/{name}.tif" for name in ("out", "away", "file", "signed")]
    assert fetched(client, f"{other.address}/open/round.tif").status_code == 502


def test_what_cannot_be_fetched_leaves_nothing(start, other, monkeypatch):
    client = start(read_from=(f"{other.address}/open", "http://127.0.0.1:9/open"), max_mb=0.5)
    for name, status, words in (
        ("missing", 422, "there is none"),
        ("private", 502, "401"),
        ("empty", 422, "not empty"),
        ("cut", 502, "does not answer well"),
        ("announced", 413, "up to 0.5 MB"),
        ("endless", 413, "up to 0.5 MB"),
    ):
        answer = fetched(client, f"{other.address}/open/{name}.tif")
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
    assert fetched(client, "http://127.0.0.1:9/open/a.tif").status_code == 502  # nobody listens
    monkeypatch.setattr(web, "LONGEST_S", 0.5)
    answer = fetched(client, f"{other.address}/open/slow.tif")  # a byte comes again and again
    assert answer.status_code == 504
    assert list((client.service.queue.folder / "jobs").iterdir()) == []


def test_a_full_disk_is_not_blamed_on_the_other_server(other, tmp_path):
    places = web_places([f"{other.address}/open"])
    address = allowed(f"{other.address}/open/near.tif", places)
    for target, error in (
        (Path("/dev/full"), errno.ENOSPC),
        (tmp_path / "none" / "a", errno.ENOENT),
    ):
        with pytest.raises(OSError) as raised:
            web.fetch(address, places, target, 1.0)
        assert raised.value.errno == error


def test_nothing_is_fetched_while_too_much_waits(start, other, monkeypatch):
    client = start(read_from=(f"{other.address}/open",))

    def refuse(*_):
        raise QueueFullError("full")

    monkeypatch.setattr(client.service.queue, "refuse_if_large", refuse)
    assert fetched(client, f"{other.address}/open/near.tif").status_code == 429
    assert other.asked == []


def test_few_files_are_fetched_at_once(start, other, monkeypatch):
    client = start(read_from=(f"{other.address}/open",))
    monkeypatch.setattr(web, "_places", threading.BoundedSemaphore(1))
    with web._places:
        assert fetched(client, f"{other.address}/open/near.tif").status_code == 429
    for name in ("missing.tif", "near.tif"):  # a failure gives its place back
        answer = fetched(client, f"{other.address}/open/{name}")
    assert answer.status_code == 202


def test_addresses_are_compared_part_by_part():
    places = web_places(["https://Example.org/data/", "/data", "http://[::1]:8080"])
    assert [place[:3] for place in places] == [("https", "example.org", 443), ("http", "::1", 8080)]
    assert allowed("HTTPS://EXAMPLE.org:443/data/a%20b.tif", places).parts == ("data", "a b.tif")
    assert allowed("http://[::1]:8080/a.tif", places).parts == ("a.tif",)
    for wrong in ("https://example.org./data/a.tif", "https://example.org:444/data/a.tif"):
        with pytest.raises(ForbiddenError):
            allowed(wrong, places)
    for wrong in (
        "http:///a.tif",
        "http://[::1/a.tif",
        "http://a:b/c",
        "ftp://a/b",
        "http://a..b/c",
        "http://a:0/b",
    ):
        with pytest.raises(UsageError, match="An address must be"):
            Address.of(wrong)


def test_a_wrong_address_is_refused_at_the_start(tmp_path):
    with pytest.raises(UsageError, match="An address must be"):
        check_service(ServiceOptions(jobs=tmp_path, read_from=("http://host/a/../b",)))
