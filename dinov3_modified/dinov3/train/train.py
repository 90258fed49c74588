"""The training program (matches `dinov3.train.train`).

    python -m dinov3.train.train --config-file F --output-dir D key=value ...

Every random number is a function of the seed and of the place in the run (sample, step, process), so
a run that was cut anywhere continues as if nothing had happened.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

import dinov3.distributed as distributed
from dinov3.cells.files import atomic_path, write_text_atomically
from dinov3.cells.interruption import StopRequest
from dinov3.cells.observers import Observers
from dinov3.cells.replicate import average_gradients
from dinov3.cells.strategy import full_state_dict
from dinov3.checkpointer import (
    find_latest_checkpoint,
    find_latest_valid_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    load_checkpoint,
    register_dont_save_hooks,
    save_checkpoint,
)
from dinov3.configs import (
    compare_configs,
    exit_job,
    get_cfg_from_args,
    get_default_config,
    setup_config,
    setup_job,
    setup_multidistillation,
)
from dinov3.data import (
    CombinedDataLoader,
    MaskingGenerator,
    SamplerType,
    collate_data_and_cast,
    make_data_loader,
    make_dataset,
)
from dinov3.data.loaders import plain_message
from dinov3.distributed.torch_distributed_wrapper import compute_on
from dinov3.logging import MetricLogger, setup_logging
from dinov3.train.cosine_lr_scheduler import CosineScheduler, linear_warmup_cosine_decay
from dinov3.train.ssl_meta_arch import SSLMetaArch
from dinov3.utils import get_sha

__all__ = [
    "NonFiniteLossError",
    "Stopped",
    "apply_optim_scheduler",
    "build_data_loader_from_cfg",
    "build_multi_resolution_data_loader_from_cfg",
    "build_optimizer",
    "build_schedulers",
    "build_schedulers_v2",
    "check_resumption",
    "clip_gradients",
    "do_test",
    "do_train",
    "get_args_parser",
    "global_batch_size",
    "main",
    "sample_names",
    "seed_step",
    "setup_logging",
]

logger = logging.getLogger("dinov3")

_UNUSED_OPTIONS = (
    "eval",
    "eval_pretrained_weights",
    "benchmark_codebase",
    "test_ibot",
    "profiling",
    "dump_fsdp_weights",
    "record_ref_losses",
    "ref_losses_path",
)
_START_FILE = "start.json"


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names iteration, samples and the saved state."""


class Stopped(Exception):
    """A signal ended the run after its state was saved.

    Attributes:
        signal_name: which.
        iteration: the last one that was done.
    """

    def __init__(self, signal_name: str, iteration: int) -> None:
        super().__init__(
            f"stopped by {signal_name} after iteration {iteration}: run the same command to go on"
        )
        self.signal_name = signal_name
        self.iteration = iteration


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Upstream's options; those without effect there are accepted and warn."""
    parser = argparse.ArgumentParser("DINOv3 self-supervised training", add_help=add_help)
    parser.add_argument("--config-file", default="", help="YAML with the keys to change")
    parser.add_argument("--no-resume", action="store_true", help="start anew in the output folder")
    parser.add_argument("--eval-only", action="store_true", help="write the teacher file and stop")
    parser.add_argument("--eval", type=str, default="", help="without effect")
    parser.add_argument("--eval_pretrained_weights", type=str, default="", help="without effect")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="key=value ...")
    parser.add_argument("--output-dir", default="./local_dino", help="folder of the run")
    parser.add_argument("--seed", default=0, type=int, help="of start values, dropout and crops")
    parser.add_argument("--benchmark-codebase", action="store_true", help="without effect")
    parser.add_argument("--test-ibot", action="store_true", help="without effect")
    parser.add_argument("--profiling", action="store_true", help="without effect")
    parser.add_argument("--dump-fsdp-weights", action="store_true", help="without effect")
    parser.add_argument("--record_ref_losses", action="store_true", help="without effect")
    parser.add_argument("--ref_losses_path", default="", type=str, help="without effect")
    parser.add_argument("--multi-distillation", action="store_true", help="not in this tree")
    return parser


