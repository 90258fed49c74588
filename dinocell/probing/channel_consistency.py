"""Do the features of one place look alike through every channel, and are they still worth having?

The cosine between channels alone is fooled by collapse: constant features score 1.  The score here
is therefore a row of numbers that are read together (DESIGN.md 4), each beside the value that chance
gives: cosine within and between fields, retrieval of a place through another channel, effective
rank, spread, agreement of the attention maps, and how well the channel can still be decoded.

A *view* is one window of one field seen through one channel; a *location* is that window.  The view
called ``mean`` is the mean of the channels and is compared with the single channels apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "MEAN_VIEW",
    "ConsistencyReport",
    "Estimate",
    "channel_consistency",
    "channel_decodability",
    "effective_rank",
    "feature_std",
    "retrieval_credit",
    "standardize_attention",
]

MEAN_VIEW = "mean"
"""The name of the view that is no single channel but the mean of them."""

# Two similarities nearer than this are a tie.  Rounding of float32 features moves a cosine near 1 by
# about 1e-12, so that collapsed features tie whatever their last bits are.
_TIE = 1e-9
# Below this, a coordinate of a feature of length 1 is rounding and not variation.
_ROUNDING = 1e-7
# Variation of float32 features below this share of their size is rounding too.
_RELATIVE_ROUNDING = 1e-6
_QUERIES_AT_ONCE = 1024
_RIDGE = 0.1
_NUM_FOLDS = 10


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval from fields drawn again, and what chance gives.

    Attributes
    ----------
    value : float
        nan where the data cannot tell, for example between fields when there is one.
    low, high : float
        Bounds of the interval; nan where there is none.
    chance : float
        Value of features that know nothing; nan where there is no such value.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan

    def to_mapping(self) -> dict[str, float | None]:
        """The four numbers for JSON, nan as null."""
        return {name: _or_none(getattr(self, name)) for name in ("value", "low", "high", "chance")}


@dataclass(frozen=True)
class ConsistencyReport:
    """The score of one kind of feature.

    Attributes
    ----------
    num_fields, num_locations, num_views : int
        What it was measured on, mean views not counted.
    embed_dim : int
        Numbers per feature; an effective rank is at most this and at most `num_views`.
    channels : tuple of str
    estimates : dict of Estimate
        ``cosine_same_field`` (one location through two channels),
        ``cosine_other_field_same_channel``, ``cosine_other_field_other_channel``,
        ``retrieval_top1``, ``effective_rank``, ``effective_rank_centered``, ``feature_std``,
        ``channel_decodability``; with mean views ``mean_view_cosine_same_field``,
        ``mean_view_cosine_other_field``, ``mean_view_retrieval_top1``; with attention maps
        ``attention_same_field``, ``attention_other_field``.
    cosine_by_channel : (C, C) float64 ndarray
        Mean cosine of one location through two channels; 1 on the diagonal, nan for channels that
        never meet.
    retrieval_by_channel : (C, C) float64 ndarray
        Retrieval from the channel of the row to that of the column; nan on the diagonal.
    """

    num_fields: int
    num_locations: int
    num_views: int
    embed_dim: int
    channels: tuple[str, ...]
    estimates: dict[str, Estimate]
    cosine_by_channel: NDArray[np.float64]
    retrieval_by_channel: NDArray[np.float64]

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def warnings(self) -> list[str]:
        """Sentences on what the numbers do not allow to be claimed."""
        found = []
        cosine, other = (
            self.estimates[name].value
            for name in ("cosine_same_field", "cosine_other_field_other_channel")
        )
        if math.isnan(other):
            found.append("one field only: nothing can be said about different fields")
        elif cosine - other < 0.05:
            found.append(
                f"different fields are nearly as alike ({other:.3f}) as channels of one field "
                f"({cosine:.3f}): the cosine says little here"
            )
        retrieval = self.estimates["retrieval_top1"]
        if not math.isnan(retrieval.low) and retrieval.low <= retrieval.chance:
            found.append("retrieval is not better than chance")
        if self.estimates["effective_rank_centered"].value < 2:
            found.append("the features vary along fewer than two directions: collapsed")
        if self.num_fields < 20:
            found.append(f"{self.num_fields} fields: the intervals are rough")
        return found

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        return {
            "num_fields": self.num_fields,
            "num_locations": self.num_locations,
            "num_views": self.num_views,
            "embed_dim": self.embed_dim,
            "channels": list(self.channels),
            "estimates": {name: item.to_mapping() for name, item in self.estimates.items()},
            "cosine_by_channel": _nested(self.cosine_by_channel),
            "retrieval_by_channel": _nested(self.retrieval_by_channel),
            "warnings": self.warnings(),
        }


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
    features : (M, D) array of float
        One row per view, for example CLS tokens; finite.  Their length does not matter for cosine,
        retrieval, spread and decoding.
    fields, locations, channels : M items each
        Where each view comes from.  A location lies in one field and has a channel at most once;
        channels may be missing.  Views of channel `MEAN_VIEW` are means of channels.
    attention : (M, heads, N) array, optional
        Attention of CLS to the patches, in the order of `features`.
    num_bootstrap : int
        Draws of fields with replacement for the 95 % intervals; 0 leaves them out.
    seed : int
        Of these draws and of the folds of the decoder.

    Returns
    -------
    ConsistencyReport

    Raises
    ------
    ValueError
        The shapes do not fit, values are not finite, a location has a channel twice or lies in two
        fields, or no location has two channels.

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
    views = _Views.checked(features, fields, locations, channels)
    single = views.where(views.channel != views.mean_channel)
    mean = views.where(views.channel == views.mean_channel)
    draws = _draws(views.num_fields, num_bootstrap, seed)
    if not any(len(rows) > 1 for rows in single.rows_by_location().values()):
        raise ValueError(
            "some location must be seen through two channels, got one channel each: choose fields "
            "with several channels"
        )

    estimates: dict[str, Estimate] = {}
    unit = _unit_rows(single.features)
    estimates["cosine_same_field"] = _same_location(single, unit, draws)
    same, other = _other_fields(single, unit, draws)
    estimates["cosine_other_field_same_channel"] = same
    estimates["cosine_other_field_other_channel"] = other
    retrieval, retrieval_matrix = _retrieval(single, single, unit, unit, draws)
    estimates["retrieval_top1"] = retrieval
    estimates["effective_rank"] = Estimate(effective_rank(single.features))
    estimates["effective_rank_centered"] = Estimate(effective_rank(single.features, centered=True))
    estimates["feature_std"] = Estimate(feature_std(single.features))
    estimates["channel_decodability"] = _decodability(single, unit, draws, seed)
    if len(mean.features):
        unit_mean = _unit_rows(mean.features)
        within, between = _against_mean(single, mean, unit, unit_mean, draws)
        estimates["mean_view_cosine_same_field"] = within
        estimates["mean_view_cosine_other_field"] = between
        found, _ = _retrieval(single, mean, unit, unit_mean, draws)
        estimates["mean_view_retrieval_top1"] = found
    if attention is not None:
        maps = standardize_attention(attention)
        if len(maps) != len(views.features):
            raise ValueError(
                f"`attention` must have a map per view ({len(views.features)}), got {len(maps)}: "
                "give them in the order of the features"
            )
        maps = maps[views.channel != views.mean_channel]
        estimates["attention_same_field"] = _same_location(single, maps, draws)
        # Unlike a feature, a map of another channel and field is the fair comparison: it shares
        # only what every map of this network shares.
        estimates["attention_other_field"] = _other_fields(single, maps, draws)[1]

    names = single.names
    cosine_matrix = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(cosine_matrix, 1.0)
    for first in range(len(names)):
        for second in range(first):
            left, right = _pairs(single, single, first, second)
            if len(left):
                value = float(np.einsum("nd,nd->n", unit[left], unit[right]).mean())
                cosine_matrix[first, second] = cosine_matrix[second, first] = value
    return ConsistencyReport(
        num_fields=views.num_fields,
        num_locations=len(single.rows_by_location()),
        num_views=len(single.features),
        embed_dim=single.features.shape[1],
        channels=names,
        estimates=estimates,
        cosine_by_channel=cosine_matrix,
        retrieval_by_channel=retrieval_matrix,
    )


def effective_rank(features: ArrayLike, *, centered: bool = False) -> float:
    """exp of the entropy of the singular values that are scaled to sum to 1.

    Parameters
    ----------
    features : (M, D) array of float
    centered : bool
        Subtract the mean row first: directions of variation only.

    Returns
    -------
    float in [1, min(M, D)]
        0 with `centered` when nothing but rounding varies, and for features that are all zero.

    References
    ----------
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
    unit = _unit_rows(np.asarray(features, dtype=np.float64))
    return float(unit.std(axis=0).mean() * math.sqrt(unit.shape[1]))


