"""What a good score of consistency can be won by without knowing any cell, and how it is noticed.

Four kinds of features agree across channels and are useless: (nearly) the same ones everywhere
(*collapse*); the field or its batch alone; the slope of the illumination; a blurred picture of the
layout.  Each warning below names one of them.  `tests/dinocell/probing/test_shortcuts.py` holds a
synthetic backbone of each kind, and the rate of false alarms on features that know places.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dinocell.probing.views import Estimate, Floats, Views

_RIDGE = 1e-2
# Rules; the rates of the tests are of these values.
_SMALL_SPREAD = 0.1  # of directions; features of random directions have 1
_FIELD_SHARE = 0.9  # of what one place has in common, also had by two places of its field
_MUCH_EXPLAINED = 0.5  # of the variation between the windows of a field


def explained_share(views: Views, numbers: NDArray[np.float64]) -> float:
    """Share of the variation of features within fields that a few numbers explain, 0 to 1.

    `views`: of single channels.  `numbers`: (M, k), for example the slopes of the window's brightness.
    Features and numbers have their mean over field and channel subtracted; a ridge regression is fitted
    on all fields but one and judged on that one (1 − residual / total variance, at least 0).  nan with
    fewer than three fields or without variation.
    """
    if views.num_fields < 3:
        return math.nan
    group = views.field * (len(views.names) + 1) + views.channel
    features, inputs = _centred(views.features, group), _centred(numbers, group)
    scale = inputs.std(axis=0)
    inputs = inputs / np.where(scale > 0, scale, 1.0)
    residual = total = 0.0
    for held_out in range(views.num_fields):
        test = views.field == held_out
        known, truth = inputs[~test], features[~test]
        matrix = known.T @ known
        matrix[np.diag_indices_from(matrix)] += _RIDGE * len(known)
        found = inputs[test] @ np.linalg.solve(matrix, known.T @ truth)
        residual += float(((features[test] - found) ** 2).sum())
        total += float((features[test] ** 2).sum())
    return max(0.0, 1.0 - residual / total) if total > 0 else math.nan


def _centred(values: Floats, group: NDArray[np.intp]) -> Floats:
    sums = np.zeros((int(group.max()) + 1, values.shape[1]))
    counts = np.zeros((len(sums), 1))
    np.add.at(sums, group, values)
    np.add.at(counts, group, 1.0)
    return values - (sums / np.maximum(counts, 1))[group]


def _beats_chance(estimate: Estimate | None) -> bool | None:
    """None where it cannot be known."""
    if estimate is None or math.isnan(estimate.low) or math.isnan(estimate.chance):
        return None
    return estimate.low > estimate.chance


def found_warnings(estimates: Mapping[str, Estimate], num_fields: int) -> list[str]:
    """Sentences on what the numbers of a `ConsistencyReport` do not allow to be claimed."""

    def value(name: str) -> float:
        return estimates[name].value if name in estimates else math.nan

    found = []
    cosine, other = value("cosine_same_field"), value("cosine_other_field_other_channel")
    if math.isnan(other):
        found.append(
            "there is only one field, so channels of one field cannot be compared with those of different fields"
        )
    elif cosine - other < 0.05:
        found.append(
            f"different fields are nearly as alike ({other:.3f}) as channels of one field "
            f"({cosine:.3f}): the cosine says little here"
        )
    everywhere = _beats_chance(estimates["retrieval_top1"])
    within = _beats_chance(estimates["retrieval_within_field"])
    if everywhere is False:
        found.append("retrieval is not better than chance")
    rank, spread = value("effective_rank_centered"), value("feature_std")
    if rank < 2:
        found.append("the features vary along fewer than two directions: collapsed")
    elif spread < _SMALL_SPREAD and everywhere is False:
        found.append(
            f"the features are one constant and noise (spread {spread:.3f}, no place is found again): "
            "collapsed"
        )
    # What two places of a field have in common, as a share of what one place has.
    share = (value("cosine_other_place") - other) / max(cosine - other, 1e-9)
    if everywhere and (share > _FIELD_SHARE or within is False):
        found.append(
            "two places of a field are as alike as one place in two channels: the features know the "
            "field (or its batch), not the place"
        )
    illumination, layout = value("explained_by_illumination"), value("explained_by_layout")
    if illumination > _MUCH_EXPLAINED:
        found.append(
            f"two slopes of the brightness explain {illumination:.0%} of the variation within fields: "
            "the features know the illumination"
        )
    elif layout > _MUCH_EXPLAINED or (
        within and _beats_chance(estimates.get("retrieval_turned")) is False
    ):
        found.append(
            "a place is not found again when it is turned, or a 4 × 4 thumbnail explains the features: "
            "they know the layout of bright and dark alone"
        )
    if num_fields < 20:
        found.append(f"{num_fields} fields: the intervals are rough")
    return found
