"""Intensities: robust, of the whole image, and an empty field stays dark."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from skimage.io import imread

from dinocell.segmentation.intensity import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalize_intensity,
    to_model_input,
)


def ramp() -> np.ndarray:
    return np.arange(10_000, dtype=np.uint16).reshape(100, 100)


def test_percentiles_go_to_0_and_1():
    image = ramp()
    out = normalize_intensity(image, low_percentile=10, high_percentile=90, min_contrast_sigma=0)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out[image == 5000], 0.5, atol=1e-3)
    assert out[image <= 1000].max() < 1e-3
    assert out[image >= 9000].min() > 1 - 1e-3


def test_each_option_changes_the_result():
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.gamma(2.0, 100.0, (64, 64)), 3)
    base = normalize_intensity(image)
    for option in ({"low_percentile": 20}, {"high_percentile": 70}, {"min_contrast_sigma": 5000.0}):
        assert np.abs(normalize_intensity(image, **option) - base).max() > 0.01


def test_gain_and_offset_do_not_matter():
    rng = np.random.default_rng(1)
    image = rng.normal(0, 1, (80, 80)) + 40 * (np.hypot(*np.mgrid[-40:40, -40:40]) < 12)
    np.testing.assert_allclose(
        normalize_intensity(image), normalize_intensity(3.0 * image + 100.0), atol=1e-5
    )


def test_a_hot_pixel_does_not_darken_the_rest():
    image = ramp()
    hot = image.copy()
    hot[50, 50] = 65_535
    difference = np.abs(normalize_intensity(image) - normalize_intensity(hot))
    assert np.delete(difference.ravel(), 5050).max() < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64, np.bool_])
def test_dtypes(dtype):
    image = (np.hypot(*np.mgrid[-20:20, -20:20]) < 9).astype(dtype)
    out = normalize_intensity(image, min_contrast_sigma=0)
    assert out.min() == 0
    assert out.max() == 1


def test_a_spot_smaller_than_the_percentile_survives():
    image = np.zeros((200, 200), np.uint16)
    image[100:104, 100:104] = 900  # 0.04 % of the pixels
    out = normalize_intensity(image)
    assert out[101, 101] == 1
    assert out[0, 0] == 0


@pytest.mark.parametrize("value", [0, 7, 65_535])
def test_constant_image_is_dark(value):
    assert not normalize_intensity(np.full((9, 5), value, np.uint16)).any()


def test_pure_noise_is_not_stretched():
    rng = np.random.default_rng(3)
    image = rng.normal(150, 5, (256, 256)).astype(np.uint16)
    assert normalize_intensity(image).max() < 0.5
    assert normalize_intensity(image, min_contrast_sigma=0).max() == 1


def test_real_fields_with_and_without_nuclei(data_dir):
    empty = sorted((data_dir / "bbbc039" / "edge_cases" / "images").glob("*.tif"))
    full = sorted((data_dir / "bbbc039" / "train" / "images").glob("*.tif"))
    assert empty
    assert full
    for path in empty:
        assert np.percentile(normalize_intensity(imread(path)), 99.5) < 0.5
    for path in full:
        assert normalize_intensity(imread(path)).max() == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 4)), r"2-D .*\(2, 3, 4\)"),
        (np.zeros((0, 4)), "not empty"),
        (np.array([[0.0, np.nan]]), "finite"),
        (np.array([[0.0, np.inf]]), "finite"),
    ],
)
def test_wrong_images(image, message):
    with pytest.raises(ValueError, match=message):
        normalize_intensity(image)


def test_model_input_uses_imagenet_statistics():
    out = to_model_input(np.array([[0.0, 1.0]], dtype=np.float32))
    assert out.shape == (3, 1, 2)
    assert out.dtype == np.float32
    for channel in range(3):
        mean, std = IMAGENET_MEAN[channel], IMAGENET_STD[channel]
        np.testing.assert_allclose(out[channel, 0], [-mean / std, (1 - mean) / std], rtol=1e-6)
