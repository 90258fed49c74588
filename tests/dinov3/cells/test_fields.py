"""Ranges, constancy and foreground of planes against the plain formulas."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dinov3.cells import fields
from dinov3.cells.fields import FieldError, is_constant, make_field, robust_range


@given(
    st.sampled_from([np.uint8, np.uint16]).flatmap(
        lambda kind: arrays.arrays(kind, st.tuples(st.integers(1, 30), st.integers(1, 30)))
    ),
    st.sampled_from([(0.1, 99.9), (0.0, 100.0), (25.0, 50.0), (33.3, 66.6)]),
)
def test_ranges_are_numpys_percentiles(plane, percentiles):
    expected = np.percentile(plane[::4, ::4], percentiles)
    np.testing.assert_allclose(robust_range(plane, percentiles), expected, rtol=1e-12, atol=1e-9)


def test_ranges_of_other_types():
    plane = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    expected = np.percentile(plane[::4, ::4], (1, 99))
    assert robust_range(plane, (1, 99)) == pytest.approx(tuple(expected))


def test_one_other_pixel_is_contrast_and_none_is_not():
    plane = np.full((40, 40), 7, np.uint16)
    assert is_constant(plane)
    with pytest.raises(FieldError, match="must have contrast, got 7 everywhere"):
        make_field("x", {"DNA": plane})
    plane[13, 21] = 8  # not one of the few that are looked at first
    assert not is_constant(plane)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(64, 80), (61, 77)])
def test_foreground_is_where_the_mean_is_bright(kind, shape):
    """Otsu's threshold on the coarse mean of scaled and clipped channels."""
    rng = np.random.default_rng(3)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    discs = np.hypot(rows - 30, columns - 25) < 17
    planes = {
        name: (scale * (1 + 3 * discs) + rng.normal(0, scale / 20, shape)).astype(kind)
        for name, scale in (("DNA", 30), ("ER", 50))
    }
    made = make_field("x", planes)
    mean = np.mean([made.window(index, 0, 0, *shape) for index in range(2)], axis=0)
    padded = np.pad(mean, [(0, -n % 8) for n in shape], mode="edge")
    coarse = padded.reshape(-(-shape[0] // 8), 8, -1, 8).mean(axis=(1, 3))
    inside = np.pad(discs, [(0, -n % 8) for n in shape], mode="edge")
    share = inside.reshape(coarse.shape[0], 8, -1, 8).mean(axis=(1, 3))
    assert made.foreground[share == 1].all()
    assert not made.foreground[share == 0].any()
    bright = coarse > (coarse[share == 1].min() + coarse[share == 0].max()) / 2
    assert (made.foreground != bright).mean() < 0.1


def test_each_channel_is_scaled_by_its_own_range():
    """By hand: 20 of 0 ... 100 is 0.2; 2500 of 1000 ... 3000 is 0.75."""
    planes = {"DNA": np.full((16, 16), 20, np.uint16), "ER": np.full((16, 16), 2500, np.uint16)}
    for plane in planes.values():
        plane[15, 15] += 1  # contrast
    low, high = np.array([[0, 1000], [100, 3000]], np.float32)
    made = replace(make_field("x", planes), low=low, high=high)
    for channel, value in enumerate((0.2, 0.75)):
        np.testing.assert_allclose(made.window(channel, 0, 0, 8, 8), value, rtol=1e-6)
        assert fields._coarse_mean(made, channel)[0, 0] == pytest.approx(value)
    np.testing.assert_allclose(made.window(None, 0, 0, 8, 8), (0.2 + 0.75) / 2, rtol=1e-6)
