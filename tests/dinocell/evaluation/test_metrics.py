"""AP, F1, PQ, AJI, boundary F, pixel scores: by hand, by law, and against oracles."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from dinocell.evaluation.matching import OverlapTable, overlap_table
from dinocell.evaluation.metrics import (
    DSB2018_IOU_THRESHOLDS,
    AreaSums,
    BoundaryCounts,
    CountError,
    MatchCounts,
    aji,
    aji_plus,
    boundary_counts,
    count_error,
    match_counts,
    pixel_sums,
)

THRESHOLDS = (0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 1.0)


def table_of(truth: object, pred: object) -> OverlapTable:
    return overlap_table(np.asarray(truth), np.asarray(pred))


# ------------------------------------------------------------------ counts at a threshold


def test_match_counts_of_a_small_picture() -> None:
    truth = [[1, 1, 1, 1, 2, 2, 0, 3]]
    pred = [[1, 1, 1, 0, 2, 2, 0, 0]]  # IoU 3/4 and 1, one cell missed
    counts = match_counts(table_of(truth, pred), 0.75)
    assert counts == MatchCounts(0.75, tp=2, fp=0, fn=1, iou_sum=1.75)
    assert counts.ap == 2 / 3
    assert counts.precision == 1.0
    assert counts.recall == 2 / 3
    assert counts.f1 == 4 / 5
    assert counts.sq == 1.75 / 2
    assert counts.pq == 1.75 / 2.5 == pytest.approx(counts.sq * counts.f1)
    assert match_counts(table_of(truth, pred), 0.8).tp == 1


def test_ratios_of_counts() -> None:
    counts = MatchCounts(0.5, tp=3, fp=5, fn=7, iou_sum=2.0)
    assert (counts.ap, counts.precision, counts.recall) == (3 / 15, 3 / 8, 3 / 10)
    assert (counts.f1, counts.sq, counts.pq) == (6 / 18, 2 / 3, 2 / 9)
    areas = AreaSums(intersection=3, union=5)
    assert (areas.iou, areas.dice) == (3 / 5, 6 / 8)


def test_counts_start_at_zero() -> None:
    assert MatchCounts(0.5) == MatchCounts(0.5, tp=0, fp=0, fn=0, iou_sum=0.0)
    assert AreaSums() == AreaSums(intersection=0, union=0)
    assert BoundaryCounts() == BoundaryCounts(0, 0, 0, 0)
    assert CountError() == CountError(0, 0, 0)


def test_ratios_of_nothing() -> None:
    nothing, one = [[0, 0]], [[1, 0]]
    both = match_counts(table_of(nothing, nothing), 0.5)
    for score in ("ap", "precision", "recall", "f1", "sq", "pq"):
        assert math.isnan(getattr(both, score))
    missed = match_counts(table_of(one, nothing), 0.5)
    assert (missed.ap, missed.f1, missed.pq, missed.recall) == (0, 0, 0, 0)
    assert math.isnan(missed.precision)
    invented = match_counts(table_of(nothing, one), 0.5)
    assert (invented.ap, invented.f1, invented.pq, invented.precision) == (0, 0, 0, 0)
    assert math.isnan(invented.recall)


def test_adding_counts_pools_them() -> None:
    one, other = MatchCounts(0.5, 1, 0, 0, 1.0), MatchCounts(float("0.5"), 0, 2, 1, 0.0)
    assert one + other == MatchCounts(0.5, 1, 2, 1, 1.0)
    assert (one + other).ap == 0.25
    with pytest.raises(ValueError, match=r"share one IoU threshold.*0\.5 and 0\.75"):
        one + MatchCounts(0.75)


def test_dsb2018_thresholds() -> None:
    assert DSB2018_IOU_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def stardist_matching() -> object:
    return pytest.importorskip(
        "stardist.matching",
        reason="stardist is not installed: pip install -e '.[test]'",
    )


def nan_as_0(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def test_equals_stardist_on_random_pairs(random_pairs: list) -> None:
    """StarDist gives 0 where a ratio is 0/0; its IoU are float32, hence 1e-6."""
    oracle = stardist_matching()
    contested = 0
    for truth, pred in random_pairs:
        table = overlap_table(truth, pred)
        for expected in oracle.matching(truth, pred, thresh=THRESHOLDS):  # type: ignore[attr-defined]
            counts = match_counts(table, expected.thresh)
            contested += counts.tp < np.count_nonzero(table.iou >= expected.thresh)
            assert (counts.tp, counts.fp, counts.fn) == (expected.tp, expected.fp, expected.fn)
            assert nan_as_0(counts.ap) == pytest.approx(expected.accuracy, abs=1e-12)
            assert nan_as_0(counts.f1) == pytest.approx(expected.f1, abs=1e-12)
            assert nan_as_0(counts.precision) == pytest.approx(expected.precision, abs=1e-12)
            assert nan_as_0(counts.recall) == pytest.approx(expected.recall, abs=1e-12)
            if expected.thresh >= 0.5:
                assert nan_as_0(counts.pq) == pytest.approx(expected.panoptic_quality, abs=1e-6)
                assert nan_as_0(counts.sq) == pytest.approx(expected.mean_matched_score, abs=1e-6)
            else:  # StarDist lets pairs below the threshold break ties
                assert nan_as_0(counts.pq) > expected.panoptic_quality - 1e-6
    assert contested > 80


def test_pooled_and_mean_equal_stardist(random_pairs: list) -> None:
    oracle = stardist_matching()
    with_cells = [(t, p) for t, p in random_pairs if t.any() and p.any()]
    truths, preds = zip(*with_cells, strict=True)
    for threshold in (0.5, 0.75):
        counts = [match_counts(overlap_table(t, p), threshold) for t, p in with_cells]
        pooled = sum(counts, MatchCounts(threshold))
        for by_image, ap, pq in (
            (False, pooled.ap, pooled.pq),
            (True, np.mean([c.ap for c in counts]), np.mean([c.pq for c in counts])),
        ):
            expected = oracle.matching_dataset(  # type: ignore[attr-defined]
                truths, preds, thresh=threshold, by_image=by_image, show_progress=False
            )
            assert ap == pytest.approx(expected.accuracy, abs=1e-12)
            assert pq == pytest.approx(expected.panoptic_quality, abs=1e-6)


def test_published_stardist_counts_give_the_published_ap(data_dir: Path) -> None:
    """Pooled and mean AP of the 41 test images, as their README states them."""
    path = data_dir / "dsb2018" / "stardist_test" / "stardist_2D_versatile_fluo.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for percent, pooled, mean in ((50, 0.845, 0.838), (75, 0.648, 0.660), (90, 0.188, 0.280)):
        counts = []
        for row in rows:
            tp = int(row[f"tp_iou{percent}"])
            num_truth, num_pred = int(row["num_truth"]), int(row["num_predicted"])
            counts.append(MatchCounts(percent / 100, tp, num_pred - tp, num_truth - tp))
        assert sum(counts, MatchCounts(percent / 100)).ap == pytest.approx(pooled, abs=5e-4)
        # Means were published from AP values rounded before (0.65950 became 0.660).
        assert np.mean([count.ap for count in counts]) == pytest.approx(mean, abs=6e-4)


def test_ap_between_two_experts(expert_labels: tuple) -> None:
    """AP at 0.5 as the data set's README states it; AP does not ask who is right."""
    first, second = expert_labels
    ap = match_counts(overlap_table(first, second), 0.5).ap
    assert ap == pytest.approx(0.219, abs=5e-4)
    assert match_counts(overlap_table(second, first), 0.5).ap == ap


