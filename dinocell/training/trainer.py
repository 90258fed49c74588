"""The fine-tuning loop: `dinocell train`.

Everything random is a pure function of (seed, step, process), so a run that was cut anywhere
continues bit for bit on the CPU from its last checkpoint.  Several processes (torchrun, srun) share
the crops of a step: they see the samples that one process with the whole batch would see.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from dinocell import __version__
from dinocell.errors import (
    CheckpointError,
    ConfigError,
    DataSetError,
    MissingExtraError,
    StoppedError,
)
from dinocell.evaluation.tuning import ThresholdGrids, tune_thresholds, tuned_values
from dinocell.files import write_text_atomically
from dinocell.network.backbone import load_backbone_weights
from dinocell.network.model import DINOCell, save_model, with_config
from dinocell.pairs import Pair
from dinocell.progress import Progress, progress
from dinocell.segmentation.inference import predict_distance_map
from dinocell.settings import config_to_mapping
from dinocell.training.checkpoints import find_checkpoints, load_checkpoint, save_checkpoint
from dinocell.training.config import OptimizerConfig, TrainConfig
from dinocell.training.datasets import CropDataset, read_pair, split_pairs
from dinocell.training.losses import distance_loss
from dinocell.training.processes import Processes, processes_of_run
from dinocell.training.synchronized_norm import synchronize_batch_norm

__all__ = [
    "TrainResult",
    "TrainingInterruptedError",
    "learning_rate_factor",
    "parameter_groups",
    "process_factor",
    "refuse_other_run",
    "step_seed",
    "train",
]

# Keys that may differ between a run and its continuation: they change where and how fast, not what.
_FREE_KEYS = (
    ("device",),
    ("data", "num_workers"),
    ("data", "cache_bytes"),
    ("schedule", "log_every"),
    ("schedule", "keep_checkpoints"),
    ("schedule", "checkpoint_every"),
    ("wandb",),
    ("output_dir",),
    ("description",),
    ("licence",),
)
# Keys that runs of earlier versions lack; those had one process, where they change nothing.
_LATER_KEYS = (("optimizer", "scaling_rule"),)
_COARSE_GRIDS = ThresholdGrids(
    peak_grid=(0.4, 0.5, 0.6, 0.7), fill_grid=(0.1, 0.2, 0.3, 0.4), prominence_grid=(0.05, 0.15)
)
_FINE_GRIDS = ThresholdGrids(
    peak_grid=np.arange(0.30, 0.86, 0.05).round(2).tolist(),
    fill_grid=np.arange(0.05, 0.61, 0.05).round(2).tolist(),
    prominence_grid=(0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3),
)


class TrainingInterruptedError(StoppedError):
    """The run was stopped by a signal after writing a checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """Where the model is and how it did on the validation images."""

    model_path: Path
    step: int
    val_ap50: float
    thresholds: dict[str, float]
    stopped_early: bool


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up, cosine to the minimum.

    Loshchilov & Hutter 2017 (SGDR), eq. 5 without restarts.  Warm-up ends at step
    `warmup_steps - 1` with 1; the last step has `min_lr_ratio`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, total_steps - 1 - config.warmup_steps)
    share = min(1.0, (step - config.warmup_steps) / span)
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine


