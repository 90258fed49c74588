"""Twenty iterations of the training program against the loop written out in float64.

The reference takes the networks' forward passes and the batches from the tree, and has its own
schedules, centring, losses, clipping, AdamW and EMA: from the papers that `ssl_meta_arch` names and
from Loshchilov and Hutter 2019, algorithm 2.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from dinov3.train import train as program

EPOCHS, LENGTH, WARMUP, FROZEN = 5, 4, 2, 1  # epochs; iterations of an epoch
TOTAL = EPOCHS * LENGTH
BATCH, LOCALS, TEMPERATURE = 4, 2, 0.1
LR, MIN_LR, CLIP = 0.02, 0.001, 0.3
DECAY, DECAY_END, MOMENTUM, MOMENTUM_END = 0.5, 2.0, 0.6, 0.95
SETTINGS = {
    "student.arch": "vit_test",
    "student.patch_size": 8,
    "student.drop_path_rate": 0.0,
    "student.layerscale": 0.5,
    "dino.head_n_prototypes": 24,
    "dino.head_hidden_dim": 16,
    "dino.head_bottleneck_dim": 8,
    "ibot.head_n_prototypes": 20,
    "ibot.head_hidden_dim": 16,
    "ibot.head_bottleneck_dim": 8,
    "ibot.loss_weight": 0.7,
    "dino.koleo_loss_weight": 0.05,
    "compute_precision.param_dtype": "fp32",
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": LOCALS,
    "train.batch_size_per_gpu": BATCH,
    "train.num_workers": 0,
    "train.OFFICIAL_EPOCH_LENGTH": LENGTH,
    "optim.epochs": EPOCHS,
    "optim.warmup_epochs": WARMUP,
    "optim.freeze_last_layer_epochs": FROZEN,
    "optim.lr": LR,
    "optim.min_lr": MIN_LR,
    "optim.scaling_rule": "none",
    "optim.clip_grad": CLIP,
    "optim.layerwise_decay": 0.8,
    "optim.patch_embed_lr_mult": 0.5,
    "optim.dino_head_wd_multiplier": 3.0,
    "optim.weight_decay": DECAY,
    "optim.weight_decay_end": DECAY_END,
    "teacher.momentum_teacher": MOMENTUM,
    "teacher.final_momentum_teacher": MOMENTUM_END,
    "teacher.warmup_teacher_temp": 0.05,
    "teacher.teacher_temp": 0.2,
    "teacher.warmup_teacher_temp_epochs": 4,
    "checkpointing.period": 1000,
    "accelerator.device": "cpu",
    "monitor.enabled": "false",
}
DENSE = {  # crops of fields that show one window, turned alike
    "multiview.strategy": "multiview",
    "multiview.window": "same",
    "multiview.turn_together": "true",
    "multiview.photometrics": "worker",
    "multiview.dense_weight": 0.6,
}
TWO = "accelerator.accumulation_steps"


@pytest.fixture
def recorded(request, tmp_path, monkeypatch):
    """A run of the program: its networks before and after, batches and losses."""
    rng = np.random.default_rng(3)
    data = f"ImageFolder:root={tmp_path}"
    if DENSE.items() <= request.param.items():
        pattern = r"(?P<field>\d)_(?P<channel>\w+)[.]png"
        data = f"JUMPCellPaintingMultiView:root={tmp_path}:pattern={pattern}"
    for index in range(8):
        picture = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        if data.startswith("ImageFolder"):
            Image.fromarray(picture).save(tmp_path / f"{index}.png")
        for channel in range(0 if data.startswith("ImageFolder") else 3):
            Image.fromarray(picture[..., channel]).save(tmp_path / f"{index}_c{channel}.png")
    found: dict[str, Any] = {"batches": [], "losses": []}
    step = program._Run.step

    def noted(self, iteration, batches):
        if iteration == 0:
            found["start"] = copy.deepcopy(self.model)
        found["batches"] += copy.deepcopy(batches)
        values = step(self, iteration, batches)
        found["losses"].append(float(values["total_loss"]))
        found["model"] = self.model
        return values

    monkeypatch.setattr(program._Run, "step", noted)
    changes = [f"{key}={value}" for key, value in (SETTINGS | request.param).items()]
    path = f"train.dataset_path={data}"
    program.main(["--output-dir", str(tmp_path / "out"), *changes, path])
    return found


@pytest.mark.parametrize(
    "recorded",
    [
        {"train.centering": "sinkhorn_knopp"},
        {"train.centering": "softmax"},
        {"train.centering": "sinkhorn_knopp", **DENSE},
        {"train.centering": "auto", **DENSE, TWO: 2},  # softmax for so few samples
    ],
    indirect=True,
    ids=["sinkhorn_knopp", "softmax", "dense and sinkhorn_knopp", "dense, accumulated"],
)
def test_twenty_iterations_are_those_of_the_reference(recorded):
    cfg = recorded["model"].cfg
    student, teacher, losses, centres = reference(
        recorded["start"],
        recorded["batches"],
        sinkhorn=cfg.train.centering == "sinkhorn_knopp",
        dense=float(cfg.multiview.dense_weight),
        accumulated=int(cfg.accelerator.accumulation_steps),
    )
    assert len(losses) == TOTAL
    assert OmegaConf.select(cfg, "optim.lr") == LR
    np.testing.assert_allclose(recorded["losses"], losses, rtol=2e-4)
    for network, expected in (("student", student), ("model_ema", teacher)):
        found = dict(getattr(recorded["model"], network).named_parameters())
        start = dict(getattr(recorded["start"], network).named_parameters())
        for name, value in expected.items():
            way = (value - start[name].detach().double()).norm()
            error = (found[name].detach().double() - value).norm()
            assert error <= 0.02 * way + 1e-6, (network, name, float(error), float(way))
    for name, part in (("cls", "dino_loss"), ("patches", "ibot_patch_loss")):
        found = getattr(recorded["model"], part).center.flatten()
        expected = torch.zeros(len(found)) if centres[name] is None else centres[name].float()
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)


# --- the reference ---


def reference(
    start: Any,
    batches: list[dict[str, Any]],
    *,
    sinkhorn: bool,
    dense: float = 0.0,
    accumulated: int = 1,
):
    """Parameters of student and teacher, the losses, and the centres, which move with each batch."""
    student, teacher = (copy.deepcopy(part) for part in (start.student, start.model_ema))
    for network in (student, teacher):
        network.double()
        network["backbone"].rope_embed.to(torch.bfloat16)  # whose tables are bfloat16, as upstream
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in named(student)}
    centres: dict[str, Tensor | None] = {"cls": None, "patches": None}
    losses = []
    for iteration in range(len(batches) // accumulated):
        for parameter in student.parameters():
            parameter.grad = None
        losses.append(0.0)
        for batch in batches[iteration * accumulated : (iteration + 1) * accumulated]:
            loss = total_loss(
                student, teacher, batch, temperature_of(iteration), centres, sinkhorn, dense
            )
            (loss / accumulated).backward()
            losses[-1] += float(loss.detach()) / accumulated
        adamw(student, moments, iteration)
        keep = cosine(iteration, TOTAL, MOMENTUM, MOMENTUM_END)
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.copy_(keep * mine + (1 - keep) * theirs)
    return dict(named(student)), dict(named(teacher)), losses, centres


def named(network: Any) -> list[tuple[str, Tensor]]:
    return [(name, parameter.detach()) for name, parameter in network.named_parameters()]


def cosine(iteration: int, length: int, first: float, last: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * iteration / length)) / 2


def rate_of(iteration: int) -> float:
    warmup = WARMUP * LENGTH
    if iteration < warmup:
        return LR * iteration / (warmup - 1)
    return cosine(iteration - warmup, TOTAL - warmup, LR, MIN_LR)


def temperature_of(iteration: int) -> float:
    return 0.2 if iteration >= 16 else 0.05 + 0.15 * iteration / 15


def total_loss(student, teacher, batch, temperature, centres, sinkhorn, dense) -> Tensor:
    large, small = batch["collated_global_crops"].double(), batch["collated_local_crops"].double()
    masks = batch["collated_masks"]
    with torch.no_grad():
        out = teacher["backbone"](large, is_training=True)
        patches = out["x_norm_patchtokens"][masks]
        # Of the other crop; before the centre moves, and without moving it.
        every = teacher["ibot_head"](out["x_norm_patchtokens"].roll(BATCH, dims=0).flatten(0, 1))
        of_other = assigned(every, temperature, dict(centres), "patches", sinkhorn)
        targets = {
            name: assigned(logits, temperature, centres, name, sinkhorn)
            for name, logits in (
                ("cls", teacher["dino_head"](out["x_norm_clstoken"])),
                ("patches", teacher["ibot_head"](patches)),
            )
        }
    seen = student["backbone"](large, masks=masks, is_training=True)
    seen_small = student["backbone"](small, is_training=True)
    crops = [seen["x_norm_clstoken"], seen_small["x_norm_clstoken"]]
    logs = [
        torch.log_softmax(student["dino_head"](crop) / TEMPERATURE, -1).unflatten(0, (-1, BATCH))
        for crop in crops
    ]
    wanted = targets["cls"].unflatten(0, (2, BATCH))
    # Each student crop against each teacher crop but itself: 2 and 4 pairs.
    pairs = [(wanted[1 - s], logs[0][s]) for s in range(2)]
    pairs += [(wanted[t], logs[1][s]) for t in range(2) for s in range(LOCALS)]
    loss = sum(-(p * q).sum(-1).mean() for p, q in pairs) / len(pairs)
    for features in seen["x_norm_clstoken"].split(BATCH):
        unit = features / features.norm(dim=-1, keepdim=True)
        apart = (unit[:, None] - unit[None]).square().sum(-1)
        apart = apart + torch.diag(torch.full((BATCH,), math.inf, dtype=torch.float64))
        loss = loss - 0.05 * apart.min(dim=1).values.sqrt().log().mean()
    predicted = student["ibot_head"](seen["x_norm_patchtokens"][masks]) / TEMPERATURE
    entropy = -(targets["patches"] * torch.log_softmax(predicted, -1)).sum(-1)
    image_of = masks.nonzero()[:, 0]
    means = [entropy[image_of == image].mean() for image in image_of.unique()]
    loss = loss + 0.7 * sum(means) / len(masks)
    if dense:
        predicted = student["ibot_head"](seen["x_norm_patchtokens"].flatten(0, 1)) / TEMPERATURE
        loss = loss - dense * (of_other * torch.log_softmax(predicted, -1)).sum(-1).mean()
    return loss


def assigned(logits, temperature, centres, name, sinkhorn) -> Tensor:
    """The teacher's assignment: equal shares for all prototypes, or a running centre."""
    if sinkhorn:
        shares = (logits / temperature).exp().T  # [K, M]
        shares = shares / shares.sum()
        for _ in range(3):
            shares = shares / shares.sum(dim=1, keepdim=True) / shares.shape[0]
            shares = shares / shares.sum(dim=0, keepdim=True) / shares.shape[1]
        return (shares * shares.shape[1]).T
    centre = torch.zeros_like(logits[0]) if centres[name] is None else centres[name]
    centres[name] = 0.9 * centre + 0.1 * logits.mean(dim=0)
    return ((logits - centre) / temperature).softmax(-1)


