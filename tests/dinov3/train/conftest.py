"""A tiny configuration and batch for tests of self-supervised training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dinov3.configs import get_default_config

TINY = """
MODEL: {META_ARCHITECTURE: SSLMetaArch}
compute_precision: {param_dtype: fp32}
dino: {head_n_prototypes: 48, head_hidden_dim: 24, head_bottleneck_dim: 12}
ibot: {head_n_prototypes: 40, head_hidden_dim: 24, head_bottleneck_dim: 12}
train: {batch_size_per_gpu: 3, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 4, compile: false}
student: {arch: vit_test, patch_size: 8, drop_path_rate: 0.0, layerscale: 0.5, n_storage_tokens: 2}
optim: {epochs: 2, warmup_epochs: 1, freeze_last_layer_epochs: 0}
teacher: {warmup_teacher_temp_epochs: 1}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
accelerator: {device: cpu, strategy: none}
"""


@pytest.fixture(autouse=True)
def small_architecture(monkeypatch):
    """`student.arch: vit_test`: width 16, 2 blocks, 2 heads."""
    from dinov3.models import vision_transformer as vits

    def vit_test(patch_size: int = 16, **kwargs: Any) -> vits.DinoVisionTransformer:
        return vits.DinoVisionTransformer(
            patch_size=patch_size, embed_dim=16, depth=2, num_heads=2, ffn_ratio=4, **kwargs
        )

    monkeypatch.setattr(vits, "vit_test", vit_test, raising=False)


@pytest.fixture
def make_cfg() -> Callable[..., DictConfig]:
    """The tiny configuration with `key=value` changes."""

    def make(*changes: str) -> DictConfig:
        merged = OmegaConf.merge(
            get_default_config(), OmegaConf.create(TINY), OmegaConf.from_dotlist(list(changes))
        )
        assert isinstance(merged, DictConfig)
        return merged

    return make


@pytest.fixture
def batch() -> dict[str, Any]:
    """Two global crops of 32 and two local crops of 16 of three images, some patches masked."""
    rng = np.random.default_rng(5)

    def crops(count: int, size: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(count, 3, size, size))).float()

    masks = torch.zeros(6, 16, dtype=torch.bool)
    for row, count in ((1, 3), (2, 7), (5, 4)):
        masks[row, torch.from_numpy(rng.permutation(16)[:count])] = True
    weights = (1 / masks.sum(-1).clamp(min=1.0))[:, None].expand_as(masks)[masks]
    return {
        "collated_global_crops": crops(6, 32),
        "collated_local_crops": crops(6, 16),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": weights,
        "upperbound": 14,
        "n_masked_patches": torch.tensor([14]),
        "global_batch_size": 3,
    }
