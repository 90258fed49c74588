"""Image transforms: what is applied against float64 formulas, what is drawn against its statistics."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from dinov3.data import transforms
from dinov3.data.loaders import seeded
from dinov3.data.transforms import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    InterpolationMode,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    Resize,
    make_base_transform,
    make_classification_eval_transform,
    make_classification_train_transform,
    make_eval_transform,
    make_interpolation_mode,
    make_normalize_transform,
    make_resize_transform,
    to_pil,
)


@pytest.fixture(autouse=True)
def _seeds():
    with seeded("test"):
        yield


def picture(height: int = 40, width: int = 56, seed: int = 1) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-15, 16, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.float64)


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Keys' kernel with a = -0.5, widened by the factor of shrinking (antialiased)."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        inner = 1.5 * x**3 - 2.5 * x**2 + 1
        outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, inner, np.where(x < 2, outer, 0))

    scale = old / new
    width = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    weights = kernel((np.arange(old) + 0.5 - centres[:, None]) / width)
    return weights / weights.sum(1, keepdims=True)


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, columns = bicubic_matrix(image.shape[0], height), bicubic_matrix(image.shape[1], width)
    return np.einsum("ai,bj,ijc->abc", rows, columns, image).clip(0, 255)


def test_the_reference_keeps_linear_ramps():
    ramp = np.tile(np.linspace(10, 200, 24)[:, None, None], (1, 8, 3))
    assert np.allclose(bicubic(ramp, 24, 8), ramp)
    half = bicubic(ramp, 12, 8)[3:-3, 0, 0]
    assert np.allclose(half, (ramp[6:-6:2, 0, 0] + ramp[7:-6:2, 0, 0]) / 2)


@pytest.mark.parametrize("window", [(0, 0, 40, 56), (3, 5, 20, 31), (10, 40, 9, 12)])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_a_window_is_resized_bicubically(window, size):
    image = picture()
    got = values(RandomResizedCrop(size).apply(image, window))
    top, left, height, width = window
    expected = bicubic(values(image)[top : top + height, left : left + width], size, size)
    assert np.abs(got - expected).max() <= 1.6  # two passes round to 8 bits each


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_windows_have_uniform_area_and_log_uniform_aspect(scale):
    # In a large square image almost every first draw fits, so no draw is thrown away ...
    crop = RandomResizedCrop(8, scale)
    windows = np.array([crop.draw(4000, 4000) for _ in range(4000)], dtype=np.float64)
    top, left, height, width = windows.T
    area, aspect = height * width / 4000**2, width / height
    assert area.min() > scale[0] * 0.99
    assert area.max() < scale[1] * 1.01
    assert aspect.min() > 0.749
    assert aspect.max() < 1.335
    fits = area < 0.74  # ... where the widest window of that area fits
    span = min(scale[1], 0.74) - scale[0]
    assert stats.kstest(area[fits], "uniform", (scale[0], span)).pvalue > 1e-4
    spread = (math.log(0.75), 2 * math.log(4 / 3))
    assert stats.kstest(np.log(aspect[fits]), "uniform", spread).pvalue > 1e-4
    assert stats.kstest(top[fits] / (4000 - height[fits]), "uniform").pvalue > 1e-4
    assert stats.kstest(left[fits] / (4000 - width[fits]), "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("shape", "window"),
    [((100, 1000), (0, 433, 100, 133)), ((1000, 100), (433, 0, 133, 100))],
)
def test_a_narrow_image_gives_its_central_window(shape, window):
    draws = {RandomResizedCrop(8, (0.9, 1.0)).draw(*shape) for _ in range(50)}
    assert draws == {window}


def test_arguments_of_a_window_act():
    wide = RandomResizedCrop(8, ratio=(3.0, 3.5)).draw(400, 400)
    assert 2.8 < wide[3] / wide[2] < 3.7
    image = picture()
    window = (0, 0, 40, 56)
    results = [
        values(RandomResizedCrop(24, interpolation=mode).apply(image, window))
        for mode in InterpolationMode
    ]
    assert np.abs(results[0] - results[1]).max() > 5
    assert np.abs(results[1] - results[2]).max() > 1


LUMA = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness_contrast_saturation(factor):
    image = picture()
    x = values(image)
    gray = (x @ LUMA).round()[..., None]
    expected = {
        "brightness": x * factor,
        "contrast": gray.mean().round() + factor * (x - gray.mean().round()),
        "saturation": gray + factor * (x - gray),
    }
    for name, want in expected.items():
        got = values(ColorJitter().apply(image, [(name, factor)]))
        assert np.abs(got - want.clip(0, 255)).max() <= 2, name


@pytest.mark.parametrize("turn", [-0.1, -0.03, 0.07, 0.1])
def test_hue_turns_the_circle(turn):
    image = picture(12, 12)
    got = values(ColorJitter().apply(image, [("hue", turn)]))
    for pixel, result in zip(values(image).reshape(-1, 3), got.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        want = np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)) * 255
        assert (
            np.abs(result - want).max() <= 13
        )  # steps of 6 grey levels, rounded twice; no turn is 40 off


def test_jitter_acts_in_the_order_drawn():
    image = picture()
    steps = [("brightness", 1.4), ("contrast", 0.6)]
    one = values(ColorJitter().apply(image, steps))
    other = values(ColorJitter().apply(image, steps[::-1]))
    assert np.abs(one - other).max() > 5


def test_draws_of_the_jitter():
    jitter = ColorJitter(0.4, 0.4, 0.2, 0.1)
    draws = [jitter.draw() for _ in range(4000)]
    applied = [draw for draw in draws if draw]
    assert abs(len(applied) / 4000 - 0.8) < 0.03
    ranges = {
        "brightness": (0.6, 0.8),
        "contrast": (0.6, 0.8),
        "saturation": (0.8, 0.4),
        "hue": (-0.1, 0.2),
    }
    for name, (low, span) in ranges.items():
        factors = [dict(draw)[name] for draw in applied]
        assert stats.kstest(factors, "uniform", (low, span)).pvalue > 1e-4
        first = np.mean([draw[0][0] == name for draw in applied])
        assert abs(first - 0.25) < 0.04
    assert len({tuple(name for name, _ in draw) for draw in applied}) == 24
    assert ColorJitter(brightness=2.0).ranges["brightness"] == (0.0, 3.0)
    assert all(ColorJitter(p=1.0).draw() for _ in range(50))


def test_gray_has_luma_in_all_channels():
    image = picture()
    got = values(RandomGrayscale(1.0)(image))
    assert (got == got[..., :1]).all()
    assert np.abs(got[..., 0] - values(image) @ LUMA).max() <= 1
    assert RandomGrayscale(0.0)(image) is image


def test_flip():
    image = picture()
    assert (values(RandomHorizontalFlip(1.0)(image)) == values(image)[:, ::-1]).all()
    assert RandomHorizontalFlip(0.0)(image) is image


def test_solarise_inverts_the_bright():
    image = picture()
    x = values(image)
    assert (values(RandomSolarize(100, 1.0)(image)) == np.where(x >= 100, 255 - x, x)).all()
    assert RandomSolarize(128, 0.0)(image) is image


@pytest.mark.parametrize("transform", [RandomGrayscale, RandomHorizontalFlip])
def test_rates(transform):
    image = picture(2, 2)
    for p in (0.2, 0.5):
        rate = np.mean([transform(p)(image) is not image for _ in range(3000)])
        assert abs(rate - p) < 0.035


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(sigma):
    image = picture()
    offsets = np.arange(-4, 5)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(values(image), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    rows = sum(k * padded[i : i + 40] for i, k in enumerate(kernel))
    expected = sum(k * rows[:, i : i + 56] for i, k in enumerate(kernel))
    got = values(GaussianBlur().apply(image, sigma))
    assert np.abs(got - expected).max() <= 0.51
    assert GaussianBlur().apply(image, None) is image


@pytest.mark.parametrize(("p", "rate"), [(1.0, 0.0), (0.1, 0.9), (0.5, 0.5)])
def test_blur_has_the_complement_of_its_rate(p, rate):
    """Upstream's inversion (its issue 286), which the released weights were trained with."""
    draws = [GaussianBlur(p=p, radius_min=0.3, radius_max=1.3).draw() for _ in range(3000)]
    sigmas = [draw for draw in draws if draw is not None]
    assert abs(len(sigmas) / 3000 - rate) < 0.035
    if sigmas:
        assert stats.kstest(sigmas, "uniform", (0.3, 1.0)).pvalue > 1e-4


