"""The range of every number of a configuration (ours)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Allowed numbers; a bound that is excluded is `open`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    null: bool = False  # null is allowed beside numbers
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        parts = []
        if self.low > -math.inf:
            parts.append(f"{'above' if self.open_low else 'at least'} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{'below' if self.open_high else 'at most'} {self.high:g}")
        text = " and ".join(parts) or "a finite number"
        return f"{text}, or null" if self.null else text


_COUNT = Range(1, whole=True)
_COUNT_OR_NONE = Range(1, null=True, whole=True)
_WHOLE = Range(0, whole=True)
_FROM_ZERO = Range(0)
_ABOVE_ZERO = Range(0, open_low=True)
_ABOVE_ZERO_OR_NONE = Range(0, open_low=True, null=True)
_FROM_ZERO_OR_NONE = Range(0, null=True)
_SHARE = Range(0, 1)
_POSITIVE_SHARE = Range(0, 1, open_low=True)
_BELOW_ONE = Range(0, 1, open_high=True)

# Section → range → names of keys.  A list has this range for each of its numbers.
_RANGES: dict[str, dict[Range, str]] = {
    "dino": {
        _COUNT: "head_bottleneck_dim head_hidden_dim head_n_prototypes head_nlayers koleo_topk",
        _COUNT_OR_NONE: "koleo_distributed_loss_group_size",
        _WHOLE: "koleo_distributed_replicas",
        _FROM_ZERO: "koleo_loss_weight loss_weight",
    },
    "dino.local_loss_weight_schedule": {_WHOLE: "warmup_epochs", _FROM_ZERO: "start peak end"},
    "ibot": {
        _COUNT: "head_bottleneck_dim head_hidden_dim head_n_prototypes head_nlayers",
        _FROM_ZERO: "loss_weight",
        _SHARE: "mask_ratio_min_max mask_sample_probability",
    },
    "gram": {
        _WHOLE: "it_first_update",
        _FROM_ZERO: "loss_weight",
        Range(-1, whole=True): "it_load_ema_teacher",
        Range(0, null=True, whole=True): "max_updates",
        _COUNT: "update_frequency",
    },
    "train": {
        _COUNT: "OFFICIAL_EPOCH_LENGTH batch_size_per_gpu",
        _WHOLE: "num_workers saveckp_freq seed",
    },
    "student": {
        _COUNT: "in_chans patch_size",
        _BELOW_ONE: "drop_path_rate",
        _ABOVE_ZERO: "ffn_ratio",
        _WHOLE: "n_storage_tokens",
        _FROM_ZERO_OR_NONE: "layerscale pos_embed_rope_shift_coords",
        _ABOVE_ZERO_OR_NONE: "pos_embed_rope_base pos_embed_rope_jitter_coords "
        "pos_embed_rope_max_period pos_embed_rope_min_period pos_embed_rope_rescale_coords",
    },
    "teacher": {
        _COUNT: "in_chans",
        _SHARE: "momentum_teacher final_momentum_teacher",
        _ABOVE_ZERO: "teacher_temp warmup_teacher_temp",
        _WHOLE: "warmup_teacher_temp_epochs",
    },
    "optim": {
        _BELOW_ONE: "adamw_beta1 adamw_beta2",
        _FROM_ZERO_OR_NONE: "clip_grad",
        _POSITIVE_SHARE: "layerwise_decay",
        _WHOLE: "epochs freeze_last_layer_epochs warmup_epochs",
        _FROM_ZERO: "dino_head_wd_multiplier lr min_lr patch_embed_lr_mult schedule_trunc_extra "
        "weight_decay weight_decay_end",
    },
    "crops": {
        _COUNT: "global_crops_size local_crops_size local_crops_number",
        _COUNT_OR_NONE: "gram_teacher_crops_size",
        _POSITIVE_SHARE: "global_crops_scale local_crops_scale",
        _SHARE: "global_local_crop_pairs_ratios",
        Range(): "rgb_mean",
        _ABOVE_ZERO: "rgb_std teacher_to_student_resolution_scale",
    },
    "evaluation": {_WHOLE: "eval_period_iterations low_freq_every"},
    "checkpointing": {_COUNT: "keep_every period", _COUNT_OR_NONE: "max_to_keep"},
    "accelerator": {
        _WHOLE: "seed",
        _COUNT: "accumulation_steps prefetch_factor",
        _ABOVE_ZERO: "timeout_s loss_chunk_mb",
    },
    "patch_adaptation": {_FROM_ZERO_OR_NONE: "lr_mult"},
    "multiview": {
        _SHARE: "min_overlap min_foreground photometrics_p",
        _ABOVE_ZERO: "zoom",
        _ABOVE_ZERO_OR_NONE: "pixel_size_um",
        _COUNT: "foreground_tries",
        _FROM_ZERO: "dense_weight brightness contrast gamma noise blur_sigma defocus_radius",
    },
    "streaming": {
        _COUNT: "threads",
        _ABOVE_ZERO: "connect_timeout_s timeout_s",
        _WHOLE: "retries ahead",
        _FROM_ZERO: "backoff_max_s outage_s requests_per_s pool_gb disk_cache_gb",
        _SHARE: "max_lost_share",
    },
    "wandb": {_ABOVE_ZERO: "timeout_s finish_timeout_s"},
    "monitor": {
        _WHOLE: "period_iterations warn_after visuals_period_iterations",
        _COUNT: "images visuals_images",
        Range(2, whole=True): "max_rows",
        _FROM_ZERO_OR_NONE: "min_effective_rank min_spread min_prototypes_used max_update_ratio "
        "flat_loss_margin",
    },
    "ssl_evaluation": {
        _COUNT: "train_images val_images windows_per_image window_px steps batch_size",
        _WHOLE: "period_iterations seed",
        _ABOVE_ZERO: "lr max_seconds",
    },
}


def _all() -> Iterator[tuple[str, Range]]:
    for section, ranges in _RANGES.items():
        for allowed, names in ranges.items():
            for name in names.split():
                yield f"{section}.{name}", allowed


RANGES: dict[str, Range] = dict(_all())
