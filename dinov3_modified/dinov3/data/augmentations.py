"""Crops of one RGB image for student and teacher (matches `dinov3.data.augmentations`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.nn import functional

from dinov3.data.transforms import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ColorJitter,
    Compose,
    GaussianBlur,
    InterpolationMode,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomSolarize,
    make_base_transform,
    make_normalize_transform,
    to_pil,
)

# The keys of `crops` that are arguments of the same name.
_KEYS = (
    "global_crops_scale", "local_crops_scale", "local_crops_number", "global_crops_size",
    "local_crops_size", "gram_teacher_crops_size", "gram_teacher_no_distortions",
    "share_color_jitter", "horizontal_flips",
)  # fmt: skip


@dataclass(eq=False)
class DataAugmentationDINO:
    """Two global and some local crops, with upstream's distortions.

    Colour jitter 0.8 and grayscale 0.2 everywhere; blur at rates 0 (global 1), 0.9 (global 2) and 0.5
    (local), see `GaussianBlur`; solarisation 0.2 (global 2).

    With `local_crops_subset_of_global_crops`, local crops are cut from distorted global ones, at
    multiples of `patch_size`.  A size, number or scale out of range raises ValueError.
    """

    global_crops_scale: Sequence[float]  # area of a crop over the image's
    local_crops_scale: Sequence[float]
    local_crops_number: int
    global_crops_size: int = 224  # edge in pixels
    local_crops_size: int = 96
    gram_teacher_crops_size: int | None = None  # also global crops of this size, for a Gram teacher
    gram_teacher_no_distortions: bool = False  # those before, not after, the distortions
    teacher_no_color_jitter: bool = False  # the teacher's global crops without distortions
    local_crops_subset_of_global_crops: bool = False
    patch_size: int = 16
    share_color_jitter: bool = False  # distort the colours once for all crops
    horizontal_flips: bool = True  # mirror each crop with probability 0.5
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        sizes = ("global_crops_size", "local_crops_size", "local_crops_number", "patch_size")
        counts = {name: getattr(self, name) for name in sizes}
        counts["gram_teacher_crops_size"] = self.gram_teacher_crops_size or 1
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1, got {count}: change this number")
        for low, high in (self.global_crops_scale, self.local_crops_scale):
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"A crop scale must be 0 < low <= high <= 1, got {low} and {high}: change crops.*_scale"
                )
        small, large = self.local_crops_size, self.global_crops_size
        if self.local_crops_subset_of_global_crops and small > large:
            raise ValueError(
                f"Local crops cut from global ones must not be larger, got {small} and {large}: change "
                "crops.local_crops_size"
            )
        flips = [RandomHorizontalFlip(0.5)] if self.horizontal_flips else []
        # Global crops are made at the larger of the two sizes that are wanted of them.
        large = max(large, self.gram_teacher_crops_size or 0)
        self.geometric_global, self.geometric_local = (
            Compose([RandomResizedCrop(size, tuple(scale)), *flips])
            for size, scale in ((large, self.global_crops_scale), (small, self.local_crops_scale))
        )
        self.color = Compose([ColorJitter(p=0.8), RandomGrayscale(0.2)])
        own_color = [] if self.share_color_jitter else [self.color]
        self.distort = (
            Compose([*own_color, GaussianBlur(p=1.0)]),
            Compose([*own_color, GaussianBlur(p=0.1), RandomSolarize(128, 0.2)]),
        )
        self.distort_local = Compose([*own_color, GaussianBlur(p=0.5)])
        self.normalize = make_base_transform(self.mean, self.std)

    @classmethod
    def from_config(cls, cfg: Any) -> Self:
        """As the section `crops` of a configuration says."""
        crops = cfg.crops
        return cls(
            **{name: crops[name] for name in _KEYS},
            local_crops_subset_of_global_crops=crops.localcrops_subset_of_globalcrops,
            patch_size=cfg.student.patch_size,
            mean=crops.rgb_mean,
            std=crops.rgb_std,
        )

    def __call__(self, image: Any) -> dict[str, Any]:
        """PIL image, uint8 array (H, W, 3) or tensor (3, H, W) → crops, float32 [3, s, s].

        Returns:
            `weak_flag`, `global_crops` (2), `global_crops_teacher` (2), `local_crops`, `offsets`
            (of local crops in their global ones, () otherwise), perhaps `gram_teacher_crops` (2).
        """
        image = to_pil(image)
        if self.share_color_jitter:
            image = self.color(image)
        bases = [self.geometric_global(image) for _ in range(2)]
        size = (self.global_crops_size,) * 2
        sized = [base.resize(size, InterpolationMode.BICUBIC.filter) for base in bases]
        gram_size = self.gram_teacher_crops_size
        # Undistorted Gram crops keep their full size while the others are distorted at their own.
        keep_large = gram_size is not None and not self.gram_teacher_no_distortions
        distorted = [
            self.normalize(distort(base))
            for distort, base in zip(self.distort, bases if keep_large else sized, strict=True)
        ]
        crops = [_resized_tensor(crop, self.global_crops_size) for crop in distorted]
        output: dict[str, Any] = {"weak_flag": True, "global_crops": crops}
        plain = self.teacher_no_color_jitter
        output["global_crops_teacher"] = [self.normalize(b) for b in sized] if plain else crops
        if gram_size is not None:
            source = distorted if keep_large else [self.normalize(base) for base in bases]
            output["gram_teacher_crops"] = [_resized_tensor(crop, gram_size) for crop in source]
        if self.local_crops_subset_of_global_crops:
            output["local_crops"], output["offsets"] = self._cut_from_globals(sized)
        else:
            output["local_crops"] = [
                self.normalize(self.distort_local(self.geometric_local(image)))
                for _ in range(self.local_crops_number)
            ]
            output["offsets"] = ()
        return output

    def _cut_from_globals(self, sized: list[Any]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Half of the local crops from each global crop, with new distortions."""
        size, patch = self.local_crops_size, self.patch_size
        room = (self.global_crops_size - size) // patch
        half = self.local_crops_number // 2
        crops, offsets = [], []
        for index in range(self.local_crops_number):
            whole = self.normalize(self.distort_local(sized[0 if index < half else 1]))
            row, column = (int(v) for v in np.random.randint(0, max(room, 1), 2) * patch)
            crops.append(whole[:, row : row + size, column : column + size].contiguous())
            offsets.append((row, column))
        return crops, offsets


def _resized_tensor(crop: Tensor, size: int) -> Tensor:
    """[3, s, s] → [3, size, size], bicubic; looks at all pixels when shrinking."""
    if crop.shape[-1] == size:
        return crop
    return functional.interpolate(
        crop[None], size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )[0]
