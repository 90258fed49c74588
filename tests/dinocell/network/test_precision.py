"""bf16 only where the processor has the unit for it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dinocell.network.precision import autocast, has_bf16_unit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": True}, True),
        ({"avx512_f": True}, False),
        ({}, False),
    ],
)
def test_auto_is_bf16_where_the_cpu_has_the_unit(monkeypatch, flags, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert has_bf16_unit(CPU) == fast
    with autocast("auto", CPU):
        assert torch.is_autocast_enabled("cpu") == fast
    with autocast("fp32", CPU):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("bf16", CPU):
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_since_ampere_have_the_unit(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_bf16_unit(torch.device("cuda")) == fast


def test_other_devices_compute_in_float32():
    assert not has_bf16_unit(torch.device("mps"))
    assert isinstance(autocast("auto", torch.device("mps")), contextlib.nullcontext)
