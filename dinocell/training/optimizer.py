"""How the weights learn: parameter groups, learning rate, averaged weights, random numbers of a step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dinocell.network.backbone import DINOv3Backbone
from dinocell.network.model import DINOCell
from dinocell.training.config import OptimizerConfig, TrainConfig

_MOMENTUM = 0.95  # of Muon, as Jordan et al. use
_STEPS = 5  # of its iteration, with these coefficients
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Weights that read the image or write the map: Muon is made for those between (Jordan et al. 2024).
_ENDS = ("head.", "patch_embed.", "image_stem.", "levels.0.0.")


class MuonAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for groups with `muon`, AdamW for the others.

    Muon moves a matrix by its gradient's moving average made nearly orthogonal, so that all directions learn
    at one speed.  A convolution counts as the matrix (channels out, all the rest), a transposed one as
    (channels in, all the rest).  A step is 0.2 √(larger side) times that (Liu et al. 2025, section 2.2),
    about as long as AdamW's, whose learning rates and decay therefore serve for both.  `torch.optim.Muon`
    has the same rule for two dimensions, and computes in bf16 on every processor.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of all groups; the gradients of those with `muon` are used up."""
        for group in self.param_groups:
            for parameter in group["params"] if group.get("muon") else ():
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    # AdamW asks every parameter for its `step` when a checkpoint is loaded.
                    state["step"] = torch.zeros(())
                    state["momentum"] = torch.zeros_like(parameter)
                state["step"] += 1
                average = state["momentum"].mul_(_MOMENTUM).add_(gradient)
                wanted = gradient.add(average, alpha=_MOMENTUM).flatten(1)  # Nesterov's
                length = 0.2 * math.sqrt(max(wanted.shape)) * group["lr"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(orthogonalized(wanted).reshape(parameter.shape), alpha=length)
                parameter.grad = None  # AdamW passes over it
        super().step()


def orthogonalized(matrix: Tensor) -> Tensor:
    """(m, n) floats → a matrix with the same singular vectors and singular values of about 0.7 to 1.2.

    Five steps of a Newton-Schulz iteration with the coefficients of Jordan et al. 2024.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


def learning_rate_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Share of the peak learning rate at 0-based `step`: linear warm-up, cosine to the minimum.

    Loshchilov & Hutter 2017 (SGDR), eq. 5 without restarts.  Warm-up ends at step
    `warmup_steps - 1` with 1; the last step has `min_lr_ratio`.  `CosineScheduler` of the dinov3 tree
    gives the same values up to the last binary digit; this formula stays because a run that an
    earlier version began must continue with exactly its rates.
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
    """Groups of `MuonAdamW`: backbone and decoder apart, weight decay on matrices only, layer decay.

    Each group has `lr_scale`, the multiple of the scheduled learning rate, `params` and `muon`.  Biases,
    norms, LayerScale and tokens do not decay, and do not learn by Muon.  A frozen backbone has no group.
    """
    backbone = model.backbone
    depth = len(backbone.vit.blocks) if isinstance(backbone, DINOv3Backbone) else 0
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("backbone."):
            distance = _distance_from_top(name, depth)
            scale = config.backbone.lr_mult * config.backbone.layer_decay**distance
        decays = parameter.ndim >= 2 and not name.endswith(("_token", "_tokens"))
        muon = config.optimizer.kind == "muon" and decays and not any(end in name for end in _ENDS)
        groups.setdefault((scale, decays, muon), []).append(parameter)
    decay = {True: config.optimizer.weight_decay, False: 0.0}
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay[decays], "muon": muon}
        for (scale, decays, muon), parameters in groups.items()
    ]


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows its weights and buffers as an exponential moving average.

    `decay` in [0, 1) is the share of the old average that a step keeps; 0 copies the weights.  It is lower
    in the first steps, (1 + step) / (10 + step): early averages would otherwise be mostly random weights.
    The result's `module` is the averaged model, in eval mode.  Its `n_averaged` counts the start too: set
    it to 1 + step to continue a run.
    """

    @torch.no_grad()
    def average(
        averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        step = int(num_averaged) - 1
        kept = min(decay, (1 + step) / (10 + step))
        for old, new in zip(averaged, current, strict=True):
            if old.is_floating_point():
                old.lerp_(new, 1.0 - kept)
            else:
                old.copy_(new)

    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    averaged.n_averaged.fill_(1)
    return averaged.eval().requires_grad_(False)


def _distance_from_top(name: str, depth: int) -> int:
    """0 for the final norm, 1 for the last block, ..., depth + 1 for patch embedding and tokens."""
    parts = name.split(".")
    if "blocks" in parts:
        return depth - int(parts[parts.index("blocks") + 1])
    return depth + 1 if depth and parts[2] != "norm" else 0