def standardize_attention(attention: ArrayLike) -> NDArray[np.float64]:
    """Maps → rows whose dot product is the correlation of two maps, averaged over heads.

    Parameters
    ----------
    attention : (M, heads, N) array of float

    Returns
    -------
    (M, heads·N) float64 ndarray
        A map without structure becomes zeros: it agrees with nothing, not with everything.

    Raises
    ------
    ValueError
        Not three axes.
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


def retrieval_credit(similarities: NDArray[np.float64], right: NDArray[np.intp]) -> NDArray:
    """Top-1 of each row: 1, 0, or 1/k where the right answer is one of k equal best ones.

    Parameters
    ----------
    similarities : (Q, N) float64 ndarray
    right : (Q,) integer ndarray
        Column of the right answer.

    Returns
    -------
    (Q,) float64 ndarray
        Equal means within 1e-9; the mean over random order of the ties.
    """
    true = similarities[np.arange(len(right)), right][:, None]
    beaten = (similarities > true + _TIE).any(axis=1)
    ties = (similarities >= true - _TIE).sum(axis=1)
    return np.where(beaten, 0.0, 1.0 / ties)


def channel_decodability(
    features: ArrayLike,
    fields: NDArray[Any],
    locations: NDArray[Any],
    channels: NDArray[Any],
    *,
    seed: int = 0,
) -> Estimate:
    """How often a linear probe names the channel of a view in a field it was not fitted on.

    Parameters and errors as `channel_consistency`.

    Returns
    -------
    Estimate
        Mean over locations of the share of their views named right, choosing among the channels of
        that location, so that the kind of field gives nothing away; `chance` is the mean of
        1 / channels.  Where all locations have all C channels this is the balanced accuracy with
        chance 1/C.  nan with fewer than two fields, or without two channels that several fields
        share.

    Notes
    -----
    Ridge regression on standardised features of length 1 to one-hot channels, channels weighted
    alike; folds by field (leave one field out up to ten fields, then ten folds).
    """
    views = _Views.checked(features, fields, locations, channels)
    single = views.where(views.channel != views.mean_channel)
    return _decodability(single, _unit_rows(single.features), _draws(0, 0, seed), seed)


# ------------------------------------------------------------------------------------- internals


@dataclass(frozen=True)
class _Views:
    """Features with field, location and channel as numbers from 0."""

    features: NDArray[np.float64]
    field: NDArray[np.intp]
    location: NDArray[np.intp]
    channel: NDArray[np.intp]
    names: tuple[str, ...]
    num_fields: int
    mean_channel: int

    @classmethod
    def checked(cls, features: Any, fields: Any, locations: Any, channels: Any) -> _Views:
        matrix = np.asarray(features, dtype=np.float64)
        lengths = {len(fields), len(locations), len(channels)}
        if matrix.ndim != 2 or lengths != {len(matrix)} or matrix.size == 0:
            raise ValueError(
                f"`features` must be (M, D) with a field, location and channel per row, got shape "
                f"{matrix.shape} with {len(fields)}, {len(locations)} and {len(channels)}: give one "
                "of each per view"
            )
        if not np.isfinite(matrix).all():
            raise ValueError(
                "`features` must be finite, got NaN or infinite values: the network or its weights "
                "are damaged"
            )
        field_names, field = np.unique(np.asarray(fields), return_inverse=True)
        _, location = np.unique(np.asarray(locations), return_inverse=True)
        # Channels in the order of their first appearance, the mean view last.
        order = [name for name in dict.fromkeys(map(str, channels)) if name != MEAN_VIEW]
        number = {name: index for index, name in enumerate([*order, MEAN_VIEW])}
        channel = np.array([number[str(name)] for name in channels])
        if len(np.unique(location * len(number) + channel)) < len(channel):
            raise ValueError(
                "a location must have each channel once, got one twice: number the windows of all "
                "fields differently"
            )
        if len(np.unique(location * len(field_names) + field)) > len(np.unique(location)):
            raise ValueError(
                "a location must lie in one field, got one in two: number the windows of all "
                "fields differently"
            )
        return cls(matrix, field, location, channel, tuple(order), len(field_names), len(order))

    def where(self, kept: NDArray[np.bool_]) -> _Views:
        return _Views(
            self.features[kept],
            self.field[kept],
            self.location[kept],
            self.channel[kept],
            self.names,
            self.num_fields,
            self.mean_channel,
        )

    def rows_by_location(self) -> dict[int, list[int]]:
        rows: dict[int, list[int]] = {}
        for row, location in enumerate(self.location.tolist()):
            rows.setdefault(location, []).append(row)
        return rows


def _unit_rows(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms > 0, norms, 1.0)


def _draws(num_fields: int, num_bootstrap: int, seed: int) -> NDArray[np.float64]:
    """(num_bootstrap, F): how often each field is drawn."""
    if num_fields < 2 or num_bootstrap < 1:
        return np.zeros((0, num_fields))
    rng = np.random.default_rng([seed, 1])
    shares = np.full(num_fields, 1 / num_fields)
    return rng.multinomial(num_fields, shares, size=num_bootstrap).astype(np.float64)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _ratio(sums: Any, counts: Any) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums, dtype=np.float64) / np.asarray(counts, dtype=np.float64)


def _by_field(
    sums: NDArray[np.float64],
    counts: NDArray[np.float64],
    draws: NDArray[np.float64],
    chances: NDArray[np.float64] | None = None,
) -> Estimate:
    """Sum over counts, both per field, with fields drawn again."""
    value = float(_ratio(sums.sum(), counts.sum()))
    low, high = _interval(_ratio(draws @ sums, draws @ counts)) if len(draws) else (math.nan,) * 2
    chance = math.nan if chances is None else float(_ratio(chances.sum(), counts.sum()))
    return Estimate(value, low, high, chance)


def _between_fields(
    sums: NDArray[np.float64], counts: NDArray[np.float64], draws: NDArray[np.float64]
) -> Estimate:
    """As `_by_field` for (F, F) tables of pairs; a field is no partner of its own copy."""
    sums, counts = sums.copy(), counts.copy()
    np.fill_diagonal(sums, 0.0)
    np.fill_diagonal(counts, 0.0)
    value = float(_ratio(sums.sum(), counts.sum()))
    low, high = math.nan, math.nan
    if len(draws):
        low, high = _interval(
            _ratio(((draws @ sums) * draws).sum(axis=1), ((draws @ counts) * draws).sum(axis=1))
        )
    return Estimate(value, low, high)


def _same_location(
    views: _Views, unit: NDArray[np.float64], draws: NDArray[np.float64]
) -> Estimate:
    sums, counts = np.zeros(views.num_fields), np.zeros(views.num_fields)
    for rows in views.rows_by_location().values():
        if len(rows) < 2:
            continue
        block = unit[rows] @ unit[rows].T
        above = np.triu_indices(len(rows), k=1)
        field = views.field[rows[0]]
        sums[field] += block[above].sum()
        counts[field] += len(above[0])
    return _by_field(sums, counts, draws)


def _sums_by_field(views: _Views, unit: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Sum of the rows of every (field, channel) (F, C, D) and their number (F, C)."""
    num_channels = int(views.channel.max(initial=0)) + 1
    sums = np.zeros((views.num_fields, num_channels, unit.shape[1]))
    counts = np.zeros((views.num_fields, num_channels))
    np.add.at(sums, (views.field, views.channel), unit)
    np.add.at(counts, (views.field, views.channel), 1.0)
    return sums, counts


