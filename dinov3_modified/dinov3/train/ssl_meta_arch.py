"""Student, teacher and their losses (matches `dinov3.train.ssl_meta_arch`).

DINO (Caron et al. 2021), iBOT (Zhou et al. 2022), KoLeo and their sum as in DINOv2 (Oquab et al.
2023, section 4); Gram anchoring and the single-stage schedule of DINOv3 (Siméoni et al. 2025).
"""

import contextlib
import logging
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov3.cells.packed_attention import find_kernel, use_packed_attention
from dinov3.cells.resumption import fill_student
from dinov3.cells.schedules import values_of_section
from dinov3.cells.ssl_losses import Metrics, SSLLosses, centering_of, move_towards
from dinov3.cells.strategy import load_full_state_dict, resolve_device, resolve_strategy
from dinov3.cells.validation import PRECISIONS, check_ssl_settings
from dinov3.cells.weights import LoadReport
from dinov3.checkpointer import init_fsdp_model_from_checkpoint
from dinov3.configs import get_default_config
from dinov3.data import DataAugmentationDINO
from dinov3.distributed import get_process_subgroup
from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize
from dinov3.layers.dino_head import DINOHead
from dinov3.loss import DINOLoss, GramLoss, KoLeoLoss, KoLeoLossDistributed, iBOTPatchLoss
from dinov3.models import build_model_from_cfg
from dinov3.train.cosine_lr_scheduler import linear_warmup_cosine_decay  # noqa: F401 (upstream has it here)
from dinov3.train.param_groups import fuse_params_groups, get_params_groups_with_decay_fsdp
from dinov3.utils import count_parameters

logger = logging.getLogger("dinov3")

_GLOBAL_CROPS = 2
_NOT_BACKBONE = ["dino_head", "ibot_head", "dino_loss", "ibot_patch_loss", "ibot_loss"]


