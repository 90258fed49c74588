"""`dinocell view`: what segment wrote is shown and corrected, and the original files stay."""

from __future__ import annotations

import copy
import csv
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from service_doubles import noise
from starlette.testclient import TestClient

from dinocell.batch.folder import settings_of
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.errors import UsageError
from dinocell.io import read_labels
from dinocell.network.model import save_model, with_config
from dinocell.service.app import create_app
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Queue
from dinocell.service.serve import run_view
from dinocell.service.viewing import Viewed, ViewService


@pytest.fixture
def results(tmp_path, mini_model):
    """A folder of results of two images."""
    save_model(tmp_path / "mini.safetensors", mini_model)
    images = [noise(tmp_path / f"{name}.tif", seed) for seed, name in enumerate("ab")]
    options = SegmentOptions(device="cpu", overlay=False, min_area_px=2)
    segment_files(images, tmp_path / "out", options, model=mini_model, shown=False)
    return tmp_path / "out"


@pytest.fixture
def view(results, tmp_path):
    """Starts the page of the results."""
    clients = []

    def start(model="mini.safetensors") -> TestClient:
        for client in clients:
            client.__exit__(None, None, None)
        clients.clear()
        viewed = Viewed(results, str(tmp_path / model), "cpu")
        folder = results / "corrections"
        service = ViewService(ServiceOptions(jobs=folder), Queue(folder), viewed)
        client = TestClient(create_app(service), base_url="http://127.0.0.1").__enter__()
        client.service = service
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def array_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def column(path, name) -> list[float]:
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def test_results_are_shown_as_they_were_written(view, results):
    client = view()
    jobs = client.get("/api/v1/jobs").json()
    assert [job["name"] for job in jobs] == ["a", "b"]
    base = f"/api/v1/jobs/{jobs[0]['id']}"
    labels = read_labels(results / "a_labels.tif")
    assert (array_of(client.get(f"{base}/labels/npy")) == labels).all()
    assert client.get(f"{base}/result/csv").text == (results / "a_cells.csv").read_text()
    scores = column(results / "a_cells.csv", "score")
    assert client.get(f"{base}/cells").json()["columns"]["score"] == pytest.approx(scores)
    revision = client.get(f"{base}/labels").json()
    assert (revision["revision"], revision["min_area_px"]) == (0, 2)
    assert not list(results.glob("corrections/jobs/*/map.npy"))  # the network has not run
    assert client.get("/health").json()["status"] == "ok"
    assert not client.get("/api/v1/models").json()[0]["takes_images"]
    with (results / "a_cells.csv").open("rb") as file:
        assert client.post("/api/v1/jobs", files={"image": ("a.png", file)}).status_code == 409
    assert client.delete(base).status_code == 409


def test_the_start_says_what_failed_and_where_corrections_are_written(
    results, tmp_path, mini_model, monkeypatch, capsys
):
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: self.config.app)
    (tmp_path / "c.tif").write_bytes(b"no image")
    images = [tmp_path / f"{name}.tif" for name in "abc"]
    options = SegmentOptions(device="cpu", overlay=False, min_area_px=2)

    def lines() -> list[str]:
        run_view(results, ServiceOptions(port=0))
        return capsys.readouterr().out.splitlines()

    capsys.readouterr()
    assert len(lines()) == 2
    options = replace(options, resume=True)
    segment_files(images, results, options, model=mini_model, shown=False)
    _, written, failed = lines()
    assert str(results / "NAME_labels_v2.tif") in written
    assert failed == "Segmentation failed for 1 image, and summary.csv says why: c"
    excel = (results / "summary.csv").read_text(encoding="utf-8").replace(",c.tif", ",\u00b5.tif")
    (results / "summary.csv").write_bytes(b"\xef\xbb\xbf" + excel.encode("latin-1"))
    assert lines()[2] == failed
    (results / "summary.csv").unlink()
    assert len(lines()) == 2


def test_what_a_killed_export_left_is_deleted(view, results, monkeypatch):
    client = view()
    job = client.get("/api/v1/jobs").json()[0]["id"]
    place = client.service.queue.job_folder(job)
    monkeypatch.setattr("shutil.rmtree", lambda *args, **values: None)  # as if it were killed
    assert client.get(f"/api/v1/jobs/{job}/result/geojson").status_code == 200
    monkeypatch.undo()
    before = {path.name for path in place.iterdir()}
    client = view()
    (left,) = before - {path.name for path in place.iterdir()}
    assert left.startswith(".tmp-")
    assert client.get(f"/api/v1/jobs/{job}/result/geojson").status_code == 200


