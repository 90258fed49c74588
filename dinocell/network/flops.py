"""What a network costs: parameters and multiply-accumulates, attention included.

fvcore counts them on a traced forward pass.  It skips fused attention, so a handler for that stands
here.  One "flop" of fvcore is one multiply-accumulate (MAC).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinocell.network.model import DINOCell

_ATTENTION_OPS = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
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
            return _traced_macs(module, inputs)
    finally:
        logger.setLevel(level)


def _traced_macs(module: nn.Module, inputs: tuple[Any, ...]) -> Counter[str]:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs)
    analysis.set_op_handle(**dict.fromkeys(_ATTENTION_OPS, _attention_macs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return Counter(analysis.by_operator())


def _attention_macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Two matrix products a head: queries × keys and weights × values."""
    query, key, value = (item.type().sizes() for item in inputs[:3])  # [B, heads, N, head_dim]
    batch, heads, num_queries, width = query
    num_keys = key[2]
    return Counter({"attention": batch * heads * num_queries * num_keys * (width + value[3])})