# ------------------------------------------------------------------ AJI


def test_aji_by_hand() -> None:
    # Cell 1 (4 px) takes prediction 1 (3 of its pixels); cell 2 (2 px) meets nothing;
    # prediction 9 (1 px) is never taken: 3 / (4 + 2 + 1).
    sums = aji(table_of([[1, 1, 1, 1, 2, 2, 0]], [[1, 1, 1, 0, 0, 0, 9]]))
    assert sums == AreaSums(3, 7)
    assert sums.iou == 3 / 7


def test_aji_may_take_a_prediction_twice_and_aji_plus_may_not() -> None:
    truth, pred = [[1, 1, 2, 2, 2]], [[1, 1, 1, 1, 1]]
    assert aji(table_of(truth, pred)) == AreaSums(2 + 3, 5 + 5)
    assert aji_plus(table_of(truth, pred)) == AreaSums(3, 5 + 2)


def test_aji_ties_go_to_the_larger_intersection_then_to_the_first() -> None:
    # Cell 1 (4 px) has IoU 1/4 with prediction 1 (1 px inside) and 2/8 with 2 (6 px, 2 inside).
    truth = [[1, 1, 1, 1, 0, 0, 0, 0]]
    pred = [[3, 2, 2, 0, 2, 2, 2, 2]]
    assert aji(table_of(truth, pred)) == AreaSums(2, 8 + 1)
    # Two equal halves: either choice leaves 2 px untaken.
    assert aji(table_of([[1, 1, 1, 1]], [[7, 7, 2, 2]])) == AreaSums(2, 4 + 2)
    # Cell 1 shares 2 px with either prediction and takes the first; cell 2 takes the second.
    truth, pred = [[0, 0, 1, 1, 1, 1, 2, 2]], [[8, 8, 8, 8, 3, 3, 3, 3]]
    assert aji(table_of(truth, pred)) == AreaSums(2 + 2, 6 + 4)