def test_corrected_labels_are_written_beside_the_original(view, results):
    original = {path.name: path.read_bytes() for path in results.glob("*.*")}
    client = view()
    base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
    labels = read_labels(results / "a_labels.tif")
    answer = client.post(f"{base}/corrections", json={"kind": "remove", "cells": [1]})
    assert answer.status_code == 200
    client.service.expire()
    assert (read_labels(results / "a_labels_v2.tif") == np.maximum(labels, 1) - 1).all()
    areas = [column(results / name, "area") for name in ("a_cells_v2.csv", "a_cells.csv")]
    assert areas[0] == areas[1][1:]
    client = view()  # the same corrections, in the next version when there are more
    client.service.expire()
    assert not (results / "a_labels_v3.tif").exists()
    client.post(f"{base}/corrections", json={"kind": "merge", "cells": [2, 3]})
    client = view()  # what was not written yet is written at the end
    assert read_labels(results / "a_labels_v3.tif").max() == labels.max() - 2
    assert read_labels(results / "a_labels_v2.tif").max() == labels.max() - 1
    assert client.get(f"{base}/labels").json()["undoable"] == 2
    assert {name: (results / name).read_bytes() for name in original} == original


def test_other_thresholds_run_the_network_of_the_results(view, results, tmp_path, mini_model):
    client = view()
    base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
    changes = {"min_area_px": 6, "peak_threshold": 0.6}
    assert client.post(f"{base}/relabel", json=changes).status_code == 200
    options = SegmentOptions(device="cpu", overlay=False, **changes)
    segment_files([tmp_path / "a.tif"], tmp_path / "other", options, model=mini_model, shown=False)
    true = read_labels(tmp_path / "other" / "a_labels.tif")
    assert (array_of(client.get(f"{base}/labels/npy")) == true).all()


def page_of(tmp_path, model, images, **options) -> TestClient:
    """The page of new results of some images, which the caller closes."""
    save_model(tmp_path / "mini.safetensors", model)
    options = SegmentOptions(device="cpu", overlay=False, **options)
    segment_files(images, tmp_path / "out", options, model=model, shown=False)
    viewed = Viewed(tmp_path / "out", str(tmp_path / "mini.safetensors"), "cpu")
    folder = tmp_path / "out" / "corrections"
    service = ViewService(ServiceOptions(jobs=folder), Queue(folder), viewed)
    return TestClient(create_app(service), base_url="http://127.0.0.1")


def test_images_of_one_name_in_two_folders_keep_apart(tmp_path, mini_model):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
    images = [tmp_path / "b.tif", tmp_path / "x" / "b.tif", tmp_path / "y" / "b.tif"]
    images = [noise(path, seed) for seed, path in enumerate(images)]
    with page_of(tmp_path, mini_model, images) as client:
        jobs = {
            job["name"]: f"/api/v1/jobs/{job['id']}" for job in client.get("/api/v1/jobs").json()
        }
        assert list(jobs) == ["b", "x/b", "y/b"]
        for name, base in jobs.items():
            true = read_labels(tmp_path / "out" / f"{name}_labels.tif")
            assert (array_of(client.get(f"{base}/labels/npy")) == true).all()
            written = (tmp_path / "out" / f"{name}_cells.csv").read_text()
            answer = client.get(f"{base}/result/csv")
            assert answer.text == written
            assert 'filename="b_cells.csv"' in answer.headers["content-disposition"]
        client.post(f"{jobs['x/b']}/corrections", json={"kind": "remove", "cells": [1]})
    found = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*_v2.tif")}
    assert found == {"x/b_labels_v2.tif"}


def test_formats_name_the_image_as_segment_does(tmp_path, mini_model):
    images = [noise(tmp_path / "field.v1.png", 0)]
    with page_of(tmp_path, mini_model, images, formats=("tif", "coco")) as client:
        written = (tmp_path / "out" / "field.v1_coco.json").read_text()
        assert '"field.v1.png"' in written
        base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
        assert client.get(f"{base}/result/coco").text == written
        for kind, cells in (("remove", [1]), ("undo", [])):
            client.post(f"{base}/corrections", json={"kind": kind, "cells": cells})
            assert '"field.v1.png"' in client.get(f"{base}/result/coco").text


def test_other_thresholds_see_the_image_at_the_scale_of_the_results(tmp_path, mini_model):
    model = with_config(mini_model, min_area_px=40)  # 10 px of the file
    with page_of(tmp_path, model, [noise(tmp_path / "a.tif", 0)], rescale=2.0) as client:
        base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
        assert client.get(f"{base}/labels").json()["min_area_px"] == 10
        before = array_of(client.get(f"{base}/labels/npy"))
        assert client.post(f"{base}/relabel", json={"min_score": 1e-6}).status_code == 200
        assert (array_of(client.get(f"{base}/labels/npy")) == before).all()


