"""Feed-forward layers of a block, on one tensor or on a list of differently long ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov3.utils.utils import cat_keep_shapes, uncat_with_shapes


class ListForwardMixin:
    """`forward_list`: run a list of token tensors through `forward` as one matrix."""

    forward: Callable[..., Tensor]

    def forward_list(self, x_list: Sequence[Tensor]) -> list[Tensor]:
        """[B_i, N_i, D] each → [B_i, N_i, D'] each; one matrix product for all."""
        rows, shapes, num_tokens = cat_keep_shapes(x_list)
        return uncat_with_shapes(self.forward(rows), shapes, num_tokens)


class Mlp(ListForwardMixin, nn.Module):
    """Linear, activation, linear (Vaswani et al. 2017, eq. 2).

    `in_features`, `hidden_features`, `out_features`: widths; the latter two default to the first.
    `drop`: dropout after both linear layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D']."""
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class SwiGLUFFN(ListForwardMixin, nn.Module):
    """w3(SiLU(w1 x) ⊙ w2 x) (Shazeer 2020, eq. 6), a third narrower to keep the parameter count.

    Args:
        hidden_features: width before the reduction to two thirds.
        act_layer, drop: taken for the common signature, without effect.
        align_to: the hidden width is rounded up to a multiple of this.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] | None = None,
        drop: float = 0.0,
        bias: bool = True,
        align_to: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        narrowed = int((hidden_features or in_features) * 2 / 3)
        hidden = -(-narrowed // align_to) * align_to
        self.w1 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w2 = nn.Linear(in_features, hidden, bias=bias, device=device)
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D']."""
        return self.w3(functional.silu(self.w1(x)) * self.w2(x))
