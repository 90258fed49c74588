"""Do the features of one place look alike through every channel, and are they still useful?

The cosine between channels alone is fooled by collapse: constant features score 1.  The score here
is therefore a row of numbers that are read together (DESIGN.md 4), each beside the value that chance
gives: cosine within and between fields, retrieval of a place through another channel, effective
rank, spread, agreement of the attention maps, and how well the channel can still be decoded.

The view called ``mean`` is the mean of the channels and is compared with the single channels apart.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.probing.channel_decoding import decode_channels, retrieval_credit
from dinocell.probing.consistency_report import ConsistencyReport, Estimate, Floats
from dinocell.probing.feature_spread import effective_rank, feature_std, standardize_attention
from dinocell.probing.views import (
    Views,
    draw_fields,
    estimate_between_fields,
    estimate_by_field,
    unit_rows,
)

_QUERIES_AT_ONCE = 1024


def channel_consistency(
    features: ArrayLike,
    fields: Sequence[Any] | NDArray[Any],
    locations: Sequence[Any] | NDArray[Any],
    channels: Sequence[str] | NDArray[Any],
    *,
    attention: ArrayLike | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> ConsistencyReport:
    """Score the features of views.

    Parameters
    ----------
    features : (M, D) array of float, finite, one row per view, for example CLS tokens.  Their
        length does not matter for cosine, retrieval, spread and decoding.
    fields, locations, channels : M items each
        Where each view comes from.  A location lies in one field and has a channel at most once;
        channels may be missing.  Views of channel `MEAN_VIEW` are means of channels.
    attention : (M, heads, N) array, optional
        Attention of CLS to the patches, in the order of `features`.
    num_bootstrap : draws of fields with replacement for the 95 % intervals; 0 leaves them out
    seed : of these draws and of the folds of the decoder

    Raises ValueError (the shapes do not fit, values are not finite, a location has a channel twice
    or lies in two fields, or no location has two channels).

    Notes
    -----
    Cosines are means over pairs; each pair counts once.  `retrieval_top1`: a view of channel a asks
    among all views of channel b for its own location; of k equal best answers 1/k counts, so
    constant features score 1/N and not 1.  The intervals draw fields, not views, because windows of
    one field are not independent; the gallery of the retrieval stays whole.

    References
    ----------
    Effective rank: Roy & Vetterli, EUSIPCO 2007, eq. 4; of features: Garrido et al., RankMe, 2023.
    """
    views = Views.checked(features, fields, locations, channels)
    is_mean = views.channel == views.mean_channel
    raw = views.where(~is_mean)
    draws = draw_fields(views.num_fields, num_bootstrap, seed)
    if not any(len(rows) > 1 for rows in raw.rows_by_location()):
        raise ValueError(
            "some location must be seen through two channels, got one channel each: choose fields "
            "with several channels"
        )

    single = replace(raw, features=unit_rows(raw.features))
    retrieval, retrieval_matrix = _retrieval(single, single, draws)
    estimates = _estimates(raw, single, retrieval, draws)
    estimates["channel_decodability"] = decode_channels(single, draws, seed)
    if is_mean.any():
        mean = views.where(is_mean)
        mean = replace(mean, features=unit_rows(mean.features))
        within, between = _against_mean(single, mean, draws)
        estimates["mean_view_cosine_same_field"] = within
        estimates["mean_view_cosine_other_field"] = between
        estimates["mean_view_retrieval_top1"] = _retrieval(single, mean, draws)[0]
    if attention is not None:
        seen = _with_attention(views, attention).where(~is_mean)
        estimates["attention_same_field"] = _same_location(seen, draws)
        # Unlike a feature, a map of another channel and field is the fair comparison: it shares
        # only what every map of this network shares.
        estimates["attention_other_field"] = _other_fields(seen, draws)[1]
    return ConsistencyReport(
        num_fields=views.num_fields,
        num_locations=len(single.rows_by_location()),
        num_views=len(single.features),
        embed_dim=single.features.shape[1],
        channels=single.names,
        estimates=estimates,
        cosine_by_channel=_cosine_matrix(single),
        retrieval_by_channel=retrieval_matrix,
    )


def _estimates(
    raw: Views, single: Views, retrieval: Estimate, draws: Floats
) -> dict[str, Estimate]:
    same, other = _other_fields(single, draws)
    return {
        "cosine_same_field": _same_location(single, draws),
        "cosine_other_field_same_channel": same,
        "cosine_other_field_other_channel": other,
        "retrieval_top1": retrieval,
        "effective_rank": Estimate(effective_rank(raw.features)),
        "effective_rank_centered": Estimate(effective_rank(raw.features, centered=True)),
        "feature_std": Estimate(feature_std(raw.features)),
    }


def _with_attention(views: Views, attention: ArrayLike) -> Views:
    maps = standardize_attention(attention)
    if len(maps) != len(views.features):
        raise ValueError(
            f"`attention` must have a map per view ({len(views.features)}), got {len(maps)}: "
            "give them in the order of the features"
        )
    return replace(views, features=maps)


def _cosine_matrix(single: Views) -> Floats:
    """(C, C) mean cosine of one location through two channels; nan for channels that never meet."""
    size = len(single.names)
    matrix = np.full((size, size), np.nan)
    np.fill_diagonal(matrix, 1.0)
    for first in range(size):
        for second in range(first):
            left, right = _pairs(single, single, first, second)
            if len(left):
                products = np.einsum("nd,nd->n", single.features[left], single.features[right])
                matrix[first, second] = matrix[second, first] = float(products.mean())
    return matrix


def _same_location(views: Views, draws: Floats) -> Estimate:
    sums, counts = np.zeros(views.num_fields), np.zeros(views.num_fields)
    for rows in views.rows_by_location():
        block = views.features[rows] @ views.features[rows].T
        above = np.triu_indices(len(rows), k=1)
        field = views.field[rows[0]]
        sums[field] += block[above].sum()
        counts[field] += len(above[0])
    return estimate_by_field(sums, counts, draws)


def _sums_by_field(views: Views) -> tuple[Floats, Floats]:
    """Sum of the rows of every (field, channel) (F, C, D) and their number (F, C)."""
    num_channels = int(views.channel.max(initial=0)) + 1
    sums = np.zeros((views.num_fields, num_channels, views.features.shape[1]))
    counts = np.zeros((views.num_fields, num_channels))
    np.add.at(sums, (views.field, views.channel), views.features)
    np.add.at(counts, (views.field, views.channel), 1.0)
    return sums, counts


def _other_fields(views: Views, draws: Floats) -> tuple[Estimate, Estimate]:
    """Pairs from two fields: of one channel, and of two.

    The sum of all dot products of two groups is the dot product of their sums, so no matrix of all
    pairs is needed.
    """
    sums, counts = _sums_by_field(views)
    same = sum(sums[:, c] @ sums[:, c].T for c in range(sums.shape[1]))
    same_counts = counts @ counts.T
    total, number = sums.sum(axis=1), counts.sum(axis=1)
    every, every_counts = total @ total.T, np.outer(number, number)
    return (
        estimate_between_fields(np.asarray(same), same_counts, draws),
        estimate_between_fields(every - same, every_counts - same_counts, draws),
    )


def _against_mean(single: Views, mean: Views, draws: Floats) -> tuple[Estimate, Estimate]:
    """Single channels against the mean view: of one location, and of other fields."""
    row_of = {location: row for row, location in enumerate(mean.location.tolist())}
    sums, counts = np.zeros(single.num_fields), np.zeros(single.num_fields)
    for row, location in enumerate(single.location.tolist()):
        if location in row_of:
            sums[single.field[row]] += single.features[row] @ mean.features[row_of[location]]
            counts[single.field[row]] += 1
    within = estimate_by_field(sums, counts, draws)
    single_sums, single_counts = _sums_by_field(single)
    mean_sums, mean_counts = _sums_by_field(mean)
    table = single_sums.sum(axis=1) @ mean_sums.sum(axis=1).T
    number = np.outer(single_counts.sum(axis=1), mean_counts.sum(axis=1))
    return within, estimate_between_fields(table, number, draws)


def _pairs(
    left: Views, right: Views, left_channel: int, right_channel: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the locations that both channels see, in one order."""
    rows_left = np.flatnonzero(left.channel == left_channel)
    rows_right = np.flatnonzero(right.channel == right_channel)
    _, first, second = np.intersect1d(
        left.location[rows_left], right.location[rows_right], return_indices=True
    )
    return rows_left[first], rows_right[second]


