"""Augmentation: the draw and the application, each on its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dinocell.training.augment import (
    CropParameters,
    apply_intensity,
    crop_image,
    crop_labels,
    draw_crop,
    empty_crop,
    gap_mask,
    paste_cells,
)
from dinocell.training.config import AugmentConfig

OFF = AugmentConfig(
    scale=(1, 1),
    rotate=False,
    flip=False,
    gamma=(1, 1),
    contrast=(1, 1),
    brightness=0,
    noise_std=0,
    blur_sigma_px=0,
    illumination=0,
    empty_probability=0,
)


def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.uniform(size=(40, 50)).astype(np.float32)


def test_without_augmentation_a_crop_is_a_window():
    image = picture()
    parameters = CropParameters(centre=(20.0, 26.0))
    np.testing.assert_allclose(crop_image(image, parameters, 16), image[12:28, 18:34], atol=1e-6)
    labels = np.arange(2000).reshape(40, 50)
    np.testing.assert_array_equal(crop_labels(labels, parameters, 16), labels[12:28, 18:34])


def test_flip_and_rotation_by_hand():
    image = picture()
    window = image[12:28, 18:34]
    flipped = crop_image(image, CropParameters(centre=(20.0, 26.0), flip=True), 16)
    np.testing.assert_allclose(flipped, window[:, ::-1], atol=1e-5)
    turned = crop_image(image, CropParameters(centre=(20.0, 26.0), angle_rad=np.pi / 2), 16)
    assert (
        min(np.abs(turned - np.rot90(window, 1)).max(), np.abs(turned - np.rot90(window, 3)).max())
        < 1e-4
    )


def test_scale_enlarges():
    labels = np.zeros((40, 40), np.uint32)
    labels[15:25, 15:25] = 70_000
    area = (crop_labels(labels, CropParameters(centre=(20.0, 20.0), scale=1.5), 40) == 70_000).sum()
    assert area == pytest.approx(225, rel=0.1)


def test_image_and_labels_stay_aligned():
    rng = np.random.default_rng(1)
    labels = np.zeros((60, 60), np.int32)
    labels[20:44, 12:35] = 3
    for _ in range(20):
        parameters = draw_crop(rng, AugmentConfig(), 60, 60, 32)
        image = crop_image((labels > 0).astype(np.float32), parameters, 32)
        warped = crop_labels(labels, parameters, 32) > 0
        assert ((image > 0.5) != warped).mean() < 0.03


def test_a_larger_crop_has_the_smaller_one_in_its_middle():
    labels = np.arange(3600).reshape(60, 60)
    parameters = CropParameters(centre=(31.3, 27.8), scale=1.2, angle_rad=0.7, flip=True)
    np.testing.assert_array_equal(
        crop_labels(labels, parameters, 40)[4:36, 4:36], crop_labels(labels, parameters, 32)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (2.0, 2.0)),
        ("rotate", True),
        ("flip", True),
        ("gamma", (2.0, 2.0)),
        ("contrast", (0.5, 0.5)),
        ("brightness", 0.3),
        ("noise_std", 0.2),
        ("blur_sigma_px", 3.0),
        ("illumination", 0.5),
        ("invert_probability", 1.0),
        ("empty_probability", 1.0),
        ("dim", (0.1, 0.1)),
        ("background", 0.4),
    ],
)
def test_each_option_changes_the_crop_and_no_other_draw(field, value):
    image = picture()

    def crops(config: AugmentConfig) -> list[np.ndarray]:
        out = []
        for seed in range(6):
            parameters = draw_crop(np.random.default_rng(seed), config, 40, 50, 16)
            crop = apply_intensity(crop_image(image, parameters, 16), parameters)
            out.append(empty_crop(parameters, 16) if parameters.empty else crop)
        return out

    plain, changed = crops(OFF), crops(dataclasses.replace(OFF, **{field: value}))
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(plain, changed, strict=True))
    if field != "scale":  # a larger scale lets crops lie elsewhere
        for seed in range(6):
            one = draw_crop(np.random.default_rng(seed), OFF, 40, 50, 16)
            other = draw_crop(
                np.random.default_rng(seed), dataclasses.replace(OFF, **{field: value}), 40, 50, 16
            )
            assert one.centre == other.centre
            assert one.noise_seed == other.noise_seed


def test_a_dim_crop_keeps_its_contrast_to_the_noise():
    image = np.zeros((64, 64), np.float32)
    image[:, 32:] = 0.8
    bright = CropParameters(centre=(32, 32), noise_std=0.05)
    dim = dataclasses.replace(bright, dim=0.1, background=0.2)
    seen, dimmed = apply_intensity(image, bright), apply_intensity(image, dim)
    assert dimmed[:, 32:].mean() == pytest.approx(0.28, abs=0.005)
    assert dimmed[:, 32:].std() == pytest.approx(0.1 * seen[:, 32:].std(), rel=0.05)


def test_pasted_cells_come_whole_and_hide_none():
    image, labels = np.zeros((20, 20), np.float32), np.zeros((30, 30), np.int32)
    image[2:8, 2:8], labels[7:13, 7:13] = 0.5, 4
    other, other_labels = np.full((20, 20), 0.1, np.float32), np.zeros((30, 30), np.int32)
    other[10:16, 10:16], other_labels[15:21, 15:21] = 0.9, 1
    other[2:8, 4:10], other_labels[7:13, 9:15] = 0.8, 2  # on top of the first cell
    pasted, joined = paste_cells(image, labels, other, other_labels)
    assert set(np.unique(joined)) == {0, 4, 5}
    np.testing.assert_array_equal(joined == 4, labels == 4)
    np.testing.assert_array_equal(joined == 5, other_labels == 1)
    np.testing.assert_array_equal(pasted[2:8, 2:8], image[2:8, 2:8])
    np.testing.assert_array_equal(pasted[10:16, 10:16], other[10:16, 10:16])
    assert pasted[9, 9] == np.float32(0.1)  # 2 px of what lay around it
    assert pasted[19, 0] == 0
    for dark in (1 - other, np.full_like(other, 0.5)):  # stained tissue, phase contrast
        for result, given in zip(
            paste_cells(image, labels, dark, other_labels), (image, labels), strict=True
        ):
            np.testing.assert_array_equal(result, given)


def test_gaps_are_where_two_cells_are_near():
    labels = np.zeros((12, 20), np.int32)
    labels[2:10, 1:8], labels[2:10, 8:14], labels[2:10, 18:] = 1, 9, 3
    gaps = gap_mask(labels)
    assert gaps[5].nonzero()[0].tolist() == [6, 7, 8, 9]  # 13 and 18 are too far from each other
    assert not gap_mask((labels == 1).astype(np.int32)).any()


def test_crops_stay_inside_where_they_fit():
    rng = np.random.default_rng(3)
    for _ in range(200):
        parameters = draw_crop(rng, OFF, 40, 50, 16)
        assert 8 <= parameters.centre[0] <= 32
        assert 8 <= parameters.centre[1] <= 42
    assert draw_crop(rng, OFF, 10, 12, 16).centre == (5.0, 6.0)


def test_ranges_and_repeatability():
    rng = np.random.default_rng(4)
    for _ in range(50):
        parameters = draw_crop(rng, AugmentConfig(), 40, 50, 16)
        assert 0.7 <= parameters.scale <= 1.4
        assert abs(parameters.brightness) <= 0.1
        out = apply_intensity(picture(), parameters)
        assert out.dtype == np.float32
        assert out.min() >= 0
        assert out.max() <= 1
        np.testing.assert_array_equal(out, apply_intensity(picture(), parameters))


def test_empty_crop_looks_like_a_normalised_empty_field():
    parameters = CropParameters(centre=(0.0, 0.0), empty=True, noise_seed=5)
    crop = empty_crop(parameters, 64)
    assert crop.shape == (64, 64)
    assert crop.min() >= 0
    assert crop.std() > 0
    assert crop.mean() < 0.5
    np.testing.assert_array_equal(crop, empty_crop(parameters, 64))