# --- optimiser and schedules ---


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
    wd = CosineScheduler(
        base_value=cfg.optim.weight_decay,
        final_value=cfg.optim.weight_decay_end,
        total_iters=total,
        trunc_extra=cfg.optim.schedule_trunc_extra,
    )
    momentum = CosineScheduler(
        base_value=cfg.teacher.momentum_teacher,
        final_value=cfg.teacher.final_momentum_teacher,
        total_iters=total,
        trunc_extra=cfg.optim.schedule_trunc_extra,
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

    def values(section: DictConfig, scale: float = 1.0) -> Any:
        cosine = section.get("cosine_epochs")
        return linear_warmup_cosine_decay(
            start=section.start,
            peak=section.peak * scale,
            end=section.end * scale,
            warmup_iterations=section.warmup_epochs * epoch,
            total_iterations=total,
            cosine_iterations=None if cosine is None else cosine * epoch,
        )

    schedules = cfg.schedules
    lr = values(schedules.lr, _lr_scale(cfg))
    last_layer_lr = lr.copy()
    frozen = schedules.lr.get("freeze_last_layer_epochs", cfg.optim.freeze_last_layer_epochs)
    last_layer_lr[: frozen * epoch] = 0
    return (
        lr,
        values(schedules.weight_decay),
        values(schedules.momentum),
        values(schedules.teacher_temp),
        last_layer_lr,
    )


def _lr_scale(cfg: DictConfig) -> float:
    """Factor of the rule `optim.scaling_rule` on the peak learning rate."""
    batch = global_batch_size(cfg)
    if cfg.optim.scaling_rule == "linear_wrt_256":
        return batch / 256.0
    if cfg.optim.scaling_rule == "sqrt_wrt_1024":
        return 4 * math.sqrt(batch / 1024.0)
    return 1.0


def global_batch_size(cfg: DictConfig) -> int:
    """Samples of one optimiser step over all processes and accumulated batches."""
    world = distributed.get_world_size()
    return int(cfg.train.batch_size_per_gpu) * world * int(cfg.accelerator.accumulation_steps)


def apply_optim_scheduler(
    optimizer: torch.optim.Optimizer, lr: float, wd: float, last_layer_lr: float
) -> None:
    """Set rate and weight decay of every group by its multipliers."""
    for group in optimizer.param_groups:
        base = last_layer_lr if group["is_last_layer"] else lr
        group["weight_decay"] = wd * group["wd_multiplier"]
        group["lr"] = base * group["lr_multiplier"]


# --- data ---


def build_data_loader_from_cfg(cfg: DictConfig, model: SSLMetaArch, start_iter: int) -> Any:
    """Batches of one resolution, from iteration `start_iter` on, in an order set by `train.seed`."""
    return _data_loader(cfg, model, start_iter * cfg.accelerator.accumulation_steps, 1)


def _data_loader(cfg: DictConfig, model: SSLMetaArch, batches_done: int, seed_offset: int) -> Any:
    size = cfg.crops.global_crops_size
    patch = cfg.student.patch_size
    # The masks' grid is the student's; see `teacher_to_student_resolution_scale` upstream.
    mask_px = int(size * cfg.crops.teacher_to_student_resolution_scale)
    if mask_px % patch or cfg.crops.local_crops_size % patch:
        raise ValueError(
            f"crop sizes must be multiples of the patch size {patch}, got {mask_px} and "
            f"{cfg.crops.local_crops_size}: change crops.global_crops_size or crops.local_crops_size"
        )
    grid = mask_px // patch
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=tuple(cfg.ibot.mask_ratio_min_max),
        mask_probability=cfg.ibot.mask_sample_probability,
        dtype=_crop_dtype(cfg, model),
        n_tokens=grid**2,
        mask_generator=MaskingGenerator(
            input_size=(grid, grid), max_num_patches=int(0.5 * mask_px // patch * mask_px // patch)
        ),
        random_circular_shift=cfg.ibot.mask_random_circular_shift,
    )
    dataset = make_dataset(
        dataset_str=cfg.train.dataset_path,
        transform=model.build_data_augmentation_dino(cfg),
        target_transform=_no_target,
    )
    if len(dataset) == 0:
        raise ValueError(
            f"train.dataset_path must hold samples, got none in {cfg.train.dataset_path!r}: check it"
        )
    if hasattr(dataset, "set_options"):  # fields that arrive over a network
        dataset.set_options(
            type(dataset.options).from_config(OmegaConf.to_container(cfg.streaming)),
            report_folder=cfg.train.output_dir,
            seed=cfg.train.seed + seed_offset,
            batch_size=cfg.train.batch_size_per_gpu,
        )
    sampler = SamplerType.SHARDED_INFINITE if cfg.train.cache_dataset else SamplerType.INFINITE
    return make_data_loader(
        dataset=dataset,
        batch_size=cfg.train.batch_size_per_gpu,
        num_workers=cfg.train.num_workers,
        shuffle=True,
        seed=cfg.train.seed + seed_offset,
        sampler_type=sampler,
        sampler_advance=batches_done * cfg.train.batch_size_per_gpu,
        drop_last=True,
        collate_fn=collate,
        persistent_workers=False,
    )


def _no_target(_: Any) -> tuple[()]:
    return ()


def _photometrics_on_device(cfg: DictConfig) -> bool:
    return bool(cfg.multiview.strategy) and cfg.multiview.photometrics == "device"


def _crop_dtype(cfg: DictConfig, model: SSLMetaArch) -> torch.dtype:
    """Type of crops in a batch; crops that are still to be augmented keep full precision."""
    if _photometrics_on_device(cfg):
        return torch.float32
    return model.param_dtype


def build_multi_resolution_data_loader_from_cfg(
    cfg: DictConfig, model: SSLMetaArch, start_iter: int, seed: int = 65537
) -> Any:
    """One loader a resolution where crop sizes are lists; each step draws one of them.

    Args:
        seed: of the draws, equal in all processes.
    """
    crops = cfg.crops
    lists = {
        key: list(crops[key]) if isinstance(crops[key], (list, ListConfig)) else [crops[key]]
        for key in ("global_crops_size", "local_crops_size", "gram_teacher_crops_size")
    }
    ratios = crops.global_local_crop_pairs_ratios
    ratios = list(ratios) if isinstance(ratios, (list, ListConfig)) else [ratios]
    count = max(len(values) for values in lists.values())
    for key, values in lists.items():
        if len(values) == 1:
            lists[key] = values * count
    lengths = {len(values) for values in [*lists.values(), ratios]}
    if lengths != {count}:
        raise ValueError(
            "crop sizes and crops.global_local_crop_pairs_ratios must have one length, got "
            f"{sorted(lengths)}: give one of each for every resolution"
        )
    if count == 1:
        single = copy.deepcopy(cfg)
        for key, values in lists.items():
            single.crops[key] = values[0]
        return build_data_loader_from_cfg(single, model, start_iter)
    steps = cfg.accelerator.accumulation_steps
    done = CombinedDataLoader.draws(ratios, start_iter * steps, seed=seed)
    loaders = []
    for index in range(count):
        one = copy.deepcopy(cfg)
        for key, values in lists.items():
            one.crops[key] = values[index]
        loaders.append(_data_loader(one, model, done[index], index + 1))
    combined = CombinedDataLoader(
        list(zip(loaders, ratios, strict=True)),
        batch_size=cfg.train.batch_size_per_gpu,
        combining_mode=CombinedDataLoader.GLOBAL_HOMOGENEOUS,
        seed=seed,
        name="resolutions",
    )
    combined.advance(start_iter * steps)
    return combined


def _grouped(loader: Any, count: int) -> Iterator[list[dict[str, Any]]]:
    """`count` batches at a time."""
    batches = iter(loader)
    while True:
        group = []
        for _ in range(count):
            try:
                group.append(next(batches))
            except StopIteration:
                return
        yield group


# --- evaluation files ---


def do_test(
    cfg: DictConfig,
    model: SSLMetaArch,
    iteration: int | str,
    process_group: dist.ProcessGroup | None,
    do_low_freq: bool = False,
) -> None:
    """Write the teacher: OUT/eval/ITERATION/teacher_checkpoint.pth, or a sharded folder.

    Args:
        iteration: name of the folder, such as training_1249.
        process_group: of the teacher's shards.
        do_low_freq: without effect; evaluation is apart (`ssl_evaluation`).
    """
    folder = Path(cfg.train.output_dir) / "eval" / str(iteration)
    if distributed.is_subgroup_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    if cfg.train.sharded_eval_checkpoint:
        if dist.is_initialized():
            dist.barrier(group=process_group)
        save_checkpoint(
            folder / "sharded_teacher_checkpoint",
            iteration=iteration,
            model=model.model_ema,
            overwrite=True,
            process_group=process_group,
        )
        return
    state = full_state_dict(model.model_ema, model.strategy)
    if distributed.is_subgroup_main_process():
        target = folder / "teacher_checkpoint.pth"
        with atomic_path(target) as temporary:
            torch.save({"teacher": state}, temporary)
        logger.info("teacher written to %s", target)


# --- training ---


def seed_step(seed: int, rank: int, iteration: int, micro_step: int = 0) -> int:
    """Seed torch's generators for one forward and backward pass; returns the seed."""
    text = f"{seed}/{rank}/{iteration}/{micro_step}"
    value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(value)
    return value


def do_train(cfg: DictConfig, model: SSLMetaArch, resume: bool = False) -> None:
    """Train until the last epoch, a signal, or a loss that is not finite.

    Args:
        resume: go on from the newest valid checkpoint of OUT/ckpt.

    Raises:
        Stopped: a signal came; the state is saved.
        NonFiniteLossError: see there.
        ValueError: the checkpoints belong to another configuration.
    """
    output_dir = Path(cfg.train.output_dir)
    ckpt_dir = output_dir / "ckpt"
    process_group = distributed.get_process_subgroup() if dist.is_initialized() else None
    main_process = distributed.is_subgroup_main_process()
    ckpt_dir.mkdir(parents=True, exist_ok=True)

    start_iter = 0
    checkpoint = find_latest_valid_checkpoint(ckpt_dir) if resume else None
    start = _start_record(cfg, model, output_dir, fresh=checkpoint is None)
    if start["patch_embed_lr_mult"] != cfg.optim.patch_embed_lr_mult:
        logger.info(
            "optim.patch_embed_lr_mult: %s instead of %s, since the patch embedding was adapted "
            "from patch size %s to %s (patch_adaptation.lr_mult)",
            start["patch_embed_lr_mult"],
            cfg.optim.patch_embed_lr_mult,
            start["from_patch_size"],
            cfg.student.patch_size,
        )
        cfg.optim.patch_embed_lr_mult = start["patch_embed_lr_mult"]
    optimizer = build_optimizer(cfg, model.get_params_groups())
    lr_schedule, wd_schedule, momentum_schedule, temp_schedule, last_lr_schedule = build_schedulers(
        cfg
    )
    if cfg.distillation.enabled:
        names = [name for name in model.state_dict() if name.startswith("teacher.")]
        register_dont_save_hooks(model, dont_save=names)
    if checkpoint is not None:
        done = load_checkpoint(
            checkpoint, model=model, optimizer=optimizer, process_group=process_group
        )
        start_iter = int(done) + 1
        model.gram_teacher_ready = model.has_gram_teacher and _gram_is_ready(cfg, start_iter)
        logger.info("resumed from %s: going on with iteration %d", checkpoint, start_iter)

    epoch_length = cfg.train.OFFICIAL_EPOCH_LENGTH
    max_iter = cfg.optim.epochs * epoch_length
    batch_size = global_batch_size(cfg)
    logger.info(
        "%d iterations of %d samples (%d x %d processes x %d accumulated), learning rate up to %.3g "
        "(rule %s: %.3g x the configured one)",
        max_iter,
        batch_size,
        cfg.train.batch_size_per_gpu,
        distributed.get_world_size(),
        cfg.accelerator.accumulation_steps,
        max(float(lr_schedule[it]) for it in range(0, max_iter + 1, max(max_iter // 1000, 1))),
        cfg.optim.scaling_rule or "none",
        _lr_scale(cfg),
    )
    if start_iter >= max_iter:
        logger.info("nothing left to do: %d of %d iterations are done", start_iter, max_iter)
        return

    loader = build_multi_resolution_data_loader_from_cfg(cfg, model, start_iter)
    metric_logger = MetricLogger(
        delimiter="  ", output_file=str(output_dir / "training_metrics.json")
    )
    observers = Observers(cfg, model, metric_logger, resume=resume)
    if not isinstance(loader, CombinedDataLoader):
        observers.counts = getattr(loader.dataset.dataset, "counts", None)
    model.train()
    steps = _grouped(loader, cfg.accelerator.accumulation_steps)
    iteration = start_iter
    guard = _FiniteGuard(model.device_)
    exit_code = 1
    try:
        with StopRequest(model.device_) as stop:
            for batches in metric_logger.log_every(
                steps, 10, "Training", n_iterations=max_iter, start_iteration=start_iter
            ):
                if iteration >= max_iter:
                    break
                lr = float(lr_schedule[iteration])
                wd = float(wd_schedule[iteration])
                momentum = float(momentum_schedule[iteration])
                last_layer_lr = float(last_lr_schedule[iteration])
                apply_optim_scheduler(optimizer, lr, wd, last_layer_lr)
                optimizer.zero_grad(set_to_none=True)
                if cfg.gram.use_loss and cfg.gram.it_load_ema_teacher == iteration:
                    logger.info("the Gram teacher becomes a copy of the EMA")
                    model.gram_load_ema_teacher()

                total_loss, metrics = _forward_backward_all(
                    cfg, model, batches, float(temp_schedule[iteration]), iteration
                )
                if model.strategy == "ddp":
                    average_gradients(model.student)
                norms = clip_gradients(model, cfg.optim.clip_grad)
                if not guard.is_finite(total_loss):
                    raise _non_finite(cfg, model, optimizer, loader, batches, iteration, total_loss)
                optimizer.step()
                model.update_ema(momentum)
                _update_gram(cfg, model, iteration)

                metric_logger.update(
                    lr=lr,
                    wd=wd,
                    mom=momentum,
                    last_layer_lr=last_layer_lr,
                    total_loss=total_loss,
                    **metrics,
                    **norms,
                )
                observers.after_step(iteration, batches, optimizer)

                done = iteration + 1
                last = done == max_iter
                stopping = not last and stop.agreed(iteration)
                if last or stopping or done % cfg.checkpointing.period == 0:
                    if not guard.last_is_finite():
                        raise _non_finite(
                            cfg, model, optimizer, loader, batches, iteration, total_loss
                        )
                    _save(cfg, model, optimizer, ckpt_dir, iteration, process_group)
                period = cfg.evaluation.eval_period_iterations
                if last or (period > 0 and done % period == 0):
                    do_test(cfg, model, f"training_{iteration}", process_group)
                if stopping:
                    reason = stop.received.name if stop.received else "a signal to another process"
                    raise Stopped(reason, iteration)
                iteration = done
        exit_code = 0
    finally:
        observers.close(exit_code)
    if main_process:
        logger.info("done: %d iterations", iteration)


def _forward_backward_all(
    cfg: DictConfig,
    model: SSLMetaArch,
    batches: list[dict[str, Any]],
    teacher_temp: float,
    iteration: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Forward and backward of all accumulated batches; mean loss and mean metrics."""
    rank = distributed.get_rank()
    sums: dict[str, Any] = {}
    total: Tensor | None = None
    count = len(batches)
    for micro_step, data in enumerate(batches):
        seed = seed_step(cfg.accelerator.seed, rank, iteration, micro_step)
        data["global_batch_size"] = global_batch_size(cfg)
        if _photometrics_on_device(cfg):
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


def _photometrics(
    cfg: DictConfig, model: SSLMetaArch, data: dict[str, Any], seed: int
) -> dict[str, Any]:
    from dinov3.data.augmentations_multiview import photometrics_on_batch

    moved = {
        name: value.to(model.device_, non_blocking=True)
        if name.startswith("collated_") and name.endswith("_crops")
        else value
        for name, value in data.items()
    }
    generator = torch.Generator(device=model.device_).manual_seed(seed)
    return photometrics_on_batch(moved, cfg, generator)


def clip_gradients(model: SSLMetaArch, max_norm: float | None) -> dict[str, Tensor]:
    """Clip each part of the student by its own norm; the norms before, by upstream's names."""
    norms = {}
    for name, module in model.student.items():
        limit = max_norm if max_norm else math.inf
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm=limit)
        norms[f"{name}_grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


def _gram_is_ready(cfg: DictConfig, start_iter: int) -> bool:
    """Whether the Gram teacher of a resumed run has been filled."""
    return bool(cfg.gram.ckpt) or cfg.gram.it_load_ema_teacher < start_iter


def _update_gram(cfg: DictConfig, model: SSLMetaArch, iteration: int) -> None:
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


def _save(
    cfg: DictConfig,
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    ckpt_dir: Path,
    iteration: int,
    process_group: dist.ProcessGroup | None,
) -> None:
    folder = ckpt_dir / str(iteration)
    save_checkpoint(
        folder,
        iteration=iteration,
        model=model,
        optimizer=optimizer,
        overwrite=True,
        process_group=process_group,
    )
    if distributed.is_subgroup_main_process():
        keep_last_n_checkpoints(ckpt_dir, cfg.checkpointing.max_to_keep)
        if (iteration + 1) % cfg.checkpointing.keep_every == 0:
            keep_checkpoint_copy(folder)


class _FiniteGuard:
    """Whether the loss is a number, without waiting for a GPU.

    On a CPU the answer is about this loss.  On a GPU it is about the one before: its flag was
    copied to the host while the next step was being launched.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flag: Tensor | None = None
        self.event: Any = None

    def is_finite(self, loss: Tensor) -> bool:
        finite = torch.isfinite(loss)
        if distributed.is_enabled() and distributed.get_world_size() > 1:
            # All processes stop together, else the others would wait for the one that did.
            shared = finite.float()
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            finite = shared > 0
        if self.device.type != "cuda":
            return bool(finite)
        answer = True
        if self.flag is not None:
            self.event.synchronize()
            answer = bool(self.flag)
        self.flag = finite.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()
        return answer

    def last_is_finite(self) -> bool:
        """The same of the newest loss, at the price of waiting: nothing wrong is ever saved."""
        if self.flag is None:
            return True
        self.event.synchronize()
        return bool(self.flag)


def _non_finite(
    cfg: DictConfig,
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    batches: list[dict[str, Any]],
    iteration: int,
    loss: Tensor,
) -> NonFiniteLossError:
    """Save what is needed to look into it; the weights are those before the step (on a CPU)."""
    folder = Path(cfg.train.output_dir) / "nan_logs" / f"iteration_{iteration}"
    names = sample_names(cfg, loader, iteration)
    if distributed.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(batches, folder / "batch.pth")
        (folder / "samples.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
    save_checkpoint(
        folder / "state", iteration=iteration - 1, model=model, optimizer=optimizer, overwrite=True
    )
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return NonFiniteLossError(
        f"the loss must be finite, got {float(loss)} in iteration {iteration} with the samples "
        f"{shown}: batch, names and state are in {folder}; look at these samples, or lower optim.lr"
    )


def sample_names(cfg: DictConfig, loader: Any, iteration: int) -> list[str]:
    """Names of this process's samples of an iteration, from the data order itself."""
    from itertools import islice

    from dinov3.data.samplers import sample_order

    if isinstance(loader, CombinedDataLoader):
        return [f"several resolutions, iteration {iteration}"]
    per_step = cfg.train.batch_size_per_gpu * cfg.accelerator.accumulation_steps
    dataset = loader.dataset
    order = sample_order(loader, start=iteration * per_step)
    name = getattr(dataset, "get_sample_name", None)
    return [name(index) if name else f"sample {int(index)}" for index in islice(order, per_step)]


def _start_record(
    cfg: DictConfig, model: SSLMetaArch, output_dir: Path, *, fresh: bool
) -> dict[str, Any]:
    """Fill the networks; what a run started from is kept in OUT/start.json, for its resumption."""
    path = output_dir / _START_FILE
    world = distributed.get_world_size()
    if not fresh and path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["world_size"] != world and not cfg.accelerator.allow_changed_config:
            raise ValueError(
                f"a resumed run must have the {record['world_size']} processes that it began with, "
                f"got {world}: start as many, or set accelerator.allow_changed_config=true (the "
                "order of the samples changes)"
            )
        model.init_weights(from_files=False)
        return record
    model.init_weights()
    report = model.load_report
    adapted = report is not None and report.patch_size_before != cfg.student.patch_size
    multiplier = cfg.patch_adaptation.lr_mult
    record = {
        "world_size": world,
        "seed": cfg.accelerator.seed,
        "pretrained": None if report is None else str(report),
        "from_patch_size": report.patch_size_before if report else None,
        "patch_embed_lr_mult": float(
            multiplier if adapted and multiplier is not None else cfg.optim.patch_embed_lr_mult
        ),
    }
    if distributed.is_main_process():
        write_text_atomically(path, json.dumps(record, indent=1))
    return record


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; see `get_args_parser`.

    Raises:
        ValueError, FileNotFoundError: of arguments and configuration, in one sentence.
        Stopped, NonFiniteLossError: see `do_train`.
    """
    args = get_args_parser().parse_args(argv)
    if args.multi_distillation:
        setup_multidistillation(args)
    # `--seed` is part of the configuration, so that a resumed run is compared with it.
    args.opts = [f"accelerator.seed={args.seed}", *(args.opts or [])]
    args.output_dir = os.path.abspath(args.output_dir)
    cfg = get_cfg_from_args(args, strict=True)
    resume = not args.no_resume
    check_resumption(cfg, Path(args.output_dir), resume)
    grouped = _needs_process_group(cfg)
    compute_on("cpu" if cfg.accelerator.device == "cpu" else None)
    setup_job(
        output_dir=args.output_dir,
        distributed_enabled=grouped,
        seed=args.seed,
        distributed_timeout=_timeout(cfg),
    )
    try:
        for name in _UNUSED_OPTIONS:
            if getattr(args, name):
                logger.warning("--%s has no effect, as upstream", name.replace("_", "-"))
        cfg = setup_config(args, strict_cfg=True)
        logger.info("%s; torch %s", get_sha(), torch.__version__)
        model = SSLMetaArch(cfg)
        model.prepare_for_distributed_training()
        if args.eval_only:
            _write_teacher_only(cfg, model)
        else:
            do_train(cfg, model, resume=resume)
    finally:
        exit_job(distributed_enabled=grouped)


def _timeout(cfg: DictConfig) -> timedelta:
    seconds = float(cfg.accelerator.timeout_s)
    if seconds <= 0:
        raise ValueError(
            f"accelerator.timeout_s must be above 0, got {seconds:g}: 1800 gives an evaluation time"
        )
    return timedelta(seconds=seconds)


def _needs_process_group(cfg: DictConfig) -> bool:
    """Several processes, a GPU (which trains through FSDP2 even alone), or a strategy that says so."""
    several = distributed.TorchDistributedEnvironment().world_size > 1
    on_gpu = cfg.accelerator.device != "cpu" and torch.cuda.is_available()
    return (
        several
        or cfg.accelerator.strategy in ("ddp", "fsdp")
        or (on_gpu and cfg.accelerator.strategy == "auto")
    )


def check_resumption(cfg: DictConfig, output_dir: Path, resume: bool) -> None:
    """Before anything is written: does this configuration continue the run that is there?"""
    ckpt_dir = output_dir / "ckpt"
    if find_latest_checkpoint(ckpt_dir) is None:
        return
    if not resume:
        if (
            distributed.TorchDistributedEnvironment().rank == 0
        ):  # finished work steps aside, it is not removed
            number = next(n for n in range(1, 10_000) if not (output_dir / f"ckpt_{n}").exists())
            ckpt_dir.rename(output_dir / f"ckpt_{number}")
        return
    path = output_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"a folder with checkpoints must have the config.yaml of its run, got {output_dir} without: "
            "use another --output-dir, or --no-resume"
        )
    old = OmegaConf.load(path)
    assert isinstance(old, DictConfig)
    differences = compare_configs(old, cfg, get_default_config())
    if differences and not cfg.accelerator.allow_changed_config:
        shown = "; ".join(str(item) for item in differences[:10])
        more = "; ..." if len(differences) > 10 else ""
        raise ValueError(
            f"a resumed run must keep its configuration, got {len(differences)} changes in {output_dir} "
            f"({shown}{more}): undo them, use another --output-dir, or set "
            "accelerator.allow_changed_config=true"
        )


def _write_teacher_only(cfg: DictConfig, model: SSLMetaArch) -> None:
    """`--eval-only`: the teacher file of the newest checkpoint."""
    checkpoint = find_latest_valid_checkpoint(Path(cfg.train.output_dir) / "ckpt")
    if checkpoint is None:
        raise ValueError(
            f"--eval-only must find a checkpoint, got none in {cfg.train.output_dir}: train first"
        )
    model.init_weights()
    iteration = load_checkpoint(checkpoint, model=model, strict_loading=False)
    do_test(cfg, model, f"manual_{iteration}", None)


if __name__ == "__main__":
    try:
        main()
    except (Stopped, NonFiniteLossError, ValueError, OSError, NotImplementedError) as error:
        sys.exit(f"error: {plain_message(error)}")
