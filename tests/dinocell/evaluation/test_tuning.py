"""Tuning: finds known optima, skips impossible combinations, never needs a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dinocell.errors import DataSetError
from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.evaluation.tuning import (
    ThresholdGrids,
    TuningPoint,
    TuningResult,
    tune_thresholds,
    tuned_values,
)
from dinocell.segmentation.thresholds import Thresholds

PEAKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FILLS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
PROMINENCES = (0.0, 0.05, 0.1, 0.2)

# 900 cells of one pixel, each alone in a 2 × 2 block.
MANY = np.zeros((60, 60), np.uint32)
MANY[::2, ::2] = np.arange(1, 901).reshape(30, 30)


class FakeWatershed:
    """Loses cells in proportion to the distance of the thresholds from an optimum."""

    def __init__(self, peak: float, fill: float, prominence: float, ridge: float = 0.0) -> None:
        self.best = peak, fill, prominence
        self.ridge = ridge
        self.calls: list[Thresholds] = []

    def __call__(self, distance_map: np.ndarray, thresholds: Thresholds) -> np.ndarray:
        self.calls.append(thresholds)
        peak = thresholds.peak_threshold - self.best[0]
        fill = thresholds.fill_threshold - self.best[1]
        prominence = thresholds.min_prominence - self.best[2]
        lost = abs(peak) + abs(fill) + abs(prominence) + self.ridge * abs(peak - fill)
        return np.where(round(900 * min(lost, 1)) < MANY, MANY, 0)


SAMPLES = [(np.zeros(MANY.shape, np.float32), MANY)]
GRIDS = ThresholdGrids(PEAKS, FILLS, PROMINENCES)


def best(result: TuningResult) -> tuple[float, ...]:
    return tuple(tuned_values(result.thresholds).values())


@pytest.mark.parametrize(
    "optimum", [(0.5, 0.2, 0.05), (0.3, 0.05, 0.0), (0.8, 0.5, 0.2), (0.6, 0.5, 0.1)]
)
def test_both_searches_find_a_known_optimum(optimum: tuple[float, float, float]) -> None:
    searched = tune_thresholds(SAMPLES, GRIDS, to_labels=FakeWatershed(*optimum))
    full = tune_thresholds(SAMPLES, GRIDS, to_labels=FakeWatershed(*optimum), search="grid")
    assert best(searched) == best(full) == optimum
    assert searched.best.score == full.best.score == 1.0
    assert len(searched.points) < len(full.points) / 2


def test_the_full_grid_holds_every_combination_with_fill_below_peak_once() -> None:
    fake = FakeWatershed(0.5, 0.2, 0.05)
    result = tune_thresholds(SAMPLES, GRIDS, to_labels=fake, search="grid")
    expected = [(p, f, m) for p in PEAKS for f in FILLS for m in PROMINENCES if f < p]
    tried = [tuple(tuned_values(point.thresholds).values()) for point in result.points]
    assert tried == expected
    assert len(fake.calls) == len(expected)


def test_the_docstring_knows_the_size_of_the_default_grid() -> None:
    peaks, fills, prominences = ThresholdGrids().axes()
    number = sum(f < p for p in peaks for f in fills) * len(prominences)
    assert f"the full default grid has {number}" in str(tune_thresholds.__doc__)


def test_no_combination_is_tried_twice_and_none_with_fill_above_peak() -> None:
    fake = FakeWatershed(0.6, 0.4, 0.1)
    tune_thresholds(SAMPLES, GRIDS, to_labels=fake)
    assert len(set(fake.calls)) == len(fake.calls)
    assert all(call.fill_threshold < call.peak_threshold for call in fake.calls)


def test_coordinate_search_ends_where_no_single_threshold_brings_a_gain() -> None:
    fake = FakeWatershed(0.8, 0.1, 0.1, ridge=3.0)
    searched = tune_thresholds(SAMPLES, GRIDS, to_labels=fake)
    full = tune_thresholds(SAMPLES, GRIDS, to_labels=fake, search="grid")
    assert searched.best.score <= full.best.score
    for point in full.points:
        moved = tuned_values(point.thresholds).values()
        if sum(a != b for a, b in zip(moved, best(searched), strict=True)) == 1:
            assert point.score <= searched.best.score


def test_a_single_point_is_scored() -> None:
    result = tune_thresholds(
        SAMPLES,
        ThresholdGrids([0.5], [0.2], [0.0]),
        to_labels=FakeWatershed(0.5, 0.1, 0.0),
    )
    assert best(result) == (0.5, 0.2, 0.0)
    assert result.best.score == pytest.approx(0.9)
    point = TuningPoint(Thresholds(0.5, 0.2, 0.0), result.best.score, 810)
    assert result.points == (point,)


def test_few_fills_below_the_peak_are_found() -> None:
    """Starting points may all be impossible."""
    result = tune_thresholds(
        SAMPLES,
        ThresholdGrids([0.3, 0.31, 0.32, 0.5], [0.4, 0.45, 0.6, 0.7, 0.8], [0.0]),
        to_labels=FakeWatershed(0.5, 0.45, 0.0),
    )
    assert best(result) == (0.5, 0.45, 0.0)


def test_of_equal_scores_the_lowest_thresholds_win() -> None:
    result = tune_thresholds(SAMPLES, GRIDS, to_labels=lambda *_: MANY, search="grid")
    assert best(result) == (0.3, 0.05, 0.0)


# ------------------------------------------------------------------ metrics


def shifted(distance_map: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    """The map is the label image; the fill threshold shifts it by 0, 1 or 2 pixels."""
    shift = {0.1: 0, 0.2: 1, 0.3: 2}[thresholds.fill_threshold]
    return np.roll(distance_map.astype(np.uint32), shift, axis=1)


THREE_SHIFTS = ThresholdGrids([0.5], [0.1, 0.2, 0.3], [0.0])


def two_images() -> list[tuple[np.ndarray, np.ndarray]]:
    wide = np.zeros((12, 20), np.uint32)
    wide[1:11, 1:11] = 1
    narrow = np.zeros((12, 20), np.uint32)
    for cell in range(4):
        narrow[1:4, 1 + 4 * cell : 4 + 4 * cell] = cell + 1
    return [(wide.astype(np.float32), wide), (narrow.astype(np.float32), narrow)]


@pytest.mark.parametrize("metric", ["ap50", "ap75", "ap", "seg", "det", "op_csb"])
def test_scores_equal_those_of_the_report(metric: str) -> None:
    result = tune_thresholds(
        two_images(),
        THREE_SHIFTS,
        metric=metric,
        to_labels=shifted,
        search="grid",
    )
    assert result.metric == f"{metric}_pooled"
    ious = [0.5 + 0.05 * k for k in range(10)]
    scores = []
    for fill in (0.1, 0.2, 0.3):
        pairs = [
            (str(k), truth, shifted(m, Thresholds(0.5, fill)))
            for k, (m, truth) in enumerate(two_images())
        ]
        report = evaluate_pairs(pairs, iou_thresholds=ious)
        if metric == "ap":
            scores.append(np.mean([report.pooled[f"ap{round(100 * t)}_pooled"] for t in ious]))
        else:
            scores.append(report.pooled[f"{metric}_pooled"])
    assert [point.score for point in result.points] == pytest.approx(scores)
    assert scores[0] == 1 > scores[2]


def test_the_metric_changes_the_result() -> None:
    def scores(**options: str) -> list[float]:
        result = tune_thresholds(
            two_images(),
            THREE_SHIFTS,
            to_labels=shifted,
            **options,
        )
        return [point.score for point in result.points]

    pooled = scores(metric="ap75")
    assert pooled == [1.0, pytest.approx(1 / 9), 0.0]
    assert scores(metric="ap50")[1] == 1.0


def test_cells_found_in_images_without_cells_count() -> None:
    empty = np.zeros((12, 20), np.uint32)
    invented = np.zeros((12, 20), np.float32)
    invented[0, 0] = 1
    options: dict[str, Any] = {
        "grids": ThresholdGrids([0.5], [0.1], [0.0]),
        "to_labels": shifted,
    }
    samples = [*two_images(), (empty.astype(np.float32), empty)]
    assert tune_thresholds(samples, **options).best.score == 1.0
    samples = [*two_images(), (invented, empty)]
    assert tune_thresholds(samples, **options).best.score == pytest.approx(5 / 6)


# ------------------------------------------------------------------ interface


def test_min_area_is_passed_on_and_recorded() -> None:
    fake = FakeWatershed(0.5, 0.2, 0.0)
    result = tune_thresholds(SAMPLES, GRIDS, min_area_px=17, to_labels=fake)
    assert {call.min_area_px for call in fake.calls} == {17}
    assert result.thresholds.min_area_px == 17


def test_a_generator_is_enough() -> None:
    result = tune_thresholds(
        (sample for sample in SAMPLES * 2),
        GRIDS,
        to_labels=FakeWatershed(0.5, 0.2, 0.05),
    )
    assert (result.num_samples, result.num_truth) == (2, 1800)


def test_rows_of_all_points() -> None:
    result = tune_thresholds(SAMPLES, GRIDS, to_labels=FakeWatershed(0.5, 0.2, 0.05))
    rows = result.rows()
    assert list(rows[0]) == [
        *("peak_threshold", "fill_threshold", "min_prominence", "ap50_pooled", "num_pred"),
    ]
    assert len(rows) == len(result.points)
    assert max(float(row["ap50_pooled"]) for row in rows) == result.best.score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "accuracy"}, "`metric` must be 'ap', 'apNN'.*got 'accuracy'"),
        ({"metric": "ap00"}, "got 'ap00'"),
        ({"search": "random"}, "`search` must be 'coordinate' or 'grid', got 'random'"),
        ({"grids": ThresholdGrids(peak_grid=[])}, "`peak_grid` must hold one or more"),
        (
            {"grids": ThresholdGrids(fill_grid=[float("nan")])},
            "`fill_grid` must hold one or more finite",
        ),
        ({"grids": ThresholdGrids([0.1], [0.1, 0.2])}, "`fill_grid` must be below"),
        ({"grids": ThresholdGrids([1.0], [0.1])}, "peak_threshold` < 1"),
        ({"samples": [(np.zeros((2, 2)), MANY)]}, "must have the same shape"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"samples": SAMPLES, "to_labels": FakeWatershed(0.5, 0.2, 0.0)}
    with pytest.raises(ValueError, match=message):
        tune_thresholds(**(arguments | options))


def test_samples_without_cells_are_refused() -> None:
    with pytest.raises(DataSetError, match="got 0 images without any true cell"):
        tune_thresholds([], to_labels=shifted)
    nothing = np.zeros((4, 4), np.uint32)
    with pytest.raises(DataSetError, match="got 1 image without any true cell"):
        tune_thresholds([(nothing.astype(np.float32), nothing)], to_labels=shifted)


def test_the_real_watershed_is_the_default() -> None:
    """Two touching discs over a raised background: fill must be above it, peak above the saddle."""
    rows, columns = np.indices((40, 64))
    one = np.maximum(0, 1 - np.hypot(rows - 20, columns - 20) / 13)
    two = np.maximum(0, 1 - np.hypot(rows - 20, columns - 42) / 13)
    truth = np.where(one >= two, 1, 2) * (np.maximum(one, two) > 0)
    distance_map = np.maximum(np.maximum(one, two), 0.12).astype(np.float32)
    result = tune_thresholds([(distance_map, truth.astype(np.uint32))], metric="ap")
    assert 0.12 <= result.thresholds.fill_threshold < result.thresholds.peak_threshold
    assert result.best.score > 0.5
    assert min(point.score for point in result.points) < 0.2
