"""Pairs, splits and crops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch

from dinocell.errors import ConfigError, DataSetError, ImageFileError
from dinocell.io import read_image, read_labels, write_image, write_labels
from dinocell.network.config import ModelConfig
from dinocell.pairs import find_pairs
from dinocell.segmentation.intensity import normalize_intensity
from dinocell.training.config import (
    AugmentConfig,
    DataConfig,
    DatasetConfig,
    LossConfig,
    TrainConfig,
)
from dinocell.training.datasets import CropDataset, read_pair, split_pairs

MODEL = ModelConfig(size="tiny", patch_size=16, window_px=32, overlap_px=8)


BLOBS = (DatasetConfig("blobs", "", ""),)


def config_of(datasets=BLOBS, **changes) -> TrainConfig:
    config = TrainConfig(
        model=changes.get("model", MODEL),
        data=DataConfig(datasets=datasets),
        augment=changes.get("augment", AugmentConfig()),
        loss=changes.get("loss", LossConfig()),
        seed=changes.get("seed", 0),
    )
    data = replace(config.data, cache_bytes=changes.get("cache_bytes", config.data.cache_bytes))
    schedule = replace(config.schedule, crop_px=changes.get("crop_px"))
    return replace(config, data=data, schedule=schedule)


def crops(folder, length=100, **changes):
    pairs = find_pairs(folder / "images", folder / "labels", "blobs")
    return CropDataset(pairs, config_of(**changes), length=length)


def test_items_depend_on_seed_and_index_only(blob_data):
    one, other = crops(blob_data), crops(blob_data, cache_bytes=0, length=7)
    for index in (0, 3, 6):
        for a, b in zip(one[index], other[index], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], crops(blob_data, seed=1)[0][0])
    assert len(other) == 7


@pytest.mark.parametrize("cache_bytes", [0, 5000, 2**30])
def test_some_of_the_images_give_the_crops_of_a_data_set_of_these(blob_data, cache_bytes):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "blobs")
    chosen = [len(pairs) - 1, 0, 1]
    config = config_of(cache_bytes=cache_bytes)
    every = CropDataset(pairs, config, length=100)
    wanted = CropDataset([pairs[place] for place in chosen], config, length=5)
    found = every.only(chosen, length=5)
    assert len(found) == len(wanted)
    for index in range(5):
        for a, b in zip(found[index], wanted[index], strict=True):
            assert torch.equal(a, b)
    assert len(every) == 100
    assert torch.equal(every[3][0], CropDataset(pairs, config, length=100)[3][0])


def test_shapes_types_and_content(blob_data):
    dataset = crops(blob_data)
    images, targets, weights = zip(*(dataset[index] for index in range(30)), strict=True)
    assert all(weight.shape == (1, 32, 32) and bool((weight == 1).all()) for weight in weights)
    assert images[0].shape == (3, 32, 32)
    assert targets[0].shape == (1, 32, 32)
    assert images[0].dtype == targets[0].dtype == torch.float32
    target = torch.stack(targets)
    assert target.min() == 0
    assert 0.9 < target.max() <= 1
    image = torch.stack(images)[:, :1]
    assert image[target > 0.5].mean() > image[target == 0].mean() + 0.5  # bright cells


def test_target_and_size_options_change_the_map(blob_data):
    sqrt, linear = crops(blob_data), crops(blob_data, model=replace(MODEL, target="linear"))
    index = next(i for i in range(20) if sqrt[i][1].max() > 0.5)
    np.testing.assert_allclose(sqrt[index][1].numpy() ** 2, linear[index][1].numpy(), atol=1e-5)
    assert crops(blob_data, crop_px=48)[0][0].shape == (3, 48, 48)


def test_gaps_weigh_more_and_pasted_cells_are_more(tmp_path):
    labels = np.zeros((64, 64), np.uint16)
    labels[20:30, 20:32], labels[20:30, 32:44] = 1, 2
    write_labels(tmp_path / "labels" / "a.png", labels)
    image = np.random.default_rng(0).integers(0, 99, (64, 64)) + 100 * (labels > 0)
    write_image(tmp_path / "images" / "a.png", image.astype(np.uint8))
    plain = AugmentConfig(scale=(1, 1), rotate=False, flip=False, empty_probability=0)
    pasted = replace(plain, paste_probability=1.0)
    few, many = crops(tmp_path, augment=plain), crops(tmp_path, augment=pasted)
    indices = range(20)
    assert sum(float((many[i][1] > 0).sum() - (few[i][1] > 0).sum()) for i in indices) > 0
    weighed = crops(tmp_path, augment=plain, loss=LossConfig(gap_weight=3))
    for index in indices:
        image, target, weight = weighed[index]
        assert torch.equal(image, few[index][0])
        assert torch.equal(target, few[index][1])
        assert set(weight.unique().tolist()) <= {1.0, 4.0}
    assert any(bool((weighed[index][2] == 4).any()) for index in indices)


def test_a_cut_cell_keeps_its_distances(tmp_path):
    labels = np.zeros((64, 64), np.uint16)
    labels[8:56, 8:56] = 1
    write_labels(tmp_path / "labels" / "a.png", labels)
    rng = np.random.default_rng(0)
    write_image(tmp_path / "images" / "a.png", rng.integers(0, 255, (64, 64)).astype(np.uint8))
    plain = AugmentConfig(scale=(1, 1), rotate=False, flip=False, empty_probability=0)
    values = [
        float(crops(tmp_path, augment=plain, crop_px=32)[index][1].max()) for index in range(20)
    ]
    assert min(values) < 0.97  # a corner of the cell does not get a maximum of its own


def test_given_and_drawn_splits(blob_data):
    images, labels = str(blob_data / "images"), str(blob_data / "labels")
    drawn = DataConfig(datasets=(DatasetConfig("a", images, labels),), val_fraction=0.34)
    train, val = split_pairs(drawn, seed=0)
    assert (len(train), len(val)) == (4, 2)
    assert not {p.image_path for p in train} & {p.image_path for p in val}
    assert split_pairs(drawn, seed=0) == (train, val)
    assert any(split_pairs(drawn, seed=seed)[1] != val for seed in range(1, 6))
    given = DataConfig(datasets=(DatasetConfig("a", images, labels, images, labels),))
    train, val = split_pairs(given, seed=0)
    assert (len(train), len(val)) == (6, 6)
    few = DataConfig(datasets=given.datasets, max_val_images=2)
    assert len(split_pairs(few, seed=0)[1]) == 2


def test_split_is_stratified_by_data_set(blob_data):
    images, labels = str(blob_data / "images"), str(blob_data / "labels")
    sets = tuple(DatasetConfig(name, images, labels) for name in "abc")
    _, val = split_pairs(DataConfig(datasets=sets, val_fraction=0.34), seed=3)
    assert [sum(pair.dataset == name for pair in val) for name in "abc"] == [2, 2, 2]


def test_weights_of_data_sets(blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels", "a")
    pairs += find_pairs(blob_data / "images", blob_data / "labels", "b")
    sets = [DatasetConfig("a", "", "", weight=3.0), DatasetConfig("b", "", "", weight=1.0)]
    dataset = CropDataset(pairs, config_of(tuple(sets)), length=1)
    assert dataset.probabilities[:6].sum() == pytest.approx(0.75)
    equal = [DatasetConfig("a", "", ""), DatasetConfig("b", "", "")]
    dataset = CropDataset(pairs, config_of(tuple(equal)), length=1)
    assert dataset.probabilities[:6].sum() == pytest.approx(0.5)


class TestWrongFolders:
    def test_sizes_that_differ(self, tmp_path):
        rng = np.random.default_rng(0)
        write_image(tmp_path / "i" / "a.png", rng.integers(0, 255, (9, 9)).astype(np.uint8))
        write_labels(tmp_path / "l" / "a.png", np.ones((9, 8), np.uint8))
        with pytest.raises(DataSetError, match=r"\(9, 9\) and \(9, 8\)"):
            read_pair(find_pairs(tmp_path / "i", tmp_path / "l")[0])

    def test_masks(self, blob_data, tmp_path):
        labels = read_labels(blob_data / "labels" / "blob0.png")
        tiled = np.tile(labels > 0, (2, 2)).astype(np.uint8)
        image = np.tile(read_image(blob_data / "images" / "blob0.tif").pixels, (2, 2))
        write_image(tmp_path / "i" / "a.tif", image)
        write_labels(tmp_path / "l" / "a.png", tiled)
        with pytest.raises(
            DataSetError, match=r"l/a\.png', which looks like a mask: its 16 separate"
        ):
            read_pair(find_pairs(tmp_path / "i", tmp_path / "l")[0])

    def test_colour_images(self, tmp_path):
        colours = np.random.default_rng(0).integers(0, 255, (9, 9, 3)).astype(np.uint8)
        colours[..., 1] //= 4  # a channel counts as much as another, whatever its range
        labels = np.zeros((9, 9), np.uint8)
        labels[2:6, 2:6] = 1
        write_image(tmp_path / "i" / "a.png", colours)
        write_labels(tmp_path / "l" / "a.png", labels)
        (pair,) = find_pairs(tmp_path / "i", tmp_path / "l")
        mean = np.mean([normalize_intensity(c) for c in np.moveaxis(colours, 2, 0)], axis=0)
        np.testing.assert_allclose(read_pair(pair)[0], mean, atol=1e-6)
        tifffile.imwrite(
            tmp_path / "i" / "a.png",
            colours.transpose(2, 0, 1),
            imagej=True,
            metadata={"axes": "CYX"},
        )
        with pytest.raises(DataSetError, match=r"must be gray.*choose with `channels`"):
            read_pair(pair)  # three channels that are not colours

    def test_values_beyond_float32(self, tmp_path):
        (tmp_path / "i").mkdir()
        np.save(tmp_path / "i" / "a.npy", 1e200 * np.random.default_rng(0).random((9, 9)))
        write_labels(tmp_path / "l" / "a.png", np.eye(9, dtype=np.uint8))
        with pytest.raises(DataSetError, match=r"Pixels must lie within .* in .*a\.npy: divide"):
            read_pair(find_pairs(tmp_path / "i", tmp_path / "l")[0])

    def test_a_truncated_image_is_met_before_training(self, blob_data, tmp_path):
        (tmp_path / "i").mkdir()
        content = (blob_data / "images" / "blob0.tif").read_bytes()
        (tmp_path / "i" / "a.tif").write_bytes(content[: len(content) // 2])
        write_labels(tmp_path / "l" / "a.png", np.ones((64, 80), np.uint8))
        pairs = find_pairs(tmp_path / "i", tmp_path / "l", "a")
        with pytest.raises(ImageFileError):
            CropDataset(pairs, config_of((DatasetConfig("a", "", ""),)), length=1)

    def test_a_single_image_cannot_be_split(self, tmp_path):
        for name in ("a.png", "a_masks.png"):
            write_labels(tmp_path / name, np.ones((9, 8), np.uint8))
        config = DataConfig(datasets=(DatasetConfig("a", str(tmp_path), str(tmp_path)),))
        with pytest.raises(DataSetError, match="at least two images"):
            split_pairs(config, seed=0)


def coloured(folder, channels: int = 3):
    """Random colours in which only the middle channel shows the cell."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 40, (32, 32, channels)).astype(np.uint8)
    image[8:24, 8:24, 1] += 150
    labels = np.zeros((32, 32), np.uint16)
    labels[8:24, 8:24] = 1
    write_image(folder / "i" / "a.tif", image)
    np.save(folder / "i" / "a_seg.npy", {"masks": labels})
    return image


