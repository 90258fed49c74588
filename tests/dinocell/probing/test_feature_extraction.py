"""Windows and features of multi-channel fields, with a network whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinocell.errors import CheckpointError, DataSetError
from dinocell.probing.feature_extraction import (
    FieldImage,
    choose_windows,
    extract_views,
    normalize_channels,
)
from dinocell.probing.views import MEAN_VIEW
from dinocell.segmentation.intensity import normalize_intensity, to_model_input

PATCH = 4


class MeanNetwork(nn.Module):
    """CLS is the mean and standard deviation of the image, a patch token those of the patch."""

    patch_size = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.batches: list[int] = []

    def forward_features(self, image: Tensor) -> dict[str, Tensor]:
        assert not self.training
        self.batches.append(len(image))
        gray = image[:, 0] * self.scale
        patches = gray.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3)
        tokens = torch.stack([patches.mean(3), patches.std(3)], dim=-1).flatten(1, 2)
        cls = torch.stack([gray.mean((1, 2)), gray.std((1, 2))], dim=-1)
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": tokens}

    def get_last_selfattention(self, image: Tensor) -> Tensor:
        tokens = image.shape[-1] * image.shape[-2] // PATCH**2
        weights = torch.full((len(image), 2, tokens + 3, tokens + 3), 0.5)
        brightness = self.forward_features(image)["x_norm_patchtokens"][..., 0]
        weights[:, :, 0, 3:] = brightness[:, None]
        return weights


def field(name: str, channels=("DNA", "ER"), shape=(20, 30), seed=0) -> FieldImage:
    rng = np.random.default_rng(seed)
    planes = rng.integers(100, 4000, size=(len(channels), *shape)).astype(np.uint16)
    return FieldImage(name, tuple(channels), planes)


def test_windows_are_the_richest_of_a_centred_grid():
    image = np.zeros((11, 22), np.float32)
    image[2, 2] = 1.0  # window (0, 1) of edge 5 has a little, (5, 11) much
    image[6:8, 12:15] = 1.0
    assert choose_windows(image, 5, 2) == [(5, 11), (0, 1)]
    assert len(choose_windows(image, 5, 100)) == 8
    assert choose_windows(np.zeros((12, 12), np.float32), 12, 3) == [(0, 0)]


def test_channels_are_normalised_one_by_one():
    planes = field("a").planes.copy()
    planes[1] = planes[1] // 10 + 7
    stack = normalize_channels(planes)
    assert np.array_equal(stack[1], normalize_intensity(planes[1]))
    assert np.array_equal(stack[0], normalize_intensity(planes[0]))


def test_views_are_the_channels_and_their_mean():
    network = MeanNetwork()
    network.train()
    item = field("a")
    found = extract_views(network, [item], window_px=8, windows_per_field=3, batch_size=2)
    assert network.training
    assert found.channels == ["DNA", "ER", MEAN_VIEW] * 3
    assert found.fields == ["a"] * 9
    assert found.locations.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert max(network.batches) == 2
    stack = normalize_channels(item.planes)
    stack = np.concatenate([stack, stack.mean(axis=0, keepdims=True)])
    for location, (row, column) in enumerate(choose_windows(stack[2], 8, 3)):
        for view in range(3):
            window = to_model_input(stack[view, row : row + 8, column : column + 8])[0]
            place = 3 * location + view
            assert found.cls[place, 0] == pytest.approx(window.mean(), abs=1e-5)
            assert found.patch_mean[place, 0] == pytest.approx(window.mean(), abs=1e-5)
            assert found.attention is not None
            first = window[:PATCH, :PATCH].mean()
            assert found.attention[place, 1, 0] == pytest.approx(first, abs=1e-5)
    assert found.attention.shape == (9, 2, 4)


def test_batch_size_changes_speed_only_and_attention_is_optional():
    fields = [field("a", seed=1), field("b", ("ER", "DNA", "RNA"), seed=2)]
    small = extract_views(MeanNetwork(), fields, window_px=8, batch_size=1)
    large = extract_views(MeanNetwork(), fields, window_px=8, batch_size=64, attention=False)
    assert np.allclose(small.cls, large.cls, atol=1e-6)
    assert large.attention is None
    assert large.example.attention is None
    assert small.example.field == "b"  # the most channels
    assert small.example.channels == ("ER", "DNA", "RNA", MEAN_VIEW)
    assert small.example.patches.shape == (4, 2, 2, 2)


def test_channels_can_be_chosen_and_dead_ones_are_named():
    item = field("a", ("DNA", "ER", "Mito"))
    item.planes[1] = 7
    found = extract_views(MeanNetwork(), [item], window_px=8, windows_per_field=1)
    assert found.channels == ["DNA", "Mito", MEAN_VIEW]
    assert found.left_out == ["a: channel ER is constant, left out"]
    chosen = extract_views(
        MeanNetwork(), [field("b", ("DNA", "ER", "Mito"))], window_px=8, channels=["mito", "dna"]
    )
    assert set(chosen.channels) == {"DNA", "Mito", MEAN_VIEW}


def test_a_field_of_one_channel_is_left_out():
    fields = [field("a"), field("alone", ("DNA",), shape=(5, 5))]
    found = extract_views(MeanNetwork(), fields, window_px=8, windows_per_field=1)
    assert set(found.fields) == {"a"}
    assert found.left_out == ["alone has one channel, left out"]


def test_fewer_windows_than_asked_are_noted():
    found = extract_views(MeanNetwork(), [field("a")], window_px=16, windows_per_field=5)
    assert found.left_out == ["a holds 1 windows of 16 px, not 5"]


def test_progress_names_each_field():
    seen: list[str] = []
    extract_views(MeanNetwork(), [field("a"), field("b", seed=3)], window_px=8, advance=seen.append)
    assert seen == ["a", "b"]


def test_a_network_without_attention_maps_is_refused():
    class Blind(MeanNetwork):
        get_last_selfattention = property()  # type: ignore[assignment]

    with pytest.raises(ValueError, match="leave them out with `attention=False`"):
        extract_views(Blind(), [field("a")], window_px=8)
    assert extract_views(Blind(), [field("a")], window_px=8, attention=False).attention is None


def test_wrong_fields_are_refused():
    network = MeanNetwork()
    with pytest.raises(ValueError, match="multiple of the patch size 4, got 10"):
        extract_views(network, [field("a")], window_px=10)
    with pytest.raises(DataSetError, match="hold a window of 24 px, got 20×30 in a"):
        extract_views(network, [field("a")], window_px=24)
    with pytest.raises(DataSetError, match="different names, got a twice"):
        extract_views(network, [field("a"), field("a")], window_px=8)
    with pytest.raises(DataSetError, match="one of the channels AGP, got DNA, ER in a"):
        extract_views(network, [field("a")], window_px=8, channels=["AGP"])
    with pytest.raises(DataSetError, match="Some field must have two channels, got 1"):
        extract_views(network, [field("a", ("DNA",))], window_px=8)
    empty = field("a")
    empty.planes[:] = 3
    with pytest.raises(DataSetError, match="constant planes in a"):
        extract_views(network, [empty], window_px=8)
    network.scale.data[:] = float("nan")
    with pytest.raises(CheckpointError, match="finite numbers, got NaN or infinite cls"):
        extract_views(network, [field("a")], window_px=8)
