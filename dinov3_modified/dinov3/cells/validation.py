"""Unknown, ignored and changed keys of a configuration, and which settings go together (ours)."""

import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from dinov3.cells.checks import one_of
from dinov3.cells.packed_attention import KERNELS
from dinov3.cells.ranges import RANGES, Range

logger = logging.getLogger("dinov3")

# Keys of upstream's schema that act neither there nor here; a value other than the default warns.
IGNORED_KEYS: dict[str, str] = {
    "MODEL.DEVICE": "accelerator.device chooses the device",
    "MODEL.DTYPE": "compute_precision.param_dtype chooses the precision",
    "MODEL.WEIGHTS": "student.pretrained_weights or student.resume_from_teacher_chkpt load weights",
    "compute_precision.sharding_strategy": "FSDP2 always reshards",
    "dino.head_norm_last_layer": "the last layer is never normalised",
    "dino.koleo_distributed_loss_group_data": "groups are made of processes",
    "dino.force_weight_norm": "the last layer has no weight norm",
    "ibot.force_masking_even_with_zero_weight": "masks are always drawn",
    "ibot.head_norm_last_layer": "the last layer is never normalised",
    "train.data_config": "train.dataset_path names the data",
    "train.saveckp_freq": "checkpointing.period counts iterations",
    "train.monitor_gradient_norm": "gradient norms are always logged",
    "train.chunk_schedule": "blocks are not chunked",
    "train.use_teacher_head": "the teacher always uses its head",
    "train.learn_from_teacher_tokens": "no such loss exists",
    "student.ffn_ratio": "the architecture decides",
    "student.in_chans": "images always have 3 channels; multiview brings others",
    "student.pos_embed_type": "positions are always rotary",
    "student.pos_embed_rope_dtype": "networks made from a configuration use bf16, as upstream",
    "student.fp8_filter": "this tree has no fp8",
    "teacher.in_chans": "images always have 3 channels",
    "hrft.enabled": "high resolution is a list of crop sizes",
    "hrft.checkpoint_path": "student.resume_from_teacher_chkpt loads weights",
    "optim.dump_fsdp_weights_path": "checkpoints hold all weights",
    "evaluation.low_freq_every": "ssl_evaluation evaluates",
    "evaluation.config_files.high_freq": "ssl_evaluation evaluates",
    "evaluation.config_files.low_freq": "ssl_evaluation evaluates",
}

# Keys that act on RGB pictures, but not on fields, whose crops `multiview.strategy` makes.
_IGNORED_FOR_FIELDS: dict[str, str] = {
    "crops.global_crops_scale": "multiview.zoom sets the size of windows",
    "crops.local_crops_scale": "multiview.zoom sets the size of windows",
    "crops.localcrops_subset_of_globalcrops": "multiview.local_inside places local crops",
    "crops.horizontal_flips": "multiview.rotate turns and mirrors crops",
    "crops.share_color_jitter": "multiview.photometrics changes each crop by itself",
    "crops.gram_teacher_no_distortions": "crops of the Gram teacher of fields are never distorted",
}

# Keys that a resumed run may change without becoming another run.
_FREE_PREFIXES = (
    "streaming.", "wandb.", "monitor.", "ssl_evaluation.", "checkpointing.", "evaluation.",
)  # fmt: skip
_FREE_KEYS = {
    "train.output_dir", "train.num_workers", "train.compile", "train.cudagraphs",
    "train.checkpointing", "train.checkpointing_full", "train.sharded_eval_checkpoint",
    "accelerator.device", "accelerator.allow_changed_config", "accelerator.compile_on_cpu",
    "accelerator.loss_chunk_mb", "accelerator.prefetch_factor", "accelerator.tf32",
    "accelerator.packed_attention",
    "train.dataset_path",  # the same data from another place
    "student.pretrained_weights", "student.resume_from_teacher_chkpt",  # read at the start only
}  # fmt: skip

