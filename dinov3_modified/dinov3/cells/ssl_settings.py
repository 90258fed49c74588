"""Which settings of self-supervised training go together (ours)."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from dinov3.cells.checks import one_of

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KNOWN: dict[str, tuple[Any, ...]] = {
    "train.centering": ("sinkhorn_knopp", "softmax"),
    "compute_precision.param_dtype": tuple(PRECISIONS),
    "compute_precision.reduce_dtype": tuple(PRECISIONS),
    "gram.tokens_used": ("all", "masked", "unmasked"),
    "MODEL.META_ARCHITECTURE": ("SSLMetaArch",),
    "optim.optimizer": ("adamw",),
    "ibot.separate_head": (True,),  # the patch loss has a head of its own
    "dino.koleo_distributed_replicas": (0,),
}


def check_ssl_settings(cfg: DictConfig) -> None:
    """Refuse settings of a training that contradict one another or that this tree does not have.

    Raises ValueError (names the key, its value and what to set).
    """
    for key, known in _KNOWN.items():
        one_of(key, OmegaConf.select(cfg, key), known)
    _require(
        cfg.crops.local_crops_number > 0,
        f"crops.local_crops_number must be at least 1, got {cfg.crops.local_crops_number}: 8 is usual",
    )
    _require(
        cfg.accelerator.accumulation_steps >= 1,
        f"accelerator.accumulation_steps must be at least 1, got {cfg.accelerator.accumulation_steps}: "
        "1 is without accumulation",
    )
    _require(
        not cfg.multidistillation.enabled,
        "multidistillation.enabled must be false, got true: this tree trains one student",
    )
    _require(
        cfg.dino.koleo_topk == 1 or cfg.dino.koleo_loss_distributed,
        f"dino.koleo_topk must be 1 without dino.koleo_loss_distributed, got {cfg.dino.koleo_topk}: "
        "set the latter to true",
    )
    if cfg.gram.use_loss:
        _check_gram(cfg)


def _check_gram(cfg: DictConfig) -> None:
    gram = cfg.gram
    _require(
        not (gram.remove_neg and gram.remove_only_teacher_neg),
        "gram.remove_neg and gram.remove_only_teacher_neg must not both be true, got both: choose one",
    )
    _require(
        gram.tokens_used == "all" or not gram.img_level,
        f"gram.img_level must be false for gram.tokens_used={gram.tokens_used}, got true: a choice "
        "of tokens has no image axis",
    )
    if gram.ema_teacher:
        _require(
            not gram.ckpt and not gram.rep_update and cfg.crops.gram_teacher_crops_size is None,
            "gram.ema_teacher must come without gram.ckpt, gram.rep_update and "
            "crops.gram_teacher_crops_size, got one of them: the EMA itself is the Gram teacher",
        )
    else:
        _require(
            cfg.crops.gram_teacher_crops_size is not None,
            "crops.gram_teacher_crops_size must be set for a Gram teacher, got null: give it the "
            "size of the global crops, or set gram.ema_teacher",
        )
        _require(
            bool(gram.ckpt) or gram.it_load_ema_teacher >= 0 or gram.rep_update,
            "a Gram teacher must come from somewhere, got no gram.ckpt, no gram.it_load_ema_teacher "
            "and no gram.rep_update: set one, or gram.ema_teacher",
        )


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)
