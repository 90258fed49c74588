"""The fine-tuning loop: `dinocell train`.

Everything random is a pure function of (seed, step, process), so a run that was cut anywhere
continues bit for bit on the CPU from its last checkpoint.  Several processes (torchrun, srun) share
the crops of a step: they see the samples that one process with the whole batch would see.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from dinocell.errors import CheckpointError, ConfigError, StoppedError
from dinocell.evaluation.tuning import ThresholdGrids, tune_thresholds, tuned_values
from dinocell.network.backbone import DINOv3Backbone, load_backbone_weights
from dinocell.network.model import DINOCell, load_start, round_weights, save_model, with_config
from dinocell.network.precision import autocast
from dinocell.progress import Progress, progress
from dinocell.training.config import TrainConfig
from dinocell.training.datasets import CropDataset, split_pairs
from dinocell.training.final_model import TrainResult, write_final_model
from dinocell.training.optimizer import (
    MuonAdamW,
    average_weights,
    learning_rate_factor,
    parameter_groups,
    process_factor,
    step_seed,
)
from dinocell.training.processes import Processes, processes_of_run
from dinocell.training.run_folder import (
    RunFolder,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from dinocell.training.synchronized_norm import synchronize_batch_norm
from dinocell.training.validation import Sample, ValidationImages

_VALIDATION_GRIDS = ThresholdGrids(
    peak_grid=(0.4, 0.5, 0.6, 0.7), fill_grid=(0.1, 0.2, 0.3, 0.4), prominence_grid=(0.1, 0.2, 0.3)
)


class TrainingInterruptedError(StoppedError):
    """A signal stopped the run after a checkpoint was saved."""


def train(config: TrainConfig, *, shown: bool = True, stop_after: int | None = None) -> TrainResult:
    """Train the model that `config` describes, or continue the run in its output folder.

    It writes into `config.output_dir`: `config.yaml` (resolved), `metrics.jsonl`, `checkpoints/`,
    `best.safetensors` (best validation AP so far), and at the end `model.safetensors` (float16,
    with tuned thresholds) and `curves.png`.  Processes that torchrun or srun started train one
    model together; only process 0 writes, and all return the same result.

    `shown` shows progress on standard error; `stop_after` is a step after which the run stops with a
    checkpoint as if by a signal.

    Raises ConfigError (the output folder holds a run of another configuration or of another number
    of processes, or the device does not suit several processes); DataSetError, ImageFileError (the
    images, the labels or their folders cannot be used); CheckpointError (a checkpoint or weight
    file cannot be read, or the loss is not finite); TrainingInterruptedError (SIGINT, SIGTERM, SIGHUP
    or SIGUSR2 arrived, or `stop_after` was reached; a checkpoint was saved).
    """
    with processes_of_run(config.device) as processes:
        return _Trainer(config, processes, shown=shown, stop_after=stop_after).run()


class _Trainer:
    def __init__(
        self, config: TrainConfig, processes: Processes, *, shown: bool, stop_after: int | None
    ) -> None:
        from dinov3.cells.interruption import StopRequest

        self.config = config
        self.processes = processes
        self.shown = shown and processes.is_main
        self.stop_after = stop_after
        self.folder = RunFolder(config)
        self.device = processes.device
        self.global_batch_size = config.schedule.batch_size * processes.world_size
        factor = process_factor(config.optimizer.scaling_rule, processes.world_size)
        self.learning_rate = config.optimizer.lr * factor
        self.step = 0
        self.best_ap = -1.0
        self.best_step = 0
        self.validations_without_gain = 0
        self.unvalidated = False  # this step has a checkpoint, but its validation is still to come
        self.stop_request = StopRequest(processes.device)

    def run(self) -> TrainResult:
        config = self.config
        self.processes.on_main(self.folder.claim)
        pairs = split_pairs(config.data, config.seed)
        self._build()
        self._resume()
        # Random numbers may differ in the last digit between kinds of CPU, replicas must not.
        self.processes.share_weights(self.model)
        self.processes.share_weights(self.averaged.module)
        num_crops = config.schedule.steps * self.global_batch_size
        dataset = CropDataset(pairs[0], config, length=num_crops, shown=self.shown)
        self.validation = ValidationImages(pairs[1], self.processes, config.model.intensity)
        self.processes.on_main(self.folder.write_config)
        with self.stop_request, self.folder.wandb(is_main=self.processes.is_main):
            stopped_early = self._loop(dataset)
            best, samples = self._final_validation()
            return self.processes.on_main(
                lambda: write_final_model(
                    self.folder,
                    best,
                    samples,
                    pairs,
                    best_step=self.best_step,
                    step=self.step,
                    stopped_early=stopped_early,
                    shown=self.shown,
                )
            )

    @property
    def average(self) -> DINOCell:
        """The model with the averaged weights."""
        return cast(DINOCell, self.averaged.module)

    def _build(self) -> None:
        """The model with its first weights, their average, and the optimizer."""
        config = self.config
        torch.manual_seed(config.seed)
        self.model = DINOCell(config.model)
        load_start(self.model)
        if isinstance(self.model.backbone, DINOv3Backbone) and config.backbone.weights is not None:
            load_backbone_weights(self.model.backbone, config.backbone.weights)
        self.model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.backbone.frozen:
            self.model.backbone.requires_grad_(False)
        self.averaged = average_weights(self.model, config.schedule.ema_decay)
        if self.processes.world_size > 1:
            # After the copy: what is validated and saved stays a plain model.
            synchronize_batch_norm(self.model)
        rates: dict[str, Any] = {"lr": config.optimizer.lr, "betas": config.optimizer.betas}
        self.optimizer = MuonAdamW(parameter_groups(self.model, config), **rates)

    def _loop(self, dataset: CropDataset) -> bool:
        """Train to the last step; True if the run ended early for lack of progress."""
        schedule = self.config.schedule
        if self._patience_is_over():
            return True  # it stopped early before: a second call must not train further
        steps = range(self.step, schedule.steps)
        batches = _batches(steps, schedule.batch_size, self.processes)
        workers = self.config.data.num_workers
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
        speed = _Speed()
        with progress("training", schedule.steps, shown=self.shown, done=self.step) as bar:
            bar.write(self._plan())
            if self.unvalidated:
                self._validate(bar)
                if self._patience_is_over():
                    return True
            speed.start()
            for image, target, weight in loader:
                speed.fetched()
                loss, gradient_norm = self._step(image, target, weight)
                self.step += 1
                speed.stepped(loss)
                best = f"  best AP {self.best_ap:.3f}" if self.best_ap >= 0 else ""
                bar.advance(note=f"loss {loss:.4f}{best}")
                if self.step % schedule.log_every == 0 or self.step == schedule.steps:
                    self._log(
                        {
                            "step": self.step,
                            "loss": float(np.mean(speed.losses)),
                            "lr": self.optimizer.param_groups[0]["lr"],
                            "gradient_norm": gradient_norm,
                            "global_batch_size": self.global_batch_size,
                            **speed.since_last_log(self.global_batch_size),
                        }
                    )
                if self._validate_or_save(bar):
                    return True
                speed.start()
        return False

    def _validate_or_save(self, bar: Progress) -> bool:
        """What is due after a step; True if the run ends early.

        Raises TrainingInterruptedError (a signal arrived; the checkpoint was saved).
        """
        schedule = self.config.schedule
        validated = self.step % schedule.eval_every == 0 or self.step == schedule.steps
        if validated:
            # A validation may take minutes, more than a preempted job has: save the step first.
            self.unvalidated = True
            self.processes.on_main(self._save)
            self._validate(bar)
        stopped_early = self._patience_is_over()
        interrupted = self.stop_request.agreed(self.step) or self.step == self.stop_after
        due = interrupted or self.step % schedule.checkpoint_every == 0
        if due and not validated:
            self.processes.on_main(self._save)
        if stopped_early:
            bar.write(f"stopped early: no better validation AP since step {self.best_step}")
            return True
        if interrupted and self.step < schedule.steps:
            raise self._interruption()
        return False

    def _interruption(self) -> TrainingInterruptedError:
        self.processes.ends_together = True
        return TrainingInterruptedError(
            f"Training was interrupted at step {self.step} of {self.config.schedule.steps}; a "
            "checkpoint was saved; run the same command to resume"
        )

    def _check_stop(self) -> None:
        if self.processes.any(self.stop_request.received is not None):
            raise self._interruption()

    def _plan(self) -> str:
        """Steps, crops per step and learning rate, in one line."""
        schedule, optimizer = self.config.schedule, self.config.optimizer
        num_processes = self.processes.world_size
        text = f"{schedule.steps} steps of {self.global_batch_size} crops"
        if num_processes > 1:
            text += f" ({schedule.batch_size} x {num_processes} processes)"
        text += f", learning rate {self.learning_rate:.3g}"
        if num_processes > 1:
            text += f" ({optimizer.scaling_rule} rule, configured {optimizer.lr:g})"
        return text

    def _patience_is_over(self) -> bool:
        patience = self.config.schedule.patience
        return patience is not None and self.validations_without_gain >= patience

    def _step(self, image: Tensor, target: Tensor, weight: Tensor) -> tuple[float, float]:
        config = self.config
        # Stochastic depth draws from torch's generator: seeding by step makes resuming exact.
        torch.manual_seed(step_seed(config.seed, self.step, self.processes.rank))
        self.model.train()
        if config.backbone.frozen:
            self.model.backbone.eval()
        factor = learning_rate_factor(self.step, config.optimizer, config.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"] * factor
        with autocast(config.schedule.precision, self.device):
            predicted = self.model(image.to(self.device, non_blocking=True))
        target, weight = (x.to(self.device, non_blocking=True) for x in (target, weight))
        loss = distance_loss(predicted, target, weight, kind=config.loss.kind)
        # One loss that is not finite spoils the mean, so all processes meet it here together.
        value = self.processes.mean(float(loss.detach()))
        if not math.isfinite(value):
            self.processes.ends_together = True
            raise CheckpointError(
                f"The training loss must be finite, got {value} at step {self.step}: lower "
                "optimizer.lr, or continue from the last checkpoint with schedule.precision=fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_gradients(self.model)
        limit = config.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], limit
        )
        self.optimizer.step()
        self.averaged.update_parameters(self.model)
        return value, float(norm)

    def _validate(self, bar: Progress) -> None:
        """Validate this step, and save the checkpoint that knows the outcome."""
        started = time.monotonic()
        samples = self.validation.predict(self.average, bar, self._check_stop)
        self.best_ap, self.best_step, self.validations_without_gain = self.processes.on_main(
            lambda: self._judge(samples, started, bar)
        )
        self.unvalidated = False
        self.processes.on_main(self._save)

    def _judge(
        self, samples: Sequence[Sample], started: float, bar: Progress
    ) -> tuple[float, int, int]:
        """Tune, keep the model if it is the best so far; (best AP, its step, tries since)."""
        best_ap, best_step = self.best_ap, self.best_step
        without_gain = self.validations_without_gain + 1
        min_area_px = self.config.model.min_area_px
        tuned = tune_thresholds(samples, _VALIDATION_GRIDS, metric="ap50", min_area_px=min_area_px)
        ap, chosen = tuned.best.score, tuned_values(tuned.thresholds)
        if ap > best_ap:
            best_ap, best_step, without_gain = ap, self.step, 0
            save_model(self.folder.best, with_config(self.average, **chosen))
        seconds = time.monotonic() - started
        self._log({"step": self.step, "val_ap50_pooled": ap, "val_seconds": seconds, **chosen})
        bar.write(f"step {self.step}: validation AP@0.5 {ap:.4f} (best {best_ap:.4f})")
        return best_ap, best_step, without_gain

    def _final_validation(self) -> tuple[DINOCell, list[Sample]]:
        """The best model, rounded to the float16 weights of the model file, and its maps."""
        best = self.average  # its weights are overwritten and needed no more
        if self.processes.is_main:
            best = DINOCell.from_pretrained(self.folder.best, device=self.device)
        self.processes.share_weights(best)
        round_weights(best)
        with progress("final validation", 1, shown=self.shown) as bar:
            return best, self.validation.predict(best, bar, self._check_stop)

    def _log(self, row: dict[str, Any]) -> None:
        if self.processes.is_main:
            self.folder.log(row)

    def _save(self) -> None:
        state = {
            "step": self.step,
            **{name: module.state_dict() for name, module in self._parts().items()},
            "best_ap": self.best_ap,
            "best_step": self.best_step,
            "validations_without_gain": self.validations_without_gain,
            "unvalidated": self.unvalidated,
            "processes": self.processes.world_size,
        }
        keep = self.config.schedule.keep_checkpoints
        save_checkpoint(self.folder.checkpoints, self.step, state, keep=keep)

    def _parts(self) -> dict[str, Any]:
        """What a checkpoint holds the state of."""
        return {"model": self.model, "averaged": self.average, "optimizer": self.optimizer}

    def _resume(self) -> None:
        """Load the newest checkpoint, if one exists, and drop the metrics of later steps."""
        # Asked of process 0 only: the listing of a network folder may be old elsewhere.
        checkpoints = self.processes.on_main(lambda: find_checkpoints(self.folder.checkpoints))
        if checkpoints:
            _, path = checkpoints[-1]
            state = load_checkpoint(path)
            num_processes = state.get("processes", 1)  # earlier versions had one
            if num_processes != self.processes.world_size:
                self.processes.ends_together = True
                raise ConfigError(
                    f"A run must continue with the number of processes it was started with, got "
                    f"{self.processes.world_size} where {path} is of {num_processes}: start as many "
                    "processes, or choose another output_dir"
                )
            try:
                for name, part in self._parts().items():
                    part.load_state_dict(state[name])
                self.step = int(state["step"])
                self.best_ap = float(state["best_ap"])
                self.best_step = int(state["best_step"])
                self.validations_without_gain = int(state["validations_without_gain"])
                self.unvalidated = bool(state.get("unvalidated", False))  # of an earlier version
            except (KeyError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise CheckpointError(
                    f"A checkpoint must fit the configured model, got {path} ({reason}): choose "
                    "another output_dir"
                ) from error
            self.averaged.n_averaged.fill_(1 + self.step)
        self.processes.on_main(
            lambda: self.folder.drop_metrics(self.step, unvalidated=self.unvalidated)
        )


class _Speed:
    """Losses, crops per second and share of the wait for crops, of the steps between two lines of metrics.

    Validations and checkpoints do not count: they come at intervals of their own.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._waited_s = self._elapsed_s = 0.0

    def start(self) -> None:
        """The wait for a batch begins."""
        self._waits_since = time.monotonic()

    def fetched(self) -> None:
        """The batch has arrived."""
        self._waited_s += time.monotonic() - self._waits_since

    def stepped(self, loss: float) -> None:
        """The step is done."""
        self.losses.append(loss)
        self._elapsed_s += time.monotonic() - self._waits_since

    def since_last_log(self, batch_size: int) -> dict[str, float]:
        """`crops_per_s` and `wait_share`; starts over."""
        elapsed_s = max(self._elapsed_s, 1e-9)
        crops_per_s = len(self.losses) * batch_size / elapsed_s
        row = {"crops_per_s": crops_per_s, "wait_share": self._waited_s / elapsed_s}
        self.losses, self._waited_s, self._elapsed_s = [], 0.0, 0.0
        return row


def _batches(steps: range, batch_size: int, processes: Processes) -> Iterator[list[int]]:
    """Item indices of this process for each step.

    Step s of W processes with batches of b is items s·W·b ... (s + 1)·W·b − 1, of which process r
    takes b from s·W·b + r·b on.
    """
    for step in steps:
        first = (step * processes.world_size + processes.rank) * batch_size
        yield list(range(first, first + batch_size))


def distance_loss(
    predicted: Tensor, target: Tensor, weight: Tensor | None = None, *, kind: str = "mse"
) -> Tensor:
    """Mean error between (B, 1, H, W) distance maps in [0, 1], over all pixels and crops.

    `kind` is `mse` or `bce` (see `dinocell.training.config.LossConfig`); `weight`, of the same shape, is
    what each pixel counts.  Raises ValueError if the shapes differ, which broadcasting would hide.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"`predicted` and `target` must have one shape, got {tuple(predicted.shape)} and "
            f"{tuple(target.shape)}: the decoder must return the input's size"
        )
    function = functional.mse_loss if kind == "mse" else functional.binary_cross_entropy
    loss = function(predicted.float(), target.float(), reduction="none")
    return loss.mean() if weight is None else (loss * weight).mean()
