"""The DINOv3 vision transformer (Siméoni et al. 2025; matches `dinov3.models.vision_transformer`)."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinov3.cells.checks import one_of
from dinov3.layers.attention import LinearKMaskedBias
from dinov3.layers.block import SelfAttentionBlock
from dinov3.layers.ffn_layers import Mlp, SwiGLUFFN
from dinov3.layers.layer_scale import LayerScale
from dinov3.layers.patch_embed import PatchEmbed
from dinov3.layers.rms_norm import RMSNorm
from dinov3.layers.rope_position_encoding import RopePositionEmbedding
from dinov3.utils.utils import named_apply

logger = logging.getLogger("dinov3")

ffn_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFN,
    "swiglu32": partial(SwiGLUFFN, align_to=32),
    "swiglu64": partial(SwiGLUFFN, align_to=64),
    "swiglu128": partial(SwiGLUFFN, align_to=128),
}
norm_layer_dict: dict[str, Callable[..., nn.Module]] = {
    "layernorm": partial(nn.LayerNorm, eps=1e-6),
    "layernormbf16": partial(nn.LayerNorm, eps=1e-5),
    "rmsnorm": RMSNorm,
}
dtype_dict: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def init_weights_vit(module: nn.Module, name: str = "") -> None:
    """Start values of one submodule; for `named_apply`.

    Linear: truncated normal of standard deviation 0.02, bias 0.  Norms, LayerScale, patch
    embedding: their own defaults.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, LinearKMaskedBias):
            module.reset_bias_mask()
    elif isinstance(module, (nn.LayerNorm, LayerScale, PatchEmbed, RMSNorm)):
        module.reset_parameters()


