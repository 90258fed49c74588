"""Axial rotary position embedding on normalised coordinates (RoFormer, Su et al. 2021; DINOv3 3.2).

Coordinates run from −1 to 1 over the image whatever its size, so a network meets the same angles
at another resolution or patch size.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dinov3.cells.checks import one_of

_KEPT_GRIDS = 16


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class RopePositionEmbedding(nn.Module):
    """Sine and cosine of the angles of every patch.

    Args:
        embed_dim, num_heads: their ratio, the width of a head, must divide by 4.
        base: ratio of the slowest to the fastest frequency, or give
        min_period, max_period: geometric periods between the two.
        normalize_coords: divide rows and columns each by its own length ("separate"), or both by
            the longer ("max") or the shorter ("min").
        shift_coords: in training, add U(−s, s) to each axis.
        jitter_coords: in training, multiply each axis by exp(U(−ln j, ln j)).
        rescale_coords: in training, multiply both axes by one exp(U(−ln r, ln r)).
        dtype: of the periods and of all arithmetic.
    """

    periods: Tensor

    def __init__(
        self,
        embed_dim: int,
        *,
        num_heads: int,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: Literal["min", "max", "separate"] = "separate",
        shift_coords: float | None = None,
        jitter_coords: float | None = None,
        rescale_coords: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"`embed_dim` must be a multiple of 4 * num_heads, got {embed_dim} and {num_heads}: "
                "change one of them"
            )
        has_range = min_period is not None and max_period is not None
        if (base is None) != has_range or (min_period is None) != (max_period is None):
            raise ValueError(
                "Either base or both min_period and max_period must be given, got base "
                f"{base}, min_period {min_period}, max_period {max_period}: drop one kind"
            )
        one_of("normalize_coords", normalize_coords, ("min", "max", "separate"))
        self.base = base
        self.min_period = min_period
        self.max_period = max_period
        self.D_head = embed_dim // num_heads
        self.normalize_coords = normalize_coords
        self.shift_coords = shift_coords
        self.jitter_coords = jitter_coords
        self.rescale_coords = rescale_coords
        self.dtype = dtype
        self.register_buffer(
            "periods", torch.empty(self.D_head // 4, device=device, dtype=dtype), persistent=True
        )
        # Grid → tables, of the periods as they are; not for augmented coordinates.
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._tables_of: tuple[Tensor, int] | None = None  # periods and their version
        self._init_weights()

    def _init_weights(self) -> None:
        """Periods from the constructor's arguments, computed in their own dtype."""
        count = self.D_head // 4
        device, dtype = self._arithmetic()
        if self.base is not None:
            exponent = 2 * torch.arange(count, device=device, dtype=dtype) / (self.D_head // 2)
            periods = self.base**exponent
        else:
            assert self.min_period is not None
            assert self.max_period is not None
            ratio = self.max_period / self.min_period
            exponent = torch.linspace(0, 1, count, device=device, dtype=dtype)
            periods = ratio**exponent / ratio * self.max_period
        with torch.no_grad():
            self.periods.copy_(periods)

    def _arithmetic(self) -> tuple[torch.device, torch.dtype]:
        # A model cast as a whole (`.bfloat16()`) takes its periods along but must not compute
        # coordinates in 8 bits: the type asked for at construction stays.
        return self.periods.device, self.dtype or self.periods.dtype

    @property
    def is_random(self) -> bool:
        """Whether a call draws random numbers: in training, with any of the three augmentations."""
        augmented = (self.shift_coords, self.jitter_coords, self.rescale_coords)
        return self.training and any(value is not None for value in augmented)

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Sine and cosine, each [H * W, head width], patches in row-major order.

        Those of a grid are kept until the periods change.
        """
        # What a compiler traces, and tensors without a version, must not be kept.
        plain = type(self.periods) is Tensor and not (
            self.periods.is_meta or self.periods.is_inference()
        )
        if self.is_random or not plain or torch.is_inference_mode_enabled() or _is_traced():
            return self._make_tables(H, W)
        if (
            self._tables_of is None
            or self._tables_of[0] is not self.periods
            or self._tables_of[1] != self.periods._version
        ):
            self._tables.clear()
            self._tables_of = self.periods, self.periods._version
        if (H, W) not in self._tables:
            if len(self._tables) >= _KEPT_GRIDS:
                self._tables.clear()
            self._tables[H, W] = self._make_tables(H, W)
        return self._tables[H, W]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}, "_tables_of": None}

    def _make_tables(self, H: int, W: int) -> tuple[Tensor, Tensor]:
        device, dtype = self._arithmetic()
        row_span, column_span = {
            "separate": (H, W),
            "max": (max(H, W),) * 2,
            "min": (min(H, W),) * 2,
        }[self.normalize_coords]
        rows = (torch.arange(H, device=device, dtype=dtype) + 0.5) / row_span  # [H]
        columns = (torch.arange(W, device=device, dtype=dtype) + 0.5) / column_span  # [W]
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # [H, W, 2]
        coords = 2.0 * grid.flatten(0, 1) - 1.0  # [HW, 2]
        if self.training:
            coords = self._augment(coords)
        angles = 2 * math.pi * coords[:, :, None] / self.periods  # [HW, 2, head width / 4]
        angles = angles.flatten(1).tile(2)  # [HW, head width]
        return angles.sin(), angles.cos()

    def _augment(self, coords: Tensor) -> Tensor:
        def draw(bound: float, size: int) -> Tensor:
            return torch.empty(size, device=coords.device, dtype=coords.dtype).uniform_(
                -bound, bound
            )

        if self.shift_coords is not None:
            coords = coords + draw(self.shift_coords, 2)
        if self.jitter_coords is not None:
            coords = coords * draw(math.log(self.jitter_coords), 2).exp()
        if self.rescale_coords is not None:
            coords = coords * draw(math.log(self.rescale_coords), 1).exp()
        return coords