def test_normalisation():
    image = picture()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    tensor = make_base_transform(mean, std)(image)
    expected = (values(image) / 255 - mean) / std
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    np.testing.assert_allclose(tensor.permute(1, 2, 0), expected, atol=1e-6)
    scaled = torch.from_numpy(values(image) / 255).permute(2, 0, 1).float()
    torch.testing.assert_close(make_normalize_transform(mean, std)(scaled), tensor)
    default = make_base_transform()(image).permute(1, 2, 0).double().numpy()
    usual = (values(image) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    np.testing.assert_allclose(default, usual, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, (16, 22)), ({"square": True}, (16, 16)), ({"large_side": True}, (11, 16))],
)
def test_resize(options, size):
    image = picture()
    resized = Resize(16, **options)(image)
    assert (resized.height, resized.width) == size
    assert np.abs(values(resized) - bicubic(values(image), *size)).max() <= 2.5
    assert Resize(40)(image) is image


def test_resize_keeps_a_tall_image_tall():
    assert Resize(16)(picture(56, 40)).size == (16, 22)
    assert Resize(16, large_side=True)(picture(56, 40)).size == (11, 16)


def test_resize_by_filter():
    image = picture()
    nearest = values(Resize(20, square=True, interpolation=InterpolationMode.NEAREST)(image))
    assert (nearest[0, :, 0] == values(image)[0, (np.arange(20) * 56 / 20).astype(int), 0]).all()
    linear = values(Resize(20, square=True, interpolation=InterpolationMode.BILINEAR)(image))
    cubic = values(Resize(20, square=True)(image))
    assert np.abs(linear - cubic).max() > 2


