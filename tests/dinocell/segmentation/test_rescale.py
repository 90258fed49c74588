"""The scale at which the network sees an image: factors, resampling, and results in the file's pixels."""

import numpy as np
import pytest
from PIL import Image

from dinocell.errors import ConfigError, ImageFileError, UsageError
from dinocell.network.config import ModelConfig
from dinocell.network.model import with_config
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.inference import Inference, predict_distance_map
from dinocell.segmentation.rescale import Resampling, Scale, resample, rescaled_shape

KNOWN = ModelConfig(pixel_size_um=0.5, diameter_px=20.0)


@pytest.mark.parametrize(
    ("scale", "pixel_size_um", "config", "factor"),
    [
        (Scale(), 0.25, KNOWN, 0.5),
        (Scale(), 1.0, KNOWN, 2.0),
        (Scale(), 0.52, KNOWN, 1.0),  # about the same
        (Scale(), None, KNOWN, 1.0),
        (Scale(), 0.25, ModelConfig(), 1.0),
        (Scale("off"), 0.25, KNOWN, 1.0),
        (Scale(3), None, ModelConfig(), 3.0),
        (Scale(diameter_px=10), 0.25, KNOWN, 2.0),
        (Scale(), 1000.0, KNOWN, 1.0),
    ],
)
def test_factor(scale, pixel_size_um, config, factor):
    found, notes = scale.of_image(pixel_size_um, config)
    assert found == factor
    assert bool(notes) == (factor != 1 or pixel_size_um == 1000.0)


def test_notes_say_what_was_done():
    assert Scale().of_image(0.25, KNOWN)[1] == (
        "For the network the image was reduced 2 times, from 0.25 to 0.5 µm per pixel; results are in "
        "pixels of the file",
    )
    assert "enlarged 2 times;" in Scale(2).of_image(None, KNOWN)[1][0]
    assert "too far from the model's 0.5 µm" in Scale().of_image(1000, KNOWN)[1][0]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"rescale": "on"}, "`rescale` must be auto, off or a number"),
        ({"rescale": 0}, "got 0"),
        ({"rescale": float("nan")}, "got nan"),
        ({"rescale": True}, "got True"),
        ({"diameter_px": -1}, "`diameter_px` must be above 0"),
        ({"rescale": 2, "diameter_px": 9}, "must come without `rescale`"),
    ],
)
def test_impossible_scales(given, sentence):
    with pytest.raises(UsageError, match=sentence):
        Scale(**given)


def test_a_diameter_needs_a_model_that_knows_its_own(mini_model):
    with pytest.raises(ConfigError, match="needs a model that knows"):
        DINOCellPipeline(with_config(mini_model, diameter_px=None), diameter_px=30)
    with pytest.raises(UsageError, match="within 32 times the model's 20"):
        DINOCellPipeline(with_config(mini_model, diameter_px=20), diameter_px=0.1)


@pytest.mark.parametrize(
    ("shape", "new_shape"),
    [((40, 61), (80, 122)), ((100, 90), (37, 31)), ((7, 5), (1, 1)), ((3, 3), (50, 20))],
)
def test_resampling_is_that_of_pillow(shape, new_shape):
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = Image.fromarray(image).resize(new_shape[::-1], Image.Resampling.BICUBIC)
    found = np.zeros(new_shape, np.float32)
    resample(image, found)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-6)


def test_bands_are_parts_of_the_whole():
    image = np.random.default_rng(0).random((90, 40), dtype=np.float32)
    way = Resampling(image.shape, (35, 17))
    whole = way.rows(image.__getitem__, slice(0, 35))
    bands = [way.rows(image.__getitem__, slice(top, top + 5)) for top in range(0, 35, 5)]
    np.testing.assert_array_equal(np.concatenate(bands), whole)


def test_shapes():
    assert rescaled_shape((100, 30), 0.5) == (50, 15)
    assert rescaled_shape((1, 1), 0.1) == (1, 1)
    with pytest.raises(
        ImageFileError, match="up to 1,000 pixels at the scale of the model, got 40 × 40"
    ):
        rescaled_shape((10, 10), 4.0, 1000)


@pytest.mark.parametrize("tta", [False, True])
def test_maps_have_the_size_of_the_image_and_do_not_depend_on_files(mini_model, tta):
    image = np.random.default_rng(0).integers(0, 255, (70, 50)).astype(np.uint8)
    small = predict_distance_map(mini_model, image, how=Inference(tta=tta), rescale=1.5)
    large = predict_distance_map(mini_model, image, how=Inference(tta=tta, tile_px=16), rescale=1.5)
    assert small.shape == ((2, 70, 50) if tta else (70, 50))
    np.testing.assert_array_equal(small, large)
    assert small.min() >= 0
    assert small.max() <= 1
    assert not np.array_equal(
        small, predict_distance_map(mini_model, image, how=Inference(tta=tta))
    )
    blank = predict_distance_map(mini_model, image * 0, how=Inference(tta=tta), rescale=1.5)
    assert blank.shape == small.shape
    assert not blank.any()


def test_results_are_in_pixels_of_the_file(mini_model):
    model = with_config(mini_model, pixel_size_um=0.5, min_area_px=12)
    image = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    pipeline = DINOCellPipeline(model)
    result = pipeline.run(image, pixel_size_um=0.25)
    assert result.labels.shape == result.distance_map.shape == image.shape
    assert result.rescale == 0.5
    assert result.summary()["rescale"] == 0.5
    assert any("reduced 2 times" in note for note in result.warnings)
    assert result.measure().pixel_size_um == 0.25
    loaded = pipeline.load(image, pixel_size_um=0.25)
    assert pipeline.judge(loaded).thresholds.min_area_px == 48
    own = DINOCellPipeline(model, min_area_px=12)
    assert own.judge(loaded).thresholds.min_area_px == 12, "what is given is in pixels of the file"
    off = DINOCellPipeline(model, rescale="off").run(image, pixel_size_um=0.25)
    assert off.rescale == 1
    assert not np.array_equal(off.distance_map, result.distance_map)
    with pytest.raises(ImageFileError, match="at the scale of the model"):
        DINOCellPipeline(model, rescale=4).load(image, max_pixels=5000)
