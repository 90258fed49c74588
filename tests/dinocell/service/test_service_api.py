"""The HTTP API: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import shutil
import subprocess
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image
from service_doubles import finished, noise, upload
from starlette.testclient import TestClient
from waiting import wait_until

from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.io import read_labels, write_image
from dinocell.results.segmented import Segmentation


@pytest.fixture
def expected(picture, tmp_path, mini_model):
    """What `dinocell segment` writes of the picture."""
    options = SegmentOptions(
        device="cpu", formats=("tif", "png", "geojson", "roi", "coco"), overlay=False
    )
    segment_files([picture], tmp_path / "cli", options, model=mini_model, shown=False)
    return tmp_path / "cli"


def array_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def test_one_picture_in_labels_count_and_metrics_out(client, picture, expected):
    answer = upload(client, picture)
    assert answer.status_code == 200
    found = answer.json()
    labels = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["labels"]))))
    true = read_labels(expected / f"{picture.stem}_labels.tif")
    assert (labels == true).all()
    assert found["num_cells"] == true.max() == found["metrics"]["num_cells"]
    assert found["metrics"]["area_mean"] > 0
    assert answer.headers["location"] == f"/api/v1/jobs/{found['job']}"


def test_the_files_of_a_job_are_those_of_segment(client, picture, expected):
    job = upload(client, picture, to="jobs")
    assert job.status_code == 202
    assert finished(client, job.json()["id"])["state"] == "done"
    base = job.headers["location"]
    assert base == f"/api/v1/jobs/{job.json()['id']}"
    for kind, ending in {
        "tif": "_labels.tif",
        "png": "_labels.png",
        "geojson": "_outlines.geojson",
        "roi": "_RoiSet.zip",
        "coco": "_coco.json",
        "csv": "_cells.csv",
    }.items():
        answer = client.get(f"{base}/result/{kind}")
        assert answer.content == (expected / f"{picture.stem}{ending}").read_bytes(), kind
        assert f'filename="{picture.stem}{ending}"' in answer.headers["content-disposition"]
    overlay = Image.open(io.BytesIO(client.get(f"{base}/result/overlay").content))
    assert overlay.width > 80
    with zipfile.ZipFile(io.BytesIO(client.get(f"{base}/result/zip").content)) as archive:
        assert set(archive.namelist()) == {
            f"{picture.stem}{end}" for end in ("_labels.tif", "_cells.csv", "_overlay.png")
        }
    assert client.get(f"{base}/result/exe").status_code == 404


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({"params": {"format": "tif"}}, "image/tiff"),
        ({"headers": {"accept": "image/png, */*"}}, "image/png"),
        ({"headers": {"accept": "text/csv;q=0.9"}}, "text/csv; charset=utf-8"),
        (
            {"headers": {"accept": "image/png"}, "params": {"format": "geojson"}},
            "application/geo+json",
        ),
        ({"headers": {"accept": "*/*"}}, "application/json"),
    ],
)
def test_the_answer_has_the_format_that_was_asked_for(client, picture, how, kind):
    answer = client.post("/api/v1/segment", files={"image": picture.read_bytes()}, **how)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kind


def test_options_change_the_result(client, picture, tmp_path):
    plain = upload(client, picture).json()["metrics"]
    for fields in (
        {"peak_threshold": "0.8"},
        {"fill_threshold": "0.4"},
        {"min_area_px": "30"},
        {"min_score": "0.3"},
        {"tta": "true"},
        {"min_prominence": "0.6"},
        {"pixel_size_um": "0.5"},
    ):
        assert upload(client, picture, **fields).json()["metrics"] != plain, fields
    several = tmp_path / "several.tif"
    rng = np.random.default_rng(0)
    write_image(several, rng.integers(0, 4000, (40, 48, 4)).astype(np.uint16))
    assert upload(client, several).status_code == 422
    one, other = (upload(client, several, channels=[c]).json()["labels"] for c in "01")
    assert one != other
    assert upload(client, several, channels=["0", "1"]).json()["labels"] not in (one, other)
    mask = tmp_path / "mask.png"
    write_image(mask, np.kron(np.eye(4, dtype=np.uint8) * 255, np.ones((12, 12), np.uint8)))
    assert "allow_mask" in upload(client, mask).json()["detail"]
    assert upload(client, mask, allow_mask="true").status_code == 200
    stack = tmp_path / "stack.npy"
    np.save(stack, rng.integers(0, 4000, (3, 40, 48)).astype(np.uint16))
    assert upload(client, stack).status_code == 422
    assert upload(client, stack, page="1").status_code == 200
    planes = tmp_path / "planes.tif"
    pixels = rng.integers(0, 4000, (2, 3, 40, 48)).astype(np.uint16)
    tifffile.imwrite(planes, pixels, imagej=True, metadata={"axes": "TZYX"})
    answers = [
        upload(client, planes, time=time, z=z).json()["labels"]
        for time, z in (("0", "0"), ("1", "0"), ("1", "2"), ("1", "max"))
    ]
    assert len(set(answers)) == 4
    assert "scene" in upload(client, planes, time="0", z="0", scene="3").json()["detail"]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"peak_threshold": "2"}, "peak_threshold"),
        ({"peak_threshold": "0.1", "fill_threshold": "0.2"}, "fill_threshold"),
        ({"peak_treshold": "0.2"}, "peak_treshold"),
        ({"min_area_px": "many"}, "min_area_px"),
        ({"channels": ["9" * 5000]}, "channels"),
    ],
)
def test_wrong_values_are_named(client, picture, fields, word):
    answer = upload(client, picture, **fields)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert word in answer.json()["detail"]
    assert answer.json()["status"] == 422
    assert set(answer.json()) == {"type", "title", "status", "detail"}


def test_a_relabel_is_what_segment_gives_with_these_thresholds(
    client, picture, tmp_path, mini_model
):
    job = upload(client, picture).json()["job"]
    base = f"/api/v1/jobs/{job}"
    changes = {"peak_threshold": 0.7, "fill_threshold": 0.3, "min_area_px": 5, "min_score": 0.1}
    before = client.get(f"{base}/labels").json()
    answer = client.post(f"{base}/relabel", json=changes)
    assert answer.status_code == 200
    options = SegmentOptions(device="cpu", overlay=False, **changes)
    segment_files([picture], tmp_path / "cli", options, model=mini_model, shown=False)
    true = read_labels(tmp_path / "cli" / f"{picture.stem}_labels.tif")
    assert (array_of(client.get(f"{base}/result/npy")) == true).all()
    known = {name: answer.json()[name] for name in before}
    counts = {"revision": 1, "undoable": 1, "num_cells": true.max()}
    assert known == {**before, **changes, **counts}
    assert (labels_in(answer.json()) == true).all()
    csv = (tmp_path / "cli" / f"{picture.stem}_cells.csv").read_text()
    assert client.get(f"{base}/result/csv").text == csv
    cells = client.get(f"{base}/cells").json()
    assert cells["revision"] == 1
    assert cells["columns"]["label"] == list(range(1, true.max() + 1))
    # what is left out stays
    again = client.post(f"{base}/relabel", json={"min_area_px": 0}).json()
    assert again["peak_threshold"] == 0.7
    assert client.post(f"{base}/relabel", json={"peak_threshold": 0.2}).status_code == 422
    assert client.post(f"{base}/relabel?revision=1", json={}).status_code == 409


def test_flips_are_kept_for_a_relabel(client, picture):
    job = upload(client, picture, tta="true").json()["job"]
    base = f"/api/v1/jobs/{job}"
    cells = client.get(f"{base}/cells").json()["columns"]
    csv = client.get(f"{base}/result/csv").text.splitlines()
    column = csv[0].split(",").index("score")
    assert [float(line.split(",")[column]) for line in csv[1:]] == cells["score"]
    assert client.post(f"{base}/relabel", json={}).json()["num_cells"] == len(cells["score"])


def test_corrected_labels_replace_those_of_their_revision(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    labels = array_of(client.get(f"{base}/result/npy"))
    assert (labels.dtype, labels.shape) == (np.uint32, (64, 80))
    labels[labels == 1] = 0
    body = io.BytesIO()
    np.save(body, labels.astype(np.uint16))
    answer = client.put(f"{base}/labels?revision=0", content=body.getvalue())
    assert answer.status_code == 200
    assert answer.json()["edited"]
    assert answer.json()["num_cells"] == labels.max() - 1
    kept = array_of(client.get(f"{base}/result/npy"))
    assert (kept == np.where(labels, labels - 1, 0)).all()  # gaps are closed
    other = client.put(f"{base}/labels?revision=0", content=body.getvalue())
    assert other.status_code == 409
    assert "somebody else" in other.json()["detail"]
    several = io.BytesIO()
    np.savez(several, labels)
    broken = (b"", b"\x93NUMPY", body.getvalue()[:-1], several.getvalue())
    for wrong in (*broken, _npy(labels[1:]), _npy(labels / 2)):
        assert client.put(f"{base}/labels?revision=1", content=wrong).status_code == 422
    assert client.put(f"{base}/labels", content=body.getvalue()).status_code == 422


def labels_in(change: dict) -> np.ndarray:
    """The pixels of a change."""
    pixels = np.frombuffer(zlib.decompress(base64.b64decode(change["labels"])), "<u4")
    return pixels.reshape(change["height"], change["width"])


def test_corrections_are_steps_that_can_be_undone(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    numbered = f"{base}/labels/npy"
    first = array_of(client.get(numbered))

    def correct(kind, **values):
        return client.post(f"{base}/corrections", json={"kind": kind, **values})

    states = [first]
    cell = int(np.bincount(first.ravel())[4:].argmax()) + 4
    middle = float(np.nonzero(first == cell)[0].mean())
    for kind, values in (
        ("remove", {"cells": [1]}),
        ("merge", {"cells": [2, 3]}),
        ("cut", {"points": [[middle, 0], [middle, 79]]}),
        ("erase", {"points": [[0, 0], [10, 10]], "radius_px": 2}),
        ("paint", {"points": [[1, 1], [8, 8]], "radius_px": 1}),
    ):
        answer = correct(kind, **values)
        assert answer.status_code == 200, answer.json()
        change, before = answer.json(), states[-1].copy()
        after = array_of(client.get(numbered))
        assert (after != before).any(), kind
        rows, columns = (slice(change[a], change[a] + change[b]) for a, b in _SIDES)
        assert (labels_in(change) == after[rows, columns]).all()
        before[rows, columns] = labels_in(change)
        assert (before == after).all()
        assert change["undoable"] == change["revision"] == len(states)
        assert set(change["touched"]) >= set(np.unique(after[after != states[0]])) - {0}
        states.append(after)
    assert 1 not in states[-1]
    cells = client.get(f"{base}/cells").json()
    assert cells["numbers"] == np.unique(states[-1])[1:].tolist()
    assert cells["columns"]["label"] == list(range(1, len(cells["numbers"]) + 1))
    for _ in range(5):
        assert correct("undo").status_code == 200
    assert (array_of(client.get(numbered)) == array_of(client.get(f"{base}/result/npy"))).all()
    again = client.get(f"{base}/labels").json()
    assert (again["edited"], again["undoable"], again["redoable"]) == (False, 0, 5)
    assert "undo" in correct("undo").json()["detail"]
    for _ in range(5):
        correct("redo")
    assert (array_of(client.get(numbered)) == states[-1]).all()
    answer = client.post(f"{base}/corrections?revision=3", json={"kind": "undo"})
    assert answer.status_code == 409
    assert correct("split", cells=[9999]).status_code == 422
    assert correct("grow").status_code == 422
    assert correct("dance").status_code == 422


_SIDES = (("row", "height"), ("column", "width"))


def test_corrections_survive_a_relabel(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    first = array_of(client.get(f"{base}/labels/npy"))
    client.post(f"{base}/corrections", json={"kind": "remove", "cells": [1]})
    for area, amend in ((3, False), (4, True), (5, True)):
        body = {"min_area_px": area, "fill_threshold": 0.3}
        answer = client.post(f"{base}/relabel?amend={amend}", json=body)
        assert answer.json()["undoable"] == 2
    labels = array_of(client.get(f"{base}/labels/npy"))
    assert (labels[first == 1] == 0).all()
    assert (labels != first)[first != 1].any()
    answer = client.post(f"{base}/corrections", json={"kind": "undo"}).json()
    assert (answer["min_area_px"], answer["undoable"], answer["redoable"]) == (0, 1, 1)
    assert (array_of(client.get(f"{base}/labels/npy")) == np.where(first == 1, 0, first)).all()
    client.post(f"{base}/corrections", json={"kind": "undo"})
    assert (array_of(client.get(f"{base}/labels/npy")) == first).all()


def _npy(array) -> bytes:
    body = io.BytesIO()
    np.save(body, array, allow_pickle=True)
    return body.getvalue()


def test_a_file_on_its_way_survives_a_correction(client, picture):
    job = upload(client, picture).json()["job"]
    base, files = f"/api/v1/jobs/{job}", client.service.queue.job_folder(job) / "files"
    for kind, kept in (("remove", [0, 1]), ("undo", [1, 2]), ("redo", [2, 3])):
        client.get(f"{base}/result/geojson")
        body = {"kind": kind, "cells": [1] if kind == "remove" else []}
        assert client.post(f"{base}/corrections", json=body).status_code == 200
        client.get(f"{base}/result/geojson")
        assert sorted(int(path.name) for path in files.iterdir()) == kept


@pytest.mark.parametrize("changes", [1, 2])
def test_what_is_written_has_one_revision_while_somebody_corrects(
    client, picture, monkeypatch, changes
):
    job = upload(client, picture).json()["job"]
    base, folder = f"/api/v1/jobs/{job}", client.service.queue.job_folder(job)

    def remove_one():
        result = client.service.result(client.service.queue.get(job))
        first = int(result.state().numbers[0])
        result.correct("remove", {"cells": [first], "points": [], "radius_px": 3}, revision=None)

    remove_one()
    save = Segmentation.save

    def slow(*args, **values):
        for _ in range(changes):
            remove_one()
        return save(*args, **values)

    before = array_of(client.get(f"{base}/result/npy"))
    monkeypatch.setattr(Segmentation, "save", slow)
    answer = client.get(f"{base}/result/zip")
    monkeypatch.undo()
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        files = {name.removeprefix(picture.stem): archive.read(name) for name in archive.namelist()}
    labels = tifffile.imread(io.BytesIO(files["_labels.tif"]))
    assert (labels == before).all()
    assert files["_cells.csv"].count(b"\n") == labels.max() + 1
    now = tifffile.imread(io.BytesIO(client.get(f"{base}/result/tif").content))
    assert now.max() == labels.max() - changes
    names = {path.name for path in (folder / "files").glob("*/*")} - {"image_labels.npy"}
    assert names == {
        f"image_{one}" for one in ("all.zip", "cells.csv", "labels.tif", "overlay.png")
    }
    assert not [path for path in folder.rglob("*") if path.name.startswith((".", "tmp"))]


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(client, picture, monkeypatch):
    job = upload(client, picture).json()["job"]
    base, result = f"/api/v1/jobs/{job}", client.service.result(client.service.queue.get(job))
    for cell in (1, 2):
        earlier = result.revision()
        client.post(f"{base}/corrections", json={"kind": "remove", "cells": [cell]})
    read, seen = result.history.revision, [earlier]  # its state is gone
    monkeypatch.setattr(result.history, "revision", lambda: seen.pop() if seen else read())
    number, labels = result.stored_labels()
    assert (number, set(range(4)) & set(np.unique(labels))) == (2, {0, 3})


def test_pickles_are_not_read(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    pickled = _npy(np.array([{"a": 1}], object))
    assert client.put(f"{base}/labels?revision=0", content=pickled).status_code == 422
    assert upload_bytes(client, "a.npy", pickled).status_code == 422


def upload_bytes(client, name: str, content: bytes):
    return client.post("/api/v1/segment", files={"image": (name, content)})


def test_the_image_comes_as_it_was_segmented(client, picture, tmp_path):
    from dinocell.io import read_image

    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    assert (array_of(client.get(f"{base}/image")) == read_image(picture).pixels).all()
    colours = np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)
    write_image(tmp_path / "colours.png", colours)
    base = f"/api/v1/jobs/{upload(client, tmp_path / 'colours.png').json()['job']}"
    assert array_of(client.get(f"{base}/image")).shape == (40, 48)


def test_progress_comes_as_events(client, picture):
    job = upload(client, picture, to="jobs").json()["id"]
    with client.stream("GET", f"/api/v1/jobs/{job}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = list(stream.iter_lines())
    states = [json.loads(line[6:])["state"] for line in lines if line.startswith("data: ")]
    assert states[-1] == "done"
    assert all(line in ("event: job", "") for line in lines if not line.startswith("data: "))


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.tif", b"II*\0" + bytes(100), "a"),
        ("notes.txt", b"no image, but a text that is long enough", "text"),
        ("empty.tif", b"", "empty"),
        ("page.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged"),
    ],
)
def test_files_that_are_no_images(client, name, content, word):
    answer = upload_bytes(client, name, content)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert str(client.service.options.jobs) not in answer.text
    assert client.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd.tif", "passwd"),
        ("..\\..\\a.tif", "a"),
        ("a\r\nb.tif", "a_b"),
        ("....", "image"),
        ("ä (1).tif", "ä (1)"),
        ("x" * 300 + ".tif", "x" * 80),
        ("細" * 80 + ".tif", "細" * 53),  # of three bytes each
    ],
)
def test_names_of_uploads_choose_no_path(name, safe, tmp_path):
    from dinocell.service.stored import safe_name

    assert safe_name(name) == safe


def test_a_name_with_folders_writes_nothing_elsewhere(client, picture, tmp_path):
    before = sorted(path for path in tmp_path.iterdir())
    answer = client.post(
        "/api/v1/jobs", files={"image": ("../../../evil.tif", picture.read_bytes())}
    )
    job = finished(client, answer.json()["id"])
    assert (job["name"], job["state"]) == ("evil", "done")
    assert sorted(path for path in tmp_path.iterdir()) == before
    for path in ("../../queue.sqlite", "..%2f..%2fqueue.sqlite", "zip/../../image.tif"):
        answer = client.get(f"/api/v1/jobs/{job['id']}/result/{path}")
        assert answer.status_code == 404


def test_images_of_too_many_pixels_are_refused_before_they_are_read(start, tmp_path):
    client = start(max_megapixels=1)
    bomb = tmp_path / "bomb.png"
    Image.new("L", (1001, 1000)).save(bomb)
    answer = upload(client, bomb)
    assert answer.status_code == 422
    assert "1,000,000 pixels" in answer.json()["detail"]


def test_uploads_that_are_too_large(start, picture, collected):
    client = start(max_mb=0.001)
    big = bytes(10**5)
    for how in ({"files": {"image": big}}, {"content": iter([big] * 3)}):
        kind = {} if "files" in how else {"content-type": "multipart/form-data; boundary=x"}
        answer = client.post("/api/v1/jobs", headers=kind, **how)
        assert answer.status_code == 413
        assert "0.001 MB" in answer.json()["detail"]
    assert not list((client.service.options.jobs / "jobs").iterdir())


@pytest.fixture
def collected():
    """For tests that break uploads off: the parser of forms leaves its temporary files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


