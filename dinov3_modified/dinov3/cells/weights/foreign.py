"""The names of Hugging Face's DINOv3ViTModel, with its configuration, and of timm's DINOv3, both ways."""

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.cells.weights.architecture import (
    KERNEL,
    ROPE_BASE,
    WeightsDescription,
    has_k_bias,
    joined_bias,
    refuse_foreign_flags,
)
from dinov3.cells.weights.fit import State, WeightsError

HF_KERNEL = "embeddings.patch_embeddings.weight"
_HF_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.weight": KERNEL,
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}

# Within a block, Meta's module → Hugging Face's.
_HF_BLOCK = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}

_HF_FFN = {
    "mlp": {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"},
    "swiglu": {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"},
}

_TIMM_SWIGLU = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}

_HF_LAYER = re.compile(r"^(?:model\.)?layer\.(\d+)\.(.+)$")


def from_hf(state: Mapping[str, Tensor]) -> State:
    """The entries in Meta's names; unknown names stay, so that the check reports them."""
    gated = any(key.endswith("mlp.gate_proj.weight") for key in state)
    ffn = _HF_FFN["swiglu" if gated else "mlp"]
    modules = {theirs: ours for ours, theirs in (_HF_BLOCK | ffn).items()}
    out: State = {}
    attention: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _HF_LAYER.match(key)
        if key in _HF_FIXED:
            ours = _HF_FIXED[key]
            if ours == "storage_tokens" and value.ndim == 3 and value.shape[1] == 0:
                continue  # none
            out[ours] = value.reshape(1, -1) if ours == "mask_token" else value
        elif match is None:
            if not key.startswith("rope_embeddings."):
                out[key] = value
        else:
            block, rest = f"blocks.{match[1]}.", match[2]
            module, _, kind = rest.rpartition(".")
            if scale := re.fullmatch(r"layer_scale([12])\.lambda1", rest):
                out[f"{block}ls{scale[1]}.gamma"] = value
            elif qkv := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", rest):
                attention.setdefault(block, {})[f"{qkv[1]}.{qkv[2]}"] = value
            elif module in modules:
                out[f"{block}{modules[module]}.{kind}"] = value
            else:
                out[key] = value
    for block, parts in attention.items():
        weights = [parts.get(f"{c}.weight") for c in "qkv"]
        if all(weight is not None for weight in weights):
            out[f"{block}attn.qkv.weight"] = torch.cat([w for w in weights if w is not None])
        out |= joined_bias(block, {c: parts.get(f"{c}.bias") for c in "qkv"})
    return out


def to_hf(state: Mapping[str, Tensor], d: WeightsDescription) -> tuple[State, list[str]]:
    notes = refuse_foreign_flags(d, "Hugging Face")
    back = {ours: theirs for theirs, ours in _HF_FIXED.items()}
    modules = {**_HF_BLOCK, **_HF_FFN[d.ffn]}
    k_bias = has_k_bias(state)
    out: State = {}
    for key, value in state.items():
        if key in back:
            out[back[key]] = value[None] if key == "mask_token" else value
        elif key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            module, _, kind = rest.rpartition(".")
            layer = f"layer.{index}."
            if rest.startswith("ls"):
                out[f"{layer}layer_scale{rest[2]}.lambda1"] = value
            elif module in modules:
                out[f"{layer}{modules[module]}.{kind}"] = value
            elif module == "attn.qkv" and kind in ("weight", "bias"):
                for c, part in zip("qkv", value.chunk(3), strict=True):
                    if c != "k" or kind == "weight" or k_bias:
                        out[f"{layer}attention.{c}_proj.{kind}"] = part.clone()
    if d.n_storage_tokens == 0:
        out["embeddings.register_tokens"] = state["cls_token"].new_zeros(1, 0, d.embed_dim)
    if not d.layerscale:
        for block, number in product(range(d.depth), (1, 2)):
            one = state["cls_token"].new_ones(d.embed_dim)
            out[f"layer.{block}.layer_scale{number}.lambda1"] = one
        notes.append("The network has no LayerScale: ones are written")
    return out, notes


def hf_config(d: WeightsDescription, key_bias: bool) -> dict[str, Any]:
    """`config.json` of transformers' DINOv3ViTModel."""
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "hidden_size": d.embed_dim,
        "intermediate_size": d.ffn_hidden,
        "num_hidden_layers": d.depth,
        "num_attention_heads": d.num_heads,
        "num_channels": d.in_chans,
        "num_register_tokens": d.n_storage_tokens,
        "patch_size": d.patch_size,
        "image_size": 224,
        "use_gated_mlp": d.ffn == "swiglu",
        "hidden_act": "silu" if d.ffn == "swiglu" else "gelu",
        "query_bias": d.qkv_bias,
        "key_bias": key_bias,
        "value_bias": d.qkv_bias,
        "proj_bias": d.proj_bias,
        "mlp_bias": d.ffn_bias,
        "rope_theta": d.rope_base,
        "layer_norm_eps": 1e-5,
        "dtype": d.dtype,
    }


