"""Vision transformers by name and from a configuration (matches `dinov3.models`, ViT part)."""

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov3.cells.checks import one_of
from dinov3.models import vision_transformer as vits

__all__ = ["build_model", "build_model_for_eval", "build_model_from_cfg"]


# Keys of the section that are constructor arguments.
_SAME_NAMES = """
patch_size pos_embed_rope_base pos_embed_rope_min_period pos_embed_rope_max_period
pos_embed_rope_normalize_coords pos_embed_rope_shift_coords pos_embed_rope_jitter_coords
pos_embed_rope_rescale_coords qkv_bias norm_layer ffn_layer ffn_bias proj_bias n_storage_tokens
mask_k_bias untie_cls_and_patch_norms untie_global_and_local_cls_norm
""".split()  # noqa: SIM905


def _factories() -> list[str]:
    """Names of the functions of `vision_transformer` that make a network, also of those added to it."""
    found = []
    for name, value in vars(vits).items():
        if callable(value) and not isinstance(value, type) and not name.startswith("_"):
            try:
                parameters = inspect.signature(value).parameters
            except (TypeError, ValueError):
                continue
            found += [name] if "patch_size" in parameters else []
    return found


def build_model(
    args: Any,
    only_teacher: bool = False,
    img_size: int = 224,
    device: torch.device | str | None = None,
) -> tuple[nn.Module, int] | tuple[nn.Module, nn.Module, int]:
    """Student and teacher backbones of a `student` configuration section.

    Args:
        args: the section: `arch`, `patch_size`, `drop_path_rate`, ... (facts of `ssl_default_config`).
        only_teacher: without the student, which alone has stochastic depth.
        img_size: image size that is passed to the patch embedding.
        device: "meta" leaves the parameters without storage.

    Returns (teacher, width) or (student, teacher, width).
    """
    one_of("student.arch", args.arch, _factories())
    if getattr(args, "fp8_enabled", False):
        raise ValueError(
            "`student.fp8_enabled` must be false, got true: this tree has no fp8 layers"
        )
    options = {name: getattr(args, name) for name in _SAME_NAMES}
    options |= {"img_size": img_size, "layerscale_init": args.layerscale, "device": device}
    make = getattr(vits, args.arch)
    # Parts that take no device are made there too: on "meta" nothing is drawn at random.
    with torch.device(device) if device is not None else nullcontext():
        teacher = make(**options)
        if only_teacher:
            return teacher, teacher.embed_dim
        student = make(**options, drop_path_rate=args.drop_path_rate)
    return student, teacher, student.embed_dim


def build_model_from_cfg(
    cfg: Any, only_teacher: bool = False
) -> tuple[nn.Module, int] | tuple[nn.Module, nn.Module, int]:
    """As `build_model`, for a whole training configuration, on the meta device."""
    size = cfg.crops.global_crops_size
    # Several resolutions may be trained at once; the largest informs the patch embedding.
    img_size = size if isinstance(size, int) else max(size)
    return build_model(cfg.student, only_teacher=only_teacher, img_size=img_size, device="meta")


def build_model_for_eval(
    config: Any, pretrained_weights: str | Path | None, shard_unsharded_model: bool = False
) -> nn.Module:
    """The teacher's backbone of a configuration, filled and in eval mode, on the configured device.

    Args:
        config: a whole configuration.
        pretrained_weights: any file that `cells.weights` reads; None or "": random.
        shard_unsharded_model: not in this tree, which evaluates on one device.
    """
    from dinov3.cells.strategy import resolve_device
    from dinov3.cells.weights import load_backbone

    if shard_unsharded_model:
        raise ValueError(
            "`shard_unsharded_model` must be false, got true: evaluation has one device"
        )
    backbone: Any = build_model_from_cfg(config, only_teacher=True)[0]
    backbone.to_empty(device="cpu")
    backbone.init_weights()
    if pretrained_weights:
        load_backbone(backbone, pretrained_weights, patch_method=config.patch_adaptation.method)
    return backbone.requires_grad_(False).eval().to(resolve_device(config))
