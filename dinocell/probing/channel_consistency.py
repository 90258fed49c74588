"""Do the features of one place look alike through every channel, and are they still useful?

The cosine between channels alone is fooled by collapse: constant features score 1.  The score here
is therefore a row of numbers that are read together (docs/inspect.md), each beside the value that
chance gives: cosine within and between fields, retrieval of a place through another channel, effective
rank, spread, agreement of the attention maps, and how well the channel can still be decoded.
Features that know the field, its illumination or a blurred layout alone also score well; retrieval
within the field and among turned windows, and `shortcuts.py`, tell them apart.

The view called ``mean`` is the mean of the channels and is compared with the single channels apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.probing.shortcuts import explained_share, found_warnings
from dinocell.probing.views import (
    Estimate,
    Floats,
    Views,
    draw_fields,
    estimate_between_fields,
    estimate_by_field,
    unit_rows,
)

_QUERIES_AT_ONCE = 1024
# Two similarities nearer than this are a tie.  Rounding of float32 features moves a cosine near 1 by
# about 1e-12, so that collapsed features tie whatever their last bits are.
_TIE = 1e-9
# Below this, a coordinate of a feature of length 1 is rounding and not variation.
_ROUNDING = 1e-7
_RIDGE = 0.1
_NUM_FOLDS = 10
# Variation of float32 features below this share of their size is rounding.
_RELATIVE_ROUNDING = 1e-6


@dataclass(frozen=True)
class ConsistencyReport:
    """The score of one kind of feature; the numbers of views do not count mean views."""

    num_fields: int
    num_locations: int
    num_views: int
    embed_dim: int  # numbers per feature; an effective rank is at most this and `num_views`
    channels: tuple[str, ...]
    # cosine_same_field (one location through two channels), cosine_other_place (two locations of one
    # field through two channels), cosine_other_field_same_channel,
    # cosine_other_field_other_channel, retrieval_within_field, retrieval_top1, effective_rank, effective_rank_centered,
    # feature_std, channel_decodability; with mean views mean_view_cosine_same_field,
    # mean_view_cosine_other_field, mean_view_retrieval_top1; with attention maps
    # attention_same_field, attention_other_field
    estimates: dict[str, Estimate]
    # (C, C) mean cosine of one location through two channels; 1 on the diagonal, nan for channels
    # that never meet
    cosine_by_channel: Floats
    # (C, C) from the channel of the row to that of the column; nan on the diagonal
    retrieval_by_channel: Floats

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def warnings(self) -> list[str]:
        """Sentences on what the numbers do not allow to be claimed."""
        return found_warnings(self.estimates, self.num_fields)

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        return for_json(self) | {"warnings": self.warnings()}


@dataclass(frozen=True)
class Suspicions:
    """Features of the same views after a turn or a mirroring (M, D), and numbers of each view (M, k), by
    name, that should not explain the features."""

    turned: ArrayLike
    shortcuts: Mapping[str, ArrayLike] = field(default_factory=dict)


def for_json(value: Any) -> Any:
    """Plain values of dataclasses, arrays and containers; null for numbers that are not finite."""
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [for_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def channel_consistency(
    features: ArrayLike,
    fields: Sequence[Any] | NDArray[Any],
    locations: Sequence[Any] | NDArray[Any],
    channels: Sequence[str] | NDArray[Any],
    *,
    attention: ArrayLike | None = None,
    suspicions: Suspicions | None = None,
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
    suspicions : what tells features that know places from features that know less, optional
    num_bootstrap : draws of fields with replacement for the 95 % intervals; 0 leaves them out
    seed : of these draws and of the folds of the decoder

    Raises ValueError (the shapes do not fit, values are not finite, a location has a channel twice
    or lies in two fields, or no location has two channels).

    Notes
    -----
    Cosines are means over pairs; each pair counts once.  `retrieval_top1`: a view of channel a asks
    among all views of channel b for its own location; of k equal best answers 1/k counts, so
    constant features score 1/N and not 1.  `retrieval_within_field` and `retrieval_turned` ask among the
    windows of the own field only, the latter among turned ones.  The intervals draw fields, not views, because windows of
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
            "Some location must be seen through two channels, got one channel each: choose fields "
            "with several channels"
        )

    single = replace(raw, features=unit_rows(raw.features))
    retrieval, retrieval_matrix = _retrieval(single, single, draws)
    estimates = _estimates(raw, single, retrieval, draws)
    if suspicions is not None:
        moved = Views.checked(suspicions.turned, fields, locations, channels).where(~is_mean)
        moved = replace(moved, features=unit_rows(moved.features))
        estimates["retrieval_turned"] = _retrieval(single, moved, draws, within=True)[0]
        for name, numbers in suspicions.shortcuts.items():
            share = explained_share(single, np.asarray(numbers, dtype=np.float64)[~is_mean])
            estimates[f"explained_by_{name}"] = Estimate(share)
    estimates["channel_decodability"] = decode_channels(single, draws, seed)
    if is_mean.any():
        estimates |= _with_mean_views(single, views.where(is_mean), draws)
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
        "cosine_other_place": _other_places(single, draws),
        "cosine_other_field_same_channel": same,
        "cosine_other_field_other_channel": other,
        "retrieval_within_field": _retrieval(single, single, draws, within=True)[0],
        "retrieval_top1": retrieval,
        "effective_rank": Estimate(effective_rank(raw.features)),
        "effective_rank_centered": Estimate(effective_rank(raw.features, centered=True)),
        "feature_std": Estimate(feature_std(raw.features)),
    }


def _with_mean_views(single: Views, mean: Views, draws: Floats) -> dict[str, Estimate]:
    mean = replace(mean, features=unit_rows(mean.features))
    within, between = _against_mean(single, mean, draws)
    return {
        "mean_view_cosine_same_field": within,
        "mean_view_cosine_other_field": between,
        "mean_view_retrieval_top1": _retrieval(single, mean, draws)[0],
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


def _other_places(views: Views, draws: Floats) -> Estimate:
    """Pairs of two places of one field through two channels."""
    sums, counts = np.zeros(views.num_fields), np.zeros(views.num_fields)
    for number in range(views.num_fields):
        rows = np.flatnonzero(views.field == number)
        place, channel = views.location[rows], views.channel[rows]
        apart = (place[:, None] != place) & (channel[:, None] != channel)
        products = views.features[rows] @ views.features[rows].T
        sums[number], counts[number] = products[apart].sum(), apart.sum()
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


def _retrieval(
    queries: Views, gallery: Views, draws: Floats, *, within: bool = False
) -> tuple[Estimate, Floats]:
    """Top-1 over all ordered pairs of two different channels, and its table by channel.

    `within`: only the windows of the same field are in the gallery; a field with one is left out.
    """
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
        own, theirs = queries.field[rows], gallery.field[candidates]
        credits, sizes = [], []
        for part in parts:
            alike = asking[part] @ answers
            open_to = own[part, None] == theirs if within else np.ones(alike.shape, dtype=bool)
            credits.append(retrieval_credit(np.where(open_to, alike, -np.inf), right[part]))
            sizes.append(open_to.sum(axis=1))
        credit, size_of = np.concatenate(credits), np.concatenate(sizes)
        kept = size_of > 1
        np.add.at(sums, own[kept], credit[kept])
        np.add.at(counts, own[kept], 1.0)
        np.add.at(chances, own[kept], 1.0 / size_of[kept])
        table[asked, answering] = credit.mean()
    return estimate_by_field(sums, counts, draws, chances), table[:size, :size]


def decode_channels(views: Views, draws: Floats, seed: int) -> Estimate:
    """How often a linear probe names the channel of a view in a field it was not fitted on.

    `views`: of single channels, with features of length 1.  `draws`: from `draw_fields`.  Returns
    Estimate: mean over locations of the share of their views named right, choosing among the
    channels of that location, so that the kind of field gives nothing away; `chance` is the mean of
    1 / channels.  Where all locations have all C channels this is the balanced accuracy with chance
    1/C.  nan with fewer than two fields, or without two channels that several fields share.

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