def hf_facts(path: Path) -> tuple[int | None, float | None]:
    """Heads and RoPE base from Hugging Face's `config.json`; None where it has none."""
    if not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"The config.json beside weights must be JSON, got {path} ({error}): fetch it again"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") not in (None, "dinov3_vit"):
        return None, None  # of something else that lies in the same folder
    heads = config.get("num_attention_heads")
    base = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    return (
        heads if isinstance(heads, int) and heads > 0 else None,
        float(base) if isinstance(base, (int, float)) and base > 0 else None,
    )


def from_timm(state: Mapping[str, Tensor]) -> State:
    gated = any("mlp.fc1_g" in key for key in state)
    out: State = {}
    biases: dict[str, dict[str, Tensor | None]] = {}
    for key, value in state.items():
        if key == "reg_token":
            out["storage_tokens"] = value
        elif scale := re.fullmatch(r"(blocks\.\d+\.)gamma_([12])", key):
            out[f"{scale[1]}ls{scale[2]}.gamma"] = value
        elif bias := re.fullmatch(r"(blocks\.\d+\.)attn\.([qkv])_bias", key):
            biases.setdefault(bias[1], dict.fromkeys("qkv"))[bias[2]] = value
        elif gated:
            for ours, theirs in _TIMM_SWIGLU.items():
                key = key.replace(theirs + ".", ours + ".")
            out[key] = value
        else:
            out[key] = value
    for block, parts in biases.items():
        out |= joined_bias(block, parts)
    return out


def to_timm(state: Mapping[str, Tensor], d: WeightsDescription) -> tuple[State, list[str]]:
    notes = refuse_foreign_flags(d, "timm")
    if d.rope_base != ROPE_BASE:
        raise WeightsError(
            f"The DINOv3 of timm must have a RoPE base of {ROPE_BASE:g}, got {d.rope_base:g} in {d.path}: "
            "keep another format"
        )
    if has_k_bias(state):
        raise WeightsError(
            f"The DINOv3 of timm must have no k bias, got one in {d.path}: keep another"
        )
    if state["mask_token"].any():
        notes.append("A file of timm has no mask token: it is left out")
    out: State = {}
    for key, value in state.items():
        if re.fullmatch(r"mask_token|rope_embed\.periods|.*bias_mask|local_cls_norm\..*", key):
            continue
        if key == "storage_tokens":
            out["reg_token"] = value
        elif scale := re.fullmatch(r"(blocks\.\d+\.)ls([12])\.gamma", key):
            out[f"{scale[1]}gamma_{scale[2]}"] = value
        elif key.endswith("attn.qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            q, _, v = value.chunk(3)
            out[f"{stem}q_bias"], out[f"{stem}v_bias"] = q.clone(), v.clone()
        else:
            for ours, theirs in _TIMM_SWIGLU.items():
                key = key.replace(ours + ".", theirs + ".")
            out[key] = value
    if not d.layerscale:
        for index, number in product(range(d.depth), (1, 2)):
            out[f"blocks.{index}.gamma_{number}"] = state["cls_token"].new_ones(d.embed_dim)
        notes.append("The network has no LayerScale: ones are written")
    return out, notes
