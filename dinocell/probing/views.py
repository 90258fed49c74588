"""Views as the consistency score counts them: fields, locations and channels as numbers.

A *view* is one window of one field seen through one channel; a *location* is that window.  Sums are
kept per field, because the 95 % intervals draw whole fields: windows of one field are not independent.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MEAN_VIEW = "mean"
"""The name of the view that is no single channel but the mean of them."""


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval from fields drawn again, and the value of features that know nothing.

    nan stands for what does not exist or cannot be known, for example between fields if there is one.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan


@dataclass(frozen=True)
class Views:
    """(M, D) features of M views, with field, location and channel of each as numbers from 0.

    `names` are the channels in the order of their numbers, without the mean view, which comes next.
    """

    features: Floats
    field: NDArray[np.intp]
    location: NDArray[np.intp]
    channel: NDArray[np.intp]
    names: tuple[str, ...]
    num_fields: int

    @property
    def mean_channel(self) -> int:
        return len(self.names)

    @classmethod
    def checked(cls, features: Any, fields: Any, locations: Any, channels: Any) -> Self:
        """From arguments as those of `channel_consistency`, which says what is raised."""
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
                "A location must have each channel once, got one twice: number the windows of all "
                "fields differently"
            )
        if len(np.unique(location * len(field_names) + field)) > len(np.unique(location)):
            raise ValueError(
                "A location must lie in one field, got one in two: number the windows of all "
                "fields differently"
            )
        return cls(matrix, field, location, channel, tuple(order), len(field_names))

    def where(self, kept: NDArray[np.bool_]) -> Self:
        names = ("features", "field", "location", "channel")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def rows_by_location(self) -> list[NDArray[np.intp]]:
        """The rows of each location, in the order of their first one."""
        rows: dict[int, list[int]] = {}
        for row, location in enumerate(self.location.tolist()):
            rows.setdefault(location, []).append(row)
        return [np.array(found) for found in rows.values()]


def unit_rows(matrix: Floats) -> Floats:
    """Rows scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    return matrix / np.where(norms > 0, norms, 1.0)


def draw_fields(num_fields: int, num_bootstrap: int, seed: int) -> Floats:
    """(num_bootstrap, F): how often each field is drawn."""
    if num_fields < 2 or num_bootstrap < 1:
        return np.zeros((0, num_fields))
    rng = np.random.default_rng([seed, 1])
    shares = np.full(num_fields, 1 / num_fields)
    return rng.multinomial(num_fields, shares, size=num_bootstrap).astype(np.float64)


def estimate_by_field(
    sums: Floats, counts: Floats, draws: Floats, chances: Floats | None = None
) -> Estimate:
    """Sum over counts, both per field, with fields drawn again."""
    value = float(_ratio(sums.sum(), counts.sum()))
    low, high = _interval(_ratio(draws @ sums, draws @ counts))
    chance = math.nan if chances is None else float(_ratio(chances.sum(), counts.sum()))
    return Estimate(value, low, high, chance)


def estimate_between_fields(sums: Floats, counts: Floats, draws: Floats) -> Estimate:
    """As `estimate_by_field` for (F, F) tables of pairs; a field is no partner of its own copy."""
    sums, counts = sums.copy(), counts.copy()
    np.fill_diagonal(sums, 0.0)
    np.fill_diagonal(counts, 0.0)
    value = float(_ratio(sums.sum(), counts.sum()))
    low, high = _interval(
        _ratio(((draws @ sums) * draws).sum(axis=1), ((draws @ counts) * draws).sum(axis=1))
    )
    return Estimate(value, low, high)


def _interval(values: Floats) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _ratio(sums: Any, counts: Any) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums, dtype=np.float64) / np.asarray(counts, dtype=np.float64)
