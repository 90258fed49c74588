"""One optimiser step: seeds, accumulated batches, gradient norms, the Gram teacher's turns (ours)."""

import hashlib
import logging
import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

import dinov3.distributed as distributed
from dinov3.cells.photometrics import photometrics_on_batch
from dinov3.cells.run_data import photometrics_on_device
from dinov3.configs.config import global_batch_size

logger = logging.getLogger("dinov3")


def seed_step(seed: int, rank: int, iteration: int, micro_step: int = 0) -> int:
    """Seed torch's generators for one forward and backward pass; returns the seed."""
    text = f"{seed}/{rank}/{iteration}/{micro_step}"
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(value)
    return value


def forward_backward_all(
    cfg: DictConfig, model: Any, batches: list[dict[str, Any]], teacher_temp: float, iteration: int
) -> tuple[Tensor, dict[str, Any]]:
    """Forward and backward of all accumulated batches; mean loss and mean metrics."""
    rank = distributed.get_rank()
    sums: dict[str, Any] = {}
    total: Tensor | None = None
    count = len(batches)
    for micro_step, data in enumerate(batches):
        seed = seed_step(cfg.accelerator.seed, rank, iteration, micro_step)
        data["global_batch_size"] = global_batch_size(cfg)
        if photometrics_on_device(cfg):
            data = _photometrics(cfg, model, data, seed)
            batches[micro_step] = data  # what the network sees, also for those who look at the run
        if model.strategy == "fsdp":
            # Gradients are summed over processes once, with the last batch.
            for module in model.student.values():
                module.set_requires_gradient_sync(micro_step == count - 1)
        loss, metrics = model.forward_backward(data, teacher_temp=teacher_temp, iteration=iteration)
        total = loss.detach() if total is None else total + loss.detach()
        for name, value in metrics.items():
            sums[name] = value if name not in sums else sums[name] + value
    assert total is not None
    return total / count, {name: value / count for name, value in sums.items()}


def _photometrics(cfg: DictConfig, model: Any, data: dict[str, Any], seed: int) -> dict[str, Any]:
    moved = {
        name: value.to(model.device_, non_blocking=True)
        if name.startswith("collated_") and name.endswith("_crops")
        else value
        for name, value in data.items()
    }
    generator = torch.Generator(device=model.device_).manual_seed(seed)
    return photometrics_on_batch(moved, cfg, generator)


def clip_gradients(model: Any, max_norm: float | None) -> dict[str, Tensor]:
    """Clip each part of the student by its own norm; the norms before, by upstream's names."""
    norms = {}
    for name, module in model.student.items():
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm=max_norm or math.inf)
        norms[f"{name}_grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


def gram_is_ready(cfg: DictConfig, start_iter: int) -> bool:
    """Whether the Gram teacher of a resumed run has been filled."""
    return bool(cfg.gram.ckpt) or cfg.gram.it_load_ema_teacher < start_iter


def update_gram(cfg: DictConfig, model: Any, iteration: int) -> None:
    """Every `gram.update_frequency` iterations the Gram teacher becomes the EMA."""
    gram = cfg.gram
    if not (gram.use_loss and gram.rep_update and model.has_gram_teacher):
        return
    done = iteration + 1
    if done < gram.it_first_update or done % gram.update_frequency:
        return
    first = max(math.ceil(gram.it_first_update / gram.update_frequency), 1)
    number = done // gram.update_frequency - first  # how many came before: needs no counter
    if gram.max_updates is None or number < gram.max_updates:
        logger.info("the Gram teacher becomes the EMA of iteration %d", iteration)
        model.update_gram()
