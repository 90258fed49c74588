"""Bootstrap intervals of pooled AP: what another draw of as many images would give.

Images, not cells, are drawn with replacement (Efron 1979): the cells of one image succeed and fail
together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dinocell.evaluation.metrics import pooled_ap

_NUM_DRAWS = 2000


def ap_intervals(counts: NDArray[np.int64], *, seed: int = 0) -> NDArray[np.float64]:
    """(images, IoU, 3) true positives, false positives and misses → (IoU, 2) bounds that hold 95 %."""
    draws = [pooled_ap(counts[images]) for images in _drawn(len(counts), seed)]
    return np.percentile(draws, [2.5, 97.5], axis=0).T


def gain_interval(
    first: NDArray[np.int64], other: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean gain in AP at the first IoU over seeds, and its 2.5th and 97.5th percentile.

    `first` and `other` are (seeds, images, IoU, 3) counts of the same images, which are drawn in pairs.
    """

    def gain(images: NDArray[np.int64] | slice) -> float:
        means = [pooled_ap(counts[:, images])[:, 0].mean() for counts in (other, first)]
        return float(means[0] - means[1])

    draws = [gain(images) for images in _drawn(first.shape[1], seed)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return gain(slice(None)), float(low), float(high)


def _drawn(num_images: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Positions of as many images, for each draw."""
    rng = np.random.default_rng(seed)
    for _ in range(_NUM_DRAWS):
        yield rng.integers(0, num_images, num_images)
