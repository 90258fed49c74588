"""Which true cell overlaps which predicted cell, and by how much: the one place where IoU is computed.

Every score of `dinocell.evaluation` starts from an `OverlapTable`, which `overlap_table` makes from
two label images in one pass over the runs of equal labels.  It holds the pairs that share at least
one pixel and nothing else, so its size follows the number of cells and not its square.

An object is all pixels of one label, be they in one piece or several.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from dinocell.labels import check_labels

_IOU_STEPS = 2**26
"""IoU is weighed in whole steps of 2⁻²⁶ when a matching is contested: whole numbers below 2⁵³ are
exact in float64, so the solver never meets a rounding error."""


@dataclass(frozen=True, eq=False)
class OverlapTable:
    """All objects of two label images and all pairs that share a pixel.

    Objects stand in the order of their first pixel in raster order, not of their label: whatever is
    computed from the table is then the same for every numbering of the cells, ties included.
    """

    # truth_ids, pred_ids: (T,), (P,) labels without 0, in the dtype of the image
    truth_ids: NDArray[Any]
    # truth_areas, pred_areas: (T,), (P,) number of pixels of each object
    truth_areas: NDArray[np.int64]
    pred_ids: NDArray[Any]
    pred_areas: NDArray[np.int64]
    # truth_index, pred_index: (K,) positions in `truth_ids` and `pred_ids`, of the K
    # overlapping pairs, sorted by the first and then by the second
    truth_index: NDArray[np.int64]
    pred_index: NDArray[np.int64]
    intersection: NDArray[np.int64]  # (K,) shared pixels of each pair, at least 1

    @property
    def num_truth(self) -> int:
        """Number of true objects, T."""
        return int(self.truth_ids.size)

    @property
    def num_pred(self) -> int:
        """Number of predicted objects, P."""
        return int(self.pred_ids.size)

    @cached_property
    def union(self) -> NDArray[np.int64]:
        """(K,) pixels that belong to either object of each pair."""
        both = self.truth_areas[self.truth_index] + self.pred_areas[self.pred_index]
        return both - self.intersection

    @cached_property
    def iou(self) -> NDArray[np.float64]:
        """(K,) intersection over union of each pair, in (0, 1]."""
        return self.intersection / self.union


def overlap_table(truth: ArrayLike, pred: ArrayLike) -> OverlapTable:
    """Count the pixels that every true and every predicted object share.

    Parameters
    ----------
    truth, pred : integer arrays of equal shape
        Label images, 0 is background.  Labels may be any positive integers up to 2⁶⁴ − 1, with
        gaps; the two dtypes may differ.  Without objects the arrays of the table are empty.

    Raises TypeError (an array is not of an integer type (a boolean mask is none: label it first));
    ValueError (the shapes differ or a label is negative).

    Notes
    -----
    Both images are cut into runs along the last axis in which neither label changes.  Only the runs
    are sorted, some tens of times fewer than pixels in a cell image.
    """
    truth_labels = check_labels(truth, "truth")
    pred_labels = check_labels(pred, "pred")
    if truth_labels.shape != pred_labels.shape:
        raise ValueError(
            f"`truth` and `pred` must have the same shape, got {truth_labels.shape} and "
            f"{pred_labels.shape}: compare label images of the same field"
        )
    flat_truth, flat_pred = truth_labels.ravel(), pred_labels.ravel()
    changes = (flat_truth[1:] != flat_truth[:-1]) | (flat_pred[1:] != flat_pred[:-1])
    starts = np.flatnonzero(changes) + 1
    if flat_truth.size:
        starts = np.concatenate([[0], starts])
    lengths = np.diff(starts, append=flat_truth.size)

    truth_ids, truth_areas, truth_of_run = _objects(flat_truth[starts], lengths)
    pred_ids, pred_areas, pred_of_run = _objects(flat_pred[starts], lengths)

    shared = (truth_of_run >= 0) & (pred_of_run >= 0)
    keys, pair_of_run = np.unique(
        truth_of_run[shared] * pred_ids.size + pred_of_run[shared], return_inverse=True
    )
    truth_index, pred_index = np.divmod(keys, max(pred_ids.size, 1))
    return OverlapTable(
        truth_ids=truth_ids,
        truth_areas=truth_areas,
        pred_ids=pred_ids,
        pred_areas=pred_areas,
        truth_index=truth_index,
        pred_index=pred_index,
        intersection=_sum_by_index(pair_of_run, lengths[shared], keys.size),
    )


def match(table: OverlapTable, iou_threshold: float) -> NDArray[np.int64]:
    """Pair true with predicted objects one to one, counting pairs with IoU ≥ `iou_threshold`.

    Of all one-to-one pairings the largest is taken, and among the largest the one with the highest
    sum of IoU.  Above a threshold of 0.5 there is nothing to choose: an object overlaps at most one
    other by more than half.  Exactly at 0.5, and below, objects can compete (a cell cut into two
    equal halves has IoU 0.5 with either).

    Returns (M,) int64 ndarray: positions among the pairs of `table`, ascending:
    ``table.iou[match(table, 0.5)]``.

    Raises ValueError (`iou_threshold` is not in (0, 1]).

    Notes
    -----
    The number of pairs equals that of ``stardist.matching.matching`` at every threshold.  The sum of
    their IoU equals it from 0.5 upwards; below, StarDist breaks ties with the IoU of pairs that do
    not reach the threshold as well, so its sum can be lower than this one.
    """
    if not 0 < iou_threshold <= 1:
        raise ValueError(
            f"`iou_threshold` must be in (0, 1], got {iou_threshold}: give a fraction such as 0.5"
        )
    candidates = np.flatnonzero(table.iou >= iou_threshold)
    return _best_assignment(table, candidates, most_pairs_first=True)


def match_total_iou(table: OverlapTable) -> NDArray[np.int64]:
    """As `match` with every pair a candidate, so that the sum of IoU is as high as it can be."""
    candidates = np.arange(table.intersection.size)
    return _best_assignment(table, candidates, most_pairs_first=False)


def _objects(
    run_labels: NDArray[Any], lengths: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """Ids and areas in raster order of the first pixel, and each run's object (−1: background)."""
    ids, first, id_of_run = np.unique(run_labels, return_index=True, return_inverse=True)
    objects = np.flatnonzero(ids)
    objects = objects[np.argsort(first[objects])]
    rank = np.full(ids.size, -1, np.int64)
    rank[objects] = np.arange(objects.size)
    object_of_run = rank[id_of_run]
    inside = object_of_run >= 0
    areas = _sum_by_index(object_of_run[inside], lengths[inside], objects.size)
    return ids[objects], areas, object_of_run


