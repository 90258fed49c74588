"""Configuration of a fine-tuning run: data, augmentation, optimizer, schedule and logging."""

from dataclasses import dataclass, field

from dinocell.network.config import BackboneConfig, ModelConfig
from dinocell.settings import (
    require,
    require_at_least,
    require_choice,
)

_LARGEST_SEED = 2**44  # what `step_seed` makes of it must fit into 64 bits


@dataclass(frozen=True)
class DatasetConfig:
    """One data set: a folder of images and a folder of label images of the same names.

    `val_images` and `val_labels` name a given validation split; without them `data.val_fraction`
    of the pairs is held out.  `channels` are names of channels or positions from 0, as for `segment`:
    several are normalised one by one and averaged.  `weight` is the share of crops relative to the other sets (null: by
    its number of pixels).
    """

    name: str
    images: str
    labels: str
    val_images: str | None = None
    val_labels: str | None = None
    channels: list[str] | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        require(
            (self.val_images is None) == (self.val_labels is None),
            f"Data set {self.name!r} must give both val_images and val_labels or neither, got one: "
            "add the other one",
        )
        require(
            self.channels is None or len(self.channels) > 0,
            f"Data set {self.name!r} must name at least one of its channels, got none: leave channels "
            "out for gray images",
        )
        require(
            self.weight is None or self.weight > 0,
            f"Data set {self.name!r} must have a weight above 0, got {self.weight}: leave it out to "
            "weigh by pixels",
        )


