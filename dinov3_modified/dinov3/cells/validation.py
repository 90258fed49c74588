"""Unknown, ignored and changed keys of a configuration (ours)."""

import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

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

# Keys that a resumed run may change without becoming another run.
_FREE_PREFIXES = (
    "streaming.", "wandb.", "monitor.", "ssl_evaluation.", "checkpointing.", "evaluation.",
)  # fmt: skip
_FREE_KEYS = {
    "train.output_dir", "train.num_workers", "train.compile", "train.cudagraphs",
    "train.checkpointing", "train.checkpointing_full", "train.sharded_eval_checkpoint",
    "accelerator.device", "accelerator.allow_changed_config", "accelerator.compile_on_cpu",
    "accelerator.loss_chunk_mb",
    "train.dataset_path",  # the same data from another place
    "student.pretrained_weights", "student.resume_from_teacher_chkpt",  # read at the start only
}  # fmt: skip


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
    """Refuse keys and types that the default configuration does not have.

    `source`: where `cfg` comes from, for the message.  Raises ValueError (names the nearest known
    keys).
    """
    # Schedules of the second form are free; gram.loss_weight_schedule is null or such a section.
    known = dict(leaves(default))
    for key, value in leaves(cfg):
        if key.startswith(("schedules.", "multidistillation.", "gram.loss_weight_schedule.")):
            continue
        if key.startswith("dino.local_loss_weight_schedule.") and key.endswith(".cosine_epochs"):
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(
                f"keys must be those of ssl_default_config.yaml, got {key} in {source}{hint}: correct it"
            )
        _check_type(key, value, known[key], source)


def _check_type(key: str, value: Any, default: Any, source: str) -> None:
    if value is None or default is None:
        return
    # Crop sizes and ratios may be lists of resolutions.
    if isinstance(value, list) != isinstance(default, list) and not key.startswith("crops."):
        kind = "a list" if isinstance(default, list) else "one value"
    elif isinstance(value, list) or isinstance(default, list):
        return
    elif isinstance(default, bool) != isinstance(value, bool):
        kind = "true or false" if isinstance(default, bool) else "not a truth value"
    elif isinstance(default, (int, float)) and not isinstance(value, (int, float)):
        kind = "a number"
    elif isinstance(default, int) and isinstance(value, float) and not value.is_integer():
        # Whole by default, but these are shares and factors.
        if key.startswith(
            ("optim.", "teacher.", "crops.", "monitor.", "wandb.", "multiview.", "streaming.")
        ):
            return
        kind = "a whole number"
    else:
        return
    raise ValueError(f"{key} must be {kind}, got {value!r} in {source}: its default is {default!r}")


def warn_of_ignored_keys(cfg: DictConfig, default: DictConfig) -> list[str]:
    """Warn of every key of `IGNORED_KEYS` with another value than its default; returns them."""
    found = []
    for key, instead in IGNORED_KEYS.items():
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
