"""The small decoder on frozen features: learns, is fair, bounded and repeatable."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from dinocell.errors import DataSetError
from dinocell.io import write_image, write_labels
from dinocell.pairs import find_pairs
from dinocell.probing import decoder_probe as decoder_probe_module
from dinocell.probing.decoder_probe import ProbeConfig, ProbeTimeError, probe_features
from dinocell.probing.labelled_channels import channel_scores, find_channel_pairs
from dinocell.probing.labelled_windows import cut_windows, read_windows

QUICK = ProbeConfig(window_px=48, windows_per_image=1, steps=12, batch_size=4, seed=0)


@pytest.fixture(scope="module")
def vit(mini_model):
    return mini_model.backbone.vit


@pytest.fixture(scope="module")
def windows(blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels")
    found = read_windows(pairs, window_px=48, windows_per_image=1)
    return found[:4], found[4:]


def disc_field(seed, shape=(64, 128)):
    """Labels with discs in both halves."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    for cell, (row, column) in enumerate([(16, 16), (44, 40), (20, 84), (46, 110)], start=1):
        labels[np.hypot(rows - row, columns - column) < rng.uniform(8, 11)] = cell
    return labels


def channel_image(labels, seed, contrast=1500.0):
    noise = np.random.default_rng(seed).normal(0, 60, labels.shape)
    return (300 + contrast * (labels > 0) + noise).clip(0).astype(np.uint16)


@pytest.fixture(scope="module")
def labelled_fields(tmp_path_factory):
    """FIELD/CHANNEL.tif: DNA shows the cells, Dark shows noise."""
    folder = tmp_path_factory.mktemp("fields")
    for number in range(3):
        labels = disc_field(number)
        write_image(folder / f"f{number}" / "DNA.tif", channel_image(labels, number))
        write_image(folder / f"f{number}" / "Dark.tif", channel_image(labels, number + 9, 0.0))
        write_labels(folder / f"f{number}" / "labels.png", labels)
    return folder


def test_windows_have_the_most_cells_and_the_whole_images_distances():
    labels = np.zeros((20, 40), np.int32)
    labels[4:16, 15:25] = 1  # cut by the border between the windows
    labels[0:3, 21:40] = 2
    image = channel_image(labels, 0)
    (first,) = cut_windows("a", image, labels, window_px=20)
    assert first.name == "a@0,20"
    both = cut_windows("a", image, labels, window_px=20, count=9)
    assert len(both) == 2
    # The nearest outside pixel of (10, 20) is that of the whole cell: deep, not at an edge.
    assert first.target[10, 0] == 1.0
    right = cut_windows("a", image, labels, window_px=20, columns=(20, 40))
    assert np.array_equal(right[0].image, first.image)  # normalised as a whole


def test_small_images_are_padded_and_scored_without_the_padding():
    labels = disc_field(0, (40, 56))
    (window,) = cut_windows("a", channel_image(labels, 0), labels, window_px=64)
    assert window.image.shape == window.target.shape == (64, 64)
    assert window.labels.shape == (40, 56)
    assert np.array_equal(window.image[40:], window.image[16:40][::-1])