def process_factor(rule: str, num_processes: int) -> float:
    """Multiple of `optimizer.lr` for a batch that is `num_processes` times `schedule.batch_size`.

    `linear` (Goyal et al. 2017) suits SGD; `sqrt` (Malladi et al. 2022) suits Adam, whose step does
    not grow with the gradient; `none` leaves the configured rate.
    """
    if rule == "none":
        return 1.0
    return float(num_processes) if rule == "linear" else math.sqrt(num_processes)


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of stochastic depth in a step of a process: other crops drop other paths.

    torch's CPU generator keeps the low 32 bits of a seed.  Multiples of an odd number (here 2³² divided
    by the golden ratio) differ there, and lie far from the seeds of neighbouring steps.
    """
    return seed * 1_000_003 + step + rank * 0x9E3779B1


def parameter_groups(model: DINOCell, config: TrainConfig) -> list[dict[str, Any]]:
    """AdamW groups: backbone and decoder apart, weight decay on matrices only, layer decay.

    Each group has `lr_scale`, the multiple of the scheduled learning rate, and `params`.  Biases,
    norms, LayerScale and tokens do not decay.  A frozen backbone has no group.
    """
    depth = len(model.backbone.vit.blocks)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone."):
            scale = config.backbone.lr_mult * config.backbone.layer_decay ** _distance_from_top(
                name, depth
            )
        decays = parameter.ndim >= 2 and not name.endswith(("_token", "_tokens"))
        groups.setdefault((scale, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": scale,
            "weight_decay": config.optimizer.weight_decay if decays else 0.0,
        }
        for (scale, decays), parameters in groups.items()
    ]


def train(config: TrainConfig, *, shown: bool = True, stop_after: int | None = None) -> TrainResult:
    """Train a model as `config` says, or continue the run in its output folder.

    Writes into `config.output_dir`: `config.yaml` (resolved), `metrics.jsonl`, `checkpoints/`,
    `best.safetensors` (best validation AP so far), and at the end `model.safetensors` (float16,
    with tuned thresholds) and `curves.png`.  Started by torchrun or srun, the processes train one
    model together; only process 0 writes, and all return the same result.

    Parameters
    ----------
    config : TrainConfig
    shown : bool
        Show progress on standard error.
    stop_after : int, optional
        Stop with a checkpoint after this step as if by a signal.

    Raises
    ------
    ConfigError
        The output folder holds a run of another configuration or of another number of processes,
        or the device does not suit several processes.
    DataSetError, ImageFileError
        The data do not fit.
    CheckpointError
        A checkpoint or weight file cannot be read, or the loss is not finite.
    TrainingInterruptedError
        SIGINT, SIGTERM or SIGUSR2 came, or `stop_after` was reached; a checkpoint is written.
    """
    with processes_of_run(config.device) as processes:
        return _Trainer(config, processes, shown=shown, stop_after=stop_after).run()


def refuse_other_run(config: TrainConfig) -> None:
    """A run goes on with its own configuration only.

    Raises
    ------
    ConfigError
        `config.output_dir` holds a run of another one.
    """
    path = Path(config.output_dir) / "config.yaml"
    if not path.exists():
        return
    try:
        there = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        there = None
    differing = _differing_keys(there, config_to_mapping(config))
    if differing:
        raise ConfigError(
            f"a run must continue with its own configuration, got other values of "
            f"{', '.join(differing[:5])} than {path}: choose another output_dir"
        )


class _Trainer:
    def __init__(
        self, config: TrainConfig, processes: Processes, *, shown: bool, stop_after: int | None
    ) -> None:
        self.config = config
        self.processes = processes
        self.shown = shown and processes.is_main
        self.stop_after = stop_after
        self.output_dir = Path(config.output_dir)
        self.checkpoint_dir = self.output_dir / "checkpoints"
        self.log_path = self.output_dir / "metrics.jsonl"
        self.device = processes.device
        self.crop_px = config.schedule.crop_px or config.model.window_px
        self.global_batch_size = config.schedule.batch_size * processes.world_size
        self.learning_rate = config.optimizer.lr * process_factor(
            config.optimizer.scaling_rule, processes.world_size
        )
        self.step = 0
        self.best_ap = -1.0
        self.best_step = 0
        self.validations_without_gain = 0
        self.unvalidated = False  # this step is due for it, and has a checkpoint of before
        self._stop_signal: int | None = None

    def run(self) -> TrainResult:
        self.processes.on_main(self._claim_output_dir)
        train_pairs, val_pairs = split_pairs(self.config.data, self.config.seed)
        torch.manual_seed(self.config.seed)
        self.model = DINOCell(self.config.model)
        if self.config.backbone.weights is not None:
            load_backbone_weights(self.model.backbone, self.config.backbone.weights)
        self.model.to(self.device)
        if self.config.backbone.frozen:
            self.model.backbone.requires_grad_(False)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        if self.processes.world_size > 1:
            # After the copy: what is validated and saved stays a plain model.
            self.model.decoder = synchronize_batch_norm(self.model.decoder)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.config),
            lr=self.config.optimizer.lr,
            betas=self.config.optimizer.betas,
        )
        self._resume()
        # Random numbers may differ in the last digit between kinds of CPU, replicas must not.
        self.processes.share_weights(self.model)
        self.processes.share_weights(self.averaged)
        dataset = CropDataset(
            train_pairs,
            self.config.data.datasets,
            model=self.config.model,
            augment=self.config.augment,
            crop_px=self.crop_px,
            seed=self.config.seed,
            length=self.config.schedule.steps * self.global_batch_size,
            cache_bytes=self.config.data.cache_bytes,
            shown=self.shown,
        )
        self.num_val_images = len(val_pairs)
        self.processes.on_main(lambda: self._read_all_validation(val_pairs))
        if not self.processes.is_main:
            own = val_pairs[self.processes.rank :: self.processes.world_size]
            self.val_samples = [read_pair(pair) for pair in own]
        self.processes.on_main(self._write_config)
        with self._signals(), self._wandb() as self.wandb_run:
            stopped_early = self._loop(dataset)
            return self._finish(train_pairs, val_pairs, stopped_early)

    # ---- the loop -------------------------------------------------------------------------

    def _loop(self, dataset: CropDataset) -> bool:
        schedule = self.config.schedule
        if self._patience_is_over():
            return True  # stopped early before: a second call must not train on
        loader = DataLoader(
            dataset,
            batch_sampler=_StepSampler(
                self.step,
                schedule.steps,
                schedule.batch_size,
                rank=self.processes.rank,
                world_size=self.processes.world_size,
            ),
            num_workers=self.config.data.num_workers,
        )
        losses: list[float] = []
        waited_s, logged_at = 0.0, time.monotonic()
        with progress("training", schedule.steps, shown=self.shown, done=self.step) as bar:
            bar.write(self._plan())
            if self.unvalidated:
                self._validate(bar)
                if self._patience_is_over():
                    return True
            fetched_at = time.monotonic()
            for image, target in loader:
                waited_s += time.monotonic() - fetched_at
                loss, gradient_norm = self._step(image, target)
                self.step += 1
                losses.append(loss)
                bar.advance(note=f"loss {loss:.4f}  best AP {max(self.best_ap, 0):.3f}")
                if self.step % schedule.log_every == 0 or self.step == schedule.steps:
                    now = time.monotonic()
                    self._log(
                        {
                            "step": self.step,
                            "loss": float(np.mean(losses)),
                            "lr": self.optimizer.param_groups[0]["lr"],
                            "gradient_norm": gradient_norm,
                            "global_batch_size": self.global_batch_size,
                            "crops_per_s": len(losses) * self.global_batch_size / (now - logged_at),
                            "wait_share": waited_s / (now - logged_at),
                        }
                    )
                    losses, waited_s, logged_at = [], 0.0, now
                validated = self.step % schedule.eval_every == 0 or self.step == schedule.steps
                if validated:
                    # It may take minutes, more than a preempted job has: what was learned is safe.
                    self.unvalidated = True
                    self.processes.on_main(self._save)
                    self._validate(bar)
                stopped_early = self._patience_is_over()
                interrupted = self.processes.stops(self._stop_signal is not None, self.step)
                interrupted = interrupted or self.step == self.stop_after
                due = interrupted or self.step % schedule.checkpoint_every == 0
                if due and not validated:
                    self.processes.on_main(self._save)
                if stopped_early:
                    bar.write(f"stopped early: no better validation AP since step {self.best_step}")
                    return True
                if interrupted and self.step < schedule.steps:
                    raise self._interruption()
                fetched_at = time.monotonic()
        return False

    def _interruption(self) -> TrainingInterruptedError:
        self.processes.ends_together = True
        return TrainingInterruptedError(
            f"training must reach step {self.config.schedule.steps} and be validated, got a signal at "
            f"step {self.step}: run the same command to go on from its checkpoint"
        )

    def _plan(self) -> str:
        """What is done from here, in one line."""
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

    def _step(self, image: Tensor, target: Tensor) -> tuple[float, float]:
        config = self.config
        # Stochastic depth draws from torch's generator: seeding by step makes resuming exact.
        torch.manual_seed(step_seed(config.seed, self.step, self.processes.rank))
        self.model.train()
        if config.backbone.frozen:
            self.model.backbone.eval()
        factor = learning_rate_factor(self.step, config.optimizer, config.schedule.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"] * factor
        autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
        if config.schedule.precision == "bf16":
            autocast = torch.autocast(self.device.type, torch.bfloat16)
        with autocast:
            predicted = self.model(image.to(self.device, non_blocking=True))
        loss = distance_loss(predicted, target.to(self.device, non_blocking=True))
        # One loss that is not finite spoils the mean, so all processes meet it here together.
        value = self.processes.mean(float(loss.detach()))
        if not math.isfinite(value):
            self.processes.ends_together = True
            raise CheckpointError(
                f"the training loss must be finite, got {value} at step {self.step}: lower "
                "optimizer.lr, or go on from the last checkpoint with schedule.precision=fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average_gradients(self.model)
        limit = config.optimizer.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in self.model.parameters() if p.requires_grad], limit
        )
        self.optimizer.step()
        self._update_average()
        return value, float(norm)

    @torch.no_grad()
    def _update_average(self) -> None:
        # The usual warm-up of the decay: early averages would otherwise be mostly random weights.
        decay = min(self.config.schedule.ema_decay, (1 + self.step) / (10 + self.step))
        averaged, current = self.averaged.state_dict(), self.model.state_dict()
        for key, value in averaged.items():
            if value.is_floating_point():
                value.lerp_(current[key], 1.0 - decay)
            else:
                value.copy_(current[key])

    # ---- validation -----------------------------------------------------------------------

    def _read_all_validation(self, val_pairs: Sequence[Pair]) -> None:
        self.val_samples = [read_pair(pair) for pair in val_pairs]
        if not any(labels.any() for _, labels in self.val_samples):
            raise DataSetError(
                f"validation images must hold cells, got {len(val_pairs)} without any: name other "
                "val_labels, or raise data.val_fraction"
            )

    def _predict_validation(
        self, model: DINOCell, bar: Progress
    ) -> list[tuple[NDArray[np.float32], NDArray[np.uint32]]]:
        """Distance map and truth of every validation image in process 0, nothing in the others.

        Process 0 knows all images and predicts its share of them; the others know their share only.
        A signal ends it between two images; `bar` is told every ten seconds how far it is.
        """
        model.eval()
        world_size = self.processes.world_size
        own = self.val_samples
        if self.processes.is_main:
            own = own[::world_size]
        predicted, told_at = [], time.monotonic()
        for position in range(-(-self.num_val_images // world_size)):
            if self.processes.any(self._stop_signal is not None):
                raise self._interruption()
            if position < len(own):
                predicted.append(predict_distance_map(model, own[position][0]))
            if time.monotonic() - told_at > 10:
                told_at = time.monotonic()
                done = min((position + 1) * world_size, self.num_val_images)
                bar.write(f"validating {done}/{self.num_val_images} images")
        maps = self.processes.gather(predicted, self.num_val_images)
        if maps is None:
            return []
        truths = [truth for _, truth in self.val_samples]
        return list(zip(maps, truths, strict=True))

    def _validate(self, bar: Progress) -> None:
        """Validate this step, and write the checkpoint that knows the outcome."""
        started = time.monotonic()
        samples = self._predict_validation(self.averaged, bar)
        self.best_ap, self.best_step, self.validations_without_gain = self.processes.on_main(
            lambda: self._judge(samples, started, bar)
        )
        self.unvalidated = False
        self.processes.on_main(self._save)

    def _judge(
        self,
        samples: Sequence[tuple[NDArray[np.float32], NDArray[np.uint32]]],
        started: float,
        bar: Progress,
    ) -> tuple[float, int, int]:
        """Tune, keep the model if it is the best so far; (best AP, its step, tries since)."""
        best_ap, best_step, without_gain = (
            self.best_ap,
            self.best_step,
            self.validations_without_gain + 1,
        )
        tuned = tune_thresholds(
            samples, _COARSE_GRIDS, metric="ap50", min_area_px=self.config.model.min_area_px
        )
        ap = tuned.best.score
        if ap > best_ap:
            best_ap, best_step, without_gain = ap, self.step, 0
            save_model(
                self.output_dir / "best.safetensors",
                with_config(self.averaged, **tuned_values(tuned.thresholds)),
            )
        self._log(
            {
                "step": self.step,
                "val_ap50_pooled": ap,
                "val_seconds": time.monotonic() - started,
                **tuned_values(tuned.thresholds),
            }
        )
        bar.write(f"step {self.step}: validation AP@0.5 {ap:.4f} (best {best_ap:.4f})")
        return best_ap, best_step, without_gain

    # ---- files ----------------------------------------------------------------------------

    def _claim_output_dir(self) -> None:
        """Refuse a folder with a run of another configuration before touching anything."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        refuse_other_run(self.config)

    def _write_config(self) -> None:
        write_text_atomically(
            self.output_dir / "config.yaml",
            yaml.safe_dump(config_to_mapping(self.config), sort_keys=False),
        )

    def _save(self) -> None:
        save_checkpoint(
            self.checkpoint_dir,
            self.step,
            {
                "step": self.step,
                "model": self.model.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best_ap": self.best_ap,
                "best_step": self.best_step,
                "validations_without_gain": self.validations_without_gain,
                "unvalidated": self.unvalidated,
                "processes": self.processes.world_size,
            },
            keep=self.config.schedule.keep_checkpoints,
        )

    def _resume(self) -> None:
        # Asked of process 0 only: the listing of a network folder may be old elsewhere.
        checkpoints = self.processes.on_main(lambda: find_checkpoints(self.checkpoint_dir))
        if not checkpoints:
            self.processes.on_main(self._truncate_log)
            return
        _, path = checkpoints[-1]
        state = load_checkpoint(path)
        num_processes = state.get("processes", 1)  # earlier versions had one
        if num_processes != self.processes.world_size:
            self.processes.ends_together = True
            raise ConfigError(
                f"a run must continue with the number of processes it was started with, got "
                f"{self.processes.world_size} where {path} is of {num_processes}: start as many "
                "processes, or choose another output_dir"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
            self.best_ap = float(state["best_ap"])
            self.best_step = int(state["best_step"])
            self.validations_without_gain = int(state["validations_without_gain"])
            self.unvalidated = bool(state.get("unvalidated", False))  # of an earlier version
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"a checkpoint must fit the configured model, got {path} ({reason}): choose "
                "another output_dir"
            ) from error
        self.processes.on_main(self._truncate_log)

    def _truncate_log(self) -> None:
        """Drop lines of steps that will be done again."""
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
                again = self.step if self.unvalidated and "val_seconds" in row else self.step + 1
                if row["step"] < again:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut by a crash
        write_text_atomically(self.log_path, "".join(line + "\n" for line in kept))

    def _log(self, row: dict[str, Any]) -> None:
        if not self.processes.is_main:
            return
        with self.log_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.wandb_run is not None:
            try:
                self.wandb_run.log(row, step=self.step)
            except Exception as error:  # a failing logger never stops training
                print(f"wandb stopped ({error}); metrics.jsonl goes on", flush=True)
                self.wandb_run = None

    @contextlib.contextmanager
    def _wandb(self) -> Iterator[Any]:
        if not self.config.wandb.enabled:
            yield None
            return
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError(
                'wandb.enabled needs the package wandb, which is not installed: pip install "dinocell[wandb]"'
            ) from error
        if not self.processes.is_main:
            yield None  # after the import: a missing package stops all processes alike
            return
        id_path = self.output_dir / "wandb_id"
        if not id_path.exists():
            id_path.write_text(secrets.token_hex(4), encoding="utf-8")
        run = wandb.init(
            project=self.config.wandb.project,
            name=self.config.wandb.name or self.config.name,
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
            mode=_wandb_mode(),
            dir=str(self.output_dir),
            config=config_to_mapping(self.config),
        )
        try:
            yield run
        finally:
            run.finish()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: object) -> None:
            self._stop_signal = number

        numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGUSR2"):
            numbers.append(signal.SIGUSR2)
        before: dict[int, Any] = {}
        try:
            for number in numbers:
                before[number] = signal.signal(number, note)
        except ValueError:
            before = {}  # not the main thread: the caller handles signals
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # ---- the end --------------------------------------------------------------------------

    def _finish(
        self, train_pairs: Sequence[Pair], val_pairs: Sequence[Pair], stopped_early: bool
    ) -> TrainResult:
        best = self.averaged  # its weights are overwritten; it is not needed any more
        if self.processes.is_main:
            path = self.output_dir / "best.safetensors"
            best = DINOCell.from_pretrained(path, device=self.device)
        self.processes.share_weights(best)
        # Tuned on the float16 weights that are shipped, not on better ones.
        for value in best.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
        with progress("final validation", 1, shown=self.shown) as bar:
            samples = self._predict_validation(best, bar)
        return self.processes.on_main(
            lambda: self._ship(best, samples, train_pairs, val_pairs, stopped_early)
        )

    def _ship(
        self,
        best: DINOCell,
        samples: Sequence[tuple[NDArray[np.float32], NDArray[np.uint32]]],
        train_pairs: Sequence[Pair],
        val_pairs: Sequence[Pair],
        stopped_early: bool,
    ) -> TrainResult:
        """Choose the final thresholds, write the model and the curves."""
        tuned = tune_thresholds(
            samples, _FINE_GRIDS, metric="ap", min_area_px=self.config.model.min_area_px
        )
        final = tune_thresholds(
            samples,
            ThresholdGrids(*([value] for value in tuned_values(tuned.thresholds).values())),
            metric="ap50",
            min_area_px=self.config.model.min_area_px,
        )
        shipped = with_config(best, **tuned_values(tuned.thresholds))
        shipped.card = {
            "name": self.config.name,
            "description": self.config.description,
            "licence": self.config.licence,
            "dinocell_version": __version__,
            "torch_version": torch.__version__,
            "commit": _commit(),
            "data": {
                dataset.name: {
                    "train_images": sum(pair.dataset == dataset.name for pair in train_pairs),
                    "val_images": sum(pair.dataset == dataset.name for pair in val_pairs),
                }
                for dataset in self.config.data.datasets
            },
            "best_step": self.best_step,
            "seed": self.config.seed,
            "metrics": {
                "val_ap50_pooled": final.best.score,
                "val_ap_mean_pooled": tuned.best.score,
            },
        }
        model_path = self.output_dir / "model.safetensors"
        save_model(model_path, shipped, half=True)
        from dinocell.training.curves import draw_curves

        draw_curves(self.log_path, self.output_dir / "curves.png")
        return TrainResult(
            model_path=model_path,
            step=self.step,
            val_ap50=final.best.score,
            thresholds=tuned_values(tuned.thresholds),
            stopped_early=stopped_early,
        )


