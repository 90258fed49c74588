"""Collapse monitors and pictures of a training run (ours); `hooks` has wandb and the evaluation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dinov3.distributed as distributed
from dinov3.cells.hooks import Watched, empty_teacher
from dinov3.cells.monitors import CollapseMonitor, module_statistics
from dinov3.cells.strategy import full_state_dict
from dinov3.cells.visuals import VisualLogger

_COUNTS_EVERY = 10  # steps


@dataclass(eq=False)
class Diagnostics:
    """Called after every step; changes no weights, modes or random numbers of the run."""

    cfg: Any  # of the run
    model: Any  # the `SSLMetaArch` of the run
    metrics: Any  # gets a line at the intervals of each figure; after `hooks.watched` also pictures
    # of a data set that fetches: requests, retries, lost fields
    counts: Callable[[], dict[str, float]] | None = None

    def __post_init__(self) -> None:
        self.main = distributed.is_main_process()
        self.monitor = CollapseMonitor(self.cfg)
        wandb = isinstance(self.metrics, Watched)
        self.visuals = VisualLogger(
            lambda: empty_teacher(self.cfg, "cpu"),
            self.cfg.train.output_dir,
            self.metrics.log_pictures if wandb else None,
            mean=self.cfg.crops.rgb_mean,
            std=self.cfg.crops.rgb_std,
        )
        if wandb:  # the last picture must arrive before wandb is closed
            self.metrics.before_finish.append(self.visuals.close)

    def after_step(
        self, iteration: int, batches: list[dict[str, Any]], optimizer: torch.optim.Optimizer
    ) -> None:
        """Measure and draw what is due after an iteration; all processes call this."""
        images = batches[0]["collated_global_crops"]
        figures: dict[str, float] = {}
        if self.monitor.is_due(iteration):
            figures |= self._measure(iteration, images, optimizer)
        period = self.cfg.monitor.visuals_period_iterations
        if self.cfg.monitor.enabled and period > 0 and iteration % period == 0:
            state = full_state_dict(self.model.model_ema["backbone"], self.model.strategy)
            if self.main:
                self.visuals.submit(state, images[: self.cfg.monitor.visuals_images], iteration)
        if self.counts is not None and self.main and iteration % _COUNTS_EVERY == 0:
            figures |= self.counts()
        if figures:
            # A line of its own: these come at their own intervals.
            self.metrics.record(iteration, figures)

    def _measure(
        self, iteration: int, images: Tensor, optimizer: torch.optim.Optimizer
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

    def close(self) -> None:
        """Wait for the last picture."""
        if not isinstance(self.metrics, Watched):
            self.visuals.close()
