"""Orders of samples (matches `dinov3.data.samplers`).

Each order is a function of its seed: what a sampler yields after `advance` is what it would have
yielded there without stopping.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data.sampler import Sampler

from dinov3.distributed import get_rank, get_world_size

__all__ = [
    "EpochSampler",
    "InfiniteSampler",
    "PositionedSampler",
    "SamplePosition",
    "ShardedInfiniteSampler",
    "get_rank",
    "get_world_size",
    "sample_order",
]


class SamplePosition(int):
    """A dataset index that knows its place in the order of all processes (ours).

    Attributes:
        position: 0 for the first sample of a run; random numbers are drawn from it.
    """

    position: int

    def __new__(cls, index: int, position: int) -> SamplePosition:
        made = super().__new__(cls, index)
        made.position = position
        return made

    def __reduce__(self) -> Any:
        return SamplePosition, (int(self), self.position)


class PositionedSampler(Sampler[SamplePosition]):
    """Another sampler's indices with their positions (ours).

    Args:
        sampler: yields this process's indices.
        advance: how many of them it skips at its start.
    """

    def __init__(self, sampler: Any, advance: int = 0) -> None:
        self.sampler = sampler
        self.advance = advance
        self.rank, self.world = get_rank(), get_world_size()

    def __iter__(self) -> Iterator[SamplePosition]:
        for number, index in enumerate(self.sampler, start=self.advance):
            yield SamplePosition(int(index), number * self.world + self.rank)

    def __len__(self) -> int:
        return len(self.sampler)


def sample_order(loader: Any, start: int) -> Iterator[int]:
    """This process's indices from its `start`-th sample on, of a loader's infinite sampler."""
    positioned = loader.sampler
    inner = positioned.sampler
    fresh = type(inner)(**{**inner.arguments, "advance": start})
    return iter(fresh)


class EpochSampler(Sampler[int]):
    """`size` samples a pass, each of `sample_count` as often as the other, give or take one.

    Args:
        size: over all processes.
        shuffle: draw anew each pass, from `seed` times the epoch (the epoch alone for seed 0).
        start, step: this process's share; rank and number of processes by default.
    """

    def __init__(
        self,
        *,
        size: int,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
    ) -> None:
        self._size = size
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_rank() if start is None else start
        self._step = get_world_size() if step is None else step
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        repeats = -(-self._size // self._sample_count)
        tiled = np.tile(np.arange(self._sample_count), repeats)
        if self._shuffle:
            seed = self._seed * self._epoch if self._seed != 0 else self._epoch
            chosen = np.random.default_rng(seed).choice(tiled, self._size, replace=False)
        else:
            chosen = tiled[: self._size]
        yield from (int(index) for index in chosen[self._start :: self._step])

    def __len__(self) -> int:
        return (self._size - self._start + self._step - 1) // self._step

    def set_epoch(self, epoch: int) -> None:
        """Number of the pass."""
        self._epoch = epoch


class InfiniteSampler(Sampler[int]):
    """All samples, again and again, each pass in an order of its own.

    Args:
        advance: samples of this process to skip; whole passes are skipped at once.
        sample_count, shuffle, seed, start, step: as in `EpochSampler`.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_rank() if start is None else start
        self._step = get_world_size() if step is None else step
        self._advance = advance
        self.arguments = {
            "sample_count": sample_count,
            "shuffle": shuffle,
            "seed": seed,
            "start": self._start,
            "step": self._step,
            "advance": advance,
        }

    def __iter__(self) -> Iterator[int]:
        # Every process walks through the same permutations and takes each step-th sample.
        per_pass = len(range(self._start, self._sample_count, self._step))
        if per_pass == 0:
            raise ValueError(
                f"a data set must have a sample for every process, got {self._sample_count} for "
                f"{self._step}: use fewer processes"
            )
        passes, rest = divmod(self._advance, per_pass)
        generator = torch.Generator().manual_seed(self._seed)
        if self._shuffle and passes:
            # Each drawn index takes one 32-bit number, so that many are drawn and dropped.
            for _ in range(passes):
                torch.randint(0, 2, (self._sample_count,), generator=generator)
        while True:
            order: Iterator[int] = iter(range(self._sample_count))
            if self._shuffle:
                order = _permutation(self._sample_count, generator)
            yield from itertools.islice(order, self._start + rest * self._step, None, self._step)
            if self._shuffle:
                for _ in order:  # the generator must reach the end of the pass
                    pass
            rest = 0


def _permutation(size: int, generator: torch.Generator) -> Iterator[int]:
    """Fisher-Yates from the front, one draw a step (upstream's order)."""
    kind = torch.int32 if size <= 2**31 else torch.int64
    left = torch.arange(size, dtype=kind)
    for index in range(size):
        other = int(torch.randint(index, size, (1,), generator=generator))
        value = int(left[other])
        left[other] = left[index]
        yield value


class ShardedInfiniteSampler(Sampler[int]):
    """As `InfiniteSampler`, but each process keeps its own part of the data set (for caches).

    Args:
        use_new_shuffle_tensor_slice: shuffle a part at once instead of sample by sample.
    """

    def __init__(
        self,
        *,
        sample_count: int,
        shuffle: bool = False,
        seed: int = 0,
        start: int | None = None,
        step: int | None = None,
        advance: int = 0,
        use_new_shuffle_tensor_slice: bool = False,
    ) -> None:
        self._sample_count = sample_count
        self._shuffle = shuffle
        self._seed = seed
        self._start = get_rank() if start is None else start
        self._step = get_world_size() if step is None else step
        self._advance = advance
        self._use_new = use_new_shuffle_tensor_slice
        self.arguments = {
            "sample_count": sample_count,
            "shuffle": shuffle,
            "seed": seed,
            "start": self._start,
            "step": self._step,
            "advance": advance,
            "use_new_shuffle_tensor_slice": use_new_shuffle_tensor_slice,
        }

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            yield from InfiniteSampler(
                sample_count=self._sample_count,
                seed=self._seed,
                start=self._start,
                step=self._step,
                advance=self._advance,
            )
            return
        generator = torch.Generator().manual_seed(self._seed)
        everything = torch.randperm(self._sample_count, generator=generator)
        part = everything[self._start :: self._step]
        # The remainder is dropped, so that all processes have passes of one length.
        per_pass = self._sample_count // self._step
        if per_pass == 0:
            raise ValueError(
                f"a data set must have a sample for every process, got {self._sample_count} for "
                f"{self._step}: use fewer processes"
            )
        number, rest = divmod(self._advance, per_pass)
        while True:
            # Each pass has a seed of its own: earlier ones need not be walked through.
            generator.manual_seed(self._seed + self._start + (number << 24))
            shuffle = _shuffled_at_once if self._use_new else _shuffled_one_by_one
            order = shuffle(part[:per_pass], generator)
            yield from (int(index) for index in order[rest:])
            rest = 0
            number += 1


def _shuffled_at_once(part: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return part[torch.randperm(len(part), generator=generator)]


def _shuffled_one_by_one(part: torch.Tensor, generator: torch.Generator) -> np.ndarray:
    """The inside-out form of Fisher-Yates: item i goes to a random place among the first i + 1."""
    result = np.empty(len(part), dtype=np.int64)
    values = part.numpy()
    for index in range(len(part)):
        other = int(torch.randint(0, index + 1, (1,), generator=generator)) if index else 0
        result[index] = result[other]
        result[other] = values[index]
    return result