class _StepSampler(Sampler[list[int]]):
    """Batches of item indices from `first_step` on.

    Step s of W processes with batches of b is items s·W·b ... (s + 1)·W·b − 1, of which process r
    takes b from s·W·b + r·b on.
    """

    def __init__(
        self, first_step: int, num_steps: int, batch_size: int, *, rank: int, world_size: int
    ) -> None:
        self.steps = range(first_step, num_steps)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


def _wandb_mode() -> Literal["online", "offline", "disabled"]:
    """As the environment says; without a key there, offline, to be uploaded with `wandb sync`."""
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return cast(Literal["online", "offline", "disabled"], asked)
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def _commit() -> str | None:
    """The commit of the code that runs, where it runs from a git checkout."""
    command = ["git", "rev-parse", "HEAD"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _distance_from_top(name: str, depth: int) -> int:
    """0 for the final norm, 1 for the last block, ..., depth + 1 for patch embedding and tokens."""
    parts = name.split(".")
    if "blocks" in parts:
        return depth - int(parts[parts.index("blocks") + 1])
    return 0 if parts[2] == "norm" else depth + 1


def _differing_keys(there: Any, here: dict[str, Any]) -> list[str]:
    if not isinstance(there, dict):
        return ["config.yaml (unreadable)"]
    differing = []

    def compare(left: Any, right: Any, path: tuple[str, ...]) -> None:
        if path in _FREE_KEYS or (path in _LATER_KEYS and left is None):
            return
        if isinstance(left, dict) and isinstance(right, dict):
            for key in sorted(left.keys() | right.keys()):
                compare(left.get(key), right.get(key), (*path, key))
        elif left != right:
            differing.append(".".join(path))

    compare(there, here, ())
    return differing
