"""The training program (matches `dinov3.train.train`).

    python -m dinov3.train.train --config-file F --output-dir D key=value ...

Every random number is a function of the seed and of the place in the run (sample, step, process), so
a run that was cut anywhere continues as if nothing had happened.
"""

import argparse
import copy
import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, ListConfig

import dinov3.distributed as distributed
from dinov3.cells.diagnostics import Diagnostics
from dinov3.cells.files import atomic_path
from dinov3.cells.hooks import evaluate, watched
from dinov3.cells.interruption import Interrupted, Stopped, StopRequest
from dinov3.cells.resumption import (
    apply_start_record,
    check_resumption,
    check_samples,
    set_earlier_run_aside,
    sole_run,
    start_record,
)
from dinov3.cells.run_data import crops_ahead, data_loader, grouped, sample_names
from dinov3.cells.schedules import (
    apply_optim_scheduler,
    build_optimizer,
    build_schedulers,
    build_schedulers_v2,
)
from dinov3.cells.step import (
    FiniteGuard,
    NonFiniteLossError,
    clip_gradients,
    forward_backward_all,
    gram_is_ready,
    save_non_finite,
    seed_step,
    update_gram,
)
from dinov3.cells.strategy import allow_tf32, average_gradients, full_state_dict
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
    exit_job,
    get_cfg_from_args,
    setup_config,
    setup_job,
    setup_multidistillation,
)
from dinov3.configs.config import global_batch_size, lr_scale
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

logger = logging.getLogger("dinov3")

# Option of upstream's without effect → whether it takes no value.
_UNUSED_OPTIONS = {
    "--eval": False, "--eval_pretrained_weights": False, "--benchmark-codebase": True,
    "--test-ibot": True, "--profiling": True, "--dump-fsdp-weights": True,
    "--record_ref_losses": True, "--ref_losses_path": False,
}  # fmt: skip


def get_args_parser(add_help: bool = True) -> argparse.ArgumentParser:
    """Upstream's options; those without effect there are accepted and warn."""
    parser = argparse.ArgumentParser("DINOv3 self-supervised training", add_help=add_help)
    parser.add_argument("--config-file", default="", help="YAML with the keys to change")
    parser.add_argument("--no-resume", action="store_true", help="start over in the output folder")
    only = "write the teacher file of the newest checkpoint, then stop"
    parser.add_argument("--eval-only", action="store_true", help=only)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="key=value ...")
    parser.add_argument("--output-dir", default="./local_dino", help="folder of the run")
    seeded = "random seed of initial weights, dropout and crops"
    parser.add_argument("--seed", default=0, type=int, help=seeded)
    for option, is_flag in _UNUSED_OPTIONS.items():
        how: dict[str, Any] = {"action": "store_true"} if is_flag else {"type": str, "default": ""}
        parser.add_argument(option, help="without effect", **how)
    parser.add_argument("--multi-distillation", action="store_true", help="not in this tree")
    return parser


# --- data ---


def build_data_loader_from_cfg(cfg: DictConfig, model: SSLMetaArch, start_iter: int) -> Any:
    """Batches of one resolution, from iteration `start_iter` on, in an order set by `train.seed`."""
    return data_loader(cfg, model, start_iter * cfg.accelerator.accumulation_steps, 1)


