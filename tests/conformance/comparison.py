"""Differences of tensors relative to their greatest value."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """The same names, and no difference above `limit` of a tensor's greatest absolute value."""
    assert found.keys() == expected.keys(), set(found) ^ set(expected)
    worst = {}
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-12)
        worst[name] = float((found[name].float() - value.float()).abs().max()) / scale
    name = max(worst, key=lambda key: worst[key])
    assert worst[name] <= limit, (
        f"{name} must agree to {limit}, got a difference of {worst[name]:.2g}"
    )