class SSLMetaArch(SSLLosses):
    """The networks of self-supervised training and one step's forward and backward pass.

    `student`, `teacher`, `model_ema` (the teacher itself unless a larger frozen network teaches)
    and `gram_teacher` are ModuleDicts with `backbone`, `dino_head` and `ibot_head`.  They are made
    without storage; `prepare_for_distributed_training` places them, `init_weights` fills them.

    `cfg`: a whole configuration, see `configs/ssl_default_config.yaml`.  Raises ValueError
    (settings that exclude one another, or that this tree does not have).
    """

    teacher: Any  # as `student`: a ModuleDict, whose entries mypy cannot tell apart

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        check_ssl_settings(cfg)
        self.cfg = cfg
        self.device_ = resolve_device(cfg)
        self.strategy = resolve_strategy(cfg, self.device_)
        self.param_dtype = PRECISIONS[cfg.compute_precision.param_dtype]
        self.accumulation_steps = int(cfg.accelerator.accumulation_steps)
        self.load_report: LoadReport | None = None
        self.centering = centering_of(cfg)

        student_backbone, teacher_backbone, width = build_model_from_cfg(cfg)  # type: ignore[misc]
        self.embed_dim = width
        self.dino_out_dim = cfg.dino.head_n_prototypes
        self.ibot_out_dim = cfg.ibot.head_n_prototypes
        self.student = self._with_heads(student_backbone, cfg, width)
        self.model_ema = self._with_heads(teacher_backbone, cfg, width)
        distilled = cfg.distillation.enabled
        self.teacher = self._distillation_teacher() if distilled else self.model_ema
        sizes = [count_parameters(part) / 1e6 for part in (self.student, student_backbone)]
        logger.info("Student: %.1f M parameters, backbone %.1f M", *sizes)

        self.dino_loss = DINOLoss(self.dino_out_dim)
        self.ibot_patch_loss = iBOTPatchLoss(self.ibot_out_dim)
        self.is_koleo_distributed = bool(cfg.dino.koleo_loss_distributed)
        self.koleo_loss: nn.Module = KoLeoLoss()
        if self.is_koleo_distributed:
            size = cfg.dino.koleo_distributed_loss_group_size
            self.koleo_loss = KoLeoLossDistributed(cfg.dino.koleo_topk, size)
        self._make_gram(cfg)
        self.dino_local_loss_schedule = None
        if cfg.dino.reweight_dino_local_loss:
            section, length = cfg.dino.local_loss_weight_schedule, cfg.train.OFFICIAL_EPOCH_LENGTH
            total = cfg.optim.epochs * length
            self.dino_local_loss_schedule = values_of_section(section, length, total)
        for module in self._frozen():
            module.requires_grad_(False)
        if name := cfg.accelerator.packed_attention:
            use_packed_attention(self.student, find_kernel(name, self.device_, self.param_dtype))
        self.train()

    # --- construction ---

    def _with_heads(self, backbone: nn.Module, cfg: DictConfig, width: int) -> nn.ModuleDict:
        def head(section: DictConfig) -> DINOHead:
            with torch.device("meta"):
                made = DINOHead(
                    in_dim=width,
                    out_dim=section.head_n_prototypes,
                    hidden_dim=section.head_hidden_dim,
                    bottleneck_dim=section.head_bottleneck_dim,
                    nlayers=section.head_nlayers,
                )
            made.unit_prototypes = bool(cfg.accelerator.unit_prototypes)
            return made

        return nn.ModuleDict(
            {"backbone": backbone, "dino_head": head(cfg.dino), "ibot_head": head(cfg.ibot)}
        )

    def _distillation_teacher(self) -> nn.ModuleDict:
        """A frozen network with heads, by its own configuration (facts: `distillation`)."""
        path = self.cfg.distillation.full_cfg_path
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`distillation.full_cfg_path` must be the teacher's configuration, got {path!r}: "
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
            self.gram_loss_schedule = values_of_section(
                gram.loss_weight_schedule, length, cfg.optim.epochs * length
            )
        if self.has_gram_teacher:
            backbone, _ = build_model_from_cfg(cfg, only_teacher=True)  # type: ignore[misc]
            self.gram_teacher = nn.ModuleDict({"backbone": backbone})

    def _frozen(self) -> list[nn.ModuleDict]:
        found = (
            [self.model_ema] if self.teacher is self.model_ema else [self.model_ema, self.teacher]
        )
        return [*found, self.gram_teacher] if self.has_gram_teacher else found

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

        `from_files`: false for a run that is resumed: its checkpoint replaces these values, and the
        files may be gone.
        """
        start = nn.ModuleDict()
        if not dist.is_initialized() or dist.get_rank(get_process_subgroup()) == 0:
            backbone, _ = build_model_from_cfg(self.cfg, only_teacher=True)  # type: ignore[misc]
            start = self._with_heads(backbone, self.cfg, self.embed_dim)
            self.load_report = fill_student(start, self.cfg, from_files=from_files)
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
            logger.info("Distillation teacher from %s", self.cfg.distillation.checkpoint_path)
            init_fsdp_model_from_checkpoint(self.teacher, self.cfg.distillation.checkpoint_path)

    # --- one step ---

    def forward(self, inputs: Any) -> Any:
        """Not used: a step is `forward_backward`."""
        raise NotImplementedError("SSLMetaArch has no own forward pass: call forward_backward")

    def forward_backward(
        self, data: dict[str, Any], *, teacher_temp: float, iteration: int = 0, **ignored: Any
    ) -> tuple[Tensor, Metrics]:
        """Losses of one batch and their gradients.

        `data`: what `collate_data_and_cast` gives, plus `global_batch_size`; `teacher_temp`:
        temperature of the teacher's assignment; `iteration`: for schedules of loss weights.
        Returns the loss, detached from no graph, and what is to be logged; nothing is copied to the
        host.  Gradients are divided by `accelerator.accumulation_steps`.
        """
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

        `images`: [G, B, 3, H, W]; `mask_indices_list`: rows of masked patches among [G·B·N].
        Returns `cls_pre_head` [G, B, D], `cls_centered` [G, B, K], `patch_pre_head` [G, B, N, D]
        and `masked_patch_centered`, an `Assignment` of M rows; `dense_centered`, one of G·B·N rows
        or None.
        """
        crops, batch = images.shape[:2]
        with self._precision():
            out = self.teacher.backbone(images.flatten(0, 1), is_training=True)
            cls, patches = out["x_norm_clstoken"], out["x_norm_patchtokens"]
            masked = patches.flatten(0, 1).index_select(0, mask_indices_list)  # [M, D]
            masked_logits = self.teacher.ibot_head(masked)
            dense = self.cfg.multiview.dense_weight > 0
            dense_centered = self._dense_targets(patches, teacher_temp) if dense else None
            cls_logits = self.teacher.dino_head(cls)  # [G·B, K]
        if self.centering == "sinkhorn_knopp":
            cls_centered = self.dino_loss.sinkhorn_knopp_teacher(cls_logits, teacher_temp)
            assignment = self.ibot_patch_loss.sinkhorn_knopp_teacher.assign(
                masked_logits, teacher_temp, **self._kernels
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
            "dense_centered": dense_centered,
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

        `global_crops`: [G, B, 3, H, W].  `local_crops`: [L, B, 3, h, w].  `masks`: [G·B, N]; not
        shown to the student when a frozen network teaches.  Returns For globals `cls_pre_head` [G,
        B, D], `cls_after_head` [G, B, K], `patch_pre_head` [G, B, N, D], `masked_patch_pre_head`
        [M, D]; for locals the first two.
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

    def backprop_loss(self, loss: Tensor) -> None:
        """Gradients of `loss` over the number of accumulated batches."""
        (loss / self.accumulation_steps).backward()

    # --- teachers ---

    @torch.no_grad()
    def update_ema(self, m: float) -> None:
        """model_ema = m * model_ema + (1 - m) * student, parameters only."""
        move_towards(self.model_ema, self.student, m)

    # --- training ---

    def train(self, mode: bool = True) -> Self:
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
        return DataAugmentationDINO.from_config(cfg)
