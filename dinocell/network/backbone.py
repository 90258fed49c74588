"""A ViT of `dinov3` that returns the feature maps of four depths."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dinocell.errors import CheckpointError, UsageError
from dinocell.network.weights import find_weights
from dinocell.tree import tree_imports


@dataclass(frozen=True)
class BackboneSize:
    """Width, depth and heads of a ViT."""

    embed_dim: int
    depth: int
    num_heads: int


BACKBONE_SIZES: Mapping[str, BackboneSize] = {
    "tiny": BackboneSize(192, 12, 3),
    "small": BackboneSize(384, 12, 6),
    "base": BackboneSize(768, 12, 12),
    "large": BackboneSize(1024, 24, 16),
}


def feature_blocks(depth: int) -> tuple[int, int, int, int]:
    """Indices of the four blocks whose outputs the decoder reads.

    (2, 5, 8, 11) for 12 blocks, (4, 11, 17, 23) for 24 as in the DINOv3 paper; evenly spread, the
    last one included, for other depths.
    """
    if depth == 24:
        return (4, 11, 17, 23)
    if depth < 4:
        raise ValueError(f"`depth` must be at least 4, got {depth}: four feature maps are needed")
    first, second, third = (round(depth * quarter / 4) - 1 for quarter in (1, 2, 3))
    return (first, second, third, depth - 1)


class DINOv3Backbone(nn.Module):
    """DINOv3 ViT with the flags of the released ViT-S/B/L.

    RoPE coordinates are not rescaled at random in training (the released setting), because each
    block would draw its own: that helps self-supervision and hurts a decoder that reads positions.

    Parameters
    ----------
    size : `tiny`, `small`, `base` or `large`
    patch_size : int
    layerscale_init : 1e-5 as released, for pretrained weights; a network that starts at random
        learns sooner from 0.1 or 1
    drop_path_rate : stochastic depth in training
    """

    def __init__(
        self,
        size: str = "small",
        *,
        patch_size: int = 8,
        layerscale_init: float = 1e-5,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if size not in BACKBONE_SIZES:
            raise ValueError(
                f"`size` must be one of {', '.join(BACKBONE_SIZES)}, got {size!r}: choose one of these"
            )
        shape = BACKBONE_SIZES[size]
        self.size = size
        self.patch_size = patch_size
        self.embed_dim = shape.embed_dim
        self.blocks_read = feature_blocks(shape.depth)
        with tree_imports():
            from dinov3.models.vision_transformer import DinoVisionTransformer

        self.vit: Any = DinoVisionTransformer(
            patch_size=patch_size,
            embed_dim=shape.embed_dim,
            depth=shape.depth,
            num_heads=shape.num_heads,
            ffn_ratio=4.0,
            qkv_bias=True,
            drop_path_rate=drop_path_rate,
            layerscale_init=layerscale_init,
            norm_layer="layernormbf16",
            n_storage_tokens=4,
            mask_k_bias=True,
            pos_embed_rope_base=100.0,
            pos_embed_rope_normalize_coords="separate",
            pos_embed_rope_dtype="fp32",
        )
        self.vit.init_weights()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) normalised image → four (B, D, H / p, W / p) maps, shallowest first.

        The network's final norm is applied to each.
        """
        return self.vit.get_intermediate_layers(
            image, n=list(self.blocks_read), reshape=True, norm=True
        )


def load_backbone_weights(backbone: DINOv3Backbone, path: str | Path) -> str:
    """Load a DINOv3 backbone from any file that `docs/weights.md` lists, of any patch size.

    `path` may also be the name of a fetched backbone, such as `dinov3_vits16`.  Returns what was
    loaded and what was adapted, for the log.  Raises UsageError (the file does not exist);
    CheckpointError (it holds no backbone, or keys are missing, unexpected or misshapen; all are
    listed).
    """
    with tree_imports():
        from dinov3.cells import weights as formats

    try:
        return str(formats.load_backbone(backbone.vit, find_weights(path)))
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    except formats.WeightsError as error:
        raise CheckpointError(
            f"Backbone weights must fit ViT {backbone.size}/{backbone.patch_size} with the flags of "
            f"the released ViTs (4 storage tokens, masked k bias, LayerScale): {error}"
        ) from error