@pytest.mark.parametrize("cells", ["ring:3px", "0"])
def test_cells_grown_from_nuclei_stay_cells(tmp_path, mini_model, cells):
    images = [noise(tmp_path / "a.tif", 0)]
    with page_of(tmp_path, mini_model, images, nuclei="0", cells=cells) as client:
        base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
        before = array_of(client.get(f"{base}/labels/npy"))
        answer = client.post(f"{base}/relabel", json={"peak_threshold": 0.5})
        assert answer.status_code == 422
        assert "grown from nuclei" in answer.json()["detail"]
        assert (array_of(client.get(f"{base}/labels/npy")) == before).all()
        line = {"kind": "cut", "points": [[0, 0], [95, 95]]}
        assert client.post(f"{base}/corrections", json=line).status_code == 200
        scores = client.get(f"{base}/cells").json()["columns"]["score"]
        assert len(scores) > before.max()
        assert client.post(f"{base}/corrections", json={"kind": "undo"}).status_code == 200
        scores = client.get(f"{base}/cells").json()["columns"]["score"]
        assert scores == pytest.approx(column(tmp_path / "out" / "a_cells.csv", "score"))


def test_labels_of_another_device_are_scored_by_the_map(view, results):
    client = view()
    job = client.get("/api/v1/jobs").json()[0]["id"]
    assert client.get(f"/api/v1/jobs/{job}/image").status_code == 200
    shape = read_labels(results / "a_labels.tif").shape
    np.save(results / "corrections" / "jobs" / job / "map.npy", np.zeros(shape, np.float32))
    scores = client.get(f"/api/v1/jobs/{job}/cells").json()["columns"]["score"]
    assert len(scores) == read_labels(results / "a_labels.tif").max()


def test_another_model_or_a_missing_image_is_named(view, results, tmp_path, mini_model):
    other = copy.deepcopy(mini_model)
    next(other.decoder.parameters()).data.mul_(2)
    save_model(tmp_path / "other.safetensors", other)
    client = view("other.safetensors")
    base, other = (f"/api/v1/jobs/{job['id']}" for job in client.get("/api/v1/jobs").json())
    answer = client.post(f"{base}/relabel", json={"min_area_px": 6})
    assert answer.status_code == 422
    assert "`model` must be the one that made these results" in answer.json()["detail"]
    (tmp_path / "b.tif").unlink()
    assert "b.tif is gone" in client.get(f"{other}/image").json()["detail"]
    with pytest.raises(UsageError, match="results of segment"):
        Viewed(tmp_path, "", "cpu")


def test_new_labels_of_segment_forget_old_corrections(view, results, tmp_path, mini_model):
    client = view()
    (job, _) = client.get("/api/v1/jobs").json()
    client.post(f"/api/v1/jobs/{job['id']}/corrections", json={"kind": "remove", "cells": [1]})
    options = SegmentOptions(device="cpu", overlay=False, min_area_px=2, overwrite=True)
    segment_files([tmp_path / "a.tif"], results, options, model=mini_model, shown=False)
    client = view()
    names = {job["name"]: job["id"] for job in client.get("/api/v1/jobs").json()}
    assert set(names) == {"a", "b"}
    assert names["a"] != job["id"]
    assert client.get(f"/api/v1/jobs/{names['a']}/labels").json()["revision"] == 0
    assert (results / "a_labels_v2.tif").exists()


def test_the_hash_of_weights_follows_changes_in_place(mini_model):
    def digest(model) -> str:
        return settings_of(SegmentOptions(), model)["weights_sha256"]

    first = digest(mini_model)
    changed = copy.deepcopy(mini_model)
    assert digest(with_config(mini_model, min_area_px=3)) == digest(changed) == first
    with torch.no_grad():
        next(changed.decoder.parameters()).mul_(2)
    assert digest(changed) != first
    assert digest(mini_model) == first


def test_results_without_label_images_are_refused(results, tmp_path):
    (results / "a_labels.tif").unlink()
    viewed = Viewed(results, str(tmp_path / "mini.safetensors"), "cpu")
    assert "1 image is not shown, because labels are missing: a" in viewed.notes()
    (results / "b_labels.tif").unlink()
    with pytest.raises(UsageError, match="`out` must hold label images of the format tif or png"):
        Viewed(results, str(tmp_path / "mini.safetensors"), "cpu")
