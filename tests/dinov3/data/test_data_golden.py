"""Masks, orders and batches against numbers recorded from upstream.

`golden/data.json` was made with facebookresearch/dinov3 @ 6876159 by this file itself, which runs the
same calls on whatever tree it is given (torchvision is not needed):

    python tests/dinov3/data/test_data_golden.py CHECKOUT

where CHECKOUT is the folder that holds upstream's package `dinov3`.  `golden/api_data.json` has the
signatures, as `golden/api_vit.json` (see `tests/dinov3/test_interface.py`), without the data sets and
label transforms that serve evaluation only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "golden"
NUMBERS = FOLDER / "data.json"

MASKS = [
    # grid, patches, options, seed
    ((14, 14), 0, {"max_num_patches": 98}, 0),
    ((14, 14), 19, {"max_num_patches": 98}, 1),
    ((14, 14), 98, {"max_num_patches": 98}, 2),
    ((14, 14), 195, {"max_num_patches": 98}, 3),
    ((28, 28), 392, {"max_num_patches": 392}, 4),
    ((28, 28), 77, {"max_num_patches": 392, "min_num_patches": 16}, 5),
    ((7, 12), 30, {"max_num_patches": 20, "min_aspect": 0.5}, 6),
    ((7, 12), 30, {"max_num_patches": 20, "min_aspect": 0.5, "max_aspect": 1.0}, 7),
    ((6, 6), 11, {"num_masking_patches": 11}, 8),
    ((2, 2), 3, {"max_num_patches": 2}, 9),
]
ORDERS = [
    # class, arguments, samples
    ("InfiniteSampler", {"sample_count": 11, "shuffle": True, "seed": 3}, 40),
    ("InfiniteSampler", {"sample_count": 11, "shuffle": True, "seed": 3, "advance": 25}, 15),
    (
        "InfiniteSampler",
        {"sample_count": 10, "shuffle": True, "seed": 5, "start": 1, "step": 3},
        25,
    ),
    ("InfiniteSampler", {"sample_count": 10, "start": 1, "step": 3, "advance": 5}, 12),
    ("InfiniteSampler", {"sample_count": 100_003, "shuffle": True, "seed": 2**33 + 1}, 100_103),
    ("ShardedInfiniteSampler", {"sample_count": 11, "shuffle": True, "seed": 3}, 40),
    ("ShardedInfiniteSampler", {"sample_count": 11, "shuffle": True, "seed": 3, "advance": 27}, 15),
    (
        "ShardedInfiniteSampler",
        {"sample_count": 12, "shuffle": True, "seed": 5, "start": 1, "step": 3, "advance": 3},
        25,
    ),
    (
        "ShardedInfiniteSampler",
        {"sample_count": 11, "shuffle": True, "seed": 3, "use_new_shuffle_tensor_slice": True},
        40,
    ),
    ("ShardedInfiniteSampler", {"sample_count": 7, "start": 2, "step": 3}, 10),
    ("EpochSampler", {"size": 7, "sample_count": 5}, 7),
    ("EpochSampler", {"size": 7, "sample_count": 5, "shuffle": True, "seed": 4}, 7),
    ("EpochSampler", {"size": 9, "sample_count": 20, "shuffle": True, "start": 1, "step": 2}, 4),
]
BATCHES = [
    # samples, shares, probability, options
    (4, (0.1, 0.5), 0.5, {}),
    (5, (0.1, 0.5), 0.9, {"random_circular_shift": True}),
    (3, (0.3, 0.3), 0.0, {}),
    (4, (0.1, 0.5), 0.5, {"local_batch_size": 2}),
    (4, (0.2, 0.6), 1.0, {"gram": True}),
]


def digest(values: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - upstream draws from the global generator
    torch.manual_seed(value)


def sample(number: int, gram: bool) -> tuple[dict[str, Any], tuple[()]]:
    """Crops whose every value tells where it belongs."""

    def crop(index: int, size: int) -> torch.Tensor:
        values = torch.arange(3 * size * size, dtype=torch.float32).view(3, size, size)
        return values / 7 + 100 * number + 10 * index

    crops = {
        "global_crops": [crop(i, 6) for i in range(2)],
        "local_crops": [crop(i, 3) for i in range(3)],
    }
    if gram:
        crops["gram_teacher_crops"] = [crop(i, 9) for i in range(2)]
    return crops, ()


def masks(module: Any) -> list[Any]:
    rows = []
    for grid, patches, options, number in MASKS:
        seed(number)
        mask = module.MaskingGenerator(grid, **options)(patches)
        after = [random.random(), float(np.random.random())]  # noqa: NPY002
        rows.append([int(mask.sum()), digest(mask.astype(np.uint8)), after])
    return rows


def orders(module: Any) -> list[Any]:
    rows = []
    for name, arguments, count in ORDERS:
        sampler = getattr(module, name)(**{"start": 0, "step": 1, **arguments})
        passes = []
        for epoch in range(3 if name == "EpochSampler" else 1):
            if name == "EpochSampler":
                sampler.set_epoch(epoch)
            order = [int(index) for index in itertools.islice(sampler, count)]
            passes.append(order if count < 50 else digest(np.array(order)))
        rows.append(passes)
    return rows


def batches(collate: Any, masking: Any) -> list[Any]:
    rows = []
    for count, shares, probability, options in BATCHES:
        options = dict(options)
        gram = options.pop("gram", False)
        seed(11)
        batch = collate.collate_data_and_cast(
            [sample(number, gram) for number in range(count)],
            shares,
            probability,
            torch.bfloat16,
            n_tokens=36,
            mask_generator=masking.MaskingGenerator((6, 6), max_num_patches=18),
            **options,
        )
        row = {"": described_batch(batch)}
        if count % 2 == 0 and probability and "gram" not in batch:
            # Upstream never returns from a split into more parts than there are masks.
            for divide_by in (2,) if "local_batch_size" in options else (2, 4):
                part = collate.get_batch_subset(dict(batch, global_batch_size=8), divide_by)
                part.pop("collated_gram_teacher_crops", None)  # upstream drops it
                row[str(divide_by)] = described_batch(part)
        rows.append(row)
    return rows


def described_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Shape, type and digest of each tensor; other values as they are."""
    return {
        name: [list(value.shape), str(value.dtype), digest(value.double().numpy())]
        if isinstance(value, torch.Tensor)
        else value
        for name, value in sorted(batch.items())
    }


