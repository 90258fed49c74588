"""Downloads of data sets over real connections that break, and every wrong state."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import layout_doubles as doubles
import numpy as np
import pytest
from killing import kills_of
from typer.testing import CliRunner

from dinocell import download
from dinocell.cli.app import app
from dinocell.datasets import REMOTES, describe_layouts, prepare, pull, pulling, terms
from dinocell.datasets.remote import Remote
from dinocell.errors import DataSetError, DINOCellError, UsageError

ARCHIVE = "stage1_train.zip"


class Server(http.server.BaseHTTPRequestHandler):
    """Gives `files` by name; breaks off, or waits for its client's death, after `cut` bytes."""

    files: dict[str, bytes]
    asked: list[str]
    cut: int | None = None
    waits = threading.Event()
    holds = False
    gone = threading.Event()

    def do_GET(self):
        begun = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        self.asked.append(f"{self.path.rsplit('/', 1)[-1]} {begun}")
        content = self.files.get(self.path.rsplit("/", 1)[-1])
        if content is None:
            self.send_error(404)
            return
        rest = content[int(begun) :]
        self.send_response(206 if int(begun) else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest if self.cut is None else rest[: self.cut])
        self.wfile.flush()
        if self.holds:
            self.waits.set()
            self.gone.wait(60)

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting, and no checksum of dsb2018, whose real archive is not here."""
    expect(monkeypatch, "dsb2018", None)
    monkeypatch.delenv("DINOCELL_OFFLINE", raising=False)
    monkeypatch.setattr(download, "_BACKOFF_S", 0.0)
    monkeypatch.setattr(download, "_BLOCK", 100)


@pytest.fixture
def server(tmp_path):
    """A mirror that has the archive of dsb2018."""

    class Own(Server):
        files = {ARCHIVE: zipped(tmp_path / "published")}  # noqa: RUF012
        asked = []  # noqa: RUF012
        waits, gone = threading.Event(), threading.Event()

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield Own, f"http://127.0.0.1:{running.server_port}/mirror/"
    Own.gone.set()
    running.shutdown()
    running.server_close()
    thread.join()


def zipped(folder: Path) -> bytes:
    """What the publishers of dsb2018 put into their archive: the folders of the images."""
    doubles.MAKERS["dsb2018"](folder)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted((folder / "stage1_train").rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder / "stage1_train"))
        archive.writestr("__MACOSX/._a", b"left out")
    return file.getvalue()


def expect(monkeypatch, name: str, content: bytes | None, kind: str = "sha256") -> None:
    """Let the table know one checksum of the files of a data set, or none."""
    digest = content if content is None else hashlib.new(kind, content).hexdigest()
    known = [
        replace(file, **({"sha256": None, "md5": None} | {kind: digest}))
        for file in REMOTES[name].files
    ]
    monkeypatch.setitem(REMOTES, name, Remote(tuple(known)))


def test_a_pulled_data_set_can_be_prepared(server, tmp_path, monkeypatch):
    handler, url = server
    handler.cut = (len(handler.files[ARCHIVE]) // 200 + 1) * 100
    expect(monkeypatch, "dsb2018", handler.files[ARCHIVE])
    got = pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert handler.asked == [f"{ARCHIVE} 0", f"{ARCHIVE} {handler.cut}"]
    digest = hashlib.sha256(handler.files[ARCHIVE]).hexdigest()
    assert json.loads((tmp_path / "out" / "download.json").read_text()) == {
        "data_set": "dsb2018",
        "licence": "CC0 1.0",
        "address": "https://bbbc.broadinstitute.org/BBBC038",
        "files": [
            {
                "name": ARCHIVE,
                "url": url + ARCHIVE,
                "bytes": len(handler.files[ARCHIVE]),
                "sha256": digest,
                "is_verified": True,
            }
        ],
    }
    assert f"SHA-256 {digest} (as expected)" in got.text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["download.json", "stage1_train"]  # fmt: skip
    assert not (tmp_path / "out.part").exists()
    prepare("dsb2018", tmp_path / "published", tmp_path / "by hand", shown=False)
    made = prepare("dsb2018", tmp_path / "out", tmp_path / "prepared", shown=False)
    assert made.manifest["download"] == got.record
    table = (tmp_path / "prepared" / "manifest.csv").read_text()
    by_hand = (tmp_path / "by hand" / "manifest.csv").read_text()
    assert table == by_hand.replace(str(tmp_path / "published"), str(tmp_path / "out"))
    count = len(handler.asked)
    again = pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert (again.is_new, again.record, len(handler.asked)) == (False, got.record, count)


def test_a_killed_process_is_continued(server, tmp_path):
    handler, url = server
    large = io.BytesIO(handler.files[ARCHIVE])
    with zipfile.ZipFile(large, "a") as archive:
        archive.writestr("noise", np.random.default_rng(0).bytes(200_000))
    handler.files[ARCHIVE] = large.getvalue()
    handler.cut, handler.holds = 150_000, True
    call = f"pull('dsb2018', {str(tmp_path / 'out')!r}, source={url!r})"
    script = (
        "from dinocell.datasets import pull, remote\n"
        f"remote.REMOTES['dsb2018'] = remote.Remote((remote.RemoteFile('{ARCHIVE}', 'stage1_train'),))\n"
        f"{call}"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    part = tmp_path / "out.part" / "files" / f"{ARCHIVE}.part"
    assert handler.waits.wait(60)
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None
    process.kill()
    process.wait()
    begun = part.stat().st_size
    assert 0 < begun <= 150_000
    assert not (tmp_path / "out").exists()
    handler.cut, handler.holds = None, False
    pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert handler.asked == [f"{ARCHIVE} 0", f"{ARCHIVE} {begun}"]
    assert any((tmp_path / "out").rglob("masks"))


def test_a_kill_at_any_step_leaves_nothing_half(tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / ARCHIVE).write_bytes(zipped(tmp_path / "published"))
    script = (
        "from pathlib import Path\n"
        "from dinocell.datasets import pull, remote\n"
        f"remote.REMOTES['dsb2018'] = remote.Remote((remote.RemoteFile('{ARCHIVE}', 'stage1_train'),))\n"
        f"mirror, folder = {str(mirror)!r}, Path({str(tmp_path)!r})\n"
        "kill_everywhere(lambda out: pull('dsb2018', out, source=mirror, shown=False), folder)\n"
    )
    assert kills_of(script) > 5


def test_an_unknown_checksum_is_shown_as_not_verified(server, tmp_path):
    text = pull("dsb2018", tmp_path / "out", source=server[1], shown=False).text()
    digest = hashlib.sha256(server[0].files[ARCHIVE]).hexdigest()
    assert f"SHA-256 {digest} (not verified: no checksum is known)" in text
    assert "licence CC0 1.0" in text


def test_a_connection_that_fails_keeps_what_arrived(server, tmp_path):
    handler, url = server
    handler.cut = 100
    with pytest.raises(DINOCellError, match="run the same command again to continue"):
        pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert (tmp_path / "out.part" / "files" / f"{ARCHIVE}.part").stat().st_size == 600
    with pytest.raises(UsageError, match="must hold the unfinished download of bbbc039"):
        pull("bbbc039", tmp_path / "out", source=url, shown=False)
    handler.cut = None
    pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert handler.asked[-1] == f"{ARCHIVE} 600"


WRONG = {
    "page": (b"<!DOCTYPE html> sign in", "must be an archive .zip., got a web page from http"),
    "nothing": (b"", "got nothing from http"),
    "half": (None, "got something else from http"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_archive_is_refused(server, tmp_path, case):
    handler, url = server
    content, message = WRONG[case]
    whole = handler.files[ARCHIVE]
    handler.files[ARCHIVE] = whole[: len(whole) // 2] if content is None else content
    with pytest.raises(DataSetError, match=message):
        pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert not (tmp_path / "out").exists()
    handler.files[ARCHIVE] = whole
    pull("dsb2018", tmp_path / "out", source=url, shown=False)


def test_another_checksum_or_damaged_content_is_removed(server, tmp_path, monkeypatch):
    handler, url = server
    whole = handler.files[ARCHIVE]
    damaged = bytearray(whole)
    damaged[120] ^= 255  # in the content of the first file
    handler.files[ARCHIVE] = bytes(damaged)
    with pytest.raises(DataSetError, match=r"that can be unpacked, got Bad CRC-32.*it was removed"):
        pull("dsb2018", tmp_path / "out", source=url, shown=False)
    for kind, name in (("sha256", "SHA-256"), ("md5", "MD5")):
        expect(monkeypatch, "dsb2018", whole, kind)
        with pytest.raises(DataSetError, match=f"must have the {name}"):
            pull("dsb2018", tmp_path / "out", source=url, shown=False)
    assert not (tmp_path / "out").exists()
    handler.files[ARCHIVE] = whole
    assert "as expected" in pull("dsb2018", tmp_path / "out", source=url, shown=False).text()


PUBLISHED = {  # archive: the folder of the tiny data set that it holds, and what its names begin with
    "bbbc006": {
        "BBBC006_v1_images_z_16.zip": ("BBBC006_v1_images_z_16", "BBBC006_v1_images_z_16/"),
        "BBBC006_v1_labels.zip": ("BBBC006_v1_labels", ""),
    },
    "tnbc": {"TNBC_NucleiSegmentation.zip": ("", "")},
    "lynsec": {"lynsec.zip": ("", "")},
    "vicar": {"labelled.zip": ("labelled", "")},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_archive_unpacks_to_a_layout_that_prepare_reads(tmp_path, monkeypatch, name):
    doubles.MAKERS[name](tmp_path / "published")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for archive, (folder, begin) in PUBLISHED[name].items():
        home = tmp_path / "published" / folder
        with zipfile.ZipFile(mirror / archive, "w") as file:
            for path in filter(Path.is_file, sorted(home.rglob("*"))):
                file.write(path, f"{begin}{path.relative_to(home).as_posix()}")
    expect(monkeypatch, name, None)
    pull(name, tmp_path / "out", source=str(mirror), shown=False)
    pulled = prepare(name, tmp_path / "out", tmp_path / "a", shown=False)
    by_hand = prepare(name, tmp_path / "published", tmp_path / "b", shown=False)
    assert pulled.manifest["num_cells"] == by_hand.manifest["num_cells"] > 0
    assert pulled.manifest["splits"] == by_hand.manifest["splits"]


def test_files_that_are_absent(server, tmp_path):
    handler, url = server
    handler.files.clear()
    with pytest.raises(UsageError, match=r"must exist, got 404 .*may have moved it"):
        pull("dsb2018", tmp_path / "out", source=url, shown=False)
    with pytest.raises(UsageError, match=f"`source` must hold {ARCHIVE}"):
        pull("dsb2018", tmp_path / "out", source=str(tmp_path), shown=False)
    with pytest.raises(UsageError, match="when offline"):
        pull("dsb2018", tmp_path / "out", offline=True, shown=False)
    assert list(tmp_path.glob("out*")) == []


def test_a_folder_as_mirror_and_json_files(tmp_path):
    doubles.MAKERS["livecell"](tmp_path / "published")
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    with zipfile.ZipFile(mirror / "images.zip", "w") as archive:
        for path in (tmp_path / "published").rglob("*.tif"):
            archive.write(path, path.relative_to(tmp_path / "published"))
    for path in (tmp_path / "published").rglob("*.json"):
        (mirror / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match=r"must be 'CC BY-NC 4\.0' for livecell, got nothing"):
        pull("livecell", tmp_path / "out", source=str(mirror), shown=False)
    with pytest.raises(UsageError, match="got 'yes': the licence forbids commercial use"):
        terms("livecell", "yes")
    assert list(tmp_path.glob("out*")) == []
    accept = "CC BY-NC 4.0"
    words = ["data", "pull", "livecell", "--from", str(mirror), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "--accept", accept])
    assert (done.exit_code, done.output.count(accept)) == (0, 2), done.output
    made = prepare("livecell", tmp_path / "out", tmp_path / "prepared", shown=False)
    assert made.manifest["licence"] == accept


def test_refusals_before_anything_is_opened(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"download it from https://www\.cellpose\.org/dataset,"):
        pull("cellpose", out)
    with pytest.raises(UsageError, match=r"\(licence: unknown\): read its licence at .*/17204942"):
        pull("yeastsam", out)
    with pytest.raises(UsageError, match="got 'dsb18': did you mean dsb2018"):
        pull("dsb18", out)
    with pytest.raises(UsageError, match="see `dinocell data list`"):
        pull("geojson", out)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="must be a new or empty folder"):
        pull("dsb2018", out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_disk_without_room_is_seen_before_the_unpacking(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    unpacking = partial(pull, "dsb2018", tmp_path / "out", source=str(tmp_path), shown=False)
    (tmp_path / ARCHIVE).write_bytes(server[0].files[ARCHIVE])
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="must have room for"):
        unpacking()
    assert not (tmp_path / "out").exists()


def test_the_list_says_what_was_not_checked():
    blocks = describe_layouts()
    assert blocks.count("    pull     ") == len(REMOTES)
    assert blocks.count("address and checksums not checked") == len(REMOTES)
    assert (
        "4 files, no checksum known (address and checksums not checked); the licence forbids"
        in blocks
    )
