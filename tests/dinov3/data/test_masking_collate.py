"""Masks and batches: laws, and values worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from dinov3.data import MaskingGenerator, collate_data_and_cast, get_batch_subset
from dinov3.data.loaders import seeded


@pytest.fixture(autouse=True)
def _seeds():
    with seeded("test"):
        yield


@pytest.mark.parametrize("patches", [0, 1, 5, 60, 143, 144])
def test_a_mask_has_exactly_so_many_patches(patches):
    mask = MaskingGenerator((12, 12), max_num_patches=72)(patches)
    assert mask.shape == (12, 12)
    assert mask.dtype == bool
    assert mask.sum() == patches


def test_masks_are_blocks():
    """A masked patch's right neighbour is masked far more often than by chance."""
    make = MaskingGenerator(16, max_num_patches=128)
    masks = np.stack([make(64) for _ in range(60)])
    right = masks[:, :, 1:][masks[:, :, :-1]].mean()
    assert right > 0.6  # by chance 0.25


def test_smallest_and_largest_rectangle_act():
    def corners(**options) -> float:
        """Changes along the rows: few for large rectangles."""
        make = MaskingGenerator(16, **options)
        return float(np.mean([np.abs(np.diff(make(64).astype(int))).sum() for _ in range(40)]))

    assert corners(max_num_patches=4, min_num_patches=1) > 1.5 * corners(max_num_patches=64)
    assert corners(max_num_patches=64, min_num_patches=48) < corners(max_num_patches=64)


def test_aspect_acts():
    def rows_over_columns(**options) -> float:
        make = MaskingGenerator(32, max_num_patches=60, min_num_patches=40, **options)
        masks = [make(50) for _ in range(60)]
        return float(np.mean([m.any(1).sum() / m.any(0).sum() for m in masks]))

    assert rows_over_columns(min_aspect=3.0, max_aspect=4.0) > 1.5
    assert rows_over_columns(min_aspect=0.25, max_aspect=0.3) < 0.7


def test_repr_needs_no_number_of_patches():
    assert repr(MaskingGenerator(14, max_num_patches=98)) == (
        "MaskingGenerator(14 x 14, rectangles of 4 to 98 patches, aspect exp(-1.204) to exp(1.204))"
    )
    assert "4 to 20" in repr(MaskingGenerator((14, 7), num_masking_patches=20))
    assert MaskingGenerator((14, 7)).get_shape() == (14, 7)


def test_too_many_patches():
    with pytest.raises(ValueError, match=r"at most 36, got 37: lower ibot.mask_ratio_min_max"):
        MaskingGenerator(6)(37)


def crops(number: int, *, gram: bool = False) -> dict[str, list[torch.Tensor]]:
    """Constant crops: 10 times the sample plus the crop."""
    made = {
        "global_crops": [torch.full((3, 8, 8), 10.0 * number + i) for i in range(2)],
        "local_crops": [torch.full((3, 4, 4), 10.0 * number + i) for i in range(3)],
    }
    if gram:
        made["gram_teacher_crops"] = [torch.full((3, 16, 16), 10.0 * number + i) for i in range(2)]
    return made


def collated(count: int = 4, *, gram: bool = False, **changes):
    options = {
        "mask_ratio_tuple": (0.1, 0.5),
        "mask_probability": 0.5,
        "dtype": torch.float32,
        "n_tokens": 16,
        "mask_generator": MaskingGenerator(4, max_num_patches=8),
    }
    samples = [(crops(number, gram=gram), ()) for number in range(count)]
    return collate_data_and_cast(samples, **(options | changes))


