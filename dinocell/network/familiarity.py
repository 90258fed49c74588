"""Does an image look like those that a model was trained on?

A network answers on any image, also on one of a kind that it has never seen.  Two things tell the
kinds apart: the features of the network (`DINOCell.map_and_features`), whose mean over the patches
without cells is alike in all images of one kind (background, noise, optics); and five simple
measures of the image and of the map, because where a network does not know what it sees, its map is
neither 0 nor 1.  A model carries both for up to 200 training images of each data set.  An image is
flagged if its distance from the third nearest of them exceeds a limit, for each data set.  What an
image resembles also says which thresholds suit it: the distance maps of tissue have lower peaks
than those of nuclei in a culture.

This is the nearest-neighbour distance of Sun et al., "Out-of-distribution detection with deep nearest
neighbors", ICML 2022, without their normalisation of features.  It asks for no shape of the cloud of
training images, which often has several parts (a data set mixes laboratories).  The third nearest
counts because one training image may be odd, and because data sets hold cut-outs of one field in
pairs.  Each measure is scaled to the spread of the features along their widest direction, so that
none of the two drowns the other.  Files of earlier versions hold mean and covariance in place of the
images (`TrainingStatistics`).

The limit comes from the distances of the training images from each other (`fit_statistics`).  The
features are computed anyway; collecting them adds sums over patches.

A field without signal, in which the network sees no cell, has nothing but noise to compare.  It is not
flagged, unless the noise fills so much of the range of the data type that no camera has made it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from dinocell.errors import CheckpointError

_NEIGHBOR = 3  # whose distance counts, the nearest being 1
_MIN_IMAGES = 10
_ODD = 40  # one image in so many is left out
_QUANTILE = 0.95  # of the distances of training images: a few odd ones do not set the limit
_MARGIN = 1.6  # chosen on validation images and half of the foreign ones: benchmarks/unfamiliar.py
_LEAST_SPREAD = 1e-3  # of a measure, where the training images are alike
_BINS = 64  # of the histogram of intensities
_MIDDLE = (0.2, 0.7)  # values of the map that are neither background nor the middle of a cell
_CELL = 0.5  # mean of the map over a patch in which the network sees a cell; 0.05 in empty fields
_LARGEST_NOISE = 0.5  # 20 standard deviations of the noise against the range of the data type
_SLACK = 0.1  # of the span in training by which a measure must lie outside to be named as a reason

_WORDS = {
    "background": ("darker background", "brighter background", "median intensity"),
    "texture": ("smoother texture", "rougher texture", "mean step between pixels"),
    "cells": (
        "fewer pixels that look like cells",
        "more pixels that look like cells",
        "their share",
    ),
}
"""Measure → below the training images, above them, what is measured."""

_COMPARED = ("undecided", "middle", "edges", "texture", "background")
"""Measures that are compared beside the features."""


class Appearance:
    """Sums over the windows of one image of what the network saw in them.

    Feed it each batch of windows once, in any order; it keeps sums and no window.

    `contrast`: float, width of the range of intensities that the network sees, as a share of the
    data type's range (`contrast_of`); 0 where the latter is not known.  `is_noise`: bool, nothing
    in the image stands out of the noise.
    """

    def __init__(self, contrast: float = 0.0, *, is_noise: bool = False) -> None:
        self.contrast = contrast
        self.is_noise = is_noise
        self._largest_cell = 0.0
        self._features: NDArray[np.float64] | None = None
        self._histogram = np.zeros(_BINS)
        # background, cells, undecided, middle, edges, steps, windows
        self._sums = np.zeros(7)

    def add(self, gray: Tensor, features: Sequence[Tensor], maps: Tensor) -> None:
        """Add a batch of windows.

        Parameters
        ----------
        gray : (B, 1, H, W) tensor in [0, 1], normalised intensities
        features : (B, D, h, w) tensors of `DINOCell.map_and_features`, the coarsest last; the D of all of
            them together describe a patch
        maps : (B, 1, H, W) tensor in [0, 1], distance maps
        """
        height, width = features[-1].shape[-2:]
        size = (height, width)
        cells = functional.adaptive_avg_pool2d(maps.float(), size)  # [B, 1, h, w]
        self._largest_cell = max(self._largest_cell, float(cells.max()))
        background = 1.0 - cells
        pooled = [functional.adaptive_avg_pool2d(level.float(), size) for level in features]
        weighted = torch.cat(pooled, dim=1) * background
        summed = weighted.sum(dim=(0, 2, 3)).double().cpu().numpy()  # [D]
        self._features = summed if self._features is None else self._features + summed
        self._histogram += torch.histc(gray.float(), _BINS, 0.0, 1.0).cpu().numpy()
        across, down = gray.float().diff(dim=3), gray.float().diff(dim=2)
        undecided = maps.float() * (1 - maps.float())
        middle = ((maps >= _MIDDLE[0]) & (maps < _MIDDLE[1])).float()
        edges = torch.hypot(across[..., :-1, :], down[..., :-1])
        means = (
            plane.mean(dim=(1, 2, 3)).sum()
            for plane in (cells, undecided, middle, edges, across.abs())
        )
        self._sums += [float(background.sum()), *map(float, means), len(gray)]

    @property
    def features(self) -> NDArray[np.float64] | None:
        """Mean feature (D,) of the patches, weighted by 1 - map; None before the first window."""
        return None if self._features is None else self._features / max(self._sums[0], 1e-6)

    @property
    def has_signal(self) -> bool:
        """False where nothing stands out of the noise and the network sees no cell."""
        return not self.is_noise or self._largest_cell > _CELL

    def measures(self) -> dict[str, float]:
        """The numbers that `_WORDS` and `_COMPARED` name."""
        _, cells, undecided, middle, edges, steps, windows = (float(value) for value in self._sums)
        below = np.cumsum(self._histogram)
        median = (np.searchsorted(below, 0.5 * below[-1]) + 0.5) / _BINS
        return {
            "background": float(median),
            "texture": steps / windows,
            "cells": cells / windows,
            "undecided": undecided / max(cells, 1e-9),  # m (1 - m) against m
            "middle": middle / windows,
            "edges": edges / windows,
        }


def contrast_of(span: float, dtype: np.dtype) -> float:
    """A span of intensities as a share of the range of an integer type; 0 for other types."""
    return span / float(np.iinfo(dtype).max) if dtype.kind in "ui" else 0.0


@dataclass(frozen=True)
class Comparison:
    """How an image compares with the training images."""

    # distance from the training images over the limit: above 1 the image is flagged
    unfamiliar: float
    reasons: tuple[str, ...] = ()  # in words; empty where it is not flagged
    kind: TrainingStatistics | None = (
        None  # what it resembles; None where it is flagged or shows nothing
    )

    def note(self, name: str) -> str:
        """The sentence for the user of the model `name`, where the image is flagged."""
        return (
            f"The image does not look like what {name} was trained on ({', '.join(self.reasons)}): check "
            "its cells before you use them"
        )


@dataclass(frozen=True)
class TrainingStatistics:
    """What the training images of one data set look like.

    An image is a point: D mean features (`Appearance.features`) and M scaled measures.  Files of
    earlier versions describe the D features by a mean and a covariance, without examples and measures.
    """

    mean: Sequence[float]  # D + M numbers, the middle of the points
    limit: float  # distance above which an image is flagged
    # name → (lowest, highest), of each of `_WORDS`
    ranges: Mapping[str, Sequence[float]]
    images: int  # how many images were looked at
    # the points (N, D + M) as offsets from the mean in units of the limit: float16 in base64
    examples: str = ""
    scales: Mapping[str, float] = field(default_factory=dict)  # measure → its factor
    name: str = ""  # of the data set
    # peak_threshold, fill_threshold and min_prominence that suit it; empty where the model's do
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    # Of earlier versions.  directions, variances: K lists of D numbers, K numbers: the eigenvectors of
    # the covariance with the largest eigenvalues, and these; rest: variance in each direction across
    directions: Sequence[Sequence[float]] = ()
    variances: Sequence[float] = ()
    rest: float = 1.0

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.mean) - len(self.scales)

    @cached_property
    def _offsets(self) -> NDArray[np.float64]:
        """The examples (N, D + M), offsets from the mean."""
        stored = np.frombuffer(base64.b64decode(self.examples, validate=True), "<f2")
        return stored.reshape(-1, len(self.mean)).astype(np.float64) * self.limit

    def distance(self, points: ArrayLike) -> NDArray[np.float64]:
        """Distance of points (N, D + M) → (N,): the Euclidean one from the third nearest example.

        Of earlier versions, the Mahalanobis distance from the mean: along the K directions, which are
        orthonormal, each squared component is divided by its own variance, and what is left across
        them, by Pythagoras, by `rest`.
        """
        offset = np.asarray(points, dtype=np.float64) - np.asarray(self.mean)
        if self.examples:
            return np.sqrt(
                np.partition(_squared(offset, self._offsets), _NEIGHBOR - 1)[:, _NEIGHBOR - 1]
            )
        along = offset @ np.reshape(self.directions, (-1, len(self.mean))).T  # [N, K]
        across = np.maximum((offset**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        squared = (along**2 / np.asarray(self.variances)).sum(axis=1) + across / self.rest
        return np.sqrt(squared)

    def point(self, appearance: Appearance) -> NDArray[np.float64]:
        """Where an image lies, (D + M,)."""
        measures = appearance.measures()
        scaled = [measures[name] * self.scales[name] for name in _COMPARED if name in self.scales]
        return np.concatenate([np.asarray(appearance.features), scaled])

    def compare(self, appearance: Appearance | None) -> Comparison | None:
        """Compare one image; None where the network saw nothing of it (a constant image)."""
        features = None if appearance is None else appearance.features
        if appearance is None or features is None:
            return None
        if not appearance.has_signal:
            noise = appearance.contrast / _LARGEST_NOISE
            words = "nothing but noise or fine texture, over much of the range of its data type"
            return Comparison(noise, (words,) if noise > 1 else ())
        unfamiliar = float(self.distance(self.point(appearance)[None])[0]) / self.limit
        if unfamiliar <= 1:
            return Comparison(unfamiliar, kind=self)
        reasons, measures = [], appearance.measures()
        for name, (low, high) in self.ranges.items():
            value = measures[name]
            slack = _SLACK * (high - low)
            if not low - slack <= value <= high + slack:
                below, above, what = _WORDS[name]
                word, end = (
                    (below, f"at least {low:.2g}")
                    if value < low
                    else (above, f"at most {high:.2g}")
                )
                reasons.append(f"{word} ({what} {value:.2g}, in training {end})")
        return Comparison(unfamiliar, tuple(reasons) or ("other patterns",))

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values, numbers with eight digits."""
        return json.loads(json.dumps(asdict(self)), parse_float=lambda t: float(f"{float(t):.8g}"))

    @classmethod
    def from_mapping(cls, values: Any, source: object) -> TrainingStatistics:
        """Read what `to_mapping` wrote.

        Raises CheckpointError (something is missing, or no finite number).
        """
        try:
            found = cls(**values)
            ranges = [found.ranges[name] for name in _WORDS]
            numbers = [*found.mean, *found.variances, found.rest, found.limit, *np.ravel(ranges)]
            with np.errstate(all="ignore"):
                offsets = found._offsets if found.examples else np.zeros(1)
                numbers += [
                    *found.scales.values(),
                    *found.distance([list(found.mean), [0.0] * len(found.mean)]),
                    *offsets.ravel(),
                ]
            valid = bool(np.isfinite(np.asarray(numbers, dtype=np.float64)).all())
            valid &= np.shape(ranges) == (len(_WORDS), 2) and min(found.rest, found.limit) > 0
            valid &= found.scales.keys() <= set(_COMPARED) and found.num_features > 0
            valid &= bool(found.examples or found.directions)
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError):
            valid = False
        if not valid:
            raise CheckpointError(
                f"The training statistics of a model file must be finite numbers, got others in {source}: "
                "fetch it again"
            )
        return found


