"""The released DINOv3 vision transformers (matches `dinov3.hub.backbones`, ViT part).

Meta gives the weights to those who accept its licence: ask for them on the DINOv3 page, save the
file, and pass `weights=PATH`.
"""

import os
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import torch

from dinov3.cells.weights import load_backbone, sha256
from dinov3.hub.utils import DINOV3_BASE_URL
from dinov3.models.vision_transformer import DinoVisionTransformer


class Weights(Enum):
    """Released weights by pretraining data: 1.7 B web images, or 493 M satellite images."""

    LVD1689M = "LVD1689M"
    SAT493M = "SAT493M"


_HASHES = {
    ("vits16", Weights.LVD1689M): "08c60483",
    ("vits16plus", Weights.LVD1689M): "4057cbaa",
    ("vitb16", Weights.LVD1689M): "73cec8be",
    ("vitl16", Weights.LVD1689M): "8aa4cbdd",
    ("vitl16", Weights.SAT493M): "eadcf0ff",
    ("vith16plus", Weights.LVD1689M): "7c1da9a5",
    ("vit7b16", Weights.LVD1689M): "a955f4ea",
    ("vit7b16", Weights.SAT493M): "a6675841",
}

# What all released ViTs have in common, beside their shape.
_COMMON: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 16,
    "pos_embed_rope_base": 100.0,
    "pos_embed_rope_normalize_coords": "separate",
    "pos_embed_rope_rescale_coords": 2.0,
    "pos_embed_rope_dtype": "fp32",
    "layerscale_init": 1.0e-5,
    "norm_layer": "layernormbf16",
    "n_storage_tokens": 4,
    "mask_k_bias": True,
}


def is_url(path: str) -> bool:
    """Whether `path` begins with a scheme that can be opened: https, http or file."""
    return urlparse(path).scheme in ("https", "http", "file")


def convert_path_or_url_to_url(path: str) -> str:
    """A local path as a file URL; URLs as they are."""
    return path if is_url(path) else Path(os.path.expanduser(path)).resolve().as_uri()


def _released(name: str, **shape: Any) -> Callable[..., DinoVisionTransformer]:
    """The public function of a released network; see `dinov3_vits16`."""

    def make(
        *,
        pretrained: bool = True,
        weights: Weights | str | Path = Weights.LVD1689M,
        check_hash: bool = False,
        **kwargs: Any,
    ) -> DinoVisionTransformer:
        """A released network.

        Args:
            pretrained: load `weights`; otherwise start at random.
            weights: a member of `Weights`, or a path or URL (https, http, file) of any file that
                `cells.weights` reads; another patch size is adapted.
            check_hash: compare the file's SHA-256 with the hash in its name.
            **kwargs: constructor arguments in place of the released ones, `patch_size` among them.
        """
        options = {**_COMMON, **shape, **kwargs}
        if name == "vitl16":
            options = {"untie_global_and_local_cls_norm": weights == Weights.SAT493M, **options}
        model = DinoVisionTransformer(**options)
        if not pretrained:
            model.init_weights()
            return model
        path = _local_file(name, weights)
        if check_hash:
            _check_hash(path)
        load_backbone(model, path)
        return model

    make.__name__ = make.__qualname__ = f"dinov3_{name}"
    return make


_SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 20}
_7B = {"embed_dim": 4096, "depth": 40, "num_heads": 32, "qkv_bias": False}

# S, B, L, H and 7B; "plus" has SwiGLU of ratio 6.  The satellite weights of L untie the local CLS norm.
dinov3_vits16 = _released("vits16", **_SMALL, ffn_ratio=4)
dinov3_vits16plus = _released("vits16plus", **_SMALL, ffn_ratio=6, ffn_layer="swiglu")
dinov3_vitb16 = _released("vitb16", **_BASE, ffn_ratio=4)
dinov3_vitl16 = _released("vitl16", **_LARGE, ffn_ratio=4)
dinov3_vitl16plus = _released("vitl16plus", **_LARGE, ffn_ratio=6.0, ffn_layer="swiglu")
dinov3_vith16plus = _released("vith16plus", **_HUGE, ffn_ratio=6.0, ffn_layer="swiglu")
dinov3_vit7b16 = _released(
    "vit7b16", **_7B, ffn_ratio=3, ffn_layer="swiglu64", untie_global_and_local_cls_norm=True
)


def _local_file(name: str, weights: Weights | str | Path) -> Path:
    """The file of the weights on this machine, fetched first if it is an http(s) URL."""
    if isinstance(weights, Weights):
        if (name, weights) not in _HASHES:
            raise ValueError(
                f"Released weights must exist, got {weights.value} for {name}: pass weights=PATH"
            )
        data, digest = weights.value.lower(), _HASHES[name, weights]
        file_name = f"dinov3_{name}_pretrain_{data}-{digest}.pth"
        cached = Path(torch.hub.get_dir()) / "checkpoints" / file_name
        if cached.is_file():
            return cached
        raise FileNotFoundError(
            f"Released weights must be on this machine, got no {cached}: Meta gives them to those who "
            "accept the DINOv3 licence; ask for them at https://ai.meta.com/resources/models-and-libraries/dinov3-downloads, then pass "
            f"weights=PATH or the address that you are sent (instead of {DINOV3_BASE_URL}/{file_name})"
        )
    address = convert_path_or_url_to_url(str(weights))
    url = urlparse(address)
    if url.scheme == "file":
        path = Path(unquote(url.path))
        if not path.exists():
            raise FileNotFoundError(f"Weights must be a file or folder, got {path}: check the path")
        return path
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(url.path).name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(target))  # writes a temporary file first
    return target


def _check_hash(path: Path) -> None:
    match = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if match is None:
        raise ValueError(
            f"`check_hash` needs a file name that ends in -HASH.pth, got {path.name}: rename the file or "
            "leave check_hash out"
        )
    digest = sha256(path)
    if not digest.startswith(match.group(1)):
        raise ValueError(
            f"The SHA-256 of the weights must begin with {match.group(1)}, got "
            f"{digest[:16]} in {path}: fetch the file again"
        )
