"""What a network saw of an image, and how far that is from its training."""

import base64
import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinocell.errors import CheckpointError
from dinocell.network.familiarity import (
    Appearance,
    KnownKinds,
    TrainingStatistics,
    contrast_of,
    fit_statistics,
)
from dinocell.network.model import load_model, read_model_header, save_model
from dinocell.segmentation.inference import Inference, predict_distance_map, start_appearance
from dinocell.segmentation.intensity import IntensityRange, find_range


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (70, 90)).astype(np.uint16)


def seen(features, *, gray=0.1, contrast=0.0, signal=True, cell=0.0) -> Appearance:
    """One window of 4 x 4 px in one patch; one corner is bright."""
    window = torch.full((1, 1, 4, 4), gray)
    window[..., 0, 0] = 1.0
    appearance = Appearance(contrast, is_noise=not signal)
    tokens = torch.as_tensor(np.asarray(features, np.float32)).reshape(1, -1, 1, 1)
    appearance.add(window, [tokens], torch.full((1, 1, 4, 4), cell))
    return appearance


def training_images(count: int = 200, width: int = 6) -> list[Appearance]:
    """Features that vary by 3 along the first axis, 1 along the others, around 10."""
    rng = np.random.default_rng(1)
    spread = np.array([3.0] + [1.0] * (width - 1))
    return [seen(10 + spread * row) for row in rng.standard_normal((count, width))]


@pytest.fixture(scope="module")
def statistics() -> TrainingStatistics:
    fitted = fit_statistics(training_images())
    assert fitted is not None
    return fitted


def test_nothing_is_known_before_the_first_window(small_model, statistics):
    appearance = Appearance()
    predict_distance_map(small_model, np.ones((40, 40)), appearance=appearance)
    assert appearance.features is None
    assert statistics.compare(appearance) is None


def test_features_are_those_of_the_background():
    """Two patches whose maps are 0.75 and 0.25: (0.25 * 1 + 0.75 * 5) / 1 = 4, and 3.5 of the finer."""
    appearance = Appearance()
    maps = torch.tensor([[0.75, 0.75, 0.25, 0.25]] * 2)[None, None]
    fine = torch.tensor([[[[1.0, 3.0, 0.0, 8.0], [1.0, 3.0, 0.0, 8.0]]]])  # means 2 and 4
    appearance.add(maps, [fine, torch.tensor([[[[1.0, 5.0]]]])], maps)
    np.testing.assert_allclose(appearance.features, [3.5, 4.0])
    measures = appearance.measures()
    assert measures["cells"] == 0.5
    assert measures["texture"] == pytest.approx(0.5 / 3)  # one step of 0.5 among three
    assert measures["background"] == pytest.approx(0.25, abs=1 / 64)


def test_sums_do_not_depend_on_batches(small_model):
    collected = []
    for options in ({"batch_size": 1}, {"batch_size": 64}, {"tile_px": 40}):
        appearance = Appearance()
        how = Inference(**options)
        observed = predict_distance_map(small_model, image(), appearance=appearance, how=how)
        unobserved = predict_distance_map(small_model, image(), how=how)
        np.testing.assert_array_equal(observed, unobserved)
        collected.append([*appearance.features, *appearance.measures().values()])
    np.testing.assert_allclose(collected[1:], collected[:1] * 2, rtol=1e-3, atol=1e-4)


def points(fitted: TrainingStatistics, features) -> np.ndarray:
    return np.stack([fitted.point(seen(row)) for row in np.atleast_2d(features)])


def test_measures_by_hand():
    """A step of 0.6 down and one of 0.8 across; of four map values, two are undecided."""
    gray = torch.tensor([[0.0, 0.8], [0.6, 0.6]])[None, None]
    maps = torch.tensor([[0.0, 1.0], [0.5, 0.1]])[None, None]
    appearance = Appearance()
    appearance.add(gray, [torch.ones(1, 1, 1, 1)], maps)
    measures = appearance.measures()
    assert measures["undecided"] == pytest.approx((0.25 + 0.09) / 1.6)
    assert measures["middle"] == 0.25
    assert measures["edges"] == pytest.approx(1.0)
    assert measures["texture"] == pytest.approx(0.4)


