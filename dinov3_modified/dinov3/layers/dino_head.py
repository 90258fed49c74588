"""Projection head of DINO and iBOT (Caron et al. 2021, section 3.1)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class DINOHead(nn.Module):
    """MLP to a bottleneck, L2 normalisation, then one logit a prototype.

    Args:
        in_dim, out_dim: width of the features, number of prototypes.
        use_bn: batch normalisation after each hidden linear layer.
        nlayers: linear layers of the MLP, at least 1.
        hidden_dim, bottleneck_dim: widths.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        nlayers = max(nlayers, 1)
        widths = [in_dim, *([hidden_dim] * (nlayers - 1)), bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(nlayers):
            layers.append(nn.Linear(widths[index], widths[index + 1], bias=mlp_bias))
            if index < nlayers - 1:
                if use_bn:
                    layers.append(nn.BatchNorm1d(hidden_dim))
                layers.append(nn.GELU())
        # One layer stands alone, so that its keys are mlp.weight and mlp.bias.
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        self.unit_prototypes = False  # whether logits are cosines: prototypes of length 1 (ours)

    def init_weights(self) -> None:
        """Truncated normal weights of standard deviation 0.02, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        no_last_layer: bool = False,
        only_last_layer: bool = False,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[..., in_dim] → [..., out_dim].

        Args:
            no_last_layer: stop at the normalised bottleneck.
            only_last_layer: `x` is such a bottleneck already.
            loss: called with the bottleneck and the prototypes [out_dim, bottleneck_dim]; its value
                is returned in place of the logits, which then need not exist.
        """
        if not only_last_layer:
            x = self.mlp(x)
            eps = 1e-6 if x.dtype == torch.float16 else 1e-12
            x = functional.normalize(x, dim=-1, p=2, eps=eps)
        if no_last_layer and loss is None:
            return x
        if not self.unit_prototypes:
            return self.last_layer(x) if loss is None else loss(x, self.last_layer.weight)
        prototypes = functional.normalize(self.last_layer.weight, dim=-1)
        return functional.linear(x, prototypes) if loss is None else loss(x, prototypes)
