"""The results of many images as one zip."""

from __future__ import annotations

import asyncio
import csv
import io
import shutil
import sys
import zipfile

import numpy as np
import pytest
import tifffile
from service_doubles import add_finished, noise, upload

from dinocell.service.download import zipped_results
from dinocell.service.stored import StoredResult


@pytest.fixture
def jobs(client, tmp_path) -> list[str]:
    """Two images of one name and a third."""
    paths = [tmp_path / "a" / "field.tif", tmp_path / "b" / "FIELD.tif", tmp_path / "other.tif"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        noise(path, seed)
    return [upload(client, path).json()["job"] for path in paths]


def entries(answer) -> dict[str, bytes]:
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_all_results_come_in_one_zip(client, jobs):
    answer = client.get("/api/v1/results")
    assert answer.headers["content-type"] == "application/zip"
    assert 'filename="results.zip"' in answer.headers["content-disposition"]
    found = entries(answer)
    names = ["field", "FIELD (2)", "other"]
    endings = {"tif": "_labels.tif", "csv": "_cells.csv", "overlay": "_overlay.png"}
    assert set(found) == {f"{name}{ending}" for name in names for ending in endings.values()}
    for name, job in zip(names, jobs, strict=True):
        for kind, ending in endings.items():
            single = client.get(f"/api/v1/jobs/{job}/result/{kind}").content
            assert found[f"{name}{ending}"] == single


def test_images_and_formats_can_be_chosen(client, jobs):
    some = {"job": [jobs[2], jobs[0], jobs[2]], "kind": ["geojson", "npy", "ome-zarr"]}
    found = entries(client.get("/api/v1/results", params=some))
    endings = ("_outlines.geojson", "_labels.npy", "_labels.zarr.zip")
    assert list(found) == [f"{name}{ending}" for name in ("other", "field") for ending in endings]
    for wrong, status in (({"job": "0" * 32}, 404), ({"kind": "exe"}, 422)):
        assert client.get("/api/v1/results", params=wrong).status_code == status
    client.delete(f"/api/v1/jobs/{jobs[0]}")
    assert client.get("/api/v1/results", params={"job": jobs[0]}).status_code == 409
    assert len(entries(client.get("/api/v1/results", params={"kind": "csv"}))) == 2


def test_what_vanishes_is_named(client, jobs):
    shutil.rmtree(client.service.queue.job_folder(jobs[1]))
    found = entries(client.get("/api/v1/results", params={"kind": "csv"}))
    assert set(found) == {"field_cells.csv", "other_cells.csv", "LEFT_OUT.txt"}
    assert found["LEFT_OUT.txt"].decode() == f"FIELD ({jobs[1]}): its files are gone\n"


@pytest.mark.parametrize("times", [1, 9])
def test_files_that_two_corrections_delete_are_written_again(client, jobs, monkeypatch, times):
    files, left = StoredResult.files, [times]

    def slow(result, kinds):
        found = files(result, kinds)
        if left[0]:
            left[0] -= 1
            shutil.rmtree(result.folder / "files", ignore_errors=True)
        return found

    monkeypatch.setattr(StoredResult, "files", slow)
    found = entries(client.get("/api/v1/results", params={"job": jobs[0], "kind": "geojson"}))
    assert list(found) == ["field_outlines.geojson" if times == 1 else "LEFT_OUT.txt"]


def idle(start):
    """A service whose worker takes no jobs."""
    service = start().service
    service.worker.stop()
    return service


def test_two_hundred_images_are_written_one_after_the_other(start):
    service = idle(start)
    for number in range(200):
        add_finished(service, side=64, spacing=16 + number % 9)
    jobs = list(reversed(service.queue.newest(1000)))
    written, largest = [], 0
    sink = io.BytesIO()

    async def collect() -> None:
        nonlocal largest
        async for block in zipped_results(service, jobs, ["csv", "npy"]):
            if not written:
                started = service.queue.folder.glob("jobs/*/files/0/*_labels.npy")
                assert len(list(started)) == 1
            written.append(len(block))
            largest = max(largest, len(block))
            sink.write(block)

    asyncio.run(collect())
    assert len(written) > 200
    assert largest < 50_000
    with zipfile.ZipFile(sink) as archive:
        assert archive.testzip() is None
        assert len(archive.namelist()) == 400
        last = np.load(io.BytesIO(archive.read("large (200)_labels.npy")))
        rows = list(csv.DictReader(io.TextIOWrapper(archive.open("large (200)_cells.csv"))))
    assert len(rows) == last.max() == (64 // (16 + 199 % 9)) ** 2


def test_a_large_file_comes_in_blocks(start):
    service = idle(start)
    add_finished(service, side=2000, spacing=100)
    (job,) = service.queue.newest(1)
    noisy = np.random.default_rng(0).integers(0, 2**32, (2000, 2000), np.uint32)
    path = service.queue.job_folder(job.id) / "result" / "image_labels.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, noisy)

    async def sizes() -> list[int]:
        return [len(block) async for block in zipped_results(service, [job], ["tif"])]

    found = asyncio.run(sizes())
    assert max(found) < 2.2 * 2**20 < sum(found)


def test_a_format_without_its_package_says_what_to_install(client, picture, monkeypatch):
    job = upload(client, picture).json()["job"]
    assert client.get("/api/v1/models").json()[0]["missing_formats"] == {}
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    answer = client.get(f"/api/v1/jobs/{job}/result/parquet")
    assert (answer.status_code, answer.json()["title"]) == (501, "Not Implemented")
    assert answer.headers["content-type"] == "application/problem+json"
    sentence = answer.json()["detail"]
    assert "Parquet files need the package pyarrow" in sentence
    assert client.get("/api/v1/models").json()[0]["missing_formats"] == {"parquet": sentence}
    assert client.get(f"/api/v1/jobs/{job}/result/csv").status_code == 200