def test_aji_of_nothing() -> None:
    for sums in (aji, aji_plus):
        assert math.isnan(sums(table_of([[0]], [[0]])).iou)
        assert sums(table_of([[1]], [[0]])) == AreaSums(0, 1)
        assert sums(table_of([[0]], [[1]])) == AreaSums(0, 1)


def aji_from_the_paper(truth: np.ndarray, pred: np.ndarray) -> float:
    """Kumar et al. 2017, Algorithm 1, with masks; cells are visited in raster order."""

    def masks(labels: np.ndarray) -> list[np.ndarray]:
        ids, first = np.unique(labels, return_index=True)
        return [labels == ids[k] for k in np.argsort(first) if ids[k]]

    true_masks, pred_masks = masks(truth), masks(pred)
    intersection, union, used = 0, 0, set()
    for cell in true_masks:
        shared = [int((cell & other).sum()) for other in pred_masks]
        joined = [int((cell | other).sum()) for other in pred_masks]
        if not any(shared):
            union += int(cell.sum())
            continue
        best = max(range(len(pred_masks)), key=lambda j: (shared[j] / joined[j], shared[j], -j))
        intersection += shared[best]
        union += joined[best]
        used.add(best)
    union += sum(int(other.sum()) for j, other in enumerate(pred_masks) if j not in used)
    return intersection / union if union else math.nan


def test_aji_equals_the_paper_on_random_pairs(random_pairs: list) -> None:
    for truth, pred in random_pairs:
        expected = aji_from_the_paper(truth, pred)
        assert aji(overlap_table(truth, pred)).iou == pytest.approx(expected, nan_ok=True)


def test_aji_plus_equals_dense_assignment_on_random_pairs(random_pairs: list) -> None:
    from scipy.optimize import linear_sum_assignment

    for truth, pred in random_pairs:
        if min(truth.shape) < 8:
            continue  # in tiny noise several pairings are equally good
        table = overlap_table(truth, pred)
        iou = np.zeros((table.num_truth, table.num_pred))
        iou[table.truth_index, table.pred_index] = table.iou
        shared = np.zeros(iou.shape, int)
        shared[table.truth_index, table.pred_index] = table.intersection
        rows, columns = linear_sum_assignment(iou, maximize=True)
        overlapping = shared[rows, columns] > 0
        rows, columns = rows[overlapping], columns[overlapping]
        areas = int((truth > 0).sum() + (pred > 0).sum())
        intersection = int(shared[rows, columns].sum())
        sums = aji_plus(table)
        assert sums == AreaSums(intersection, areas - intersection)


# ------------------------------------------------------------------ boundaries


def one_pixel_at(column: int) -> np.ndarray:
    labels = np.zeros((3, 9), int)
    labels[1, column] = 1
    return labels


def test_tolerance_decides() -> None:
    truth, pred = one_pixel_at(2), one_pixel_at(4)
    assert boundary_counts(truth, pred, 2) == BoundaryCounts(1, 1, 1, 1)
    assert boundary_counts(truth, pred, 1.9) == BoundaryCounts(1, 0, 1, 0)
    assert boundary_counts(truth, pred, 2).f == 1.0
    assert boundary_counts(truth, pred, 1.9).f == 0.0
    diagonal = np.roll(truth, (1, 1), (0, 1))
    assert boundary_counts(truth, diagonal, 1.4).f == 0.0
    assert boundary_counts(truth, diagonal, 1.5).f == 1.0
    assert boundary_counts(truth, one_pixel_at(8), 1e9).f == 1.0


