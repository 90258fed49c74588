"""The training loop: it learns, it resumes bit for bit, and every option acts."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import small_run
from waiting import wait_until

from dinocell.errors import (
    CheckpointError,
    ConfigError,
    DataSetError,
    DINOCellError,
    MissingExtraError,
    UsageError,
)
from dinocell.network import familiarity
from dinocell.network.model import DINOCell, load_model, save_model, with_config
from dinocell.pairs import find_pairs
from dinocell.segmentation.inference import predict_distance_map
from dinocell.segmentation.intensity import find_range
from dinocell.settings import config_from_mapping, config_to_mapping
from dinocell.training import final_model, trainer, validation
from dinocell.training.config import TrainConfig
from dinocell.training.datasets import read_pair
from dinocell.training.run_folder import (
    find_checkpoints,
    load_checkpoint,
    refuse_other_run,
    save_checkpoint,
)
from dinocell.training.start import load_train_config
from dinocell.training.trainer import TrainingInterruptedError, distance_loss, train

pytestmark = pytest.mark.usefixtures("mini_networks")


def make_config(data: Path, out: Path, **changes) -> TrainConfig:
    mapping = small_run(data, out, **{"model__drop_path_rate": 0.2, **changes})
    return config_from_mapping(TrainConfig, mapping)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(out) if "loss" in row]


@pytest.fixture(scope="module")
def finished(blob_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train(make_config(blob_data, out), shown=False)


def test_speed_is_that_of_steps(monkeypatch):
    """A long validation between two steps made crops seem slow, and the run long."""
    clock = [0.0]
    monkeypatch.setattr(trainer.time, "monotonic", lambda: clock[0])
    speed = trainer._Speed()
    for pause_s in (0, 100):
        clock[0] += pause_s
        speed.start()
        clock[0] += 1
        speed.fetched()
        clock[0] += 3
        speed.stepped(0.5)
    assert speed.since_last_log(batch_size=4) == {"crops_per_s": 1.0, "wait_share": 0.25}
    assert speed.losses == []


def test_curves_do_not_name_one_kind_of_loss(tmp_path, monkeypatch):
    """A run with `loss.kind=bce` has no MSE."""
    from matplotlib import pyplot

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    drawn: list = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    final_model.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    monkeypatch.undo()
    assert drawn[0].axes[0].get_ylabel() == "training loss"
    pyplot.close(drawn[0])


def test_a_model_knows_its_training_images(finished, blob_data, tmp_path, monkeypatch):
    assert load_model(finished[1].model_path).statistics is None, "six images are too few"
    monkeypatch.setattr(familiarity, "_MIN_IMAGES", 6)
    result = train(make_config(blob_data, tmp_path), shown=False)
    model = load_model(result.model_path)
    assert model.statistics.images == 6
    assert model.statistics.kinds[0].num_features == model.backbone.embed_dim


def test_a_model_knows_the_diameter_of_its_training_cells(finished, blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "blobs")
    medians = []
    for pair in pairs:
        labels = read_pair(pair)[1]
        areas = [np.count_nonzero(labels == cell) for cell in np.unique(labels)[1:]]
        medians.append(2 * (np.median(areas) / np.pi) ** 0.5)
    assert final_model.typical_diameter(pairs) == round(np.median(medians), 1)
    assert final_model.typical_diameter([]) is None
    known = load_model(finished[1].model_path).config.diameter_px
    assert min(medians) <= known <= max(medians)


def test_training_images_are_looked_at_in_the_middle(blob_data, small_model, monkeypatch):
    """56 of 64 x 80 px are two windows of 32 px that share 8; the intensities are those of the whole."""
    monkeypatch.setattr(familiarity, "_MIN_IMAGES", 5)
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "blobs")
    shapes, bounds = [], []

    def look(model, image, *, intensity, appearance):
        shapes.append(image.shape)
        bounds.append((intensity.low, intensity.high))
        return predict_distance_map(model, image, intensity=intensity, appearance=appearance)

    monkeypatch.setattr(final_model, "predict_distance_map", look)
    monkeypatch.setattr(final_model, "_MAX_IMAGES", 5)
    assert final_model.training_statistics(small_model, pairs).images == 5
    assert shapes == [(56, 56)] * 5
    halves = [replace(pair, dataset=str(index)) for index, pair in enumerate(pairs[:1] * 2)]
    several = [*pairs, *(replace(pair, dataset="others") for pair in pairs), *halves]
    kinds = final_model.training_statistics(small_model, several).kinds
    assert [kind.images for kind in kinds] == [5, 5], (
        "each data set has its own, one image has none"
    )
    whole = find_range(read_pair(pairs[0])[0], **small_model.config.intensity)
    assert bounds[0] == (whole.low, whole.high)


def train_four_steps(data: Path, out: Path, **changes) -> None:
    """Four of five steps, without any validation."""
    schedule = {"schedule__steps": 5, "schedule__eval_every": 5}
    with pytest.raises(TrainingInterruptedError):
        train(make_config(data, out, **schedule, **changes), shown=False, stop_after=4)


@pytest.fixture(scope="module")
def four_steps(blob_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("four_steps")
    train_four_steps(blob_data, out)
    return out


def test_what_a_run_leaves(finished):
    out, result = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "best.safetensors",
        "model.safetensors",
        "curves.png",
    }
    assert result.step == 4
    model = DINOCell.from_pretrained(result.model_path)
    assert model.card["data"] == {"blobs": {"train_images": 4, "val_images": 2}}
    assert model.config.peak_threshold == result.thresholds["peak_threshold"]
    assert [step for step, _ in losses(out)] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(out) if "val_ap50_pooled" in row] == [2, 4]
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert len(find_checkpoints(out / "checkpoints")) == 2


@pytest.mark.parametrize(("kind", "cut"), [("adamw", 1), ("adamw", 2), ("muon", 1), ("muon", 2)])
def test_resume_is_bit_for_bit(blob_data, tmp_path, finished, kind, cut):
    whole, _ = finished
    if kind == "muon":
        whole = tmp_path / "whole"
        train(make_config(blob_data, whole, optimizer__kind=kind), shown=False)
    tmp_path /= "parts"
    config = make_config(blob_data, tmp_path, optimizer__kind=kind)
    with pytest.raises(TrainingInterruptedError, match=f"step {cut}"):
        train(config, shown=False, stop_after=cut)
    train(config, shown=False)
    assert losses(tmp_path) == losses(whole)
    one, other = (load_model(folder / "model.safetensors") for folder in (whole, tmp_path))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert one.config == other.config


@pytest.mark.parametrize("image", [2, 3, 5])
def test_a_signal_while_it_validates(blob_data, tmp_path, finished, monkeypatch, image):
    """Two images after steps 2 and 4 and at the end: nothing learned is lost, nothing done twice."""
    whole, _ = finished
    config = make_config(blob_data, tmp_path)
    predict, seen = validation.predict_distance_map, 0

    def interrupted(model, picture):
        nonlocal seen
        seen += 1
        if seen == image:
            os.kill(os.getpid(), signal.SIGUSR2)
        return predict(model, picture)

    monkeypatch.setattr(validation, "predict_distance_map", interrupted)
    expected = 2 if image < 3 else 4
    with pytest.raises(TrainingInterruptedError, match=f"interrupted at step {expected} of 4"):
        train(config, shown=False)
    step, path = find_checkpoints(tmp_path / "checkpoints")[-1]
    assert step == expected
    assert load_checkpoint(path)["unvalidated"] == (image == 3)
    train(config, shown=False)
    assert losses(tmp_path) == losses(whole)
    scores = [[(r["step"], r["val_ap50_pooled"]) for r in rows(out) if "val_seconds" in r]
              for out in (whole, tmp_path)]  # fmt: skip
    assert scores[0] == scores[1]
    one, other = (load_model(folder / "model.safetensors") for folder in (whole, tmp_path))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert one.config == other.config


def test_a_finished_run_is_not_trained_again(blob_data, finished):
    out, result = finished
    before = (out / "checkpoints" / "step_00000004.pt").read_bytes()
    again = train(make_config(blob_data, out), shown=False)
    assert again.val_ap50 == result.val_ap50
    assert (out / "checkpoints" / "step_00000004.pt").read_bytes() == before
    assert len(losses(out)) == 4


def test_a_signal_writes_a_checkpoint(blob_data, tmp_path):
    config = make_config(blob_data, tmp_path, schedule__steps=400, schedule__eval_every=400)

    def interrupt() -> None:
        wait_until((tmp_path / "metrics.jsonl").exists)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(TrainingInterruptedError, match="run the same command"):
        train(config, shown=False)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    step, path = find_checkpoints(tmp_path / "checkpoints")[-1]
    assert load_checkpoint(path)["step"] == step


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"model__drop_path_rate": 0.0},
        {"model__target": "linear"},
        {"model__layerscale_init": 0.1},
        {"augment__rotate": False},
        {"optimizer__kind": "muon"},
        {"optimizer__lr": 1e-4},
        {"optimizer__warmup_steps": 4},
        {"optimizer__min_lr_ratio": 0.9},
        {"optimizer__clip_norm": 0.001},
        {"optimizer__weight_decay": 5.0},
        {"optimizer__betas": [0.5, 0.6]},
        {"backbone__lr_mult": 0.0},
        {"backbone__layer_decay": 0.3},
        {"schedule__batch_size": 3},
        {"schedule__crop_px": 48},
        {"schedule__precision": "bf16"},
        {"data__val_fraction": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_options_change_the_run(blob_data, tmp_path, four_steps, change):
    train_four_steps(blob_data, tmp_path, **change)
    if losses(tmp_path) != losses(four_steps):
        return
    one, other = (
        load_checkpoint(folder / "checkpoints" / "step_00000004.pt")["model"]
        for folder in (four_steps, tmp_path)
    )
    assert not torch.equal(one["decoder.head.weight"], other["decoder.head.weight"])


def test_averaging_changes_the_model_but_not_the_losses(blob_data, tmp_path, four_steps):
    train_four_steps(blob_data, tmp_path, schedule__ema_decay=0.0)
    assert losses(tmp_path) == losses(four_steps)
    one, other = (
        load_checkpoint(folder / "checkpoints" / "step_00000004.pt")
        for folder in (four_steps, tmp_path)
    )
    key = "decoder.head.weight"
    assert torch.equal(one["model"][key], other["model"][key])
    assert not torch.equal(one["averaged"][key], other["averaged"][key])
    assert torch.equal(other["averaged"][key], other["model"][key])


def test_loader_processes_and_kept_checkpoints_change_nothing(blob_data, tmp_path, four_steps):
    changes = {"schedule__keep_checkpoints": 1, "schedule__checkpoint_every": 1}
    train_four_steps(blob_data, tmp_path, data__num_workers=1, **changes)
    assert losses(tmp_path) == losses(four_steps)
    assert [step for step, _ in find_checkpoints(tmp_path / "checkpoints")] == [4]


def test_early_stopping(blob_data, tmp_path):
    changes = {"schedule__patience": 1, "schedule__eval_every": 1, "optimizer__lr": 1e-12}
    config = make_config(blob_data, tmp_path, **changes, schedule__ema_decay=0.0)
    result = train(replace(config, schedule=replace(config.schedule, steps=50)), shown=False)
    assert result.stopped_early
    assert result.step < 50
    again = train(replace(config, schedule=replace(config.schedule, steps=50)), shown=False)
    assert again.stopped_early
    assert again.step == result.step


def test_validation_without_any_cell(blob_data, tmp_path):
    from dinocell.io import find_images, read_image, write_image, write_labels

    for path in find_images([blob_data / "images"])[:1]:
        image = read_image(path).pixels
        write_image(tmp_path / "images" / "none.tif", image)
        write_labels(tmp_path / "labels" / "none.png", np.zeros(image.shape, np.uint8))
    config = make_config(blob_data, tmp_path / "run")
    given = replace(
        config.data.datasets[0],
        val_images=str(tmp_path / "images"),
        val_labels=str(tmp_path / "labels"),
    )
    with pytest.raises(DataSetError, match="Validation images must hold cells"):
        train(replace(config, data=replace(config.data, datasets=(given,))), shown=False)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_frozen_backbone_stays(blob_data, tmp_path):
    from dinocell.network.backbone import DINOv3Backbone

    torch.manual_seed(3)
    backbone = DINOv3Backbone("tiny", patch_size=16)
    path = tmp_path / "backbone.pth"
    torch.save(backbone.vit.state_dict(), path)
    config = make_config(
        blob_data, tmp_path / "run", backbone__weights=str(path), backbone__frozen=True
    )
    train(config, shown=False)
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004.pt")["model"]
    for key, value in backbone.vit.state_dict().items():
        assert torch.equal(state[f"backbone.vit.{key}"], value), key


def test_wandb_is_asked_for_by_name(blob_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = make_config(blob_data, tmp_path, wandb__enabled=True)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[wandb\]' in the clone"):
        train(config, shown=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(blob_data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config(blob_data, tmp_path, wandb__enabled=True, wandb__project="cells")
    with pytest.raises(TrainingInterruptedError):
        train(config, shown=False, stop_after=2)
    identity = (tmp_path / "wandb_run_id.txt").read_text()
    train(config, shown=False)
    assert (tmp_path / "wandb_run_id.txt").read_text() == identity
    runs = list(tmp_path.glob("wandb/offline-run-*"))
    assert runs
    assert all(run.name.endswith(identity.strip()) for run in runs)


class TestWrongRuns:
    def test_another_configuration(self, blob_data, finished):
        out, _ = finished
        with pytest.raises(ConfigError, match=r"optimizer\.lr.*another output_dir"):
            train(make_config(blob_data, out, optimizer__lr=1e-5), shown=False)

    def test_free_keys_may_change(self, blob_data, finished):
        out, _ = finished
        assert train(make_config(blob_data, out, schedule__log_every=3), shown=False).step == 4

    def test_truncated_checkpoint(self, blob_data, tmp_path):
        config = make_config(blob_data, tmp_path)
        with pytest.raises(TrainingInterruptedError):
            train(config, shown=False, stop_after=1)
        path = tmp_path / "checkpoints" / "step_00000001.pt"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CheckpointError, match="delete it to continue"):
            train(config, shown=False)

    def test_checkpoint_of_another_model(self, blob_data, tmp_path):
        save_checkpoint(tmp_path / "checkpoints", 1, {"model": {}, "step": 1}, keep=1)
        with pytest.raises(CheckpointError, match="must fit the configured model"):
            train(make_config(blob_data, tmp_path), shown=False)

    def test_loss_that_is_not_finite(self, blob_data, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "dinocell.training.trainer.distance_loss",
            lambda *maps, **options: distance_loss(*maps, **options) * float("nan"),
        )
        with pytest.raises(CheckpointError, match="must be finite"):
            train(make_config(blob_data, tmp_path), shown=False)

    def test_foreign_configuration_file(self, blob_data, tmp_path):
        (tmp_path / "config.yaml").write_text("- not ours\n")
        with pytest.raises(DINOCellError, match="another output_dir"):
            train(make_config(blob_data, tmp_path), shown=False)
        assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == ["not ours"]


def test_a_run_starts_from_a_trained_model(finished, blob_data, tmp_path):
    first = with_config(load_model(finished[1].model_path), pixel_size_um=0.5, diameter_px=99.0)
    start = tmp_path / "start.safetensors"
    save_model(start, first)
    mapping = small_run(blob_data, tmp_path / "run")
    mapping["model"] = {"init": str(start), "overlap_px": 4}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(mapping))
    config = load_train_config(path, ["optimizer.lr=1e-9"])
    assert config.model.window_px == first.config.window_px == 32
    assert (config.model.overlap_px, first.config.overlap_px) == (4, 8)
    assert config.model.peak_threshold == first.config.peak_threshold
    assert config.model.pixel_size_um is None, "that of its images, not of the new ones"
    assert load_train_config(path, ["model.pixel_size_um=0.2"]).model.pixel_size_um == 0.2
    result = load_model(train(config, shown=False).model_path)
    assert result.card["start"] == str(start)
    assert result.config.diameter_px < 99
    assert first.card["start"] == "random weights"
    assert result.config.init is None, "the file stands alone"
    for key, value in first.state_dict().items():
        if "running" not in key and "num_batches" not in key:  # batch norm still follows the images
            torch.testing.assert_close(result.state_dict()[key], value, atol=2e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"`model.target` must be sqrt as in .*, got linear"):
        train(
            load_train_config(path, ["model.target=linear", f"output_dir={tmp_path}/other"]),
            shown=False,
        )
    with pytest.raises(ConfigError, match=r"`backbone.weights` must be null with `model.init`"):
        load_train_config(path, ["backbone.weights=dinov3_vits16"])
    with pytest.raises(UsageError, match="must be a file or a bundled name"):
        load_train_config(path, ["model.init=dinocell-none"])


def test_keys_that_an_earlier_version_lacked_have_their_defaults(finished, blob_data, tmp_path):
    config = make_config(blob_data, tmp_path)
    mapping = config_to_mapping(config)
    del mapping["loss"], mapping["augment"]["dim"], mapping["model"]["intensities"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(mapping))
    refuse_other_run(config)
    with pytest.raises(ConfigError, match=r"other values of loss\.kind"):
        refuse_other_run(make_config(blob_data, tmp_path, loss__kind="bce"))


def test_convolutions_alone_train(blob_data, tmp_path):
    config = make_config(
        blob_data,
        tmp_path,
        model__size="conv",
        model__decoder="detail",
        model__image_channels=0,
        model__intensities="compressed",
        loss__kind="bce",
        loss__gap_weight=1.0,
    )
    result = train(config, shown=False)
    assert DINOCell.from_pretrained(result.model_path).config.size == "conv"
    weights = replace(config.backbone, weights="dinov3_vits16")
    with pytest.raises(ConfigError, match=r"`backbone.weights` must be null"):
        replace(config, backbone=weights)


def test_loss():
    a, b = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    assert float(distance_loss(a, b)) == 0.25
    weight = torch.tensor([[[[1.0, 1.0], [1.0, 5.0]]]])
    assert float(distance_loss(a, b, weight)) == 0.5
    assert float(distance_loss(b, b, kind="bce")) == pytest.approx(math.log(2))
    # sure and wrong: the gradient of `mse` has faded, that of `bce` has not
    logit = torch.tensor([[[[-9.0]]]], requires_grad=True)
    slopes = {}
    for kind in ("mse", "bce"):
        loss = distance_loss(logit.sigmoid(), torch.ones(1, 1, 1, 1), kind=kind)
        (slope,) = torch.autograd.grad(loss, logit)
        slopes[kind] = -float(slope)
    assert slopes["mse"] < 0.001
    assert slopes["bce"] == pytest.approx(1.0, abs=0.001)
    with pytest.raises(ValueError, match="one shape"):
        distance_loss(a, torch.zeros(1, 2, 2))
