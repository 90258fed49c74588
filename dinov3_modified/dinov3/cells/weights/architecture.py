"""What a DINOv3 backbone is made of: its description, entries, RoPE periods and biases.

A backbone is a complete state dict in Meta's names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.cells.weights.fit import State, WeightsError
from dinov3.checkpointer.patch_size_adaptation import patch_size_of

KERNEL = "patch_embed.proj.weight"

ROPE_BASE = 100.0
# The facts that are arguments of `DinoVisionTransformer` under the same name.
_ARGUMENTS = (
    "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "qkv_bias", "proj_bias",
    "ffn_bias", "mask_k_bias", "n_storage_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class WeightsDescription:
    """Facts of a backbone file."""

    path: str
    format: str  # "checkpoint" for files and folders of a training run
    which: str | None  # "teacher", "ema" or "student" of a file with several networks
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    ffn: str  # "mlp" or "swiglu"
    ffn_hidden: int
    n_storage_tokens: int
    mask_k_bias: bool
    layerscale: bool
    untied_norms: tuple[str, ...]
    qkv_bias: bool
    proj_bias: bool
    ffn_bias: bool
    norm: str  # "layernorm" or "rmsnorm"
    rope_base: float | None  # of the periods; None where they are of another form
    num_parameters: int  # without buffers
    dtype: str  # of the patch embedding
    heads_known: bool = True  # whether the file contains the number of heads, or it is assumed
    notes: tuple[str, ...] = ()  # what the file lacks, and what it was filled with

    @property
    def name(self) -> str:
        """Such as ViT-S/16."""
        sizes = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1152: "So400M", 1280: "H", 4096: "7B"}
        plus = "+" if self.ffn == "swiglu" and self.embed_dim <= 1280 else ""
        return f"ViT-{sizes.get(self.embed_dim, self.embed_dim)}{plus}/{self.patch_size}"

    @property
    def flags(self) -> str:
        """The settings of the network beside its size, in words."""
        masked = "masked" if self.mask_k_bias else "plain"
        parts = [
            f"{self.ffn} of {self.ffn_hidden}" + ("" if self.ffn_bias else " without bias"),
            f"{self.n_storage_tokens} storage tokens",
            f"{masked} k bias" if self.qkv_bias else "no qkv bias",
            "LayerScale" if self.layerscale else "no LayerScale",
            *[f"own {name}" for name in self.untied_norms],
        ]
        if self.norm != "layernorm":
            parts.append(self.norm)
        if not self.proj_bias:
            parts.append("no bias of the attention's projection")
        return ", ".join(parts)


def described(state: Mapping[str, Tensor], path: Path, kind: str) -> WeightsDescription:
    indices = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m]
    depth = 1 + max(indices, default=-1)

    def in_blocks(name: str) -> Tensor | None:
        """The entry of the first block that has one: one missing entry must not change the result."""
        values = (state.get(f"blocks.{index}.{name}") for index in range(depth))
        return next((value for value in values if value is not None), None)

    kernel = state[KERNEL]
    width = int(kernel.shape[0])
    swiglu = in_blocks("mlp.w1.weight") is not None
    hidden = in_blocks("mlp.w1.weight" if swiglu else "mlp.fc1.weight")
    storage = state.get("storage_tokens")
    periods = state["rope_embed.periods"]
    buffers = ("rope_embed.periods", "bias_mask")
    rms = in_blocks("norm1.bias") is None and "norm.bias" not in state
    try:
        patch_size = patch_size_of(state)
    except ValueError as error:
        raise WeightsError(f"{error} ({path})") from error
    return WeightsDescription(
        path=str(path),
        format=kind,
        which=None,
        embed_dim=width,
        depth=depth,
        num_heads=max(width // max(4 * periods.numel(), 1), 1),
        patch_size=patch_size,
        in_chans=int(kernel.shape[1]),
        ffn="swiglu" if swiglu else "mlp",
        ffn_hidden=4 * width if hidden is None else int(hidden.shape[0]),
        n_storage_tokens=0 if storage is None or storage.ndim != 3 else int(storage.shape[1]),
        mask_k_bias=in_blocks("attn.qkv.bias_mask") is not None,
        layerscale=in_blocks("ls1.gamma") is not None,
        untied_norms=tuple(n for n in ("cls_norm", "local_cls_norm") if f"{n}.weight" in state),
        qkv_bias=in_blocks("attn.qkv.bias") is not None,
        proj_bias=in_blocks("attn.proj.bias") is not None,
        ffn_bias=in_blocks("mlp.w3.bias" if swiglu else "mlp.fc2.bias") is not None,
        norm="rmsnorm" if rms else "layernorm",
        rope_base=_rope_base(periods),
        num_parameters=sum(v.numel() for k, v in state.items() if not k.endswith(buffers)),
        dtype=str(kernel.dtype).removeprefix("torch."),
    )


def expected_shapes(d: WeightsDescription) -> dict[str, tuple[int, ...]]:
    """Every entry of a backbone of this description, as `DinoVisionTransformer` has it."""
    width, hidden = d.embed_dim, d.ffn_hidden

    def linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        kinds = ("weight", "bias") if d.norm == "layernorm" else ("weight",)
        return {f"{name}.{kind}": (width,) for kind in kinds}

    out: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "mask_token": (1, width),
        KERNEL: (width, d.in_chans, d.patch_size, d.patch_size),
        "patch_embed.proj.bias": (width,),
        "rope_embed.periods": (width // d.num_heads // 4,),
    }
    if d.n_storage_tokens:
        out["storage_tokens"] = (1, d.n_storage_tokens, width)
    for index in range(d.depth):
        block = f"blocks.{index}."
        out |= norm(f"{block}norm1") | norm(f"{block}norm2")
        out |= linear(f"{block}attn.qkv", 3 * width, width, d.qkv_bias)
        out |= linear(f"{block}attn.proj", width, width, d.proj_bias)
        if d.mask_k_bias:
            out[f"{block}attn.qkv.bias_mask"] = (3 * width,)
        if d.layerscale:
            out |= {f"{block}ls1.gamma": (width,), f"{block}ls2.gamma": (width,)}
        *inner, outer = ("w1", "w2", "w3") if d.ffn == "swiglu" else ("fc1", "fc2")
        for name in inner:
            out |= linear(f"{block}mlp.{name}", hidden, width, d.ffn_bias)
        out |= linear(f"{block}mlp.{outer}", width, hidden, d.ffn_bias)
    for name in ("norm", *d.untied_norms):
        out |= norm(name)
    return out


def vit_arguments(description: WeightsDescription) -> dict[str, Any]:
    """Arguments of `DinoVisionTransformer` for a described backbone.

    What a file does not contain is taken from the released ViTs: RoPE in float32, norm eps 1e-5.
    """
    d = description
    arguments: dict[str, Any] = {name: getattr(d, name) for name in _ARGUMENTS} | {
        "layerscale_init": 1e-5 if d.layerscale else None,
        "norm_layer": "rmsnorm" if d.norm == "rmsnorm" else "layernormbf16",
        "pos_embed_rope_base": d.rope_base or ROPE_BASE,
        "pos_embed_rope_dtype": "fp32",
        "untie_cls_and_patch_norms": "cls_norm" in d.untied_norms,
        "untie_global_and_local_cls_norm": "local_cls_norm" in d.untied_norms,
    }
    # Of SwiGLU any ratio whose two thirds, rounded up to eights, give this width.
    hidden = d.ffn_hidden * 1.5 if d.ffn == "swiglu" else d.ffn_hidden
    return arguments | {"ffn_layer": d.ffn, "ffn_ratio": hidden / d.embed_dim}


def k_bias_mask(width: int) -> Tensor:
    mask = torch.ones(3 * width)
    mask[width : 2 * width] = 0
    return mask


def rope_periods(head_width: int, base: float) -> Tensor:
    """base^(2 j / (head_width / 2)), j = 0 .. head_width / 4 - 1 (RoFormer, section 3.2.2)."""
    steps = torch.arange(head_width // 4, dtype=torch.float32)
    return base ** (2 * steps / (head_width // 2))


def _rope_base(periods: Tensor) -> float | None:
    """The base that gives these periods, within their rounding to 16 bits; None if none does."""
    n = periods.numel()
    values = periods.double()
    powers = torch.arange(n, dtype=torch.float64) / max(n, 1)
    if torch.allclose(values, ROPE_BASE**powers, rtol=8e-3, atol=0):
        return ROPE_BASE
    base = float(values[-1]) ** (n / (n - 1)) if n > 1 else 0.0
    if base > 0 and torch.allclose(values, base**powers, rtol=8e-3, atol=0):
        return float(f"{base:.4g}")
    return None


def joined_bias(block: str, biases: Mapping[str, Tensor | None]) -> State:
    """The bias of q, k and v in one, and its mask where k has none."""
    known = [bias for bias in biases.values() if bias is not None]
    if not known:
        return {}
    zero = torch.zeros_like(known[0])
    out = {f"{block}attn.qkv.bias": torch.cat([zero if b is None else b for b in biases.values()])}
    if biases["k"] is None:
        out[f"{block}attn.qkv.bias_mask"] = k_bias_mask(zero.numel())
    return out


def has_k_bias(state: Mapping[str, Tensor]) -> bool:
    return any(
        bool(value.chunk(3)[1].any()) and f"{key}_mask" not in state
        for key, value in state.items()
        if key.endswith("attn.qkv.bias")
    )


def refuse_foreign_flags(d: WeightsDescription, program: str) -> list[str]:
    """Refuse what another program's DINOv3 cannot represent; returns what it leaves out."""
    problem = None
    if "cls_norm" in d.untied_norms:
        problem = "no cls_norm, got one"
    elif d.norm != "layernorm":
        problem = f"layer norms, got {d.norm}"
    elif d.rope_base is None:
        problem = "RoPE periods base^(2 j / n), got others"
    if problem is not None:
        raise WeightsError(
            f"{program}'s DINOv3 must have {problem} in {d.path}: convert to another format"
        )
    if "local_cls_norm" in d.untied_norms:
        return [f"{program} has no local_cls_norm, which acts in training only: left out"]
    return []
