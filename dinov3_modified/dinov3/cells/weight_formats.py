"""Backbone weights of any DINOv3 file, in and out (ours).

Read: Meta's backbone file; teacher files and checkpoints of a training run, student or teacher,
plain or sharded; Hugging Face; timm; DINOCell's models.  Written: Meta's, Hugging Face's, timm's and
a `.safetensors` with Meta's names.  Inside, a backbone is a complete state dict in Meta's names.

Nothing is unpickled but tensors, and the table of contents of a DCP folder by a reader that knows
its few classes only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from dinov3.cells.files import move_into_place
from dinov3.checkpointer.patch_size_adaptation import adapt_state_dict, patch_size_of

logger = logging.getLogger("dinov3")

__all__ = [
    "FORMATS",
    "CheckpointReader",
    "LoadReport",
    "WeightsDescription",
    "WeightsError",
    "describe",
    "fit_backbone",
    "load_backbone",
    "read_backbone",
    "sha256",
    "vit_arguments",
    "write_backbone",
]

State = dict[str, Tensor]

FORMATS = ("meta", "hf", "timm", "dinocell")
SHOWN = 12  # keys of each kind in a message
_HEADER = "dinov3_backbone"
_ROPE_BASE = 100.0
# Heads of a width where the file does not say; others have heads 64 wide, as all smaller releases.
_HEADS = {1536: 24, 4096: 32}
_KERNEL = "patch_embed.proj.weight"
# The kernel of the patch embedding in Meta's and timm's files, and in Hugging Face's.
_ANCHORS = (_KERNEL, "embeddings.patch_embeddings.weight")
# What tells the networks of a file apart: a part of the name → the network.
_NETWORKS = {
    "teacher": "teacher",
    "model_ema": "ema",
    "ema": "ema",
    "averaged": "ema",
    "student": "student",
    "gram_teacher": "gram",
}
# Which of them may stand for what is asked for, best first; None: the file holds one network.
_ANSWERS: dict[str, tuple[str | None, ...]] = {
    "teacher": ("teacher", "ema", None),
    "student": ("student", None),
}
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class WeightsError(ValueError):
    """A file that is no backbone, or does not fit.

    Attributes:
        problems: all keys by kind ("missing", "unexpected", "misshapen"), of which the message shows
            the first.
    """

    def __init__(self, message: str, problems: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(message)
        self.problems = dict(problems or {})


@dataclass(frozen=True)
class WeightsDescription:
    """Facts of a backbone file.

    Attributes:
        path, format: where from; a run's files and folders have the format "checkpoint".
        which: "teacher", "ema" or "student" of a file with several networks, else None.
        embed_dim, depth, num_heads, patch_size, in_chans, ffn, ffn_hidden: the shape; `ffn` is "mlp"
            or "swiglu".
        n_storage_tokens, mask_k_bias, layerscale, untied_norms, qkv_bias, proj_bias, ffn_bias, norm:
            the flags; `norm` is "layernorm" or "rmsnorm".
        rope_base: of the periods; None where they are of another form.
        num_parameters: without buffers.
        dtype: of the patch embedding.
        heads_known: whether the file tells the number of heads; otherwise it is a guess.
        notes: what the file lacks and was filled in.
        sha256: of a single file, where asked for.
    """

    path: str
    format: str
    which: str | None
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
    proj_bias: bool
    ffn_bias: bool
    norm: str
    rope_base: float | None
    num_parameters: int
    dtype: str
    heads_known: bool = True
    notes: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def name(self) -> str:
        """Such as ViT-S/16."""
        sizes = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1152: "So400M", 1280: "H", 4096: "7B"}
        plus = "+" if self.ffn == "swiglu" and self.embed_dim <= 1280 else ""
        return f"ViT-{sizes.get(self.embed_dim, self.embed_dim)}{plus}/{self.patch_size}"

    @property
    def flags(self) -> str:
        """What a network must be told beside its size, in words."""
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


@dataclass(frozen=True)
class LoadReport:
    """What `load_backbone` did.

    Attributes:
        description: of the file.
        patch_size_before, patch_size: of the file and of the network.
        notes: what was filled in, left out or adapted.
    """

    description: WeightsDescription
    patch_size_before: int
    patch_size: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        d = self.description
        network = f"{d.which}, " if d.which else ""
        text = f"{d.path} ({network}{d.name}, {d.format} format, {d.num_parameters / 1e6:.1f} M parameters)"
        return "; ".join([text, *self.notes])


@dataclass(frozen=True)
class _Found:
    """Tensors of one network as they lie in the file, and what the file tells beside them."""

    state: State
    format: str
    which: str | None = None
    heads: int | None = None
    rope_base: float | None = None


# --- reading ---


def read_backbone(path: str | Path, *, which: str = "teacher") -> tuple[State, WeightsDescription]:
    """The backbone of a file or folder, complete and in Meta's names.

    Formats are told apart by content, not by name.  What a format does not have is filled in: a mask
    token of zeros, the RoPE periods, the mask of the k bias.

    Args:
        path: `.pth`, `.safetensors`, a folder of Hugging Face, or a DCP folder of a run.
        which: "teacher" or "student", of a file that holds both.

    Returns:
        State dict on the CPU in the types of the file, and its description.

    Raises:
        FileNotFoundError: nothing is there.
        WeightsError: it is no whole backbone of a DINOv3 ViT; the keys are listed.
    """
    if which not in _ANSWERS:
        raise WeightsError(f"which must be teacher or student, got {which!r}: choose one")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"weights must be a file or a folder, got {path}: check the path")
    found = _read_folder(path, which) if path.is_dir() else _read_file(path, which)
    state, kind = found.state, found.format
    if any(name.endswith("pos_embed") or "position_embeddings" in name for name in state):
        raise WeightsError(
            f"weights must be of a DINOv3 ViT, got {path} with learned position embeddings: this is "
            "another network, such as DINOv2"
        )
    if _ANCHORS[1] in state:
        state, kind = _from_hf(state), "hf"
    elif any(re.search(r"(^reg_token|attn\.[qv]_bias|\.gamma_[12])$", name) for name in state):
        state, kind = _from_timm(state), "timm"
    broken = [
        key for key, v in state.items() if v.is_floating_point() and not torch.isfinite(v).all()
    ]
    if broken:
        raise WeightsError(
            f"weights must be finite numbers, got NaN or infinity in {_listed(broken)} of {path}: the "
            "run diverged, take an earlier checkpoint"
        )
    notes = []
    width = int(state[_KERNEL].shape[0])
    if "mask_token" not in state:
        state["mask_token"] = state[_KERNEL].new_zeros(1, width)
        notes.append("mask token absent: zeros")
    heads_known = True
    if "rope_embed.periods" not in state:
        heads_known = found.heads is not None
        heads = found.heads or _HEADS.get(width, max(width // 64, 1))
        base = found.rope_base or _ROPE_BASE
        state["rope_embed.periods"] = _rope_periods(width // heads, base)
        guess = "" if heads_known else f", {heads} heads assumed"
        notes.append(f"RoPE periods absent: computed from base {base:g}{guess}")
    description = replace(
        _described(state, path, kind),
        which=found.which,
        heads_known=heads_known,
        notes=tuple(notes),
    )
    _refuse(
        _differences(state, _expected_shapes(description)),
        f"weights must be a whole DINOv3 ViT backbone, got {path}",
        "fetch or convert it again",
    )
    return state, description


def describe(
    path: str | Path, *, which: str = "teacher", checksum: bool = False
) -> WeightsDescription:
    """Facts of a file; see `read_backbone`.

    Args:
        checksum: add the SHA-256 of a single file.
    """
    description = read_backbone(path, which=which)[1]
    if checksum and Path(path).is_file():
        return replace(description, sha256=sha256(path))
    return description


def sha256(path: str | Path) -> str:
    """Checksum of a file, in hexadecimal."""
    value = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(2**20):
            value.update(block)
    return value.hexdigest()


def _read_file(path: Path, which: str) -> _Found:
    with path.open("rb") as stream:
        start = stream.read(64)
    page = start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs")
    named = path.suffix == ".safetensors" and start and start[:2] != b"PK"
    if not page and (named or start[8:9] == b"{"):
        return _read_safetensors(path, which)
    content = _read_pickled(path, start)
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"weights must be a state dict, got {path} with a {type(content).__name__}: save the "
            "state dict alone"
        )
    tensors = dict(_flat(content))
    prefix, network = _network_prefix(tensors, which, path)
    heads, base = _hf_facts(path.with_name("config.json"))
    kind = "meta" if network is None else "checkpoint"
    return _Found(_under(tensors, prefix), kind, network, heads, base)


def _read_pickled(path: Path, start: bytes) -> Any:
    problem, advice = None, "fetch it again"
    if not start:
        problem = "an empty file"
    elif start.lstrip()[:1] == b"<":
        problem = "a web page or an error message, not the file itself"
    elif start.startswith(b"version https://git-lfs"):
        problem = "a pointer of git LFS, not the file itself"
    elif start[:2] != b"PK" and start[:1] != b"\x80":
        problem = "neither a PyTorch archive nor a .safetensors"
    if problem is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            problem = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "weights only" in problem.lower() or "weights_only" in problem:
                problem = "with other objects, which are not unpickled"
                advice = "save its state dict alone, with the program that made it"
            else:
                problem = f"cut short or damaged: {problem}"
    raise WeightsError(
        f"weights must be a complete file of tensors alone, got {path} ({problem}): {advice}"
    )


def _flat(content: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their dotted names."""
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")


