"""Pixels that are not signal: what is left out, what is kept, and what the user reads about it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dinocell.segmentation.intensity import check_values, estimate_noise, find_range


def field(dtype: type = np.uint16, seed: int = 0) -> np.ndarray:
    """Twenty-five blurred discs on a noisy background, (256, 256), 100 to about 1,100 (8 bit: a tenth)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:256, :256]
    cells = np.zeros((256, 256))
    for row in range(28, 256, 50):
        for column in range(28, 256, 50):
            brightness = rng.uniform(600, 1000)
            cells[np.hypot(rows - row, columns - column) < rng.uniform(8, 14)] = brightness
    image = 100 + ndimage.gaussian_filter(cells, 1.5) + rng.normal(0, 8, cells.shape)
    return (image / (10 if dtype == np.uint8 else 1)).clip(0).astype(dtype)


def scale_bar(image, rng, value):
    image[240:243, 12:92] = value


def hot_pixels(image, rng, value):
    image[rng.random(image.shape) < 0.02] = value


def varied_hot_pixels(image, rng, value):
    spots = rng.random(image.shape) < 0.01
    image[spots] = rng.uniform(0.6, 1, spots.sum()) * value


def dust(image, rng, value):
    image[60:78, 120:138] = value


def columns(image, rng, value):
    image[:, 77:80] = value


def border(image, rng, value):
    image[:, :42] = value


def fibre(image, rng, value):
    place = np.arange(256)
    image[(place * 0.6 + 30).astype(int), place] = value


def text(image, rng, value):
    image[200:212:2, 20:60] = value
    image[200:212, 20:60:7] = value


def row(image, rng, value):
    image[90] = value


HIGH = [scale_bar, hot_pixels, varied_hot_pixels, dust, columns, border, fibre, text, row]


@pytest.mark.parametrize("make", HIGH)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_what_is_brighter_than_any_signal_changes_nothing_else(make, dtype):
    image = field(dtype)
    changed = image.copy()
    make(changed, np.random.default_rng(1), 255 if dtype == np.uint8 else 65_535)
    touched = ndimage.binary_dilation(changed != image, iterations=2)
    scattered = "hot" in make.__name__
    clean, seen = (find_range(x).apply(x) for x in (image, changed))
    outside = np.abs(clean - seen)[~touched] if not scattered else np.abs(clean - seen)
    assert np.percentile(outside, 99) < 0.12
    # Nothing is left of it: what replaced it is no brighter than a cell nor than its surroundings.
    assert seen[changed != image].mean() <= clean[changed != image].mean() + 0.15
    notes = find_range(changed).notes
    assert len(notes) == 1
    words = "hot pixels were replaced" if make is varied_hot_pixels else "hold no signal"
    assert words in notes[0]


@pytest.mark.parametrize("value", [-9999.0, float(np.finfo(np.float32).min), 0.0])
@pytest.mark.parametrize("place", [np.s_[:20], np.s_[:, :42], np.s_[40:42]])
def test_no_data_below_the_background_changes_nothing_else(value, place):
    image = field(np.float32)
    changed = image.copy()
    changed[place] = value
    untouched = np.ones(image.shape, bool)
    untouched[place] = False
    clean, seen = (find_range(x).apply(x) for x in (image, changed))
    assert np.abs(clean - seen)[untouched].max() < 0.03
    assert seen[place].mean() < 0.4
    assert "hold no signal" in find_range(changed).notes[0]
    assert f"{(~untouched).sum():,} pixels" in find_range(changed).notes[0]


def test_both_ends_at_once():
    image = field(np.float32)
    changed = image.copy()
    changed[:20] = -9999
    changed[200:203, 30:120] = 65_535
    clean, seen = (find_range(x).apply(x) for x in (image, changed))
    assert np.abs(clean - seen)[30:190].max() < 0.03
    assert len(find_range(changed).notes) == 2


def test_a_dead_cell_stays_but_does_not_set_the_contrast():
    """Its edges are blurred as those of all signal, so that no gap parts it from the rest."""
    image = field(np.float64)
    disc = np.hypot(*np.mgrid[-60:196, -60:196]) < 18
    changed = image + 30_000 * ndimage.gaussian_filter(disc.astype(float), 2)
    clean, seen = (find_range(x).apply(x.astype(np.uint16)) for x in (image, changed))
    cells = (clean > 0.6) & ~ndimage.binary_dilation(disc, iterations=12)
    assert seen[cells].mean() > 0.4
    assert seen[60, 60] == 1
    assert "much brighter than the rest" in find_range(changed).notes[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_clean_field_keeps_its_percentiles_and_gets_no_note(dtype):
    image = field(dtype)
    found = find_range(image)
    assert (found.low, found.high) == pytest.approx(np.percentile(image, [1, 99.8]), abs=1e-3)
    assert found.notes == ()


def test_one_cell_alone_is_signal():
    rng = np.random.default_rng(4)
    disc = ndimage.gaussian_filter(1000.0 * (np.hypot(*np.mgrid[-100:412, -100:412]) < 10), 1)
    image = (100 + disc + rng.normal(0, 5, disc.shape)).astype(np.uint16)
    assert find_range(image).apply(image)[disc > 900].min() > 0.9


def test_a_background_that_was_set_to_0_stays_dark():
    image = field(np.float32)
    image[image < 300] = 0
    out = find_range(image).apply(image)
    assert out[image == 0].max() == 0
    assert out[image > 600].min() > 0.3


def test_an_empty_field_with_a_scale_bar_stays_empty():
    rng = np.random.default_rng(3)
    image = rng.normal(150, 5, (256, 256)).astype(np.uint16)
    image[240:243, 12:92] = 65_535
    assert find_range(image).apply(image).max() < 0.5


def test_noise_of_known_strength():
    rng = np.random.default_rng(2)
    image = rng.normal(100, 5, (256, 256)) + np.linspace(0, 400, 256)[:, None]
    assert estimate_noise(image) == pytest.approx(5, rel=0.03)
    assert estimate_noise(np.zeros((8, 8), np.uint8)) == pytest.approx(12**-0.5)


def test_noise_counts_where_it_is_asked_for():
    rng = np.random.default_rng(2)
    image = rng.normal(100, 5, (256, 256))
    image[:200] = 100
    below = np.zeros(image.shape, bool)
    below[205:] = True
    assert estimate_noise(image) < 1e-6
    assert estimate_noise(image, below) == pytest.approx(5, rel=0.05)


def test_the_largest_value_of_float32_is_taken():
    """As saturated or missing pixels have it."""
    image = np.array([[0, 1], [2, np.finfo(np.float32).max]], np.float32)
    check_values(image, "", ValueError)
    check_values(-image, "", ValueError)
