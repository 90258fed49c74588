"""The network (backbone, decoder, sigmoid) and the one file that stores it.

A model file is a `.safetensors` whose metadata holds one JSON header: architecture,
normalisation, thresholds, training data, licence, metrics.  It loads without pickle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinocell.errors import CheckpointError, ConfigError, UsageError, raised_as
from dinocell.files import writing
from dinocell.network.backbone import BACKBONE_SIZES, DINOv3Backbone
from dinocell.network.config import IMAGENET_MEAN, IMAGENET_STD, TUNED_THRESHOLDS, ModelConfig
from dinocell.network.decoder import create_decoder
from dinocell.network.detail import ConvPyramid, pyramid_widths
from dinocell.network.familiarity import KnownKinds
from dinocell.network.onnx_graph import exported_header, open_graph, run_graph
from dinocell.network.tensors import read_tensors
from dinocell.network.weights import BUNDLED_FOLDER as _BUNDLED_FOLDER
from dinocell.network.weights import EXPORTED
from dinocell.settings import config_from_mapping, config_to_mapping, require

HEADER_KEY = "dinocell"
"""Where a model file keeps the JSON header."""
_FORMAT_VERSION = 1
# what weights are made for
ARCHITECTURE = ("size", "patch_size", "decoder", "image_channels", "intensities", "target")
"""Fields of `ModelConfig` in which a model must equal the one that it starts from."""
_KNEES = (0.1, 0.01)  # of `compress_intensities`, as shares of the range


class DINOCell(nn.Module):
    """Image → distance map; starts with random weights, `from_pretrained` loads trained ones.

    Parameters
    ----------
    config : architecture and everything needed to run it
    card : what is known about its training (data, licence, metrics); stored in the model file
    """

    def __init__(self, config: ModelConfig, card: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = dict(card or {})
        # what its training images look like; None where they are not recorded
        self.statistics: KnownKinds | None = None
        self.backbone: DINOv3Backbone | ConvPyramid
        if config.size == "conv":
            self.backbone = ConvPyramid(pyramid_widths(config.patch_size))
        else:
            self.backbone = DINOv3Backbone(
                config.size,
                patch_size=config.patch_size,
                layerscale_init=config.layerscale_init,
                drop_path_rate=config.drop_path_rate,
            )
        self.decoder = create_decoder(
            config.decoder,
            self.backbone.embed_dim,
            config.patch_size,
            num_features=len(self.backbone.blocks_read),
            image_channels=config.image_channels,
            has_pyramid=config.size != "conv",
        )

    def forward(self, image: Tensor) -> Tensor:
        """Distance map of normalised images.

        Parameters
        ----------
        image : (B, 3, H, W) float tensor
            ImageNet-normalised (`dinocell.segmentation.intensity.to_model_input`); H and W are multiples of
            the patch size.

        Returns (B, 1, H, W) float tensor in [0, 1].

        Raises ValueError (the image has another shape, or a side that is no multiple of the patch
        size).
        """
        return self.map_and_features(image)[0]

    def map_and_features(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `forward`, and beside the map the features that tell kinds of images apart.

        Of a transformer these are the deepest, (B, D, H / p, W / p); of convolutions those of all strides,
        the finest first, because the deepest alone hardly see texture.
        """
        patch = self.config.patch_size
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"`image` must be (B, 3, H, W), got shape {tuple(image.shape)}: repeat gray three "
                "times"
            )
        height, width = image.shape[-2:]
        if height % patch or width % patch or height == 0 or width == 0:
            raise ValueError(
                f"`image` must have sides that are multiples of the patch size {patch}, got "
                f"{height}×{width}: pad it, or use `segment`, which does"
            )
        if self.config.intensities == "compressed":
            image = compress_intensities(image)
        features = self.backbone(image)
        logits = self.decoder(features, image)
        seen = features if isinstance(self.backbone, ConvPyramid) else features[-1:]
        return logits.float().sigmoid(), tuple(seen)  # [B, 1, H, W], each [B, D, h, w]

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | torch.device = "cpu") -> DINOCell:
        """A trained model in eval mode: see `load_model`."""
        return load_model(name, device=device)

    def save(self, path: str | Path, *, half: bool = False) -> None:
        """Write the model file; see `save_model`."""
        save_model(path, self, half=half)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device


