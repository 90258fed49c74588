"""Neighbours by brute force over all pixels, and pictures drawn by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from dinocell.results.measure import measure_labels


def boxes(seed: int) -> np.ndarray:
    """Rectangles that overlap, some hidden or in pieces; seed 0: two cells far apart."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((70, 90), np.int64)
    for number in range(1, 26 if seed else 3):
        row, col = rng.integers(0, 70), rng.integers(0, 90)
        height, width = rng.integers(1, 9, 2)
        labels[row : row + height, col : col + width] = number
    return labels


def comb() -> np.ndarray:
    """Two combs whose teeth, one pixel wide, stand in each other's gaps: all pixels are border pixels."""
    labels = np.ones((40, 60), np.int64)
    labels[1:, ::2] = 2
    return labels


def dust() -> np.ndarray:
    """Two ragged clouds far apart, and one pixel of a third cell between them."""
    labels = np.zeros((60, 300), np.int64)
    scattered = np.random.default_rng(0).random(labels.shape) < 0.3
    labels[:, :30][scattered[:, :30]] = 1
    labels[:, -30:][scattered[:, -30:]] = 2
    labels[30, 140] = 3
    return labels


@pytest.mark.parametrize("labels", [*map(boxes, range(4)), comb(), dust()])
def test_neighbors_equal_brute_force(labels: np.ndarray) -> None:
    pixels = [np.argwhere(labels == label) for label in np.unique(labels[labels > 0])]
    closest = np.full((len(pixels), len(pixels)), np.inf)
    for a, first in enumerate(pixels):
        for b, second in enumerate(pixels):
            if a != b:
                closest[a, b] = cdist(first, second).min()
    for distance in (1, 1.5, math.sqrt(13), 5.0, 12.5, 40):
        table = measure_labels(labels, neighbor_distance_px=distance)
        np.testing.assert_array_equal(table["num_neighbors"], (closest <= distance).sum(axis=1))
        np.testing.assert_allclose(table["nearest_border_distance"], closest.min(axis=1))


def test_a_distance_given_as_a_root_is_not_lost_to_rounding() -> None:
    """The square of math.sqrt(13) is 12.999999999999998, and cells 2 rows and 3 columns apart exist."""
    assert math.sqrt(13) ** 2 < 13
    labels = np.zeros((3, 4), int)
    labels[0, 0], labels[2, 3] = 1, 2
    for distance, expected in ((math.sqrt(13), 1), (math.sqrt(13) - 1e-6, 0)):
        table = measure_labels(labels, neighbor_distance_px=distance)
        assert table["num_neighbors"].tolist() == [expected, expected]


def test_a_far_pair_in_a_wide_image() -> None:
    """The square of the distance does not fit 32 bits, and most squares of the grid are empty."""
    labels = np.zeros((2, 70_000), np.uint8)
    labels[0, 0], labels[1, -1] = 1, 2
    table = measure_labels(labels)
    assert table["nearest_border_distance"].tolist() == [math.hypot(1, 69_999)] * 2
    assert table["num_neighbors"].tolist() == [0, 0]


def test_the_closest_pixel_may_lie_in_another_square_of_the_grid() -> None:
    """Seen from its first border pixel, cell 1 has cell 2 close; another pixel of it is closer to 3."""
    labels = np.zeros((60, 60), int)
    labels[5, 5:50] = 1
    labels[10, 5] = 2
    labels[7, 49] = 3
    table = measure_labels(labels, neighbor_distance_px=2)
    assert table["nearest_border_distance"].tolist() == [2, 5, 2]
    assert table["num_neighbors"].tolist() == [1, 0, 1]


def test_neighbors_go_by_border_not_by_centroid() -> None:
    labels = np.zeros((40, 70), np.uint16)
    labels[5:35, 2:32] = 1
    labels[5:35, 32:62] = 2  # side by side: centroids 30 px apart, borders 1 px
    labels[5:35, 65:68] = 3  # three background columns away from 2: 4 px
    near = measure_labels(labels, neighbor_distance_px=1)
    assert near["num_neighbors"].tolist() == [1, 1, 0]
    assert near["nearest_border_distance"].tolist() == [1, 1, 4]
    assert measure_labels(labels, neighbor_distance_px=3.9)["num_neighbors"].tolist() == [1, 1, 0]
    assert measure_labels(labels, neighbor_distance_px=4)["num_neighbors"].tolist() == [1, 2, 1]
    assert measure_labels(labels, neighbor_distance_px=99)["num_neighbors"].tolist() == [2, 2, 2]
