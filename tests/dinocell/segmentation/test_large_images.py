"""Images that are kept in files and segmented band by band give the cells of those kept in memory."""

from __future__ import annotations

import errno
import gc
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from dinocell import scratch
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.errors import ScratchSpaceError
from dinocell.io import read_image, read_labels, write_image
from dinocell.network.model import with_config
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.distance_map import _table_index
from dinocell.segmentation.inference import Inference, predict_distance_map
from dinocell.segmentation.intensity import IntensityRange, find_range
from dinocell.segmentation.levels import checked_map


@pytest.fixture
def made(monkeypatch):
    """Shapes of the arrays that were made in files."""
    shapes = []
    original = scratch.zeros_in_file

    def recorded(shape, dtype):
        shapes.append((tuple(shape), np.dtype(dtype).name))
        return original(shape, dtype)

    for module in ("dinocell.scratch", "dinocell.io.tiff", "dinocell.segmentation.inference"):
        monkeypatch.setattr(f"{module}.zeros_in_file", recorded)
    monkeypatch.setattr(scratch, "_BAND_PX", 5000)
    return shapes


def field(fault: str | None = None) -> np.ndarray:
    """A 16-bit field of 40 round cells of (200, 230), with a fault of the camera or a drawn bar."""
    rng = np.random.default_rng(5)
    rows, cols = np.mgrid[:200, :230]
    image = np.full((200, 230), 300.0)
    for number in range(40):
        row, col = 20 + 40 * (number // 8), 16 + 28 * (number % 8)
        image += 4000 * np.exp(
            -((rows - row) ** 2 + (cols - col) ** 2) / (2 * rng.uniform(3, 6) ** 2)
        )
    image = rng.poisson(image).astype(np.uint16)
    if fault == "hot":
        image[rng.integers(0, 200, 150), rng.integers(0, 230, 150)] = 65535
    if fault == "bar":
        image[180:186, 150:220] = 65535
    return image


@pytest.mark.parametrize("fault", [None, "hot", "bar"])
def test_rows_are_scaled_as_the_whole_image_is(fault):
    image = field(fault)
    intensity = find_range(image)
    assert np.isfinite(intensity.ceiling if fault == "bar" else intensity.low)
    assert fault != "hot" or np.isfinite([intensity.spike, intensity.ceiling]).any()
    whole = intensity.apply(image)
    for rows in (slice(0, 200), slice(0, 40), slice(57, 121), slice(180, 200)):
        np.testing.assert_array_equal(intensity.apply_rows(image, rows), whole[rows])


@pytest.mark.parametrize("fault", [None, "hot", "bar"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "zlib", "rowsperstrip": 16}, {"byteorder": ">"}]
)
def test_cells_are_those_of_the_image_in_memory(tmp_path, small_model, made, fault, options):
    tifffile.imwrite(tmp_path / "field.tif", field(fault), **options)
    in_memory = DINOCellPipeline(small_model).run(tmp_path / "field.tif")
    assert not made
    in_files = DINOCellPipeline(small_model, tile_px=50).run(tmp_path / "field.tif")
    assert {name for _, name in made} >= {"uint16", "float32", "int16", "int32", "uint32"}
    assert all(scratch.in_file(a) for a in (in_files.image, in_files.distance_map, in_files.labels))
    np.testing.assert_array_equal(in_files.distance_map, in_memory.distance_map)
    np.testing.assert_array_equal(in_files.labels, in_memory.labels)
    assert in_files.warnings == in_memory.warnings


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files on Linux")
def test_results_in_files_hold_no_file_descriptor(small_model, made):
    before = sorted(os.listdir("/proc/self/fd"))
    kept = [DINOCellPipeline(small_model, tile_px=50).run(field()) for _ in range(2)]
    assert all(scratch.in_file(result.labels) for result in kept)
    assert sorted(os.listdir("/proc/self/fd")) == before
    address = f"{kept[0].labels.ctypes.data:x}-"
    assert address in Path("/proc/self/maps").read_text()
    del kept
    gc.collect()
    assert address not in Path("/proc/self/maps").read_text()  # and the space on the disk is free


