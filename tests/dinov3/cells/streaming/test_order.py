"""The order of visits: complete, spread, and the same whoever asks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinov3.cells.streaming.order import FieldOrder, Permutation


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_a_permutation_is_one(count):
    permutation = Permutation(count, "a")
    assert sorted(map(permutation, range(count))) == list(range(count))
    for outside in (-1, count):
        with pytest.raises(IndexError):
            permutation(outside)


def test_permutations_follow_their_key():
    draws = [
        tuple(map(Permutation(200, *key), range(200))) for key in (("a", 1), ("a", 2), ("b", 1))
    ]
    assert len(set(draws)) == 3
    assert draws[0] == tuple(map(Permutation(200, "a", 1), range(200)))


def test_a_permutation_is_well_mixed():
    """Each element falls into each quarter about equally often: chi-square of 16 cells, 9 degrees."""
    count, cells = 4000, [[0] * 4 for _ in range(4)]
    permutation = Permutation(count, 5)
    for index in range(count):
        cells[4 * index // count][4 * permutation(index) // count] += 1
    expected = count / 16
    chi = sum((n - expected) ** 2 / expected for row in cells for n in row)
    assert chi < 27.9  # the 99.9 % point


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(5, 60), visits=st.integers(1, 6), spread=st.integers(1, 5),
    world=st.integers(1, 5), seed=st.integers(0, 3),
)  # fmt: skip
def test_every_field_has_all_its_visits_once_in_a_pass(count, visits, spread, world, seed):
    order = FieldOrder(count, visits=visits, spread=spread, seed=seed, world=world)
    seen: Counter[tuple[int, int, int]] = Counter()
    owners: dict[tuple[int, int], set[int]] = {}
    for rank in range(world):
        for local in range(2 * order.owned(rank) * visits):
            visit = order.visit(local * world + rank)
            seen[visit.epoch, visit.field, visit.number] += 1
            owners.setdefault((visit.epoch, visit.field), set()).add(rank)
    expected = {(e, f, n) for e in (0, 1) for f in range(count) for n in range(visits)}
    assert set(seen) == expected
    assert set(seen.values()) == {1}
    assert all(len(ranks) == 1 for ranks in owners.values()), "no field is fetched by two processes"


@pytest.mark.parametrize(("visits", "spread"), [(16, 8), (4, 3), (1, 5)])
def test_a_batch_holds_a_field_once(visits, spread):
    order = FieldOrder(400, visits=visits, spread=spread)
    fields = [order.visit(position).field for position in range(3 * 400 * visits)]
    last: dict[int, int] = {}
    gaps = []
    for position, field in enumerate(fields[: 400 * visits]):
        if field in last:
            gaps.append(position - last[field])
        last[field] = position
    assert not gaps or min(gaps) > visits * spread


@pytest.mark.parametrize("count", [8, 16, 21, 64, 100])
def test_a_batch_of_few_fields_holds_as_many_as_it_can(count):
    """With a spread of 8 as stride it would hold half of 8, 16 or 64."""
    order = FieldOrder(count, visits=16, spread=8)
    for first in range(0, 10 * 64, 64):
        batch = {order.visit(first + position).field for position in range(64)}
        assert len(batch) == min(count, 64)


def test_many_fields_keep_the_spread():
    assert FieldOrder(128, visits=16, spread=8).stride() == 8
    assert FieldOrder(129, visits=16, spread=8, world=2).stride(1) != 8
    assert FieldOrder(1, visits=3, spread=2).stride() == 1


def test_passes_differ_and_seeds_differ():
    def fields(seed: int, epoch: int) -> list[int]:
        order = FieldOrder(50, visits=2, spread=2, seed=seed)
        return [order.visit(100 * epoch + p).field for p in range(100)]

    assert fields(0, 0) != fields(0, 1)
    assert fields(0, 0) != fields(1, 0)
    assert fields(0, 0) == fields(0, 0)


def test_a_step_brings_one_new_field():
    order = FieldOrder(100, visits=4, spread=3, world=2)
    for step in range(12, 60):
        before = {v.field for s in range(step - 12, step) for v in order.of_step(s, 1)}
        now = order.of_step(step, 1)
        assert [v.number for v in now] == [0, 1, 2, 3]
        # Places wrap around at the beginning of a pass only.
        if step % 50 > 12:
            assert {v.field for v in now} - before == {now[0].field}
    position = (7 * 4 + 2) * 2 + 1
    assert order.step_of(position) == (7, 1)
    assert order.of_step(7, 1)[2] == order.visit(position)
    assert order.fields_in_use == 10


def test_stand_ins_are_the_same_for_all_visits():
    order = FieldOrder(30, visits=3, spread=2, seed=4)
    chosen: dict[tuple[int, int], set[int]] = {}
    for position in range(90):
        visit = order.visit(position)
        for attempt in (1, 2):
            chosen.setdefault((visit.field, attempt), set()).add(order.replacement(visit, attempt))
    assert all(len(fields) == 1 for fields in chosen.values())
    assert any(chosen[f, 1] != chosen[f, 2] for f in range(30))


@pytest.mark.parametrize("wrong", [{"visits": 0}, {"spread": 0}, {"world": 0}, {"world": 6}])
def test_wrong_numbers(wrong):
    with pytest.raises(ValueError, match="must be"):
        FieldOrder(5, **wrong)
    with pytest.raises(ValueError, match="must have an element"):
        Permutation(0)
