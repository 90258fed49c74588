"""Backbone weights of any DINOv3 file, in and out (ours).

Read: Meta's backbone file; teacher files and checkpoints of a training run, student or teacher,
plain or sharded; Hugging Face; timm; DINOCell's models.  Written: Meta's, Hugging Face's, timm's and
a `.safetensors` with Meta's names.  Inside, a backbone is a state dict in Meta's names.

Nothing is unpickled but tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov3.checkpointer.patch_size_adaptation import adapt_state_dict, patch_size_of

__all__ = [
    "FORMATS",
    "LoadReport",
    "WeightsDescription",
    "WeightsError",
    "describe",
    "load_backbone",
    "read_backbone",
    "sha256",
    "vit_arguments",
    "write_backbone",
]

State = dict[str, Tensor]

FORMATS = ("meta", "hf", "timm", "dinocell")
_HEADER = "dinov3_backbone"
_ROPE_BASE = 100.0
_HEAD_WIDTH = 64
# Where the backbone's entries begin, for each network of a file that holds several.
_PREFIXES = {
    "teacher": ("teacher.backbone.", "model_ema.backbone.", "model.teacher.backbone.",
                "model.model_ema.backbone."),
    "student": ("student.backbone.", "model.student.backbone."),
}  # fmt: skip
_COMMON_PREFIXES = ("backbone.vit.", "backbone.", "model.backbone.", "module.", "model.", "")


class WeightsError(ValueError):
    """A file that is no backbone, or does not fit."""


@dataclass(frozen=True)
class WeightsDescription:
    """Facts of a backbone file.

    Attributes:
        path, format, which: where from; `which` is the network of a file with several.
        embed_dim, depth, num_heads, patch_size, in_chans, ffn, ffn_hidden: the shape.
        n_storage_tokens, mask_k_bias, layerscale, untied_norms, qkv_bias: the flags.
        num_parameters: without buffers.
        dtype: of the patch embedding.
    """

    path: str
    format: str
    which: str
    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    in_chans: int
    ffn: str
    ffn_hidden: int
    n_storage_tokens: int
    mask_k_bias: bool
    layerscale: bool
    untied_norms: tuple[str, ...]
    qkv_bias: bool
    num_parameters: int
    dtype: str

    @property
    def name(self) -> str:
        """Such as ViT-S/16."""
        sizes = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1152: "So400M", 1280: "H", 4096: "7B"}
        plus = "+" if self.ffn == "swiglu" and self.embed_dim <= 1024 else ""
        return f"ViT-{sizes.get(self.embed_dim, self.embed_dim)}{plus}/{self.patch_size}"


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` did.

    Attributes:
        description: of the file.
        patch_size_before, patch_size: of the file and of the network.
        notes: what was filled in or left out.
    """

    description: WeightsDescription
    patch_size_before: int
    patch_size: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        d = self.description
        text = f"{d.path} ({d.name}, {d.format} format, {d.num_parameters / 1e6:.1f} M parameters)"
        return "; ".join([text, *self.notes])


# --- reading ---