def effective_rank(features: ArrayLike, *, centered: bool = False) -> float:
    """exp of the entropy of the singular values of (M, D) features, scaled to sum to 1.

    In [1, min(M, D)].  `centered` subtracts the mean row first, to see directions of variation only; 0 if
    then nothing but rounding varies, and for features that are all zero.

    Roy & Vetterli, The effective rank, EUSIPCO 2007, eq. 4.
    """
    matrix = np.asarray(features, dtype=np.float64)
    size = float(np.linalg.norm(matrix))
    if centered:
        matrix = matrix - matrix.mean(axis=0, keepdims=True)
    if float(np.linalg.norm(matrix)) <= _RELATIVE_ROUNDING * size:
        return 0.0
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: ArrayLike) -> float:
    """Spread of the directions of features: 0 collapsed, near 1 for directions drawn at random.

    √D times the mean over coordinates of the standard deviation of rows scaled to length 1 (Chen &
    He, SimSiam, 2021, section 4.1, whose value is this over √D).
    """
    unit = unit_rows(np.asarray(features, dtype=np.float64))
    return float(unit.std(axis=0).mean() * math.sqrt(unit.shape[1]))


def standardize_attention(attention: ArrayLike) -> NDArray[np.float64]:
    """(M, heads, N) maps → (M, heads·N) rows whose dot product is their correlation, mean over heads.

    A map without structure becomes zeros: it agrees with nothing, not with everything.  Raises
    ValueError (not three axes).
    """
    maps = np.asarray(attention, dtype=np.float64)
    if maps.ndim != 3:
        raise ValueError(
            f"`attention` must be (M, heads, N), got shape {maps.shape}: keep the row of CLS and "
            "the columns of the patches"
        )
    level = np.abs(maps).max(axis=2, keepdims=True, initial=0.0)
    maps = maps - maps.mean(axis=2, keepdims=True)
    norms = np.linalg.norm(maps, axis=2, keepdims=True)
    flat = norms <= _RELATIVE_ROUNDING * level * math.sqrt(maps.shape[2])
    maps = np.where(flat, 0.0, maps / np.where(flat, 1.0, norms))
    return (maps / math.sqrt(maps.shape[1])).reshape(len(maps), -1)