def build_multi_resolution_data_loader_from_cfg(
    cfg: DictConfig, model: SSLMetaArch, start_iter: int, seed: int = 65537
) -> Any:
    """One loader a resolution where crop sizes are lists; each step draws one of them.

    `seed`: of the draws, equal in all processes.
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
            "Crop sizes and crops.global_local_crop_pairs_ratios must have one length, got "
            f"{sorted(lengths)}: give one of each for every resolution"
        )

    def of_resolution(index: int) -> DictConfig:
        one = copy.deepcopy(cfg)
        one.crops.update({key: values[index] for key, values in lists.items()})
        return one

    if count == 1:
        return build_data_loader_from_cfg(of_resolution(0), model, start_iter)
    steps = cfg.accelerator.accumulation_steps
    done = CombinedDataLoader.draws(ratios, start_iter * steps, seed=seed)
    loaders = [data_loader(of_resolution(i), model, done[i], i + 1) for i in range(count)]
    combined = CombinedDataLoader(
        list(zip(loaders, ratios, strict=True)),
        batch_size=cfg.train.batch_size_per_gpu,
        combining_mode=CombinedDataLoader.GLOBAL_HOMOGENEOUS,
        seed=seed,
        name="resolutions",
    )
    combined.advance(start_iter * steps)
    return combined


# --- evaluation files ---


def do_test(
    cfg: DictConfig,
    model: SSLMetaArch,
    iteration: int | str,
    process_group: dist.ProcessGroup | None,
    do_low_freq: bool = False,
) -> None:
    """Write the teacher: OUT/eval/ITERATION/teacher_checkpoint.pth, or a sharded folder.

    `iteration`: name of the folder, such as training_1249.  `process_group`: of the teacher's
    shards.  `do_low_freq`: without effect; evaluation is apart (`ssl_evaluation`).
    """
    folder = Path(cfg.train.output_dir) / "eval" / str(iteration)
    if distributed.is_subgroup_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    if cfg.train.sharded_eval_checkpoint:
        if dist.is_initialized():
            dist.barrier(group=process_group)
        target, ema = folder / "sharded_teacher_checkpoint", model.model_ema
        save_checkpoint(target, iteration=iteration, model=ema, process_group=process_group)
        return
    state = full_state_dict(model.model_ema, model.strategy)
    if distributed.is_subgroup_main_process():
        with atomic_path(folder / "teacher_checkpoint.pth") as temporary:
            torch.save({"teacher": state}, temporary)
        logger.info("Teacher written to %s", folder / "teacher_checkpoint.pth")


# --- training ---


@dataclass(frozen=True)
class _Run:
    """What every step of a run needs."""

    cfg: DictConfig
    model: SSLMetaArch
    optimizer: torch.optim.Optimizer
    schedules: tuple[Any, Any, Any, Any, Any]  # of `build_schedulers`, one value an iteration each
    loader: Any
    guard: FiniteGuard
    process_group: dist.ProcessGroup | None

    @property
    def max_iter(self) -> int:
        return int(self.cfg.optim.epochs * self.cfg.train.OFFICIAL_EPOCH_LENGTH)

    def step(self, iteration: int, batches: list[dict[str, Any]]) -> dict[str, Any]:
        """Train on the batches of an iteration; returns the values to log.

        Raises NonFiniteLossError (see there).
        """
        cfg, model = self.cfg, self.model
        lr, wd, momentum, teacher_temp, last_layer_lr = (
            float(schedule[iteration]) for schedule in self.schedules
        )
        apply_optim_scheduler(self.optimizer, lr, wd, last_layer_lr)
        self.optimizer.zero_grad(set_to_none=True)
        if cfg.gram.use_loss and cfg.gram.it_load_ema_teacher == iteration:
            logger.info("The Gram teacher becomes a copy of the EMA")
            model.gram_load_ema_teacher()
        total_loss, metrics = forward_backward_all(cfg, model, batches, teacher_temp, iteration)
        if model.strategy == "ddp":
            average_gradients(model.student)
        norms = clip_gradients(model, cfg.optim.clip_grad)
        if not self.guard.is_finite(total_loss):
            raise self._non_finite(iteration, batches, total_loss)
        self.optimizer.step()
        model.update_ema(momentum)
        update_gram(cfg, model, iteration)
        rates = {"lr": lr, "wd": wd, "mom": momentum, "last_layer_lr": last_layer_lr}
        return rates | {"total_loss": total_loss} | metrics | norms

    def save(self, iteration: int, batches: list[dict[str, Any]], loss: torch.Tensor) -> None:
        """Write the checkpoint of an iteration, and remove those that are not kept."""
        if not self.guard.last_is_finite():
            raise self._non_finite(iteration, batches, loss)
        ckpt_dir = Path(self.cfg.train.output_dir) / "ckpt"
        folder = ckpt_dir / str(iteration)
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        save_checkpoint(folder, iteration=iteration, process_group=self.process_group, **parts)
        if distributed.is_subgroup_main_process():
            keep_last_n_checkpoints(ckpt_dir, self.cfg.checkpointing.max_to_keep)
            if (iteration + 1) % self.cfg.checkpointing.keep_every == 0:
                keep_checkpoint_copy(folder)

    def _non_finite(
        self, iteration: int, batches: list[dict[str, Any]], loss: torch.Tensor
    ) -> NonFiniteLossError:
        return save_non_finite(
            self.cfg, self.model, self.optimizer, self.loader, batches, iteration, loss
        )


def do_train(cfg: DictConfig, model: SSLMetaArch, resume: bool = False) -> None:
    """Train until the last epoch, a signal, or a loss that is not finite.

    `resume`: continue from the newest valid checkpoint of OUT/ckpt.  Raises Stopped (a signal came;
    the state is saved); Interrupted (a second SIGINT came before that); NonFiniteLossError (see
    there); ValueError (the checkpoints belong to another configuration or other samples, or all are
    damaged).
    """
    output_dir = Path(cfg.train.output_dir)
    process_group = distributed.get_process_subgroup() if dist.is_initialized() else None
    optimizer, start_iter = _start_or_resume(cfg, model, resume, process_group)
    schedules = build_schedulers(cfg)
    max_iter = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
    _log_plan(cfg, schedules[0], max_iter)
    due = start_iter > 0 and _teacher_is_due(cfg, start_iter, max_iter)
    if due and not _teacher_is_written(cfg, start_iter - 1):
        # The run was killed between its checkpoint and this file.
        do_test(cfg, model, f"training_{start_iter - 1}", process_group)
    if start_iter >= max_iter:
        logger.info("Nothing left to do: %d of %d iterations are done", start_iter, max_iter)
        return
    loader = build_multi_resolution_data_loader_from_cfg(cfg, model, start_iter)
    check_samples(cfg, loader, output_dir, fresh=start_iter == 0)
    file = str(output_dir / "training_metrics.json")
    metric_logger = watched(MetricLogger(delimiter="  ", output_file=file), cfg, resume)
    dataset = None if isinstance(loader, CombinedDataLoader) else loader.dataset.dataset
    diagnostics = Diagnostics(cfg, model, metric_logger, getattr(dataset, "counts", None))
    model.train()
    guard = FiniteGuard(model.device_)
    run = _Run(cfg, model, optimizer, schedules, loader, guard, process_group)
    steps = grouped(crops_ahead(loader, model.device_), cfg.accelerator.accumulation_steps)
    try:
        with StopRequest(model.device_) as stop:
            for iteration, batches in enumerate(
                metric_logger.log_every(
                    steps, 10, "Training", n_iterations=max_iter, start_iteration=start_iter
                ),
                start_iter,
            ):
                values = run.step(iteration, batches)
                metric_logger.update(**values)
                diagnostics.after_step(iteration, batches, optimizer)
                evaluate(cfg, model, iteration, metric_logger)
                done = iteration + 1
                last = done == max_iter
                stopping = not last and stop.agreed(iteration)
                if last or stopping or done % cfg.checkpointing.period == 0:
                    run.save(iteration, batches, values["total_loss"])
                if _teacher_is_due(cfg, done, max_iter):
                    do_test(cfg, model, f"training_{iteration}", process_group)
                if stopping:
                    reason = stop.received.name if stop.received else "a signal to another process"
                    raise Stopped(reason, iteration)
    except KeyboardInterrupt as error:
        newest = find_latest_checkpoint(output_dir / "ckpt")
        raise Interrupted(None if newest is None else int(newest.name)) from error
    finally:
        diagnostics.close()
    if distributed.is_subgroup_main_process():
        logger.info("Done: %d iterations", max_iter)


def _teacher_is_due(cfg: DictConfig, done: int, max_iter: int) -> bool:
    """Whether the teacher is written after so many iterations."""
    period = cfg.evaluation.eval_period_iterations
    return done >= max_iter or bool(period > 0 and done % period == 0)


def _teacher_is_written(cfg: DictConfig, iteration: int) -> bool:
    """Whether `do_test` has written the teacher of an iteration; rank 0 looks, all get its answer."""
    sharded = cfg.train.sharded_eval_checkpoint
    name = "sharded_teacher_checkpoint" if sharded else "teacher_checkpoint.pth"
    answer = [(Path(cfg.train.output_dir) / "eval" / f"training_{iteration}" / name).exists()]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _start_or_resume(
    cfg: DictConfig, model: SSLMetaArch, resume: bool, process_group: dist.ProcessGroup | None
) -> tuple[torch.optim.Optimizer, int]:
    """Fill the networks and the optimiser; returns it and the first iteration to do."""
    output_dir = Path(cfg.train.output_dir)
    (output_dir / "ckpt").mkdir(parents=True, exist_ok=True)
    checkpoint = find_latest_valid_checkpoint(output_dir / "ckpt") if resume else None
    record = start_record(cfg, model, output_dir, fresh=checkpoint is None)
    apply_start_record(cfg, record)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    if cfg.distillation.enabled:
        names = [name for name in model.state_dict() if name.startswith("teacher.")]
        register_dont_save_hooks(model, dont_save=names)
    if checkpoint is None:
        return optimizer, 0
    done = load_checkpoint(
        checkpoint, model=model, optimizer=optimizer, process_group=process_group
    )
    start_iter = int(done) + 1
    model.gram_teacher_ready = model.has_gram_teacher and gram_is_ready(cfg, start_iter)
    logger.info("Resumed from %s: continuing with iteration %d", checkpoint, start_iter)
    return optimizer, start_iter


def _log_plan(cfg: DictConfig, lr_schedule: Any, max_iter: int) -> None:
    logger.info(
        "%d iterations of %d samples (%d x %d processes x %d accumulated), learning rate up to %.3g "
        "(rule %s: %.3g x the configured one)",
        max_iter, global_batch_size(cfg), cfg.train.batch_size_per_gpu,
        distributed.get_world_size(), cfg.accelerator.accumulation_steps,
        max(float(lr_schedule[it]) for it in range(0, max_iter + 1, max(max_iter // 1000, 1))),
        cfg.optim.scaling_rule or "none", lr_scale(cfg),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; see `get_args_parser`.

    Raises ValueError, FileNotFoundError (of arguments and configuration, in one sentence); Stopped,
    NonFiniteLossError (see `do_train`).
    """
    args = get_args_parser().parse_args(argv)
    if args.multi_distillation:
        setup_multidistillation(args)
    # `--seed` is part of the configuration, so that a resumed run is compared with it.
    args.opts = [f"accelerator.seed={args.seed}", *(args.opts or [])]
    args.output_dir = os.path.abspath(os.path.expanduser(args.output_dir))
    cfg = get_cfg_from_args(args, strict=True)
    with sole_run(Path(args.output_dir)):
        _run_alone(args, cfg)


