"""Where and how a network is trained (ours): device, strategy, replicas, whole state dicts."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3.cells.checks import one_of
from dinov3.distributed import get_rank, get_world_size, is_enabled

STRATEGIES = ("none", "ddp", "fsdp")
_BUCKET_BYTES = 2**25  # of gradients that are averaged at once


def resolve_device(cfg: Any) -> torch.device:
    """`accelerator.device` of a configuration; "auto" is this process's GPU if there is one.

    Raises ValueError (no such device here).
    """
    name = str(cfg.accelerator.device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"`accelerator.device` must be auto, cpu, cuda or cuda:N, got {name!r}: choose one of these"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"`accelerator.device` {name} must be available, got no CUDA device: use auto or cpu"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def allow_tf32(cfg: Any, device: torch.device) -> None:
    """On a GPU, products of float32 matrices run in TF32 (`accelerator.tf32`), about eight times faster.

    What is computed in bfloat16 is not touched.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.accelerator.tf32 else "highest")


def resolve_strategy(cfg: Any, device: torch.device) -> str:
    """`accelerator.strategy` of a configuration; "auto" is FSDP2 on GPUs, replicas on several
    processes without, and nothing for one process on a CPU.

    Raises ValueError (unknown, or `none` with several processes).
    """
    name = str(cfg.accelerator.strategy)
    several = get_world_size() > 1
    if name == "auto":
        if device.type == "cuda" and is_enabled():
            return "fsdp"
        return "ddp" if several else "none"
    one_of("accelerator.strategy", name, ("auto", *STRATEGIES))
    if name == "none" and several:
        raise ValueError(
            f"`accelerator.strategy` none must have one process, got {get_world_size()}: use ddp or fsdp"
        )
    if name == "fsdp" and not is_enabled():
        raise ValueError(
            "`accelerator.strategy` fsdp must have a process group, got none: start through the "
            "training program, or use none"
        )
    return name


def full_state_dict(module: nn.Module, strategy: str) -> dict[str, Tensor]:
    """The whole state dict on the CPU; with FSDP on the first process only, {} elsewhere."""
    if strategy != "fsdp":
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: dict[str, Any] = get_model_state_dict(module, options=options)
    # With one process the entries can be the weights themselves, which the next step changes.
    return {name: value.clone() for name, value in whole.items()}


def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor], strategy: str) -> None:
    """Load a whole state dict; with several processes the first one's `state` goes to all.

    Raises RuntimeError (keys or shapes differ).
    """
    if strategy == "fsdp":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
        set_model_state_dict(module, dict(state), options=options)
        return
    if get_rank() == 0:
        module.load_state_dict(state)
    if get_world_size() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


def average_gradients(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Replace every gradient by its mean over processes, which each hold all weights.

    Buckets are reduced after the backward pass, each while the next is being packed.  That suits
    networks of the size of ViT-S to ViT-L; FSDP2 (`accelerator.strategy: fsdp`) is for larger ones.

    All processes must have gradients for the same parameters, in the same order.

    `module`: its trainable parameters; those without gradient on this process count as zero.
    """
    world = get_world_size(group)
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
