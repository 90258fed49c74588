"""Does an image look like those that a model was trained on?

A network answers on any image, also on one of a kind that it has never seen.  Its features tell the
kinds apart (`DINOCell.map_and_features`): their mean over the patches without cells is alike in all images of one kind (background,
noise, optics) and far away in another.  A model therefore carries the mean and the covariance of that
vector over the training images of each data set, and an image whose Mahalanobis distance from all of
them exceeds a limit is flagged.  What an image resembles also says which thresholds suit it: the
distance maps of tissue have lower peaks than those of nuclei in a culture.

The distance is that of Lee et al., "A simple unified framework for detecting out-of-distribution
samples", NeurIPS 2018, with a data set for a class and a covariance for each.  The covariance of a few hundred images in D dimensions is
shrunk towards a multiple of the identity (Ledoit & Wolf 2004), and stored as its largest eigenvectors
and one variance for the rest.  The limit comes from images that a fit has not seen (`fit_statistics`).
The features are computed anyway; collecting them adds sums over patches.

A field without signal, in which the network sees no cell, has nothing but noise to compare.  It is not
flagged, unless the noise fills so much of the range of the data type that no camera has made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from dinocell.errors import CheckpointError

_DIRECTIONS = 32  # eigenvectors kept: 16 and all 192 gave the same distances to 1 %
_SHRINKAGE = 0.1
_FOLDS = 5
_MIN_IMAGES = 2 * _FOLDS
_ODD = 40  # one image in so many is left out of the fit
_QUANTILE = 0.95  # of the distances of held-out images: a few odd ones do not set the limit
MARGIN = 3.0
MARGIN_OF_CONVOLUTIONS = 1.8  # their features vary less from image to image, and from kind to kind
_BINS = 64  # of the histogram of intensities
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
        self._sums = np.zeros(4)  # background, cells, steps, windows

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
        steps = (gray[..., 1:] - gray[..., :-1]).abs().mean(dim=(1, 2, 3)).sum()
        sums = (background.sum(), cells.mean(dim=(1, 2, 3)).sum(), steps, len(gray))
        self._sums += [float(value) for value in sums]

    @property
    def features(self) -> NDArray[np.float64] | None:
        """Mean feature (D,) of the patches, weighted by 1 - map; None before the first window."""
        return None if self._features is None else self._features / max(self._sums[0], 1e-6)

    @property
    def has_signal(self) -> bool:
        """False where nothing stands out of the noise and the network sees no cell."""
        return not self.is_noise or self._largest_cell > _CELL

    def measures(self) -> dict[str, float]:
        """The numbers that `_WORDS` describes."""
        _, cells, steps, windows = self._sums
        below = np.cumsum(self._histogram)
        median = (np.searchsorted(below, 0.5 * below[-1]) + 0.5) / _BINS
        values = (median, steps / windows, cells / windows)
        return {name: float(value) for name, value in zip(_WORDS, values, strict=True)}


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
    """What the training images of one data set look like."""

    mean: Sequence[float]  # D numbers, mean of `Appearance.features` over the images
    # directions, variances: K lists of D numbers, K numbers: the eigenvectors of the shrunk
    # covariance with the largest eigenvalues, and these
    directions: Sequence[Sequence[float]]
    variances: Sequence[float]
    rest: float  # variance in each direction across them
    limit: float  # distance above which an image is flagged
    # name → (lowest, highest), of each of `Appearance.measures`
    ranges: Mapping[str, Sequence[float]]
    images: int  # how many images were looked at
    name: str = ""  # of the data set
    # peak_threshold, fill_threshold and min_prominence that suit it; empty where the model's do
    thresholds: Mapping[str, Any] = field(default_factory=dict)

    def distance(self, features: ArrayLike) -> NDArray[np.float64]:
        """Mahalanobis distance of mean features (N, D) → (N,).

        The K stored directions are orthonormal.  Along them each squared component is divided by its own
        variance; what is left across them, by Pythagoras, by the common variance `rest`.  This is the
        distance of a covariance whose smaller eigenvalues are replaced by their mean, in O(N K D) time
        and with K · D stored numbers in place of D².
        """
        offset = np.asarray(features, dtype=np.float64) - np.asarray(self.mean)
        along = offset @ np.reshape(self.directions, (-1, len(self.mean))).T  # [N, K]
        across = np.maximum((offset**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        squared = (along**2 / np.asarray(self.variances)).sum(axis=1) + across / self.rest
        return np.sqrt(squared)

    def compare(self, appearance: Appearance | None) -> Comparison | None:
        """Compare one image; None where the network saw nothing of it (a constant image)."""
        features = None if appearance is None else appearance.features
        if appearance is None or features is None:
            return None
        if not appearance.has_signal:
            noise = appearance.contrast / _LARGEST_NOISE
            words = "nothing but noise or fine texture, over much of the range of its data type"
            return Comparison(noise, (words,) if noise > 1 else ())
        unfamiliar = float(self.distance(features[None])[0]) / self.limit
        if unfamiliar <= 1:
            return Comparison(unfamiliar, kind=self)
        reasons = []
        for name, value in appearance.measures().items():
            low, high = self.ranges[name]
            slack = _SLACK * (high - low)
            if not low - slack <= value <= high + slack:
                below, above, what = _WORDS[name]
                word, end = (
                    (below, f"at least {low:.2g}")
                    if value < low
                    else (above, f"at most {high:.2g}")
                )
                reasons.append(f"{word} ({what} {value:.2g}, in training {end})")
        return Comparison(unfamiliar, tuple(reasons) or ("other patterns in its background",))

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values, numbers with five digits."""
        return json.loads(json.dumps(asdict(self)), parse_float=lambda t: float(f"{float(t):.5g}"))

    @classmethod
    def from_mapping(cls, values: Any, source: object) -> TrainingStatistics:
        """Read what `to_mapping` wrote.

        Raises CheckpointError (something is missing, or no finite number).
        """
        try:
            found = cls(**values)
            ranges = [found.ranges[name] for name in _WORDS]
            numbers = [*found.mean, *found.variances, found.rest, found.limit, *np.ravel(ranges)]
            found.distance(np.zeros((1, len(found.mean))))
            valid = bool(np.isfinite(np.asarray(numbers, dtype=np.float64)).all())
            valid &= np.shape(ranges) == (len(_WORDS), 2) and min(found.rest, found.limit) > 0
        except (TypeError, ValueError, KeyError, AttributeError):
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