_NEEDED_OF_SCHEDULE = ("start", "peak", "end", "warmup_epochs")
_KEYS_OF_SCHEDULE = (*_NEEDED_OF_SCHEDULE, "cosine_epochs", "freeze_last_layer_epochs")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_KNOWN: dict[str, tuple[Any, ...]] = {
    "train.centering": ("sinkhorn_knopp", "softmax", "auto"),
    "compute_precision.param_dtype": tuple(PRECISIONS),
    "compute_precision.reduce_dtype": tuple(PRECISIONS),
    "gram.tokens_used": ("all", "masked", "unmasked"),
    "MODEL.META_ARCHITECTURE": ("SSLMetaArch",),
    "optim.optimizer": ("adamw",),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256", "none"),
    "accelerator.packed_attention": ("", *KERNELS),
    "ibot.separate_head": (True,),  # the patch loss has a head of its own
    "dino.koleo_distributed_replicas": (0,),
}


@dataclass(frozen=True)
class Difference:
    """One key of two configurations; an absent key has the value None."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} → {self.new!r}"


def leaves(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and plain values; lists count as values."""
    for name, value in cfg.items():
        key = f"{prefix}{name}"
        if isinstance(value, DictConfig):
            yield from leaves(value, f"{key}.")
        else:
            yield key, list(value) if isinstance(value, ListConfig) else value


def check_keys(cfg: DictConfig, default: DictConfig, source: str) -> None:
    """Refuse keys, types and values that the default configuration and `RANGES` do not have.

    `source`: where `cfg` comes from, for the message.  Raises ValueError (names the nearest known
    keys, or what the value must be).
    """
    # Schedules of the second form have no defaults; gram.loss_weight_schedule is null or such a section.
    known = dict(leaves(default))
    for key, value in leaves(cfg):
        if key.startswith(("schedules.", "gram.loss_weight_schedule.")) or (
            key == "dino.local_loss_weight_schedule.cosine_epochs"
        ):
            _check_key_of_schedule(key, value, source)
            continue
        if key.startswith("multidistillation."):
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"Keys must be those of ssl_default_config.yaml, got {key} in {source}{hint}: correct this key"
            )
        _check_type(key, value, known[key], source)
        _check_range(key, value, known[key], source)
        if key in _KNOWN:
            one_of(key, value, _KNOWN[key])


def _check_key_of_schedule(key: str, value: Any, source: str) -> None:
    name = key.rpartition(".")[2]
    one_of(f"The last part of {key}", name, _KEYS_OF_SCHEDULE)
    if name == "cosine_epochs" and value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = key.endswith("_epochs")
    if not number or value not in Range(0) or (whole and not isinstance(value, int)):
        what = "a whole number, at least 0" if whole else "a number, at least 0"
        raise ValueError(f"`{key}` must be {what}, got {value!r} in {source}: correct it")


def _check_range(key: str, value: Any, default: Any, source: str) -> None:
    """Of a number, or of each number of a list."""
    allowed = RANGES.get(key)
    if allowed is None or (value is None and allowed.null):
        return
    for number in value if isinstance(value, list) and value else [value]:
        if number is None and allowed.null:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            what = "a number"
        elif allowed.whole and not float(number).is_integer():
            what = "a whole number"
        elif number not in allowed:
            what = str(allowed)
        else:
            continue
        raise ValueError(
            f"`{key}` must be {what}, got {'nothing' if number is None else number} in {source}: "
            f"its default is {'null' if default is None else default}"
        )


def _check_type(key: str, value: Any, default: Any, source: str) -> None:
    if default is None or (value is None and not isinstance(default, (bool, list))):
        return
    # Crop sizes and ratios may be lists of resolutions.
    if isinstance(value, list) != isinstance(default, list) and not key.startswith("crops."):
        kind = "a list" if isinstance(default, list) else "one value"
    elif isinstance(value, list) or isinstance(default, list):
        both = isinstance(value, list) and isinstance(default, list)
        if not both or len(default) in (0, len(value)):
            return
        kind = f"a list of {len(default)} numbers"
    elif isinstance(default, bool) != isinstance(value, bool):
        kind = "true or false" if isinstance(default, bool) else "not a truth value"
    elif isinstance(default, (int, float)) and not isinstance(value, (int, float)):
        kind = "a number"
    else:
        return
    raise ValueError(
        f"`{key}` must be {kind}, got {value!r} in {source}: its default is {default!r}"
    )