def _other_fields(
    views: _Views, unit: NDArray[np.float64], draws: NDArray[np.float64]
) -> tuple[Estimate, Estimate]:
    """Pairs from two fields: of one channel, and of two.

    The sum of all dot products of two groups is the dot product of their sums, so no matrix of all
    pairs is needed.
    """
    sums, counts = _sums_by_field(views, unit)
    same = sum(sums[:, c] @ sums[:, c].T for c in range(sums.shape[1]))
    same_counts = counts @ counts.T
    total = sums.sum(axis=1)
    number = counts.sum(axis=1)
    every, every_counts = total @ total.T, np.outer(number, number)
    return (
        _between_fields(np.asarray(same), same_counts, draws),
        _between_fields(every - same, every_counts - same_counts, draws),
    )


def _against_mean(
    single: _Views,
    mean: _Views,
    unit: NDArray[np.float64],
    unit_mean: NDArray[np.float64],
    draws: NDArray[np.float64],
) -> tuple[Estimate, Estimate]:
    """Single channels against the mean view: of one location, and of other fields."""
    row_of = {location: row for row, location in enumerate(mean.location.tolist())}
    sums, counts = np.zeros(single.num_fields), np.zeros(single.num_fields)
    for row, location in enumerate(single.location.tolist()):
        if location in row_of:
            sums[single.field[row]] += unit[row] @ unit_mean[row_of[location]]
            counts[single.field[row]] += 1
    within = _by_field(sums, counts, draws)
    single_sums, single_counts = _sums_by_field(single, unit)
    mean_sums, mean_counts = _sums_by_field(mean, unit_mean)
    table = single_sums.sum(axis=1) @ mean_sums.sum(axis=1).T
    number = np.outer(single_counts.sum(axis=1), mean_counts.sum(axis=1))
    return within, _between_fields(table, number, draws)


