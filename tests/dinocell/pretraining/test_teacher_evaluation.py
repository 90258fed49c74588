"""The evaluation of the teacher: bounded, repeatable, resumable, without traces in the training."""

from __future__ import annotations

import copy
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import dinov3
from dinocell.errors import ConfigError, DataSetError
from dinocell.io import write_image, write_labels
from dinocell.pretraining import teacher_evaluation
from dinocell.pretraining.teacher_evaluation import RESULTS_NAME, make_evaluation
from dinocell.probing.decoder_probe import ProbeConfig, ProbeTimeError

SMALL = {
    "hook": "dinocell.pretraining.teacher_evaluation:make_evaluation",
    "period_iterations": 10,
    "train_images": 4,
    "val_images": 2,
    "windows_per_image": 1,
    "window_px": 32,
    "decoder": "linear",
    "steps": 8,
    "batch_size": 2,
    "lr": 3e-3,
    "max_seconds": 300,
    "seed": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, blob_data):
    folder = tmp_path_factory.mktemp("labelled")
    for number in range(6):
        part = "train" if number < 4 else "val"
        for kind, name in (("images", f"blob{number}.tif"), ("labels", f"blob{number}.png")):
            target = folder / part / kind / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((blob_data / kind / name).read_bytes())
    return folder


def config(folder, **changes):
    section = {**SMALL, "data": str(folder), **changes}
    return OmegaConf.create({"ssl_evaluation": section, "student": {"patch_size": 16}})


@pytest.fixture
def backbone(mini_model):
    return mini_model.backbone.vit


def test_scores_are_logged_and_kept(data, backbone, tmp_path):
    metrics = make_evaluation(config(data))(backbone, 20, tmp_path)
    assert {"eval/op_csb", "eval/ap50", "eval/mse", "eval/steps", "eval/seconds"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["eval/steps"] == 8
    (line,) = (tmp_path / RESULTS_NAME).read_text().splitlines()
    assert json.loads(line)["iteration"] == 20
    assert json.loads(line)["metrics"] == metrics


def test_training_is_left_as_it_was(data, backbone, tmp_path):
    evaluation = make_evaluation(config(data))
    backbone.train()
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    states = random.getstate(), torch.get_rng_state()
    try:
        with torch.inference_mode():
            assert evaluation(backbone, 1, tmp_path)
        assert backbone.training
    finally:
        backbone.eval()
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], legacy)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[1])
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def without_time(metrics):
    return {key: value for key, value in metrics.items() if key != "eval/seconds"}


def test_same_weights_same_scores(data, backbone, tmp_path):
    first = make_evaluation(config(data))(backbone, 5, tmp_path / "a")
    torch.manual_seed(77)
    again = make_evaluation(config(data))(backbone, 5, tmp_path / "b")
    assert without_time(first) == without_time(again)
    other = make_evaluation(config(data, seed=1))(backbone, 5, tmp_path / "c")
    assert other["eval/mse"] != first["eval/mse"]


def test_the_weights_matter(data, backbone, tmp_path):
    evaluation = make_evaluation(config(data))
    first = evaluation(backbone, 1, tmp_path)
    changed = copy.deepcopy(backbone)
    with torch.no_grad():
        changed.blocks[3].mlp.fc1.weight.mul_(3.0)
    second = evaluation(changed, 2, tmp_path)
    assert second["eval/mse"] != first["eval/mse"]
    lines = (tmp_path / RESULTS_NAME).read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]


def test_what_was_done_is_not_done_again(data, backbone, tmp_path, monkeypatch):
    first = make_evaluation(config(data))(backbone, 10, tmp_path)
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return real(*arguments, **options)

    real = teacher_evaluation.probe_features
    monkeypatch.setattr(teacher_evaluation, "probe_features", counted)
    resumed = make_evaluation(config(data, max_seconds=200))
    assert resumed(backbone, 10, tmp_path) == first
    assert not calls
    resumed(backbone, 20, tmp_path)
    assert len(calls) == 1
    # Other settings are another measurement; the line is replaced.
    make_evaluation(config(data, steps=9))(backbone, 10, tmp_path)
    assert len(calls) == 2
    rows = [json.loads(line) for line in (tmp_path / RESULTS_NAME).read_text().splitlines()]
    assert [(row["iteration"], row["metrics"]["eval/steps"]) for row in rows] == [(10, 9), (20, 8)]