def warn_of_ignored_keys(cfg: DictConfig, default: DictConfig) -> list[str]:
    """Warn of every key without effect that has another value than its default; returns them.

    These are `IGNORED_KEYS`, and the keys that act only with, or only without, `multiview.strategy`.
    """
    found, reasons = [], dict(IGNORED_KEYS)
    if cfg.multiview.strategy:
        reasons |= _IGNORED_FOR_FIELDS
    else:
        why = "multiview.strategy is not set"
        reasons |= {key: why for key, _ in leaves(default.multiview, "multiview.")}
    for key, instead in reasons.items():
        value, usual = OmegaConf.select(cfg, key), OmegaConf.select(default, key)
        if value != usual:
            logger.warning("%s=%r has no effect: %s", key, value, instead)
            found.append(key)
    return found


def compare_configs(
    old: DictConfig, new: DictConfig, default: DictConfig | None = None
) -> list[Difference]:
    """Keys that make `new` another run than `old`; harmless ones (workers, logging) are left out.

    `default`: values of keys that `old` lacks, such as ours in a configuration of upstream's.
    """
    before, after = dict(leaves(old)), dict(leaves(new))
    if default is not None:
        before = {**dict(leaves(default)), **before}
    return [
        Difference(key, before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
        and key not in _FREE_KEYS
        and not key.startswith(_FREE_PREFIXES)
    ]


def check_ssl_settings(cfg: DictConfig) -> None:
    """Refuse settings of a training that contradict one another or that this tree does not have.

    Raises ValueError (names the key, its value and what to set).
    """
    for key, known in _KNOWN.items():
        one_of(key, OmegaConf.select(cfg, key), known)
    for key in ("crops.local_crops_number", "accelerator.accumulation_steps"):
        _check_range(key, OmegaConf.select(cfg, key), 1, "the configuration")
    _require(
        not cfg.multidistillation.enabled,
        "`multidistillation.enabled` must be false, got true: this tree trains one student",
    )
    _require(
        cfg.dino.koleo_topk == 1 or cfg.dino.koleo_loss_distributed,
        f"`dino.koleo_topk` must be 1 without dino.koleo_loss_distributed, got {cfg.dino.koleo_topk}: "
        "set the latter to true",
    )
    view = cfg.multiview
    aligned = view.window == "same" and (view.turn_together or not view.rotate)
    _require(
        view.dense_weight == 0 or (bool(view.strategy) and aligned),
        "`multiview.dense_weight` must be 0 unless both global crops show one place at one token, got "
        f"{view.dense_weight}: set multiview.strategy, multiview.window=same and "
        "multiview.turn_together=true",
    )
    if cfg.gram.use_loss:
        _check_gram(cfg)
    sections = ["gram.loss_weight_schedule"] if cfg.gram.loss_weight_schedule is not None else []
    if "schedules" in cfg:
        sections += [
            f"schedules.{name}" for name in ("lr", "weight_decay", "momentum", "teacher_temp")
        ]
    for name in sections:
        section = OmegaConf.select(cfg, name)
        missing = [key for key in _NEEDED_OF_SCHEDULE if key not in (section or {})]
        _require(
            not missing,
            f"`{name}` must have {', '.join(_NEEDED_OF_SCHEDULE)}, got none of {', '.join(missing)}: add what is missing",
        )


def _check_gram(cfg: DictConfig) -> None:
    gram = cfg.gram
    _require(
        not (gram.remove_neg and gram.remove_only_teacher_neg),
        "`gram.remove_neg` and `gram.remove_only_teacher_neg` must not both be true, got both: set one to false",
    )
    _require(
        gram.tokens_used == "all" or not gram.img_level,
        f"`gram.img_level` must be false for gram.tokens_used={gram.tokens_used}, got true: a choice "
        "of tokens has no image axis",
    )
    if gram.ema_teacher:
        _require(
            not gram.ckpt and not gram.rep_update and cfg.crops.gram_teacher_crops_size is None,
            "`gram.ema_teacher` must come without gram.ckpt, gram.rep_update and "
            "crops.gram_teacher_crops_size, got one of them: the EMA itself is the Gram teacher",
        )
    else:
        _require(
            cfg.crops.gram_teacher_crops_size is not None,
            "`crops.gram_teacher_crops_size` must be set for a Gram teacher, got null: give it the "
            "size of the global crops, or set gram.ema_teacher",
        )
        _require(
            bool(gram.ckpt) or gram.it_load_ema_teacher >= 0 or gram.rep_update,
            "A Gram teacher must come from somewhere, got no gram.ckpt, no gram.it_load_ema_teacher "
            "and no gram.rep_update: set one, or gram.ema_teacher",
        )


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)
