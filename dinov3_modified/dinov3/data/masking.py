"""Blocks of patches to mask (matches `dinov3.data.masking`; BEiT, Bao et al. 2022, algorithm 1).

The draws come from Python's and NumPy's global generators in upstream's order, so equal seeds give
equal masks.
"""

import math
import random

import numpy as np

_TRIES = 10


class MaskingGenerator:
    """Boolean masks with an exact number of true patches, mostly in rectangles.

    Args:
        input_size: grid (h, w), or a number for both.
        num_masking_patches: shown by `repr`, and the limit of a rectangle without `max_num_patches`.
        min_num_patches, max_num_patches: area of a rectangle.
        min_aspect, max_aspect: its height over its width; the latter is 1 / the former by default.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        num_masking_patches: int | None = None,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        if isinstance(input_size, int):
            input_size = (input_size, input_size)
        self.height, self.width = input_size
        self.num_patches = self.height * self.width
        self.num_masking_patches = num_masking_patches
        self.min_num_patches = min_num_patches
        cap = num_masking_patches if max_num_patches is None else max_num_patches
        self.max_num_patches = self.num_patches if cap is None else cap
        self.log_aspect_ratio = (math.log(min_aspect), math.log(max_aspect or 1 / min_aspect))

    def __repr__(self) -> str:
        low, high = self.log_aspect_ratio
        return (
            f"MaskingGenerator({self.height} x {self.width}, rectangles of {self.min_num_patches} to "
            f"{self.max_num_patches} patches, aspect exp({low:.3f}) to exp({high:.3f}))"
        )

    def get_shape(self) -> tuple[int, int]:
        return self.height, self.width

    def __call__(self, num_masking_patches: int = 0) -> np.ndarray:
        """A mask [h, w], booleans, with `num_masking_patches` true ones; ValueError for too many."""
        if num_masking_patches > self.num_patches:
            raise ValueError(
                f"Masked patches must be at most {self.num_patches}, got {num_masking_patches}: lower "
                "ibot.mask_ratio_min_max"
            )
        mask = np.zeros(self.get_shape(), dtype=bool)
        missing = num_masking_patches
        while missing > 0:
            added = self._add_rectangle(mask, min(missing, self.max_num_patches))
            if added == 0:
                break
            missing -= added
        return self.complete_mask_randomly(mask, num_masking_patches)

    def _add_rectangle(self, mask: np.ndarray, most: int) -> int:
        """Add one rectangle that brings 1 to `most` new patches; returns how many, 0 after 10 tries."""
        for _ in range(_TRIES):
            area = random.uniform(self.min_num_patches, most)
            aspect = math.exp(random.uniform(*self.log_aspect_ratio))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = random.randint(0, self.height - height)
            left = random.randint(0, self.width - width)
            window = mask[top : top + height, left : left + width]
            new = window.size - int(window.sum())
            if 0 < new <= most:
                window[:] = True
                return new
        return 0

    def complete_mask_randomly(self, mask: np.ndarray, num_masking_patches: int) -> np.ndarray:
        """Add single patches until the number is reached."""
        flat = mask.flatten()
        missing = num_masking_patches - int(flat.sum())
        flat[np.random.choice(np.flatnonzero(~flat), size=missing, replace=False)] = True
        return flat.reshape(mask.shape)
