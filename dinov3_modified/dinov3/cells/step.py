"""One optimiser step: seeds, accumulated batches, gradient norms, the Gram teacher's turns (ours).

A loss that is NaN or infinite ends the run, with all that is needed to find out why.
"""

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

import dinov3.distributed as distributed
from dinov3.cells.checks import listed
from dinov3.cells.photometrics import photometrics_on_batch
from dinov3.cells.run_data import photometrics_on_device, sample_names
from dinov3.checkpointer import save_checkpoint
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
        logger.info("The Gram teacher becomes the EMA of iteration %d", iteration)
        model.update_gram()


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names iteration, samples and the saved state."""


@dataclass
class FiniteGuard:
    """Whether the loss is a number, without waiting for a GPU.

    On a CPU the answer is about this loss.  On a GPU it is about the one before: its flag was
    copied to the host while the next step was being launched.
    """

    device: torch.device
    flag: Tensor | None = None
    event: Any = None

    def is_finite(self, loss: Tensor) -> bool:
        finite = torch.isfinite(loss)
        if distributed.is_enabled() and distributed.get_world_size() > 1:
            # All processes stop together, else the others would wait for the one that did.
            shared = finite.float()
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
            finite = shared > 0
        if self.device.type != "cuda":
            return bool(finite)
        answer = self.last_is_finite()
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


def save_non_finite(
    cfg: DictConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    loader: Any,
    batches: list[dict[str, Any]],
    iteration: int,
    loss: Tensor,
) -> NonFiniteLossError:
    """Save batch, sample names and state to OUT/nan_logs; all processes call this.

    The weights are those before the step; on a GPU, whose flag comes a step late, after it.
    Returns the error to raise.
    """
    folder = Path(cfg.train.output_dir) / "nan_logs" / f"iteration_{iteration}"
    names = sample_names(cfg, loader, iteration)
    if distributed.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(batches, folder / "batch.pth")
        (folder / "samples.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
    save_checkpoint(
        folder / "state", iteration=iteration - 1, model=model, optimizer=optimizer, overwrite=True
    )
    return NonFiniteLossError(
        f"The loss must be finite, got {float(loss)} in iteration {iteration} with the samples "
        f"{listed(names)}: batch, names and state are in {folder}; look at these samples, or lower "
        "optim.lr"
    )
