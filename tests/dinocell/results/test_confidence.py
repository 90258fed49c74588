"""Scores of cells: pictures drawn by hand, and what each of the three shares does."""

from __future__ import annotations

import numpy as np
import pytest

from dinocell.results.confidence import cell_scores, scored_cells
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.thresholds import Thresholds


def two_squares() -> np.ndarray:
    """Two squares of 8 px that touch along one side."""
    labels = np.zeros((12, 20), np.uint32)
    labels[2:10, 2:10], labels[2:10, 10:18] = 1, 2
    return labels


def test_scores_by_hand() -> None:
    labels = np.array([[1, 1, 1, 0, 2]])
    distance_map = np.array([[0.5, 1.0, 0.3, 0.0, 0.5]])
    # the ideal map (linear) of cell 1 is 1, 2/3 and 1/3 (the edge of the image is no outside), of cell 2 it is 1
    agreement = (0.5 + 2 / 3 + 0.3) / (1 + 1 + 1 / 3)
    scores = cell_scores(labels, distance_map, target="linear")
    np.testing.assert_allclose(scores, [agreement * 2 / 3, 0.5], rtol=1e-6)


def test_cells_whose_flips_differ_score_lower_by_hand() -> None:
    labels = np.array([[1, 1, 1, 0, 2, 0, 3]])
    distance_map = np.array([[0.5, 1.0, 0.3, 0.0, 0.5, 0.0, 0.6]])
    alone = cell_scores(labels, distance_map)
    spread = np.array([[0.1, 0.0, 0.2, 0.5, 0.0, 0.0, 0.7]])
    scores = cell_scores(labels, distance_map, spread=spread)
    assert alone.all()
    np.testing.assert_allclose(scores / alone, [(1.5 / 2.1) ** 4, 1, 0], rtol=1e-6)


def test_a_map_as_it_should_be_scores_higher_than_a_flat_or_noisy_one() -> None:
    labels = two_squares()
    ideal = labels_to_distance_map(labels)
    noisy = np.clip(ideal + np.random.default_rng(0).normal(0, 0.3, ideal.shape), 0, 1)
    best = cell_scores(labels, ideal)
    assert ((best > 0.5) & (best <= 1)).all()
    for worse in (noisy, 0.6 * ideal, np.where(labels, 0.7, 0.0)):
        assert (cell_scores(labels, worse) < best).all()


def test_a_shallow_valley_lowers_both_of_its_cells() -> None:
    labels = two_squares()
    ideal = labels_to_distance_map(labels)
    bridged = ideal.copy()
    bridged[5:7, 9:11] = 0.95
    assert (cell_scores(labels, bridged) < 0.7 * cell_scores(labels, ideal)).all()
    alone = np.where(labels == 1, labels, 0)
    assert cell_scores(alone, bridged)[0] > 0.95 * cell_scores(alone, ideal)[0]


def test_edges() -> None:
    assert cell_scores(np.zeros((3, 0), int), np.zeros((3, 0))).shape == (0,)
    assert cell_scores(np.zeros((3, 3), int), np.zeros((3, 3))).shape == (0,)
    assert cell_scores(np.ones((3, 3), int), np.zeros((3, 3))).tolist() == [0.0]
    assert cell_scores(np.ones((3, 3), int), np.ones((3, 3))).tolist() == [1.0]
    with pytest.raises(ValueError, match="shape of the labels"):
        cell_scores(np.ones((3, 3), int), np.ones((3, 4)))


def test_cells_of_low_score_become_background() -> None:
    labels = two_squares()
    ideal = labels_to_distance_map(labels)
    ideal[labels == 2] *= 0.7
    thresholds = Thresholds(peak_threshold=0.5, fill_threshold=0.1)
    both, scores, notes = scored_cells(ideal, thresholds)
    assert len(scores) == both.max() == 2
    assert notes == ()
    limit = float(scores.mean())
    kept, high, notes = scored_cells(ideal, thresholds, min_score=limit)
    assert high.tolist() == [scores.max()]
    assert ((kept == 1) == (both == 1 + scores.argmax())).all()
    assert "1 of 2 cells" in notes[0]
    spread = np.stack([ideal, np.full_like(ideal, 0.2)])
    assert (scored_cells(spread, thresholds)[1] < scores).all()
