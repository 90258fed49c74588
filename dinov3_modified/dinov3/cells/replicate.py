"""Data parallelism by replicas (ours): every process holds all weights, gradients are averaged.

Buckets are reduced after the backward pass, each while the next is being packed.  That suits
networks of the size of ViT-S to ViT-L; FSDP2 (`accelerator.strategy: fsdp`) is for larger ones.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 2**25


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace every gradient by its mean over processes.

    All processes must have gradients for the same parameters, in the same order.

    `module`: its trainable parameters; those without gradient on this process count as zero.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    world = dist.get_world_size(group)
    if world == 1:
        return
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]
    pending = []
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]).div_(world)
        pending.append((bucket, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for bucket, flat, work in pending:
        work.wait()
        offset = 0
        for gradient in bucket:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Groups of one type, of about `_BUCKET_BYTES`."""
    found: list[list[Tensor]] = []
    size = 0
    for gradient in gradients:
        if not found or found[-1][-1].dtype != gradient.dtype or size >= _BUCKET_BYTES:
            found.append([])
            size = 0
        found[-1].append(gradient)
        size += gradient.numel() * gradient.element_size()
    return found
