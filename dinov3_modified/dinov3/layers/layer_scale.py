"""A learned factor per channel on a residual branch (CaiT, Touvron et al. 2021, eq. 4)."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x · gamma.

    `dim`: channels; `init_values`: start value of every factor; `inplace`: write into the input.
    """

    def __init__(
        self,
        dim: int,
        init_values: float | Tensor = 1e-5,
        inplace: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.inplace = inplace
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.gamma.copy_(torch.as_tensor(self.init_values).expand_as(self.gamma))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return x.mul_(self.gamma) if self.inplace else x * self.gamma