def fit_statistics(
    images: Sequence[Appearance], *, margin: float = MARGIN
) -> TrainingStatistics | None:
    """Statistics of the training images; None for fewer than ten with signal.

    Every image is measured once by a fit to the other four fifths.  The farthest of each forty (blurred,
    almost empty) are left out, because they would widen the covariance towards other kinds; then the
    rest is measured again.  The limit is `margin` times the 95th percentile of these distances: a new
    image of the same kind stays below it, and most other kinds lie beyond (`benchmarks/unfamiliar.py`).
    """
    seen = [image for image in images if image.features is not None and image.has_signal]
    if len(seen) < _MIN_IMAGES:
        return None
    features = np.stack([np.asarray(image.features) for image in seen])  # [N, D]
    nearest = np.argsort(_held_out_distances(features))
    features = features[np.sort(nearest[: len(seen) - len(seen) // _ODD])]
    measures = [image.measures() for image in seen]
    ranges = {name: [f([row[name] for row in measures]) for f in (min, max)] for name in _WORDS}
    limit = margin * float(np.quantile(_held_out_distances(features), _QUANTILE))
    return _fit(features, limit=limit, ranges=ranges)


def _held_out_distances(features: NDArray[np.float64]) -> NDArray[np.float64]:
    distances = np.empty(len(features))
    order = np.random.default_rng(0).permutation(len(features))
    for fold in range(_FOLDS):
        held_out = order[fold::_FOLDS]
        fitted = _fit(np.delete(features, held_out, axis=0))
        distances[held_out] = fitted.distance(features[held_out])
    return distances


def _fit(
    features: NDArray[np.float64],
    *,
    limit: float = 1.0,
    ranges: Mapping[str, Sequence[float]] | None = None,
) -> TrainingStatistics:
    num_images, width = features.shape
    mean = features.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(features, rowvar=False, bias=True))  # ascending
    kept = min(_DIRECTIONS, width)
    floor = _SHRINKAGE * max(values.mean(), 1e-12)
    shrunk = (1 - _SHRINKAGE) * np.maximum(values, 0.0) + floor
    return TrainingStatistics(
        mean=mean.tolist(),
        directions=vectors[:, -kept:].T.tolist(),
        variances=shrunk[-kept:].tolist(),
        rest=float(shrunk[:-kept].mean()) if kept < width else float(floor),
        limit=limit,
        ranges=ranges or {},
        images=num_images,
    )
