"""The names of timm's DINOv3, in both directions."""

import re
from collections.abc import Mapping
from itertools import product

from torch import Tensor

from dinov3.cells.weights.architecture import (
    ROPE_BASE,
    WeightsDescription,
    has_k_bias,
    joined_bias,
    refuse_foreign_flags,
)
from dinov3.cells.weights.fit import State, WeightsError

_TIMM_SWIGLU = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}


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
            f"timm's DINOv3 must have a RoPE base of {ROPE_BASE:g}, got {d.rope_base:g} in {d.path}: "
            "keep another format"
        )
    if has_k_bias(state):
        raise WeightsError(f"timm's DINOv3 must have no k bias, got one in {d.path}: keep another")
    if state["mask_token"].any():
        notes.append("timm has no mask token: left out")
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
        notes.append("LayerScale absent: ones")
    return out, notes
