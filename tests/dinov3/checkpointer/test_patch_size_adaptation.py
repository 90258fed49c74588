"""Patch embeddings for another patch size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from dinov3.checkpointer.patch_size_adaptation import (
    METHODS,
    adapt_patch_embedding,
    adapt_state_dict,
    patch_size_of,
)
from dinov3.models.vision_transformer import DinoVisionTransformer


def kernel(size: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(5, 3, size, size))).float()


def vit(patch_size: int, **options) -> DinoVisionTransformer:
    options = {"layerscale_init": 0.5, "n_storage_tokens": 2, "mask_k_bias": True, **options}
    model = DinoVisionTransformer(
        patch_size=patch_size, embed_dim=48, depth=3, num_heads=3, **options
    )
    torch.manual_seed(1)
    model.init_weights()
    with torch.no_grad():  # start values hide terms behind zeros
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def test_by_hand():
    weight = torch.arange(16.0).reshape(1, 1, 4, 4)
    expected = [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]
    assert adapt_patch_embedding(weight, 2)[0, 0].tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (64, 8)])
@pytest.mark.parametrize(("rope", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_small_patches_equal_large_ones_on_the_enlarged_image(height, width, rope, tolerance):
    """The whole network: patch 8 on x is patch 16 on x with every pixel repeated.

    With bf16 positions the last bit of a sum decides how q and k are rounded to 8 bits.
    """
    large = vit(16, pos_embed_rope_dtype=rope)
    small = vit(8, pos_embed_rope_dtype=rope)
    state, done = adapt_state_dict(large.state_dict(), 8)
    small.load_state_dict(state)
    assert str(done) == "patch size 16 → 8 (nearest)"
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    enlarged = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with torch.no_grad():
        ours = small(x, is_training=True)["x_prenorm"]
        theirs = large(enlarged, is_training=True)["x_prenorm"]
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_adjoint_of_enlargement(method):
    """<small kernel, patch> = <large kernel, enlarged patch>, the patch enlarged on its own."""
    weight = kernel(16)
    patches = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 3, 8, 8))).float()
    options = {} if method == "nearest" else {"align_corners": False}
    enlarged = functional.interpolate(patches, scale_factor=2, mode=method, **options)
    expected = functional.conv2d(enlarged, weight)
    result = functional.conv2d(patches, adapt_patch_embedding(weight, 8, method))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_pseudo_inverse_of_halving_is_the_block_sum():
    weight = kernel(16)
    pseudo = adapt_patch_embedding(weight, 8, "pseudo_inverse")
    torch.testing.assert_close(pseudo, adapt_patch_embedding(weight, 8), rtol=1e-4, atol=1e-5)


def test_pseudo_inverse_reproduces_products_when_enlarging():
    """A larger kernel on the resized patch gives the old product (FlexiViT, section 3.4)."""
    weight = kernel(8)
    patches = torch.from_numpy(np.random.default_rng(1).normal(size=(7, 3, 8, 8))).float()
    enlarged = functional.interpolate(patches, size=(16, 16), mode="bilinear", align_corners=False)
    result = functional.conv2d(enlarged, adapt_patch_embedding(weight, 16, "pseudo_inverse"))
    torch.testing.assert_close(result, functional.conv2d(patches, weight), rtol=1e-3, atol=1e-3)


def test_steps_compose():
    weight = kernel(32)
    twice = adapt_patch_embedding(adapt_patch_embedding(weight, 16), 8)
    torch.testing.assert_close(twice, adapt_patch_embedding(weight, 8), rtol=1e-5, atol=1e-5)


def test_constant_images_keep_their_response():
    """All methods but the plain bicubic answer a uniform patch as before; that one roughly does."""
    weight = kernel(16).abs()
    expected = weight.sum(dim=(1, 2, 3))
    for method in METHODS:
        result = adapt_patch_embedding(weight, 8, method).sum(dim=(1, 2, 3))
        torch.testing.assert_close(
            result, expected, rtol=0.15 if method == "bicubic" else 1e-4, atol=0
        )


def test_methods_differ_and_other_ratios_work():
    weight = kernel(16)
    results = [adapt_patch_embedding(weight, 8, m) for m in ("nearest", "bilinear", "bicubic")]
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(results))
    state = {"patch_embed.proj.weight": weight, "other": torch.ones(2)}
    adapted, done = adapt_state_dict(state, 14)
    assert done is not None
    assert done.method == "pseudo_inverse", "16 / 14 is no whole number"
    assert adapted["patch_embed.proj.weight"].shape == (5, 3, 14, 14)
    assert adapted["other"] is state["other"]
    assert patch_size_of(adapted) == 14
    assert adapt_state_dict(state, 16)[1] is None
    assert adapt_patch_embedding(weight.bfloat16(), 8).dtype == torch.bfloat16


def test_wrong_calls():
    with pytest.raises(ValueError, match="`method` must be one of nearest"):
        adapt_patch_embedding(kernel(16), 8, "magic")
    with pytest.raises(ValueError, match=r"must be \[D, C, p, p\]"):
        adapt_patch_embedding(torch.ones(3, 4), 8)
    with pytest.raises(ValueError, match="at least 1"):
        adapt_patch_embedding(kernel(16), 0)
    with pytest.raises(ValueError, match="this is no ViT backbone"):
        adapt_state_dict({}, 8)