def test_boundary_precision_and_recall_by_hand() -> None:
    truth = one_pixel_at(2)
    pred = truth + 2 * one_pixel_at(6) + 3 * one_pixel_at(8)
    counts = boundary_counts(truth, pred, 0)
    assert counts == BoundaryCounts(truth_px=1, truth_hit_px=1, pred_px=3, pred_hit_px=1)
    assert (counts.precision, counts.recall, counts.f) == (1 / 3, 1.0, 0.5)
    assert BoundaryCounts() + counts == counts, "counts start at 0"
    pooled = counts + BoundaryCounts(1, 0, 1, 0)
    assert (pooled.precision, pooled.recall) == (1 / 4, 1 / 2)


def test_boundary_f_without_boundaries() -> None:
    nothing, one = np.zeros((3, 9), int), one_pixel_at(3)
    assert math.isnan(boundary_counts(nothing, nothing, 2).f)
    missed, invented = boundary_counts(one, nothing, 2), boundary_counts(nothing, one, 2)
    assert missed.f == invented.f == 0.0
    assert math.isnan(missed.precision)
    assert math.isnan(invented.recall)


def boundary_f_from_the_definition(truth: np.ndarray, pred: np.ndarray, tolerance: float) -> float:
    """Every boundary pixel of one side looks for the nearest of the other, one by one."""

    def rim(labels: np.ndarray) -> list[tuple[int, int]]:
        found = []
        height, width = labels.shape
        for r, c in np.argwhere(labels).tolist():
            steps = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
            inside = [(i, j) for i, j in steps if 0 <= i < height and 0 <= j < width]
            if any(labels[i, j] != labels[r, c] for i, j in inside):
                found.append((r, c))
        return found

    def share_near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        near = [min(map(lambda o: math.dist(p, o), others)) <= tolerance for p in some]  # noqa: C417
        return sum(near) / len(near)

    true_rim, pred_rim = rim(truth), rim(pred)
    if not true_rim and not pred_rim:
        return math.nan
    if not true_rim or not pred_rim:
        return 0.0
    precision, recall = share_near(pred_rim, true_rim), share_near(true_rim, pred_rim)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("tolerance", [0, 1, 2.5, math.sqrt(13), 12])
def test_boundary_f_equals_the_definition_on_random_pairs(
    tolerance: float, random_pairs: list
) -> None:
    for truth, pred in random_pairs[:40]:
        expected = boundary_f_from_the_definition(truth, pred, tolerance)
        assert boundary_counts(truth, pred, tolerance).f == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("tolerance", [-1, float("nan"), float("inf")])
def test_impossible_tolerances_are_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match="`tolerance_px` must be a finite number"):
        boundary_counts(one_pixel_at(1), one_pixel_at(1), tolerance)


def test_boundaries_need_two_dimensions_and_one_shape() -> None:
    with pytest.raises(ValueError, match=r"must be 2-D \(H, W\), got shape \(2, 3, 9\)"):
        boundary_counts(np.zeros((2, 3, 9), int), one_pixel_at(1), 1)
    for labels in (one_pixel_at(1), one_pixel_at(1).T):
        with pytest.raises(ValueError, match="must have the same shape"):
            boundary_counts(labels, labels.T, 1)


# ------------------------------------------------------------------ pixels and numbers


def test_pixel_scores_by_hand() -> None:
    sums = pixel_sums(table_of([[1, 1, 2, 0]], [[0, 5, 5, 5]]))
    assert sums == AreaSums(2, 4)
    assert sums.iou == 0.5
    assert sums.dice == 2 * 2 / (3 + 3)
    assert math.isnan(pixel_sums(table_of([[0]], [[0]])).dice)
    assert pixel_sums(table_of([[1]], [[0]])).dice == 0.0


def test_pixel_scores_equal_masks_on_random_pairs(random_pairs: list) -> None:
    for truth, pred in random_pairs:
        sums = pixel_sums(overlap_table(truth, pred))
        assert sums.intersection == np.logical_and(truth, pred).sum()
        assert sums.union == np.logical_or(truth, pred).sum()


def test_count_error() -> None:
    few = count_error(table_of([[1, 2, 3, 4]], [[1, 1, 1, 1]]))
    many = count_error(table_of([[1, 1, 1, 1]], [[1, 2, 0, 0]]))
    assert (few.signed, few.absolute, few.relative) == (-3, 3, -0.75)
    assert (many.signed, many.absolute, many.relative) == (1, 1, 1.0)
    assert few + many == CountError(num_truth=5, num_pred=3, absolute=4)
    assert (few + many).relative == -0.4
    empty = count_error(table_of([[0]], [[0]]))
    assert (empty.signed, empty.absolute) == (0, 0)
    assert math.isnan(empty.relative)