def adamw(student, moments, iteration: int) -> None:
    """Clip each of the three parts by its norm, then Adam with decoupled weight decay."""
    factors = {}
    for part in ("backbone", "dino_head", "ibot_head"):
        squares = [p.grad.square().sum() for p in student[part].parameters()]
        factors[part] = min(1.0, CLIP / (float(sum(squares)) ** 0.5 + 1e-6))
    decay = cosine(iteration, TOTAL, DECAY, DECAY_END)
    t = iteration + 1
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            part, _, inner = name.partition(".")
            rate, own_decay = rate_of(iteration), decay
            if "last_layer" in name and iteration < FROZEN * LENGTH:
                rate = 0.0
            if (
                part == "backbone"
            ):  # two blocks: inputs are layer 0, block i layer i + 1, norm layer 3
                layer = int(inner.split(".")[1]) + 1 if inner.startswith("blocks.") else 3
                if "token" in inner or "patch_embed" in inner:
                    layer = 0
                rate *= 0.8 ** (3 - layer)
            if "patch_embed" in inner:
                rate *= 0.5
            if name.endswith("bias") or "norm" in inner or "gamma" in inner:
                own_decay = 0.0
            elif part == "dino_head":
                own_decay *= 3.0
            gradient = parameter.grad * factors[part]
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient.square())
            parameter.mul_(1 - rate * own_decay)
            step = (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            parameter.sub_(rate * step)