def _sum_by_index(
    index: NDArray[np.int64], values: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Sums of whole numbers; `bincount` adds in float64, which is exact below 2⁵³ pixels."""
    return np.bincount(index, weights=values, minlength=size).astype(np.int64)


def _best_assignment(
    table: OverlapTable, candidates: NDArray[np.int64], *, most_pairs_first: bool
) -> NDArray[np.int64]:
    """The one-to-one subset of `candidates` with most pairs and (or only) the highest sum of IoU."""
    truth_index, pred_index = table.truth_index[candidates], table.pred_index[candidates]
    alone = np.bincount(truth_index, minlength=table.num_truth)[truth_index] == 1
    alone &= np.bincount(pred_index, minlength=table.num_pred)[pred_index] == 1
    contested = candidates[~alone]
    if contested.size == 0:
        return candidates

    truths, rows = np.unique(table.truth_index[contested], return_inverse=True)
    preds, columns = np.unique(table.pred_index[contested], return_inverse=True)
    gain = np.rint(table.iou[contested] * _IOU_STEPS)
    if most_pairs_first:
        gain += (min(truths.size, preds.size) + 1) * _IOU_STEPS
    # A full matching of the rows always exists, since each row also has a column of its own that
    # gains nothing: choosing it leaves the true object without a partner.
    base = gain.max() + 1
    own = np.arange(truths.size)
    costs = csr_array(
        (
            np.concatenate([base - gain, np.full(truths.size, base)]),
            (np.concatenate([rows, own]), np.concatenate([columns, preds.size + own])),
        ),
        shape=(truths.size, preds.size + truths.size),
    )
    chosen_rows, chosen_columns = min_weight_full_bipartite_matching(costs)
    paired = chosen_columns < preds.size
    chosen_keys = chosen_rows[paired].astype(np.int64) * preds.size + chosen_columns[paired]
    chosen = contested[np.isin(rows * preds.size + columns, chosen_keys)]
    return np.sort(np.concatenate([candidates[alone], chosen]))
