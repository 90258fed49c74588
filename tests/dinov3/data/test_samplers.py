"""Orders of samples: laws, resumption, several processes."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from dinov3.data import samplers
from dinov3.data.samplers import (
    CountingSampler,
    EpochSampler,
    InfiniteSampler,
    PositionedSampler,
    SamplePosition,
    ShardedInfiniteSampler,
)


def take(sampler, count: int) -> list[int]:
    return [int(index) for index in itertools.islice(sampler, count)]


KINDS = [
    (InfiniteSampler, {"shuffle": False}),
    (InfiniteSampler, {"shuffle": True, "seed": 4}),
    (ShardedInfiniteSampler, {"shuffle": False}),
    (ShardedInfiniteSampler, {"shuffle": True, "seed": 4}),
    (ShardedInfiniteSampler, {"shuffle": True, "seed": 4, "use_new_shuffle_tensor_slice": True}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize(
    ("count", "start", "step"), [(10, 0, 1), (11, 0, 2), (11, 1, 2), (7, 4, 5)]
)
@pytest.mark.parametrize("advance", [1, 3, 10, 23, 5000])
def test_advance_continues_the_order(kind, options, count, start, step, advance):
    options = options | {"sample_count": count, "start": start, "step": step}
    whole = take(kind(**options), advance + 25)
    assert take(kind(**options, advance=advance), 25) == whole[advance:]


@pytest.mark.parametrize("size", [1, 2, 1000, samplers._CHUNK + 3])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63])
def test_numbers_are_those_of_torch(size, seed):
    """The definition: Fisher-Yates with one draw of torch's generator a step."""
    if size > 1000 and seed != 7:
        pytest.skip("once is enough for a large order")
    generator = torch.Generator().manual_seed(seed)
    expected = list(range(size))
    for place in range(size):
        other = int(torch.randint(place, size, (1,), generator=generator))
        expected[place], expected[other] = expected[other], expected[place]
    assert take(InfiniteSampler(sample_count=size, shuffle=True, seed=seed), size) == expected


def test_advance_counts_this_process_s_samples():
    options = {"sample_count": 16, "start": 2, "step": 3}
    assert take(InfiniteSampler(**options, advance=1), 6) == [5, 8, 11, 14, 2, 5]


def test_each_pass_has_all_samples_in_another_order():
    order = take(InfiniteSampler(sample_count=30, shuffle=True, seed=2), 90)
    passes = [order[i : i + 30] for i in (0, 30, 60)]
    assert all(sorted(part) == list(range(30)) for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    assert take(InfiniteSampler(sample_count=3), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", [InfiniteSampler, ShardedInfiniteSampler])
def test_seed_acts(kind):
    orders = [take(kind(sample_count=50, shuffle=True, seed=seed), 50) for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_processes_share_a_pass():
    parts = [
        take(InfiniteSampler(sample_count=12, shuffle=True, seed=3, start=r, step=3), 8)
        for r in range(3)
    ]
    assert sorted(i for part in parts for i in part[:4]) == list(range(12))
    assert sorted(i for part in parts for i in part[4:]) == list(range(12))


@pytest.mark.parametrize("new", [False, True])
def test_shards_stay_with_their_process(new):
    parts = [
        take(
            ShardedInfiniteSampler(
                sample_count=13,
                shuffle=True,
                seed=3,
                start=r,
                step=3,
                use_new_shuffle_tensor_slice=new,
            ),
            4 * 50,
        )
        for r in range(3)
    ]
    own = [set(part) for part in parts]
    assert [len(samples) for samples in own] == [4, 4, 4]  # the thirteenth is dropped
    assert len(set.union(*own)) == 12
    assert all(set(Counter(part).values()) == {50} for part in parts)
    passes = {tuple(parts[0][i : i + 4]) for i in range(0, 200, 4)}
    assert len(passes) > 10


def test_the_two_shuffles_of_a_shard_differ():
    def order(new: bool) -> list[int]:
        return take(
            ShardedInfiniteSampler(sample_count=40, shuffle=True, use_new_shuffle_tensor_slice=new),
            40,
        )

    assert order(False) != order(True)


def test_epochs():
    sampler = EpochSampler(size=7, sample_count=3, shuffle=True, seed=2)
    orders = []
    for epoch in (0, 1, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[1] == orders[2] != orders[0]
    sampler.set_epoch(3)  # the order of the pass is drawn from seed times epoch
    every = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert list(sampler) == np.random.default_rng(6).choice(every, 7, replace=False).tolist()
    assert set(Counter(orders[0]).values()) <= {1, 2, 3}
    assert list(EpochSampler(size=7, sample_count=3)) == [0, 1, 2, 0, 1, 2, 0]
    shares = [EpochSampler(size=7, sample_count=9, start=r, step=3) for r in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2] == [len(list(share)) for share in shares]


def test_rank_and_world_are_the_default(monkeypatch):
    monkeypatch.setattr(samplers, "get_rank", lambda: 1)
    monkeypatch.setattr(samplers, "get_world_size", lambda: 4)
    assert take(InfiniteSampler(sample_count=8), 3) == [1, 5, 1]
    assert take(ShardedInfiniteSampler(sample_count=8), 3) == [1, 5, 1]
    assert list(EpochSampler(size=8, sample_count=8)) == [1, 5]
    assert take(CountingSampler(advance=2), 3) == [9, 13, 17]
    positions = [p.position for p in itertools.islice(PositionedSampler(range(9), advance=2), 3)]
    assert positions == [9, 13, 17]


@pytest.mark.parametrize("kind", [InfiniteSampler, ShardedInfiniteSampler])
def test_fewer_samples_than_processes(kind):
    sampler = kind(sample_count=2, shuffle=True, start=2, step=3)
    with pytest.raises(ValueError, match="a sample for every process, got 2 for 3: use fewer"):
        next(iter(sampler))


def test_position_is_an_index_that_travels():
    position = SamplePosition(7, 123)
    assert position == 7
    assert [10, 20, 30, 40, 50, 60, 70, 80][position] == 80
    travelled = pickle.loads(pickle.dumps(position))
    assert (int(travelled), travelled.position) == (7, 123)


def test_positions_go_on_with_the_epochs():
    sampler = PositionedSampler(EpochSampler(size=5, sample_count=5, shuffle=True, seed=1))
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert [p.position for p in first] == [0, 1, 2, 3, 4]
    assert [p.position for p in second] == [5, 6, 7, 8, 9]
    assert first != second
    assert len(sampler) == 5


def test_a_far_advance_is_cheap():
    """A hundred million samples on: the numbers of whole passes are dropped without shuffling them."""
    sampler = InfiniteSampler(sample_count=1000, shuffle=True, seed=1, advance=10**8 + 500)
    assert len(set(take(sampler, 500))) == 500


def test_large_data_sets_start_at_once():
    sampler = InfiniteSampler(sample_count=5_000_000, shuffle=True, seed=1)
    assert len(set(take(sampler, 100))) == 100


def test_names_are_integers_of_python():
    for kind, options in KINDS:
        index = next(iter(kind(sample_count=5, **options)))
        assert type(index) is int
    assert all(type(i) is int for i in EpochSampler(size=3, sample_count=3, shuffle=True))
