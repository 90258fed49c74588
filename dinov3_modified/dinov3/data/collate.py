"""Samples → batch, with masks (matches `dinov3.data.collate`)."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def collate_data_and_cast(
    samples_list: Sequence[tuple[dict[str, Any], Any]],
    mask_ratio_tuple: tuple[float, float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[[int], np.ndarray] | None = None,
    random_circular_shift: bool = False,
    local_batch_size: int | None = None,
) -> dict[str, Any]:
    """Stack the crops of all samples, crop by crop, and draw their masks.

    Args:
        samples_list: (crops, target) of each sample; crops have `global_crops`, `local_crops` and
            perhaps `gram_teacher_crops`, lists of [C, H, W].
        mask_ratio_tuple: smallest and largest share of masked patches; image i of those that are
            masked gets the i-th of equally spaced shares.
        mask_probability: share of global crops that are masked.
        dtype: of the crops in the batch.
        n_tokens: patches N of a global crop.
        mask_generator: number of patches → mask [h, w].
        random_circular_shift: roll each mask around the grid.
        local_batch_size: samples that masks are drawn for, if not those of the list.

    Returns `collated_global_crops` [G·B, C, H, W], `collated_local_crops` [L·B, C, h, w],
    `collated_masks` [G·B, N], `mask_indices_list` [M], `masks_weight` [M] (one over the masked
    patches of the image), `upperbound`, `n_masked_patches` [1], perhaps
    `collated_gram_teacher_crops`.
    """
    if n_tokens is None or mask_generator is None:
        raise ValueError(
            f"`n_tokens` and mask_generator must be given, got {n_tokens} and {mask_generator}: give both of them"
        )
    crops = [sample[0] for sample in samples_list]

    def stacked(name: str) -> Tensor:
        count = len(crops[0][name])
        return torch.stack([c[name][index] for index in range(count) for c in crops]).to(dtype)

    out: dict[str, Any] = {
        "collated_global_crops": stacked("global_crops"),
        "collated_local_crops": stacked("local_crops"),
    }
    n_global = len(crops[0]["global_crops"])
    images = n_global * (len(crops) if local_batch_size is None else local_batch_size)
    n_masked = int(images * mask_probability)
    shares = torch.linspace(*mask_ratio_tuple, n_masked + 1)
    masks = []
    upperbound = 0
    for share in shares[1:]:
        count = int(n_tokens * share)
        mask = torch.from_numpy(mask_generator(count))
        if random_circular_shift:
            down = random.randint(0, mask.shape[0] - 1)
            right = random.randint(0, mask.shape[1] - 1)
            mask = mask.roll((down, right), (0, 1))
        masks.append(mask)
        upperbound += count
    masks += [torch.from_numpy(mask_generator(0)) for _ in range(images - n_masked)]
    random.shuffle(masks)
    collated = torch.stack(masks).flatten(1)  # [G·B, N]
    out |= _facts_of_masks(collated) | {"upperbound": upperbound}
    if "gram_teacher_crops" in crops[0]:
        out["collated_gram_teacher_crops"] = stacked("gram_teacher_crops")
    return out


def _facts_of_masks(masks: Tensor) -> dict[str, Tensor]:
    """The masks [G·B, N] and what the losses need of them."""
    indices = masks.flatten().nonzero().flatten()
    per_image = 1 / masks.sum(-1).clamp(min=1.0)
    return {
        "collated_masks": masks,
        "mask_indices_list": indices,
        "masks_weight": per_image[:, None].expand_as(masks)[masks],
        "n_masked_patches": torch.full((1,), indices.shape[0], dtype=torch.long),
    }


def get_batch_subset(collated_data_batch: dict[str, Any], divide_by: int) -> dict[str, Any]:
    """The first of `divide_by` equal parts of a batch's samples (two global crops each), rounded up."""
    samples = collated_data_batch["collated_global_crops"].shape[0] // 2

    def part(value: Tensor, count: int) -> Tensor:
        kept = -(-count // divide_by)
        return value.unflatten(0, (-1, count))[:, :kept].flatten(0, 1)

    all_masks = collated_data_batch["collated_masks"]
    masked_samples = all_masks.shape[0] // 2  # not `samples` if local_batch_size was given
    masks = part(all_masks, masked_samples)
    while not masks.any() and all_masks.any():
        # The heads must see a masked patch: distribute the masks again.
        rows = list(all_masks)
        random.shuffle(rows)
        masks = part(torch.stack(rows), masked_samples)
    crops = {n: value for n, value in collated_data_batch.items() if n.endswith("_crops")}
    subset = collated_data_batch | {name: part(value, samples) for name, value in crops.items()}
    subset |= _facts_of_masks(masks)
    if "global_batch_size" in collated_data_batch:
        subset["global_batch_size"] = collated_data_batch["global_batch_size"] // divide_by
    return subset