def _run_alone(args: argparse.Namespace, cfg: DictConfig) -> None:
    """`main`, in a folder that no other run is using."""
    resume = not args.no_resume
    check_resumption(cfg, Path(args.output_dir), resume)
    if not args.eval_only:
        set_earlier_run_aside(Path(args.output_dir), resume)
    grouped = _needs_process_group(cfg)
    compute_on("cpu" if cfg.accelerator.device == "cpu" else None)
    setup_job(
        output_dir=args.output_dir,
        distributed_enabled=grouped,
        seed=args.seed,
        distributed_timeout=_timeout(cfg),
    )
    try:
        for option in _UNUSED_OPTIONS:
            if getattr(args, option.strip("-").replace("-", "_")):
                logger.warning("%s has no effect, as upstream", option.replace("_", "-"))
        cfg = setup_config(args, strict_cfg=True)
        logger.info("%s; torch %s", get_sha(), torch.__version__)
        model = SSLMetaArch(cfg)
        allow_tf32(cfg, model.device_)
        model.prepare_for_distributed_training()
        if args.eval_only:
            _write_teacher_only(cfg, model)
        else:
            do_train(cfg, model, resume=resume)
    finally:
        exit_job(distributed_enabled=grouped)


def _timeout(cfg: DictConfig) -> timedelta:
    return timedelta(seconds=float(cfg.accelerator.timeout_s))


def _needs_process_group(cfg: DictConfig) -> bool:
    """Several processes, a GPU (which trains through FSDP2 even alone), or a strategy that says so."""
    several = distributed.TorchDistributedEnvironment().world_size > 1
    on_gpu = cfg.accelerator.device != "cpu" and torch.cuda.is_available()
    return (
        several
        or cfg.accelerator.strategy in ("ddp", "fsdp")
        or (on_gpu and cfg.accelerator.strategy == "auto")
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