def _retrieval(queries: Views, gallery: Views, draws: Floats) -> tuple[Estimate, Floats]:
    """Top-1 over all ordered pairs of two different channels, and its table by channel."""
    size = len(queries.names)
    sums, counts, chances = (np.zeros(queries.num_fields) for _ in range(3))
    table = np.full((size + 1, size + 1), np.nan)
    for asked, answering in product(np.unique(queries.channel), np.unique(gallery.channel)):
        rows, right_rows = _pairs(queries, gallery, int(asked), int(answering))
        if asked == answering or not len(rows):
            continue
        candidates = np.flatnonzero(gallery.channel == answering)
        right = np.searchsorted(candidates, right_rows)
        answers = gallery.features[candidates].T
        starts = range(0, len(rows), _QUERIES_AT_ONCE)
        parts = [slice(start, start + _QUERIES_AT_ONCE) for start in starts]
        asking = queries.features[rows]
        credit = np.concatenate([retrieval_credit(asking[p] @ answers, right[p]) for p in parts])
        np.add.at(sums, queries.field[rows], credit)
        np.add.at(counts, queries.field[rows], 1.0)
        np.add.at(chances, queries.field[rows], 1.0 / len(candidates))
        table[asked, answering] = credit.mean()
    return estimate_by_field(sums, counts, draws, chances), table[:size, :size]