def read_backbone(path: str | Path, *, which: str = "teacher") -> tuple[State, WeightsDescription]:
    """The backbone of a file or folder, in Meta's names.

    Args:
        path: `.pth`, `.safetensors`, a folder of Hugging Face, or a DCP folder of a run.
        which: "teacher" or "student", of a file that holds both.

    Returns:
        State dict on the CPU, and its description.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it is no backbone of a DINOv3 ViT.
    """
    if which not in _PREFIXES:
        raise WeightsError(f"which must be teacher or student, got {which!r}: choose one")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file or a folder, got {path}: check the path")
    heads: int | None = None
    if path.is_dir():
        state, kind, heads = _read_folder(path, which)
    elif path.suffix == ".safetensors":
        state, kind, heads = _read_safetensors(path)
    else:
        state, kind = _flatten(_read_pickled(path), path, which), "meta"
    names = state.keys()
    if "embeddings.patch_embeddings.weight" in names:
        state, kind = _from_hf(state), "hf"
    elif any(name.endswith(("reg_token", "attn.q_bias", "gamma_1")) for name in names):
        state, kind = _from_timm(state), "timm"
    if "patch_embed.proj.weight" not in state:
        shown = ", ".join(list(names)[:5])
        raise WeightsError(
            f"weights must hold a DINOv3 ViT backbone, got {path} with entries such as {shown}: give a "
            "backbone file, a teacher file or a checkpoint folder"
        )
    if "rope_embed.periods" not in state:
        width = int(state["patch_embed.proj.weight"].shape[0])
        if heads is None:
            heads = max(width // _HEAD_WIDTH, 1)
        state["rope_embed.periods"] = _rope_periods(width // heads)
    try:
        description = _described(state, path, kind, which)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise WeightsError(
            f"weights must hold a whole ViT backbone, got {path} without {error}: fetch the file again"
        ) from error
    return state, description


def describe(path: str | Path, *, which: str = "teacher") -> WeightsDescription:
    """Facts of a file; see `read_backbone`."""
    return read_backbone(path, which=which)[1]


def _read_pickled(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(64)
    problem = None
    if not start:
        problem = "an empty file"
    elif start.lstrip()[:1] == b"<":
        problem = "a web page or an error message, not the file itself"
    elif start.startswith(b"version https://git-lfs"):
        problem = "a pointer of git LFS, not the file itself"
    if problem is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "weights only" in problem.lower():
                problem = "no archive of tensors, or one with other objects, which are not unpickled"
    raise WeightsError(
        f"weights must be a complete file of tensors alone, got {path} ({problem}): fetch it again"
    )


def _flatten(content: Any, path: Path, which: str) -> State:
    """The backbone's entries of a possibly nested file."""
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights must be a state dict, got {path} with a {type(content).__name__}: give the state "
            "dict's file"
        )
    if which in content and isinstance(content[which], Mapping):
        content = {f"{which}.{key}": value for key, value in content[which].items()}
    for key in ("model", "state_dict"):
        if key in content and isinstance(content[key], Mapping):
            content = dict(content[key])
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(
            f"weights must be tensors by name, got {path} with {', '.join(map(str, list(content)[:5]))}: "
            f'is "{which}" in it?'
        )
    return _backbone_of(tensors, which)


def _backbone_of(tensors: Mapping[str, Tensor], which: str) -> State:
    for prefix in (*_PREFIXES[which], f"{which}.", *_COMMON_PREFIXES):
        anchors = ("patch_embed.proj.weight", "embeddings.patch_embeddings.weight")
        if any(prefix + anchor in tensors for anchor in anchors):
            return {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
    return dict(tensors)


def _read_safetensors(path: Path) -> tuple[State, str, int | None]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise WeightsError(
            f"weights must be a complete .safetensors, got {path} ({error}): fetch it again"
        ) from error
    heads = None
    config = path.with_name("config.json")
    if config.is_file():
        heads = _heads_of_hf_config(config)
    kind = "dinocell" if _HEADER in metadata or "dinocell" in metadata else "meta"
    return _backbone_of(tensors, "teacher"), kind, heads


def _read_folder(path: Path, which: str) -> tuple[State, str, int | None]:
    if (path / ".metadata").is_file():
        return _read_dcp(path, which), "checkpoint", None
    files = sorted(path.glob("*.safetensors"))
    if not files:
        nested = [
            entry for entry in ("ckpt", "sharded_teacher_checkpoint") if (path / entry).is_dir()
        ]
        hint = f": give {path / nested[0]} or a folder in it" if nested else ": check the path"
        raise WeightsError(
            f"a folder must be a checkpoint (.metadata) or Hugging Face's (*.safetensors), got {path}{hint}"
        )
    state: State = {}
    for file in files:
        state |= _read_safetensors(file)[0]
    config = path / "config.json"
    return state, "hf", _heads_of_hf_config(config) if config.is_file() else None


def _heads_of_hf_config(path: Path) -> int | None:
    try:
        heads = json.loads(path.read_text(encoding="utf-8")).get("num_attention_heads")
    except (OSError, ValueError, AttributeError):
        return None
    return heads if isinstance(heads, int) and heads > 0 else None


def _read_dcp(path: Path, which: str) -> State:
    """Only the wanted network's tensors are read, whatever the number of shards."""
    import warnings

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        reader = dcp.FileSystemReader(path)
        entries = reader.read_metadata().state_dict_metadata
        tensors = {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        prefixes = (*_PREFIXES[which], "model.backbone.", "model.")
        prefix = next(p for p in prefixes if p + "patch_embed.proj.weight" in tensors)
        wanted: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in tensors.items()
            if key.startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except StopIteration:
        raise WeightsError(
            f"a checkpoint must hold the {which}'s backbone, got {path} with entries such as "
            f"{', '.join(list(entries)[:5])}: choose the other network"
        ) from None
    except Exception as error:
        raise WeightsError(
            f"a checkpoint must be whole, got {path} ({error}): use an earlier one"
        ) from error
    return {key.removeprefix(prefix): value for key, value in wanted.items()}


# --- other programs' names ---

_HF_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
# Within a block, Meta's module → Hugging Face's.
_HF_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}
_HF_SWIGLU = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
_HF_LAYER = re.compile(r"^(?:model\.)?layer\.(\d+)\.(.+)$")


def _from_hf(state: Mapping[str, Tensor]) -> State:
    out: State = {}
    blocks: dict[int, State] = {}
    for key, value in state.items():
        match = _HF_LAYER.match(key)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = value
        elif key in _HF_FIXED:
            out[_HF_FIXED[key]] = value
        elif not key.startswith("rope_embeddings."):
            out[key] = value  # stays, to be reported as unexpected
    if "mask_token" in out:
        out["mask_token"] = out["mask_token"].reshape(1, -1)
    for index, block in sorted(blocks.items()):
        gated = "mlp.gate_proj.weight" in block
        names = {**_HF_BLOCK, **(_HF_SWIGLU if gated else {})}
        back = {theirs: ours for ours, theirs in names.items() if not (gated and ours in _MLP)}
        new: State = {}
        for key, value in block.items():
            module, _, kind = key.rpartition(".")
            if key in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
                new[f"ls{key[11]}.gamma"] = value
            elif module in back:
                new[f"{back[module]}.{kind}"] = value
            elif not re.match(r"attention\.[qkv]_proj\.", key):
                new[key] = value
        weights = [block[f"attention.{c}_proj.weight"] for c in "qkv"]
        new["attn.qkv.weight"] = torch.cat(weights)
        biases = [block.get(f"attention.{c}_proj.bias") for c in "qkv"]
        if any(bias is not None for bias in biases):
            width = weights[0].shape[0]
            zero = weights[0].new_zeros(width)
            new["attn.qkv.bias"] = torch.cat([zero if b is None else b for b in biases])
            if biases[1] is None:
                new["attn.qkv.bias_mask"] = _k_bias_mask(width)
        out |= {f"blocks.{index}.{key}": value for key, value in new.items()}
    return out


_MLP = ("mlp.fc1", "mlp.fc2")


def _to_hf(state: Mapping[str, Tensor]) -> State:
    back = {ours: theirs for theirs, ours in _HF_FIXED.items()}
    out: State = {}
    for key, value in state.items():
        if key in back:
            out[back[key]] = value[None] if key == "mask_token" else value
        elif key.startswith("blocks."):
            _, index, rest = key.split(".", 2)
            out |= {
                f"layer.{index}.{name}": v for name, v in _block_to_hf(rest, value, state, index)
            }
        elif key != "rope_embed.periods":
            raise WeightsError(
                f"Hugging Face's DINOv3 must have no {key}, got it: this backbone has flags that the "
                "released ones lack"
            )
    return out


def _block_to_hf(
    rest: str, value: Tensor, state: Mapping[str, Tensor], index: str
) -> list[tuple[str, Tensor]]:
    module, _, kind = rest.rpartition(".")
    if rest.startswith("ls"):
        return [(f"layer_scale{rest[2]}.lambda1", value)]
    if rest == "attn.qkv.bias_mask":
        return []
    if module == "attn.qkv":
        parts = list(zip("qkv", value.chunk(3), strict=True))
        masked = f"blocks.{index}.attn.qkv.bias_mask" in state
        if kind == "bias" and (masked or not parts[1][1].any()):
            parts.pop(1)  # theirs has no bias on k
        return [(f"attention.{c}_proj.{kind}", part.clone()) for c, part in parts]
    names = {**_HF_BLOCK, **_HF_SWIGLU}
    return [(f"{names[module]}.{kind}", value)]


_TIMM_BLOCK = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2"}


def _from_timm(state: Mapping[str, Tensor]) -> State:
    out: State = {}
    gated = any("mlp.fc1_g" in key for key in state)
    for key, value in state.items():
        if key == "reg_token":
            out["storage_tokens"] = value
        elif match := re.match(r"^(blocks\.\d+\.)gamma_([12])$", key):
            out[f"{match[1]}ls{match[2]}.gamma"] = value
        elif key.endswith(("attn.q_bias", "attn.v_bias", "attn.k_bias")):
            continue
        else:
            for theirs, ours in _TIMM_BLOCK.items():
                key = key.replace(theirs, ours)
            out[key.replace("mlp.fc2", "mlp.w3") if gated else key] = value
    for key in [key for key in out if key.endswith("attn.qkv.weight")]:
        stem = key.removesuffix("qkv.weight")
        width = out[key].shape[1]
        zero = out[key].new_zeros(width)
        biases = [state.get(f"{stem}{c}_bias", zero) for c in "qkv"]
        if f"{stem}qkv.bias" not in out:
            out[f"{stem}qkv.bias"] = torch.cat(biases)
            out[f"{stem}qkv.bias_mask"] = _k_bias_mask(width)
    return out


def _to_timm(state: Mapping[str, Tensor]) -> State:
    out: State = {}
    for key, value in state.items():
        if key in ("mask_token", "rope_embed.periods") or key.endswith("bias_mask"):
            continue  # timm's has none
        if key == "storage_tokens":
            out["reg_token"] = value
        elif key.startswith(("cls_norm.", "local_cls_norm.")):
            raise WeightsError(
                f"timm's DINOv3 must have no {key}, got it: this backbone has flags that the released "
                "ones lack"
            )
        elif match := re.match(r"^(blocks\.\d+\.)ls([12])\.gamma$", key):
            out[f"{match[1]}gamma_{match[2]}"] = value
        elif key.endswith("attn.qkv.bias"):
            stem = key.removesuffix("qkv.bias")
            q, k, v = value.chunk(3)
            if k.any() and f"{stem}qkv.bias_mask" not in state:
                raise WeightsError(
                    f"timm's DINOv3 must have no bias on k, got one in {key}: keep another format"
                )
            out[f"{stem}q_bias"], out[f"{stem}v_bias"] = q.clone(), v.clone()
        else:
            for theirs, ours in (*_TIMM_BLOCK.items(), ("mlp.fc2", "mlp.w3")):
                key = key.replace(ours, theirs)
            out[key] = value
    return out


def _k_bias_mask(width: int) -> Tensor:
    mask = torch.ones(3 * width)
    mask[width : 2 * width] = 0
    return mask


def _rope_periods(head_width: int) -> Tensor:
    """base^(2 j / (head_width / 2)), j = 0 .. head_width / 4 - 1 (RoFormer, section 3.2.2)."""
    steps = torch.arange(head_width // 4, dtype=torch.float32)
    return _ROPE_BASE ** (2 * steps / (head_width // 2))


def _described(state: State, path: Path, kind: str, which: str) -> WeightsDescription:
    kernel = state["patch_embed.proj.weight"]
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    first = "blocks.0."
    swiglu = f"{first}mlp.w1.weight" in state
    hidden = state[f"{first}mlp.{'w1' if swiglu else 'fc1'}.weight"].shape[0]
    width = int(kernel.shape[0])
    buffers = ("rope_embed.periods", "bias_mask")
    storage = state.get("storage_tokens")
    return WeightsDescription(
        path=str(path),
        format=kind,
        which=which,
        embed_dim=width,
        depth=depth,
        num_heads=width // (4 * state["rope_embed.periods"].numel()),
        patch_size=patch_size_of(state),
        in_chans=int(kernel.shape[1]),
        ffn="swiglu" if swiglu else "mlp",
        ffn_hidden=int(hidden),
        n_storage_tokens=0 if storage is None else int(storage.shape[1]),
        mask_k_bias=f"{first}attn.qkv.bias_mask" in state,
        layerscale=f"{first}ls1.gamma" in state,
        untied_norms=tuple(n for n in ("cls_norm", "local_cls_norm") if f"{n}.weight" in state),
        qkv_bias=f"{first}attn.qkv.bias" in state,
        num_parameters=sum(v.numel() for k, v in state.items() if not k.endswith(buffers)),
        dtype=str(kernel.dtype).removeprefix("torch."),
    )


def vit_arguments(description: WeightsDescription) -> dict[str, Any]:
    """Arguments of `DinoVisionTransformer` for a described backbone, with the released settings.

    What a file does not tell is taken from the released ViTs: RoPE in float32, norm eps 1e-5.
    """
    d = description
    arguments: dict[str, Any] = {
        "patch_size": d.patch_size,
        "in_chans": d.in_chans,
        "embed_dim": d.embed_dim,
        "depth": d.depth,
        "num_heads": d.num_heads,
        "qkv_bias": d.qkv_bias,
        "mask_k_bias": d.mask_k_bias,
        "layerscale_init": 1e-5 if d.layerscale else None,
        "n_storage_tokens": d.n_storage_tokens,
        "norm_layer": "layernormbf16",
        "pos_embed_rope_dtype": "fp32",
        "untie_cls_and_patch_norms": "cls_norm" in d.untied_norms,
        "untie_global_and_local_cls_norm": "local_cls_norm" in d.untied_norms,
    }
    if d.ffn == "swiglu":
        # Any ratio whose two thirds, rounded up to eights, give this width.
        return arguments | {"ffn_layer": "swiglu", "ffn_ratio": d.ffn_hidden * 1.5 / d.embed_dim}
    return arguments | {"ffn_layer": "mlp", "ffn_ratio": d.ffn_hidden / d.embed_dim}


# --- loading ---


def load_backbone(
    vit: nn.Module,
    path: str | Path,
    *,
    which: str = "teacher",
    patch_method: str = "nearest",
) -> LoadReport:
    """Fill a `DinoVisionTransformer` from any file that `read_backbone` reads.

    The patch size may differ; see `patch_size_adaptation`.  What a format does not have (mask token,
    RoPE periods, mask of the k bias) is filled in and noted; anything else must be there exactly.

    Args:
        vit: on any device; values are copied in its types.
        which: "teacher" or "student".
        patch_method: one of `patch_size_adaptation.METHODS`.

    Raises:
        FileNotFoundError, WeightsError: as `read_backbone`; also missing, unexpected and misshapen
            entries, all listed.
    """
    state, description = read_backbone(path, which=which)
    expected = vit.state_dict()
    notes = []
    patch_size = int(expected["patch_embed.proj.weight"].shape[2])
    state, adaptation = adapt_state_dict(state, patch_size, patch_method)
    if adaptation is not None:
        notes.append(str(adaptation))
    if "mask_token" in expected and "mask_token" not in state:
        state["mask_token"] = torch.zeros(expected["mask_token"].shape)
        notes.append("mask token absent: zeros")
    masked = [key for key in state if key.endswith("bias_mask") and key not in expected]
    for key in masked:  # the network has a plain bias: the masked one is the same with k at zero
        bias = key.removesuffix("_mask")
        state[bias] = state[bias] * state.pop(key).to(state[bias].dtype)
    if masked:
        notes.append("masked k bias written as zeros")
    unmasked = [key for key in expected if key.endswith("bias_mask") and key not in state]
    for key in unmasked:
        k_bias = state.get(key.removesuffix("_mask"), torch.zeros(3)).chunk(3)[1]
        if k_bias.any():
            raise WeightsError(
                f"a network with mask_k_bias must get weights without a bias on k, got one in {path}: "
                "set student.mask_k_bias to false"
            )
        state[key] = _k_bias_mask(expected[key].shape[0] // 3)
    if unmasked:
        notes.append("mask of the k bias recomputed")
    problems = {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected
            if key in state and state[key].shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        raise WeightsError(
            f"weights must fit the network, got {description.name} from {path} ({shown}): set the "
            "network's size and flags to those of the file"
        )
    vit.load_state_dict(state)
    return LoadReport(description, description.patch_size, patch_size, tuple(notes))


# --- writing ---


def write_backbone(
    state: Mapping[str, Tensor], path: str | Path, format: str, *, overwrite: bool = False
) -> Path:
    """Write a backbone; whole or not at all.

    Args:
        state: in Meta's names, as `read_backbone` gives.
        path: a file (meta: `.pth`; dinocell: `.safetensors`; timm: either; hf: `.safetensors`, or a
            folder that gets `config.json` too).
        format: one of `FORMATS`.
        overwrite: replace what is there.

    Returns:
        The path that was written.

    Raises:
        FileExistsError: it is there, and `overwrite` is false.
        WeightsError: unknown format, wrong suffix, or flags that the format cannot hold.
    """
    path = Path(path)
    if format not in FORMATS:
        raise WeightsError(
            f"the format must be one of {', '.join(FORMATS)}, got {format!r}: choose one"
        )
    suffixes = {
        "meta": (".pth", ".pt"),
        "dinocell": (".safetensors",),
        "timm": (".safetensors", ".pth", ".pt", ".bin"),
        "hf": (".safetensors", ""),
    }[format]
    if path.suffix not in suffixes:
        known = " or ".join(s or "a folder" for s in suffixes)
        raise WeightsError(f"the output of format {format} must be {known}, got {path}: rename it")
    if path.exists() and not overwrite:
        raise FileExistsError(f"the output must not be there, got {path}: add --overwrite")
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    description = _described(dict(plain), path, format, "teacher")
    if format == "hf":
        plain = _to_hf(plain)
    elif format == "timm":
        plain = _to_timm(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    _remove(part)
    try:
        if path.suffix == "":
            part.mkdir()
            _save_safetensors(plain, part / "model.safetensors", description)
            config = json.dumps(_hf_config(description), indent=2)
            (part / "config.json").write_text(config + "\n", encoding="utf-8")
        elif path.suffix == ".safetensors":
            _save_safetensors(plain, part, description)
        else:
            torch.save(plain, part)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    except BaseException:
        _remove(part)
        raise
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _save_safetensors(state: State, path: Path, description: WeightsDescription) -> None:
    from safetensors.torch import save_file

    facts = asdict(description)
    facts.pop("path")
    save_file(state, path, metadata={"format": "pt", _HEADER: json.dumps(facts)})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library writes files that only their owner can read


def _hf_config(d: WeightsDescription) -> dict[str, Any]:
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
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "rope_theta": _ROPE_BASE,
        "layer_norm_eps": 1e-5,
        "dtype": d.dtype,
    }


def sha256(path: str | Path) -> str:
    """Checksum of a file, in hexadecimal."""
    value = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(2**20):
            value.update(block)
    return value.hexdigest()
