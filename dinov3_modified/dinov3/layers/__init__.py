"""Building blocks of the vision transformer."""

from dinov3.layers.attention import LinearKMaskedBias, SelfAttention
from dinov3.layers.block import SelfAttentionBlock
from dinov3.layers.dino_head import DINOHead
from dinov3.layers.ffn_layers import Mlp, SwiGLUFFN
from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.patch_embed import PatchEmbed
from dinov3.layers.rms_norm import RMSNorm
from dinov3.layers.rope_position_encoding import RopePositionEmbedding

__all__ = [
    "DINOHead", "LayerScale", "LinearKMaskedBias", "Mlp", "PatchEmbed", "RMSNorm",
    "RopePositionEmbedding", "SelfAttention", "SelfAttentionBlock", "SwiGLUFFN",
]  # fmt: skip
