"""A pre-norm transformer block with LayerScale and stochastic depth by sub-batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dinov3.layers.attention import SelfAttention
from dinov3.layers.ffn_layers import Mlp
from dinov3.layers.layer_scale import LayerScale
from dinov3.utils.utils import cat_keep_shapes, uncat_with_shapes

Rope = tuple[Tensor, Tensor]


class SelfAttentionBlock(nn.Module):
    """x + ls1(attention(norm1(x))), then x + ls2(ffn(norm2(x))).

    Stochastic depth (Huang et al. 2016) in training leaves out whole samples of a residual branch:
    only a random sub-batch goes through it, which saves its cost, and the branch is scaled up by
    batch / kept (DINOv2, Oquab et al. 2023, section 5).

    Args:
        ffn_ratio: hidden width of the feed-forward layer over dim.
        drop: dropout of the feed-forward layer and of the attention's output.
        init_values: start of LayerScale; None or 0 leaves LayerScale out.
        drop_path: share of samples that skip a branch.  As upstream, the number kept is rounded down,
            and one at least: of a batch of 2 any share up to a half leaves out one, of 1 none.
        attn_class, ffn_layer, norm_layer, act_layer: what the parts are made of.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        attn_class: Callable[..., nn.Module] = SelfAttention,
        ffn_layer: Callable[..., nn.Module] = Mlp,
        mask_k_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            mask_k_bias=mask_k_bias,
            device=device,
        )
        self.ls1 = LayerScale(dim, init_values, device=device) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(
            in_features=dim,
            hidden_features=int(dim * ffn_ratio),
            act_layer=act_layer,
            drop=drop,
            bias=ffn_bias,
            device=device,
        )
        self.ls2 = LayerScale(dim, init_values, device=device) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(
        self,
        x_or_x_list: Tensor | Sequence[Tensor],
        rope_or_rope_list: Rope | Sequence[Rope | None] | None = None,
    ) -> Tensor | list[Tensor]:
        """[B, N, D] with its positions, or a list of both; returns what it was given."""
        if isinstance(x_or_x_list, Tensor):
            return self._forward_list([x_or_x_list], [rope_or_rope_list])[0]  # type: ignore[list-item]
        ropes = rope_or_rope_list
        if ropes is None:
            ropes = [None] * len(x_or_x_list)
        return self._forward_list(x_or_x_list, ropes)  # type: ignore[arg-type]

    def _forward_list(
        self, x_list: Sequence[Tensor], rope_list: Sequence[Rope | None]
    ) -> list[Tensor]:
        def attend(normed: list[Tensor]) -> list[Tensor]:
            return self.attn.forward_list(normed, rope_list=rope_list)  # type: ignore[operator]

        if self.training and self.sample_drop_ratio > 0.0:
            x_list = self._add_for_some(x_list, self.norm1, attend, self.ls1)
            return self._add_for_some(x_list, self.norm2, self.mlp.forward_list, self.ls2)  # type: ignore[arg-type]
        out = []
        for x, rope in zip(x_list, rope_list, strict=True):
            x = x + self.ls1(self.attn(self.norm1(x), rope=rope))
            out.append(x + self.ls2(self.mlp(self.norm2(x))))
        return out

    def _add_for_some(
        self,
        x_list: Sequence[Tensor],
        norm: nn.Module,
        branch: Callable[[list[Tensor]], list[Tensor]],
        scale: nn.Module,
    ) -> list[Tensor]:
        """Add a residual branch to a random part of each tensor's samples."""
        chosen = [self._choose(x) for x in x_list]
        residuals = branch([norm(x[index]) for x, index in zip(x_list, chosen, strict=True)])
        out = []
        for x, index, residual in zip(x_list, chosen, residuals, strict=True):
            weight = x.shape[0] / index.shape[0]
            # Under autocast the branch comes back narrower than the stream it is added to.
            addend = scale(residual).to(x.dtype)
            out.append(torch.index_add(x, 0, index, addend, alpha=weight))
        return out

    def _choose(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        kept = max(int(batch * (1 - self.sample_drop_ratio)), 1)
        return torch.randperm(batch, device=x.device)[:kept]
