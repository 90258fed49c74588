"""Student, teacher and their losses (matches `dinov3.train.ssl_meta_arch`).

DINO (Caron et al. 2021), iBOT (Zhou et al. 2022), KoLeo and their sum as in DINOv2 (Oquab et al.
2023, section 4); Gram anchoring and the single-stage schedule of DINOv3 (Siméoni et al. 2025).
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov3.cells.sinkhorn import Assignment
from dinov3.cells.strategy import (
    full_state_dict,
    load_full_state_dict,
    resolve_device,
    resolve_strategy,
)
from dinov3.cells.weights import LoadReport, load_backbone
from dinov3.checkpointer import init_fsdp_model_from_checkpoint
from dinov3.configs import get_default_config
from dinov3.data import DataAugmentationDINO
from dinov3.distributed import get_process_subgroup, get_subgroup_size, get_world_size
from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize
from dinov3.layers.dino_head import DINOHead
from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.models import build_model_from_cfg
from dinov3.train.cosine_lr_scheduler import linear_warmup_cosine_decay
from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp
from dinov3.utils import count_parameters

__all__ = ["SSLMetaArch"]

logger = logging.getLogger("dinov3")

Metrics = dict[str, Tensor | float]

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GLOBAL_CROPS = 2
_NOT_BACKBONE = ["dino_head", "ibot_head", "dino_loss", "ibot_patch_loss", "ibot_loss"]


class SSLMetaArch(nn.Module):
    """The networks of self-supervised training and one step's forward and backward pass.

    `student`, `teacher`, `model_ema` (the teacher itself unless a larger frozen network teaches)
    and `gram_teacher` are ModuleDicts with `backbone`, `dino_head` and `ibot_head`.  They are made
    without storage; `prepare_for_distributed_training` places them, `init_weights` fills them.

    Args:
        cfg: a whole configuration, see `configs/ssl_default_config.yaml`.

    Raises:
        ValueError: settings that exclude one another, or that this tree does not have.
    """

    # ModuleDicts, whose entries mypy cannot tell apart.
    student: Any
    teacher: Any
    model_ema: Any
    gram_teacher: Any

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        _check(cfg)
        self.cfg = cfg
        self.device_ = resolve_device(cfg)
        self.strategy = resolve_strategy(cfg, self.device_)
        self.param_dtype = _PRECISIONS[cfg.compute_precision.param_dtype]
        self.accumulation_steps = int(cfg.accelerator.accumulation_steps)
        self.load_report: LoadReport | None = None

        student_backbone, teacher_backbone, width = build_model_from_cfg(cfg)  # type: ignore[misc]
        self.embed_dim = width
        self.dino_out_dim = cfg.dino.head_n_prototypes
        self.ibot_out_dim = cfg.ibot.head_n_prototypes
        self.student = self._with_heads(student_backbone, cfg, width)
        self.model_ema = self._with_heads(teacher_backbone, cfg, width)
        if cfg.distillation.enabled:
            self.teacher = self._distillation_teacher()
        else:
            self.teacher = self.model_ema
        logger.info(
            "student: %.1f M parameters, backbone %.1f M",
            count_parameters(self.student) / 1e6,
            count_parameters(student_backbone) / 1e6,
        )

        self.dino_loss = DINOLoss(self.dino_out_dim)
        self.ibot_patch_loss = iBOTPatchLoss(self.ibot_out_dim)
        self.is_koleo_distributed = bool(cfg.dino.koleo_loss_distributed)
        self.koleo_loss: nn.Module = (
            KoLeoLossDistributed(
                topk=cfg.dino.koleo_topk,
                loss_group_size=cfg.dino.koleo_distributed_loss_group_size,
            )
            if self.is_koleo_distributed
            else KoLeoLoss()
        )
        self._make_gram(cfg)
        total = cfg.optim.epochs * cfg.train.OFFICIAL_EPOCH_LENGTH
        self.dino_local_loss_schedule = (
            _schedule(cfg.dino.local_loss_weight_schedule, cfg.train.OFFICIAL_EPOCH_LENGTH, total)
            if cfg.dino.reweight_dino_local_loss
            else None
        )
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()

    # --- construction ---

    def _with_heads(self, backbone: nn.Module, cfg: DictConfig, width: int) -> nn.ModuleDict:
        def head(section: DictConfig) -> DINOHead:
            with torch.device("meta"):
                return DINOHead(
                    in_dim=width,
                    out_dim=section.head_n_prototypes,
                    hidden_dim=section.head_hidden_dim,
                    bottleneck_dim=section.head_bottleneck_dim,
                    nlayers=section.head_nlayers,
                )

        return nn.ModuleDict(
            {"backbone": backbone, "dino_head": head(cfg.dino), "ibot_head": head(cfg.ibot)}
        )

    def _distillation_teacher(self) -> nn.ModuleDict:
        """A frozen network with heads, by its own configuration (facts: `distillation`)."""
        path = self.cfg.distillation.full_cfg_path
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"distillation.full_cfg_path must be the teacher's configuration, got {path!r}: "
                "name the config.yaml of its run"
            )
        teacher_cfg = OmegaConf.merge(get_default_config(), OmegaConf.load(path))
        assert isinstance(teacher_cfg, DictConfig)
        for section in ("dino", "ibot"):
            ours, theirs = self.cfg[section], teacher_cfg[section]
            if ours.head_n_prototypes != theirs.head_n_prototypes:
                raise ValueError(
                    f"{section}.head_n_prototypes must equal the distillation teacher's, got "
                    f"{ours.head_n_prototypes} and {theirs.head_n_prototypes}: set it to the latter"
                )
        backbone, width = build_model_from_cfg(teacher_cfg, only_teacher=True)  # type: ignore[misc]
        return self._with_heads(backbone, teacher_cfg, width)

    def _make_gram(self, cfg: DictConfig) -> None:
        gram = cfg.gram
        self.gram_use_loss = bool(gram.use_loss)
        self.gram_ema_teacher = bool(gram.ema_teacher)
        self.has_gram_teacher = self.gram_use_loss and not self.gram_ema_teacher
        self.gram_loss: GramLoss | None = None
        self.gram_loss_schedule = None
        self.gram_teacher_ready = False
        if not self.gram_use_loss:
            return
        self.gram_loss = GramLoss(
            apply_norm=gram.normalized,
            img_level=gram.img_level,
            remove_neg=gram.remove_neg,
            remove_only_teacher_neg=gram.remove_only_teacher_neg,
        )
        if gram.loss_weight_schedule is not None:
            length = cfg.train.OFFICIAL_EPOCH_LENGTH
            self.gram_loss_schedule = _schedule(
                gram.loss_weight_schedule, length, cfg.optim.epochs * length
            )
        if self.has_gram_teacher:
            backbone, _ = build_model_from_cfg(cfg, only_teacher=True)  # type: ignore[misc]
            self.gram_teacher = nn.ModuleDict({"backbone": backbone})

    def _frozen(self) -> list[nn.ModuleDict]:
        found = [self.model_ema]
        if self.teacher is not self.model_ema:
            found.append(self.teacher)
        if self.has_gram_teacher:
            found.append(self.gram_teacher)
        return found

    def prepare_for_distributed_training(self) -> None:
        """Checkpointing, compilation, sharding and storage, as the configuration says."""
        ac_compile_parallelize(
            trained_model=self.student,
            inference_only_models=self._frozen(),
            cfg=self.cfg,
            trained_model_process_group=get_process_subgroup(),
        )
        if self.strategy != "fsdp":
            for model in (self.student, *self._frozen()):
                model["backbone"].rope_output_dtype = self.param_dtype
        self.dino_loss.to(self.device_)
        self.ibot_patch_loss.to(self.device_)

    def init_weights(self, *, from_files: bool = True) -> None:
        """Start values: random, or from files of the configuration.

        The student is drawn on the CPU with torch's global generator and handed to every process,
        so that device and strategy do not change it.  `student.pretrained_weights` fills the
        backbone (any format, any patch size), `student.resume_from_teacher_chkpt` the backbone and
        whatever heads the file has.  The EMA starts as the student.

        Args:
            from_files: false for a run that is resumed: its checkpoint replaces these values, and
                the files may be gone.
        """
        start = nn.ModuleDict()
        if not dist.is_initialized() or dist.get_rank(get_process_subgroup()) == 0:
            start = self._fresh_student(from_files=from_files)
        load_full_state_dict(self.student, start.state_dict(), self.strategy)
        load_full_state_dict(self.model_ema, start.state_dict(), self.strategy)
        self.dino_loss.init_weights()
        self.ibot_patch_loss.init_weights()
        if self.has_gram_teacher and self.cfg.gram.ckpt and from_files:
            logger.info("Gram teacher from %s", self.cfg.gram.ckpt)
            init_fsdp_model_from_checkpoint(
                self.gram_teacher, self.cfg.gram.ckpt, skip_load_keys=_NOT_BACKBONE
            )
            self.gram_teacher_ready = True
        elif self.has_gram_teacher:
            self.gram_load_ema_teacher()
            self.gram_teacher_ready = self.cfg.gram.it_load_ema_teacher < 0
        if self.cfg.distillation.enabled:
            logger.info("distillation teacher from %s", self.cfg.distillation.checkpoint_path)
            init_fsdp_model_from_checkpoint(self.teacher, self.cfg.distillation.checkpoint_path)

    def _fresh_student(self, *, from_files: bool) -> nn.ModuleDict:
        """A student with start values, on the CPU."""
        cfg = self.cfg
        backbone, _ = build_model_from_cfg(cfg, only_teacher=True)  # type: ignore[misc]
        student = self._with_heads(backbone, cfg, self.embed_dim).to_empty(device="cpu")
        for module in student.values():
            module.init_weights()  # type: ignore[operator]
        for key in ("pretrained_weights", "resume_from_teacher_chkpt"):
            path = cfg.student[key]
            if not path or not from_files:
                continue
            self.load_report = load_backbone(
                student["backbone"], path, patch_method=cfg.patch_adaptation.method
            )
            logger.info("student.%s: %s", key, self.load_report)
            if key == "resume_from_teacher_chkpt":
                _load_heads(student, path)
            else:
                logger.info("heads start at random: %s has a backbone only, or is read so", path)
        return student

    # --- one step ---

    def forward(self, inputs: Any) -> Any:
        """Not used: a step is `forward_backward`."""
        raise NotImplementedError(
            "SSLMetaArch has no forward pass of its own: call forward_backward"
        )

    def forward_backward(
        self, data: dict[str, Any], *, teacher_temp: float, iteration: int = 0, **ignored: Any
    ) -> tuple[Tensor, Metrics]:
        """Losses of one batch and their gradients.

        Args:
            data: what `collate_data_and_cast` gives, plus `global_batch_size`.
            teacher_temp: temperature of the teacher's assignment.
            iteration: for schedules of loss weights.

        Returns:
            The loss, detached from no graph, and what is to be logged; nothing is copied to the
            host.  Gradients are divided by `accelerator.accumulation_steps`.
        """
        del ignored
        locals_number = self.cfg.crops.local_crops_number
        batch = data["collated_local_crops"].shape[0] // locals_number
        metrics: Metrics = {"local_batch_size": float(batch)}
        if "global_batch_size" in data:
            metrics["global_batch_size"] = float(data["global_batch_size"])

        move = partial(torch.Tensor.to, device=self.device_, non_blocking=True)
        global_crops = move(data["collated_global_crops"])
        local_crops = move(data["collated_local_crops"])
        masks = move(data["collated_masks"])
        mask_indices = move(data["mask_indices_list"])
        masks_weight = move(data["masks_weight"])
        n_masked = move(data["n_masked_patches"])

        teacher_global = self.get_teacher_output(
            global_crops.unflatten(0, (_GLOBAL_CROPS, batch)),
            teacher_temp=teacher_temp,
            n_masked_patches_tensor=n_masked,
            mask_indices_list=mask_indices,
            upperbound=data["upperbound"],
        )
        student_global, student_local = self.get_student_output(
            global_crops=global_crops.unflatten(0, (_GLOBAL_CROPS, batch)),
            local_crops=local_crops.unflatten(0, (locals_number, batch)),
            upperbound=data["upperbound"],
            masks=masks,
            mask_indices_list=mask_indices,
        )
        gram_global = None
        if self.gram_use_loss:
            crops = data.get("collated_gram_teacher_crops")
            gram_global = self.get_gram_teacher_output(
                None if crops is None else move(crops).unflatten(0, (_GLOBAL_CROPS, batch)),
                masks=masks,
                teacher_global=teacher_global,
                student_global=student_global,
                student_global_crops_size=global_crops.shape[-1],
            )
        loss, loss_metrics = self.compute_losses(
            teacher_global=teacher_global,
            student_global=student_global,
            student_local=student_local,
            gram_global=gram_global,
            masks=masks,
            mask_indices_list=mask_indices,
            masks_weight=masks_weight,
            iteration=iteration,
        )
        self.backprop_loss(loss)
        return loss, metrics | loss_metrics

    def _precision(self) -> Any:
        """Mixed precision where FSDP does not bring it."""
        if self.strategy == "fsdp" or self.param_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_.type, dtype=self.param_dtype)

    @torch.no_grad()
    def get_teacher_output(
        self,
        images: Tensor,
        *,
        upperbound: int,
        mask_indices_list: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
    ) -> dict[str, Any]:
        """The teacher on unmasked global crops.

        Args:
            images: [G, B, 3, H, W].
            mask_indices_list: rows of masked patches among [G·B·N].

        Returns:
            `cls_pre_head` [G, B, D], `cls_centered` [G, B, K], `patch_pre_head` [G, B, N, D] and
            `masked_patch_centered`, an `Assignment` of M rows.
        """
        crops, batch = images.shape[:2]
        with self._precision():
            out = self.teacher.backbone(images.flatten(0, 1), is_training=True)
            cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
            masked = patches.flatten(0, 1).index_select(0, mask_indices_list)  # [M, D]
            masked_logits = self.teacher.ibot_head(masked)
            cls_logits = self.teacher.dino_head(cls)  # [G·B, K]
        if self.cfg.train.centering == "sinkhorn_knopp":
            cls_centered = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp)
            assignment = self.ibot_patch_loss.sinkhorn_knopp_teacher.assign(
                masked_logits, teacher_temp, chunk_bytes=self._chunk_bytes
            )
        else:
            cls_centered = self.dino_loss.softmax_center_teacher(cls_logits, teacher_temp)
            self.dino_loss.update_center(cls_logits)
            assignment = self.ibot_patch_loss.softmax_center_assignment(masked_logits, teacher_temp)
            self.ibot_patch_loss.update_center(masked_logits)
        return {
            "cls_pre_head": cls.unflatten(0, (crops, batch)),
            "patch_pre_head": patches.unflatten(0, (crops, batch)),
            "cls_centered": cls_centered.unflatten(0, (crops, batch)),
            "masked_patch_centered": assignment,
        }

    def get_student_output(
        self,
        *,
        global_crops: Tensor,
        local_crops: Tensor,
        upperbound: int,
        masks: Tensor,
        mask_indices_list: Tensor,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The student on masked global crops and on local crops, in one call.

        Args:
            global_crops: [G, B, 3, H, W].
            local_crops: [L, B, 3, h, w].
            masks: [G·B, N]; not shown to the student when a frozen network teaches.

        Returns:
            For globals `cls_pre_head` [G, B, D], `cls_after_head` [G, B, K], `patch_pre_head`
            [G, B, N, D], `masked_patch_pre_head` [M, D]; for locals the first two.
        """
        n_global, batch = global_crops.shape[:2]
        n_local = local_crops.shape[0]
        shown = None if self.cfg.distillation.enabled else masks
        with self._precision():
            global_out, local_out = self.student.backbone(
                [global_crops.flatten(0, 1), local_crops.flatten(0, 1)],
                masks=[shown, None],
                is_training=True,
            )
            global_cls = global_out["x_norm_clstoken"]
            local_cls = local_out["x_norm_clstoken"]
            patches = global_out["x_norm_patchtokens"]
            masked = patches.flatten(0, 1).index_select(0, mask_indices_list)
            # One call of the head for all crops: its weights are read once.
            logits = self.student.dino_head(torch.cat([global_cls, local_cls]))
        global_logits, local_logits = logits.split([n_global * batch, n_local * batch])
        return (
            {
                "cls_pre_head": global_cls.unflatten(0, (n_global, batch)),
                "cls_after_head": global_logits.unflatten(0, (n_global, batch)),
                "patch_pre_head": patches.unflatten(0, (n_global, batch)),
                "masked_patch_pre_head": masked,
            },
            {
                "cls_pre_head": local_cls.unflatten(0, (n_local, batch)),
                "cls_after_head": local_logits.unflatten(0, (n_local, batch)),
            },
        )

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

        Args:
            images: [G, B, 3, H', W'] for a separate Gram teacher, None for the EMA.

        Returns:
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

        if gram_global is not None and (self.gram_ema_teacher or self.gram_teacher_ready):
            total = total + self._gram_part(student_global, gram_global, masks, iteration, metrics)
        return total, {
            key: value.detach() if isinstance(value, Tensor) else value
            for key, value in metrics.items()
        }

    @property
    def _chunk_bytes(self) -> int:
        return int(self.cfg.accelerator.loss_chunk_mb) * 2**20

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
            chunk_bytes=self._chunk_bytes,
        )
        with self._precision():
            return self.student.ibot_head(masked, loss=loss)

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

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss` over the number of accumulated batches."""
        (loss / self.accumulation_steps).backward()

    # --- teachers ---

    @torch.no_grad()
    def update_ema(self, m: float) -> None:
        """model_ema = m * model_ema + (1 - m) * student, parameters only."""
        _move_towards(self.model_ema, self.student, m)

    @torch.no_grad()
    def update_gram(self, m: float = 0) -> None:
        """The Gram teacher's backbone moves to the EMA's; m is the share of itself that it keeps."""
        if not self.has_gram_teacher:
            return
        _move_towards(self.gram_teacher["backbone"], self.model_ema["backbone"], m)
        self.gram_teacher_ready = True

    @torch.no_grad()
    def gram_load_ema_teacher(self) -> None:
        """The Gram teacher becomes a copy of the EMA, buffers included."""
        if not self.has_gram_teacher:
            return
        state = full_state_dict(self.model_ema["backbone"], self.strategy)
        load_full_state_dict(self.gram_teacher["backbone"], state, self.strategy)
        self.gram_teacher_ready = True

    # --- training ---

    def train(self, mode: bool = True) -> SSLMetaArch:
        """Teachers stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def get_params_groups(self) -> list[dict[str, Any]]:
        """Groups of all trainable parameters; see `param_groups`."""
        optim = self.cfg.optim
        groups: list[dict[str, Any]] = []
        for name, module in self.student.items():
            found = get_params_groups_with_decay_fsdp(
                model=module,
                lr_decay_rate=optim.layerwise_decay,
                patch_embed_lr_mult=optim.patch_embed_lr_mult,
            )
            if name == "dino_head":  # names below a head do not tell it
                for group in found:
                    group["wd_multiplier"] *= optim.dino_head_wd_multiplier
            if optim.multi_tensor_optim:  # each part alone, as upstream's optimiser states have it
                found = fuse_params_groups(found)
                for group in found:
                    group["foreach"] = True
                    group["fused"] = True
            groups += found
        return groups

    def build_data_augmentation_dino(self, cfg: DictConfig) -> Any:
        """The crops of one sample: upstream's on RGB, or multiple views of a field's channels."""
        if cfg.multiview.strategy:
            from dinov3.data.augmentations_multiview import build_multiview_augmentation

            return build_multiview_augmentation(cfg)
        crops = cfg.crops
        return DataAugmentationDINO(
            crops.global_crops_scale,
            crops.local_crops_scale,
            crops.local_crops_number,
            global_crops_size=crops.global_crops_size,
            local_crops_size=crops.local_crops_size,
            gram_teacher_crops_size=crops.gram_teacher_crops_size,
            gram_teacher_no_distortions=crops.gram_teacher_no_distortions,
            local_crops_subset_of_global_crops=crops.localcrops_subset_of_globalcrops,
            patch_size=cfg.student.patch_size,
            share_color_jitter=crops.share_color_jitter,
            horizontal_flips=crops.horizontal_flips,
            mean=crops.rgb_mean,
            std=crops.rgb_std,
        )

    def broadcast_to_subgroups(
        self, tensor: Tensor, over_dim: int, global_batch_size: int
    ) -> Tensor:
        """Rows of all processes, cut to `global_batch_size` (multi-distillation only).

        With one subgroup, the only case of this tree, every process has its rows already.
        """
        if get_subgroup_size() != get_world_size():
            raise NotImplementedError(
                "this tree must have one group of processes, got subgroups: multi-distillation is "
                "not part of it"
            )
        return tensor.narrow(over_dim, 0, min(tensor.shape[over_dim], global_batch_size))


def _move_towards(target: nn.Module, source: nn.Module, keep: float) -> None:
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(source.parameters())
    torch._foreach_mul_(targets, keep)
    torch._foreach_add_(targets, sources, alpha=1 - keep)


def _schedule(section: DictConfig, epoch_length: int, total: int) -> Any:
    """Values of a start/peak/end section, one an iteration."""
    cosine = section.get("cosine_epochs")
    return linear_warmup_cosine_decay(
        start=section.start,
        peak=section.peak,
        end=section.end,
        warmup_iterations=section.warmup_epochs * epoch_length,
        total_iterations=total,
        cosine_iterations=None if cosine is None else cosine * epoch_length,
    )


def _load_heads(student: nn.ModuleDict, path: str) -> None:
    """Heads of a teacher file, where it has them; refuses those of another shape."""
    state: dict[str, Any] = {}
    if Path(path).is_file() and Path(path).suffix != ".safetensors":
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("teacher", {}) if isinstance(content, dict) else {}
    for name in ("dino_head", "ibot_head"):
        part = {
            key.removeprefix(f"{name}."): value
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
        if not part:
            logger.warning("%s starts at random: %s does not have it", name, path)
            continue
        try:
            student[name].load_state_dict(part)
        except RuntimeError as error:
            raise ValueError(
                f"{name} of {path} must fit this configuration, got another shape ({error}): set "
                "the head's sizes to those of the file, or give the file to student.pretrained_weights"
            ) from error


def _check(cfg: DictConfig) -> None:
    """Settings that exclude one another."""

    def require(holds: bool, text: str) -> None:
        if not holds:
            raise ValueError(text)

    def one_of(key: str, known: tuple[str, ...]) -> None:
        value = OmegaConf.select(cfg, key)
        require(
            value in known, f"{key} must be one of {', '.join(known)}, got {value!r}: choose one"
        )

    one_of("train.centering", ("sinkhorn_knopp", "softmax"))
    one_of("compute_precision.param_dtype", tuple(_PRECISIONS))
    one_of("compute_precision.reduce_dtype", tuple(_PRECISIONS))
    one_of("gram.tokens_used", ("all", "masked", "unmasked"))
    one_of("MODEL.META_ARCHITECTURE", ("SSLMetaArch",))
    one_of("optim.optimizer", ("adamw",))
    require(
        cfg.crops.local_crops_number > 0,
        f"crops.local_crops_number must be at least 1, got {cfg.crops.local_crops_number}: 8 is usual",
    )
    require(
        bool(cfg.ibot.separate_head),
        "ibot.separate_head must be true, got false: the patch loss has a head of its own",
    )
    require(
        cfg.accelerator.accumulation_steps >= 1,
        f"accelerator.accumulation_steps must be at least 1, got {cfg.accelerator.accumulation_steps}: "
        "1 is without accumulation",
    )
    require(
        not cfg.multidistillation.enabled,
        "multidistillation.enabled must be false, got true: this tree trains one student",
    )
    require(
        cfg.dino.koleo_topk == 1 or cfg.dino.koleo_loss_distributed,
        f"dino.koleo_topk must be 1 without dino.koleo_loss_distributed, got {cfg.dino.koleo_topk}: "
        "set the latter to true",
    )
    require(
        cfg.dino.koleo_distributed_replicas == 0,
        f"dino.koleo_distributed_replicas must be 0, got {cfg.dino.koleo_distributed_replicas}: "
        "group by dino.koleo_distributed_loss_group_size",
    )
    gram = cfg.gram
    if not gram.use_loss:
        return
    require(
        not (gram.remove_neg and gram.remove_only_teacher_neg),
        "gram.remove_neg and gram.remove_only_teacher_neg must not both be true, got both: choose one",
    )
    require(
        gram.tokens_used == "all" or not gram.img_level,
        f"gram.img_level must be false for gram.tokens_used={gram.tokens_used}, got true: a choice "
        "of tokens has no image axis",
    )
    if gram.ema_teacher:
        require(
            not gram.ckpt and not gram.rep_update and cfg.crops.gram_teacher_crops_size is None,
            "gram.ema_teacher must come without gram.ckpt, gram.rep_update and "
            "crops.gram_teacher_crops_size, got one of them: the EMA itself is the Gram teacher",
        )
    else:
        require(
            cfg.crops.gram_teacher_crops_size is not None,
            "crops.gram_teacher_crops_size must be set for a Gram teacher, got null: give it the "
            "size of the global crops, or set gram.ema_teacher",
        )
        require(
            bool(gram.ckpt) or gram.it_load_ema_teacher >= 0 or gram.rep_update,
            "a Gram teacher must come from somewhere, got no gram.ckpt, no gram.it_load_ema_teacher "
            "and no gram.rep_update: set one, or gram.ema_teacher",
        )
