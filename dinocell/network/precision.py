"""Where the network computes in bfloat16: on devices that have the unit for it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")


def has_bf16_unit(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware.

    A CPU does so with AMX or AVX512-BF16; elsewhere torch emulates, which took 44 times as long as
    float32.  An NVIDIA GPU does so since Ampere (compute capability 8.0).
    """
    import torch

    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return False


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which the network computes with a precision of `PRECISIONS`.

    `auto` is bfloat16 where `has_bf16_unit`, else float32.  Raises ValueError (the precision is
    unknown).
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}: choose one of these"
        )
    import torch

    if precision == "fp32" or (precision == "auto" and not has_bf16_unit(device)):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
