"""Where and how a network is trained (ours): device, strategy, whole state dicts in and out."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

STRATEGIES = ("none", "ddp", "fsdp")


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
            f"accelerator.device must be auto, cpu, cuda or cuda:N, got {name!r}: choose one"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"accelerator.device {name} must be available, got no CUDA device: use auto or cpu"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def resolve_strategy(cfg: Any, device: torch.device) -> str:
    """`accelerator.strategy` of a configuration; "auto" is FSDP2 on GPUs, replicas on several
    processes without, and nothing for one process on a CPU.

    Raises ValueError (unknown, or `none` with several processes).
    """
    name = str(cfg.accelerator.strategy)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if name == "auto":
        if device.type == "cuda" and dist.is_available() and dist.is_initialized():
            return "fsdp"
        return "ddp" if several else "none"
    if name not in STRATEGIES:
        raise ValueError(
            f"accelerator.strategy must be one of auto, {', '.join(STRATEGIES)}, got {name!r}: choose one"
        )
    if name == "none" and several:
        raise ValueError(
            f"accelerator.strategy none must have one process, got {dist.get_world_size()}: use ddp or fsdp"
        )
    if name == "fsdp" and not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "accelerator.strategy fsdp must have a process group, got none: start through the "
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
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or dist.get_rank() == 0:
        module.load_state_dict(state)
    if several:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)
