"""Which samples train, which choose, and which test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from dinocell.datasets.sample import SPLITS, Sample
from dinocell.settings import require, require_at_least


@dataclass(frozen=True)
class SplitOptions:
    """How a data set is divided.

    Attributes
    ----------
    val_fraction, test_fraction : shares of all samples
        Where the source has splits they stay; only a missing `val` is taken from its `train`.
    resplit : forget the splits of the source
    max_images : draw so many samples before anything else; None takes all
    seed : of the draw
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.1
    resplit: bool = False
    max_images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shares = self.val_fraction, self.test_fraction
        require(
            min(shares) >= 0 and sum(shares) < 1,
            f"`val_fraction` and `test_fraction` must be 0 or more and below 1 together, got "
            f"{shares[0]} and {shares[1]}: 0.1 each is usual",
        )
        require_at_least("`max_images`", self.max_images, 1)


def divide(samples: Sequence[Sample], options: SplitOptions) -> list[tuple[Sample, str]]:
    """Samples in their order with their splits.

    The draw depends on the names, the strata and the seed alone, not on the order.  Within the strata
    samples are ordered by a hash of their names; then every tenth or so of the whole list is taken.  So
    the counts are exact, and each stratum gets its share within one sample.
    """

    def place(index: int) -> tuple[str, str]:
        name = f"{options.seed}:{samples[index].name}"
        return samples[index].stratum, hashlib.sha256(name.encode()).hexdigest()

    order = sorted(range(len(samples)), key=place)
    if options.max_images is not None and options.max_images < len(order):
        order = _spread(order, options.max_images)
    given = {index: None if options.resplit else samples[index].split for index in order}
    has_splits = any(given.values())
    split = {index: own or "train" for index, own in given.items()}
    if not has_splits:
        for index in _spread(order, round(len(order) * options.test_fraction)):
            split[index] = "test"
    if "val" not in split.values():
        train = [index for index in order if split[index] == "train"]
        whole = len(train) if has_splits else len(order)
        for index in _spread(train, min(len(train), round(whole * options.val_fraction))):
            split[index] = "val"
    return [(samples[index], split[index]) for index in sorted(split)]


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Exactly `count` of the items, at even distances."""
    number = len(items)
    return [
        item
        for place, item in enumerate(items)
        if (place + 1) * count // number > place * count // number
    ]


def count_splits(splits: Sequence[str]) -> dict[str, int]:
    """Number of samples of each split, those without samples too."""
    return {split: list(splits).count(split) for split in SPLITS}
