"""Attention of the last block."""

from __future__ import annotations

import pytest
import torch

from dinov3.models.vision_transformer import DinoVisionTransformer


def make_vit(seed: int = 0, **options) -> DinoVisionTransformer:
    settings = {
        "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "n_storage_tokens": 4,
        "mask_k_bias": True, "layerscale_init": 0.5, "pos_embed_rope_dtype": "fp32",
    } | options  # fmt: skip
    torch.manual_seed(seed)
    vit = DinoVisionTransformer(**settings)
    vit.init_weights()
    with torch.no_grad():  # far from uniform attention
        for block in vit.blocks:
            block.attn.qkv.weight.mul_(8)
            block.attn.qkv.bias.normal_()
    return vit.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("storage", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_times_v_is_the_blocks_own_output(storage, masked):
    vit = make_vit(n_storage_tokens=storage)
    x = images(2, 3, 24, 40)
    masks = None
    if masked:
        masks = torch.zeros(2, 15, dtype=torch.bool)
        masks[0, 3:9] = True
    seen = {}
    attn = vit.blocks[-1].attn
    handles = [
        attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o)),
        attn.proj.register_forward_pre_hook(lambda m, i: seen.update(attended=i[0])),
    ]
    vit.forward_features(x, masks)
    qkv, attended = seen["qkv"], seen["attended"]
    for handle in handles:
        handle.remove()
    weights = vit.get_last_selfattention(x, masks=masks)

    tokens = 1 + storage + 15
    assert weights.shape == (2, 2, tokens, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, tokens))
    v = qkv.reshape(2, tokens, 3, 2, 16)[:, :, 2].permute(0, 2, 1, 3)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, attended, atol=2e-5, rtol=1e-5)
    assert weights.std() > 0.01  # not the uniform attention, which many mistakes share
    if masked:
        assert not torch.allclose(weights[0], vit.get_last_selfattention(x)[0])


@torch.no_grad()
def test_same_image_gives_the_same_map_and_the_mode_stays():
    vit = make_vit(drop_path_rate=0.5, pos_embed_rope_rescale_coords=2.0)
    x = images(1, 3, 16, 16)
    state = torch.get_rng_state()
    first = vit.get_last_selfattention(x)
    assert torch.equal(first, vit.get_last_selfattention(x))
    assert torch.equal(state, torch.get_rng_state())
    assert not vit.training
    vit.train()
    vit.get_last_selfattention(x)
    assert vit.training


@torch.no_grad()
def test_half_precision_in_float32_softmax_out():
    vit = make_vit()
    x = images(1, 3, 16, 16)
    exact = vit.get_last_selfattention(x)
    half = vit.bfloat16().get_last_selfattention(x.bfloat16())
    assert half.dtype == torch.float32
    # A softmax in bfloat16 could be off by 2^-8 in the sum of each row.
    torch.testing.assert_close(half.sum(-1), torch.ones(1, 2, 9), atol=1e-5, rtol=0)
    assert (half - exact).abs().max() < 0.1


@torch.no_grad()
def test_autocast_keeps_the_softmax_in_float32():
    vit = make_vit()
    x = images(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = vit.get_last_selfattention(x)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 9), atol=1e-5, rtol=0)


@torch.no_grad()
def test_patch_8_at_224_has_28_by_28_patches():
    vit = make_vit(depth=1)
    assert vit.get_last_selfattention(images(1, 3, 224, 224)).shape[-1] == 1 + 4 + 28 * 28
