"""Configuration as frozen dataclasses, read from YAML; unknown keys stop the run.

One file describes one run.  `load_config(path, ["optimizer.lr=1e-4"])` reads it, applies the
`key=value` overrides, checks every key and type, and returns the dataclass.  `${NAME}` and
`${NAME:-default}` in strings are replaced by environment variables.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dinocell.errors import ConfigError

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "DataConfig",
    "DatasetConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "WandbConfig",
    "config_from_mapping",
    "config_to_mapping",
    "load_config",
]


@dataclass(frozen=True)
class ModelConfig:
    """Everything that must be known to rebuild and run a model; it travels in the model file.

    Attributes
    ----------
    size : backbone size: `tiny` (192 wide, 3 heads), `small`, `base`, `large`.
    patch_size : edge of a patch in px: 4, 8, 14 or 16.
    decoder : `unet`, `unet_wide` or `linear` (DESIGN.md 3).
    image_channels : channels of the full-resolution image skip of `unet`; 0 leaves it out.
    target : what the network predicts: `linear` or `sqrt` distance map.
    window_px, overlap_px : the network sees square windows of `window_px`; neighbours share
        `overlap_px`.  They belong to the model, because attention sees the whole window.
    peak_threshold, fill_threshold, min_prominence : post-processing, chosen on validation data.
    min_area_px : cells with fewer pixels are dropped.
    low_percentile, high_percentile : intensities mapped to 0 and 1, of the whole image.
    min_contrast_sigma : the mapped range is at least this many noise standard deviations wide, so
        that an empty field is not stretched into structure.
    layerscale_init : start value of LayerScale in a network without pretrained weights.
    drop_path_rate : stochastic depth while training.
    pixel_size_um : pixel size of the training images in µm, where known.
    """

    size: str = "small"
    patch_size: int = 8
    decoder: str = "unet"
    image_channels: int = 0
    target: str = "sqrt"
    window_px: int = 256
    overlap_px: int = 64
    peak_threshold: float = 0.6
    fill_threshold: float = 0.25
    min_prominence: float = 0.1
    min_area_px: int = 0
    low_percentile: float = 1.0
    high_percentile: float = 99.8
    min_contrast_sigma: float = 20.0
    layerscale_init: float = 1e-5
    drop_path_rate: float = 0.0
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        _require_choice("model.size", self.size, ("tiny", "small", "base", "large"))
        _require_choice("model.patch_size", self.patch_size, (4, 8, 14, 16))
        _require_choice("model.decoder", self.decoder, ("unet", "unet_wide", "linear"))
        _require_choice("model.target", self.target, ("linear", "sqrt"))
        _require(
            self.window_px >= self.patch_size and self.window_px % self.patch_size == 0,
            f"model.window_px must be a multiple of patch_size {self.patch_size}, "
            f"got {self.window_px}: choose {max(1, self.window_px // self.patch_size) * self.patch_size}",
        )
        _require(
            0 <= self.overlap_px <= self.window_px // 2,
            f"model.overlap_px must be between 0 and half of window_px {self.window_px}, "
            f"got {self.overlap_px}: choose {self.window_px // 4}",
        )
        _require(
            0.0 <= self.fill_threshold < self.peak_threshold < 1.0,
            "model thresholds must hold 0 <= fill_threshold < peak_threshold < 1, got fill "
            f"{self.fill_threshold} and peak {self.peak_threshold}: lower fill or raise peak",
        )
        _require(
            0.0 <= self.low_percentile < self.high_percentile <= 100.0,
            "model percentiles must hold 0 <= low_percentile < high_percentile <= 100, got "
            f"{self.low_percentile} and {self.high_percentile}: 1 and 99.8 are usual",
        )
        for name in ("image_channels", "min_area_px", "min_contrast_sigma", "min_prominence"):
            _require_at_least(f"model.{name}", getattr(self, name), 0)
        _require(
            0.0 <= self.drop_path_rate < 1.0,
            f"model.drop_path_rate must be in [0, 1), got {self.drop_path_rate}: 0.1 is usual",
        )


@dataclass(frozen=True)
class BackboneConfig:
    """Where the backbone starts and how fast it learns.

    Attributes
    ----------
    weights : backbone `.pth` file (a DINOv3 state dict), or null for random weights.
    frozen : the backbone neither learns nor leaves eval mode.
    lr_mult : learning rate of the backbone as a multiple of `optimizer.lr`.
    layer_decay : factor per block from the last to the first (1: all alike).
    """

    weights: str | None = None
    frozen: bool = False
    lr_mult: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        _require_at_least("backbone.lr_mult", self.lr_mult, 0)
        _require(
            0 < self.layer_decay <= 1,
            f"backbone.layer_decay must be in (0, 1], got {self.layer_decay}: 0.9 is usual",
        )
        _require(
            not (self.frozen and self.weights is None),
            "backbone.frozen needs pretrained weights, got weights: null: name a file or train it",
        )


@dataclass(frozen=True)
class DatasetConfig:
    """One data set: a folder of images and a folder of label images of the same names.

    `val_images` and `val_labels` name a given validation split; without them `data.val_fraction`
    of the pairs is held out.  `weight` is the share of crops relative to the other sets (null: by
    its number of pixels).
    """

    name: str
    images: str
    labels: str
    val_images: str | None = None
    val_labels: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        _require(
            (self.val_images is None) == (self.val_labels is None),
            f"data set {self.name!r} must give both val_images and val_labels or neither, got one: "
            "add the other",
        )
        if self.weight is not None:
            _require(
                self.weight > 0,
                f"data set {self.name!r} must have a weight above 0, got {self.weight}: leave it "
                "out to weigh by pixels",
            )


@dataclass(frozen=True)
class DataConfig:
    """Data sets, the validation split, and loading.

    Attributes
    ----------
    datasets : the data sets; crops are drawn from all of them.
    val_fraction : share of every set held out where no split is given (stratified by set).
    max_val_images : at most so many validation images, evenly spread; null takes all.
    num_workers : loader processes; 0 loads in the training process.  Does not change any crop.
    cache_bytes : decoded images kept in memory, per process.
    """

    datasets: tuple[DatasetConfig, ...] = ()
    val_fraction: float = 0.1
    max_val_images: int | None = None
    num_workers: int = 0
    cache_bytes: int = 2_000_000_000

    def __post_init__(self) -> None:
        _require(
            len(self.datasets) > 0,
            "data.datasets must name at least one data set, got none: add one with name, images "
            "and labels",
        )
        names = [dataset.name for dataset in self.datasets]
        _require(
            len(set(names)) == len(names),
            f"data set names must differ, got {names}: rename one",
        )
        _require(
            0.0 < self.val_fraction < 1.0,
            f"data.val_fraction must be in (0, 1), got {self.val_fraction}: 0.1 is usual",
        )
        for name in ("num_workers", "cache_bytes"):
            _require_at_least(f"data.{name}", getattr(self, name), 0)
        if self.max_val_images is not None:
            _require_at_least("data.max_val_images", self.max_val_images, 1)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training crop; a range [a, a] or a probability 0 switches one off.

    Attributes
    ----------
    scale : enlargement of the image, log-uniform in [low, high].
    rotate : rotate by any angle.
    flip : mirror with probability one half.
    gamma : exponent of intensities, log-uniform.
    contrast : factor on intensities around their mean, log-uniform.
    brightness : offset added, uniform in ±brightness.
    noise_std : standard deviation of Gaussian noise, uniform in [0, noise_std].
    blur_sigma_px : Gaussian blur, uniform in [0, blur_sigma_px], for every second crop.
    illumination : strength of a linear intensity gradient across the crop, uniform in ±value.
    invert_probability : bright becomes dark.
    empty_probability : the crop is replaced by background noise without cells.
    """

    scale: tuple[float, float] = (0.7, 1.4)
    rotate: bool = True
    flip: bool = True
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.7, 1.3)
    brightness: float = 0.1
    noise_std: float = 0.05
    blur_sigma_px: float = 1.0
    illumination: float = 0.2
    invert_probability: float = 0.0
    empty_probability: float = 0.02

    def __post_init__(self) -> None:
        for name in ("scale", "gamma", "contrast"):
            low, high = getattr(self, name)
            _require(
                0 < low <= high,
                f"augment.{name} must be [low, high] with 0 < low <= high, got [{low}, {high}]: "
                "[1, 1] switches it off",
            )
        for name in ("brightness", "noise_std", "blur_sigma_px", "illumination"):
            _require_at_least(f"augment.{name}", getattr(self, name), 0)
        for name in ("invert_probability", "empty_probability"):
            value = getattr(self, name)
            _require(
                0 <= value <= 1,
                f"augment.{name} must be in [0, 1], got {value}: 0 switches it off",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and cosine decay.

    `weight_decay` acts on matrices only, not on biases, norms, tokens or LayerScale.
    `min_lr_ratio` is the final learning rate as a share of `lr`.  `clip_norm` bounds the gradient
    norm (0: off).  `scaling_rule` multiplies `lr` where several processes make the batch larger:
    `sqrt` by the square root of their number, `linear` by their number, `none` not at all.
    """

    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 250
    min_lr_ratio: float = 0.01
    clip_norm: float = 1.0
    scaling_rule: str = "sqrt"

    def __post_init__(self) -> None:
        _require_choice("optimizer.scaling_rule", self.scaling_rule, ("none", "sqrt", "linear"))
        _require(self.lr > 0, f"optimizer.lr must be above 0, got {self.lr}: 5e-4 is usual")
        for name in ("weight_decay", "warmup_steps", "min_lr_ratio", "clip_norm"):
            _require_at_least(f"optimizer.{name}", getattr(self, name), 0)
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas must be in [0, 1), got {list(self.betas)}: [0.9, 0.999] is usual",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and when to look, save and stop.

    Attributes
    ----------
    steps : optimizer steps in all.
    batch_size : crops per step of each process; a step of W processes has W times as many.
    crop_px : edge of a training crop; null takes the model's window.
    precision : `bf16` (autocast) or `fp32`.
    ema_decay : decay per step of the averaged weights that are validated and shipped; 0: off.
    eval_every, checkpoint_every, log_every : in steps.
    keep_checkpoints : how many of the newest are kept.
    patience : stop after so many validations without a better AP; null never stops early.
    """

    steps: int = 10_000
    batch_size: int = 8
    crop_px: int | None = None
    precision: str = "bf16"
    ema_decay: float = 0.999
    eval_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 2
    patience: int | None = None

    def __post_init__(self) -> None:
        _require_choice("schedule.precision", self.precision, ("bf16", "fp32"))
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every"):
            _require_at_least(f"schedule.{name}", getattr(self, name), 1)
        _require_at_least("schedule.keep_checkpoints", self.keep_checkpoints, 1)
        _require(
            0 <= self.ema_decay < 1,
            f"schedule.ema_decay must be in [0, 1), got {self.ema_decay}: 0.999 is usual",
        )
        if self.patience is not None:
            _require_at_least("schedule.patience", self.patience, 1)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases logging: off unless `enabled`; offline where no API key is set."""

    enabled: bool = False
    project: str = "dinocell"
    name: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """One fine-tuning run: `dinocell train FILE [key=value ...]`.

    `device` is `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `seed` fixes the start, the split and
    every crop.  Several processes (torchrun, srun) want `auto`, `cuda` (then each takes the GPU of
    its number) or `cpu`.  `licence` and `description` go into the model card.
    """

    name: str = "dinocell"
    output_dir: str = "runs/dinocell"
    seed: int = 0
    device: str = "auto"
    description: str = ""
    licence: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        crop_px = self.schedule.crop_px
        if crop_px is not None:
            _require(
                crop_px > 0 and crop_px % self.model.patch_size == 0,
                f"schedule.crop_px must be a multiple of patch_size {self.model.patch_size}, got "
                f"{crop_px}: leave it out to take the window",
            )


Config = TypeVar("Config")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training configuration.

    Parameters
    ----------
    path : file
        YAML with the keys of `TrainConfig`.
    overrides : sequence of str
        `key=value` with dotted keys, the value in YAML: `optimizer.lr=1e-4`,
        `data.datasets.0.weight=2`.

    Raises
    ------
    ConfigError
        The file is missing or not YAML, a key is unknown, or a value has the wrong type or range.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the configuration must be a readable file, got {path} ({error.strerror}): check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the configuration must be UTF-8 text, got {path}: is it a YAML file?"
        ) from error
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the configuration must be YAML, got {path} ({reason}): mend it"
        ) from error
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"the configuration must be a mapping of keys, got {type(mapping).__name__} in {path}: "
            "start from a file of configs/finetune"
        )
    for override in overrides:
        _apply_override(mapping, override)
    return config_from_mapping(TrainConfig, mapping)


def config_from_mapping(kind: type[Config], mapping: Mapping[str, Any], where: str = "") -> Config:
    """Build a configuration dataclass from nested mappings, checking keys and types.

    Raises
    ------
    ConfigError
        An unknown key (the message names the nearest known one and all of them), a missing key,
        or a value of another type.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            f"{where or 'the configuration'} must be a mapping of keys, got {mapping!r}: indent "
            "its keys below it"
        )
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {_join(where, near[0])}?" if near else "remove it"
            raise ConfigError(
                f"every configuration key must be known, got {_join(where, str(key))}: {hint} "
                f"(known: {', '.join(fields)})"
            )
    values = {key: _convert(value, hints[key], _join(where, key)) for key, value in mapping.items()}
    for name, item in fields.items():
        missing = (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        )
        if missing and name not in values:
            raise ConfigError(
                f"{where or 'the configuration'} must have the key {name}, got none: add it"
            )
    return kind(**values)


def config_to_mapping(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration dataclass, ready for YAML or JSON (tuples as lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(value, next(kind for kind in arguments if kind is not type(None)), where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return config_from_mapping(hint, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}: write [a, b]")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(
                _convert(item, arguments[0], f"{where}.{index}") for index, item in enumerate(value)
            )
        if len(value) != len(arguments):
            raise ConfigError(
                f"{where} must have {len(arguments)} items, got {len(value)}: write "
                f"{len(arguments)} numbers in brackets"
            )
        return tuple(
            _convert(item, kind, f"{where}.{index}")
            for index, (item, kind) in enumerate(zip(value, arguments, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where} must be a section of keys, got {value!r}: indent them below"
            )
        return {
            str(key): _convert(item, arguments[1], f"{where}.{key}") for key, item in value.items()
        }
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 (without a dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return _expand_environment(value, where)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(
            f"{where} must be of type {hint.__name__}, got {value!r}: write a {hint.__name__}"
        )
    return value


def _expand_environment(text: str, where: str) -> str:
    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = os.environ.get(name) or default
        if value is None:
            raise ConfigError(
                f"{where} must find the environment variable {name}, got none: set it, or write "
                f"${{{name}:-default}}"
            )
        return value

    return re.sub(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}", replace, text)


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"an override must be key=value, got {override!r}: for example optimizer.lr=1e-4"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {key} must be YAML, got {text!r}: put quotes around it"
        ) from error
    node: Any = mapping
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise ConfigError(
                f"the override {key} must lead to a key, but {part} is a value: shorten it"
            )
    if isinstance(node, list):
        node[_list_index(node, parts[-1], key)] = value
    else:
        node[parts[-1]] = value


def _list_index(items: list[Any], text: str, key: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise ConfigError(
            f"the override {key} must name an item from 0 to {len(items) - 1}, got {text}: "
            "count from 0"
        )
    return int(text)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _require_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    known = ", ".join(str(choice) for choice in choices)
    _require(value in choices, f"{name} must be one of {known}, got {value!r}: choose one of them")


def _require_at_least(name: str, value: float, least: float) -> None:
    _require(value >= least, f"{name} must be at least {least}, got {value}: raise it")