class DinoVisionTransformer(nn.Module):
    """ViT with rotary positions, storage (register) tokens and LayerScale.

    Args:
        img_size: informs `patch_embed.num_patches`; any image size works.
        patch_size, in_chans, embed_dim, depth, num_heads: the shape.
        pos_embed_rope_*: see `RopePositionEmbedding`; dtype is one of `dtype_dict`.
        ffn_ratio, ffn_layer, ffn_bias: the feed-forward layers, one of `ffn_layer_dict`.
        qkv_bias, proj_bias, mask_k_bias: the attention.
        drop_path_rate: stochastic depth, the same in every block.
        layerscale_init: None or 0: without LayerScale.
        norm_layer: one of `norm_layer_dict`.
        n_storage_tokens: learned tokens between CLS and the patches.
        untie_cls_and_patch_norms: CLS and storage tokens get a final norm of their own.
        untie_global_and_local_cls_norm: in training, those of the second list entry (the local
            crops) get yet another.
        **ignored_kwargs: accepted with a warning, as upstream.
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        pos_embed_rope_base: float | None = 100.0,
        pos_embed_rope_min_period: float | None = None,
        pos_embed_rope_max_period: float | None = None,
        pos_embed_rope_normalize_coords: Literal["min", "max", "separate"] = "separate",
        pos_embed_rope_shift_coords: float | None = None,
        pos_embed_rope_jitter_coords: float | None = None,
        pos_embed_rope_rescale_coords: float | None = None,
        pos_embed_rope_dtype: str = "bf16",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        layerscale_init: float | None = None,
        norm_layer: str = "layernorm",
        ffn_layer: str = "mlp",
        ffn_bias: bool = True,
        proj_bias: bool = True,
        n_storage_tokens: int = 0,
        mask_k_bias: bool = False,
        untie_cls_and_patch_norms: bool = False,
        untie_global_and_local_cls_norm: bool = False,
        device: Any | None = None,
        **ignored_kwargs: Any,
    ) -> None:
        super().__init__()
        if ignored_kwargs:
            logger.warning("Arguments without effect: %s", ", ".join(sorted(ignored_kwargs)))
        make_norm = _choose(norm_layer_dict, "norm_layer", norm_layer)
        make_ffn = _choose(ffn_layer_dict, "ffn_layer", ffn_layer)
        self.num_features = self.embed_dim = embed_dim
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.n_storage_tokens = n_storage_tokens
        self.chunked_blocks = False
        # Type that sine and cosine are handed to the blocks in; None: as they were computed.
        # FSDP2's mixed precision casts them too, so a run without it asks for the same here.
        self.rope_output_dtype: torch.dtype | None = None

        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            flatten_embedding=False,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, device=device))
        if n_storage_tokens > 0:
            self.storage_tokens = nn.Parameter(
                torch.empty(1, n_storage_tokens, embed_dim, device=device)
            )
        self.rope_embed = RopePositionEmbedding(
            embed_dim=embed_dim,
            num_heads=num_heads,
            base=pos_embed_rope_base,
            min_period=pos_embed_rope_min_period,
            max_period=pos_embed_rope_max_period,
            normalize_coords=pos_embed_rope_normalize_coords,
            shift_coords=pos_embed_rope_shift_coords,
            jitter_coords=pos_embed_rope_jitter_coords,
            rescale_coords=pos_embed_rope_rescale_coords,
            dtype=_choose(dtype_dict, "pos_embed_rope_dtype", pos_embed_rope_dtype),
            device=device,
        )
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                dim=embed_dim,
                num_heads=num_heads,
                ffn_ratio=ffn_ratio,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path=drop_path_rate,
                norm_layer=make_norm,
                ffn_layer=make_ffn,
                init_values=layerscale_init,
                mask_k_bias=mask_k_bias,
                device=device,
            )
            for _ in range(depth)
        )
        self.norm = make_norm(embed_dim)
        self.untie_cls_and_patch_norms = untie_cls_and_patch_norms
        self.cls_norm = make_norm(embed_dim) if untie_cls_and_patch_norms else None
        self.untie_global_and_local_cls_norm = untie_global_and_local_cls_norm
        self.local_cls_norm = make_norm(embed_dim) if untie_global_and_local_cls_norm else None
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim, device=device))
        if device is not None:
            self.to(device)

    def init_weights(self) -> None:
        """Random start values everywhere; needed before first use unless weights are loaded."""
        self.rope_embed._init_weights()
        nn.init.normal_(self.cls_token, std=0.02)
        if self.n_storage_tokens > 0:
            nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        named_apply(init_weights_vit, self)

    def prepare_tokens_with_masks(
        self, x: Tensor, masks: Tensor | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Image [B, C, H, W] → tokens [B, 1 + R + h·w, D] and the grid (h, w).

        `masks`: [B, h·w] booleans; true patches are replaced by the mask token.
        """
        x = self.patch_embed(x)  # [B, h, w, D]
        batch, height, width, _ = x.shape
        x = x.flatten(1, 2)  # [B, N, D]
        cls_token: Tensor = self.cls_token
        if masks is not None:
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        else:
            # The mask token takes part in every step, else distributed training would miss its gradient.
            cls_token = cls_token + 0 * self.mask_token
        parts = [cls_token.expand(batch, -1, -1)]
        if self.n_storage_tokens > 0:
            parts.append(self.storage_tokens.expand(batch, -1, -1))
        return torch.cat([*parts, x], dim=1), (height, width)

    def _run_blocks(
        self, tokens: list[Tensor], grids: list[tuple[int, int]], wanted: Sequence[int] = ()
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """All blocks over a list of token tensors; the outputs of the `wanted` blocks beside it."""
        kept = []
        fixed = None
        if not self.rope_embed.is_random:
            fixed = [self._rope(height, width) for height, width in grids]
        for index, block in enumerate(self.blocks):
            ropes = fixed
            if ropes is None:  # augmented coordinates are drawn afresh in every block
                ropes = [self._rope(height, width) for height, width in grids]
            tokens = block(tokens, ropes)
            if index in wanted:
                kept.append(tokens)
        return tokens, kept

    def _rope(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Sine and cosine of a grid, each [h·w, head width]."""
        sin, cos = self.rope_embed(H=height, W=width)
        if self.rope_output_dtype is None:
            return sin, cos
        return sin.to(self.rope_output_dtype), cos.to(self.rope_output_dtype)

    def _normalize(self, x: Tensor, is_local: bool = False) -> tuple[Tensor, Tensor]:
        """Final norms → CLS and storage tokens [B, 1 + R, D], patch tokens [B, N, D]."""
        count = self.n_storage_tokens + 1
        if self.local_cls_norm is not None and is_local and self.training:
            return self.local_cls_norm(x[:, :count]), self.norm(x[:, count:])
        if self.cls_norm is not None:
            return self.cls_norm(x[:, :count]), self.norm(x[:, count:])
        x = self.norm(x)
        return x[:, :count], x[:, count:]

    def forward_features_list(
        self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]
    ) -> list[dict[str, Any]]:
        """`forward_features` of several batches that may differ in image size."""
        tokens, grids = [], []
        for x, masks in zip(x_list, masks_list, strict=True):
            prepared, grid = self.prepare_tokens_with_masks(x, masks)
            tokens.append(prepared)
            grids.append(grid)
        tokens, _ = self._run_blocks(tokens, grids)
        output = []
        for index, (x, masks) in enumerate(zip(tokens, masks_list, strict=True)):
            extra, patches = self._normalize(x, is_local=index == 1)
            output.append(
                {
                    "x_norm_clstoken": extra[:, 0],
                    "x_storage_tokens": extra[:, 1:],
                    "x_norm_patchtokens": patches,
                    "x_prenorm": x,
                    "masks": masks,
                }
            )
        return output

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Normalised tokens of images.

        `x`: [B, C, H, W], or a list of such; `masks`: [B, N] booleans, or a list of these or None.
        Returns a dict (or a list of dicts) with `x_norm_clstoken` [B, D], `x_storage_tokens` [B, R,
        D], `x_norm_patchtokens` [B, N, D], `x_prenorm` [B, 1 + R + N, D] and `masks`.
        """
        if isinstance(x, Tensor):
            return self.forward_features_list([x], [masks])[0]  # type: ignore[list-item]
        given = masks if masks is not None else [None] * len(x)
        return self.forward_features_list(x, given)  # type: ignore[arg-type]

    def get_intermediate_layers(
        self,
        x: Tensor,
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """Outputs of some blocks, in block order.

        Args:
            n: the last n blocks, or their indices.
            reshape: patches as maps [B, D, h, w] instead of [B, N, D].
            return_class_token, return_extra_tokens: also CLS [B, D], also storage tokens [B, R, D].
            norm: apply the final norms to each.

        Returns a tuple of patch tensors, or of tuples (patches[, CLS][, storage]).
        """
        total = len(self.blocks)
        wanted = list(range(total - n, total)) if isinstance(n, int) else list(n)
        known = range(total)
        if not wanted or any(index not in known for index in wanted):
            raise ValueError(f"Blocks must be among 0 to {total - 1}, got {n}: correct n")
        prepared, (height, width) = self.prepare_tokens_with_masks(x)
        _, kept = self._run_blocks([prepared], [(height, width)], wanted)
        count = self.n_storage_tokens + 1
        results: list[Tensor | tuple[Tensor, ...]] = []
        for (tokens,) in kept:
            if norm:
                extra, patches = self._normalize(tokens)
            else:
                extra, patches = tokens[:, :count], tokens[:, count:]
            if reshape:
                patches = patches.transpose(1, 2).unflatten(2, (height, width)).contiguous()
            item = [patches]
            if return_class_token:
                item.append(extra[:, 0])
            if return_extra_tokens:
                item.append(extra[:, 1:])
            results.append(tuple(item) if len(item) > 1 else patches)
        return tuple(results)

    def get_last_selfattention(self, x: Tensor, *, masks: Tensor | None = None) -> Tensor:
        """Attention of the last block, worked out from its q and k (Vaswani et al. 2017, eq. 1).

        The fused kernels of `forward` keep the weights to themselves.  The result is a function of
        the image in eval mode; in train mode stochastic depth and augmented positions act on the
        blocks before.  With sharded weights all processes must call this.

        `x`: [B, C, H, W]; `masks`: [B, N] booleans, as in `forward_features`.  Returns [B, heads,
        T, T] float32 with T = 1 + R + N (CLS, storage tokens, patches); rows are queries and sum to
        1.
        """
        last: Any = self.blocks[-1]
        gathered: list[Any] = [module for module in (self, last) if hasattr(module, "unshard")]
        for module in gathered:
            module.unshard()
        try:
            # Gathered shards may be narrower than the weights that the caller knows.
            x = x.to(self.patch_embed.proj.weight.dtype)
            prepared, (height, width) = self.prepare_tokens_with_masks(x, masks)
            tokens = [prepared]
            for block in self.blocks[:-1]:
                tokens = block(tokens, [self._rope(height, width)])
            attention = last.attn
            qkv = attention.qkv(last.norm1(tokens[0]))
        finally:
            for module in gathered:
                module.reshard()
        batch, count, triple = qkv.shape
        heads = attention.num_heads
        split = qkv.reshape(batch, count, 3, heads, triple // 3 // heads)
        q, k, _ = split.permute(2, 0, 3, 1, 4)  # each [B, heads, T, head width]
        q, k = attention.apply_rope(q, k, self._rope(height, width))
        # Autocast would bring the product back to half precision.
        with torch.autocast(q.device.type, enabled=False):
            logits = q.float() @ k.float().transpose(-1, -2) * attention.scale
            return logits.softmax(dim=-1)

    def forward(self, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        """`forward_features` if `is_training`, else the head on the CLS token [B, D]."""
        features = self.forward_features(*args, **kwargs)
        if is_training:
            return features
        assert isinstance(features, dict)
        return self.head(features["x_norm_clstoken"])


def _vit(
    embed_dim: int, depth: int, num_heads: int, ffn_ratio: float = 4.0
) -> Callable[..., DinoVisionTransformer]:
    shape: dict[str, Any] = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}

    def make(patch_size: int = 16, **kwargs: Any) -> DinoVisionTransformer:
        """A vision transformer of a usual size; `kwargs` are further constructor arguments."""
        options = {"ffn_ratio": ffn_ratio, **kwargs}
        return DinoVisionTransformer(patch_size=patch_size, **shape, **options)

    return make


# By the number of parameters with patches of 16 pixels; the first is ours (DeiT, Touvron et al. 2021, table 1).
vit_tiny = _vit(192, 12, 3)  # 5.5 M
vit_small = _vit(384, 12, 6)  # 21.6 M
vit_base = _vit(768, 12, 12)  # 85.7 M
vit_large = _vit(1024, 24, 16)  # 303 M
vit_so400m = _vit(1152, 27, 18, 3.777777778)  # 415 M
vit_huge2 = _vit(1280, 32, 20)  # 631 M
vit_giant2 = _vit(1536, 40, 24)  # 1134 M
vit_7b = _vit(4096, 40, 32, 3.0)  # 6716 M


def _choose(known: dict[str, Any], option: str, value: str) -> Any:
    one_of(option, value, known)
    return known[value]