def _plain_name(name: str) -> str:
    """Without the parts that torch.compile, activation checkpointing and FSDP add."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _under(tensors: Mapping[str, Tensor], prefix: str) -> State:
    """The entries below a prefix, by their names without it."""
    plain = {_plain_name(name): value for name, value in tensors.items()}
    return {
        name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)
    }


def _network_prefix(names: Iterable[str], which: str, path: Path) -> tuple[str, str | None]:
    """Where the wanted network's backbone begins, and which network it is."""
    plain = [_plain_name(name) for name in names]
    found: dict[str | None, list[str]] = {}
    for name in plain:
        for anchor in _ANCHORS:
            if name == anchor or name.endswith(f".{anchor}"):
                prefix = name.removesuffix(anchor)
                parts = [_NETWORKS[part] for part in prefix.split(".") if part in _NETWORKS]
                found.setdefault(parts[0] if parts else None, []).append(prefix)
    for network in _ANSWERS[which]:
        if network in found:
            return min(found[network], key=lambda prefix: (len(prefix), prefix)), network
    if found:
        others = ", ".join(str(network) for network in found)
        raise WeightsError(
            f"weights must hold the {which}'s backbone, got {path} with that of the {others} only: "
            "choose the other network"
        )
    shown = f"entries such as {', '.join(plain[:5])}" if plain else "no tensor"
    raise WeightsError(
        f"weights must hold a DINOv3 ViT backbone, got {path} with {shown}: give a backbone file, a "
        "teacher file or a checkpoint folder"
    )


