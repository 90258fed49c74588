"""A model that knows several kinds of images uses the thresholds that suit each of them."""

from dataclasses import replace

import numpy as np
import pytest

from dinocell.errors import CheckpointError
from dinocell.evaluation.model_evaluation import evaluate_model
from dinocell.io import write_labels
from dinocell.network.familiarity import Appearance, KnownKinds, fit_statistics
from dinocell.network.model import load_model, save_model, with_config
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.inference import predict_distance_map
from dinocell.training.final_model import thresholds_by_kind
from tests.conftest import random_model

OF_STRIPES = {"peak_threshold": 0.9, "fill_threshold": 0.8, "min_prominence": 0.01}


def picture(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.normal(100, 10, (64, 64))
    image[::4] += 120 * (kind == "stripes")
    image[20:40, 20:40] += 100 * (kind == "square")
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    model = random_model()
    kinds = []
    for name, thresholds in (("square", {}), ("stripes", OF_STRIPES)):
        seen = []
        for seed in range(12):
            appearance = Appearance()
            predict_distance_map(model, picture(name, seed), appearance=appearance)
            seen.append(appearance)
        fitted = fit_statistics(seen)
        assert fitted is not None
        kinds.append(replace(fitted, name=name, thresholds=thresholds))
    model.statistics = KnownKinds(tuple(kinds))
    return model


def test_each_kind_has_its_thresholds(model):
    pipeline = DINOCellPipeline(model)
    square, stripes = (pipeline.run(picture(kind, 99)) for kind in ("square", "stripes"))
    assert (square.kind, stripes.kind) == ("square", "stripes")
    assert stripes.summary()["kind"] == "stripes"
    alone = DINOCellPipeline(with_config(model, **OF_STRIPES)).run(picture("stripes", 99))
    assert np.array_equal(stripes.labels, alone.labels)
    own = DINOCellPipeline(replaced(model)).run(picture("stripes", 99))
    assert not np.array_equal(stripes.labels, own.labels)
    assert np.array_equal(
        square.labels, DINOCellPipeline(replaced(model)).run(picture("square", 99)).labels
    )


def replaced(model):
    """The model with its own thresholds for every kind."""
    return with_config(model, peak_threshold=model.config.peak_threshold)


def test_given_thresholds_hold_for_every_kind(model):
    image = picture("stripes", 99)
    given = DINOCellPipeline(model, min_prominence=model.config.min_prominence).run(image)
    assert given.kind == "stripes"
    assert np.array_equal(given.labels, DINOCellPipeline(replaced(model)).run(image).labels)


def test_the_smallest_area_leaves_the_kinds_alone(model):
    pipeline = DINOCellPipeline(model, min_area_px=9)
    loaded = pipeline.load(picture("stripes", 99))
    pipeline.predict(loaded)
    assert vars(pipeline.judge(loaded).thresholds) == {**OF_STRIPES, "min_area_px": 9}


def test_an_unfamiliar_image_gets_the_thresholds_of_the_model(model):
    pipeline = DINOCellPipeline(model)
    checks = (np.indices((64, 64)).sum(0) // 8 % 2 * 255).astype(np.uint8)
    loaded = pipeline.load(checks, allow_mask=True)
    pipeline.predict(loaded)
    judged = pipeline.judge(loaded)
    assert judged.unfamiliar > 1
    assert (judged.kind, judged.thresholds) == ("", pipeline.thresholds)


def test_they_travel_in_the_model_file(model, tmp_path):
    save_model(tmp_path / "m.safetensors", model)
    read = load_model(tmp_path / "m.safetensors").statistics
    assert read is not None
    assert [(kind.name, kind.thresholds) for kind in read.kinds] == [
        ("square", {}),
        ("stripes", OF_STRIPES),
    ]


@pytest.mark.parametrize(
    "wrong", [{"peak_threshold": 2.0}, {"peak": 0.5}, {"fill_threshold": 0.99}]
)
def test_damaged_ones_are_refused(model, tmp_path, wrong):
    other = with_config(model)
    other.statistics = KnownKinds((replace(model.statistics.kinds[1], thresholds=wrong),))
    save_model(tmp_path / "m.safetensors", other)
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "m.safetensors")


def test_evaluate_scores_each_image_with_its_own(model, tmp_path):
    for kind in ("square", "stripes"):
        image = picture(kind, 99)
        (tmp_path / "images").mkdir(exist_ok=True)
        np.save(tmp_path / "images" / f"{kind}.npy", image)
        labels = DINOCellPipeline(model).run(image).labels
        (tmp_path / "labels").mkdir(exist_ok=True)
        write_labels(tmp_path / "labels" / f"{kind}.tif", labels)
    save_model(tmp_path / "m.safetensors", model)
    found = evaluate_model(tmp_path / "m.safetensors", tmp_path, shown=False)
    assert found.report.pooled["ap50_pooled"] == 1.0
    assert "thresholds (for stripes): " in found.text()
    assert "peak_threshold 0.9" in found.text()


def test_training_chooses_them_on_the_images_of_the_kind(model, monkeypatch):
    monkeypatch.setattr("dinocell.training.final_model._LEAST_CELLS", 3)
    rows, cols = np.indices((60, 60)) % 20 - 9.5
    depth = np.clip(1 - np.hypot(rows, cols) / 9, 0, 1).astype(np.float32)
    number = np.indices((60, 60))[0] // 20 * 3 + np.indices((60, 60))[1] // 20 + 1
    sharp = (depth, np.where(depth > 0.6, number, 0).astype(np.uint32))
    wide = (depth, np.where(depth > 0.1, number, 0).astype(np.uint32))
    known = model.statistics.without_thresholds()
    found = thresholds_by_kind(known, ["square", "stripes"], [sharp, wide], 0)
    first, second = (kind.thresholds["fill_threshold"] for kind in found.kinds)
    assert first >= 0.5
    assert second <= 0.15
    alone = thresholds_by_kind(known, ["square", "square"], [sharp, wide], 0)
    assert all(not kind.thresholds for kind in alone.kinds)
    monkeypatch.setattr("dinocell.training.final_model._LEAST_CELLS", 10)
    few = thresholds_by_kind(known, ["square", "stripes"], [sharp, wide], 0)
    assert all(not kind.thresholds for kind in few.kinds)