def test_the_distance_is_that_from_the_third_nearest_training_image():
    """Twelve images at 0, 1, ... 11 on a line: 20 is 11 away from the third nearest, 9."""
    fitted = fit_statistics([seen([float(place), 0.0]) for place in range(12)])
    assert fitted.images == 12
    distances = fitted.distance(points(fitted, [[20.0, 0.0], [5.0, 0.0], [5.0, 30.0]]))
    np.testing.assert_allclose(distances, [11.0, 1.0, np.hypot(30, 1)], rtol=2e-3)
    # between each other the third nearest are 2, at the ends 3 away
    assert fitted.limit == pytest.approx(1.6 * np.quantile([2] * 10 + [3] * 2, 0.95))


def test_a_measure_counts_as_much_as_the_widest_direction_of_the_features():
    rng = np.random.default_rng(5)
    drawn = rng.standard_normal((100, 3)) * [3.0, 1.0, 0.02]
    images = [seen(row[:2], gray=0.4 + row[2]) for row in drawn]
    fitted = fit_statistics(images)
    spread = np.std([image.measures()["background"] for image in images])
    assert fitted.scales["background"] == pytest.approx(drawn[:, 0].std() / spread, rel=0.05)
    assert fitted.compare(seen([0.0, 0.0], gray=0.4)).unfamiliar < 0.5
    assert fitted.compare(seen([0.0, 0.0], gray=0.8)).unfamiliar > 1


def test_the_limit_leaves_a_margin_over_images_of_the_same_kind(statistics):
    rng = np.random.default_rng(2)
    new = 10 + np.array([3.0, 1, 1, 1, 1, 1]) * rng.standard_normal((200, 6))
    distances = statistics.distance(points(statistics, new))
    assert distances.max() < statistics.limit * 1.3
    assert statistics.limit == pytest.approx(1.6 * np.quantile(distances, 0.95), rel=0.2)
    odd = fit_statistics([*training_images(), *(seen(np.full(6, 10.0 + 40 * i)) for i in range(6))])
    assert odd.limit < 1.2 * statistics.limit, "six odd ones among 206 do not set the limit"


def test_files_of_earlier_versions_hold_a_mean_and_a_covariance():
    """Three standard deviations of 2 along the first axis, 4 of 0.5 across it: 5 in all."""
    ranges = {"background": [0.0, 1.0], "texture": [0.0, 1.0], "cells": [0.0, 1.0]}
    values = {"mean": [10.0, 10.0], "directions": [[1.0, 0.0]], "variances": [4.0], "rest": 0.25}
    values |= {"limit": 2.0, "ranges": ranges, "images": 30}
    (kind,) = KnownKinds.from_mapping(values, "an old file").kinds
    assert kind.num_features == 2
    assert kind.compare(seen([16.0, 12.0])).unfamiliar == pytest.approx(2.5)
    assert kind.compare(seen([11.0, 10.0])).unfamiliar == pytest.approx(0.25)


def test_fewer_than_ten_images_with_signal_are_not_described():
    images = training_images(9)
    assert fit_statistics(images) is None
    assert fit_statistics([*images, seen(np.zeros(6), signal=False), Appearance()]) is None
    assert fit_statistics([*images, seen(np.zeros(6))]).images == 10


def test_familiar_and_unfamiliar_images(statistics):
    assert statistics.compare(seen(np.full(6, 10.0))).unfamiliar < 0.5
    assert statistics.compare(seen(np.full(6, 10.0))).reasons == ()
    far = np.full(6, 10.0)
    far[1] += 40
    compared = statistics.compare(seen(far))
    distance = statistics.distance(points(statistics, far))[0]
    assert compared.unfamiliar == pytest.approx(distance / statistics.limit)
    assert compared.unfamiliar > 1
    assert compared.reasons == ("other patterns",)
    brighter = statistics.compare(seen(far, gray=0.6))
    assert brighter.reasons[0].startswith("brighter background (median intensity 0.6")
    assert "smoother texture" in brighter.note("mine")
    assert brighter.note("mine").startswith(
        "The image does not look like what mine was trained on (brighter"
    )


@pytest.mark.parametrize(("contrast", "flagged"), [(0.0, False), (0.4, False), (0.6, True)])
def test_a_field_without_signal_is_flagged_for_huge_noise_only(statistics, contrast, flagged):
    far = np.full(6, 1000.0)
    compared = statistics.compare(seen(far, signal=False, contrast=contrast))
    assert bool(compared.reasons) == flagged
    assert (compared.unfamiliar > 1) == flagged
    with_cell = statistics.compare(seen(far, signal=False, contrast=contrast, cell=0.6))
    assert with_cell.unfamiliar > 100, "the network sees a cell: its features count"