@dataclass(frozen=True)
class KnownKinds:
    """Statistics of each data set that a model was trained on; stored in the header of its file."""

    kinds: tuple[TrainingStatistics, ...]

    @property
    def images(self) -> int:
        """How many images were looked at."""
        return sum(kind.images for kind in self.kinds)

    def compare(self, appearance: Appearance | None) -> Comparison | None:
        """Compare one image with the nearest kind; None where the network saw nothing of it."""
        compared = [found for kind in self.kinds if (found := kind.compare(appearance)) is not None]
        return min(compared, key=lambda found: found.unfamiliar, default=None)

    def thresholds(self) -> dict[str, str]:
        """Name → thresholds in words, of the kinds that have their own."""
        return {
            kind.name: ", ".join(f"{name} {value:g}" for name, value in kind.thresholds.items())
            for kind in self.kinds
            if kind.thresholds
        }

    def without_thresholds(self) -> KnownKinds:
        """The same, all kinds with the model's thresholds."""
        return KnownKinds(tuple(replace(kind, thresholds={}) for kind in self.kinds))

    def to_mapping(self) -> list[dict[str, Any]]:
        """As JSON values."""
        return [kind.to_mapping() for kind in self.kinds]

    @classmethod
    def from_mapping(cls, values: Any, source: object) -> KnownKinds:
        """Read what `to_mapping` wrote; earlier versions stored one kind without a list.

        Raises CheckpointError (something is missing, or no finite number).
        """
        kinds = values if isinstance(values, list) and values else [values]
        return cls(tuple(TrainingStatistics.from_mapping(kind, source) for kind in kinds))


