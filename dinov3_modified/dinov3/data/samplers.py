"""Orders of samples (matches `dinov3.data.samplers`).

Each order is a function of its seed: what a sampler yields after `advance` is what it would have
yielded there without stopping.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data.sampler import Sampler

from dinov3.distributed import get_rank, get_world_size

_CHUNK = 1 << 16


class SamplePosition(int):
    """A dataset index that knows its place in the order of all processes (ours)."""

    position: int  # 0 for the first sample of a run; random numbers are drawn from it

    def __new__(cls, index: int, position: int) -> Self:
        made = super().__new__(cls, index)
        made.position = position
        return made

    def __reduce__(self) -> Any:
        return SamplePosition, (int(self), self.position)


@dataclass(eq=False)
class PositionedSampler(Sampler[SamplePosition]):
    """Another sampler's indices with their positions (ours)."""

    sampler: Any  # yields this process's indices
    advance: int = 0  # how many of them it skips at its start

    def __post_init__(self) -> None:
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
    return iter(replace(loader.sampler.sampler, advance=start))


@dataclass(kw_only=True, eq=False)
class CountingSampler(Sampler[int]):
    """Positions themselves, for data sets that know their own order (ours)."""

    advance: int = 0  # samples of this process that are done

    def __iter__(self) -> Iterator[int]:
        world = get_world_size()
        return itertools.count(get_rank() + self.advance * world, world)


def _share(start: int | None, step: int | None) -> tuple[int, int]:
    """This process's first place and its stride: rank and number of processes unless given."""
    return get_rank() if start is None else start, get_world_size() if step is None else step


@dataclass(kw_only=True, eq=False)
class EpochSampler(Sampler[int]):
    """`size` samples a pass, each of `sample_count` as often as the other, give or take one."""

    size: int  # over all processes
    sample_count: int
    shuffle: bool = False  # a new order for each pass, from seed times epoch (epoch for seed 0)
    seed: int = 0
    start: int | None = None  # this process's share: rank and number of processes by default
    step: int | None = None

    def __post_init__(self) -> None:
        self._start, self._step = _share(self.start, self.step)
        self._epoch = 0

    def __iter__(self) -> Iterator[int]:
        chosen = np.tile(np.arange(self.sample_count), -(-self.size // self.sample_count))
        if self.shuffle:
            rng = np.random.default_rng((self.seed or 1) * self._epoch)
            chosen = rng.choice(chosen, self.size, replace=False)
        yield from chosen[self._start : self.size : self._step].tolist()

    def __len__(self) -> int:
        return len(range(self._start, self.size, self._step))

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch


@dataclass(kw_only=True, eq=False)
class InfiniteSampler(Sampler[int]):
    """All samples, again and again, each pass in an order of its own; see `EpochSampler`."""

    sample_count: int
    shuffle: bool = False
    seed: int = 0
    start: int | None = None
    step: int | None = None
    advance: int = 0  # samples of this process to skip; cheap, also for many passes

    def __post_init__(self) -> None:
        self._start, self._step = _share(self.start, self.step)

    def _passes(self, per_pass: int) -> tuple[int, int]:
        """Whole passes and samples of the next one that `advance` skips."""
        if per_pass == 0:
            raise ValueError(
                f"A data set must have a sample for every process, got {self.sample_count} for "
                f"{self._step}: use fewer processes"
            )
        return divmod(self.advance, per_pass)

    def __iter__(self) -> Iterator[int]:
        # Every process walks through the same permutations and takes each step-th sample.
        passes, rest = self._passes(len(range(self._start, self.sample_count, self._step)))
        numbers = _random_numbers(self.seed)
        if self.shuffle:
            numbers.random_raw(passes * self.sample_count, output=False)
        while True:
            order: Iterator[int] = iter(range(self.sample_count))
            if self.shuffle:
                order = _permutation(self.sample_count, numbers)
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


@dataclass(kw_only=True, eq=False)
class ShardedInfiniteSampler(InfiniteSampler):
    """As `InfiniteSampler`, but each process keeps its own part of the data set (for caches)."""

    use_new_shuffle_tensor_slice: bool = False  # shuffle a part at once, not sample by sample

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            yield from super().__iter__()
            return
        # The remainder is dropped, so that all processes have passes of one length.
        per_pass = self.sample_count // self._step
        number, rest = self._passes(per_pass)
        everything = _shuffled_at_once(torch.arange(self.sample_count), self.seed)
        part = everything[self._start :: self._step][:per_pass]
        shuffle = _shuffled_at_once if self.use_new_shuffle_tensor_slice else _shuffled_one_by_one
        while True:
            # Each pass has a seed of its own: earlier ones need not be walked through.
            yield from shuffle(part, self.seed + self._start + (number << 24))[rest:].tolist()
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
