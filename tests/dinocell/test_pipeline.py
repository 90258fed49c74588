"""One image through everything: sizes, types, tiling, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch

from dinocell.errors import ConfigError, ImageFileError, UsageError
from dinocell.io import read_labels, write_image
from dinocell.network.model import load_model, save_model
from dinocell.pipeline import DINOCellPipeline, segment
from dinocell.results.confidence import cell_scores
from dinocell.segmentation.inference import Inference, predict_distance_map


def field(height: int = 70, width: int = 90, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    image = rng.normal(100, 8, (height, width))
    for row, column in [(15, 20), (40, 60), (55, 18)]:
        image += 900 * (np.hypot(rows - row, columns - column) < 9)
    return image.clip(0).astype(np.uint16)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (5, 3), (16, 16), (33, 31), (70, 90), (3, 200)])
def test_any_size_gives_valid_output(mini_model, shape):
    image = np.random.default_rng(0).integers(0, 1000, shape).astype(np.uint16)
    result = segment(image, model=mini_model)
    assert result.labels.shape == shape
    assert result.labels.dtype == np.uint32
    assert result.distance_map.dtype == np.float32
    assert result.num_cells == len(np.unique(result.labels[result.labels > 0]))
    assert len(result.measure()) == result.num_cells
    assert result.summary()["num_cells"] == result.num_cells


def test_labels_do_not_depend_on_batch_or_tile(mini_model):
    image = field(150, 170)
    reference = segment(image, model=mini_model, batch_size=64)
    assert reference.num_cells > 3
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"tile_px": 40}, {"tile_px": 100}):
        other = segment(image, model=mini_model, **options)
        np.testing.assert_allclose(other.distance_map, reference.distance_map, atol=1e-5)
        assert (other.labels != reference.labels).mean() < 1e-3


def test_a_saved_model_gives_the_same_numbers(tmp_path):
    image = field(150, 170)
    model = load_model("dinocell-nuclei").to(memory_format=torch.contiguous_format)
    before = segment(image, model=model)
    assert before.num_cells == 3
    save_model(tmp_path / "a.safetensors", model)
    after = segment(image, model=tmp_path / "a.safetensors")
    np.testing.assert_array_equal(after.distance_map, before.distance_map)
    np.testing.assert_array_equal(after.scores, before.scores)


def test_cells_of_low_score_are_left_out(mini_model):
    image = field(150, 170)
    every = segment(image, model=mini_model)
    limit = float(every.scores.max()) / 2
    kept = segment(image, model=mini_model, min_score=limit)
    stay = np.flatnonzero(every.scores >= limit) + 1
    assert 0 < kept.num_cells == len(stay) < every.num_cells
    np.testing.assert_array_equal(kept.scores, every.scores[stay - 1])
    for number, label in enumerate(stay, start=1):
        np.testing.assert_array_equal(kept.labels == number, every.labels == label)
    assert f"{every.num_cells - len(stay)} of {every.num_cells} cells" in kept.warnings[-1]
    np.testing.assert_array_equal(kept.measure()["score"], kept.scores)
    assert kept.summary()["quality"] == pytest.approx(kept.scores.mean())
    with pytest.raises(UsageError, match="`min_score` must be"):
        segment(image, model=mini_model, min_score=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64, np.bool_])
def test_types_of_images(mini_model, dtype):
    image = (field() > 500).astype(dtype) if dtype is np.bool_ else (field() // 5).astype(dtype)
    result = segment(image, model=mini_model, allow_mask=True)
    assert result.labels.shape == image.shape


@pytest.mark.parametrize("value", [0, 255])
def test_constant_images_have_no_cells(mini_model, value, tmp_path):
    result = segment(np.full((40, 50), value, np.uint8), model=mini_model)
    assert result.num_cells == 0
    assert "Constant image" in result.warnings[0]
    paths = result.save(tmp_path)
    assert not read_labels(paths["tif"]).any()
    assert paths["csv"].read_text().startswith("label,")


def test_each_threshold_changes_the_labels(mini_model):
    image = field(150, 170)
    base = segment(image, model=mini_model)
    high = np.quantile(base.distance_map, 0.99)
    for options in (
        {"fill_threshold": 0.02},
        {"peak_threshold": float(high)},
        {"min_prominence": 0.5},
        {"min_area_px": 10**6},
    ):
        assert (segment(image, model=mini_model, **options).labels != base.labels).any(), options
    with pytest.raises(ConfigError, match="fill_threshold` < "):
        segment(image, model=mini_model, peak_threshold=0.001)


def test_normalisation_options_of_the_model_act(mini_model):
    from dinocell.network.model import with_config

    image = field()
    base = predict_distance_map(mini_model, image)
    for change in (
        {"low_percentile": 50.0},
        {"high_percentile": 80.0},
        {"min_contrast_sigma": 500.0},
        {"overlap_px": 16},
        {"window_px": 48},
    ):
        other = predict_distance_map(with_config(mini_model, **change), image)
        assert np.abs(other - base).max() > 1e-4, change


def test_precision(mini_model):
    image = field()
    full = predict_distance_map(mini_model, image, how=Inference(precision="fp32"))
    half = predict_distance_map(mini_model, image, how=Inference(precision="bf16"))
    assert 0 < np.abs(full - half).max() < 0.1
    with pytest.raises(ValueError, match="one of auto, fp32, bf16"):
        predict_distance_map(mini_model, image, how=Inference(precision="fp8"))


def test_test_time_augmentation_changes_map_and_scores(mini_model):
    image = field(150, 170)
    plain, flipped = (segment(image, model=mini_model, tta=tta) for tta in (False, True))
    assert flipped.distance_map.shape == plain.distance_map.shape
    assert np.abs(flipped.distance_map - plain.distance_map).max() > 1e-4
    assert flipped.num_cells == len(flipped.scores)
    alone = cell_scores(flipped.labels, flipped.distance_map, target=mini_model.config.target)
    shown = alone > 0
    assert shown.any()
    assert (flipped.scores < alone)[shown].all()  # because the flips of a random network differ


def test_percentiles_change_the_result(mini_model):
    image = field()
    base = segment(image, model=mini_model).distance_map
    assert (
        np.abs(segment(image, model=mini_model, percentiles=(1, 70)).distance_map - base).max()
        > 1e-4
    )
    assert np.array_equal(
        segment(image, model=mini_model, percentiles=(1, 99.8)).distance_map, base
    )
    with pytest.raises(ConfigError, match="Percentiles must hold 0 <= "):
        segment(image, model=mini_model, percentiles=(99, 1))


def test_what_holds_no_signal_is_a_warning(mini_model):
    image = field()
    image[60:63, 5:60] = 65_535
    (warning,) = segment(image, model=mini_model).warnings
    assert "165 pixels (2.6%) above" in warning
    two = np.stack([field(seed=1), image], axis=2)
    (warning,) = segment(two, model=mini_model, channels=[0, 1]).warnings
    assert warning.startswith("channel 1: 165 pixels")


def test_an_image_unlike_the_training_is_a_warning(small_model, knowing_model):
    gradient = np.add.outer(np.arange(70), np.arange(90)).astype(np.uint16) + 10
    result = segment(gradient, model=knowing_model)
    assert result.unfamiliar > 1
    assert result.summary()["unfamiliar"] == pytest.approx(result.unfamiliar, abs=1e-3)
    assert any("does not look like what knowing was trained on" in w for w in result.warnings)
    rng = np.random.default_rng(50)
    alike = rng.integers(100, 120, (70, 90)) + 200 * (rng.random((70, 90)) < 0.1)
    known = segment(alike.astype(np.uint16), model=knowing_model)
    assert 0 < known.unfamiliar < 1
    assert not any("does not look like" in warning for warning in known.warnings)
    without = segment(gradient, model=small_model)
    assert without.unfamiliar is None
    assert "unfamiliar" not in without.summary()
    assert not any("does not look like" in warning for warning in without.warnings)
    np.testing.assert_array_equal(without.labels, result.labels)


def test_progress_is_reported(mini_model):
    seen = []
    segment(field(), model=mini_model, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


class TestChannels:
    def test_colour_needs_a_choice(self, mini_model):
        image = np.stack([field(seed=s) for s in range(3)], axis=-1)
        with pytest.raises(UsageError, match="must be gray, got 3 channels"):
            segment(image, model=mini_model)
        one = segment(image, model=mini_model, channels=1)
        np.testing.assert_array_equal(one.image, image[:, :, 1])
        several = segment(image, model=mini_model, channels=[0, 2])
        assert several.image.dtype == np.float32
        np.testing.assert_array_equal(several.channels, image[..., [0, 2]])
        assert several.num_cells
        for channel in (0, 2):  # intensities of the file, under the channel's own name
            means = several.measure()[f"intensity_mean_{channel}"]
            assert means[0] == pytest.approx(image[..., channel][several.labels == 1].mean())
        assert "intensity_mean" in one.measure()
        assert not np.array_equal(several.labels, one.labels)

    def test_wrong_channels(self, mini_model):
        image = np.stack([field(seed=s) for s in range(3)], axis=-1)
        with pytest.raises((UsageError, ValueError), match="channel"):
            segment(image, model=mini_model, channels=7)
        with pytest.raises(UsageError, match="one channel, number 0"):
            segment(field(), model=mini_model, channels=2)
        assert segment(field(), model=mini_model, channels=0).labels.shape == (70, 90)

    def test_the_name_of_the_one_channel_of_a_gray_file(self, mini_model, tmp_path):
        path = tmp_path / "a.ome.tif"
        tifffile.imwrite(path, field(), metadata={"axes": "YX", "Channel": {"Name": ["488"]}})
        assert segment(path, model=mini_model, channels=488).labels.shape == (70, 90)
        with pytest.raises(UsageError, match=r"channel, number 0 \(488\)"):
            segment(path, model=mini_model, channels="561")

    def test_planes_without_a_meaning_are_channels_on_request(self, mini_model, tmp_path):
        stack = np.stack([field(seed=s) for s in range(2)])
        np.save(tmp_path / "a.npy", stack)
        result = segment(tmp_path / "a.npy", model=mini_model, channels=1)
        np.testing.assert_array_equal(result.image, stack[1])

    def test_names_from_the_file(self, mini_model, tmp_path):
        image = np.stack([field(seed=s) for s in range(2)], axis=-1)
        path = tmp_path / "two.tif"
        write_image(path, image, channel_names=("DNA", "ER"), pixel_size_um=0.5)
        with pytest.raises(UsageError, match="DNA, ER"):
            segment(path, model=mini_model)
        result = segment(path, model=mini_model, channels="ER")
        np.testing.assert_array_equal(result.image, image[:, :, 1])
        assert result.pixel_size_um == pytest.approx(0.5)
        assert result.name == "two"
        assert "area_um2" in result.measure().columns
        assert segment(path, model=mini_model, channels="ER", pixel_size_um=2.0).pixel_size_um == 2
        both = segment(path, model=mini_model, channels=["ER", 0]).measure()
        assert {"intensity_mean_ER", "intensity_mean_DNA"} <= set(both.columns)


def test_notes_on_a_file_are_warnings_of_the_result(mini_model, tmp_path):
    path = tmp_path / "a.ome.tif"
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7}
    tifffile.imwrite(path, field(), metadata={"axes": "YX", **sizes})
    (warning,) = segment(path, model=mini_model).warnings
    assert "must be square" in warning
    assert segment(path, model=mini_model, pixel_size_um=0.6).warnings == ()


@pytest.mark.parametrize("value", [1e300, -1e300, 1.1 * float(np.finfo(np.float32).max)])
def test_values_beyond_float32_are_refused(mini_model, tmp_path, value):
    image = field().astype(np.float64)
    image[3, 4] = value
    np.save(tmp_path / "a.npy", image)
    with pytest.raises(ValueError, match=r"Pixels must lie within ±3\.4e\+38"):
        segment(image, model=mini_model)
    with pytest.raises(ImageFileError, match="in a: divide them"):
        segment(tmp_path / "a.npy", model=mini_model)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64", "uint32"])
def test_an_offset_that_float32_cannot_keep_is_refused(mini_model, dtype):
    image = field().astype(dtype)
    offset = 1e12 if dtype == "float64" else 2**31 if dtype == "uint32" else 2**60
    with pytest.raises(ValueError, match=r"or more where they are so large.*: subtract a constant"):
        segment(image + np.array(offset, dtype), model=mini_model)
    assert segment(image + np.array(10**6, dtype), model=mini_model).num_cells
    assert segment((field() + 1e7).astype(np.float32), model=mini_model).num_cells


@pytest.mark.parametrize("scale", [1e-20, 1e34])
def test_any_scale_within_float32_gives_the_same_cells(mini_model, scale):
    image = field().astype(np.float64)
    expected = segment(image, model=mini_model).labels
    np.testing.assert_array_equal(segment(image * scale, model=mini_model).labels, expected)
    with pytest.raises(ValueError, match=r"differ by 1e-30 or more, got .*: multiply"):
        segment(image * 1e-300, model=mini_model)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """An OME-TIFF with T 2, Z 3 and C 2, and its pixels."""
    planes = [field(40, 50, seed) for seed in range(12)]
    stack = np.stack(planes).reshape(2, 3, 2, 40, 50)
    path = tmp_path_factory.mktemp("stack") / "a.ome.tif"
    tifffile.imwrite(path, stack, metadata={"axes": "TZCYX", "Channel": {"Name": ["DNA", "ER"]}})
    return path, stack


class TestChoiceOfPlanes:
    """What `segment` sees is the chosen plane."""

    @pytest.mark.parametrize(
        ("choice", "plane"),
        [
            ({"time": 1, "z": 2, "channels": "DNA"}, lambda s: s[1, 2, 0]),
            ({"time": 0, "z": "max", "channels": 1}, lambda s: s[0, :, 1].max(0)),
            ({"time": 0, "z": "mean", "channels": [1]}, lambda s: s[0, :, 1].mean(0)),
            ({"page": 4, "channels": ["ER"]}, lambda s: s[1, 1, 1]),
            ({"scene": 0, "time": 1, "z": 0, "channels": 0}, lambda s: s[1, 0, 0]),
        ],
    )
    def test_one_plane(self, mini_model, stack, choice, plane):
        path, pixels = stack
        result = segment(path, model=mini_model, **choice)
        np.testing.assert_allclose(result.image, plane(pixels), rtol=1e-6)
        expected = segment(result.image, model=mini_model)
        np.testing.assert_array_equal(result.labels, expected.labels)

    @pytest.mark.parametrize("word", ["mean", "all"])
    def test_all_channels_are_averaged(self, mini_model, stack, word):
        path, pixels = stack
        result = segment(path, model=mini_model, time=1, z=1, channels=word)
        listed = segment(path, model=mini_model, time=1, z=1, channels=["DNA", "ER"])
        np.testing.assert_array_equal(result.image, listed.image)
        assert result.channel_names == ("DNA", "ER")
        array = np.moveaxis(pixels[1, 1], 0, -1)
        averaged = segment(array, model=mini_model, channels=word)
        np.testing.assert_array_equal(averaged.image, result.image)
        assert averaged.channel_names == ("0", "1")

    def test_no_choice_is_refused(self, mini_model, stack):
        path, pixels = stack
        with pytest.raises(ImageFileError, match=r"T 2 × Z 3 × C 2: choose with `time` and `z`"):
            segment(path, model=mini_model)
        with pytest.raises(UsageError, match=r"2 channels \(DNA, ER\)"):
            segment(path, model=mini_model, time=0, z="max")
        with pytest.raises(ValueError, match="`z` chooses a plane of a file, got an array"):
            segment(pixels[0, 0, 0], model=mini_model, z=0)


class TestWrongImages:
    @pytest.mark.parametrize(
        ("image", "message"),
        [
            (np.zeros((2, 3, 4, 5)), "4, 5"),
            (np.zeros(7), "choose one plane"),
            (np.zeros((0, 4)), "not empty"),
            (np.array([["a"]]), "real numbers"),
            (np.zeros((4, 4), complex), "real numbers"),
            (np.array([[1.0, np.nan], [2.0, 3.0]]), "finite"),
        ],
    )
    def test_arrays(self, mini_model, image, message):
        with pytest.raises(ValueError, match=message):
            segment(image, model=mini_model)

    def test_a_mask_is_refused_unless_allowed(self, mini_model, tmp_path):
        mask = (field() > 500).astype(np.uint8) * 255
        with pytest.raises(ValueError, match="mask or label image"):
            segment(mask, model=mini_model)
        write_image(tmp_path / "mask.png", mask)
        with pytest.raises(ImageFileError, match="mask or label image in mask"):
            segment(tmp_path / "mask.png", model=mini_model)
        assert segment(mask, model=mini_model, allow_mask=True).labels.shape == mask.shape

    def test_missing_file(self, mini_model):
        with pytest.raises(UsageError):
            segment("no_such_file.tif", model=mini_model)

    def test_wrong_settings(self, mini_model):
        with pytest.raises(ValueError, match="batch_size"):
            DINOCellPipeline(mini_model, batch_size=0)
        with pytest.raises(UsageError, match="auto, cpu, cuda"):
            DINOCellPipeline(mini_model, device="tpu9")


def test_save_writes_every_format(mini_model, tmp_path):
    result = segment(field(150, 170), model=mini_model, name="x")
    paths = result.save(tmp_path, formats=("png", "tif", "geojson", "coco"))
    assert {path.name for path in tmp_path.iterdir()} == {
        "x_cells.csv",
        "x_overlay.png",
        "x_labels.png",
        "x_labels.tif",
        "x_outlines.geojson",
        "x_coco.json",
    }
    np.testing.assert_array_equal(read_labels(paths["tif"]), result.labels)
    np.testing.assert_array_equal(read_labels(paths["png"]), result.labels)
    with pytest.raises(UsageError, match="tif, png"):
        result.save(tmp_path, formats=("svg",))
    assert "overlay" not in result.save(tmp_path / "plain", overlay=False)
    assert "geojson" in result.save(tmp_path / "one", formats="geojson")
    assert "png" in result.save(tmp_path / "drawn", formats=(name for name in ["png"]))


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
def test_a_pixel_size_that_cannot_be_is_refused_before_the_work(mini_model, size):
    with pytest.raises(UsageError, match="`pixel_size_um` must be above 0"):
        DINOCellPipeline(mini_model).load(field(), pixel_size_um=size)


def test_an_unknown_keyword_is_refused(mini_model):
    with pytest.raises(TypeError, match="does not know window_px"):
        DINOCellPipeline(mini_model, window_px=64)