def test_half_an_upload_leaves_nothing(client, collected):
    half = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.tif"\r\n\r\nII*\0'
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for body in (half, half[:30], b""):
        answer = client.post("/api/v1/jobs", content=body, headers=kind)
        assert answer.status_code in (400, 422)
        assert answer.headers["content-type"] == "application/problem+json"
    assert not list((client.service.options.jobs / "jobs").iterdir())
    assert client.get("/api/v1/jobs").json() == []


def test_a_full_queue_says_when_to_come_back(start, picture):
    client = start(queue=2)
    client.service.worker.hold()
    answers = [upload(client, picture, to="jobs") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert int(answers[2].headers["retry-after"]) > 0
    assert [answer.json().get("waiting_before") for answer in answers] == [0, 1, None]
    client.service.worker.release()
    for answer in answers[:2]:
        assert finished(client, answer.json()["id"])["state"] == "done"
    assert upload(client, picture).status_code == 200


def test_cancelling_and_deleting(start, picture):
    client = start()
    client.service.worker.hold()
    waiting = upload(client, picture, to="jobs").json()["id"]
    assert client.delete(f"/api/v1/jobs/{waiting}").json()["state"] == "cancelled"
    client.service.worker.release()
    done = upload(client, picture).json()["job"]
    assert client.delete(f"/api/v1/jobs/{done}").json()["state"] == "deleted"
    for job in (waiting, done):
        assert client.get(f"/api/v1/jobs/{job}/result/tif").status_code == 410
        assert not client.service.queue.job_folder(job).exists()
        assert finished(client, job)["state"] in ("cancelled", "deleted")


def test_cancelling_a_running_job(client, tmp_path):
    worker = client.service.worker.worker
    seen, report_on = [], worker.report

    def report(line):
        if line.get("total") and not seen:
            seen.append(line["job"])
            client.service.queue.remove(line["job"])
        report_on(line)

    worker.report = report
    job = upload(client, noise(tmp_path / "a.tif", 0, (200, 200)), to="jobs").json()["id"]
    ended = finished(client, job)
    assert seen == [job]
    assert (ended["state"], ended["error"]) == ("cancelled", None)
    wait_until(lambda: not client.service.queue.job_folder(job).exists())  # it goes after the state


def test_jobs_that_do_not_exist_or_are_not_done(start, picture):
    client = start()
    assert client.get(f"/api/v1/jobs/{'0' * 32}").status_code == 404
    assert client.get("/api/v1/jobs/..").status_code in (404, 405)
    client.service.worker.hold()
    job = upload(client, picture, to="jobs").json()["id"]
    answer = client.get(f"/api/v1/jobs/{job}/result/tif")
    assert answer.status_code == 409
    assert "queued" in answer.json()["detail"]


def test_expired_jobs_say_so(start, picture):
    client = start(keep_hours=1e-9)
    job = upload(client, picture).json()["job"]
    client.service.expire()
    assert client.get(f"/api/v1/jobs/{job}").json()["state"] == "expired"
    answer = client.get(f"/api/v1/jobs/{job}/cells")
    assert answer.status_code == 410
    assert "expired" in answer.json()["detail"]
    assert not client.service.queue.job_folder(job).exists()


def test_a_restart_keeps_jobs_and_results(start, picture):
    first = start()
    done = upload(first, picture).json()
    first.service.worker.hold()
    waiting = upload(first, picture, to="jobs").json()["id"]
    second = start()  # the other one was killed: it never ends
    assert finished(second, waiting)["state"] == "done"
    assert second.get(f"/api/v1/jobs/{done['job']}/result/tif").status_code == 200
    assert 'jobs_total{state="done"} 2' in second.get("/metrics").text


def test_figures_for_prometheus(client, picture):
    from prometheus_client import parser

    cells = upload(client, picture).json()["num_cells"]
    upload_bytes(client, "a.tif", b"broken, but long enough to be read as one")
    text = client.get("/metrics").text
    samples = {
        (s.name, *s.labels.values()): s.value
        for family in parser.text_string_to_metric_families(text)
        for s in family.samples
    }
    assert samples["dinocell_images_total",] == 1
    assert samples["dinocell_cells_total",] == cells
    assert samples["dinocell_jobs_total", "failed"] == 1
    assert samples["dinocell_queue_jobs", "queued"] == 0
    assert all(samples["dinocell_seconds_total", s] > 0 for s in ("read", "network", "cells"))


def test_models_health_and_the_description_of_the_api(client):
    (model,) = client.get("/api/v1/models").json()
    assert (model["architecture"], model["device"]) == ("tiny/16", "cpu")
    assert client.get("/health").json()["status"] == "ok"
    client.service.worker.model = None
    assert client.get("/health").status_code == 503
    schema = client.get("/api/v1/openapi.json").json()
    assert "/api/v1/segment" in schema["paths"]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (path, method)


TOKEN = "0123456789abcdef"


def test_a_token_opens_the_api(start, picture):
    client = start(token=TOKEN, host="0.0.0.0")
    for given in (
        None,
        "Bearer wrong",
        f"Basic {TOKEN}",
        "Bearer",
        f"Bearer {TOKEN[:-1]}",
        "Bearer é",
    ):
        headers = {} if given is None else {"authorization": given.encode("latin-1")}
        guesser = from_address(client, str(given))
        for path in ("/api/v1/jobs", "/metrics", "/api/v1/openapi.json"):
            answer = guesser.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["status"] == 401
    right = {"authorization": f"Bearer {TOKEN}", "host": "microscope.example"}
    assert client.get("/api/v1/jobs", headers=right).status_code == 200
    assert client.get("/health").status_code == 200


def from_address(client, address: str) -> TestClient:
    """The service for a client of another address."""
    return TestClient(client.app, base_url="http://127.0.0.1", client=(address, 1))


def test_an_address_that_guesses_tokens_waits_and_no_other(start, monkeypatch):
    client, now = start(token=TOKEN, host="0.0.0.0"), [1000.0]
    monkeypatch.setattr("dinocell.service.guard.time.monotonic", lambda: now[0])
    right, wrong = ({"authorization": f"Bearer {token}"} for token in (TOKEN, "wrong"))

    def status(address, headers) -> int:
        return from_address(client, address).get("/api/v1/jobs", headers=headers).status_code

    assert [status("10.0.0.1", {}) for _ in range(20)] == [401] * 20  # a guess is a token
    assert [status("10.0.0.1", wrong) for _ in range(10)] == [401] * 10
    answer = from_address(client, "10.0.0.1").get("/api/v1/jobs", headers=wrong)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"].endswith("try again in 60 s")
    assert from_address(client, "10.0.0.1").get("/health").status_code == 200
    # A program with an old token must not shut out those who share its address.
    assert status("10.0.0.1", right) == 200
    assert status("10.0.0.2", wrong) == 401
    now[0] += 59
    assert status("10.0.0.1", wrong) == 429
    now[0] += 1
    assert status("10.0.0.1", wrong) == 401
    for number in range(10):  # one computer has many addresses of IPv6
        assert status(f"2001:db8:0:1::{number}", wrong) == 401
    assert [status(f"2001:db8:0:{net}::ffff", wrong) for net in (1, 2)] == [429, 401]
    for _ in range(10):  # IPv4 in IPv6 is no network
        assert status("::ffff:10.0.0.3", wrong) == 401
    assert [status(one, wrong) for one in ("10.0.0.3", "::ffff:10.0.0.4")] == [429, 401]


def test_few_addresses_are_remembered(monkeypatch):
    from dinocell.service import guard

    monkeypatch.setattr(guard, "_MOST_ADDRESSES", 3)
    wrong = guard._WrongTokens()
    for address in ("a", "b", "c", "a", "d"):
        wrong.note(address)
    assert list(wrong._times) == ["c", "a", "d"]


def test_pages_of_other_sites_are_refused(start, picture):
    client = start()
    assert client.get("/api/v1/jobs", headers={"host": "evil.example"}).status_code == 403
    for origin in ("http://evil.example", "null", "http://127.0.0.1:99"):
        answer = client.post(
            "/api/v1/jobs", files={"image": picture.read_bytes()}, headers={"origin": origin}
        )
        assert answer.status_code == 403
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        headers = {"host": host, "origin": f"http://{host}"}
        assert client.get("/api/v1/jobs", headers=headers).status_code == 200


def test_every_answer_forbids_foreign_content(client):
    for path in ("/health", "/api/v1/jobs", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"


def test_failures_of_the_service_show_nothing_of_it(client, picture, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(type(client.service.queue), "newest", fail)
    quiet = TestClient(client.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    answer = quiet.get("/api/v1/jobs")
    assert answer.status_code == 500
    assert "secret" not in answer.text

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "/secret/path")

    monkeypatch.setattr("dinocell.service.routes.shutil.copyfileobj", full)
    answer = upload(client, picture)
    assert answer.status_code == 507
    assert "secret" not in answer.text
    assert not list((client.service.options.jobs / "jobs").iterdir())


def test_a_full_disk_during_an_export_shows_nothing_of_the_service(client, picture, monkeypatch):
    job = finished(client, upload(client, picture).json()["job"])["id"]

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    answer = client.get(f"/api/v1/jobs/{job}/result/geojson")
    assert answer.status_code == 507
    assert answer.json()["detail"] == "The disk of the service is full: try again later"
    monkeypatch.undo()
    assert client.get(f"/api/v1/jobs/{job}/result/geojson").status_code == 200


def test_values_of_all_channels_are_limited(start, tmp_path):
    client = start(max_megapixels=0.002)  # 2000 pixels, 8000 values
    tifffile.imwrite(
        tmp_path / "few.tif", np.zeros((3, 40, 45), np.uint8), photometric="minisblack"
    )
    tifffile.imwrite(
        tmp_path / "many.tif", np.zeros((9, 40, 45), np.uint8), photometric="minisblack"
    )
    for name, word in (("many", "up to 8,000 values"), ("few", "")):
        channels = [str(n) for n in range(9 if name == "many" else 3)]
        answer = upload(client, tmp_path / f"{name}.tif", channels=channels)
        assert (answer.status_code == 422) == bool(word), answer.text
        assert word in answer.text


def test_waiting_uploads_have_a_limit_of_their_own(start, tmp_path):
    client = start(keep_gb=10e-6)  # 10 kB
    client.service.worker.hold()
    codes = [
        upload(client, noise(tmp_path / f"{seed}.tif", seed), to="jobs").status_code
        for seed in range(4)
    ]
    assert codes[0] == 202
    assert codes[-1] == 429
    alone = upload(client, noise(tmp_path / "large.tif", 1, (100, 100)), to="jobs")
    assert alone.status_code == 422  # there will never be place for it
    assert "larger `keep_gb`" in alone.json()["detail"]


def test_few_requests_compute_at_once(client, picture, monkeypatch):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    monkeypatch.setattr("dinocell.service.routes._LONGEST_TURN_S", 0.01)
    places = client.service.places
    taken = [places.acquire(blocking=False) for _ in range(9)]
    assert taken.count(True) == 4
    for path in ("cells", "labels"):
        answer = client.get(f"{base}/{path}")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert client.get(base).status_code == 200
    for _ in range(4):
        places.release()
    for _ in range(9):  # each gives its place back
        assert client.get(f"{base}/cells").status_code == 200


def test_those_who_wait_for_a_place_stop_nobody_else(client, picture, monkeypatch):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    monkeypatch.setattr("dinocell.service.routes._LONGEST_TURN_S", 600.0)
    places = client.service.places
    for _ in range(4):
        places.acquire()
    with ThreadPoolExecutor(60) as pool:
        waiting = [pool.submit(client.get, f"{base}/cells") for _ in range(60)]
        time.sleep(0.5)
        assert client.get("/health").status_code == 200
        assert not any(one.done() for one in waiting)  # it was answered before them
        places.release(4)
        assert {one.result().status_code for one in waiting} == {200}


def test_the_answer_to_one_picture_is_written_in_a_place(client, picture):
    places, queue = client.service.places, client.service.queue
    for _ in range(4):
        places.acquire()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(upload, client, picture, to="segment?format=roi")
        wait_until(lambda: [job.state for job in queue.newest()] == ["done"])
        time.sleep(0.5)
        assert not list(queue.folder.glob("jobs/*/files"))
        places.release(4)
        assert waiting.result().status_code == 200


@pytest.mark.parametrize("path", ["cells", "labels", "labels/npy", "result/csv"])
def test_a_slow_reader_of_an_answer_holds_no_place(client, picture, path):
    job = upload(client, picture).json()["job"]
    free, left = [], client.service.places

    async def watched(scope, receive, send) -> None:
        async def passed(message) -> None:
            if message["type"] == "http.response.start":
                taken = [left.acquire(blocking=False) for _ in range(5)]
                free.append(taken.count(True))
                left.release(taken.count(True))
            await send(message)

        await client.app(scope, receive, passed)

    reader = TestClient(watched, base_url="http://127.0.0.1")
    assert reader.get(f"/api/v1/jobs/{job}/{path}").status_code == 200
    assert free == [4]


def test_files_that_vanish_are_gone_and_no_fault(client, picture):
    job = upload(client, picture).json()["job"]
    (client.service.queue.job_folder(job) / "plane.npy").unlink()
    answer = client.get(f"/api/v1/jobs/{job}/image")
    assert (answer.status_code, "gone" in answer.json()["detail"]) == (410, True)


def test_a_service_without_a_living_worker_is_not_ready(client, monkeypatch):
    assert client.get("/health").status_code == 200
    monkeypatch.setattr(type(client.service.worker), "alive", False)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (503, "starting")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"peak_threshold": "high"}, "`peak_threshold` must be a number"),
        ({"min_area_px": "1.5"}, "`min_area_px` must be a whole number"),
        ({"fill_threshold": "2"}, "`fill_threshold` must be below 1.0"),
        ({"tta": "perhaps"}, "`tta` must be true or false"),
        ({"z": "median"}, "`z` must be max, mean or a whole number"),
        ({"size": "3"}, "`size` is unknown: leave it out"),
    ],
)
def test_errors_of_values_are_sentences(client, picture, fields, sentence):
    assert upload(client, picture, **fields).json()["detail"] == sentence


