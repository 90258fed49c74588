"""The backbone of any file that DINOCell reads, ready to be inspected."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dinocell.errors import CheckpointError, UsageError, raised_as
from dinocell.network.backbone import DINOv3Backbone
from dinocell.network.weights import find_weights


@dataclass(frozen=True)
class InspectedBackbone:
    """A ViT in eval mode and what is known of it: `path`, `format`, `patch_size`, ..."""

    name: str
    vit: nn.Module
    facts: dict[str, Any]


def load_backbone_of(
    path: str | os.PathLike[str], *, which: str = "teacher", patch_size: int | None = None
) -> InspectedBackbone:
    """The ViT of a checkpoint file or folder, or of a DINOCell model (also a bundled one).

    `which` is `teacher` or `student`; the patch embedding is adapted to `patch_size` if it is
    given.  Raises UsageError, CheckpointError (the file does not exist, or it holds no backbone, or
    none that fits).
    """
    from dinocell.network.model import OnnxModel, bundled_models, load_model, read_model_header

    name = os.fspath(path)
    is_model = name in bundled_models() and not Path(name).exists()
    if not is_model and Path(name).is_file() and Path(name).suffix == ".safetensors":
        try:
            read_model_header(name)
            is_model = True
        except CheckpointError:
            is_model = False  # another program's file, which is read below
    if is_model and (patch_size is None or not Path(name).exists()):
        model = load_model(name)
        if patch_size not in (None, model.config.patch_size):
            raise UsageError(
                f"`patch_size` of a bundled model must be its own, {model.config.patch_size}, got "
                f"{patch_size}: name a file, or leave it out"
            )
        if isinstance(model, OnnxModel) or not isinstance(model.backbone, DINOv3Backbone):
            raise UsageError(
                f"A model to look into must have a transformer, got {name} of size "
                f"{model.config.size}: name another model"
            )
        return _inspected(name, model.backbone.vit, {"format": "dinocell"})
    found = find_weights(name)
    if not found.exists():
        raise UsageError(
            f"A checkpoint must be a file, a folder or a bundled model "
            f"({', '.join(bundled_models())}), got {name}: check the path"
        )
    vit, facts = _vit_of_weights(found, which, patch_size)
    return _inspected(name, vit, facts)


def _vit_of_weights(
    path: Path, which: str, patch_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """A ViT of the shape of the file's tensors, with its weights, and facts of the file."""
    from dinov3.cells import weights as formats

    with raised_as(CheckpointError, ValueError, OSError, RuntimeError):
        options = formats.vit_arguments(formats.read_backbone(path, which=which)[1])
        if patch_size is not None:
            options["patch_size"] = patch_size
        from dinov3.models.vision_transformer import DinoVisionTransformer

        vit = DinoVisionTransformer(**options)
        vit.init_weights()
        loaded = formats.load_backbone(vit, path, which=which)
    return vit, {"format": loaded.description.format, "notes": list(loaded.notes)}


def _inspected(name: str, vit: nn.Module, facts: Mapping[str, Any]) -> InspectedBackbone:
    known: dict[str, Any] = {
        **facts,
        "path": name,
        "patch_size": int(vit.patch_size),  # type: ignore[arg-type]
        "embed_dim": int(vit.embed_dim),  # type: ignore[arg-type]
        "depth": len(vit.blocks),  # type: ignore[arg-type]
        "num_heads": int(vit.num_heads),  # type: ignore[arg-type]
        "parameters": sum(parameter.numel() for parameter in vit.parameters()),
    }
    return InspectedBackbone(name, vit.eval().requires_grad_(False), known)