def test_an_image_too_narrow_to_resize():
    with pytest.raises(ValueError, match=r"must keep a pixel, got \(1, 900\) to \(0, 4\)"):
        Resize(4, large_side=True)(Image.new("RGB", (900, 1)))


@pytest.mark.parametrize(
    ("edge", "first"), [(10, 3), (9, 2), (11, 4), (7, 2), (4, 0), (3, 0), (1, -1), (2, -1)]
)
def test_centre(edge, first):
    """The first kept row of a centre crop of 4; halves go to the even number, padding to the end."""
    image = Image.fromarray(np.repeat(np.arange(1, edge + 1, dtype=np.uint8)[:, None, None], 3, 2))
    got = values(CenterCrop(4)(image))
    assert got.shape == (4, 4, 3)
    rows = [row + 1 if 0 <= row < edge else 0 for row in range(first, first + 4)]
    assert got[:, 1, 0].tolist() == rows  # the single column lies at 1


def test_evaluation_transforms():
    image = picture(120, 180)
    default = make_classification_eval_transform()(image)
    assert default.shape == (3, 224, 224)
    by_hand = make_base_transform()(CenterCrop(224)(Resize(256)(image)))
    assert torch.equal(default, by_hand)
    assert torch.equal(make_eval_transform()(image), default)
    small = make_eval_transform(resize_size=32, crop_size=None)(image)
    assert small.shape == (3, 32, 48)
    assert make_eval_transform(resize_size=32, crop_size=None, resize_square=True)(image).shape == (
        3,
        32,
        32,
    )
    assert make_eval_transform(resize_size=48, crop_size=None, resize_large_side=True)(
        image
    ).shape == (3, 32, 48)
    plain = make_eval_transform(resize_size=32, crop_size=None, mean=(0,) * 3, std=(1,) * 3)(image)
    assert plain.min() >= 0
    assert plain.max() <= 1
    nearest = make_eval_transform(
        resize_size=32, crop_size=None, interpolation=InterpolationMode.NEAREST
    )(image)
    assert not torch.equal(nearest, small)


def test_training_transform():
    image = picture()
    made = make_classification_train_transform(crop_size=16, hflip_prob=0)
    with seeded(1):
        crop = made(image)
    with seeded(1):
        again = made(image)
    assert crop.shape == (3, 16, 16)
    assert torch.equal(crop, again)
    always = make_classification_train_transform(crop_size=16, hflip_prob=1.0)
    with seeded(1):
        flipped = always(image)
    assert torch.equal(flipped, crop.flip(-1))


def test_options_that_exclude_each_other():
    with pytest.raises(ValueError, match="must be false with resize_large_side, got true: set one"):
        make_resize_transform(resize_size=8, resize_square=True, resize_large_side=True)


def test_interpolation_by_name():
    assert make_interpolation_mode("bilinear") is InterpolationMode.BILINEAR
    with pytest.raises(ValueError, match="one of nearest, bilinear, bicubic, got 'cubic': choose"):
        make_interpolation_mode("cubic")


def test_every_kind_of_image():
    image = picture(6, 7)
    array = np.asarray(image)
    kinds = [
        image,
        array,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        array / 255,
        torch.from_numpy(array / 255).permute(2, 0, 1).float(),
    ]
    for kind in kinds:
        assert (np.asarray(to_pil(kind)) == array).all()
    gray = array[..., 0]
    for kind in (gray, gray[..., None], torch.from_numpy(gray.copy())[None], Image.fromarray(gray)):
        assert (np.asarray(to_pil(kind)) == gray[..., None]).all()


def test_raw_images_are_refused():
    with pytest.raises(ValueError, match=r"uint8, or float in \[0, 1\], got uint16 from 0 to 4000"):
        to_pil(np.array([[0, 4000]], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"got float64 from -1\.0 to 1\.0"):
        to_pil(np.array([[-1.0, 1.0]]))


def test_constants():
    assert transforms.IMAGENET_DEFAULT_MEAN == (0.485, 0.456, 0.406)
    assert transforms.IMAGENET_DEFAULT_STD == (0.229, 0.224, 0.225)
    assert (transforms.RESIZE_DEFAULT_SIZE, transforms.CROP_DEFAULT_SIZE) == (256, 224)
