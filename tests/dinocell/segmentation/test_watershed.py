"""Markers and flood: drawn scenes, profiles by hand, brute-force merge trees, scikit-image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from skimage.segmentation import watershed as skimage_watershed

import dinocell
from dinocell.evaluation import ctc_counts, match_counts, overlap_table
from dinocell.io import read_labels
from dinocell.segmentation.distance_map import TARGETS, labels_to_distance_map
from dinocell.segmentation.levels import NUM_LEVELS, quantize
from dinocell.segmentation.markers import find_markers
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import distance_map_to_labels, flood, separate_cells

PERFECT: dict[str, Any] = {"peak_threshold": 0.9, "fill_threshold": 0.005, "min_prominence": 0.3}
"""For maps made from labels."""

SMALL_MAPS = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 10)
).map(lambda steps: (steps / 10).astype(np.float32))
THRESHOLDS = st.fixed_dictionaries(
    {
        "peak_threshold": st.sampled_from([0.33, 0.61, 0.87]),
        "fill_threshold": st.sampled_from([0.0, 0.05, 0.25]),
        "min_prominence": st.sampled_from([0.0, 0.15, 0.35, 0.55, 1.0]),
    }
)


def same_cells(labels: np.ndarray, truth: np.ndarray) -> bool:
    """Equal but for the numbering."""
    pairs = np.unique(np.stack([labels.ravel(), truth.ravel()]), axis=1)
    return all(np.unique(side).size == pairs.shape[1] for side in pairs) and np.array_equal(
        labels == 0, truth == 0
    )


def round_trip(truth: np.ndarray, target: str = "sqrt", **options: Any) -> np.ndarray:
    depth = labels_to_distance_map(truth, target=target)
    return distance_map_to_labels(depth, **{**PERFECT, **options})


def discs(shape: tuple[int, int], *circles: tuple[float, float, float]) -> np.ndarray:
    """Labels of circles (row, column, radius); a pixel belongs to the nearest of those it lies in."""
    rows, columns = np.indices(shape)
    depth = np.stack([radius - np.hypot(rows - r, columns - c) for r, c, radius in circles])
    return np.where(depth.max(0) > 0, 1 + depth.argmax(0), 0)


def smooth_map(seed: int, shape: tuple[int, int], sigma_px: float) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), sigma_px)
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def map_without_ties(seed: int) -> np.ndarray:
    """64 x 64 pixels of 4,096 different levels."""
    rough = smooth_map(seed, (64, 64), (0.5, 1.0, 2.0, 4.0)[seed % 4])
    ranks = rough.ravel().argsort().argsort().reshape(64, 64)
    return (ranks / (NUM_LEVELS - 1)).astype(np.float32)


def network_like_map(seed: int, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Crowded discs and their map, blurred and with correlated noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(*[np.arange(12, size_px, 24)] * 2, indexing="ij")
    spots = np.stack([rows, columns], -1).reshape(-1, 2) + rng.normal(0, 3, (rows.size, 2))
    truth = np.zeros((size_px, size_px), int)
    for number, (row, column) in enumerate(spots, start=1):
        box = tuple(slice(max(int(x) - 16, 0), int(x) + 17) for x in (row, column))
        where = np.hypot(
            *np.meshgrid(
                *[np.arange(size_px)[side] - x for side, x in zip(box, (row, column), strict=True)],
                indexing="ij",
            )
        )
        truth[box][where < rng.uniform(6, 13)] = number
    noise = ndimage.gaussian_filter(rng.normal(size=truth.shape), 2)
    blurred = ndimage.gaussian_filter(labels_to_distance_map(truth), 1)
    return np.clip(blurred + 0.03 * noise / noise.std(), 0, 1).astype(np.float32), truth


def profile(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


# ---- pictures drawn by hand ---------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_two_touching_discs(target: str) -> None:
    truth = discs((31, 54), (15, 16, 12), (15, 37, 11))
    assert (truth[:, :-1] * truth[:, 1:] == 2).any()  # they touch
    assert same_cells(round_trip(truth, target), truth)


@pytest.mark.parametrize("target", TARGETS)
def test_a_ring_is_one_cell(target: str) -> None:
    truth = discs((31, 31), (15, 15, 13)) - discs((31, 31), (15, 15, 6))
    assert same_cells(round_trip(truth, target), truth)


@pytest.mark.parametrize("target", TARGETS)
def test_a_crescent_is_one_cell_and_keeps_its_neighbour(target: str) -> None:
    """The centroid of the crescent lies in the disc it embraces, which is a cell of its own."""
    rows, columns = np.indices((61, 61))
    radius = np.hypot(rows - 30, columns - 30)
    truth = ((radius < 26) & (radius > 15) & (columns < 42)).astype(int)
    centroid = np.argwhere(truth).mean(0).round().astype(int)
    truth[(np.hypot(rows - 30, columns - 24) < 9) & (truth == 0)] = 2
    assert truth[tuple(centroid)] == 2
    assert (truth[:, :-1] * truth[:, 1:] == 2).any()  # they touch
    labels = round_trip(truth, target)
    assert labels.max() == 2
    assert np.array_equal(labels > 0, truth > 0)
    assert match_counts(overlap_table(truth, labels), 0.95).tp == 2


@pytest.mark.parametrize("target", TARGETS)
def test_a_cell_with_two_lobes_is_one_cell_by_default(target: str) -> None:
    truth = np.minimum(discs((40, 70), (20, 20, 14), (20, 44, 14)), 1)
    truth[17:24, 20:44] = 1
    depth = labels_to_distance_map(truth, target=target)
    cells = {
        prominence: distance_map_to_labels(depth, **{**PERFECT, "min_prominence": prominence}).max()
        for prominence in (0.02, 0.6)
    }
    assert cells == {0.02: 2, 0.6: 1}


@pytest.mark.parametrize("target", TARGETS)
def test_one_outline_is_one_cell_or_two_as_the_labels_say(target: str) -> None:
    """A waist of 0.7 of the width: too high a saddle for two cells; a border there is a deep valley."""
    two = discs((40, 70), (20, 25, 14), (20, 45, 14))
    one = np.minimum(two, 1)
    assert same_cells(round_trip(one, target), one)
    assert same_cells(round_trip(two, target), two)


@pytest.mark.parametrize("target", TARGETS)
def test_cells_cut_by_the_border(target: str) -> None:
    """Less than half of each is in the picture, so the deepest pixel lies on its edge."""
    truth = discs((40, 50), (-4, 12, 14), (20, 55, 16), (44, 8, 18))
    assert np.unique(truth).size == 4
    labels = round_trip(truth, target)
    assert same_cells(labels, truth)
    rows, columns = np.nonzero(
        find_markers(labels_to_distance_map(truth, target=target), Thresholds(**PERFECT))
    )
    assert ((rows == 0) | (rows == 39) | (columns == 49) | (columns == 0)).all()


@pytest.mark.parametrize("target", TARGETS)
def test_cells_in_a_single_row(target: str) -> None:
    truth = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 3, 0, 4, 4, 4]])
    assert np.array_equal(round_trip(truth, target), truth)
    assert np.array_equal(round_trip(truth.T, target), truth.T)


@pytest.mark.parametrize("target", TARGETS)
def test_a_lower_lobe_is_part_of_the_cell(target: str) -> None:
    """However thin the neck: a cell of its own would peak at 1."""
    truth = np.minimum(discs((40, 70), (20, 20, 14), (20, 50, 9)), 1)
    truth[20, 20:50] = 1
    assert round_trip(truth, target, min_prominence=0.05, peak_threshold=0.95).max() == 1
    assert round_trip(truth, target, min_prominence=0.05, peak_threshold=0.5).max() == 2


@pytest.mark.parametrize("target", TARGETS)
def test_tiny_touching_cells_stay_apart(target: str) -> None:
    """3 x 3 pixels in a grid: the valley is half as high as the peak, or 0.71 of it."""
    truth = np.zeros((17, 17), int)
    truth[1:16, 1:16] = np.arange(25).reshape(5, 5).repeat(3, 0).repeat(3, 1) + 1
    labels = round_trip(truth, target, min_prominence=0.25)
    assert same_cells(labels, truth)


def test_one_pixel_is_a_cell() -> None:
    lonely = np.zeros((5, 6), np.float32)
    lonely[3, 2] = 0.8
    labels = distance_map_to_labels(lonely, peak_threshold=0.6, fill_threshold=0.2)
    assert labels.dtype == np.uint32
    assert np.array_equal(labels, lonely > 0)
    assert np.array_equal(
        distance_map_to_labels([[0.8]], **PERFECT | {"peak_threshold": 0.6}), [[1]]
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (6, 5)])
def test_constant_maps(shape: tuple[int, int]) -> None:
    assert np.array_equal(distance_map_to_labels(np.ones(shape), **PERFECT), np.ones(shape))
    assert not distance_map_to_labels(np.zeros(shape), **PERFECT).any()
    assert not find_markers(np.zeros(shape), Thresholds(**PERFECT)).any()
    # The one peak of a plateau is its first pixel in reading order.
    assert np.flatnonzero(find_markers(np.ones(shape), Thresholds(**PERFECT))).tolist() == [0]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
def test_maps_without_pixels(shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, np.float32)
    assert distance_map_to_labels(nothing, **PERFECT).shape == shape
    assert distance_map_to_labels(nothing, **PERFECT).dtype == np.uint32
    assert find_markers(nothing, Thresholds(**PERFECT)).shape == shape
    assert flood(nothing, nothing.astype(int), nothing > 0).shape == shape


# ---- profiles by hand: peaks and saddles of known height ------------------------------------


@pytest.mark.parametrize(
    ("prominence", "expected"),
    [
        (0.0, [1, 2, 2, 2, 2, 3, 3, 4, 4, 4]),
        (0.04, [1, 2, 2, 2, 2, 3, 3, 4, 4, 4]),
        (0.10, [1, 1, 1, 1, 1, 2, 2, 3, 3, 3]),  # 0.75 rises 0.05 above the saddle to 0.9
        (0.25, [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]),  # 0.8 rises 0.2 above the saddle to 0.9
        (0.55, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),  # 0.9 rises 0.5 above the saddle to 1.0
    ],
)
def test_prominence_on_a_profile(prominence: float, expected: list[int]) -> None:
    heights = profile(0.75, 0.7, 0.9, 0.85, 0.6, 0.8, 0.65, 0.4, 1.0, 0.95)
    labels = distance_map_to_labels(
        heights, peak_threshold=0.5, fill_threshold=0.1, min_prominence=prominence
    )
    assert labels[0].tolist() == expected


def test_a_peak_not_above_its_threshold_is_part_of_the_higher_one() -> None:
    heights = profile(0.9, 0.2, 0.7, 0.3)
    low = distance_map_to_labels(heights, peak_threshold=0.6, fill_threshold=0.1)
    high = distance_map_to_labels(heights, peak_threshold=0.8, fill_threshold=0.1)
    assert low[0].tolist() == [1, 1, 2, 2]
    assert high[0].tolist() == [1, 1, 1, 1]


def test_a_peak_must_be_above_its_threshold_by_one_level() -> None:
    level = round(0.6 * (NUM_LEVELS - 1))
    for step, expected in ((0, 0), (1, 1)):
        heights = profile(0.3, (level + step) / (NUM_LEVELS - 1), 0.3)
        labels = distance_map_to_labels(heights, peak_threshold=0.6, fill_threshold=0.1)
        assert labels.max() == expected


def test_a_rise_of_just_the_prominence_is_enough() -> None:
    heights = profile(0.9, 0.6, 0.8)
    rise = 0.2 * (NUM_LEVELS - 1)
    assert rise == np.ptp(quantize(heights[0, 1:]))
    for prominence, expected in ((0.2, 2), (0.2 + 1 / NUM_LEVELS, 1)):
        labels = distance_map_to_labels(
            heights, peak_threshold=0.5, fill_threshold=0.1, min_prominence=prominence
        )
        assert labels.max() == expected


def test_a_plateau_with_two_arms_is_one_cell_at_prominence_0() -> None:
    """Each arm has a first pixel in reading order, but neither rises above the way to the other."""
    heights = np.array([[0.9, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.9]], np.float32)
    labels = distance_map_to_labels(
        heights, peak_threshold=0.5, fill_threshold=0.2, min_prominence=0
    )
    assert np.array_equal(labels, heights > 0.5)


def test_a_piece_without_peak_is_background() -> None:
    heights = profile(0.9, 0.5, 0.1, 0.5, 0.55, 0.1, 0.7)
    labels = distance_map_to_labels(heights, peak_threshold=0.6, fill_threshold=0.2)
    assert labels[0].tolist() == [1, 1, 0, 0, 0, 0, 2]


def test_a_pixel_at_the_fill_threshold_is_outside() -> None:
    heights = profile(0.25, 0.9, 0.5, 0.3)
    options: dict[str, Any] = {"peak_threshold": 0.6}
    assert distance_map_to_labels(heights, fill_threshold=0.25, **options)[0].tolist() == [
        0,
        1,
        1,
        1,
    ]
    assert distance_map_to_labels(heights, fill_threshold=0.2, **options)[0].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert distance_map_to_labels(heights, fill_threshold=0.5, **options)[0].tolist() == [
        0,
        1,
        0,
        0,
    ]


def test_small_cells_are_dropped_and_the_rest_renumbered() -> None:
    heights = profile(0.9, 0, 0.9, 0.8, 0.7, 0, 0.9, 0.9, 0, 0.8)
    options: dict[str, Any] = {"peak_threshold": 0.6, "fill_threshold": 0.2}
    expected = {
        0: [1, 0, 2, 2, 2, 0, 3, 3, 0, 4],
        1: [1, 0, 2, 2, 2, 0, 3, 3, 0, 4],
        2: [0, 0, 1, 1, 1, 0, 2, 2, 0, 0],
        3: [0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
        4: [0] * 10,
    }
    for min_area_px, labels in expected.items():
        found = distance_map_to_labels(heights, min_area_px=min_area_px, **options)
        assert found[0].tolist() == labels


def test_the_pixels_of_a_dropped_cell_go_to_nobody() -> None:
    heights = profile(1.0, 0.9, 0.8, 0.3, 0.9)
    options: dict[str, Any] = {"peak_threshold": 0.6, "fill_threshold": 0.2}
    assert distance_map_to_labels(heights, **options)[0].tolist() == [1, 1, 1, 2, 2]
    without = distance_map_to_labels(heights, min_area_px=3, **options)
    assert without[0].tolist() == [1, 1, 1, 0, 0]


def test_the_default_prominence() -> None:
    options: dict[str, Any] = {"peak_threshold": 0.5, "fill_threshold": 0.1}
    for rise, expected in ((-0.02, 1), (0.02, 2)):
        heights = profile(0.9, 0.6, 0.6 + Thresholds.min_prominence + rise, 0.2)
        assert distance_map_to_labels(heights, **options).max() == expected
        assert find_markers(heights, Thresholds(**options)).max() == expected


def test_quantising_rounds_and_clips() -> None:
    top = NUM_LEVELS - 1
    values = [0.0, 0.4 / top, 0.6 / top, 0.5, 1.0, 1.7, -0.3, np.inf, -np.inf]
    assert quantize(values).tolist() == [0, 0, 1, round(0.5 * top), top, top, 0, top, 0]


def test_values_beyond_the_range_count_as_its_ends() -> None:
    heights = np.array([[1.5, 0.2, np.inf, -np.inf, 2.0, -1.0]], np.float32)
    labels = distance_map_to_labels(heights, peak_threshold=0.6, fill_threshold=0.1)
    assert labels[0, [0, 2, 3, 4, 5]].tolist() == [1, 2, 0, 3, 0]
    beyond_float32 = np.array([[1e300, 0.2, -1e300]])
    labels = distance_map_to_labels(beyond_float32, peak_threshold=0.6, fill_threshold=0.3)
    assert labels.tolist() == [[1, 0, 0]]
    assert quantize(beyond_float32)[0, ::2].tolist() == [NUM_LEVELS - 1, 0]
    with pytest.raises(ValueError, match="must not hold NaN"):
        quantize([0.5, np.nan])


# ---- laws ---------------------------------------------------------------------------------


def brute_force_peaks(
    heights: np.ndarray, *, peak_threshold: float, fill_threshold: float, min_prominence: float
) -> set[int]:
    """Flat positions of the markers: lower the water level step by step and look at the islands."""
    levels = np.where(heights > np.float32(fill_threshold), quantize(heights).astype(int), -1)
    flat = levels.ravel()
    rank = np.lexsort((np.arange(flat.size), -flat)).argsort()  # 0 for the highest pixel
    found = set()
    for pixel in np.flatnonzero(flat > peak_threshold * (NUM_LEVELS - 1)):
        saddle = -np.inf  # the water level at which this island first holds a higher pixel
        for water in np.unique(flat[flat >= 0])[::-1]:
            if water > flat[pixel]:
                continue
            islands = ndimage.label(levels >= water)[0].ravel()
            if rank[islands == islands[pixel]].min() < rank[pixel]:
                saddle = water
                break
        rise = flat[pixel] - saddle
        if rise > 0 and rise >= min_prominence * (NUM_LEVELS - 1):
            found.add(int(pixel))
    return found


@settings(max_examples=40, deadline=None)
@given(heights=SMALL_MAPS, options=THRESHOLDS)
def test_markers_equal_the_islands_of_a_sinking_water_level(
    heights: np.ndarray, options: dict[str, Any]
) -> None:
    markers = find_markers(heights, Thresholds(**options))
    assert set(np.flatnonzero(markers).tolist()) == brute_force_peaks(heights, **options)
    numbers = markers[markers > 0]
    assert numbers.tolist() == list(range(1, numbers.size + 1))


def lowest_points(heights: np.ndarray, markers: np.ndarray, fill_threshold: float) -> np.ndarray:
    """[marker, row, column]: lowest level on the best way from the marker to the pixel, -1 if none."""
    levels = np.where(heights > np.float32(fill_threshold), quantize(heights), -1)
    lowest = np.full((markers.max() + 1, *heights.shape), -1)
    for water in np.unique(levels[levels >= 0]):
        islands = ndimage.label(levels >= water)[0]
        for marker in range(1, markers.max() + 1):
            reached = np.unique(islands[markers == marker])
            lowest[marker][np.isin(islands, reached[reached > 0])] = water
    return lowest


@settings(max_examples=50, deadline=None)
@given(heights=SMALL_MAPS, options=THRESHOLDS)
def test_every_pixel_takes_a_way_to_its_marker_that_sinks_least(
    heights: np.ndarray, options: dict[str, Any]
) -> None:
    """The law of a flood: no other marker reaches a pixel by a way whose lowest point is higher."""
    markers = find_markers(heights, Thresholds(**options))
    labels = flood(heights, markers, heights > options["fill_threshold"])
    lowest = lowest_points(heights, markers, options["fill_threshold"])
    best = lowest.max(0)
    assert np.array_equal(labels > 0, best >= 0)
    assert np.array_equal(np.take_along_axis(lowest, labels[None], 0)[0], best)


@settings(max_examples=40, deadline=None)
@given(heights=SMALL_MAPS, options=THRESHOLDS)
def test_the_whole_is_its_two_halves(heights: np.ndarray, options: dict[str, Any]) -> None:
    labels = distance_map_to_labels(heights, **options)
    markers = find_markers(heights, Thresholds(**options))
    assert np.array_equal(
        labels, flood(heights, markers, heights > np.float32(options["fill_threshold"]))
    )
    assert np.array_equal(labels[markers > 0], markers[markers > 0])


@settings(max_examples=40, deadline=None)
@given(heights=SMALL_MAPS, options=THRESHOLDS)
def test_each_cell_is_in_one_piece(heights: np.ndarray, options: dict[str, Any]) -> None:
    labels = distance_map_to_labels(heights, **options)
    for cell in range(1, labels.max() + 1):
        assert ndimage.label(labels == cell)[1] == 1


@settings(max_examples=40, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=14)))
def test_cells_that_do_not_touch_survive_the_round_trip(mask: np.ndarray) -> None:
    """Whatever their shape: with a prominence of 1 every connected piece is one cell."""
    truth = ndimage.label(mask)[0]
    for target in TARGETS:
        assert np.array_equal(round_trip(truth, target, min_prominence=1.0) > 0, mask)
        assert same_cells(round_trip(truth, target, min_prominence=1.0), truth)


@pytest.mark.parametrize("seed", range(4))
def test_turning_the_map_turns_the_cells(seed: int) -> None:
    """Exactly so where no two pixels are equally high."""
    heights = map_without_ties(seed)
    options: dict[str, Any] = {"peak_threshold": 0.6, "fill_threshold": 0.2, "min_prominence": 0.1}
    labels = distance_map_to_labels(heights, **options)
    assert labels.max() > 1
    assert same_cells(distance_map_to_labels(heights.T, **options).T, labels)
    assert same_cells(distance_map_to_labels(heights[::-1], **options)[::-1], labels)
    assert same_cells(distance_map_to_labels(np.rot90(heights), **options), np.rot90(labels))


@pytest.mark.parametrize("target", TARGETS)
def test_truth_survives_the_round_trip_and_turning_it(target: str) -> None:
    """Round cells, apart or touching: the same cells come back, though not each pixel where they touch."""
    truth = network_like_map(5, 200)[1]
    for turned in (truth, truth.T, truth[::-1]):
        labels = round_trip(np.ascontiguousarray(turned), target)
        counts = match_counts(overlap_table(turned, labels), 0.9)
        assert (counts.fp, counts.fn) == (0, 0)
        assert np.array_equal(labels > 0, turned > 0)


def test_a_cell_does_not_depend_on_what_is_elsewhere() -> None:
    left, right = smooth_map(1, (40, 50), 2.0), smooth_map(2, (40, 50), 2.0)
    both = np.hstack([left, np.zeros((40, 1)), right])
    options: dict[str, Any] = {"peak_threshold": 0.5, "fill_threshold": 0.3, "min_prominence": 0.05}
    labels = distance_map_to_labels(both, **options)
    assert same_cells(labels[:, :50], distance_map_to_labels(left, **options))
    assert same_cells(labels[:, 51:], distance_map_to_labels(right, **options))


def test_more_cells_than_16_bits_can_number() -> None:
    heights = np.zeros((1, 2 * 65_600), np.float32)
    heights[:, ::2] = 1
    labels = distance_map_to_labels(heights, **PERFECT)
    assert labels[0, ::2].tolist() == list(range(1, 65_601))
    assert not labels[:, 1::2].any()


def test_any_memory_layout_and_dtype() -> None:
    heights = smooth_map(3, (30, 44), 2.0)
    options: dict[str, Any] = {"peak_threshold": 0.5, "fill_threshold": 0.3}
    labels = distance_map_to_labels(heights, **options)
    assert labels.max() > 3
    assert np.array_equal(distance_map_to_labels(np.asfortranarray(heights), **options), labels)
    assert np.array_equal(distance_map_to_labels(heights.astype(np.float64), **options), labels)
    before = heights.copy()
    heights.flags.writeable = False
    assert np.array_equal(distance_map_to_labels(heights, **options), labels)
    assert np.array_equal(heights, before)
    assert np.array_equal(distance_map_to_labels(labels > 0, **options) > 0, labels > 0)
    half = heights.astype(np.float16)
    assert np.array_equal(
        distance_map_to_labels(half, **options),
        distance_map_to_labels(half.astype(np.float32), **options),
    )


def test_flood_takes_any_memory_layout_and_leaves_its_input_alone() -> None:
    heights = smooth_map(4, (30, 44), 2.0)
    markers = find_markers(heights, Thresholds(0.5, 0.3))
    mask = heights > 0.3
    expected = flood(heights, markers, mask)
    assert expected.max() == markers.max() > 3
    before = markers.copy()
    for array in (heights, markers, mask):
        array.flags.writeable = False
    assert np.array_equal(flood(heights, markers, mask), expected)
    assert np.array_equal(markers, before)
    turned = [np.asfortranarray(array) for array in (heights, markers, mask)]
    assert np.array_equal(flood(*turned), expected)
    assert np.array_equal(flood(heights, markers.astype(">u8"), mask.astype(np.uint8)), expected)


def test_threads_do_not_disturb_each_other() -> None:
    maps = [smooth_map(seed, (90, 120), 2.0) for seed in range(8)]

    def work(heights: np.ndarray) -> np.ndarray:
        return distance_map_to_labels(heights, peak_threshold=0.5, fill_threshold=0.3)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, maps))
    for heights, labels in zip(maps, together, strict=True):
        assert np.array_equal(labels, work(heights))


# ---- scikit-image as oracle -----------------------------------------------------------------


def by_skimage(heights: np.ndarray, markers: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return skimage_watershed(-quantize(heights).astype(np.int32), markers, mask=mask)


@pytest.mark.parametrize("seed", range(4))
def test_flood_equals_scikit_image_where_no_two_pixels_tie(seed: int) -> None:
    """Different levels everywhere leave nothing to chance."""
    heights = map_without_ties(seed)
    assert np.unique(quantize(heights)).size == NUM_LEVELS == 64 * 64
    options: dict[str, Any] = {"peak_threshold": 0.6, "fill_threshold": 0.2, "min_prominence": 0.1}
    mask = heights > 0.2
    markers = find_markers(heights, Thresholds(**options))
    labels = distance_map_to_labels(heights, **options)
    assert labels.max() > 1
    assert np.array_equal(labels, by_skimage(heights, markers, mask))
    # Markers of many pixels, in several pieces and outside of the mask:
    rng = np.random.default_rng(seed)
    scattered = np.where(rng.random(heights.shape) < 0.02, rng.integers(0, 5, heights.shape), 0)
    assert np.array_equal(
        flood(heights, scattered, mask), by_skimage(heights, scattered * mask, mask)
    )


def test_flood_equals_scikit_image_on_network_like_maps() -> None:
    """Up to ties (below), which are less than one pixel in 10,000 of these maps."""
    options: dict[str, Any] = {"peak_threshold": 0.6, "fill_threshold": 0.25, "min_prominence": 0.1}
    num_unlike = num_pixels = 0
    for seed in range(8):
        heights, truth = network_like_map(seed, 144)
        mask = heights > np.float32(options["fill_threshold"])
        labels = distance_map_to_labels(heights, **options)
        assert labels.max() == pytest.approx(np.unique(truth).size - 1, abs=3)
        unlike = labels != by_skimage(heights, find_markers(heights, Thresholds(**options)), mask)
        num_unlike += np.count_nonzero(unlike)
        num_pixels += np.count_nonzero(mask)
    assert num_pixels > 66_000
    assert num_unlike < 1e-4 * num_pixels


@settings(max_examples=50, deadline=None)
@given(heights=SMALL_MAPS, options=THRESHOLDS, seed=st.integers(0, 2**32 - 1))
def test_flood_differs_from_scikit_image_only_at_ties(
    heights: np.ndarray, options: dict[str, Any], seed: int
) -> None:
    """A tie: the best ways from both markers to the pixel are equally high at their lowest point.

    Of eleven levels there are many.  Markers at peaks, and markers of several pixels anywhere.
    """
    mask = heights > np.float32(options["fill_threshold"])
    rng = np.random.default_rng(seed)
    scattered = np.where(rng.random(heights.shape) < 0.15, rng.integers(1, 5, heights.shape), 0)
    for markers in (find_markers(heights, Thresholds(**options)), scattered * mask):
        ours, theirs = flood(heights, markers, mask), by_skimage(heights, markers, mask)
        lowest = lowest_points(heights, markers, options["fill_threshold"])
        assert np.array_equal(ours > 0, theirs > 0)
        assert np.array_equal(
            np.take_along_axis(lowest, ours[None], 0), np.take_along_axis(lowest, theirs[None], 0)
        )
        best = lowest.max(0)
        assert np.array_equal(np.take_along_axis(lowest, ours[None], 0)[0], best)


def test_flood_reaches_nothing_without_markers_and_ignores_those_outside() -> None:
    heights = np.full((4, 5), 0.5, np.float32)
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    assert not flood(heights, np.zeros((4, 5), int), mask).any()
    markers = np.zeros((4, 5), np.uint16)
    markers[0, 0] = 7
    assert not flood(heights, markers, mask).any()
    markers[2, 3] = 9
    assert np.array_equal(flood(heights, markers, mask), 9 * mask)
    assert flood(heights, markers, mask).dtype == np.int32


def test_of_equally_high_pixels_the_first_reached_spreads_first() -> None:
    """Also from a marker at the lowest level: the plain between two markers is shared."""
    heights = profile(0, 0, 0, 0, 0, 0, 0.5)
    markers = np.array([[1, 0, 0, 0, 0, 0, 2]])
    assert flood(heights, markers, heights >= 0).tolist() == [[1, 1, 1, 2, 2, 2, 2]]


# ---- real cells -----------------------------------------------------------------------------


# Mutation testing runs the kernels in plain Python.
compiled = pytest.mark.skipif(
    bool(numba.config.DISABLE_JIT), reason="takes minutes without compilation"
)


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_ceiling_on_the_sample_images(target: str) -> None:
    tables = []
    for path in sorted((Path(dinocell.__file__).parent / "samples" / "labels").iterdir()):
        truth = read_labels(path)
        tables.append(overlap_table(truth, round_trip(truth, target)))
    assert sum(table.num_truth for table in tables) > 60
    assert reduce(add, [match_counts(table, 0.5) for table in tables]).ap >= 0.99
    assert reduce(add, [match_counts(table, 0.9) for table in tables]).ap >= 0.95
    assert reduce(add, [ctc_counts(table) for table in tables]).seg >= 0.99


@compiled
@pytest.mark.parametrize("target", TARGETS)
def test_ceiling_on_real_nuclei(data_dir: Path, target: str) -> None:
    """True map in, labels out, on the validation images; all others: benchmarks/."""
    tables = []
    for path in sorted((data_dir / "dsb2018" / "val" / "labels").glob("*.png")):
        truth = read_labels(path)
        tables.append(overlap_table(truth, round_trip(truth, target)))
    assert len(tables) == 53
    assert reduce(add, [match_counts(table, 0.5) for table in tables]).ap >= 0.99
    assert reduce(add, [match_counts(table, 0.9) for table in tables]).ap >= 0.96
    assert reduce(add, [ctc_counts(table) for table in tables]).seg >= 0.99


@compiled
def test_the_noise_of_a_network_costs_little() -> None:
    heights, truth = network_like_map(1, 512)
    labels = distance_map_to_labels(heights, peak_threshold=0.6, fill_threshold=0.25)
    assert match_counts(overlap_table(truth, labels), 0.5).ap > 0.9


# ---- errors -----------------------------------------------------------------------------------


def test_wrong_maps_are_refused() -> None:
    thresholds = Thresholds(0.6, 0.2)
    with pytest.raises(ValueError, match=r"2-D \(H, W\), got shape \(2, 4, 5\)"):
        separate_cells(np.zeros((2, 4, 5)), thresholds)
    with pytest.raises(ValueError, match="must not hold NaN"):
        separate_cells([[0.2, np.nan]], thresholds)
    with pytest.raises(ValueError, match="real numbers, got dtype complex128"):
        separate_cells(np.zeros((4, 5), complex), thresholds)
    # Clipped to 1, a map stored in integers would be one plateau and all touching cells one.
    stored = np.array([[0, 120, 255]], np.uint8)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got uint8 from 0 to 255: divide it"):
        separate_cells(stored, thresholds)
    with pytest.raises(ValueError, match="got int64 from -1 to 0"):
        find_markers([[0, -1]], thresholds)
    assert separate_cells(np.array([[0, 1]], np.uint8), thresholds).tolist() == [[0, 1]]


def test_a_map_with_2_to_the_31_pixels_and_its_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 2³¹ pixels"):
        separate_cells(np.broadcast_to(np.float32(0), (2**16 - 2, 2**15 - 2)), Thresholds(0.6, 0.2))


def test_wrong_arguments_of_flood_are_refused() -> None:
    good = np.zeros((4, 5), np.float32)
    zeros, mask = good.astype(int), good > 0
    with pytest.raises(ValueError, match=r"map's shape \(4, 5\), got \(5, 4\) and \(4, 5\)"):
        flood(good, zeros.T, mask)
    with pytest.raises(ValueError, match=r"got \(4, 5\) and \(5, 4\)"):
        flood(good, zeros, mask.T)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(4, 5\)"):
        flood(good, zeros[:3], mask)
    with pytest.raises(ValueError, match=r"got \(4, 5\) and \(3, 5\)"):
        flood(good, zeros, mask[:3])
    with pytest.raises(TypeError, match="integer image, got dtype float32"):
        flood(good, good, mask)
    with pytest.raises(ValueError, match="from 0 to 2³¹ − 1, got -1 to -1"):
        flood(good, zeros - 1, mask)
    with pytest.raises(ValueError, match="from 0 to 2³¹ − 1, got 2147483648 to 2147483648"):
        flood(good, zeros + 2**31, mask)
    assert (flood(good, zeros + (2**31 - 1), ~mask) == 2**31 - 1).all()
    with pytest.raises(ValueError, match="must not hold NaN"):
        flood(good * np.nan, zeros, mask)