def _pairs(
    left: _Views, right: _Views, left_channel: int, right_channel: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the locations that both channels see, in one order."""
    rows_left = np.flatnonzero(left.channel == left_channel)
    rows_right = np.flatnonzero(right.channel == right_channel)
    _, first, second = np.intersect1d(
        left.location[rows_left], right.location[rows_right], return_indices=True
    )
    return rows_left[first], rows_right[second]


def _retrieval(
    queries: _Views,
    gallery: _Views,
    unit_queries: NDArray[np.float64],
    unit_gallery: NDArray[np.float64],
    draws: NDArray[np.float64],
) -> tuple[Estimate, NDArray[np.float64]]:
    """Top-1 over all ordered pairs of two different channels, and its table by channel."""
    num_channels = len(queries.names) + 1
    sums, counts, chances = (np.zeros(queries.num_fields) for _ in range(3))
    table = np.full((num_channels, num_channels), np.nan)
    for asked in np.unique(queries.channel):
        for answering in np.unique(gallery.channel):
            if asked == answering:
                continue
            rows, right_rows = _pairs(queries, gallery, int(asked), int(answering))
            if not len(rows):
                continue
            candidates = np.flatnonzero(gallery.channel == answering)
            right = np.searchsorted(candidates, right_rows)
            credit = np.concatenate(
                [
                    retrieval_credit(
                        unit_queries[rows[start : start + _QUERIES_AT_ONCE]]
                        @ unit_gallery[candidates].T,
                        right[start : start + _QUERIES_AT_ONCE],
                    )
                    for start in range(0, len(rows), _QUERIES_AT_ONCE)
                ]
            )
            np.add.at(sums, queries.field[rows], credit)
            np.add.at(counts, queries.field[rows], 1.0)
            np.add.at(chances, queries.field[rows], 1.0 / len(candidates))
            table[asked, answering] = credit.mean()
    size = len(queries.names)
    return _by_field(sums, counts, draws, chances), table[:size, :size]


def _decodability(
    views: _Views, unit: NDArray[np.float64], draws: NDArray[np.float64], seed: int
) -> Estimate:
    seen_in = np.zeros((views.num_fields, len(views.names)), dtype=bool)
    seen_in[views.field, views.channel] = True
    usable = seen_in.sum(axis=0) >= 2  # a channel of one field is unknown when that is held out
    kept = np.flatnonzero(usable[views.channel])
    if usable.sum() < 2 or not len(kept):
        return Estimate(math.nan)
    order = np.random.default_rng([seed, 2]).permutation(views.num_fields)
    fold_of_field = np.empty(views.num_fields, dtype=np.intp)
    fold_of_field[order] = np.arange(views.num_fields) % min(views.num_fields, _NUM_FOLDS)
    fold = fold_of_field[views.field[kept]]
    channel = views.channel[kept]
    scores = np.full((len(kept), len(views.names)), -np.inf)
    for held_out in np.unique(fold):
        train, test = fold != held_out, fold == held_out
        known = np.unique(channel[train])
        if not len(known):
            continue
        fitted = _ridge_scores(unit[kept[train]], channel[train], unit[kept[test]], known)
        scores[np.ix_(test, known)] = fitted

    sums, counts, chances = (np.zeros(views.num_fields) for _ in range(3))
    rows_at: dict[int, list[int]] = {}
    for row, location in enumerate(views.location[kept].tolist()):
        rows_at.setdefault(location, []).append(row)
    for found in rows_at.values():
        rows = np.array(found)
        present = channel[rows]
        answers = scores[np.ix_(rows, present)]  # choose among the channels of this location
        if len(rows) < 2 or not np.isfinite(answers).all():
            continue
        field = views.field[kept[rows[0]]]
        sums[field] += retrieval_credit(answers, np.arange(len(rows))).mean()
        counts[field] += 1
        chances[field] += 1 / len(rows)
    return _by_field(sums, counts, draws, chances)


def _ridge_scores(
    train: NDArray[np.float64],
    train_channel: NDArray[np.intp],
    test: NDArray[np.float64],
    known: NDArray[np.intp],
) -> NDArray[np.float64]:
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


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _nested(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    return [[_or_none(value) for value in row] for row in matrix]
