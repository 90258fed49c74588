"""Numbers as text: those of `repr`, for every kind of float64, int64 and uint64."""

import json

import numpy as np
import pytest

from dinocell.results.number_texts import objects_of_numbers

POWERS = [2.0**k for k in range(-1074, 1024)] + [float(f"1e{k}") for k in range(-323, 309)]


def texts(values: np.ndarray) -> list[str]:
    """Each number as written, in an object of its own."""
    kinds = np.array([ord(values.dtype.kind)], np.uint8)
    letters = objects_of_numbers(
        [""] * len(values), values.view(np.uint64)[:, None], kinds, ["a"], "\n"
    )
    return [line[5:-1] for line in letters.tobytes().decode().splitlines()]


@pytest.mark.parametrize(
    "values",
    [
        POWERS,
        np.nextafter(POWERS, 0)[1:],
        np.nextafter(POWERS, np.inf)[:-1],
        np.random.default_rng(0).integers(0, 2**64, 5000, dtype=np.uint64).view(np.float64),
        np.random.default_rng(1).random(5000),
        np.random.default_rng(2).integers(0, 10**6, 5000) / 1000,
        np.random.default_rng(3).integers(0, 2**62, 5000).astype(float),
        [0.0, 1e16, 9999999999999998.0, 1e-4, 9.999e-5, 123456789012345680.0, 9.5e-310, 2.5],
    ],
    ids=["powers", "below", "above", "any bits", "0 to 1", "decimal", "whole", "by hand"],
)
def test_floats_are_written_as_repr_does(values) -> None:
    values = np.asarray(values, np.float64)
    values = np.concatenate([values, -values])
    values = values[np.isfinite(values)]
    assert texts(values) == list(map(repr, values.tolist()))


def test_whole_numbers() -> None:
    values = np.array([0, 9, 10, -1, 99_999_999, 100_000_000, 10**16, 2**63 - 1, -(2**63)])
    assert texts(values) == list(map(repr, values.tolist()))
    unsigned = np.array([0, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    assert texts(unsigned) == list(map(repr, unsigned.tolist()))


def test_objects_leave_out_what_is_not_finite() -> None:
    columns = [np.array([1, 2]), np.array([np.nan, 0.5]), np.array([np.inf, -np.inf])]
    rows = np.stack([column.view(np.uint64) for column in columns], axis=1)
    names, kinds = ["n", 'a "µm"', "b"], np.array([ord(kind) for kind in "iff"], np.uint8)
    letters = objects_of_numbers(["x:", "yy:"], rows, kinds, names, ";")
    first, second, rest = letters.tobytes().decode("ascii").split(";")
    assert (first, rest) == ('x:{"n":1}', "")
    assert second.startswith('yy:{"n":2,')
    assert json.loads(second[3:]) == {"n": 2, 'a "µm"': 0.5}
    none = np.empty((0, 3), np.uint64)
    assert objects_of_numbers([], none, kinds, names, ";").size == 0
