"""The overlap table against a double loop, and one-to-one matching against exhaustive search."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from dinocell.evaluation.matching import OverlapTable, match, match_total_iou, overlap_table

TWO_BY_FOUR_TRUTH = np.array([[1, 1, 0, 2], [1, 1, 0, 2]])
TWO_BY_FOUR_PRED = np.array([[0, 5, 5, 9], [0, 5, 5, 0]])


def pairs_of(table: OverlapTable) -> dict[tuple[int, int], int]:
    return {
        (int(table.truth_ids[i]), int(table.pred_ids[j])): int(n)
        for i, j, n in zip(table.truth_index, table.pred_index, table.intersection, strict=True)
    }


def counted_by_hand(
    truth: np.ndarray, pred: np.ndarray
) -> tuple[dict[int, int], dict[int, int], dict[tuple[int, int], int]]:
    truth_areas: dict[int, int] = {}
    pred_areas: dict[int, int] = {}
    shared: dict[tuple[int, int], int] = {}
    for t, p in zip(truth.ravel().tolist(), pred.ravel().tolist(), strict=True):
        if t:
            truth_areas[t] = truth_areas.get(t, 0) + 1
        if p:
            pred_areas[p] = pred_areas.get(p, 0) + 1
        if t and p:
            shared[t, p] = shared.get((t, p), 0) + 1
    return truth_areas, pred_areas, shared


def dense_iou(table: OverlapTable) -> np.ndarray:
    iou = np.zeros((table.num_truth, table.num_pred))
    iou[table.truth_index, table.pred_index] = table.iou
    return iou


# ------------------------------------------------------------------ the table


def test_overlap_table_of_a_small_picture() -> None:
    table = overlap_table(TWO_BY_FOUR_TRUTH, TWO_BY_FOUR_PRED)
    assert table.truth_ids.tolist() == [1, 2]
    assert table.truth_areas.tolist() == [4, 2]
    assert table.pred_ids.tolist() == [5, 9]
    assert table.pred_areas.tolist() == [4, 1]
    assert pairs_of(table) == {(1, 5): 2, (2, 9): 1}
    assert table.union.tolist() == [6, 2]
    assert table.iou.tolist() == [2 / 6, 1 / 2]
    assert (table.num_truth, table.num_pred) == (2, 2)


def test_objects_stand_in_raster_order_of_their_first_pixel() -> None:
    table = overlap_table([[0, 7, 3, 7, 5]], [[2, 2, 1, 1, 0]])
    assert table.truth_ids.tolist() == [7, 3, 5]
    assert table.pred_ids.tolist() == [2, 1]


def test_equals_a_pixel_loop_on_random_pairs(random_pairs: list) -> None:
    for truth, pred in random_pairs:
        table = overlap_table(truth, pred)
        truth_areas, pred_areas, shared = counted_by_hand(truth, pred)
        assert dict(zip(table.truth_ids.tolist(), table.truth_areas, strict=True)) == truth_areas
        assert dict(zip(table.pred_ids.tolist(), table.pred_areas, strict=True)) == pred_areas
        assert pairs_of(table) == shared


@given(
    arrays(np.uint64, (4, 5), elements=st.sampled_from([0, 1, 2**16, 2**32, 2**63, 2**64 - 1])),
    arrays(np.int64, (4, 5), elements=st.sampled_from([0, 3, 70_000, 2**32 - 1, 2**63 - 1])),
)
@settings(deadline=None)
def test_any_label_value_of_any_integer_type(truth: np.ndarray, pred: np.ndarray) -> None:
    table = overlap_table(truth, pred)
    truth_areas, pred_areas, shared = counted_by_hand(truth, pred)
    assert dict(zip(table.truth_ids.tolist(), table.truth_areas, strict=True)) == truth_areas
    assert dict(zip(table.pred_ids.tolist(), table.pred_areas, strict=True)) == pred_areas
    assert pairs_of(table) == shared


def test_object_in_two_pieces_is_one_object() -> None:
    table = overlap_table([[4, 0, 4]], [[1, 1, 1]])
    assert table.truth_areas.tolist() == [2]
    assert pairs_of(table) == {(4, 1): 2}


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 4)])
def test_nothing(shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, np.uint32)
    table = overlap_table(nothing, nothing)
    assert (table.num_truth, table.num_pred, table.iou.size) == (0, 0, 0)
    assert match(table, 0.5).size == match_total_iou(table).size == 0


def test_one_side_without_objects() -> None:
    some, nothing = np.ones((2, 2), int), np.zeros((2, 2), int)
    left, right = overlap_table(some, nothing), overlap_table(nothing, some)
    assert (left.num_truth, left.num_pred, left.intersection.size) == (1, 0, 0)
    assert (right.num_truth, right.num_pred, right.intersection.size) == (0, 1, 0)


def test_views_and_other_memory_orders_give_the_same(random_pairs: list) -> None:
    truth, pred = random_pairs[1]
    expected = overlap_table(truth, pred)
    padded = np.pad(truth, 2)[2:-2, 2:-2]
    table = overlap_table(padded, np.asfortranarray(pred).astype(">u4"))
    assert pairs_of(table) == pairs_of(expected)
    assert table.truth_areas.tolist() == expected.truth_areas.tolist()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"same shape, got \(2, 4\) and \(4, 2\)"):
        overlap_table(TWO_BY_FOUR_TRUTH, TWO_BY_FOUR_TRUTH.T)
    with pytest.raises(TypeError, match="`pred` must be an integer label image, got dtype float"):
        overlap_table(TWO_BY_FOUR_TRUTH, TWO_BY_FOUR_PRED.astype(float))
    with pytest.raises(TypeError, match="`truth` must be an integer label image, got dtype bool"):
        overlap_table(TWO_BY_FOUR_TRUTH > 0, TWO_BY_FOUR_PRED)
    with pytest.raises(ValueError, match="labels of 0 and above, got -1"):
        overlap_table(TWO_BY_FOUR_TRUTH, TWO_BY_FOUR_PRED - 1)


# ------------------------------------------------------------------ matching


def test_threshold_is_inclusive() -> None:
    table = overlap_table([[1, 1, 0]], [[1, 1, 1]])  # IoU 2/3
    assert match(table, 2 / 3).size == 1
    assert match(table, np.nextafter(2 / 3, 1)).size == 0
    perfect = overlap_table([[1, 1]], [[3, 3]])
    assert match(perfect, 1.0).size == 1


def test_threshold_0_9_is_met_by_nine_of_ten_pixels() -> None:
    truth = np.ones((1, 10), int)
    pred = truth.copy()
    pred[0, 0] = 0
    assert match(overlap_table(truth, pred), 0.9).size == 1


def test_two_halves_at_one_half_give_one_pair() -> None:
    table = overlap_table([[1, 1]], [[1, 2]])
    assert table.iou.tolist() == [0.5, 0.5]
    assert match(table, 0.5).size == 1


def test_most_pairs_come_before_the_best_pair() -> None:
    # IoU: (1, 1) = 4/7, (1, 2) = 2/8, (2, 1) = 1/6, so the best single pair blocks the two others.
    truth = [[1, 1, 1, 1, 1, 1, 2, 2, 0, 0]]
    pred = [[1, 1, 1, 1, 2, 2, 1, 0, 2, 2]]
    table = overlap_table(truth, pred)
    by_pair = dict(zip(pairs_of(table), table.iou, strict=True))
    assert by_pair == {(1, 1): 4 / 7, (1, 2): 2 / 8, (2, 1): 1 / 6}
    chosen = [list(pairs_of(table))[k] for k in match(table, 0.1)]
    assert chosen == [(1, 2), (2, 1)]
    assert [list(pairs_of(table))[k] for k in match_total_iou(table)] == [(1, 1)]


def test_of_equally_many_pairs_the_higher_iou_wins() -> None:
    table = overlap_table([[1, 1, 1, 1, 1]], [[1, 1, 2, 2, 2]])
    assert table.pred_ids[table.pred_index[match(table, 0.2)]].tolist() == [2]


def best_by_exhaustion(iou: np.ndarray, threshold: float) -> tuple[int, float]:
    if iou.shape[0] > iou.shape[1]:
        iou = iou.T
    best = (0, 0.0)
    for columns in permutations(range(iou.shape[1]), iou.shape[0]):
        scores = [iou[i, j] for i, j in enumerate(columns) if iou[i, j] >= threshold]
        best = max(best, (len(scores), sum(scores)))
    return best


@given(
    arrays(np.uint8, (3, 6), elements=st.integers(0, 4)),
    arrays(np.uint8, (3, 6), elements=st.integers(0, 4)),
    st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5]),
)
@settings(max_examples=150, deadline=None)
def test_match_equals_exhaustive_search(
    truth: np.ndarray, pred: np.ndarray, threshold: float
) -> None:
    table = overlap_table(truth, pred)
    pairs = match(table, threshold)
    num_pairs, iou_sum = best_by_exhaustion(dense_iou(table), threshold)
    assert pairs.size == num_pairs
    assert table.iou[pairs].sum() == pytest.approx(iou_sum, abs=1e-6)
    assert np.unique(table.truth_index[pairs]).size == pairs.size
    assert np.unique(table.pred_index[pairs]).size == pairs.size
    assert (table.iou[pairs] >= threshold).all()
    assert (np.diff(pairs) > 0).all()


def test_match_equals_dense_assignment_on_random_pairs(random_pairs: list) -> None:
    contested = 0
    for truth, pred in random_pairs:
        table = overlap_table(truth, pred)
        iou = dense_iou(table)
        rows, columns = linear_sum_assignment(iou, maximize=True)
        assert table.iou[match_total_iou(table)].sum() == pytest.approx(
            iou[rows, columns].sum(), abs=1e-6
        )
        for threshold in (0.05, 0.2, 0.5, 0.7):
            reward = (iou >= threshold) * (1 + iou / (2 * max(iou.shape, default=1)))
            rows, columns = linear_sum_assignment(reward, maximize=True)
            kept = iou[rows, columns] >= threshold
            pairs = match(table, threshold)
            assert pairs.size == kept.sum()
            assert table.iou[pairs].sum() == pytest.approx(iou[rows, columns][kept].sum(), abs=1e-6)
            contested += pairs.size < np.count_nonzero(iou >= threshold)
    assert contested > 200  # or the test would not have met the solver


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
def test_thresholds_outside_0_1_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        match(overlap_table([[1]], [[1]]), threshold)