def test_order_is_crop_by_crop():
    batch = collated(3, gram=True)
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21]
    assert batch["collated_gram_teacher_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21]
    local = batch["collated_local_crops"][:, 0, 0, 0].tolist()
    assert local == [0, 10, 20, 1, 11, 21, 2, 12, 22]
    assert "collated_gram_teacher_crops" not in collated(3)


def test_masked_images_have_equally_spaced_shares():
    batch = collated()
    # 8 crops, 4 masked: 16 patches times 0.2, 0.3, 0.4, 0.5, cut to whole ones.
    counts = batch["collated_masks"].sum(-1)
    assert sorted(counts.tolist()) == [0, 0, 0, 0, 3, 4, 6, 8]
    assert batch["upperbound"] == 21
    assert batch["n_masked_patches"].tolist() == [21]
    assert batch["n_masked_patches"].dtype == torch.long
    indices = batch["mask_indices_list"]
    assert torch.equal(indices, batch["collated_masks"].flatten().nonzero().flatten())
    expected = [1 / int(counts[i // 16]) for i in indices]
    torch.testing.assert_close(batch["masks_weight"], torch.tensor(expected))
    assert math.isclose(float(batch["masks_weight"].sum()), 4, rel_tol=1e-6)


def test_every_option_of_the_batch_acts():
    assert collated(mask_probability=0.25)["collated_masks"].any(-1).sum() == 2
    assert collated(mask_probability=0.0)["n_masked_patches"].tolist() == [0]
    assert collated(mask_ratio_tuple=(0.5, 0.5))["n_masked_patches"].tolist() == [32]
    assert collated(dtype=torch.bfloat16)["collated_local_crops"].dtype == torch.bfloat16
    assert collated(local_batch_size=2)["collated_masks"].shape == (4, 16)
    assert collated(n_tokens=8)["upperbound"] == 10  # 1 + 2 + 3 + 4


def test_circular_shift_rolls_a_mask():
    corner = np.zeros((4, 4), dtype=bool)
    corner[0, 0] = True

    def one(count: int) -> np.ndarray:
        return corner.copy() if count else np.zeros_like(corner)

    still = collated(20, mask_generator=one)["collated_masks"]
    assert set(still.nonzero()[:, 1].tolist()) == {0}
    rolled = collated(20, mask_generator=one, random_circular_shift=True)["collated_masks"]
    assert rolled.sum() == still.sum() == 20
    assert len(set(rolled.nonzero()[:, 1].tolist())) > 5


def test_masks_are_dealt_by_chance():
    first = sum(bool(collated()["collated_masks"][0].any()) for _ in range(200))
    assert 70 < first < 130


def test_equal_seeds_equal_batches():
    with seeded(1):
        one = collated()
    with seeded(1):
        two = collated()
    with seeded(2):
        other = collated()
    assert torch.equal(one["collated_masks"], two["collated_masks"])
    assert not torch.equal(one["collated_masks"], other["collated_masks"])


def test_n_tokens_must_be_given():
    with pytest.raises(
        ValueError, match="`n_tokens` and mask_generator must be given, got None and"
    ):
        collated(n_tokens=None)


def test_subset_keeps_the_first_samples():
    batch = collated(5, gram=True, mask_probability=1.0)
    part = get_batch_subset(batch | {"global_batch_size": 30, "note": "kept"}, 2)
    assert part["collated_global_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21]
    assert part["collated_gram_teacher_crops"][:, 0, 0, 0].tolist() == [0, 10, 20, 1, 11, 21]
    assert part["collated_local_crops"].shape == (9, 3, 4, 4)
    rows = batch["collated_masks"].view(2, 5, 16)[:, :3].reshape(6, 16)
    assert torch.equal(part["collated_masks"], rows)
    assert part["n_masked_patches"].tolist() == [int(rows.sum())]
    assert torch.equal(part["mask_indices_list"], rows.flatten().nonzero().flatten())
    assert len(part["masks_weight"]) == int(rows.sum())
    assert part["global_batch_size"] == 15
    assert part["note"] == "kept"


def test_a_subset_without_masked_patches_draws_new_masks():
    batch = collated(4)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    masks[3, 5] = True
    part = get_batch_subset(batch | {"collated_masks": masks}, 4)
    assert part["n_masked_patches"].tolist() == [1]
    none = get_batch_subset(batch | {"collated_masks": torch.zeros_like(masks)}, 4)
    assert none["n_masked_patches"].tolist() == [0]


def test_subset_of_a_batch_with_masks_for_fewer_samples():
    part = get_batch_subset(collated(4, local_batch_size=2, mask_probability=1.0), 2)
    assert part["collated_global_crops"].shape[0] == 4
    assert part["collated_masks"].shape == (2, 16)


def test_masking_uses_the_global_generators_only():
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002 - the generator under test
    one = MaskingGenerator(12, max_num_patches=72)(50)
    torch.rand(5)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    assert (MaskingGenerator(12, max_num_patches=72)(50) == one).all()
