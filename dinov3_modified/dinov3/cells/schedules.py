"""Optimiser and schedules of a run from its configuration, as upstream's training program has them."""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dinov3.configs.config import lr_scale
from dinov3.train.cosine_lr_scheduler import CosineScheduler, linear_warmup_cosine_decay


def build_optimizer(cfg: DictConfig, params_groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW; rates and weight decay are set every iteration by `apply_optim_scheduler`."""
    return torch.optim.AdamW(params_groups, betas=(cfg.optim.adamw_beta1, cfg.optim.adamw_beta2))


def build_schedulers(cfg: DictConfig) -> tuple[Any, Any, Any, Any, Any]:
    """Learning rate, weight decay, EMA momentum, teacher temperature, last layer's learning rate.

    With a `schedules` section the second form (`build_schedulers_v2`).
    """
    if "schedules" in cfg:
        return build_schedulers_v2(cfg)
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    total = cfg.optim.epochs * epoch
    rate = {
        "base_value": cfg.optim.lr,
        "final_value": cfg.optim.min_lr,
        "total_iters": total,
        "warmup_iters": cfg.optim.warmup_epochs * epoch,
        "start_warmup_value": 0,
        "trunc_extra": cfg.optim.schedule_trunc_extra,
    }
    lr = CosineScheduler(**rate)
    last_layer_lr = CosineScheduler(**rate)
    last_layer_lr.schedule[: cfg.optim.freeze_last_layer_epochs * epoch] = 0
    decay = (cfg.optim.weight_decay, cfg.optim.weight_decay_end)
    momenta = (cfg.teacher.momentum_teacher, cfg.teacher.final_momentum_teacher)
    extra = cfg.optim.schedule_trunc_extra
    wd, momentum = (
        CosineScheduler(*ends, total_iters=total, trunc_extra=extra) for ends in (decay, momenta)
    )
    warmup = cfg.teacher.warmup_teacher_temp_epochs * epoch
    teacher_temp = CosineScheduler(
        base_value=cfg.teacher.teacher_temp,
        final_value=cfg.teacher.teacher_temp,
        total_iters=warmup,
        warmup_iters=warmup,
        start_warmup_value=cfg.teacher.warmup_teacher_temp,
    )
    return lr, wd, momentum, teacher_temp, last_layer_lr


def build_schedulers_v2(cfg: DictConfig) -> tuple[Any, Any, Any, Any, Any]:
    """As `build_schedulers`, from the start/peak/end sections of `schedules`."""
    epoch = cfg.train.OFFICIAL_EPOCH_LENGTH
    total = cfg.optim.epochs * epoch

    schedules = cfg.schedules
    lr = values_of_section(schedules.lr, epoch, total, lr_scale(cfg))
    last_layer_lr = lr.copy()
    frozen = schedules.lr.get("freeze_last_layer_epochs", cfg.optim.freeze_last_layer_epochs)
    last_layer_lr[: frozen * epoch] = 0
    others = (schedules.weight_decay, schedules.momentum, schedules.teacher_temp)
    wd, momentum, teacher_temp = (values_of_section(section, epoch, total) for section in others)
    return lr, wd, momentum, teacher_temp, last_layer_lr


def values_of_section(
    section: DictConfig, epoch_length: int, total: int, scale: float = 1.0
) -> np.ndarray:
    """Values of a start/peak/end section, one an iteration; `scale` multiplies peak and end."""
    cosine = section.get("cosine_epochs")
    return linear_warmup_cosine_decay(
        start=section.start,
        peak=section.peak * scale,
        end=section.end * scale,
        warmup_iterations=section.warmup_epochs * epoch_length,
        total_iterations=total,
        cosine_iterations=None if cosine is None else cosine * epoch_length,
    )


def apply_optim_scheduler(
    optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float
) -> None:
    """Set rate and weight decay of every group by its multipliers."""
    for group in optimizer.param_groups:
        base = last_layer_lr if group["is_last_layer"] else lr
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = base * group["lr_multiplier"]
