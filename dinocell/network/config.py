"""Configuration of a network: what a model file needs to rebuild it, and where its backbone starts."""

from dataclasses import dataclass

from dinocell.settings import require, require_at_least, require_choice

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green and blue in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)

TUNED_THRESHOLDS = ("peak_threshold", "fill_threshold", "min_prominence")
"""Fields of `ModelConfig` that are chosen on validation images."""

MODEL_SIZES = ("tiny", "small", "base", "large", "conv")
PYRAMID_DECODERS = ("detail", "fpn")  # read a convolutional pyramid of the image
DECODERS = ("unet", "unet_wide", "linear", *PYRAMID_DECODERS)


def patch_sizes(size: str) -> tuple[int, ...]:
    """The patch sizes in px that a backbone of this size may have."""
    return (16, 32) if size == "conv" else (4, 8, 14, 16)


_MAX_IMAGE_CHANNELS = 1024  # a damaged header must not ask for all memory


@dataclass(frozen=True)
class ModelConfig:
    """Everything that must be known to rebuild and run a model; it travels in the model file."""

    # start from this trained model: a bundled name or a model file, or null for random weights; the other
    # keys of this section, but for pixel_size_um, then have its values unless they are given
    init: str | None = None
    # backbone size: `tiny` (192 wide, 3 heads), `small`, `base`, `large`, or `conv`: no transformer,
    # the convolutions of decoders `detail` and `fpn` alone (patch size 16 or 32)
    size: str = "small"
    patch_size: int = 8  # edge of a patch in px: 4, 8, 14 or 16; 32 for size `conv`
    # `unet`, `unet_wide`, `linear`, or with a convolutional pyramid of the image: `detail`, a U-Net, and
    # `fpn`, a feature pyramid network
    decoder: str = "unet"
    image_channels: int = 0  # channels of the full-resolution image skip of `unet`; 0 leaves it out
    # what the network sees: `gray`, or `compressed`: the same intensities on one linear and two
    # logarithmic scales, so that dim cells beside bright ones stand out
    intensities: str = "gray"
    target: str = "sqrt"  # what the network predicts: `linear` or `sqrt` distance map
    # window_px, overlap_px: the network sees square windows of `window_px`; neighbours share
    # `overlap_px`.  They belong to the model, because attention sees the whole window.
    window_px: int = 256
    overlap_px: int = 64
    # peak_threshold, fill_threshold, min_prominence: post-processing, chosen on validation data
    peak_threshold: float = 0.6
    fill_threshold: float = 0.25
    min_prominence: float = 0.1
    min_area_px: int = 0  # cells with fewer pixels are dropped
    # low_percentile, high_percentile: intensities mapped to 0 and 1, of the whole image
    low_percentile: float = 1.0
    high_percentile: float = 99.8
    # the mapped range is at least this many noise standard deviations wide, so that an empty field
    # is not stretched into structure
    min_contrast_sigma: float = 20.0
    # start value of LayerScale in a network without pretrained weights
    layerscale_init: float = 1e-5
    drop_path_rate: float = 0.0  # stochastic depth while training
    pixel_size_um: float | None = None  # pixel size of the training images in µm, where known
    # typical diameter of the cells of the training labels in px; training writes it
    diameter_px: float | None = None

    def __post_init__(self) -> None:
        require_choice("`model.size`", self.size, MODEL_SIZES)
        require_choice("`model.patch_size`", self.patch_size, patch_sizes(self.size))
        require_choice("`model.decoder`", self.decoder, DECODERS)
        require_choice("`model.intensities`", self.intensities, ("gray", "compressed"))
        require(
            self.decoder not in PYRAMID_DECODERS or self.patch_size != 14,
            f"`model.patch_size` must be 4, 8 or 16 for decoder {self.decoder}, got {self.patch_size}: "
            "choose 16, or another decoder",
        )
        require(
            self.size != "conv" or self.decoder in PYRAMID_DECODERS,
            f"`model.size` conv must have decoder detail or fpn, got {self.decoder}: change it, or choose "
            "the size of a transformer",
        )
        require_choice("`model.target`", self.target, ("linear", "sqrt"))
        require(
            self.window_px >= self.patch_size and self.window_px % self.patch_size == 0,
            f"`model.window_px` must be a multiple of `model.patch_size` {self.patch_size}, "
            f"got {self.window_px}: choose {max(1, self.window_px // self.patch_size) * self.patch_size}",
        )
        require(
            0 <= self.overlap_px <= self.window_px // 2,
            f"`model.overlap_px` must be between 0 and half of `model.window_px` {self.window_px}, "
            f"got {self.overlap_px}: choose {self.window_px // 4}",
        )
        require(
            0.0 <= self.fill_threshold < self.peak_threshold < 1.0,
            "Thresholds must hold 0 <= `model.fill_threshold` < `model.peak_threshold` < 1, got fill "
            f"{self.fill_threshold} and peak {self.peak_threshold}: change one of them",
        )
        require(
            0.0 <= self.low_percentile < self.high_percentile <= 100.0,
            "Percentiles must hold 0 <= `model.low_percentile` < `model.high_percentile` <= 100, got "
            f"{self.low_percentile} and {self.high_percentile}: 1 and 99.8 are usual",
        )
        require(
            0 <= self.image_channels <= _MAX_IMAGE_CHANNELS,
            f"`model.image_channels` must be between 0 and {_MAX_IMAGE_CHANNELS}, got "
            f"{self.image_channels}: 16 is usual",
        )
        for name in ("min_area_px", "min_contrast_sigma", "min_prominence"):
            require_at_least(f"`model.{name}`", getattr(self, name), 0)
        for name in ("pixel_size_um", "diameter_px"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < float("inf"),
                f"`model.{name}` must be above 0 or null, got {value}: leave it out if it is not known",
            )
        require(
            0.0 <= self.drop_path_rate < 1.0,
            f"`model.drop_path_rate` must be in [0, 1), got {self.drop_path_rate}: 0.1 is usual",
        )

    @property
    def intensity(self) -> dict[str, float]:
        """The options of `dinocell.segmentation.intensity.find_range`."""
        names = ("low_percentile", "high_percentile", "min_contrast_sigma")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class BackboneConfig:
    """Where the backbone starts and how fast it learns."""

    # backbone `.pth` file (a DINOv3 state dict), or null for random weights
    weights: str | None = None
    frozen: bool = False  # the backbone neither learns nor leaves eval mode
    lr_mult: float = 1.0  # learning rate of the backbone as a multiple of `optimizer.lr`
    layer_decay: float = 1.0  # factor per block from the last to the first (1: all alike)

    def __post_init__(self) -> None:
        require_at_least("`backbone.lr_mult`", self.lr_mult, 0)
        require(
            0 < self.layer_decay <= 1,
            f"`backbone.layer_decay` must be in (0, 1], got {self.layer_decay}: 0.9 is usual",
        )
        require(
            not (self.frozen and self.weights is None),
            "`backbone.frozen` needs pretrained weights, got `backbone.weights=null`: name a file, or do not freeze the backbone",
        )
