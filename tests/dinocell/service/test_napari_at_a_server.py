"""The plugin of napari with a service that computes: the session of `tests/dinocell/napari_plugin`."""

from __future__ import annotations

import numpy as np
import pytest
import requests

from dinocell.errors import DINOCellError, UsageError
from dinocell.io import read_image
from dinocell.napari.remote import Server, segment_there
from dinocell.napari.session import Session
from dinocell.service.history import ChangedError


@pytest.fixture
def session(address, picture):
    found = Session(segment_there(read_image(picture).pixels, url=address, name="a blob"))
    assert found.num_cells > 5
    return found


def test_thresholds_corrections_and_undo(session, client):
    first = session.labels.copy()
    one, other = session.numbers()[:2].tolist()
    session.correct("merge", cells=[one, other])
    np.testing.assert_array_equal(session.labels, np.where(first == other, one, first))
    assert one in session.touched
    session.relabel(peak_threshold=0.7)
    session.relabel(peak_threshold=0.6)
    assert session.revision.undoable == 2
    session.correct("undo")
    session.correct("undo")
    np.testing.assert_array_equal(session.labels, first)
    job = client.get("/api/v1/jobs").json()[0]
    assert job["name"] == "a blob"
    assert client.get(f"/api/v1/jobs/{job['id']}/labels").json()["revision"] == 5


def test_painted_labels_measurements_and_files(session, tmp_path):
    painted = session.labels.copy()
    painted[:3, :3] = painted.max() + 1
    assert session.adopt(painted)
    (cell,) = np.unique(session.labels[:3, :3])
    assert cell in session.touched
    numbers, columns = session.columns()
    assert len(numbers) == len(columns["area"]) == session.num_cells
    session.next_doubtful()
    session.result.copy_file("npy", tmp_path / "labels.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "labels.npy") > 0, session.labels > 0)


def test_a_change_of_somebody_else_is_shown(session):
    other = Session(session.result)
    other.correct("remove", cells=[int(other.numbers()[0])])
    with pytest.raises(ChangedError, match="somebody else"):
        session.correct("remove", cells=[int(session.numbers()[1])])
    np.testing.assert_array_equal(session.labels, other.labels)
    session.correct("remove", cells=[int(session.numbers()[1])])


def test_what_the_service_refuses_is_reported(session, address, monkeypatch):
    with pytest.raises(UsageError, match="2 cells or more"):
        session.correct("merge", cells=[1])
    with pytest.raises(DINOCellError, match="no job of this id"):
        Server(address).ask("GET", "/jobs/none")
    with pytest.raises(DINOCellError, match="mask or label image"):
        segment_there(np.kron(np.eye(4), np.ones((10, 10))).astype(np.uint8), url=address)
    with pytest.raises(UsageError, match="http://"):
        Server("localhost:8000")
    answer = requests.Response()
    answer.status_code, answer.reason, answer._content = 502, "Bad Gateway", b"<html>"
    monkeypatch.setattr(requests.Session, "request", lambda *given, **options: answer)
    with pytest.raises(DINOCellError, match="502 Bad Gateway"):
        session.correct("undo")


def test_channels_progress_and_token(start, picture, address):
    plane = read_image(picture).pixels
    seen = []
    both = np.stack([plane, plane[::-1]], axis=-1)
    result = segment_there(
        *(both,),
        url=address,
        channel_names=("DNA", "AGP"),
        pixel_size_um=0.5,
        progress=lambda done, total: seen.append((done, total)),
    )
    _, columns = result.columns()
    assert {"intensity_mean_DNA", "intensity_mean_AGP", "area_um2"} <= set(columns)
    assert all(done <= total for done, total in seen)
    assert Server(address, "a token").ask("GET", "/models").request.headers["authorization"] == (
        "Bearer a token"
    )