class OnnxModel(DINOCell):
    """A model whose network is a graph; it has no weights, so that it cannot be trained.

    Parameters
    ----------
    described : what the header of the file says
    path : of the file
    """

    def __init__(self, described: DINOCell, path: Path) -> None:
        nn.Module.__init__(self)
        self.config, self.card = described.config, described.card
        self.statistics = described.statistics
        self.session = open_graph(path)
        # in place of weights, where results are traced to a model
        digest = hashlib.sha256(path.read_bytes()).digest()
        self.register_buffer("graph_sha256", torch.tensor(list(digest), dtype=torch.uint8))

    @property
    def device(self) -> torch.device:
        """Of the windows; onnxruntime moves them to where it computes."""
        return torch.device("cpu")

    def map_and_features(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As `DINOCell.map_and_features`; the features of all strides come as one, averaged over patches."""
        maps, features = run_graph(self.session, image[:, :1] * IMAGENET_STD[0] + IMAGENET_MEAN[0])
        return maps, (features,)


def compress_intensities(image: Tensor) -> Tensor:
    """Gray in three channels alike → linear and two logarithmic scales, each in about [-1, 1].

    `image` is (B, 3, H, W), ImageNet-normalised from [0, 1].  asinh is linear far below its knee and
    logarithmic above (Lupton et al. 1999): knees at 1/10 and 1/100 of the range let a nucleus of a
    hundredth of the brightest one fill a sixth of the third channel's range.
    """
    gray = image[:, :1] * IMAGENET_STD[0] + IMAGENET_MEAN[0]  # [B, 1, H, W]
    scales = [gray, *(torch.asinh(gray / knee) / math.asinh(1 / knee) for knee in _KNEES)]
    return torch.cat(scales, dim=1) * 2 - 1


def create_dinocell_model(
    size: str = "small",
    *,
    patch_size: int = 8,
    decoder: str = "unet",
    **options: Any,
) -> DINOCell:
    """A model with random weights.

    `options` are further fields of `dinocell.network.config.ModelConfig`: `image_channels`,
    `target`, `window_px`, ...  Raises ConfigError (an unknown option or a value out of range).
    """
    config = config_from_mapping(
        ModelConfig, {"size": size, "patch_size": patch_size, "decoder": decoder, **options}
    )
    return DINOCell(config)


def header_text(model: DINOCell, **more: str) -> str:
    """The JSON header of the file of a model, with `more` keys."""
    header: dict[str, Any] = {
        "format": _FORMAT_VERSION,
        # Weights and thresholds are its own now, wherever they started.
        "model": config_to_mapping(dataclasses.replace(model.config, init=None)),
        "card": model.card,
    }
    if model.statistics is not None:
        header["statistics"] = model.statistics.to_mapping()
    return json.dumps(header | more, sort_keys=True)


def save_model(path: str | Path, model: DINOCell, *, half: bool = False) -> None:
    """Write weights and header to one `.safetensors`, under a temporary name first.

    `half` stores float tensors as float16 (half the size; they are float32 again when loaded).

    Raises UsageError (the network is a graph, which has no weights); DINOCellError (the disk refuses).
    """
    if isinstance(model, OnnxModel):
        raise UsageError(
            "A model that is saved must have weights, got the graph of an .onnx file: copy that file, or "
            "save the model that it was exported from"
        )
    from safetensors.torch import save_file

    path = Path(path)
    state = {}
    for key, value in model.state_dict().items():
        value = value.detach().to("cpu")
        if half and value.is_floating_point():
            value = value.half()
        state[key] = value.contiguous()
    with writing(path) as temporary:
        save_file(state, temporary, metadata={HEADER_KEY: header_text(model)})
        # safetensors makes files only their owner can read; a model is made to be shared.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)


def round_weights(model: DINOCell) -> None:
    """Round the weights, in place, to float16: those that `save_model(half=True)` writes.

    Before thresholds and statistics are found, which must suit the file.
    """
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half())


def read_model_header(name: str | Path) -> dict[str, Any]:
    """The JSON header of a model file: keys `format`, `model`, `card`, and mostly `statistics`.

    Also of the files that `dinocell export` wrote.

    Raises UsageError (the file or bundled model does not exist); CheckpointError (the file is no
    model file: truncated, pickled, or without the header of DINOCell); MissingExtraError (of an ONNX
    file, without the extra `onnx`).
    """
    path = model_path(name)
    exported = path.suffix in EXPORTED
    text = exported_header(path, HEADER_KEY) if exported else _safetensors_header(path)
    if text is None:
        raise CheckpointError(
            f"A model file must carry DINOCell's header, got {path} without it, which another "
            "program made: give a model of DINOCell"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The header of a model file must be JSON, got something else in {path}: fetch it again"
        ) from error
    if not isinstance(header, dict) or not isinstance(header.get("card", {}), dict | None):
        raise CheckpointError(
            f"The header of a model file must hold keys and values, also its card, got others in {path}: "
            "fetch it again"
        )
    if header.get("format") != _FORMAT_VERSION:
        raise CheckpointError(
            f"A model file must have format {_FORMAT_VERSION}, got {header.get('format')} in "
            f"{path}: update dinocell"
        )
    return header


def _safetensors_header(path: Path) -> str | None:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(HEADER_KEY)
    except Exception as error:
        kind = _foreign_kind(path)
        raise CheckpointError(
            f"A model file must be a complete .safetensors, got {path} ({kind or error}): fetch it "
            "again, or take the one that `dinocell train` wrote"
        ) from error


def load_model(name: str | Path, *, device: str | torch.device = "cpu") -> DINOCell:
    """Load a model file or a bundled model, in eval mode, in float32.

    A file that ends in .onnx is run by onnxruntime.

    Raises UsageError, CheckpointError, MissingExtraError (as `read_model_header`; also when the weights do
    not fit the header's architecture, or the file is one for other programs).
    """
    header, path = read_model_header(name), model_path(name)
    if path.suffix in (".pt2", ".zip"):
        raise UsageError(
            f"A model must be a .safetensors or .onnx file, got {path}, which is for other programs: "
            "give the file that it was exported from"
        )
    model = untrained(header, path)
    if path.suffix == ".onnx":
        return OnnxModel(model, path).eval()
    expected = model.state_dict()
    state = read_tensors(path, expected, config=model.config)
    model.load_state_dict({key: value.to(expected[key].dtype) for key, value in state.items()})
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.1 times as fast
    return model.eval().to(resolve_device(device))


def load_trainable(name: str | Path, *, device: str | torch.device = "cpu") -> DINOCell:
    """As `load_model`, but refuses a graph, which has no weights to change, with a UsageError."""
    if model_path(name).suffix == ".onnx":
        raise UsageError(
            f"A model that is trained or exported must be a .safetensors file or a bundled one, got the "
            f".onnx file {name}: give the file that it was exported from"
        )
    return load_model(name, device=device)


def untrained(header: Mapping[str, Any], path: Path) -> DINOCell:
    """What the header of a model file describes, with random weights.

    Raises CheckpointError (the architecture is unknown, or the statistics are damaged).
    """
    try:
        config = config_from_mapping(ModelConfig, header["model"])
    except (ConfigError, KeyError) as error:
        raise CheckpointError(
            f"The header of a model file must describe a known architecture, got {path} ({error}): "
            "update dinocell"
        ) from error
    model = DINOCell(config, header.get("card"))
    model.statistics = _known_kinds(header.get("statistics"), config, path)
    return model


def _known_kinds(values: Any, config: ModelConfig, path: Path) -> KnownKinds | None:
    if values is None:
        return None
    known = KnownKinds.from_mapping(values, path)
    # Earlier versions described convolutions by their deepest features alone.
    if any(kind.num_features != _described_width(config) for kind in known.kinds):
        return None
    with raised_as(CheckpointError, TypeError, ConfigError):
        for kind in known.kinds:
            dataclasses.replace(config, **kind.thresholds)
    return known


def config_with_start(model: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a configuration's section `model`, those missing as in the model that `init` names.

    All but the pixel size, because that of the new images may be another.

    Raises UsageError, CheckpointError (as `read_model_header`).
    """
    if model.get("init") is None:
        return dict(model)
    start = read_model_header(str(model["init"]))["model"]
    return {**start, "pixel_size_um": None, **model}


def load_start(model: DINOCell) -> None:
    """Give `model` the weights of the model that its `config.init` names, if any.

    Raises UsageError, CheckpointError (as `load_model`); ConfigError (a key of the architecture differs
    from that model's).
    """
    config = model.config
    if config.init is None:
        return
    start = load_trainable(config.init)
    for key in ARCHITECTURE:
        own, given = getattr(start.config, key), getattr(config, key)
        require(
            own == given,
            f"`model.{key}` must be {own} as in {config.init}, got {given}: leave this key out, or set "
            "`model.init=null`",
        )
    model.load_state_dict(start.state_dict())


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    found = (path for path in _BUNDLED_FOLDER.iterdir() if path.suffix in (".safetensors", ".onnx"))
    return sorted(path.stem for path in found)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """`auto` (CUDA, else MPS, else CPU), `cpu`, `cuda`, `cuda:1`, `mps` → a usable device.

    Raises UsageError (the name is unknown, or this machine or the installed torch has no such
    device).
    """
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"`device` must be auto, cpu, cuda, cuda:N or mps, got {device!r}: choose one of these"
        ) from error
    count = torch.cuda.device_count()
    missing_cuda = chosen.type == "cuda" and (chosen.index or 0) >= count
    missing_mps = chosen.type == "mps" and not torch.backends.mps.is_available()
    if missing_cuda or missing_mps or chosen.type not in ("cpu", "cuda", "mps"):
        raise UsageError(
            f"`device` must exist, got {device} on a machine with {count} CUDA devices: set "
            "`device=cpu` or `device=auto`"
        )
    return chosen


def with_config(model: DINOCell, **changes: Any) -> DINOCell:
    """The same network (shared weights) under a changed configuration, for example thresholds.

    New thresholds hold for images of every kind.  Raises ConfigError (the new values do not fit together).
    """
    other = object.__new__(type(model))
    other.__dict__.update(model.__dict__)
    other.config = dataclasses.replace(model.config, **changes)
    if other.statistics is not None and changes.keys() & set(TUNED_THRESHOLDS):
        other.statistics = other.statistics.without_thresholds()
    return other


def _described_width(config: ModelConfig) -> int:
    """Numbers that `map_and_features` gives for a patch."""
    if config.size == "conv":
        return sum(pyramid_widths(config.patch_size))
    return BACKBONE_SIZES[config.size].embed_dim


def model_path(name: str | Path) -> Path:
    """The file of a bundled model, or of a model file itself.  Raises UsageError (there is none)."""
    path = Path(name)
    if path.is_file():
        return path
    for suffix in (".safetensors", ".onnx"):
        bundled = _BUNDLED_FOLDER / f"{name}{suffix}"
        if path.name == str(name) and bundled.is_file():
            return bundled
    known = ", ".join(bundled_models()) or "none"
    raise UsageError(
        f"A model must be a file or a bundled name ({known}), got {name}: check the path; "
        f"backbone sizes ({', '.join(BACKBONE_SIZES)}) are not models"
    )


def _foreign_kind(path: Path) -> str | None:
    """What a file that is no safetensors looks like, for the error message."""
    with path.open("rb") as file:
        start = file.read(8)
    if not start:
        return "an empty file"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickled PyTorch checkpoint"
    if start[:1] == b"<" or start[:7] == b"version":
        return "a text file, perhaps an error page or a pointer of Git LFS"
    return None
