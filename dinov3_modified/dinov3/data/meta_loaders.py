"""Several loaders behind one (matches `dinov3.data.meta_loaders`)."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dinov3 import distributed
from dinov3.cells.checks import one_of

logger = logging.getLogger("dinov3")


class CombinedDataLoader:
    """Batches of several loaders, each step from one of them, drawn by their ratios.

    Args:
        loaders_with_ratios: (loader, ratio); the ratios sum to 1.
        batch_size: of all loaders.
        combining_mode: GLOBAL_HOMOGENEOUS: all processes draw alike, from `seed`;
            LOCAL_HOMOGENEOUS: each for itself, from `seed` and its rank.
        logging_period: batches between two notes of the ratios reached.
    """

    GLOBAL_HOMOGENEOUS = 0
    LOCAL_HOMOGENEOUS = 1

    def __init__(
        self,
        loaders_with_ratios: Iterable[tuple[Any, float]],
        batch_size: int,
        combining_mode: int = 1,
        seed: int = 65537,
        name: str | None = None,
        logging_period: int = 100,
    ) -> None:
        pairs = list(loaders_with_ratios)
        self.loaders = [loader for loader, _ in pairs]
        self.ratios = [float(ratio) for _, ratio in pairs]
        one_of("combining_mode", combining_mode, (0, 1))
        if abs(sum(self.ratios) - 1) > 1e-6:
            raise ValueError(f"`ratios` must sum to 1, got {self.ratios}: divide them by their sum")
        sizes = {loader.batch_size for loader in self.loaders}
        if sizes != {batch_size}:
            raise ValueError(
                f"All loaders must have batches of {batch_size}, got {sorted(sizes)}: give them one size"
            )
        self.batch_size = batch_size
        self.combining_mode = combining_mode
        alike = combining_mode == self.GLOBAL_HOMOGENEOUS
        self.seed = seed + (0 if alike else distributed.get_rank())
        self.name = name or ""
        self.logging_period = logging_period
        self.loader_count = np.zeros(len(self.loaders))
        self.rng = np.random.default_rng(self.seed)

    @staticmethod
    def draws(ratios: Sequence[float], steps: int, seed: int = 65537) -> list[int]:
        """How often each loader is drawn in the first `steps` steps (ours, for resuming)."""
        rng = np.random.default_rng(seed)
        drawn = [int(rng.choice(len(ratios), p=list(ratios))) for _ in range(steps)]
        return [drawn.count(index) for index in range(len(ratios))]

    def advance(self, steps: int) -> None:
        """Skip draws that a run has made before; the loaders must be advanced themselves (ours)."""
        for _ in range(steps):
            self.loader_count[self.rng.choice(len(self.loaders), p=self.ratios)] += 1

    def __iter__(self) -> Iterator[Any]:
        iterators = [iter(loader) for loader in self.loaders]
        for step in itertools.count(1):
            index = int(self.rng.choice(len(self.loaders), p=self.ratios))
            self.loader_count[index] += 1
            if step % self.logging_period == 0:
                shares = self.loader_count / self.loader_count.sum()
                logger.info("%s: shares of the loaders %s", self.name, shares.round(3))
            try:
                batch = next(iterators[index])
            except StopIteration:
                return
            yield batch
