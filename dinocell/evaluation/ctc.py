"""SEG, DET and OP_CSB of the Cell Tracking Challenge for label images.

A predicted object S *matches* a true object R when it covers more than half of it, |R ∩ S| > ½·|R|.
Each R has at most one match; one S may match several R (cells that were merged).

SEG
    Mean over all true objects of the IoU with their match, 0 for those without.  Objects that were
    predicted too many cost nothing.
DET
    ``1 − min(AOGM_D, AOGM_D0) / AOGM_D0`` with ``AOGM_D = 5·NS + 10·FN + 1·FP`` and ``AOGM_D0 = 10·R``:
    the cost of repairing the detections against that of making them all from nothing.
OP_CSB
    Mean of SEG and DET.

Counts add up: over several images the sums come before the division, as in the challenge.  The
official DET takes its truth from tracking markers; here, as in SAMCell, one truth serves both.

References
----------
Maška et al., "A benchmark for comparison of cell tracking algorithms", Bioinformatics 30 (2014): SEG.
Matula et al., "Cell tracking accuracy measurement based on comparison of acyclic oriented graphs",
PLoS ONE 10 (2015): AOGM, its weights and the matching rule.
Ulman et al., "An objective comparison of cell-tracking algorithms", Nature Methods 14 (2017).
"""

from dataclasses import dataclass

import numpy as np

from dinocell.evaluation.matching import OverlapTable
from dinocell.evaluation.metrics import Counts, ratio

_SPLIT_COST = 5.0
_MISSED_COST = 10.0
_EXTRA_COST = 1.0


@dataclass(frozen=True)
class CtcCounts(Counts):
    """What SEG and DET are made of, for one image or, added up, for many."""

    # num_truth, num_pred: true and predicted objects
    num_truth: int = 0
    num_pred: int = 0
    seg_sum: float = 0.0  # sum of the IoU of the matched true objects
    # splits needed: for each predicted object, the true objects matched to it beyond the first
    ns: int = 0
    fn: int = 0  # true objects without a match
    fp: int = 0  # predicted objects that no true object is matched to

    @property
    def seg(self) -> float:
        """SEG in [0, 1]; nan without true objects."""
        return ratio(self.seg_sum, self.num_truth)

    @property
    def det(self) -> float:
        """DET in [0, 1]; nan without true objects."""
        from_nothing = _MISSED_COST * self.num_truth
        repair = _SPLIT_COST * self.ns + _MISSED_COST * self.fn + _EXTRA_COST * self.fp
        return 1.0 - ratio(min(repair, from_nothing), from_nothing)

    @property
    def op_csb(self) -> float:
        """Mean of SEG and DET; nan without true objects."""
        return 0.5 * (self.seg + self.det)


def ctc_counts(table: OverlapTable) -> CtcCounts:
    """Count matches, splits, misses and extras of one image by the rule of the challenge.

    `table` is ``overlap_table(truth, pred)``; ``sum(counts, CtcCounts())`` pools several images.
    """
    covered = 2 * table.intersection > table.truth_areas[table.truth_index]
    matched_truths = np.bincount(table.pred_index[covered], minlength=table.num_pred)
    return CtcCounts(
        num_truth=table.num_truth,
        num_pred=table.num_pred,
        seg_sum=float(table.iou[covered].sum()),
        ns=int(np.maximum(matched_truths - 1, 0).sum()),
        fn=table.num_truth - int(np.count_nonzero(covered)),
        fp=int(np.count_nonzero(matched_truths == 0)),
    )
