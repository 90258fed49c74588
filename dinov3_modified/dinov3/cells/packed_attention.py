"""Global and local crops in one attention call (ours).

Crops of two sizes have sequences of two lengths.  Kernels for variable lengths take all of them one
behind the other, with the places where each begins, so that a block launches one kernel and not two.
Both kernels need a GPU and half precision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# q, k, v [T, heads, width], begins [S + 1] int32, lengths of the S sequences -> [T, heads, width]
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]

KERNELS = ("varlen", "xformers")


def packed_attention(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], kernel: Kernel
) -> list[Tensor]:
    """Attention within each sequence of each part.

    `parts`: q, k and v, each [B, heads, N, width], with B and N of their own.  Returns [B, N, heads *
    width] for each part.
    """
    q, k, v = (
        torch.cat([part[index].transpose(1, 2).flatten(0, 1) for part in parts])
        for index in range(3)
    )  # each [T, heads, width]
    lengths = [part[0].shape[2] for part in parts for _ in range(part[0].shape[0])]
    device = q.device
    counts = [torch.full(p[0].shape[:1], p[0].shape[2], device=device) for p in parts]
    begins = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0)).to(torch.int32)
    found = kernel(q, k, v, begins, lengths)
    tokens = [p[0].shape[0] * p[0].shape[2] for p in parts]
    return [
        rows.flatten(1).unflatten(0, (p[0].shape[0], p[0].shape[2]))
        for rows, p in zip(found.split(tokens), parts, strict=True)
    ]


def use_packed_attention(module: nn.Module, kernel: Kernel) -> None:
    """All attention layers of `module` take lists of crops with this kernel."""
    for part in module.modules():
        if hasattr(part, "packed_kernel"):
            part.packed_kernel = kernel  # type: ignore[assignment]


def find_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of `accelerator.packed_attention` for a network that computes in `dtype`.

    Raises ValueError (the device is no GPU, or the precision is float32), ImportError (the package of the kernel is not installed).
    """
    if device.type != "cuda":
        raise ValueError(
            f"`accelerator.packed_attention` must be '' without a GPU, got {name}: leave it out"
        )
    if dtype == torch.float32:
        raise ValueError(
            f"`accelerator.packed_attention` must be '' in float32, got {name}: leave it out, or set "
            "compute_precision.param_dtype=bf16"
        )
    return _varlen() if name == "varlen" else _xformers()


def _varlen() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, lengths: Sequence[int]) -> Tensor:
        found: Any = varlen_attn(q, k, v, begins, begins, max(lengths), max(lengths))
        return found

    return attend


def _xformers() -> Kernel:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    def attend(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, lengths: Sequence[int]) -> Tensor:
        mask = BlockDiagonalMask.from_seqlens(list(lengths))
        found: Any = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
        return found[0]

    return attend
