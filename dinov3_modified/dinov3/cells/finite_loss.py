"""A loss that is NaN or infinite ends the run, with all that is needed to find out why (ours)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

import dinov3.distributed as distributed
from dinov3.cells.checks import listed
from dinov3.cells.run_data import sample_names
from dinov3.checkpointer import save_checkpoint


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
        f"the loss must be finite, got {float(loss)} in iteration {iteration} with the samples "
        f"{listed(names)}: batch, names and state are in {folder}; look at these samples, or lower "
        "optim.lr"
    )