def _read_safetensors(path: Path, which: str) -> _Found:
    tensors, metadata = _open_safetensors(path)
    prefix, network = _network_prefix(tensors, which, path)
    heads, base = _hf_facts(path.with_name("config.json"))
    kind = "dinocell" if _HEADER in metadata or "dinocell" in metadata else "meta"
    return _Found(_under(tensors, prefix), kind, network, heads, base)


def _open_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise WeightsError(
            f"weights must be a complete .safetensors, got {path} ({error}): fetch it again"
        ) from error


def _read_folder(path: Path, which: str) -> _Found:
    if (path / ".metadata").is_file():
        return _read_dcp(path, which)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise WeightsError(
            "a folder must be a checkpoint (.metadata) or Hugging Face's (*.safetensors), "
            f"got {path}: {_folder_hint(path)}"
        )
    tensors: State = {}
    for file in files:
        if file.stat().st_size == 0:
            raise WeightsError(
                f"weights must be complete, got the empty file {file}: fetch it again"
            )
        tensors |= _open_safetensors(file)[0]
    prefix, network = _network_prefix(tensors, which, path)
    heads, base = _hf_facts(path / "config.json")
    return _Found(_under(tensors, prefix), "meta", network, heads, base)


def _folder_hint(path: Path) -> str:
    """What in the folder of a run was probably meant."""
    numbers = [p for p in path.iterdir() if p.name.isdecimal() and (p / ".metadata").is_file()]
    if numbers:
        return f"give one of its checkpoints, such as {max(numbers, key=lambda p: int(p.name))}"
    for name in ("sharded_teacher_checkpoint", "teacher_checkpoint.pth", "ckpt"):
        if (path / name).exists():
            return f"give {path / name}" + (" or rather a folder in it" if name == "ckpt" else "")
    return "check the path"