def test_what_is_known_of_an_image_before_the_network_sees_it(small_model):
    """White noise of 30 gray values: 20 times that is 2.4 times the range of 8 bits."""
    config = small_model.config
    noise = np.random.default_rng(0).normal(128, 30, (70, 90)).clip(0, 255)
    for dtype, contrast in ((np.uint8, 2.4), (np.uint16, 2.4 * 255 / 65535), (np.float32, 0.0)):
        pixels = noise.astype(dtype)
        started = start_appearance(find_range(pixels, **config.intensity), pixels.dtype, config)
        assert started.contrast == pytest.approx(contrast, rel=0.1)
        assert started.is_noise
    for span, is_noise in ((23.0, True), (25.0, False)):  # standard deviations of the noise
        intensity = IntensityRange(5.0, 5.0 + 3 * span, noise=3.0)
        assert start_appearance(intensity, np.dtype(np.uint8), config).is_noise == is_noise


def test_contrast_is_a_share_of_the_data_type():
    assert contrast_of(51, np.dtype(np.uint8)) == 0.2
    assert contrast_of(13107, np.dtype(np.uint16)) == 0.2
    assert contrast_of(0.5, np.dtype(np.float32)) == 0.0


def test_statistics_travel_in_the_header_of_the_model_file(small_model, statistics, tmp_path):
    model = copy.copy(small_model)
    model.statistics = KnownKinds((statistics,))
    save_model(tmp_path / "other.safetensors", model)
    assert load_model(tmp_path / "other.safetensors").statistics is None, "of other features"
    width = small_model.backbone.embed_dim
    statistics = fit_statistics(training_images(width=width))
    model.statistics = KnownKinds((statistics, replace(statistics, limit=9.0, images=7)))
    save_model(tmp_path / "with.safetensors", model)
    save_model(tmp_path / "without.safetensors", small_model)
    loaded = load_model(tmp_path / "with.safetensors")
    at = points(statistics, np.random.default_rng(0).normal(10, 5, (20, width)))
    first, second = loaded.statistics.kinds
    np.testing.assert_allclose(first.distance(at), statistics.distance(at), rtol=1e-3)
    assert first.limit == pytest.approx(statistics.limit, rel=1e-4)
    assert second.limit == 9.0
    assert loaded.statistics.images == statistics.images + 7
    (alone,) = KnownKinds.from_mapping(statistics.to_mapping(), "of an earlier version").kinds
    assert alone.limit == first.limit
    assert load_model(tmp_path / "without.safetensors").statistics is None
    assert "statistics" not in read_model_header(tmp_path / "without.safetensors")
    for key, value in small_model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": [1.0, "a"]},
        {"mean": [1.0] * 5},
        {"limit": 0.0},
        {"rest": float("nan")},
        {"ranges": {}},
        {"examples": ""},
        {"examples": "a"},
        {"examples": "AAAA"},
        {"examples": base64.b64encode(np.full(3 * 11, np.nan, "<f2")).decode()},
        {"examples": base64.b64encode(np.zeros(2 * 11, "<f2")).decode()},
        {"scales": {"length": 1.0}},
        {"limit": 10**400},
        {"mean": [1e308, -1e308] * 5 + [1.0]},
        {"directions": [[1.0]], "examples": ""},
        {"unknown": 1},
    ],
)
def test_damaged_statistics_are_refused(statistics, damage):
    values = json.loads(json.dumps(statistics.to_mapping())) | damage
    with pytest.raises(CheckpointError, match="must be finite numbers"):
        TrainingStatistics.from_mapping(values, "some.safetensors")
    for other in (None, 3, [1], {}):
        with pytest.raises(CheckpointError, match="must be finite numbers"):
            TrainingStatistics.from_mapping(other, "some.safetensors")
        with pytest.raises(CheckpointError, match="must be finite numbers"):
            KnownKinds.from_mapping([statistics.to_mapping(), other], "some.safetensors")
    with pytest.raises(CheckpointError, match="must be finite numbers"):
        KnownKinds.from_mapping([], "some.safetensors")


def test_an_image_is_compared_with_the_nearest_kind(statistics):
    shift = 1000.0
    other = replace(statistics, mean=np.add(statistics.mean, [shift] * 6 + [0] * 5).tolist())
    known = KnownKinds((statistics, other))
    for value in (10.0, 10.0 + shift):
        assert known.compare(seen(np.full(6, value))).unfamiliar < 0.5
    between = known.compare(seen(np.full(6, 10.0 + 0.4 * shift)))
    assert between == statistics.compare(seen(np.full(6, 10.0 + 0.4 * shift)))
    assert between.unfamiliar > 1
    assert known.compare(Appearance()) is None
