"""Schedules and parameter groups against values computed here from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dinov3.models.vision_transformer import DinoVisionTransformer
from dinov3.train.cosine_lr_scheduler import CosineScheduler, linear_warmup_cosine_decay
from dinov3.train.param_groups import (
    fuse_params_groups,
    get_params_groups_with_decay,
    get_params_groups_with_decay_fsdp,
    get_vit_lr_decay_rate,
    remove_fsdp_compile_names,
)


def half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def test_cosine():
    schedule = CosineScheduler(2.0, 0.5, 20, warmup_iters=4, start_warmup_value=0.2, freeze_iters=3)
    expected = [0.0] * 3 + [0.2, 0.8, 1.4, 2.0]
    expected += [half_cosine(2.0, 0.5, i / 13) for i in range(13)]
    np.testing.assert_allclose([schedule[i] for i in range(20)], expected, rtol=1e-12, atol=1e-15)
    assert schedule[20] == schedule[1000] == 0.5


def test_cosine_truncated():
    """A cosine half as long again, cut at the end, rescaled to end at its final value."""
    schedule = CosineScheduler(1.0, 0.1, 10, trunc_extra=0.5)
    share = [0.5 * (1 + math.cos(math.pi * i / 14)) for i in range(10)]
    expected = [0.1 + 0.9 * (s - share[-1]) / (1 - share[-1]) for s in share]
    np.testing.assert_allclose([schedule[i] for i in range(10)], expected, rtol=1e-12)
    assert schedule[9] == pytest.approx(0.1)
    plain = CosineScheduler(1.0, 0.1, 10)
    assert schedule[5] > plain[5], "straighter at its end, so later to fall"


def test_cosine_warmup_alone():
    schedule = CosineScheduler(0.07, 0.07, 6, warmup_iters=6, start_warmup_value=0.04)
    np.testing.assert_allclose([schedule[i] for i in range(6)], np.linspace(0.04, 0.07, 6))
    assert schedule[6] == 0.07


def test_cosine_too_short():
    with pytest.raises(ValueError, match="at least as long as its warm-up, got 3 iterations"):
        CosineScheduler(1.0, 0.0, 3, warmup_iters=4)


def test_linear_warmup_cosine_decay():
    values = linear_warmup_cosine_decay(0.0, 1.0, 0.2, 4, 15, cosine_iterations=6)
    expected = [0.0, 0.25, 0.5, 0.75]
    expected += [half_cosine(1.0, 0.2, i / 5) for i in range(6)] + [0.2] * 5
    np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-15)
    assert len(linear_warmup_cosine_decay(0, 1, 0, 4, 15)) == 15
    with pytest.raises(ValueError, match="must fit into the schedule"):
        linear_warmup_cosine_decay(0, 1, 0, 10, 15, cosine_iterations=6)


def vit(**options) -> DinoVisionTransformer:
    return DinoVisionTransformer(
        embed_dim=32,
        depth=3,
        num_heads=2,
        layerscale_init=1e-5,
        n_storage_tokens=2,
        untie_cls_and_patch_norms=True,
        **options,
    )


def test_decay_rates_by_layer():
    rates = {
        "cls_token": 0.5**4,
        "storage_tokens": 0.5**4,
        "mask_token": 0.5**4,
        "patch_embed.proj.weight": 0.5**4,
        "blocks.0.attn.qkv.weight": 0.5**3,
        "blocks.2.ls1.gamma": 0.5,
        "norm.weight": 1.0,
        "cls_norm.bias": 1.0,
    }
    for name, expected in rates.items():
        rate = get_vit_lr_decay_rate(name, 0.5, num_layers=3, force_is_backbone=True)
        assert rate == expected, name
        assert get_vit_lr_decay_rate(f"backbone.{name}", 0.5, num_layers=3) == expected
    assert get_vit_lr_decay_rate("blocks.0.attn.qkv.weight", 0.5, num_layers=3) == 1.0
    chunked = get_vit_lr_decay_rate(
        "blocks.1.2.attn.qkv.weight", 0.5, 3, force_is_backbone=True, chunked_blocks=True
    )
    assert chunked == 0.5


def test_groups_of_a_backbone():
    groups = {
        group["name"]: group
        for group in get_params_groups_with_decay(vit(), lr_decay_rate=0.9, patch_embed_lr_mult=0.2)
    }
    assert len(groups) == len(list(vit().parameters()))
    assert groups["patch_embed.proj.weight"]["lr_multiplier"] == pytest.approx(0.2 * 0.9**4)
    assert groups["patch_embed.proj.bias"]["wd_multiplier"] == 0
    assert groups["patch_embed.proj.weight"]["wd_multiplier"] == 1
    for name in ("cls_token", "storage_tokens", "mask_token"):
        assert groups[name]["wd_multiplier"] == 1, "tokens decay, as upstream"
    for name in ("norm.weight", "cls_norm.weight", "blocks.1.ls2.gamma", "blocks.0.norm1.weight"):
        assert groups[name]["wd_multiplier"] == 0
    assert not any(group["is_last_layer"] for group in groups.values())


def test_default_multipliers_of_vit_small():
    """The figures that facts about upstream quote: 0.0508, 0.2824, 0.9."""
    from dinov3.models.vision_transformer import vit_small

    with torch.device("meta"):
        model = vit_small()
    groups = {
        g["name"]: g["lr_multiplier"] for g in get_params_groups_with_decay_fsdp(model, 0.9, 0.2)
    }
    assert groups["patch_embed.proj.weight"] == pytest.approx(0.0508, abs=1e-4)
    assert groups["blocks.0.mlp.fc1.weight"] == pytest.approx(0.2824, abs=1e-4)
    assert groups["blocks.11.mlp.fc1.weight"] == pytest.approx(0.9)


def test_head_options_and_frozen_parameters():
    model = nn.ModuleDict({"dino_head": nn.Linear(3, 4), "rest": nn.Linear(3, 4)})
    model["rest"].bias.requires_grad_(False)
    groups = {
        g["name"]: g for g in get_params_groups_with_decay(model, dino_head_wd_multiplier=0.3)
    }
    assert set(groups) == {"dino_head.weight", "dino_head.bias", "rest.weight"}
    assert groups["dino_head.weight"]["wd_multiplier"] == 0.3
    assert groups["rest.weight"]["wd_multiplier"] == 1


def test_wrapper_names():
    name = "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module._orig_mod.ls1.gamma"
    assert remove_fsdp_compile_names(name) == "blocks.1.ls1.gamma"


def test_fusing_keeps_every_parameter_once():
    model = vit()
    single = get_params_groups_with_decay(model, 0.9, 0.2)
    fused = fuse_params_groups(single)
    assert len(fused) < len(single)
    flat = [id(p) for group in fused for p in group["params"]]
    assert sorted(flat) == sorted(id(g["params"]) for g in single)
    keys = [(g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]) for g in fused]
    assert len(set(keys)) == len(keys)
    by_rate = fuse_params_groups(single, keys=("lr_multiplier",))
    assert len(by_rate) < len(fused)
