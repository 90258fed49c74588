"""Scores against the truth: SEG, DET, OP_CSB, AP, F1, PQ, AJI, boundary F, and threshold tuning.

Start at `evaluate_pair` (two label images), `evaluate_pairs` or `evaluate_folders`.
"""

from dinocell.evaluation.ctc import CtcCounts, ctc_counts
from dinocell.evaluation.evaluate import evaluate_folders, evaluate_pairs
from dinocell.evaluation.matching import OverlapTable, match, overlap_table
from dinocell.evaluation.metrics import MatchCounts, match_counts
from dinocell.evaluation.report import EvaluationReport
from dinocell.evaluation.scores import ImageScores, evaluate_pair
from dinocell.evaluation.tuning import ThresholdGrids, TuningResult, tune_thresholds
from dinocell.pairs import pair_folders

__all__ = [
    "CtcCounts",
    "EvaluationReport",
    "ImageScores",
    "MatchCounts",
    "OverlapTable",
    "ThresholdGrids",
    "TuningResult",
    "ctc_counts",
    "evaluate_folders",
    "evaluate_pair",
    "evaluate_pairs",
    "match",
    "match_counts",
    "overlap_table",
    "pair_folders",
    "tune_thresholds",
]
