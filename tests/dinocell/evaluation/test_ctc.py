"""SEG, DET and OP_CSB: by hand, by law, and against py-ctcmetrics."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from dinocell.evaluation.ctc import CtcCounts, ctc_counts
from dinocell.evaluation.matching import overlap_table


def counts_of(truth: object, pred: object) -> CtcCounts:
    return ctc_counts(overlap_table(np.asarray(truth), np.asarray(pred)))


# ------------------------------------------------------------------ by hand


def test_two_cells_merged_into_one() -> None:
    counts = counts_of([[1, 1, 2, 2]], [[7, 7, 7, 7]])
    assert counts == CtcCounts(num_truth=2, num_pred=1, seg_sum=1.0, ns=1, fn=0, fp=0)
    assert counts.det == 0.75  # 1 − 5 / 20
    assert counts.seg == 0.5  # each covers 2 of 4 pixels
    assert counts.op_csb == 0.625


def test_one_cell_split_into_unequal_parts() -> None:
    counts = counts_of([[1, 1, 1, 1, 1]], [[1, 1, 1, 2, 2]])
    assert counts == CtcCounts(num_truth=1, num_pred=2, seg_sum=0.6, ns=0, fn=0, fp=1)
    assert counts.det == 0.9  # 1 − 1 / 10


def test_exactly_half_is_no_match() -> None:
    counts = counts_of([[1, 1, 1, 1]], [[1, 1, 2, 2]])
    assert (counts.ns, counts.fn, counts.fp, counts.seg_sum) == (0, 1, 2, 0.0)
    assert counts.det == 0.0  # repair costs 12, making one cell from nothing 10
    assert counts_of([[1, 1, 1]], [[1, 1, 2]]).fn == 0


def test_three_merged_cost_two_splits() -> None:
    counts = counts_of([[1, 2, 3]], [[1, 1, 1]])
    assert counts.ns == 2
    assert counts.det == pytest.approx(1 - 10 / 30)


def test_missed_and_extra_cells() -> None:
    truth = np.diag([1, 2, 0, 0])
    pred = np.diag([1, 0, 0, 5])
    counts = counts_of(truth, pred)
    assert counts == CtcCounts(num_truth=2, num_pred=2, seg_sum=1.0, ns=0, fn=1, fp=1)
    assert counts.seg == 0.5
    assert counts.det == pytest.approx(1 - 11 / 20)


def test_empty_prediction_and_flood_of_extras_give_0() -> None:
    truth = np.zeros((5, 5), int)
    truth[0, 0] = 1
    assert counts_of(truth, np.zeros_like(truth)).det == 0.0
    assert counts_of(truth, np.zeros_like(truth)).seg == 0.0
    flood = np.arange(1, 26).reshape(5, 5)
    counts = counts_of(truth, flood)
    assert counts.fp == 24
    assert counts.det == 0.0
    assert counts.seg == 1.0


def test_empty_truth_has_no_score() -> None:
    for pred in ([[0, 0]], [[1, 2]]):
        counts = counts_of([[0, 0]], pred)
        assert math.isnan(counts.seg)
        assert math.isnan(counts.det)
        assert math.isnan(counts.op_csb)


def test_no_background_and_one_pixel_cells() -> None:
    mosaic = np.arange(1, 10).reshape(3, 3)
    counts = counts_of(mosaic, mosaic + 100_000)
    assert (counts.seg, counts.det, counts.op_csb) == (1.0, 1.0, 1.0)


def test_sums_come_before_the_division() -> None:
    good = counts_of([[1, 1, 0]], [[1, 1, 0]])
    poor = counts_of([[1, 2, 3]], [[0, 0, 0]])
    pooled = sum([good, poor], CtcCounts())
    assert pooled.seg == 0.25
    assert pooled.det == 0.25
    assert np.mean([good.seg, poor.seg]) == 0.5


# ------------------------------------------------------------------ the oracle


class Oracle:
    """py-ctcmetrics through files, as it wants them.

    A frame of background is put around both images, since it drops the first label of an image that
    has none; int64 keeps its sum of labels from overflowing.
    """

    def __init__(self, folder: Path) -> None:
        pytest.importorskip(
            "ctc_metrics",
            reason="py-ctcmetrics is not installed: pip install -e '.[test]'",
        )
        self.paths = folder / "truth.tif", folder / "pred.tif"

    def frame(self, truth: np.ndarray, pred: np.ndarray) -> tuple[list, ...]:
        import tifffile
        from ctc_metrics.utils.representations import match

        for path, labels in zip(self.paths, (truth, pred), strict=True):
            tifffile.imwrite(path, np.pad(labels, 1).astype(np.int64))
        return match(*map(str, self.paths))

    @staticmethod
    def scores(frames: list[tuple[list, ...]]) -> tuple[float, float]:
        from ctc_metrics.metrics.technical.det import det
        from ctc_metrics.metrics.technical.seg import seg
        from ctc_metrics.utils.representations import count_acyclic_graph_correction_operations

        truth, pred, mapped_truth, mapped_pred, ious = map(list, zip(*frames, strict=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse efficiency, not about results
            operations = count_acyclic_graph_correction_operations(
                None, None, truth, pred, mapped_truth, mapped_pred
            )
        return seg(truth, ious), det(**operations)


def test_equals_py_ctcmetrics_on_random_pairs(random_pairs: list, tmp_path: Path) -> None:
    oracle = Oracle(tmp_path)
    frames, all_counts = [], []
    for truth, pred in random_pairs:
        counts = counts_of(truth, pred)
        frame = oracle.frame(truth, pred)
        frames.append(frame)
        all_counts.append(counts)
        assert (counts.num_truth, counts.num_pred) == (len(frame[0]), len(frame[1]))
        if counts.num_truth and counts.num_pred:  # the oracle fails on an image without objects
            assert (counts.seg, counts.det) == pytest.approx(oracle.scores([frame]), abs=1e-12)
        else:
            assert counts.seg_sum == sum(frame[4]) == 0
    # Sequences: here images without objects take part as well.
    for start in range(0, len(frames), 25):
        pooled = sum(all_counts[start : start + 25], CtcCounts())
        expected = oracle.scores(frames[start : start + 25])
        assert (pooled.seg, pooled.det) == pytest.approx(expected, abs=1e-12)
    seen = sum(all_counts, CtcCounts())
    assert min(seen.ns, seen.fn, seen.fp) > 40  # every kind of error was met


YEAST = {"01": 0.8138836518620145, "02": 0.7585552326750732}


@pytest.mark.parametrize("sequence", sorted(YEAST))
def test_recorded_values_on_real_yeast(sequence: str, data_dir: Path) -> None:
    """SEG of cells eroded by one pixel, recorded from py-ctcmetrics in the data set's README."""
    import tifffile
    from skimage.morphology import disk, erosion

    total = CtcCounts()
    for path in sorted((data_dir / "ctc" / "yeast_baby" / f"{sequence}_GT" / "SEG").glob("*.tif")):
        truth = tifffile.imread(path)
        pred = np.zeros_like(truth)
        for cell in np.unique(truth)[1:]:
            inside = (truth == cell).astype(np.uint8)
            pred[erosion(inside, disk(1), mode="max") > 0] = cell
        total += counts_of(truth, pred)
    assert total.num_truth > 5
    assert total.seg == pytest.approx(YEAST[sequence], abs=1e-12)
    assert total.det == 1.0


def test_recorded_values_between_two_experts(expert_labels: tuple) -> None:
    """SEG of one expert against the other, both ways round, from the data set's README."""
    first, second = expert_labels
    assert counts_of(first, second).seg == pytest.approx(0.272, abs=5e-4)
    assert counts_of(second, first).seg == pytest.approx(0.447, abs=5e-4)