def _hf_facts(path: Path) -> tuple[int | None, float | None]:
    """Heads and RoPE base from Hugging Face's `config.json`; None where it does not tell."""
    if not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"config.json beside weights must be JSON, got {path} ({error}): fetch it again"
        ) from error
    if not isinstance(config, dict) or config.get("model_type") not in (None, "dinov3_vit"):
        return None, None  # of something else that lies in the same folder
    heads = config.get("num_attention_heads")
    base = config.get("rope_theta", (config.get("rope_parameters") or {}).get("rope_theta"))
    return (
        heads if isinstance(heads, int) and heads > 0 else None,
        float(base) if isinstance(base, (int, float)) and base > 0 else None,
    )


# --- DCP folders ---

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Builds the few classes of a DCP table of contents, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch":
            value = getattr(torch, name, None)
            if value is torch.Size or isinstance(value, (torch.dtype, torch.layout)):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")


class CheckpointReader(dcp.FileSystemReader):
    """torch's reader of DCP folders, which unpickles the table of contents without foreign code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents.

        Raises:
            pickle.UnpicklingError: it holds other objects.
        """
        with Path(self._get_metadata_path(kwargs.get("rank"))).open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("the table of contents is no DCP metadata")
        storage = getattr(metadata, "storage_meta", None) or StorageMeta()
        storage.load_id = self.load_id
        metadata.storage_meta = storage
        return metadata


def _read_dcp(path: Path, which: str) -> _Found:
    """Only the wanted network's tensors are read, whatever the number of shards."""
    try:
        reader = CheckpointReader(path)
        entries = reader.read_metadata().state_dict_metadata
        tensors = {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        prefix, network = _network_prefix(tensors, which, path)
        wanted: dict[str, Any] = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in tensors.items()
            if _plain_name(key).startswith(prefix)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=reader, no_dist=True)
    except WeightsError:
        raise
    except Exception as error:
        reason: BaseException = error
        if isinstance(error, dcp.api.CheckpointException) and error.failures:
            reason = next(iter(error.failures.values()))[0]
        text = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise WeightsError(
            f"a checkpoint must be whole, got {path} ({text}): use an earlier one"
        ) from error
    return _Found(_under(wanted, prefix), "checkpoint", network)


# --- other programs' names ---

_HF_FIXED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.patch_embeddings.weight": _KERNEL,
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
_HF_LAYER = re.compile(r"^(?:model\.)?layer\.(\d+)\.(.+)$")
_TIMM_SWIGLU = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.w3": "mlp.fc2"}


def _from_hf(state: Mapping[str, Tensor]) -> State:
    """Names that are not known stay, to be reported."""
    gated = any(key.endswith("mlp.gate_proj.weight") for key in state)
    modules = {
        theirs: ours
        for ours, theirs in {**_HF_BLOCK, **_HF_FFN["swiglu" if gated else "mlp"]}.items()
    }
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
        out |= _joined_bias(block, {c: parts.get(f"{c}.bias") for c in "qkv"})
    return out


def _joined_bias(block: str, biases: Mapping[str, Tensor | None]) -> State:
    """The bias of q, k and v in one, and its mask where k has none."""
    known = [bias for bias in biases.values() if bias is not None]
    if not known:
        return {}
    zero = torch.zeros_like(known[0])
    out = {f"{block}attn.qkv.bias": torch.cat([zero if b is None else b for b in biases.values()])}
    if biases["k"] is None:
        out[f"{block}attn.qkv.bias_mask"] = _k_bias_mask(zero.numel())
    return out


def _from_timm(state: Mapping[str, Tensor]) -> State:
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
        out |= _joined_bias(block, parts)
    return out


def _to_hf(state: Mapping[str, Tensor], d: WeightsDescription) -> tuple[State, list[str]]:
    notes = _refuse_foreign_flags(d, "Hugging Face")
    back = {ours: theirs for theirs, ours in _HF_FIXED.items()}
    modules = {**_HF_BLOCK, **_HF_FFN[d.ffn]}
    k_bias = _has_k_bias(state)
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
        for block in range(d.depth):
            for number in (1, 2):
                one = state["cls_token"].new_ones(d.embed_dim)
                out[f"layer.{block}.layer_scale{number}.lambda1"] = one
        notes.append("LayerScale absent: ones")
    return out, notes