class Tagged:
    """A loader that tells its number."""

    batch_size = 2

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self):
        return itertools.repeat(self.number)


def draws(module: Any) -> list[Any]:
    rows = []
    for ratios, number in (((0.3, 0.7), 65537), ((0.5, 0.25, 0.25), 3)):
        loader = module.CombinedDataLoader(
            [(Tagged(index), ratio) for index, ratio in enumerate(ratios)],
            batch_size=2,
            combining_mode=0,
            seed=number,
        )
        rows.append([int(tag) for tag in itertools.islice(loader, 30)])
    return rows


def numbers(collate: Any, masking: Any, samplers: Any, meta_loaders: Any) -> dict[str, Any]:
    return {
        "masks": masks(masking),
        "orders": orders(samplers),
        "batches": batches(collate, masking),
        "draws": draws(meta_loaders),
    }


@functools.cache
def ours() -> dict[str, Any]:
    modules = {
        name: importlib.import_module(f"dinov3.data.{name}")
        for name in ("collate", "masking", "samplers", "meta_loaders")
    }
    return json.loads(json.dumps(numbers(**modules)))


RECORDED = json.loads(NUMBERS.read_text()) if NUMBERS.is_file() else {}


@pytest.mark.parametrize("index", range(len(MASKS)))
def test_mask(index):
    assert ours()["masks"][index] == RECORDED["masks"][index]


@pytest.mark.parametrize("index", range(len(ORDERS)))
def test_order(index):
    assert ours()["orders"][index] == RECORDED["orders"][index]


@pytest.mark.parametrize("index", range(len(BATCHES)))
def test_batch(index):
    assert ours()["batches"][index] == RECORDED["batches"][index]


def test_draws_of_the_resolution():
    assert ours()["draws"] == RECORDED["draws"]


SIGNATURES = json.loads((FOLDER / "api_data.json").read_text())


def described(thing: Any) -> list[str]:
    rows = []
    for parameter in inspect.signature(thing).parameters.values():
        default = parameter.default
        if default is inspect.Parameter.empty:
            text = "-"
        elif isinstance(default, (bool, int, float, str, tuple, type(None))):
            text = str(default)
        else:
            text = type(default).__name__
        rows.append(f"{parameter.name}:{parameter.kind.name}:{text}")
    return rows


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature(name):
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    kind, parameters = SIGNATURES[name]
    assert inspect.isclass(thing) == (kind == "class")
    assert described(thing) == parameters


if __name__ == "__main__":
    tree = Path(sys.argv[1])
    sys.path.insert(0, str(tree))
    found = {}
    for part in ("collate", "masking", "samplers", "meta_loaders"):
        spec = importlib.util.spec_from_file_location(part, tree / f"dinov3/data/{part}.py")
        assert spec is not None
        assert spec.loader is not None
        found[part] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[part])
    NUMBERS.write_text(json.dumps(numbers(**found), indent=0) + "\n")
