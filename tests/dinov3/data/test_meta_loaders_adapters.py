"""Loaders of several loaders, data sets around data sets."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from dinov3.data import CombinedDataLoader, DatasetWithEnumeratedTargets
from dinov3.data.adapters import extend_samples_with_index


class Counter:
    """Yields (its name, 0), (its name, 1), ..."""

    def __init__(self, name: str, batch_size: int = 2, length: int | None = None) -> None:
        self.name, self.batch_size, self.length = name, batch_size, length

    def __iter__(self):
        return ((self.name, i) for i in itertools.islice(itertools.count(), self.length))


def combined(ratios=(0.25, 0.75), **options):
    options = {"batch_size": 2, "combining_mode": 0} | options
    return CombinedDataLoader(
        [(Counter("ab"[i]), ratio) for i, ratio in enumerate(ratios)], **options
    )


def take(loader, count: int):
    return list(itertools.islice(loader, count))


def test_loaders_are_drawn_by_their_ratios():
    made = combined()
    drawn = take(made, 2000)
    share = np.mean([name == "a" for name, _ in drawn])
    assert abs(share - 0.25) < 0.04
    for name in "ab":
        own = [number for other, number in drawn if other == name]
        assert own == list(range(len(own)))
    assert made.loader_count.tolist() == [2000 * share, 2000 * (1 - share)]


def test_seed_and_ratios_act():
    assert take(combined(), 50) == take(combined(), 50) != take(combined(seed=1), 50)
    assert take(combined((0.0, 1.0)), 50) == [("b", i) for i in range(50)]


def test_local_mode_draws_by_the_rank(monkeypatch):
    import dinov3.distributed

    orders = []
    for rank in (0, 1):
        monkeypatch.setattr(dinov3.distributed, "get_rank", lambda rank=rank: rank)
        orders.append([take(combined(combining_mode=mode), 60) for mode in (0, 1)])
    assert orders[0][0] == orders[1][0]
    assert orders[0][1] != orders[1][1]


def test_advance_and_draws_resume():
    whole = take(combined(), 40)
    done = CombinedDataLoader.draws([0.25, 0.75], 25)
    assert done == [
        sum(name == "a" for name, _ in whole[:25]),
        sum(n == "b" for n, _ in whole[:25]),
    ]
    resumed = combined()
    resumed.advance(25)
    assert [name for name, _ in take(resumed, 15)] == [name for name, _ in whole[25:]]


def test_ratios_reached_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="dinov3"):
        logging.getLogger("dinov3").addHandler(caplog.handler)
        take(combined(name="sizes", logging_period=7), 20)
        logging.getLogger("dinov3").removeHandler(caplog.handler)
    assert len({r.message for r in caplog.records if r.message.startswith("sizes: shares")}) == 2


def test_the_first_loader_to_end_ends_all():
    made = CombinedDataLoader(
        [(Counter("a", length=3), 0.5), (Counter("b"), 0.5)], batch_size=2, combining_mode=0
    )
    assert [number for name, number in made if name == "a"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combining_mode": 2}, "combining_mode` must be one of 0, 1, got 2: choose one"),
        ({"ratios": (0.5, 0.6)}, r"`ratios` must sum to 1, got \[0.5, 0.6\]: divide them"),
        ({"batch_size": 3}, r"must have batches of 3, got \[2\]: give them one size"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        combined(**options)


class Letters:
    """Images "a".."e"; the target of "c" is missing."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int):
        return "abcde"[index], self.get_target(index)

    def get_target(self, index: int):
        return None if index == 2 else 10 * index

    def get_image_relpath(self, index: int) -> str:
        return f"{index}.png"

    def get_image_data(self, index: int) -> bytes:
        return bytes([index])

    def get_sample_decoder(self, index: int) -> str:
        return f"decoder {index}"


def test_enumerated_targets():
    made = DatasetWithEnumeratedTargets(Letters())
    assert len(made) == 5
    assert [made[i] for i in (0, 1, 2)] == [("a", (0, 0)), ("b", (1, 10)), ("c", (2, 2))]
    assert made.get_target(4) == (4, 40)
    assert made.get_image_relpath(3) == "3.png"
    assert made.get_image_data(3) == b"\x03"
    assert made.get_sample_decoder(3) == "decoder 3"
    with pytest.raises(IndexError, match=r"0\.\.4, got 5"):
        made[5]


def test_padding_repeats_samples_without_a_number():
    made = DatasetWithEnumeratedTargets(Letters(), pad_dataset=True, num_replicas=4)
    assert len(made) == 8
    assert made[6] == ("b", (-1, 10))
    assert made[7] == ("c", (-1, None))
    assert made.get_target(5) == (-1, 0)
    assert made.get_image_relpath(6) == "1.png"
    with pytest.raises(ValueError, match="num_replicas` must be set for a padded data set, got"):
        DatasetWithEnumeratedTargets(Letters(), pad_dataset=True)


def test_samples_with_their_index():
    made = extend_samples_with_index(Letters)()
    assert made[3] == ("d", 30, 3)
    assert len(made) == 5
