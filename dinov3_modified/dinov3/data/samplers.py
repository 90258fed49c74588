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

_CHUNK = 1 << 16


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

    def set_epoch(self, epoch: int) -> None:
        """Number of the pass of a finite sampler: another order, and other random numbers."""
        self.sampler.set_epoch(epoch)
        self.advance = epoch * len(self.sampler)


def sample_order(loader: Any, start: int) -> Iterator[int]:
    """This process's indices from its `start`-th sample on, of a loader's infinite sampler."""
    positioned = loader.sampler
    inner = positioned.sampler
    fresh = type(inner)(**{**inner.arguments, "advance": start})
    return iter(fresh)


class CountingSampler(Sampler[int]):
    """Positions themselves, for data sets that know their own order (ours).

    Args:
        advance: samples of this process that are done.
    """

    def __init__(self, *, advance: int = 0) -> None:
        self.arguments = {"advance": advance}
        self._advance = advance
        self._start, self._step = get_rank(), get_world_size()

    def __iter__(self) -> Iterator[int]:
        yield from itertools.count(self._start + self._advance * self._step, self._step)


class EpochSampler(Sampler[int]):
    """`size` samples a pass, each of `sample_count` as often as the other, give or take one.

    Args:
        size: over all processes.
        shuffle: draw a new order for each pass, from `seed` times the epoch (the epoch alone for seed 0).
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
            seed = (self._seed or 1) * self._epoch
            chosen = np.random.default_rng(seed).choice(tiled, self._size, replace=False)
        else:
            chosen = tiled[: self._size]
        yield from (int(index) for index in chosen[self._start :: self._step])

    def __len__(self) -> int:
        return len(range(self._start, self._size, self._step))

    def set_epoch(self, epoch: int) -> None:
        """Number of the pass."""
        self._epoch = epoch


class InfiniteSampler(Sampler[int]):
    """All samples, again and again, each pass in an order of its own.

    Args:
        advance: samples of this process to skip; cheap, also for many passes.
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
        numbers = _random_numbers(self._seed)
        if self._shuffle:
            numbers.random_raw(passes * self._sample_count, output=False)
        while True:
            order: Iterator[int] = iter(range(self._sample_count))
            if self._shuffle:
                order = _permutation(self._sample_count, numbers)
            # To the end, so that the next pass finds its numbers.
            yield from itertools.islice(order, self._start + rest * self._step, None, self._step)
            rest = 0


def _random_numbers(seed: int) -> np.random.MT19937:
    """The 32-bit numbers that `torch.Generator().manual_seed(seed)` gives, many at a time.

    Below 2**28 values, `torch.randint(low, high, (1,))` is low + number % (high - low).
    """
    numbers = np.random.MT19937(0)
    np.random.RandomState(numbers).seed(seed & 0xFFFFFFFF)  # torch's way of seeding
    return numbers


def _permutation(size: int, numbers: np.random.MT19937) -> Iterator[int]:
    """Fisher-Yates from the front, one number a step (upstream's order, below 2**28 samples)."""
    left = np.arange(size, dtype=np.int32 if size <= 2**31 else np.int64)
    for first in range(0, size, _CHUNK):
        places = np.arange(first, min(first + _CHUNK, size))
        drawn = numbers.random_raw(len(places)).astype(np.int64)
        others = places + drawn % (size - places)
        for place, other in zip(places.tolist(), others.tolist(), strict=True):
            value = int(left[other])
            left[other] = left[place]
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
            seed = self._seed + self._start + (number << 24)
            shuffle = _shuffled_at_once if self._use_new else _shuffled_one_by_one
            order = shuffle(part[:per_pass], seed)
            yield from order[rest:].tolist()
            rest = 0
            number += 1


def _shuffled_at_once(part: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return part[torch.randperm(len(part), generator=generator)]


def _shuffled_one_by_one(part: torch.Tensor, seed: int) -> torch.Tensor:
    """The inside-out form of Fisher-Yates: item i goes to a random place among the first i + 1."""
    values = part.tolist()
    drawn = _random_numbers(seed).random_raw(max(len(values) - 1, 0)).astype(np.int64)
    others = drawn % np.arange(2, len(values) + 1)  # item 0 stays and draws nothing
    result = values[:1]
    for index, other in enumerate(others.tolist(), start=1):
        result.append(result[other] if other < index else values[index])
        result[other] = values[index]
    return torch.tensor(result, dtype=part.dtype)
