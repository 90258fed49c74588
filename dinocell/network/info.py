"""What a model is and costs: architecture, parameters, multiply-accumulates, thresholds, training.

fvcore counts multiply-accumulates (MACs), which it calls flops, on a traced forward pass.  It skips
fused attention, so a handler for that stands here.
"""

import logging
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinocell.errors import MissingExtraError, UsageError
from dinocell.network.config import MODEL_SIZES, patch_sizes
from dinocell.network.model import (
    DINOCell,
    bundled_models,
    create_dinocell_model,
    load_model,
    model_path,
    read_model_header,
    untrained,
)
from dinocell.network.weights import EXPORTED

_ATTENTION_OPS = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
)


def describe_bundled() -> str:
    """One line per bundled model: name, architecture, validation score, licence."""
    lines = []
    for name in bundled_models():
        try:
            header = read_model_header(name)
        except MissingExtraError as error:
            lines.append(f"{name}  {error}")
            continue
        model, card = header["model"], header.get("card", {})
        score = card.get("metrics", {}).get("val_ap50_pooled")
        described = f"validation AP@0.5 {score:.3f}" if score is not None else "no score recorded"
        lines.append(
            f"{name}  {_backbone_name(model['size'], model['patch_size'])}, {model['decoder']}, "
            f"{model['target']} target; {described}; {card.get('licence') or 'licence not recorded'}"
        )
    return "\n".join(lines) if lines else "no bundled models"


