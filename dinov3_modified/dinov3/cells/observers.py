"""What watches a run (ours): wandb, collapse monitors, pictures, evaluation on a labelled set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

import dinov3.distributed as distributed
from dinov3.cells.hooks import load_hook
from dinov3.cells.monitors import CollapseMonitor, module_statistics
from dinov3.cells.strategy import full_state_dict
from dinov3.cells.visuals import VisualLogger
from dinov3.logging import MetricLogger
from dinov3.logging.wandb_logger import create_wandb_logger
from dinov3.models import build_model
from dinov3.train.ssl_meta_arch import SSLMetaArch

__all__ = ["Observers"]

logger = logging.getLogger("dinov3")

_COUNTS_EVERY = 10  # steps


class Observers:
    """Called after every step; none of them changes weights, modes or random numbers of the run.

    Args:
        cfg: of the run.
        model: of the run.
        metric_logger: its lines also go to wandb.
        resume: false starts a new wandb run.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: SSLMetaArch,
        metric_logger: MetricLogger,
        *,
        resume: bool = True,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.metrics = metric_logger
        self.main = distributed.is_main_process()
        self.wandb = create_wandb_logger(cfg, resume=resume)
        metric_logger.add_listener(self._line_to_wandb)
        self.monitor = CollapseMonitor(cfg)
        self.visuals = VisualLogger(
            self._cpu_vit,
            cfg.train.output_dir,
            self._pictures_to_wandb,
            mean=cfg.crops.rgb_mean,
            std=cfg.crops.rgb_std,
        )
        # Of a data set that fetches: requests, retries, losses.
        self.counts: Callable[[], dict[str, float]] | None = None
        self.evaluation: Callable[..., dict[str, float]] | None = None
        settings = cfg.ssl_evaluation
        if settings.hook and settings.period_iterations > 0:
            # Made now, so that a wrong folder is told at the start.
            self.evaluation = load_hook(settings.hook)(cfg)

    def _plain_vit(self, device: torch.device | str) -> nn.Module:
        """A network of the teacher's architecture, without values."""
        vit: nn.Module = build_model(self.cfg.student, only_teacher=True, device="meta")[0]
        return vit.to_empty(device=device).eval()

    def _cpu_vit(self) -> nn.Module:
        return self._plain_vit("cpu")

    def _line_to_wandb(self, iteration: int, values: Mapping[str, Any]) -> None:
        self.wandb.log(dict(values), iteration)

    def _pictures_to_wandb(self, pictures: dict[str, Any], iteration: int) -> None:
        self.wandb.log_images({f"visuals/{k}": v for k, v in pictures.items()}, iteration)

    def after_step(
        self,
        iteration: int,
        batches: list[dict[str, Any]],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Look at the run after an iteration; all processes call this."""
        images = batches[0]["collated_global_crops"]
        extra: dict[str, float] = {}
        if self.monitor.is_due(iteration):
            extra |= self._measure(iteration, images, optimizer)
        visuals = self.cfg.monitor.visuals_period_iterations
        if self.cfg.monitor.enabled and visuals > 0 and iteration % visuals == 0:
            state = full_state_dict(self.model.model_ema["backbone"], self.model.strategy)
            if self.main:
                self.visuals.submit(state, images[: self.cfg.monitor.visuals_images], iteration)
        period = self.cfg.ssl_evaluation.period_iterations
        if self.evaluation is not None and (iteration + 1) % period == 0:
            extra |= self._evaluate(iteration)
        source = self.counts
        if source is not None and self.main and iteration % _COUNTS_EVERY == 0:
            extra |= source()
        if extra:
            # A line of its own: these come at their own intervals.
            self.metrics.record(iteration, extra)

    def _measure(
        self, iteration: int, images: Tensor, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, float]:
        """Collapse figures of the teacher; norms and relative updates of the student's weights."""
        with self.model._precision():
            figures = self.monitor.measure(
                self.model.model_ema["backbone"],
                images.to(self.model.device_),
                self.model.model_ema["dino_head"],
            )
        statistics = module_statistics(
            self.model.student, optimizer, per_block=self.cfg.monitor.per_block
        )
        figures |= {f"monitor/{name}": float(value) for name, value in statistics.items()}
        meter = self.metrics.meters.get("dino_global_crops_loss")
        self.monitor.check(figures, iteration, meter.median if meter is not None else None)
        return figures

    def _evaluate(self, iteration: int) -> dict[str, float]:
        """Scores of a small decoder on the teacher's frozen features; a failure is only logged."""
        assert self.evaluation is not None
        state = full_state_dict(self.model.model_ema["backbone"], self.model.strategy)
        if not self.main:
            return {}
        try:
            with torch.random.fork_rng(devices=[]):
                vit = self._plain_vit(self.model.device_)
            vit.load_state_dict(state)
            return dict(self.evaluation(vit, iteration, Path(self.cfg.train.output_dir)))
        except Exception:
            logger.exception(
                "the evaluation of iteration %d failed; the training goes on", iteration
            )
            return {}

    def close(self, exit_code: int) -> None:
        """Finish what is in work."""
        self.visuals.close()
        self.wandb.finish(exit_code)
