"""How well a linear probe names the channel that a feature was computed from."""

import math

import numpy as np
from numpy.typing import NDArray

from dinocell.probing.consistency_report import Estimate, Floats
from dinocell.probing.views import Views, estimate_by_field

# Two similarities nearer than this are a tie.  Rounding of float32 features moves a cosine near 1 by
# about 1e-12, so that collapsed features tie whatever their last bits are.
_TIE = 1e-9
# Below this, a coordinate of a feature of length 1 is rounding and not variation.
_ROUNDING = 1e-7
_RIDGE = 0.1
_NUM_FOLDS = 10


def decode_channels(views: Views, draws: Floats, seed: int) -> Estimate:
    """How often a linear probe names the channel of a view in a field it was not fitted on.

    Parameters
    ----------
    views : of single channels, with features of length 1
    draws : from `draw_fields`

    Returns Estimate: mean over locations of the share of their views named right, choosing among
    the channels of that location, so that the kind of field gives nothing away; `chance` is the
    mean of 1 / channels.  Where all locations have all C channels this is the balanced accuracy
    with chance 1/C.  nan with fewer than two fields, or without two channels that several fields
    share.

    Notes
    -----
    Ridge regression on standardised features to one-hot channels, channels weighted alike; folds by
    field (leave one field out up to ten fields, then ten folds).
    """
    seen_in = np.zeros((views.num_fields, len(views.names)), dtype=bool)
    seen_in[views.field, views.channel] = True
    usable = seen_in.sum(axis=0) >= 2  # a channel of one field is unknown when that is held out
    views = views.where(usable[views.channel])
    if usable.sum() < 2 or not len(views.features):
        return Estimate(math.nan)
    order = np.random.default_rng([seed, 2]).permutation(views.num_fields)
    fold_of_field = np.empty(views.num_fields, dtype=np.intp)
    fold_of_field[order] = np.arange(views.num_fields) % min(views.num_fields, _NUM_FOLDS)
    fold = fold_of_field[views.field]
    scores = np.full((len(fold), len(views.names)), -np.inf)
    for held_out in np.unique(fold):
        train, test = views.where(fold != held_out), fold == held_out
        known = np.unique(train.channel)
        if len(known):
            fitted = _ridge_scores(train.features, train.channel, views.features[test], known)
            scores[np.ix_(test, known)] = fitted

    sums, counts, chances = (np.zeros(views.num_fields) for _ in range(3))
    for rows in views.rows_by_location():
        answers = scores[np.ix_(rows, views.channel[rows])]  # only the channels of this location
        if len(rows) < 2 or not np.isfinite(answers).all():
            continue
        field = views.field[rows[0]]
        sums[field] += retrieval_credit(answers, np.arange(len(rows))).mean()
        counts[field] += 1
        chances[field] += 1 / len(rows)
    return estimate_by_field(sums, counts, draws, chances)


def retrieval_credit(similarities: Floats, right: NDArray[np.intp]) -> Floats:
    """Top-1 of each row: 1, 0, or 1/k where the right answer is one of k equal best ones.

    `similarities` is (Q, N); `right` (Q,) is the column of the right answer.  Equal means within 1e-9;
    1/k is the mean over the orders of the ties.
    """
    true = similarities[np.arange(len(right)), right][:, None]
    beaten = (similarities > true + _TIE).any(axis=1)
    ties = (similarities >= true - _TIE).sum(axis=1)
    return np.where(beaten, 0.0, 1.0 / ties)


def _ridge_scores(
    train: Floats, train_channel: NDArray[np.intp], test: Floats, known: NDArray[np.intp]
) -> Floats:
    """Scores (T, known) of a ridge regression to one-hot channels."""
    one_hot = (train_channel[:, None] == known[None, :]).astype(np.float64)
    weight = (one_hot / one_hot.sum(axis=0)).sum(axis=1)
    weight *= len(train) / weight.sum()
    mean = (weight[:, None] * train).sum(axis=0) / weight.sum()
    spread = np.sqrt((weight[:, None] * (train - mean) ** 2).sum(axis=0) / weight.sum())
    scale = np.where(spread > _ROUNDING, 1.0 / np.maximum(spread, _ROUNDING), 0.0)
    inputs = (train - mean) * scale
    prior = (weight[:, None] * one_hot).sum(axis=0) / weight.sum()
    weighted = inputs * weight[:, None]
    matrix = weighted.T @ inputs
    matrix[np.diag_indices_from(matrix)] += _RIDGE * len(train)
    solution = np.linalg.solve(matrix, weighted.T @ (one_hot - prior))
    return (test - mean) * scale @ solution + prior