def _to_timm(state: Mapping[str, Tensor], d: WeightsDescription) -> tuple[State, list[str]]:
    notes = _refuse_foreign_flags(d, "timm")
    if d.rope_base != _ROPE_BASE:
        raise WeightsError(
            f"timm's DINOv3 must have a RoPE base of {_ROPE_BASE:g}, got {d.rope_base:g} in {d.path}: "
            "keep another format"
        )
    if _has_k_bias(state):
        raise WeightsError(
            f"timm's DINOv3 must have no bias on k, got one in {d.path}: keep another format"
        )
    if state["mask_token"].any():
        notes.append("timm has no mask token: left out")
    out: State = {}
    for key, value in state.items():
        if key in ("mask_token", "rope_embed.periods"):
            continue
        if key.endswith("bias_mask") or key.startswith("local_cls_norm."):
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
        for index in range(d.depth):
            for number in (1, 2):
                out[f"blocks.{index}.gamma_{number}"] = state["cls_token"].new_ones(d.embed_dim)
        notes.append("LayerScale absent: ones")
    return out, notes


def _refuse_foreign_flags(d: WeightsDescription, program: str) -> list[str]:
    """What another program's DINOv3 cannot hold; returns what it may lose."""
    problem = None
    if "cls_norm" in d.untied_norms:
        problem = "no cls_norm, got one"
    elif d.norm != "layernorm":
        problem = f"layer norms, got {d.norm}"
    elif d.rope_base is None:
        problem = "RoPE periods base^(2 j / n), got others"
    if problem is not None:
        raise WeightsError(
            f"{program}'s DINOv3 must have {problem} in {d.path}: keep another format"
        )
    if "local_cls_norm" in d.untied_norms:
        return [f"{program} has no local_cls_norm, which acts in training only: left out"]
    return []


def _has_k_bias(state: Mapping[str, Tensor]) -> bool:
    return any(
        bool(value.chunk(3)[1].any()) and f"{key}_mask" not in state
        for key, value in state.items()
        if key.endswith("attn.qkv.bias")
    )


def _k_bias_mask(width: int) -> Tensor:
    mask = torch.ones(3 * width)
    mask[width : 2 * width] = 0
    return mask