def test_one_channel_is_raw_and_several_are_averaged_as_segment_does_it(tmp_path, mini_model):
    from dinocell.pipeline import DINOCellPipeline

    image = coloured(tmp_path)
    folders = tmp_path / "i", tmp_path / "i"
    read, labels = read_pair(find_pairs(*folders, "a", ["1"])[0])
    assert np.array_equal(read, image[..., 1])
    assert labels.sum() == 256
    pipeline = DINOCellPipeline(mini_model, device="cpu")
    for channels in (["red", "2"], ["green", "blue"]):
        intensity = mini_model.config.intensity
        read, _ = read_pair(find_pairs(*folders, "a", channels)[0], **intensity)
        expected = pipeline.load(tmp_path / "i" / "a.tif", channels=channels).plane
        assert np.array_equal(read, expected)


def test_channels_of_a_configuration_reach_the_crops(tmp_path):
    coloured(tmp_path)
    crops = []
    for channels in (["green"], ["red", "green"]):
        sets = (DatasetConfig("a", *[str(tmp_path / "i")] * 4, channels=channels),)
        train, val = split_pairs(DataConfig(datasets=sets), seed=0)
        assert [pair.channels for pair in train + val] == [tuple(channels)] * 2
        crops.append(CropDataset(train, config_of(sets), length=3)[0][0])
    assert not torch.equal(*crops)
    with pytest.raises(ConfigError, match="at least one of its channels"):
        DatasetConfig("a", "", "", channels=[])