@dataclass(frozen=True)
class DataConfig:
    """Data sets, the validation split, and loading."""

    datasets: list[DatasetConfig] = field(default_factory=list)
    # share of every set held out where no split is given (stratified by set)
    val_fraction: float = 0.1
    # at most so many validation images, evenly spread; null takes all
    max_val_images: int | None = None
    # loader processes; 0 loads in the training process.  Does not change any crop.
    num_workers: int = 0
    cache_bytes: int = 2_000_000_000  # decoded images kept in memory, per process

    def __post_init__(self) -> None:
        names = [dataset.name for dataset in self.datasets]
        require(
            len(set(names)) == len(names),
            f"Data set names must differ, got {names}: rename one of them",
        )
        require(
            0.0 < self.val_fraction < 1.0,
            f"`data.val_fraction` must be in (0, 1), got {self.val_fraction}: 0.1 is usual",
        )
        for name, least in {"num_workers": 0, "cache_bytes": 0, "max_val_images": 1}.items():
            require_at_least(f"`data.{name}`", getattr(self, name), least)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training crop; a range [a, a] or a probability 0 switches one off."""

    scale: tuple[float, float] = (0.7, 1.4)  # enlargement of the image, log-uniform in [low, high]
    # rotate, flip: rotate by any angle, mirror with probability one half
    rotate: bool = True
    flip: bool = True
    # gamma, contrast: exponent of intensities, and factor around their mean, log-uniform
    gamma: tuple[float, float] = (0.7, 1.4)
    contrast: tuple[float, float] = (0.7, 1.3)
    brightness: float = 0.1  # offset added, uniform in ±brightness
    noise_std: float = 0.05  # standard deviation of Gaussian noise, uniform in [0, noise_std]
    # Gaussian blur, uniform in [0, blur_sigma_px], for every second crop
    blur_sigma_px: float = 1.0
    # strength of a linear intensity gradient across the crop, uniform in ±value
    illumination: float = 0.2
    invert_probability: float = 0.0  # bright becomes dark
    empty_probability: float = 0.02  # the crop is replaced by background noise without cells
    # dim, background: every second crop is multiplied by a factor, log-uniform in [low, high], as if a
    # much brighter cell lay elsewhere in the image; offset added to all, uniform in [0, background]
    dim: tuple[float, float] = (1.0, 1.0)
    background: float = 0.0
    paste_probability: float = 0.0  # a second crop of the same image is laid over: crowded cells

    def __post_init__(self) -> None:
        for name in ("scale", "gamma", "contrast", "dim"):
            low, high = getattr(self, name)
            require(
                0 < low <= high,
                f"`augment.{name}` must be [low, high] with 0 < low <= high, got [{low}, {high}]: "
                "[1, 1] switches it off",
            )
        for name in ("brightness", "noise_std", "blur_sigma_px", "illumination", "background"):
            require_at_least(f"`augment.{name}`", getattr(self, name), 0)
        for name in ("invert_probability", "empty_probability", "paste_probability"):
            value = getattr(self, name)
            require(
                0 <= value <= 1,
                f"`augment.{name}` must be in [0, 1], got {value}: 0 switches it off",
            )


@dataclass(frozen=True)
class LossConfig:
    """What the network is punished for.

    `kind` is `mse`, or `bce`: cross-entropy with the distance as a probability.  Both are least where
    the map is the expected distance, but `bce` does not fade where the network is sure and wrong.
    Pixels within two of where two cells touch count `1 + gap_weight` times.
    """

    kind: str = "mse"
    gap_weight: float = 0.0

    def __post_init__(self) -> None:
        require_choice("`loss.kind`", self.kind, ("mse", "bce"))
        require_at_least("`loss.gap_weight`", self.gap_weight, 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) or Muon, with linear warm-up and cosine decay.

    `kind` is `adamw`, or `muon`: Muon (Jordan et al. 2024) for the matrices and convolutions between
    the first and the last layer, AdamW for the rest, with the same learning rate.  Muon has its own
    momentum in place of `betas`, and its steps do not grow with the gradient.  `weight_decay` acts on
    matrices only, not on biases, norms, tokens or LayerScale.
    `min_lr_ratio` is the final learning rate as a share of `lr`.  `clip_norm` bounds the gradient
    norm (0: off).  `scaling_rule` multiplies `lr` where several processes make the batch larger:
    `sqrt` by the square root of their number, `linear` by their number, `none` not at all.
    """

    kind: str = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 250
    min_lr_ratio: float = 0.01
    clip_norm: float = 1.0
    scaling_rule: str = "sqrt"

    def __post_init__(self) -> None:
        require_choice("`optimizer.kind`", self.kind, ("adamw", "muon"))
        require_choice("`optimizer.scaling_rule`", self.scaling_rule, ("none", "sqrt", "linear"))
        require(self.lr > 0, f"`optimizer.lr` must be above 0, got {self.lr}: 5e-4 is usual")
        for name in ("weight_decay", "warmup_steps", "min_lr_ratio", "clip_norm"):
            require_at_least(f"`optimizer.{name}`", getattr(self, name), 0)
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"`optimizer.betas` must be in [0, 1), got {list(self.betas)}: [0.9, 0.999] is usual",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """How long to train, and when to look, save and stop."""

    steps: int = 10_000
    batch_size: int = 8  # crops per step of each process; a step of W processes has W times as many
    crop_px: int | None = None  # edge of a training crop; null takes the model's window
    # `auto` (bf16 where the processor is fast at it), `bf16` (autocast) or `fp32`
    precision: str = "auto"
    # decay per step of the averaged weights that are validated and shipped; 0: off
    ema_decay: float = 0.999
    # eval_every, checkpoint_every, log_every: in steps
    eval_every: int = 500
    checkpoint_every: int = 500
    log_every: int = 10
    keep_checkpoints: int = 2
    # stop after so many validations without a better AP; null never stops early
    patience: int | None = None

    def __post_init__(self) -> None:
        require_choice("`schedule.precision`", self.precision, ("auto", "bf16", "fp32"))
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every", "log_every"):
            require_at_least(f"`schedule.{name}`", getattr(self, name), 1)
        for name in ("keep_checkpoints", "patience"):
            require_at_least(f"`schedule.{name}`", getattr(self, name), 1)
        require(
            0 <= self.ema_decay < 1,
            f"`schedule.ema_decay` must be in [0, 1), got {self.ema_decay}: 0.999 is usual",
        )


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
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        require(
            0 <= self.seed <= _LARGEST_SEED,
            f"`seed` must be between 0 and {_LARGEST_SEED}, got {self.seed}: choose another number",
        )
        require(
            len(self.data.datasets) > 0,
            "`data.datasets` must name at least one data set, got none: add one with name, images "
            "and labels",
        )
        require(
            self.model.size != "conv" or self.backbone.weights is None,
            f"`backbone.weights` must be null for `model.size` conv, got {self.backbone.weights}: choose "
            "the size of a transformer, or leave the weights out",
        )
        require(
            self.model.init is None or self.backbone.weights is None,
            f"`backbone.weights` must be null with `model.init`, got {self.backbone.weights}: leave one of "
            "the two out",
        )
        crop_px, patch_size = self.schedule.crop_px, self.model.patch_size
        of = f" of {self.model.init}" if self.model.init else ""
        require(
            crop_px is None or (crop_px > 0 and crop_px % patch_size == 0),
            f"`schedule.crop_px` must be a multiple of patch_size {patch_size}{of}, got {crop_px}: leave it "
            "out to take the window",
        )