def describe_model(name: str, *, decoder: str = "unet", image_px: int = 256) -> str:
    """Architecture, cost, thresholds and training of a model file, bundled model or SIZE/PATCH.

    Parameters
    ----------
    name : `dinocell-tiny`, a path, or `small/8` for an untrained architecture
    decoder : decoder of an untrained architecture
    image_px : the cost is counted for a square image of this edge, rounded down to a whole patch

    Raises UsageError, CheckpointError, ConfigError (the model does not exist, or the file is no
    model file).
    """
    architecture = re.fullmatch(r"([a-z]+)/(\d+)", name)
    if architecture and not Path(name).exists():
        size, patch = architecture.group(1), int(architecture.group(2))
        if size not in MODEL_SIZES:
            raise UsageError(
                f"An architecture must be SIZE/PATCH with a size of {', '.join(MODEL_SIZES)}, got "
                f"{name}: for example small/8"
            )
        if patch not in patch_sizes(size):
            *most, last = patch_sizes(size)
            raise UsageError(
                f"The patch size of {size} must be {', '.join(map(str, most))} or {last}, got {name}: "
                "for example small/8"
            )
        options = {"window_px": 256 // patch * patch}
        model = create_dinocell_model(size, patch_size=patch, decoder=decoder, **options)
        return _describe_architecture(model, image_px)
    path = model_path(name)
    is_graph = path.suffix in EXPORTED
    model = untrained(read_model_header(name), path) if is_graph else load_model(name)
    config, card = model.config, model.card
    of_kinds = {} if model.statistics is None else model.statistics.thresholds()
    lines = [
        f"{card.get('name') or name}: {card.get('description') or 'no description'}",
        _describe_architecture(model, image_px),
        f"target {config.target}, windows of {config.window_px} px overlapping by {config.overlap_px} px",
        f"thresholds: peak {config.peak_threshold:g}, fill {config.fill_threshold:g}, "
        f"prominence {config.min_prominence:g}, smallest cell {config.min_area_px} px",
        *(f"thresholds for {kind}: {text}" for kind, text in of_kinds.items()),
        f"pixel size: {_with_unit(config.pixel_size_um, 'µm')}; typical cell: "
        f"{_with_unit(config.diameter_px, 'px')} in diameter",
        f"licence: {card.get('licence') or 'not recorded'}",
        _describe_statistics(model),
    ]
    for key in ("data", "metrics"):
        for item, value in card.get(key, {}).items():
            lines.append(f"{key}: {item}: {_described(value)}")
    return "\n".join(lines)


def _with_unit(value: float | None, unit: str) -> str:
    return "not recorded" if value is None else f"{value:.4g} {unit}"


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_described(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _backbone_name(size: str, patch_size: int) -> str:
    return "convolutions" if size == "conv" else f"ViT {size}/{patch_size}"


def _describe_statistics(model: DINOCell) -> str:
    if model.statistics is None:
        return "images of another kind: not flagged (no statistics of the training images)"
    return f"images of another kind: flagged by statistics of {model.statistics.images} images"


def _describe_architecture(model: DINOCell, image_px: int) -> str:
    patch = model.config.patch_size
    if image_px < patch:
        raise UsageError(
            f"`image_px` must be at least one patch of {patch} px, got {image_px}: give a larger number"
        )
    cost = model_cost(model, image_px // patch * patch)
    total = cost.backbone_parameters + cost.decoder_parameters
    return (
        f"{_backbone_name(model.config.size, patch)} + {model.config.decoder}\n"
        f"parameters: {total / 1e6:.2f} M (backbone {cost.backbone_parameters / 1e6:.2f} M, decoder "
        f"{cost.decoder_parameters / 1e6:.2f} M)\n"
        f"cost at {cost.image_px}×{cost.image_px} px: {(cost.backbone_macs + cost.decoder_macs) / 1e9:.2f} "
        f"GMAC (backbone {cost.backbone_macs / 1e9:.2f}, decoder {cost.decoder_macs / 1e9:.2f} = "
        f"{100 * cost.decoder_share:.1f} % of the backbone's), counted by fvcore, attention included"
    )


@dataclass(frozen=True)
class ModelCost:
    """Parameters and MACs of one image of `image_px` × `image_px`, by part."""

    image_px: int
    backbone_parameters: int
    decoder_parameters: int
    backbone_macs: int
    decoder_macs: int

    @property
    def decoder_share(self) -> float:
        """MACs of the decoder relative to the backbone's."""
        return self.decoder_macs / self.backbone_macs


def model_cost(model: DINOCell, image_px: int = 256) -> ModelCost:
    """Cost of one forward pass of a square image, without training anything.

    Raises ValueError (`image_px` is no multiple of the patch size).
    """
    patch = model.config.patch_size
    if image_px < patch or image_px % patch:
        raise ValueError(
            f"`image_px` must be a multiple of the patch size {patch}, got {image_px}: choose "
            f"{max(1, image_px // patch) * patch}"
        )
    training = model.training
    model.eval()
    image = torch.zeros(1, 3, image_px, image_px, device=model.device)
    backbone_macs = sum(count_macs(model.backbone, (image,)).values())
    with torch.no_grad():
        features = model.backbone(image)
    decoder_macs = sum(count_macs(model.decoder, (features, image)).values())
    model.train(training)
    return ModelCost(
        image_px=image_px,
        backbone_parameters=sum(p.numel() for p in model.backbone.parameters()),
        decoder_parameters=sum(p.numel() for p in model.decoder.parameters()),
        backbone_macs=int(backbone_macs),
        decoder_macs=int(decoder_macs),
    )


def count_macs(module: nn.Module, inputs: tuple[Any, ...]) -> Counter[str]:
    """MACs of one forward pass by operator (`conv`, `linear`, `attention`, ...)."""
    # fvcore reports every element-wise operator it does not count; they are below a percent.
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # fvcore and the tracing it needs use torch.jit, which torch calls deprecated.
            warnings.simplefilter("ignore")
            from fvcore.nn import FlopCountAnalysis

            analysis = FlopCountAnalysis(module, inputs)
            analysis.set_op_handle(**dict.fromkeys(_ATTENTION_OPS, _attention_macs))
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
            return Counter(analysis.by_operator())
    finally:
        logger.setLevel(level)


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Two matrix products a head: queries × keys and weights × values."""
    query, key, value = (item.type().sizes() for item in inputs[:3])  # [B, heads, N, head_dim]
    batch, heads, num_queries, width = query
    num_keys = key[2]
    return Counter({"attention": batch * heads * num_queries * num_keys * (width + value[3])})
