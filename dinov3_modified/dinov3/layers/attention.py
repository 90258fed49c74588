"""Multi-head self-attention with rotary positions (Vaswani et al. 2017, eq. 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov3.cells.packed_attention import Kernel, packed_attention
from dinov3.utils.utils import cat_keep_shapes, uncat_with_shapes


def rope_rotate_half(x: Tensor) -> Tensor:
    """(a, b) → (−b, a) on the two halves of the last axis."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def rope_apply(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate each pair (i, i + width/2) of the last axis by its angle (RoFormer, eq. 34)."""
    return x * cos + rope_rotate_half(x) * sin


class LinearKMaskedBias(nn.Linear):
    """A linear layer to q, k and v whose bias on k is held at zero.

    A bias on the keys adds the same amount to all logits of a query and so does nothing in exact
    arithmetic; masking it keeps it from drifting.  The mask is NaN until `reset_bias_mask`, so that
    a network that was neither initialised nor loaded cannot go unnoticed.
    """

    bias_mask: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.out_features % 3:
            raise ValueError(
                f"`out_features` must be a multiple of 3 (q, k, v), got {self.out_features}: give 3 * dim"
            )
        if self.bias is not None:
            self.register_buffer("bias_mask", torch.full_like(self.bias, torch.nan))
        else:
            self.bias_mask = None

    def reset_bias_mask(self) -> None:
        """1 for q and v, 0 for k."""
        if self.bias_mask is not None:
            third = self.out_features // 3
            with torch.no_grad():
                self.bias_mask.fill_(1.0)
                self.bias_mask[third : 2 * third].fill_(0.0)

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] → [..., 3D]."""
        bias = self.bias
        if self.bias_mask is not None:
            bias = bias * self.bias_mask.to(bias.dtype)  # type: ignore[assignment]
        return functional.linear(input, self.weight, bias)


class SelfAttention(nn.Module):
    """Self-attention of one token tensor or of a list of differently long ones.

    Args:
        dim: width; each head has dim / num_heads.
        attn_drop: taken for the common signature, without effect.
        proj_drop: dropout on the output of `forward` (not of `forward_list`, as upstream).
        mask_k_bias: hold the bias of the keys at zero.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"`dim` must be a multiple of num_heads, got {dim} and {num_heads}: change one of them"
            )
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        linear = LinearKMaskedBias if mask_k_bias else nn.Linear
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, device=device)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device)
        self.proj_drop = nn.Dropout(proj_drop)
        self.packed_kernel: Kernel | None = None  # one call for all tensors of a list (ours)

    def apply_rope(
        self, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Rotate the patch tokens of q and k; CLS and storage tokens before them stay.

        `q`, `k`: [B, heads, N, head width].  `rope`: sine and cosine, each [patches, head width];
        the arithmetic is in their dtype.
        """
        sin, cos = rope
        prefix = q.shape[-2] - sin.shape[-2]
        if prefix < 0:
            raise ValueError(
                f"Positions must not outnumber tokens, got {sin.shape[-2]} and {q.shape[-2]}: "
                "make them for the same grid"
            )

        def rotate(x: Tensor) -> Tensor:
            wide = x.to(sin.dtype)
            turned = rope_apply(wide[:, :, prefix:], sin, cos)
            return torch.cat([wide[:, :, :prefix], turned], dim=-2).to(x.dtype)

        return rotate(q), rotate(k)

    def compute_attention(
        self,
        qkv: Tensor,
        attn_bias: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, N, 3D] → [B, N, D]; no mask is known, `attn_bias` must be None."""
        if attn_bias is not None:
            raise ValueError("`attn_bias` must be None, got one: attention here is without mask")
        x = functional.scaled_dot_product_attention(*self._heads(qkv, rope))
        return x.transpose(1, 2).flatten(2)

    def _heads(
        self, qkv: Tensor, rope: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3D] → q, k and v, each [B, heads, N, head width], positions applied."""
        batch, num_tokens, triple = qkv.shape
        split = qkv.reshape(batch, num_tokens, 3, self.num_heads, triple // 3 // self.num_heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        return (q, k, v) if rope is None else (*self.apply_rope(q, k, rope), v)

    def forward(
        self, x: Tensor, attn_bias: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """[B, N, D] → [B, N, D]."""
        x = self.compute_attention(self.qkv(x), attn_bias=attn_bias, rope=rope)
        return self.proj_drop(self.proj(x))

    def forward_list(
        self,
        x_list: Sequence[Tensor],
        attn_bias: Tensor | None = None,
        rope_list: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    ) -> list[Tensor]:
        """[B_i, N_i, D] each → the same; the two linear layers run once over all tokens."""
        ropes = rope_list if rope_list is not None else [None] * len(x_list)
        rows, shapes, num_tokens = cat_keep_shapes(x_list)
        qkv_list = uncat_with_shapes(self.qkv(rows), shapes, num_tokens)
        if self.packed_kernel is not None and attn_bias is None:
            parts = [self._heads(*pair) for pair in zip(qkv_list, ropes, strict=True)]
            attended = packed_attention(parts, self.packed_kernel)
        else:
            attended = [
                self.compute_attention(qkv, attn_bias=attn_bias, rope=rope)
                for qkv, rope in zip(qkv_list, ropes, strict=True)
            ]
        rows, shapes, num_tokens = cat_keep_shapes(attended)
        return uncat_with_shapes(self.proj(rows), shapes, num_tokens)