def test_read_only_memory_maps_are_read_in_place(tmp_path, small_model, made):
    np.save(tmp_path / "a.npy", field())
    image = np.load(tmp_path / "a.npy", mmap_mode="r")
    pipeline = DINOCellPipeline(small_model, tile_px=50)
    result = pipeline.run(image)
    assert np.shares_memory(result.image, image)
    assert (result.image.shape, "uint16") not in made
    np.testing.assert_array_equal(result.labels, pipeline.run(field()).labels)
    for name, array, read in (
        ("map", result.distance_map, checked_map),
        ("labels", result.labels.astype(np.int32), lambda labels: _table_index(labels)[0]),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        mapped = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        in_place = read(mapped)
        assert np.shares_memory(in_place, mapped)
        assert scratch.in_file(in_place)
        np.testing.assert_array_equal(in_place, array)


def test_average_of_channels_in_files_is_that_in_memory(tmp_path, small_model, made):
    channels = np.stack([field(), field("hot"), field("bar")])
    tifffile.imwrite(tmp_path / "a.ome.tif", channels, metadata={"axes": "CYX"})
    first, second = (
        DINOCellPipeline(small_model, tile_px=tile_px).load(tmp_path / "a.ome.tif", channels=[0, 2])
        for tile_px in (None, 50)
    )
    np.testing.assert_array_equal(first.plane, second.plane)
    assert scratch.in_file(second.plane)
    assert not scratch.in_file(first.plane)
    assert first.warnings == second.warnings


@pytest.mark.parametrize("name", ["plain", "fractions", "big", "white"])
def test_files_are_read_into_files_as_into_memory(tmp_path, made, name):
    image = field()
    options = {"big": {"byteorder": ">"}, "white": {"photometric": "miniswhite"}}.get(name, {})
    if name == "fractions":
        image = image.astype(np.float32) / 7
    tifffile.imwrite(tmp_path / "a.tif", image, **options)
    np.save(tmp_path / "a.npy", image)
    for file in ("a.tif", "a.npy"):
        small, large = (read_image(tmp_path / file, tile_px=px).pixels for px in (None, 50))
        assert not scratch.in_file(small)
        assert scratch.in_file(large)
        assert large.flags.c_contiguous
        assert large.dtype == small.dtype
        np.testing.assert_array_equal(small, large)


def test_large_label_images_are_read_from_files(tmp_path, monkeypatch):
    labels = (field() > 2000).astype(np.uint16) * 7
    tifffile.imwrite(tmp_path / "labels.tif", labels)
    monkeypatch.setattr(scratch, "TILE_PX", 50)
    read = read_labels(tmp_path / "labels.tif")
    assert scratch.in_file(read)
    np.testing.assert_array_equal(read, labels)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_for_temporary_files_is_one_sentence(monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with pytest.raises(ScratchSpaceError, match=r"needs 4\.0 GB more.*No space left.*TMPDIR"):
        scratch.zeros_in_file((1000, 1000, 1000), np.float32)


def test_file_systems_that_cannot_reserve_get_zeros(monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    array = scratch.zeros_in_file((1200, 1000), np.float32)
    assert not array.any()
    array += 1
    assert array.sum() == array.size
    assert scratch.contiguous(array[:0], np.uint8).shape == (0, 1000)


def test_an_image_without_room_leaves_the_others(tmp_path, small_model, monkeypatch):
    for name, size in (("a", 200), ("b", 40)):
        write_image(tmp_path / "in" / f"{name}.tif", field()[:size, :size])
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    options = SegmentOptions(tile_px=50)
    result = segment_files(
        [tmp_path / "in" / "a.tif", tmp_path / "in" / "b.tif"],
        tmp_path / "out",
        options,
        model=small_model,
        shown=False,
    )
    assert [row["name"] for row in result.rows] == ["b"]
    assert "set TMPDIR" in result.failures[0][1]


def test_chosen_channels_of_an_array_in_a_file_stay_there(tmp_path):
    colours = np.stack([field()] * 3, axis=-1)
    np.save(tmp_path / "a.npy", colours)
    read = read_image(tmp_path / "a.npy", channels=[2, 0], tile_px=50).pixels
    assert scratch.in_file(read)
    np.testing.assert_array_equal(read, colours[..., [2, 0]])


def test_large_images_are_judged_by_blocks(monkeypatch):
    image = field("bar")
    whole = find_range(image)
    monkeypatch.setattr(scratch, "TILE_PX", 150)
    sample = scratch.sampled_blocks(image)
    assert sample.shape == (128, 128)
    by_blocks = find_range(image)
    assert by_blocks.ceiling == whole.ceiling  # histograms are of all pixels
    assert by_blocks.notes == whole.notes
    assert by_blocks.high == pytest.approx(whole.high, rel=0.2)


def test_cells_between_the_blocks_are_not_lost(monkeypatch):
    image = np.zeros((400, 400), np.uint16)
    image[90:110, 90:110] = 500
    monkeypatch.setattr(scratch, "TILE_PX", 90)
    assert not scratch.sampled_blocks(image).any()
    intensity = find_range(image)
    assert (intensity.low, intensity.high) == (0, 500)


@pytest.mark.parametrize("shape", [(5000, 4000), (70, 300_000), (300_000, 3), (1, 2**24 + 1)])
def test_samples_are_no_larger_than_a_tile(shape):
    image = np.broadcast_to(np.uint8(3), shape)
    sample = scratch.sampled_blocks(image)
    assert 2**23 / 4 < sample.size <= 2**24 or sample.size == image.size


def test_a_small_image_is_normalised_once(small_model, monkeypatch):
    calls = []
    apply = IntensityRange.apply
    monkeypatch.setattr(
        IntensityRange, "apply", lambda self, image: calls.append(image.shape) or apply(self, image)
    )
    predict_distance_map(small_model, field())
    assert calls == [(200, 230)]


class _Recorder:
    """A model whose calls are counted; its map is the mean of the window's channels."""

    def __init__(self, model):
        self.config, self.device, self.seen = model.config, model.device, 0

    def map_and_features(self, batch):
        self.seen += len(batch)
        return batch.mean(1, keepdim=True).sigmoid(), None


class _Ramp(_Recorder):
    """Its map is the window, darker towards the right and the bottom: no flip gives the same map."""

    def map_and_features(self, batch):
        side = batch.shape[-1]
        ramp = torch.linspace(1, 0.5, side)
        return super().map_and_features(batch)[0] * ramp * ramp[:, None] ** 2, None


def test_test_time_augmentation_is_the_mean_of_four_flips(small_model):
    image = field()[:40, :34]  # a window reaches over it by as much on every side
    model = _Ramp(with_config(small_model, window_px=48, overlap_px=16))
    how = Inference(tta=True)
    intensity = IntensityRange(300, 4000)
    mean, spread = predict_distance_map(model, image, intensity=intensity, how=how)
    assert model.seen == 4
    flips = [
        np.flip(predict_distance_map(model, np.flip(image, axes), intensity=intensity), axes)
        for axes in ((), 0, 1, (0, 1))
    ]
    np.testing.assert_allclose(mean, np.mean(flips, axis=0), atol=1e-6)
    np.testing.assert_allclose(spread, np.std(flips, axis=0), atol=1e-6)
    assert spread.max() > 0.01


def test_flips_of_a_large_image_are_kept_in_a_file_and_equal(small_model, made):
    how = Inference(tta=True, batch_size=3)
    whole = predict_distance_map(small_model, field(), how=how)
    assert made == []
    in_file = predict_distance_map(small_model, field(), how=replace(how, tile_px=90))
    assert made == [((2, 200, 230), "float32")]
    assert scratch.in_file(in_file[1])
    np.testing.assert_array_equal(in_file, whole)
    assert not predict_distance_map(small_model, np.zeros((50, 50)), how=how).any()


def test_black_windows_are_computed_once(small_model):
    image = np.zeros(
        (small_model.config.window_px * 3, small_model.config.window_px * 3), np.float32
    )
    image[:24, :24] = field()[:24, :24]
    recorder = _Recorder(small_model)
    intensity = IntensityRange(300, 4000)
    once = predict_distance_map(recorder, image, intensity=intensity, how=Inference(batch_size=5))
    num_black = recorder.seen
    recorder.seen = 0
    every = predict_distance_map(
        recorder, image + 301, intensity=intensity, how=Inference(batch_size=5)
    )
    assert num_black < recorder.seen / 2
    assert (once[-50:, -50:] < every[-50:, -50:]).all()
    values = np.unique(once[-50:, -50:].round(5))
    assert len(values) == 1
    assert values[0] > 0  # what the network says of black, not zero