def fit_statistics(images: Sequence[Appearance]) -> TrainingStatistics | None:
    """Statistics of the training images; None for fewer than ten with signal.

    The farthest of each forty images (blurred, almost empty) are left out, because others of no known
    kind lie near them.  The limit is `_MARGIN` times the 95th percentile of the distances of the rest
    from each other: a new image of the same kind stays below it, and most other kinds lie beyond
    (`benchmarks/unfamiliar.py`).
    """
    seen = [image for image in images if image.features is not None and image.has_signal]
    if len(seen) < _MIN_IMAGES:
        return None
    measured = [image.measures() for image in seen]
    features = np.stack([np.asarray(image.features) for image in seen])  # [N, D]
    measures = np.array([[row[name] for name in _COMPARED] for row in measured])  # [N, M]
    widest = np.linalg.norm(features - features.mean(axis=0), 2) / np.sqrt(len(seen))
    factors = max(widest, 1e-6) / np.maximum(measures.std(axis=0), _LEAST_SPREAD)
    points = np.hstack([features, measures * factors])
    nearest = np.argsort(_distances_between(points))
    points = points[np.sort(nearest[: len(seen) - len(seen) // _ODD])]
    limit = _MARGIN * float(np.quantile(_distances_between(points), _QUANTILE))
    mean = points.mean(axis=0)
    offsets = ((points - mean) / max(limit, 1e-6)).astype("<f2")
    return TrainingStatistics(
        mean=mean.tolist(),
        limit=max(limit, 1e-6),
        ranges={name: [f([row[name] for row in measured]) for f in (min, max)] for name in _WORDS},
        images=len(points),
        examples=base64.b64encode(offsets.tobytes()).decode(),
        scales=dict(zip(_COMPARED, factors.tolist(), strict=True)),
    )


def _distances_between(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each point from the third nearest of the others, (N,)."""
    middle = points - points.mean(axis=0)
    return np.sqrt(np.partition(_squared(middle, middle), _NEIGHBOR)[:, _NEIGHBOR])


def _squared(points: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared Euclidean distances (N, others)."""
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    return np.maximum(squares - 2 * points @ others.T, 0.0)
