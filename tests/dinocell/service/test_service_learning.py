"""Learning from corrections: what is needed, progress, before and after, keep or discard."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from service_doubles import noise, upload

from dinocell.io import read_image, read_labels, write_image
from dinocell.network.model import save_model, with_config
from dinocell.training import pace
from dinocell.training.adapt import Trial

# In place of the process that adapts: it copies the model, and says the numbers of the images.
_COPIES = """
import json, shutil, sys
from pathlib import Path
folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
print("adapting 3/7, 0:00:10 left: decoder", file=sys.stderr, flush=True)
names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
for picture in ("truth", "before", "after"):
    (folder / f"{picture}.png").write_text(picture)
shutil.copy(options["start"], folder / "model.safetensors")
judged = {"num_cells": len(names), "ap": 0.5, "ap50": 0.75}
(folder / "result.json").write_text(json.dumps({"chosen": "last", "before": judged, "after": judged}))
"""
_FAILS = "import sys; print('Too few cells', file=sys.stderr); sys.exit(1)"
_WAITS = "import sys; sys.stdin.read(); sys.exit(3)"


@pytest.fixture
def corrected(start, tmp_path, mini_model):
    """A service whose users have corrected two images."""
    save_model(tmp_path / "mini.safetensors", mini_model)
    client = start(model=str(tmp_path / "mini.safetensors"))
    assert client.get("/api/v1/learning").json()["images"] == 0
    for name, seed in (("first", 1), ("second", 2)):
        job = upload(client, noise(tmp_path / f"{name}.tif", seed)).json()["job"]
        answer = client.post("/api/v1/learning")
        assert answer.status_code == 422
        assert "correct all cells of another image" in answer.json()["detail"]
        body = {"kind": "remove", "cells": [1]}
        assert client.post(f"/api/v1/jobs/{job}/corrections", json=body).status_code == 200
    return client


def ended(client) -> dict:
    """What learning says when it runs no longer."""
    while (info := client.get("/api/v1/learning").json())["state"] == "running":
        time.sleep(0.02)
    return info


def test_a_model_is_learned_judged_and_kept(corrected, tmp_path):
    client = corrected
    client.service.learning.program = ("-c", _COPIES)
    answer = client.post("/api/v1/learning")
    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert "one does" in client.post("/api/v1/learning").json()["detail"]
    info = ended(client)
    assert (info["state"], info["held_out"], info["chosen"]) == ("done", "second", "last")
    assert (info["done"], info["total"]) == (3, 7)
    assert info["after"] == {
        "num_cells": 6,
        "ap": 0.5,
        "ap50": 0.75,
    }  # two images with labels, and their scales
    assert client.get("/api/v1/learning/pictures/after").text == "after"
    assert client.get("/api/v1/learning/pictures/model").status_code == 422
    assert client.post("/api/v1/learning/keep").json()["state"] == "idle"
    (kept,) = (tmp_path / "jobs" / "learning" / "models").iterdir()
    assert client.get("/api/v1/models").json()[0]["name"] == kept.stem
    assert client.service.model == str(kept)  # the start of the next adaptation
    assert upload(client, noise(tmp_path / "third.tif", 3)).status_code == 200
    assert client.post("/api/v1/learning/keep").status_code == 422


def test_learning_is_stopped_or_fails_with_its_reason(corrected, tmp_path):
    client = corrected
    client.service.learning.program = ("-c", _FAILS)
    client.post("/api/v1/learning")
    info = ended(client)
    assert (info["state"], info["error"]) == ("failed", "Too few cells")
    client.service.learning.program = ("-c", _WAITS)
    assert client.post("/api/v1/learning").json()["error"] is None
    assert client.delete("/api/v1/learning").json()["state"] == "idle"
    assert not (tmp_path / "jobs" / "learning" / "work").exists()
    assert client.get("/api/v1/learning/pictures/after").status_code == 404


def test_a_start_that_fails_leaves_nothing_to_decide(corrected):
    client = corrected
    learning = client.service.learning
    learning.program = ("-c", _COPIES)
    client.post("/api/v1/learning")
    assert ended(client)["state"] == "done"
    for result in client.service.corrected():
        (result.folder / "plane.npy").unlink()
    assert client.post("/api/v1/learning").status_code == 410
    assert client.get("/api/v1/learning").json()["state"] == "idle"
    assert client.post("/api/v1/learning/keep").status_code == 422


def test_nothing_starts_while_an_adaptation_is_discarded(corrected, monkeypatch):
    learning = corrected.service.learning
    learning.program = ("-c", _WAITS)
    corrected.post("/api/v1/learning")
    free = []

    def remove(folder, ignore_errors) -> None:
        free.append(not learning._lock.locked())

    monkeypatch.setattr("dinocell.service.learning.shutil.rmtree", remove)
    assert corrected.delete("/api/v1/learning").json()["state"] == "idle"
    assert free == [False]


@pytest.mark.slow
def test_the_learner_compares_both_models_on_the_image_held_out(
    corrected, tmp_path, monkeypatch, mini_model
):
    from dinocell.service.learner import learn

    corrected.service.learning.program = ("-c", _WAITS)
    corrected.post("/api/v1/learning")
    work = tmp_path / "jobs" / "learning" / "work"
    monkeypatch.setattr(pace, "LEAST_STEPS", 1)
    monkeypatch.setattr(pace, "MOST_STEPS", 1)
    learn(work, start=str(tmp_path / "mini.safetensors"), device="cpu", minutes=0.1)
    result = json.loads((work / "result.json").read_text())
    truth = np.load(work / "held_out" / "image.npy")
    assert np.asarray(Image.open(work / "before.png")).shape == (*truth.shape, 3)
    assert 0.5 < result["before"]["ap50"] < 1  # one of its cells was removed by hand
    assert set(result) == {"chosen", "before", "after"}
    assert (work / "model.safetensors").exists()


def test_images_are_learned_at_the_scale_at_which_they_were_segmented(
    start, tmp_path, monkeypatch, mini_model
):
    from dinocell.service.learner import learn

    model = with_config(mini_model, pixel_size_um=0.5)
    save_model(tmp_path / "mini.safetensors", model)
    client = start(model=str(tmp_path / "mini.safetensors"))
    client.service.worker.worker.model = model
    for seed in (1, 2):  # the picture, each pixel of which is four
        image = read_image(noise(tmp_path / f"{seed}.tif", seed)).pixels.repeat(2, 0).repeat(2, 1)
        write_image(tmp_path / f"{seed}.tif", image, pixel_size_um=0.25)
        job = upload(client, tmp_path / f"{seed}.tif").json()["job"]
        body = {"kind": "remove", "cells": [1]}
        assert client.post(f"/api/v1/jobs/{job}/corrections", json=body).status_code == 200
    client.service.learning.program = ("-c", _WAITS)
    client.post("/api/v1/learning")
    work = tmp_path / "jobs" / "learning" / "work"
    whole = read_labels(work / "labels" / "0.tif")
    learned = []

    def adapt(images, labels, path, **_):
        learned.append((read_image(images / "0.tif"), read_labels(labels / "0.tif")))
        save_model(path, model)
        return SimpleNamespace(chosen=Trial("start", 0, 0.0, 0.0))

    monkeypatch.setattr("dinocell.service.learner.adapt", adapt)
    learn(work, start=str(tmp_path / "mini.safetensors"), device="cpu", minutes=0.1)
    ((seen, cells),) = learned
    assert seen.pixels.shape == cells.shape == tuple(side // 2 for side in whole.shape)
    assert (seen.pixels.dtype, seen.pixel_size_um) == (image.dtype, 0.5)
    np.testing.assert_array_equal(cells, whole[1::2, 1::2])
    result = json.loads((work / "result.json").read_text())
    found = client.get(f"/api/v1/jobs/{job}").json()["summary"]["num_cells"]
    assert result["before"]["num_cells"] == result["after"]["num_cells"] == found
