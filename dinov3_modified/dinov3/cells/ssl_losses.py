"""The losses of one training step, and the Gram teacher that one of them needs (ours).

Base class of `dinov3.train.ssl_meta_arch.SSLMetaArch`, which makes the networks and calls them.
"""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dinov3.distributed as distributed
from dinov3.cells.sinkhorn import Assignment, softmax_assignment
from dinov3.cells.strategy import full_state_dict, load_full_state_dict

logger = logging.getLogger("dinov3")

Metrics = dict[str, Tensor | float]

_FEWEST_FOR_SINKHORN = 64  # samples: equal shares for all prototypes mean little among fewer


def centering_of(cfg: Any) -> str:
    """`train.centering`; for `auto` what suits the samples of a forward batch of all processes."""
    if cfg.train.centering != "auto":
        return str(cfg.train.centering)
    samples = int(cfg.train.batch_size_per_gpu) * distributed.get_world_size()
    chosen = "sinkhorn_knopp" if samples >= _FEWEST_FOR_SINKHORN else "softmax"
    line = "`train.centering`: %s, for %d samples in a forward batch (sinkhorn_knopp from %d on)"
    logger.info(line, chosen, samples, _FEWEST_FOR_SINKHORN)
    return chosen


class SSLLosses(nn.Module):
    """What `SSLMetaArch` does with the outputs of its networks; it sets all attributes."""

    cfg: Any
    strategy: str
    student: Any
    teacher: Any
    model_ema: Any
    centering: str
    gram_teacher: Any
    dino_loss: Any
    ibot_patch_loss: Any
    koleo_loss: Any
    gram_loss: Any
    is_koleo_distributed: bool
    dino_local_loss_schedule: Any
    gram_loss_schedule: Any
    gram_ema_teacher: bool
    has_gram_teacher: bool
    gram_teacher_ready: bool

    def _precision(self) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def get_gram_teacher_output(
        self,
        images: Tensor | None,
        *,
        masks: Tensor,
        teacher_global: dict[str, Any],
        student_global: dict[str, Any],
        student_global_crops_size: int,
    ) -> dict[str, Any]:
        """Patches that the Gram loss compares: student's and Gram teacher's.

        `images`: [G, B, 3, H', W'] for a separate Gram teacher, None for the EMA.  Returns
        `teacher_patches` [G·B, N, D], resized to the student's grid where it differs.
        """
        if self.gram_ema_teacher:
            patches = teacher_global["patch_pre_head"].flatten(0, 1)
        else:
            assert images is not None
            with self._precision():
                out = self.gram_teacher.backbone(images.flatten(0, 1), is_training=True)
            patches = out["x_norm_patchtokens"]
        wanted = student_global["patch_pre_head"].shape[2]
        if patches.shape[1] != wanted:
            patches = self._resize_patches(patches, wanted)
        return {"teacher_patches": patches, "masks": masks}

    def _resize_patches(self, patches: Tensor, wanted: int) -> Tensor:
        """[B, N', D] → [B, wanted, D], both of square grids."""
        edge, target = round(patches.shape[1] ** 0.5), round(wanted**0.5)
        maps = patches.transpose(1, 2).unflatten(2, (edge, edge))
        maps = nn.functional.interpolate(
            maps.float(),
            size=(target, target),
            mode=self.cfg.gram.global_teacher_resize_method,
            align_corners=False,
            antialias=self.cfg.gram.global_teacher_resize_antialias,
        )
        return maps.flatten(2).transpose(1, 2)

    def compute_losses(
        self,
        *,
        teacher_global: dict[str, Any],
        student_global: dict[str, Any],
        student_local: dict[str, Any],
        gram_global: dict[str, Any] | None,
        masks: Tensor,
        mask_indices_list: Tensor,
        masks_weight: Tensor,
        iteration: int,
    ) -> tuple[Tensor, Metrics]:
        """The weighted sum of all losses, and each by its name in upstream's log."""
        cfg = self.cfg
        n_global = student_global["cls_after_head"].shape[0]
        n_local = student_local["cls_after_head"].shape[0]
        ignore_diagonal = bool(cfg.dino.global_ignore_diagonal)
        global_pairs = n_global * (n_global - 1) if ignore_diagonal else n_global**2
        local_pairs = n_global * n_local
        pairs = global_pairs + local_pairs
        metrics: Metrics = {}

        local_loss = self.dino_loss(
            student_logits=student_local["cls_after_head"],
            teacher_probs=teacher_global["cls_centered"],
        )
        reweight = 1.0
        if self.dino_local_loss_schedule is not None:
            reweight = float(self.dino_local_loss_schedule[iteration])
        metrics["dino_local_crops_loss"] = local_loss
        metrics["dino_local_loss_weight"] = reweight
        global_loss = self.dino_loss(
            student_logits=student_global["cls_after_head"],
            teacher_probs=teacher_global["cls_centered"],
            ignore_diagonal=ignore_diagonal,
        )
        metrics["dino_global_crops_loss"] = global_loss
        total = cfg.dino.loss_weight * (
            local_pairs / pairs * reweight * local_loss + global_pairs / pairs * global_loss
        )

        if cfg.dino.koleo_loss_weight > 0 or self.is_koleo_distributed:
            features = student_global["cls_pre_head"]
            if cfg.accelerator.koleo_fp32:
                features = features.float()
            koleo_loss = sum(self.koleo_loss(crop) for crop in features) / n_global
            metrics["koleo_loss"] = koleo_loss
            total = total + cfg.dino.koleo_loss_weight * n_global * koleo_loss

        ibot_loss = self._patch_loss(
            student_global["masked_patch_pre_head"],
            teacher_global["masked_patch_centered"],
            masks,
            masks_weight,
        )
        metrics["ibot_loss"] = ibot_loss
        total = total + cfg.ibot.loss_weight * ibot_loss

        if self.cfg.multiview.dense_weight > 0:
            dense_loss = self._dense_loss(student_global, teacher_global)
            metrics["dense_loss"] = dense_loss
            total = total + cfg.multiview.dense_weight * dense_loss

        if gram_global is not None and (self.gram_ema_teacher or self.gram_teacher_ready):
            total = total + self._gram_part(student_global, gram_global, masks, iteration, metrics)
        return total, {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in metrics.items()
        }

    @property
    def _kernels(self) -> dict[str, Any]:
        """How the losses over all prototypes run."""
        where = self.device_.type == "cuda" or self.cfg.accelerator.compile_on_cpu
        return {
            "chunk_bytes": int(self.cfg.accelerator.loss_chunk_mb) * 2**20,
            "compiled": bool(self.cfg.train.compile and where),
        }

    def _patch_loss(
        self, masked: Tensor, assignment: Assignment, masks: Tensor, masks_weight: Tensor
    ) -> Tensor:
        """iBOT loss of the masked patches [M, D]."""
        if not self.cfg.accelerator.fused_loss:
            with self._precision():
                logits = self.student.ibot_head(masked)
            return self.ibot_patch_loss.forward_masked(
                logits,
                assignment.probabilities(),
                student_masks_flat=masks,
                n_masked_patches=masked.shape[0],
                masks_weight=masks_weight,
            )
        # The head calls this with its last layer's weight, which sharding shows only inside it.
        loss = partial(
            self.ibot_patch_loss.forward_fused,
            assignment=assignment,
            student_masks_flat=masks,
            masks_weight=masks_weight,
            **self._kernels,
        )
        with self._precision():
            return self.student.ibot_head(masked, loss=loss)

    def _dense_targets(self, patches: Tensor, teacher_temp: float) -> Assignment:
        """The teacher's assignment of each patch of the other global crop.

        `patches`: [2·B, N, D]; the rows of the result are those of the student's crops.
        """
        first, second = patches.chunk(2)
        logits = self.teacher.ibot_head(torch.cat([second, first]).flatten(0, 1))
        if self.centering == "softmax":  # the centre follows the masked patches alone
            return softmax_assignment(logits, self.ibot_patch_loss.center[0], teacher_temp)
        return self.ibot_patch_loss.sinkhorn_knopp_teacher.assign(
            logits, teacher_temp, **self._kernels
        )

    def _dense_loss(self, student_global: dict[str, Any], teacher_global: dict[str, Any]) -> Tensor:
        """Cross-entropy at every patch, masked or visible, with the other view of the same place.

        The iBOT objective across views (`multiview.dense_weight`): both crops show one window, turned
        alike, so that patch n of both is one place.
        """
        patches = student_global["patch_pre_head"].flatten(0, 1)  # [2·B, N, D]
        every = torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device)
        weights = torch.full_like(every, 1 / patches.shape[1], dtype=torch.float32).flatten()
        return self._patch_loss(
            patches.flatten(0, 1), teacher_global["dense_centered"], every, weights
        )

    def _gram_part(
        self,
        student_global: dict[str, Any],
        gram_global: dict[str, Any],
        masks: Tensor,
        iteration: int,
        metrics: Metrics,
    ) -> Tensor:
        gram = self.cfg.gram
        assert self.gram_loss is not None
        student = student_global["patch_pre_head"].flatten(0, 1)  # [G·B, N, D]
        teacher = gram_global["teacher_patches"].to(student.dtype)
        weight = float(gram.loss_weight)
        if self.gram_loss_schedule is not None:
            weight = float(self.gram_loss_schedule[iteration])
        tokens = {"all": None, "masked": masks, "unmasked": ~masks}[gram.tokens_used]
        chosen = (student, teacher) if tokens is None else (student[tokens], teacher[tokens])
        loss = self.gram_loss(*chosen, img_level=gram.img_level)
        metrics["gram_loss_weight"] = weight
        metrics["gram_loss"] = loss
        if gram.compute_stats:
            with torch.no_grad():
                for name, part in (("masked", masks), ("unmasked", ~masks)):
                    metrics[f"stats_only/{name}_gram_loss"] = self.gram_loss(
                        student[part], teacher[part], img_level=False
                    )
        return weight * loss

    @torch.no_grad()
    def update_gram(self, m: float = 0) -> None:
        """The Gram teacher's backbone moves to the EMA's; m is the share of itself that it keeps."""
        if not self.has_gram_teacher:
            return
        move_towards(self.gram_teacher["backbone"], self.model_ema["backbone"], m)
        self.gram_teacher_ready = True

    @torch.no_grad()
    def gram_load_ema_teacher(self) -> None:
        """The Gram teacher becomes a copy of the EMA, buffers included."""
        if not self.has_gram_teacher:
            return
        state = full_state_dict(self.model_ema["backbone"], self.strategy)
        load_full_state_dict(self.gram_teacher["backbone"], state, self.strategy)
        self.gram_teacher_ready = True


def move_towards(target: nn.Module, source: nn.Module, keep: float) -> None:
    """target = keep * target + (1 - keep) * source, parameters only."""
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(source.parameters())
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, sources, alpha=1 - keep)