def test_scores_of_other_weights_are_not_taken_over(data, backbone, tmp_path):
    """A run that starts over in the folder meets the same iterations."""
    evaluation = make_evaluation(config(data))
    evaluation(backbone, 10, tmp_path)
    changed = copy.deepcopy(backbone)
    with torch.no_grad():
        changed.blocks[3].mlp.fc1.weight.mul_(3.0)
    second = evaluation(changed, 10, tmp_path)
    assert without_time(second) == without_time(evaluation(changed, 10, tmp_path / "empty"))
    (line,) = (tmp_path / RESULTS_NAME).read_text().splitlines()
    assert json.loads(line)["metrics"] == second


def test_a_line_cut_by_a_crash_is_done_again(data, backbone, tmp_path):
    evaluation = make_evaluation(config(data))
    evaluation(backbone, 1, tmp_path)
    whole = evaluation(backbone, 2, tmp_path)
    path = tmp_path / RESULTS_NAME
    path.write_text(path.read_text()[:-30])
    again = evaluation(backbone, 2, tmp_path)
    assert without_time(again) == without_time(whole)
    assert len(path.read_text().splitlines()) == 2


def test_a_failure_reaches_the_training_and_leaves_no_line(data, backbone, tmp_path):
    """The training logs it and continues: `tests/dinov3/cells` has that half."""
    with pytest.raises(ProbeTimeError, match="raise max_seconds"):
        make_evaluation(config(data, max_seconds=1e-9))(backbone, 30, tmp_path)
    assert not (tmp_path / RESULTS_NAME).exists()


def test_a_training_cut_short_is_logged(data, backbone, tmp_path, caplog, monkeypatch):
    def short(vit, train, val, settings):
        return real(vit, train, val, ProbeConfig(**{**vars(settings), "steps": 3}))

    real = teacher_evaluation.probe_features
    monkeypatch.setattr(teacher_evaluation, "probe_features", short)
    with caplog.at_level(logging.WARNING, logger="dinov3"):
        metrics = make_evaluation(config(data))(backbone, 1, tmp_path)
    assert metrics["eval/steps"] == 3
    assert "for 3 of 8 steps" in caplog.text


def test_every_key_reaches_the_evaluation(data):
    """Which key changes which number is tested with `probe_features` and `read_windows`."""
    changes = {
        "windows_per_image": 2, "window_px": 48, "decoder": "unet", "steps": 4, "batch_size": 3,
        "lr": 1e-3, "max_seconds": 7.0, "seed": 5,
    }  # fmt: skip
    evaluation = make_evaluation(config(data, **changes))
    assert evaluation.config == ProbeConfig(**changes)
    assert {window.image.shape for window in evaluation.train} == {(48, 48)}
    few = make_evaluation(config(data, train_images=2, val_images=1))
    assert (len(few.train), len(few.val)) == (2, 1)


def test_a_wrong_configuration_stops_the_run_at_its_start(data, tmp_path):
    for change, message in (
        ({"data": ""}, "ssl_evaluation.data` must be a folder with train and val, got nothing"),
        ({"data": str(tmp_path / "no")}, "ssl_evaluation.data` must be a folder"),
        ({"data": str(data / "train")}, "must be a folder, got .*train/train/labels"),
    ):
        with pytest.raises(DataSetError, match=message):
            make_evaluation(config(data, **change))
    for change, message in (
        ({"steps": 0}, "In ssl_evaluation, `steps` must be at least 1"),
        ({"steps": "many"}, "ssl_evaluation.steps` must be of type int, got 'many'"),
        ({"lr": "fast"}, "ssl_evaluation.lr` must be of type float, got 'fast'"),
        ({"window_px": 40}, "window_px` must be a multiple of student.patch_size 16, got 40"),
        ({"val_images": 0}, "ssl_evaluation.val_images` must be at least 1, got 0"),
        ({"decoder": "x"}, "`decoder` must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_evaluation(config(data, **change))
    missing = config(data)
    del missing.ssl_evaluation["lr"]
    with pytest.raises(ConfigError, match="must have the key lr"):
        make_evaluation(missing)


def test_labels_without_cells_stop_the_run_at_its_start(tmp_path):
    for part in ("train", "val"):
        write_image(
            tmp_path / part / "images" / "a.tif", np.arange(4096, dtype=np.uint16).reshape(64, 64)
        )
        write_labels(tmp_path / part / "labels" / "a.png", np.zeros((64, 64), np.uint16))
    with pytest.raises(DataSetError, match="must hold cells, got 1 without any"):
        make_evaluation(config(tmp_path))


def test_the_shipped_defaults_have_every_key_and_are_off():
    path = Path(dinov3.__file__).parent / "cells" / "dinocell.yaml"
    section = OmegaConf.load(path).ssl_evaluation
    assert set(section) == {*SMALL, "data"}
    assert section.period_iterations == 0
    assert section.hook == ""
    ProbeConfig(**{key: section[key] for key in ProbeConfig.__dataclass_fields__ if key in section})