def test_a_warning_of_two_parts_is_one(client, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(tmp_path / "colour.png")
    warnings = upload(client, tmp_path / "colour.png").json()["warnings"]
    (colour,) = [text for text in warnings if "colour picture" in text]
    assert colour.endswith("choose it with `channels`")


def test_a_file_given_as_the_whole_body_has_a_short_answer(client):
    body = np.random.default_rng(3).bytes(200_000)
    form = {"content-type": "application/x-www-form-urlencoded"}  # as curl sends --data-binary
    answer = client.post("/api/v1/segment", content=body, headers=form)
    assert answer.status_code in (400, 422)
    assert "`image` must be given" in answer.json()["detail"]
    assert len(answer.content) < 10_000


def test_a_form_without_a_file_says_so(client):
    assert client.post("/api/v1/jobs", data={"image": "text"}).json()["detail"] == (
        "`image` must be a file: send it as a part of a form with a file name"
    )
    assert "`image` must be given" in client.post("/api/v1/jobs").json()["detail"]


def test_a_job_that_takes_too_long_fails(client, picture):
    worker, ended = client.service.worker.worker, []
    worker.limit_s = 0.0
    worker.give_up = ended.append
    answer = upload(client, picture)
    if answer.status_code == 422:  # else it was faster than the timer
        assert "A job may take 0 minutes" in answer.json()["detail"]
    assert len(ended) <= 1
    worker.limit_s = 60.0
    assert upload(client, picture).status_code == 200


def test_folders_are_zipped(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}/result"
    for kind, folder, entry in (
        ("ome-zarr", "_labels.zarr", ".zattrs"),
        ("ctc", "_RES", "res_track.txt"),
    ):
        answer = client.get(f"{base}/{kind}")
        assert answer.headers["content-type"] == "application/zip"
        names = zipfile.ZipFile(io.BytesIO(answer.content)).namelist()
        assert f"{picture.stem}{folder}/{entry}" in names
        assert all(name.startswith(f"{picture.stem}{folder}/") for name in names)
        assert f'{picture.stem}{folder}.zip"' in answer.headers["content-disposition"]


def test_downloads_hold_the_name_of_the_image(client, tmp_path):
    import anndata
    import pyarrow.parquet

    job = upload(client, noise(tmp_path / "image ü 7.tif", 0)).json()["job"]

    def file(kind: str) -> bytes:
        return client.get(f"/api/v1/jobs/{job}/result/{kind}").content

    for kind in ("ome-tiff", "h5ad", "parquet", "ome-zarr", "zip"):
        (tmp_path / kind).write_bytes(file(kind))
    with tifffile.TiffFile(tmp_path / "ome-tiff") as tif:
        assert 'Name="image ü 7"' in tif.ome_metadata
    assert anndata.read_h5ad(tmp_path / "h5ad").uns["image"] == "image ü 7"
    assert (
        pyarrow.parquet.read_schema(tmp_path / "parquet").metadata[b"image"] == "image ü 7".encode()
    )
    with zipfile.ZipFile(tmp_path / "ome-zarr") as archive:
        about = json.loads(archive.read("image ü 7_labels.zarr/.zattrs"))
    assert about["multiscales"][0]["name"] == "image ü 7"
    with zipfile.ZipFile(tmp_path / "zip") as archive:
        assert sorted(archive.namelist())[0] == "image ü 7_cells.csv"


def test_names_of_downloads_suit_programs_that_read_ascii_alone(client, picture):
    for name, plain, encoded in (
        ("Zellen grün.tif", "Zellen gr_n_cells.csv", "Zellen%20gr%C3%BCn_cells.csv"),
        ("a(1)+b.tif", "a(1)+b_cells.csv", "a%281%29%2Bb_cells.csv"),
    ):
        job = upload_bytes(client, name, picture.read_bytes()).json()["job"]
        answer = client.get(f"/api/v1/jobs/{job}/result/csv")
        assert answer.headers["content-disposition"] == (
            f"attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}"
        )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_names_files_as_the_service_does(address, client, picture, tmp_path):
    job = upload_bytes(client, "Zellen grün.tif", picture.read_bytes()).json()["job"]
    (tmp_path / "got").mkdir()
    command = ["curl", "-sSOJ", f"{address}/api/v1/jobs/{job}/result/csv"]
    subprocess.run(command, cwd=tmp_path / "got", check=True)
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["Zellen gr_n_cells.csv"]


def test_a_correction_renews_the_time_for_which_a_result_is_kept(client, picture):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    kept_s = client.service.options.keep_hours * 3600
    queue = client.service.queue
    queue._database.execute("UPDATE jobs SET finished = finished - ?", (kept_s + 60,))
    body = {"kind": "remove", "cells": [1]}
    assert client.post(f"{base}/corrections", json=body).status_code == 200
    client.service.expire()
    assert client.get(f"{base}/labels").json()["num_cells"] > 0
    changed = queue.job_folder(base.rpartition("/")[2]) / "current.json"
    os.utime(changed, (time.time() - kept_s - 60,) * 2)
    client.service.expire()
    assert client.get(f"{base}/labels").status_code == 410


def test_uploads_that_arrive_together_have_a_limit(start, picture):
    size_mb = (picture.stat().st_size + 500) / 1e6
    client = start(max_mb=size_mb)
    client.service.worker.hold()
    try:
        # the form may add 64 kB to each, so that many small files have room
        statuses = []
        limit = 4 * (client.service.options.max_bytes + 2**16)
        count = limit // picture.stat().st_size + 3
        threads = [
            threading.Thread(target=lambda: statuses.append(upload(client, picture).status_code))
            for _ in range(count)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: 429 in statuses)
        assert len(statuses) < 8
    finally:
        client.service.worker.release()
    for thread in threads:
        thread.join()
    assert statuses.count(200) >= count - 8
    assert upload(client, picture).status_code == 200
