"""Windows over an image: every pixel covered, no seam, the same result for every batch and tile."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinocell.segmentation.tiles import WindowPlan, edge_ramp, plan_windows, predict_windows


def identity(windows: np.ndarray) -> np.ndarray:
    return windows[:, 0]


def random_image(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, height, width), dtype=np.float32)


def blend(image: np.ndarray, predict=identity, **options) -> np.ndarray:
    return predict_windows(image, predict, **{"window_px": 192, "overlap_px": 64, **options})


# ---------------------------------------------------------------------------------------- the grid


def test_grid_drawn_by_hand():
    assert plan_windows(10, 25, window_px=10, overlap_px=2) == WindowPlan(
        10, 25, 10, 2, row_starts=(0,), col_starts=(0, 7, 15)
    )
    assert plan_windows(1, 6, window_px=4, overlap_px=0) == WindowPlan(
        1, 6, 4, 0, row_starts=(-2,), col_starts=(0, 2)
    )


@given(
    size=st.integers(1, 600),
    window_px=st.integers(1, 80),
    share=st.floats(0, 0.5, exclude_max=True),
)
def test_grid_covers_everything_with_the_least_overlap_and_no_more_windows(size, window_px, share):
    overlap_px = int(window_px * share)
    plan = plan_windows(size, 1, window_px=window_px, overlap_px=overlap_px)
    starts = np.array(plan.row_starts)
    if size <= window_px:
        assert len(starts) == 1
        assert starts[0] <= 0
        assert starts[0] + window_px >= size
        assert abs(-starts[0] - (starts[0] + window_px - size)) <= 1  # centred
        return
    assert starts[0] == 0
    assert starts[-1] == size - window_px
    assert (np.diff(starts) <= window_px - overlap_px).all()
    assert (np.diff(starts) >= 1).all()
    assert np.ptp(np.diff(starts)) <= 1  # evenly spread
    fewer = len(starts) - 1
    assert fewer * window_px - (fewer - 1) * overlap_px < size


@pytest.mark.parametrize(
    "arguments",
    [
        {"height": 0, "width": 5, "window_px": 8, "overlap_px": 2},
        {"height": 5, "width": 0, "window_px": 8, "overlap_px": 2},
        {"height": 5, "width": 5, "window_px": 0, "overlap_px": 0},
        {"height": 5, "width": 5, "window_px": 8, "overlap_px": 5},
        {"height": 5, "width": 5, "window_px": 8, "overlap_px": -1},
    ],
)
def test_impossible_grids(arguments):
    with pytest.raises(ValueError, match="must"):
        plan_windows(**arguments)


# ------------------------------------------------------------------------------------- the weights


def test_weights_computed_by_hand():
    low, high = np.sin(np.pi / 8) ** 2, np.sin(3 * np.pi / 8) ** 2  # half-integers of a slope of 2
    np.testing.assert_allclose(edge_ramp(5, 2), [low, high, 1, high, low], rtol=1e-12)
    np.testing.assert_array_equal(edge_ramp(3, 0), np.ones(3))


@pytest.mark.parametrize(
    ("window_px", "overlap_px"), [(8, 4), (9, 4), (192, 64), (256, 128), (1, 0)]
)
def test_weights_are_positive_symmetric_and_add_up_to_one(window_px, overlap_px):
    ramp = edge_ramp(window_px, overlap_px)
    assert (ramp > 0).all()
    assert ramp.max() <= 1
    np.testing.assert_array_equal(ramp, ramp[::-1])
    total = ramp[window_px - overlap_px :] + ramp[:overlap_px]
    np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_overlap_changes_the_weights():
    assert not np.allclose(edge_ramp(16, 2), edge_ramp(16, 8))
    with pytest.raises(ValueError, match="0 … 8"):
        edge_ramp(16, 9)


# --------------------------------------------------------------------------- the law: nothing moves


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (1, 7),
        (7, 1),
        (2, 2),
        (191, 192),
        (192, 192),
        (192, 193),
        (193, 700),
        (520, 704),
        (3, 2000),
    ],
)
def test_identity_model_returns_the_image_at_every_pixel(shape):
    image = random_image(*shape)
    got = blend(image)
    assert got.shape == shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, image[0], rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    window_px=st.integers(1, 40),
    share=st.floats(0, 0.5),
    batch_size=st.integers(1, 9),
)
def test_identity_for_any_size_window_overlap_batch_and_tile(
    height, width, window_px, share, batch_size
):
    image = random_image(height, width, seed=height * 91 + width)
    got = predict_windows(
        image,
        identity,
        window_px=window_px,
        overlap_px=int(window_px * share),
        batch_size=batch_size,
    )
    np.testing.assert_allclose(got, image[0], rtol=0, atol=1e-6)


def test_padding_is_reflection():
    seen = []

    def look(windows):
        seen.append(windows.copy())
        return windows[:, 0]

    predict_windows(
        np.array([[[1.0, 2.0, 3.0]]], dtype=np.float32), look, window_px=9, overlap_px=0
    )
    np.testing.assert_array_equal(
        seen[0][0, 0], np.tile(np.array([2, 3, 2, 1, 2, 3, 2, 1, 2], dtype=np.float32), (9, 1))[:9]
    )
    image = random_image(5, 7)
    predict_windows(image, look, window_px=12, overlap_px=0)
    expected = np.pad(image[0], ((4, 3), (3, 2)), mode="reflect")
    np.testing.assert_array_equal(seen[1][0, 0], expected)


def mean_of_3x3(windows: np.ndarray) -> np.ndarray:
    return np.stack([ndimage.uniform_filter(window[0], 3, mode="mirror") for window in windows])


def test_a_local_model_is_exact_except_where_a_window_ends():
    image = random_image(150, 230)
    whole = ndimage.uniform_filter(image[0], 3, mode="mirror")
    plan = plan_windows(150, 230, window_px=64, overlap_px=24)
    got = blend(image, mean_of_3x3, window_px=64, overlap_px=24)
    ends = [np.zeros(150, dtype=bool), np.zeros(230, dtype=bool)]
    for end, starts in zip(ends, (plan.row_starts, plan.col_starts), strict=True):
        for start in starts:
            end[[start, start + 63]] = True
    touched = ends[0][:, None] | ends[1][None, :]
    assert 0.7 < (~touched).mean() < 1
    np.testing.assert_allclose(got[~touched], whole[~touched], rtol=0, atol=2e-6)
    # there, a window's own edge counts as little as the slope's first step, sin²(π/4/24)
    assert np.abs(got - whole)[touched].max() < 2.2 * np.sin(np.pi / 4 / 24) ** 2


def test_windows_that_disagree_meet_without_a_step():
    """Each window answers with a constant of its own: the worst network there is."""
    answers = iter(np.random.default_rng(0).random(1000))

    def constant(windows):
        return np.stack([np.full(window.shape[1:], next(answers)) for window in windows])

    steps = {}
    for overlap_px in (0, 8, 32):
        got = blend(random_image(200, 200), constant, window_px=64, overlap_px=overlap_px)
        steps[overlap_px] = max(np.abs(np.diff(got, axis=axis)).max() for axis in (0, 1))
    assert steps[32] < 0.12 < 0.3 < steps[0]
    assert steps[32] < steps[8] < steps[0]


# --------------------------------------------------------------------- what must not change a thing


def uneven_model(windows: np.ndarray) -> np.ndarray:
    """Depends on every pixel of its window and on the place in it, on each window alone."""
    ramp = np.linspace(0, 1, windows.shape[-1], dtype=np.float32)
    return windows[:, 0] * ramp + windows.mean(axis=(1, 2, 3))[:, None, None]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_result_is_independent_of_the_batch(batch_size):
    image = random_image(210, 330, channels=3)
    options = {"window_px": 64, "overlap_px": 20}
    reference = blend(image, uneven_model, **options)
    got = blend(image, uneven_model, batch_size=batch_size, **options)
    np.testing.assert_allclose(got, reference, rtol=0, atol=1e-6)


def test_batches_are_as_large_as_allowed():
    sizes = []

    def count(windows):
        sizes.append(len(windows))
        assert windows.dtype == np.float32
        assert windows.shape[1:] == (2, 32, 32)
        return windows[:, 1]

    image = random_image(100, 100, channels=2)  # 4 × 4 windows
    got = blend(image, count, window_px=32, overlap_px=8, batch_size=6)
    np.testing.assert_allclose(got, image[1], atol=1e-6)
    assert sizes == [6, 6, 4]


def test_overlap_and_window_change_the_result_of_a_model_that_knows_its_window():
    image = random_image(100, 100)
    results = [
        blend(image, uneven_model, window_px=window_px, overlap_px=overlap_px)
        for window_px, overlap_px in ((32, 8), (32, 16), (48, 8))
    ]
    assert not np.allclose(results[0], results[1], atol=1e-3)
    assert not np.allclose(results[0], results[2], atol=1e-3)


def test_predict_may_change_its_input_and_return_other_float_types():
    image = random_image(50, 60)
    before = image.copy()

    def spoil(windows):
        answer = windows[:, 0].astype(np.float64)
        windows[:] = np.nan
        return answer

    np.testing.assert_allclose(
        blend(image, spoil, window_px=16, overlap_px=4), image[0], rtol=0, atol=1e-6
    )
    np.testing.assert_array_equal(image, before)


def test_image_of_another_type_arrives_as_float32():
    image = np.arange(200, dtype=np.uint8).reshape(1, 10, 20)
    got = blend(image, window_px=8, overlap_px=2)
    np.testing.assert_allclose(got, image[0], rtol=1e-6)


# ---------------------------------------------------------------------------------------- progress


def test_progress_rises_to_the_total():
    calls = []
    blend(
        random_image(100, 100),
        window_px=32,
        overlap_px=8,
        batch_size=3,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert {total for _, total in calls} == {16}
    counts = [done for done, _ in calls]
    assert counts == sorted(set(counts))
    assert counts[-1] == 16


# ----------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("image", "options", "sentence"),
    [
        (np.zeros((5, 5)), {}, r"\(C, H, W\)"),
        (np.zeros((0, 5, 5)), {}, r"\(C, H, W\)"),
        (np.zeros((1, 0, 5)), {}, "at least one pixel"),
        (np.zeros((1, 5, 5)), {"batch_size": 0}, "batch_size"),
        (np.zeros((1, 5, 5)), {"overlap_px": 97}, "overlap_px"),
    ],
)
def test_wrong_arguments(image, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        blend(image, **options)


def test_predict_must_return_one_map_per_window():
    for wrong in (lambda w: w, lambda w: w[:1, 0], lambda w: w[:, 0, ::2, ::2]):
        with pytest.raises(ValueError, match=r"must return shape \(8, 16, 16\)"):
            blend(random_image(64, 64), wrong, window_px=16, overlap_px=4)


# --------------------------------------------------------------------------------------------- memory


def test_memory_is_one_batch_beside_the_result():
    height = width = 1024
    image = random_image(height, width)

    def cheap(windows):
        return windows[:, 0]

    def peak(**options) -> int:
        tracemalloc.start()
        try:
            blend(image, cheap, window_px=64, overlap_px=32, **options)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    result = height * width * 4
    one_window = 64 * 64 * 4
    all_windows = 31 * 31 * one_window
    assert peak(batch_size=4) < result + 20 * one_window < all_windows / 2