def _rope_periods(head_width: int, base: float) -> Tensor:
    """base^(2 j / (head_width / 2)), j = 0 .. head_width / 4 - 1 (RoFormer, section 3.2.2)."""
    steps = torch.arange(head_width // 4, dtype=torch.float32)
    return base ** (2 * steps / (head_width // 2))


def _rope_base(periods: Tensor) -> float | None:
    """The base that gives these periods, within their rounding to 16 bits; None if none does."""
    n = periods.numel()
    values = periods.double()
    powers = torch.arange(n, dtype=torch.float64) / max(n, 1)
    if torch.allclose(values, _ROPE_BASE**powers, rtol=8e-3, atol=0):
        return _ROPE_BASE
    base = float(values[-1]) ** (n / (n - 1)) if n > 1 else 0.0
    if base > 0 and torch.allclose(values, base**powers, rtol=8e-3, atol=0):
        return float(f"{base:.4g}")
    return None


# --- what a backbone is made of ---


def _described(state: Mapping[str, Tensor], path: Path, kind: str) -> WeightsDescription:
    indices = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in state) if m]
    depth = 1 + max(indices, default=-1)

    def in_blocks(name: str) -> Tensor | None:
        """The first block's that has it, so that one missing entry misleads nobody."""
        values = (state.get(f"blocks.{index}.{name}") for index in range(depth))
        return next((value for value in values if value is not None), None)

    kernel = state[_KERNEL]
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


def _expected_shapes(d: WeightsDescription) -> dict[str, tuple[int, ...]]:
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
        _KERNEL: (width, d.in_chans, d.patch_size, d.patch_size),
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
        if d.ffn == "swiglu":
            out |= linear(f"{block}mlp.w1", hidden, width, d.ffn_bias)
            out |= linear(f"{block}mlp.w2", hidden, width, d.ffn_bias)
            out |= linear(f"{block}mlp.w3", width, hidden, d.ffn_bias)
        else:
            out |= linear(f"{block}mlp.fc1", hidden, width, d.ffn_bias)
            out |= linear(f"{block}mlp.fc2", width, hidden, d.ffn_bias)
    for name in ("norm", *d.untied_norms):
        out |= norm(name)
    return out


def _differences(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    return {
        "missing": [key for key in expected if key not in state],
        "unexpected": [key for key in state if key not in expected],
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != tuple(shape)
        ],
    }


def _refuse(problems: Mapping[str, list[str]], fact: str, advice: str) -> None:
    if any(problems.values()):
        shown = "; ".join(
            f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in problems.items() if keys
        )
        raise WeightsError(f"{fact} ({shown}): {advice}", problems)


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


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
        "proj_bias": d.proj_bias,
        "ffn_bias": d.ffn_bias,
        "mask_k_bias": d.mask_k_bias,
        "layerscale_init": 1e-5 if d.layerscale else None,
        "n_storage_tokens": d.n_storage_tokens,
        "norm_layer": "rmsnorm" if d.norm == "rmsnorm" else "layernormbf16",
        "pos_embed_rope_base": d.rope_base or _ROPE_BASE,
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

    Args:
        vit: with storage, on any device, not sharded; values are copied in its types.
        which, patch_method: see `fit_backbone`.

    Raises:
        FileNotFoundError, WeightsError: as `fit_backbone`.
    """
    state, report = fit_backbone(vit.state_dict(), path, which=which, patch_method=patch_method)
    vit.load_state_dict(state)
    return report


def fit_backbone(
    expected: Mapping[str, Tensor],
    path: str | Path,
    *,
    which: str = "teacher",
    patch_method: str = "nearest",
) -> tuple[State, LoadReport]:
    """The state dict that a file gives a network.

    The patch size may differ; see `patch_size_adaptation`.  Beside what `read_backbone` fills in, a
    plain and a masked k bias, and a zero and an absent qkv bias, are exchanged where that is exact;
    everything is noted.  Anything else must be there exactly.

    Args:
        expected: the network's own state dict, sharded or not; its shapes count.
        which: "teacher" or "student".
        patch_method: one of `patch_size_adaptation.METHODS`.

    Returns:
        Whole tensors on the CPU in the types of the file, and what was done.

    Raises:
        FileNotFoundError, WeightsError: as `read_backbone`; also missing, unexpected and misshapen
            entries, all listed.
    """
    if any(value.is_meta for value in expected.values()):
        raise WeightsError(
            "a network must have storage before weights are loaded, got one on the meta device: call "
            "to_empty first"
        )
    state, description = read_backbone(path, which=which)
    notes = list(description.notes)
    patch_size = int(expected[_KERNEL].shape[2])
    state, adaptation = adapt_state_dict(state, patch_size, patch_method)
    if adaptation is not None:
        notes.append(str(adaptation))
    periods = expected["rope_embed.periods"]
    if not description.heads_known and description.rope_base is not None:
        # The file does not tell its heads, so the network's own number is right.
        state["rope_embed.periods"] = _rope_periods(4 * periods.numel(), description.rope_base)
        notes = [re.sub(r", \d+ heads assumed$", "", note) for note in notes]
    notes += _exchange_biases(state, expected, path)
    _refuse(
        _differences(state, {key: tuple(value.shape) for key, value in expected.items()}),
        f"weights must fit the network, got {description.name} ({description.flags}) from {path}",
        "set the network's size and flags to those of the file",
    )
    return state, LoadReport(description, description.patch_size, patch_size, tuple(notes))


def _exchange_biases(state: State, expected: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Bring the qkv biases into the network's form where both say the same."""
    notes = set()
    for key in [key for key in expected if key.endswith("attn.qkv.bias") and key not in state]:
        if key.replace("bias", "weight") in state:
            state[key] = torch.zeros(expected[key].shape)
            notes.add("qkv bias absent: zeros")
    for key in [key for key in state if key.endswith("attn.qkv.bias_mask") and key not in expected]:
        bias = key.removesuffix("_mask")
        if bias in state:
            state[bias] = state[bias] * state.pop(key).to(state[bias].dtype)
            notes.add("masked k bias written as zeros")
    for key in [key for key in state if key.endswith("attn.qkv.bias") and key not in expected]:
        if not state[key].any():
            del state[key]
            notes.add("qkv bias of zeros left out")
    for key in [key for key in expected if key.endswith("attn.qkv.bias_mask") and key not in state]:
        bias = key.removesuffix("_mask")
        if bias in state and state[bias].chunk(3)[1].any():
            raise WeightsError(
                f"a network with mask_k_bias must get weights without a bias on k, got one in {path}: "
                "build the network with mask_k_bias false (student.mask_k_bias in training)"
            )
        state[key] = _k_bias_mask(expected[key].shape[0] // 3)
        notes.add("mask of the k bias recomputed")
    return sorted(notes)


# --- writing ---


def write_backbone(
    state: Mapping[str, Tensor],
    path: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    notes: list[str] | None = None,
) -> Path:
    """Write a backbone; each file whole or not at all.

    Format "dinocell" is a `.safetensors` with Meta's names and a JSON header, key `dinov3_backbone`,
    that describes the architecture; a DINOCell *model* also has a decoder, which fine-tuning makes.

    Args:
        state: in Meta's names, as `read_backbone` gives.
        path: a file (meta: `.pth`; dinocell: `.safetensors`; timm: either; hf: `.safetensors`, or a
            folder that gets `config.json` too).
        format: one of `FORMATS`.
        overwrite: replace what is there; of a folder only the two files are.
        notes: a list that gets what the format has no place for; without one the log says it.

    Returns:
        The path that was written.

    Raises:
        FileExistsError: it is there, and `overwrite` is false.
        WeightsError: unknown format, wrong suffix, no whole backbone, or flags that the format
            cannot hold.
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
    folder = path.suffix == ""
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(f"the output must be a folder, got the file {path}: rename it")
    targets = [path / "model.safetensors", path / "config.json"] if folder else [path]
    if not folder and path.is_dir():
        raise FileExistsError(f"the output must be a file, got the folder {path}: rename it")
    there = [target for target in targets if target.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"the output must not be there, got {there[0]}: choose another name, or overwrite it (--overwrite)"
        )
    if folder:
        others = [file for file in path.glob("*.safetensors") if file != targets[0]]
        if others:
            raise FileExistsError(
                f"a folder of Hugging Face must hold one model, got {others[0]} in it: choose another"
            )
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    if _KERNEL not in plain or "rope_embed.periods" not in plain:
        raise WeightsError(
            f"a backbone must have {_KERNEL} and rope_embed.periods, got {_listed(list(plain))}: read "
            "it with read_backbone"
        )
    description = _described(plain, path, format)
    _refuse(
        _differences(plain, _expected_shapes(description)),
        "a backbone must be whole before it is written, got differences",
        "read it with read_backbone",
    )
    losses: list[str] = []
    if format in ("hf", "timm"):
        key_bias = _has_k_bias(plain)
        exact = torch.allclose(
            plain["rope_embed.periods"].float(),
            _rope_periods(4 * plain["rope_embed.periods"].numel(), description.rope_base or 1.0),
            rtol=1e-5,
        )
        plain, losses = (_to_hf if format == "hf" else _to_timm)(plain, description)
        if not exact:
            losses.append("RoPE periods are rounded here and computed in float32 there")
        if format == "hf" and not folder and description.rope_base != _ROPE_BASE:
            raise WeightsError(
                f"a lone .safetensors must have a RoPE base of {_ROPE_BASE:g}, got "
                f"{description.rope_base}: write a folder, whose config.json tells it"
            )
    else:
        key_bias = False
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        path.mkdir(exist_ok=True)
        config = json.dumps(_hf_config(description, key_bias), indent=2) + "\n"
        with _whole(targets[1]) as part:
            part.write_text(config, encoding="utf-8")
    with _whole(targets[0]) as part:
        if targets[0].suffix == ".safetensors":
            _save_safetensors(plain, part, description, ours=format == "dinocell")
        else:
            torch.save(plain, part)
    if notes is not None:
        notes += losses
    for loss in losses if notes is None else ():
        logger.warning("%s: %s", path, loss)
    return path


class _whole:
    """`with _whole(path) as part`: write `part`, which becomes `path` if nothing goes wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}.{os.getpid()}.part")

    def __enter__(self) -> Path:
        return self.part

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            move_into_place(self.part, self.path)
        else:
            self.part.unlink(missing_ok=True)


def _save_safetensors(
    state: State, path: Path, description: WeightsDescription, *, ours: bool
) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if ours:
        facts = asdict(description)
        for key in ("path", "notes", "which", "sha256", "heads_known"):
            facts.pop(key)
        metadata[_HEADER] = json.dumps(facts)
    save_file(state, path, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library writes files that only their owner can read


def _hf_config(d: WeightsDescription, key_bias: bool) -> dict[str, Any]:
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