def test_images_are_spread_over_the_names(blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels")
    found = read_windows(pairs, window_px=32, windows_per_image=2, max_images=3)
    assert {window.name.split("@")[0] for window in found} == {"blob0", "blob2", "blob5"}
    assert len(found) == 6


def test_decoder_learns_and_is_scored_on_what_it_did_not_see(vit, windows):
    train, val = windows
    short = probe_features(vit, train, val, dataclasses.replace(QUICK, steps=1))
    long = probe_features(vit, train, val, dataclasses.replace(QUICK, steps=60))
    assert long.scores["mse"] < 0.8 * short.scores["mse"]
    assert long.train_loss < short.train_loss
    assert long.scores["op_csb"] > 0.25
    assert (long.steps, long.num_train, long.num_val) == (60, 4, 2)
    assert long.scores["op_csb"] == pytest.approx((long.scores["seg"] + long.scores["det"]) / 2)


def test_same_seed_same_scores_and_the_callers_generators_stay(vit, windows):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = probe_features(vit, *windows, QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    with torch.no_grad():  # as a caller in evaluation would have it
        again = probe_features(vit, *windows, QUICK)
    assert again.scores == first.scores
    assert again.train_loss == first.train_loss


@pytest.mark.slow
def test_every_setting_changes_the_result(vit, windows):
    changes = (
        {},
        {"seed": 1},
        {"steps": 13},
        {"batch_size": 2},
        {"lr": 1e-3},
        {"decoder": "linear"},
    )
    losses = [
        probe_features(vit, *windows, dataclasses.replace(QUICK, **change)).train_loss
        for change in changes
    ]
    assert len(set(losses)) == len(changes)


def test_time_limit_cuts_the_training_and_says_so(vit, windows, monkeypatch):
    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls) -> float:
            cls.now += 1.0
            return cls.now

    monkeypatch.setattr(decoder_probe_module, "time", Clock)
    result = probe_features(vit, *windows, dataclasses.replace(QUICK, steps=500, max_seconds=30))
    assert 1 <= result.steps < 30
    with pytest.raises(ProbeTimeError, match="max_seconds, got 2 s over while"):
        probe_features(vit, *windows, dataclasses.replace(QUICK, max_seconds=2))


@pytest.mark.slow
def test_a_channel_without_cells_scores_less(vit, labelled_fields):
    config = ProbeConfig(window_px=64, windows_per_image=2, steps=60, batch_size=4)
    scores = channel_scores(vit, labelled_fields, config)
    assert list(scores.results) == ["Dark", "DNA"]
    assert scores.results["DNA"].scores["mse"] < 0.6 * scores.results["Dark"].scores["mse"]
    decoder = scores.results["DNA"]
    assert decoder.elsewhere["Dark"]["mse"] > 1.5 * decoder.scores["mse"]
    values = [scores.results[name].scores["mse"] for name in ("DNA", "Dark")]
    assert scores.mean["mse"] == pytest.approx(np.mean(values))
    assert scores.std["mse"] == pytest.approx(np.std(values, ddof=1))
    assert "1 of 3 fields" in scores.split
    names = scores.to_mapping()
    assert names["std"]["mse"] == scores.std["mse"]
    assert names["channels"]["DNA"]["num_val_windows"] == 2


def test_folders_per_channel_and_chosen_channels(vit, tmp_path):
    for number in range(2):
        labels = disc_field(number)
        for channel in ("DNA", "ER"):
            write_image(
                tmp_path / channel / "images" / f"f{number}.tif", channel_image(labels, number)
            )
            write_labels(tmp_path / channel / "labels" / f"f{number}.png", labels)
    pairs = find_channel_pairs(tmp_path)
    assert {name: len(found) for name, found in pairs.items()} == {"DNA": 2, "ER": 2}
    scores = channel_scores(vit, tmp_path, dataclasses.replace(QUICK, steps=2), channels=["er"])
    assert list(scores.results) == ["ER"]
    assert math.isnan(scores.std["mse"])
    assert scores.to_mapping()["std"]["mse"] is None
    both = channel_scores(vit, tmp_path, dataclasses.replace(QUICK, steps=2))
    # The same image in both: the same windows are held out, so the scores are the same.
    assert both.results["DNA"].scores == both.results["ER"].scores
    # So the decoder of one channel scores on the other as on its own.
    assert both.results["DNA"].elsewhere == {"ER": both.results["DNA"].scores}
    across = both.to_mapping()["across"]["ER"]
    assert across["mean"] == across["worst"] == both.results["ER"].scores["ap50"]
    assert across["std"] is None, "one other channel"
    assert scores.across == {}


def test_one_field_is_split_into_halves(vit, tmp_path):
    labels = disc_field(0)
    write_image(tmp_path / "tile" / "nucleus.tif", channel_image(labels, 0))
    write_labels(tmp_path / "tile" / "cells_expert1.png", labels)
    write_labels(tmp_path / "tile" / "cells_expert2.png", labels)
    config = ProbeConfig(window_px=32, windows_per_image=9, steps=2)
    scores = channel_scores(vit, tmp_path, config, labels_name="cells_expert1")
    assert "left half trains" in scores.split
    assert list(scores.results) == ["nucleus"]  # the other expert's labels are no channel
    assert scores.results["nucleus"].num_train == scores.results["nucleus"].num_val == 4


def test_wrong_folders_are_refused(vit, tmp_path, labelled_fields):
    with pytest.raises(DataSetError, match="must be a folder"):
        find_channel_pairs(tmp_path / "nowhere")
    with pytest.raises(DataSetError, match="arrange the files so"):
        find_channel_pairs(tmp_path)
    with pytest.raises(DataSetError, match="hold the label image truth, got Dark, DNA, labels"):
        find_channel_pairs(labelled_fields, labels_name="truth")
    with pytest.raises(DataSetError, match=r"include one of Dark, DNA, .* got AGP"):
        channel_scores(vit, labelled_fields, QUICK, channels=["AGP"])
    empty = np.zeros((64, 128), np.uint16)
    for number in range(2):
        write_image(tmp_path / f"f{number}" / "DNA.tif", channel_image(disc_field(0), number))
        write_labels(tmp_path / f"f{number}" / "labels.png", empty)
    with pytest.raises(DataSetError, match="must hold cells"):
        channel_scores(vit, tmp_path, QUICK)
    with pytest.raises(ValueError, match="multiple of the patch size 16, got 40"):
        probe_features(vit, [], [], dataclasses.replace(QUICK, window_px=40))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"lr": 0.0}, "`lr` must be above 0"),
        ({"max_seconds": -1.0}, "`max_seconds` must be above 0"),
        ({"decoder": "fancy"}, "`decoder` must be one of unet"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(QUICK, **change)
