"""Activation checkpointing, then compilation, then FSDP2 (matches `dinov3.fsdp.ac_compile_parallelize`).

The order matters: a compiled block must contain its checkpointing, and sharding comes around both.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dinov3.cells.strategy import resolve_device, resolve_strategy
from dinov3.utils import as_torch_dtype

logger = logging.getLogger("dinov3")


def get_activation_checkpoint_wrapper(cfg: Any) -> Callable[[nn.Module], nn.Module]:
    """How a block forgets its activations: all of them, or all but the results of matrix products,
    attention and reductions over processes (`train.checkpointing_full`)."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    if cfg.train.checkpointing_full:
        return partial(checkpoint_wrapper, preserve_rng_state=True)
    kept = [
        torch.ops.aten.mm.default,
        torch.ops.aten._scaled_mm.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    reduce_scatter = getattr(torch.ops._c10d_functional, "reduce_scatter_tensor", None)
    if reduce_scatter is not None:
        kept.append(reduce_scatter.default)
    return partial(
        checkpoint_wrapper,
        context_fn=partial(create_selective_checkpoint_contexts, kept),
        preserve_rng_state=True,
    )


def activation_checkpoint_transformer(cfg: Any, model: nn.ModuleDict) -> None:
    """Wrap each block of `model.backbone`."""
    wrap = get_activation_checkpoint_wrapper(cfg)
    backbone: Any = model["backbone"]
    for index, block in enumerate(backbone.blocks):
        backbone.blocks[index] = wrap(block)


def wrap_compile_block(
    module: nn.Module, use_cuda_graphs: bool, is_backbone_block: bool
) -> nn.Module:
    """Compile a module in place, its parameter names unchanged.

    `use_cuda_graphs`: record its kernels once and replay them (backbone blocks only: their shapes
    do not change from step to step).
    """
    if use_cuda_graphs and is_backbone_block:
        module.compile(fullgraph=True, dynamic=False, options={"triton.cudagraphs": True})
    else:
        module.compile()
    return module


def compile_transformer(cfg: Any, model: nn.ModuleDict) -> None:
    """Compile each block of the backbone and each head."""
    graphs = bool(cfg.train.cudagraphs)
    for name, module in model.items():
        if name == "backbone":
            for block in module.blocks:  # type: ignore[union-attr]
                wrap_compile_block(block, graphs, is_backbone_block=True)
        else:
            wrap_compile_block(module, graphs, is_backbone_block=False)


def fsdp_transformer(fsdp_config: dict[str, Any], model: nn.ModuleDict) -> None:
    """Shard each block, then the rest of the backbone, then each head (FSDP2).

    `fsdp_config`: arguments of `fully_shard`: mesh, mp_policy, reshard_after_forward.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for name, module in model.items():
        if name != "backbone":
            fully_shard(module, **fsdp_config)
            continue
        backbone: Any = module
        blocks = list(backbone.blocks)
        sharded = [fully_shard(block, **fsdp_config) for block in blocks]
        # Each block's weights are gathered while its neighbour still computes.
        for before, after in pairwise(sharded):
            before.set_modules_to_forward_prefetch([after])
            after.set_modules_to_backward_prefetch([before])
        fully_shard(module, **fsdp_config)
        register_fsdp_forward_method(module, "get_intermediate_layers")
        register_fsdp_forward_method(module, "forward_features")
        register_fsdp_forward_method(module, "get_last_selfattention")


def ac_compile_parallelize(
    trained_model: nn.ModuleDict,
    inference_only_models: Sequence[nn.ModuleDict],
    cfg: Any,
    trained_model_process_group: dist.ProcessGroup | None = None,
    inference_only_models_process_groups: Sequence[dist.ProcessGroup | None] | None = None,
) -> None:
    """Prepare networks made on the meta device; afterwards they have storage, not yet values.

    Args:
        trained_model: `backbone` and heads of the student.
        inference_only_models: teachers; compiled and sharded alike, never checkpointed.
        cfg: reads train.checkpointing, train.compile, compute_precision and accelerator.
        trained_model_process_group, inference_only_models_process_groups: whose processes share the
            weights; None: all.
    """
    device = resolve_device(cfg)
    strategy = resolve_strategy(cfg, device)
    everything = [trained_model, *inference_only_models]
    if cfg.train.checkpointing or cfg.train.checkpointing_full:
        activation_checkpoint_transformer(cfg, trained_model)
    if cfg.train.compile:
        if device.type == "cuda" or cfg.accelerator.compile_on_cpu:
            for model in everything:
                compile_transformer(cfg, model)
        else:
            logger.info(
                "`train.compile` acts on GPUs; accelerator.compile_on_cpu=true compiles for %s",
                device.type,
            )
    if strategy == "fsdp":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        groups = [trained_model_process_group, *(inference_only_models_process_groups or [])]
        groups += [trained_model_process_group] * (len(everything) - len(groups))
        policy = MixedPrecisionPolicy(
            param_dtype=as_torch_dtype(cfg.compute_precision.param_dtype),
            reduce_dtype=as_torch_dtype(cfg.compute_precision.reduce_dtype),
        )
        for model, group in zip(everything, groups, strict=True):
            world: Any = dist.group.WORLD
            mesh = DeviceMesh.from_group(group or world, device.type)
            fsdp_transformer(
                {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}, model
            )
    for model in everything:
        model.to_empty(device=device)
