"""Large images: by a path that the service may read, and uploaded in parts."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import time
import zipfile

import numpy as np
import pytest
import tifffile
from service_doubles import finished, noise, upload
from waiting import wait_until

from dinocell.io import read_labels
from dinocell.io.s3 import place_of
from dinocell.service.reading import ForbiddenError, places_to_read, readable


@pytest.fixture
def places(tmp_path):
    """A folder that may be read, beside one that may not."""
    for name in ("open", "closed"):
        (tmp_path / name).mkdir()
        noise(tmp_path / name / "field.tif", 1)
    return tmp_path


def by_path(client, path, **options):
    return client.post("/api/v1/jobs/path", json={"path": str(path), **options})


def labels_of(client, job_id: str, tmp_path) -> np.ndarray:
    assert finished(client, job_id)["state"] == "done", client.get(f"/api/v1/jobs/{job_id}").text
    (tmp_path / "found.tif").write_bytes(client.get(f"/api/v1/jobs/{job_id}/result/tif").content)
    return read_labels(tmp_path / "found.tif")


def test_an_image_is_read_where_it_is(start, places):
    client = start(read_from=(str(places / "open"),))
    path = places / "open" / "field.tif"
    answer = by_path(client, path)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert (job["name"], answer.headers["location"]) == ("field", f"/api/v1/jobs/{job['id']}")
    found = labels_of(client, job["id"], places)
    sent = upload(client, path, to="jobs").json()["id"]
    assert (found == labels_of(client, sent, places)).all()
    base = f"/api/v1/jobs/{job['id']}"
    assert "field.tif" in client.get(f"{base}/result/coco").text
    csv = client.get(f"{base}/result/csv")
    assert 'filename="field_cells.csv"' in csv.headers["content-disposition"]
    few = by_path(client, path, min_area_px=30).json()["id"]
    assert labels_of(client, few, places).max() < found.max()
    assert str(places) not in client.get("/api/v1/jobs").text
    client.delete(base)
    assert path.exists()
    wrong = by_path(client, path, min_area_px="many", z=3)
    assert "`min_area_px` must be a whole number; `z` must be text" in wrong.json()["detail"]


def test_paths_to_other_places_are_refused_alike(start, places):
    (places / "open" / "link.tif").symlink_to(places / "closed" / "field.tif")
    (places / "open" / "away").symlink_to(places / "closed")
    client = start(read_from=(str(places / "open"),))
    refused = [
        "closed/field.tif",
        "closed/missing.tif",
        "open/../closed/field.tif",
        "open/link.tif",
        "open/away/field.tif",
        "open/away/missing.tif",
        "opened/field.tif",
        "",
    ]
    answers = [by_path(client, places / path) for path in refused]
    answers += [by_path(client, path) for path in ("/etc/passwd", "/", "s3://bucket/field.tif")]
    assert {answer.status_code for answer in answers} == {403}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].headers["content-type"] == "application/problem+json"
    assert client.get("/api/v1/jobs").json() == []
    assert by_path(start(), places / "open" / "field.tif").status_code == 403


def test_what_is_no_image_is_refused(start, places, monkeypatch):
    folder = places / "open"
    os.mkfifo(folder / "pipe.tif")
    with socket.socket(socket.AF_UNIX) as plug:
        monkeypatch.chdir(folder)  # names of sockets are short
        plug.bind("plug.tif")
    (folder / "loop.tif").symlink_to(folder / "loop.tif")
    (folder / "linked.zarr").mkdir()
    (folder / "linked.zarr" / "0").symlink_to(places / "closed")
    client = start(read_from=(str(folder),))
    for name in ("missing.tif", "pipe.tif", "plug.tif", "loop.tif", "", "linked.zarr", "a" * 300):
        answer = by_path(client, folder / name)
        assert answer.status_code == 422, name
        assert answer.json()["detail"].startswith("`path` must be a file"), name
    for path in ("field.tif", "~/field.tif", f"{folder}/field.tif\0", "s3:///"):
        assert by_path(client, path).status_code == 422, path
    (folder / "notes.txt").write_text("no image, but a text that is long enough")
    job = finished(client, by_path(client, folder / "notes.txt").json()["id"])
    assert job["state"] == "failed"
    assert str(places) not in job["error"]


def test_ome_zarr_is_read_by_its_path(start, places, tmp_path):
    client = start(read_from=(str(places / "open"),))
    tif = by_path(client, places / "open" / "field.tif").json()["id"]
    labels = labels_of(client, tif, tmp_path)
    archive = io.BytesIO(client.get(f"/api/v1/jobs/{tif}/result/ome-zarr").content)
    zipfile.ZipFile(archive).extractall(places / "open")
    zarr = by_path(client, places / "open" / "field_labels.zarr").json()["id"]
    assert (labels_of(client, zarr, tmp_path) == labels).all()


def test_a_path_that_leads_elsewhere_by_now_is_not_read(start, places):
    client = start(read_from=(str(places / "open"),))
    client.service.worker.hold()
    job = by_path(client, places / "open" / "field.tif").json()["id"]
    (places / "open" / "field.tif").unlink()
    (places / "open" / "field.tif").symlink_to(places / "closed" / "field.tif")
    client.service.worker.release()
    job = finished(client, job)
    assert (job["state"], "may not read" in job["error"]) == ("failed", True)
    assert str(places) not in job["error"]


def test_channels_are_read_where_the_image_is_as_long_as_it_may_be_read(start, places):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4000, (5, 40, 48)).astype(np.uint16)
    for name in ("open", "closed"):
        tifffile.imwrite(places / name / "plate.tif", pixels, photometric="minisblack")
    client = start(read_from=(str(places / "open"),))
    job = by_path(client, places / "open" / "plate.tif", channels=["0"]).json()["id"]
    assert finished(client, job)["state"] == "done"
    answer = client.get(f"/api/v1/jobs/{job}/image?channel=1")
    assert (np.load(io.BytesIO(answer.content)) == pixels[1]).all()
    (places / "open" / "plate.tif").unlink()
    answer = client.get(f"/api/v1/jobs/{job}/image?channel=4")
    assert (answer.status_code, str(places) in answer.text) == (422, False)
    (places / "open" / "plate.tif").symlink_to(places / "closed" / "plate.tif")
    assert client.get(f"/api/v1/jobs/{job}/image?channel=4").status_code == 403


def test_addresses_on_s3_are_compared_as_text():
    places = places_to_read(["s3://bucket/plates"])
    assert readable("s3://bucket/plates/a.tif", places) == place_of("s3://bucket/plates/a.tif")
    for other in ("s3://bucket/plates2/a", "s3://other/plates/a", "s3://bucket/plates/../b", "/a"):
        with pytest.raises(ForbiddenError):
            readable(other, places)


# --- uploads in parts ---


def begin(client, content: bytes, name="field.tif", **values):
    body = {"name": name, "bytes": len(content), **values}
    return client.post("/api/v1/uploads", json=body)


def put(client, upload_id: str, offset: int, content):
    return client.put(f"/api/v1/uploads/{upload_id}", params={"offset": offset}, content=content)


@pytest.fixture
def content(tmp_path) -> bytes:
    return noise(tmp_path / "field.tif", 1).read_bytes()


def test_parts_become_a_job_when_they_are_whole(client, content, tmp_path):
    answer = begin(client, content, sha256=hashlib.sha256(content).hexdigest(), min_area_px=30)
    assert answer.status_code == 201, answer.text
    base = answer.headers["location"]
    assert answer.json() == {
        "id": base.rpartition("/")[2],
        "name": "field",
        "offset": 0,
        "bytes": len(content),
    }
    upload_id = answer.json()["id"]
    for offset, end in ((0, 1), (1, 1), (1, 1000), (1000, len(content))):
        half = client.post(f"{base}/finish")
        assert (half.status_code, "send the rest" in half.json()["detail"]) == (422, True)
        assert put(client, upload_id, offset, content[offset:end]).json()["offset"] == end
        assert client.get(base).json()["offset"] == end
    assert client.get("/api/v1/jobs").json() == []
    jobs = [client.post(f"{base}/finish") for _ in range(2)]  # an answer may be lost
    assert [job.status_code for job in jobs] == [202, 202]
    assert {job.json()["id"] for job in jobs} == {upload_id}
    found = labels_of(client, upload_id, tmp_path)
    whole = upload(client, tmp_path / "field.tif", to="jobs", min_area_px=30).json()["id"]
    assert (found == labels_of(client, whole, tmp_path)).all()
    assert len(client.get("/api/v1/jobs").json()) == 2
    assert client.get(base).status_code == 404
    assert list(client.service.uploads.folder.iterdir()) == []


def test_a_part_must_begin_where_the_upload_ends(client, content):
    upload_id = begin(client, content).json()["id"]
    put(client, upload_id, 0, content[:100])
    for offset in (0, 99, 101):
        answer = put(client, upload_id, offset, content[offset:])
        assert (answer.status_code, "must be 100" in answer.json()["detail"]) == (409, True)
    answer = put(client, upload_id, 100, content[100:] + b"x")
    assert (answer.status_code, "as announced" in answer.json()["detail"]) == (413, True)
    assert client.get(f"/api/v1/uploads/{upload_id}").json()["offset"] <= len(content)


def test_other_bytes_than_announced_become_no_job(client, content):
    upload_id = begin(client, content, sha256="0" * 64).json()["id"]
    put(client, upload_id, 0, content)
    base = f"/api/v1/uploads/{upload_id}"
    answer = client.post(f"{base}/finish")
    assert (answer.status_code, "SHA-256" in answer.json()["detail"]) == (422, True)
    assert client.get(base).status_code == 404
    assert client.get("/api/v1/jobs").json() == []


def test_an_upload_continues_after_a_restart(start, content, tmp_path):
    first = start()
    upload_id = begin(first, content).json()["id"]
    put(first, upload_id, 0, content[:1000])
    second = start()  # the other one was killed: it never ends
    second.service.queue.sweep()
    assert second.get(f"/api/v1/uploads/{upload_id}").json()["offset"] == 1000
    put(second, upload_id, 1000, content[1000:])
    assert second.post(f"/api/v1/uploads/{upload_id}/finish").status_code == 202
    assert labels_of(second, upload_id, tmp_path).max() > 3


def test_a_cut_connection_keeps_what_has_come(client, address, content, monkeypatch):
    upload_id = begin(client, content).json()["id"]
    host, port = address.removeprefix("http://").split(":")
    head = f"PUT /api/v1/uploads/{upload_id}?offset=0 HTTP/1.1\r\nhost: {host}\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    base = f"/api/v1/uploads/{upload_id}"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + content[:1000])
        wait_until(lambda: upload_id in client.service.uploads._busy)
        answer = put(client, upload_id, 0, content)
        assert (answer.status_code, "Another request" in answer.json()["detail"]) == (409, True)
        assert client.delete(base).status_code == 409
    wait_until(lambda: upload_id not in client.service.uploads._busy)
    assert client.get(base).json()["offset"] == 1000
    # a connection may be lost without a sign
    monkeypatch.setattr("dinocell.service.large_routes._LONGEST_PAUSE_S", 0.2)
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.replace("offset=0", "offset=1000").encode() + content[1000:1500])
        assert b"408" in line.recv(1000)
    assert client.get(base).json()["offset"] == 1500
    assert put(client, upload_id, 1500, content[1500:]).json()["offset"] == len(content)


def test_unfinished_uploads_have_limits(start, content):
    size = len(content)
    client = start(max_mb=(size + 1) / 1e6, queue=3, keep_gb=2.5 * size / 1e9)
    assert begin(client, content + b"xx").status_code == 413
    first, second = (begin(client, content) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    answer = begin(client, content)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    base = f"/api/v1/uploads/{first.json()['id']}"
    assert client.delete(base).status_code == 204
    assert client.delete(base).status_code == 404
    assert begin(client, b"x").status_code == 201
    assert begin(client, b"x").status_code == 201
    assert begin(client, b"x").status_code == 429  # three are unfinished
    assert "64 digits" in begin(client, content, sha256="AB" * 32).json()["detail"]
    for wrong in ({"bytes": 0}, {"sha256": "abc"}, {"size": 3}, {"min_area_px": -1}):
        assert begin(client, content, **wrong).status_code == 422, wrong
    for unknown in ("..", "0" * 32, "x"):
        assert client.get(f"/api/v1/uploads/{unknown}").status_code == 404
        assert client.post(f"/api/v1/uploads/{unknown}/finish").status_code == 404


def test_waiting_jobs_leave_less_space_for_uploads(start, content):
    size = len(content)
    client = start(keep_gb=1.5 * size / 1e9)
    client.service.worker.hold()
    first = begin(client, content).json()["id"]
    put(client, first, 0, content)
    client.post(f"/api/v1/uploads/{first}/finish")
    assert begin(client, content).status_code == 429
    assert begin(client, content[: size // 4]).status_code == 201


def test_old_uploads_are_deleted(start, content):
    client = start(keep_hours=1)
    old, young = (begin(client, content).json()["id"] for _ in range(2))
    folder = client.service.uploads.folder
    (folder / "left").mkdir()
    hour_ago = time.time() - 3700
    for name in (f"{old}/part", "left"):
        os.utime(folder / name, (hour_ago, hour_ago))
    client.service.expire()
    assert [path.name for path in folder.iterdir()] == [young]
    put(client, young, 0, content[:10])
    assert client.get(f"/api/v1/uploads/{young}").json()["offset"] == 10


def test_a_file_system_without_links_gets_a_copy(client, content, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    upload_id = begin(client, content).json()["id"]
    put(client, upload_id, 0, content)
    client.post(f"/api/v1/uploads/{upload_id}/finish")
    assert labels_of(client, upload_id, tmp_path).max() > 3
