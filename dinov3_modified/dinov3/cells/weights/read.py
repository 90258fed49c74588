"""Backbones of any DINOv3 file: what they are, and how they fill a network."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dinov3.cells.checks import listed, one_of
from dinov3.cells.weights.architecture import (
    KERNEL,
    ROPE_BASE,
    WeightsDescription,
    described,
    expected_shapes,
    k_bias_mask,
    rope_periods,
)
from dinov3.cells.weights.containers import NETWORKS, FoundNetwork, read_network
from dinov3.cells.weights.fit import State, WeightsError, refuse_differences, refuse_zeros
from dinov3.cells.weights.foreign import HF_KERNEL, from_hf, from_timm
from dinov3.checkpointer.patch_size_adaptation import adapt_state_dict

# What a network for classification has behind its backbone.
_CLASSIFIER = re.compile(r"(head|fc|classifier|linear_head|score)\.(weight|bias)")

# Number of heads by width, for files that do not contain it.  Other widths have heads of 64 channels, as
# all smaller released networks.
_HEADS = {1536: 24, 4096: 32}


@dataclass(frozen=True)
class LoadReport:
    """What `fit_backbone` found and changed."""

    description: WeightsDescription  # of the file
    patch_size_before: int  # of the file
    patch_size: int  # of the network
    notes: tuple[str, ...]  # what was filled in, left out or adapted

    def __str__(self) -> str:
        d = self.description
        network = f"{d.which}, " if d.which else ""
        text = f"{d.path} ({network}{d.name}, {d.format} format, {d.num_parameters / 1e6:.1f} M parameters)"
        return "; ".join([text, *self.notes])


def read_backbone(path: str | Path, *, which: str = "teacher") -> tuple[State, WeightsDescription]:
    """The backbone of a file or folder, complete and in Meta's names.

    The content decides the format, not the name.  What a format does not have is filled in: a mask
    token of zeros, the RoPE periods, the mask of the k bias.

    `path`: `.pth`, `.safetensors`, a folder of Hugging Face, or a DCP folder of a run; `which`:
    "teacher" or "student", of a file that holds both.  Returns the state dict on the CPU in the
    types of the file, and its description.  Raises FileNotFoundError (the path does not exist);
    WeightsError (it is not the complete backbone of a DINOv3 ViT, or has zeros in place of weights;
    the keys are listed).
    """
    one_of("which", which, NETWORKS, WeightsError)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Weights must be a file or a folder, got {path}: check the path")
    found = read_network(path, which)
    state, kind = found.state, found.format
    if any(name.endswith("pos_embed") or "position_embeddings" in name for name in state):
        raise WeightsError(
            f"Weights must be of a DINOv3 ViT, got {path} with learned position embeddings: this is "
            "another network, such as DINOv2"
        )
    if HF_KERNEL in state:
        state, kind = from_hf(state), "hf"
    elif any(re.search(r"(^reg_token|attn\.[qv]_bias|\.gamma_[12])$", name) for name in state):
        state, kind = from_timm(state), "timm"
    numbers = {key: value for key, value in state.items() if value.is_floating_point()}
    if broken := [key for key, value in numbers.items() if not torch.isfinite(value).all()]:
        raise WeightsError(
            f"Weights must be finite numbers, got NaN or infinity in {listed(broken)} of {path}: the "
            "run diverged, take an earlier checkpoint"
        )
    heads = [key for key in state if _CLASSIFIER.fullmatch(key)]
    for key in heads:
        del state[key]
    refuse_zeros(state, path)
    notes, heads_known = _fill_in(state, found)
    if heads:
        notes.append(f"The classifier of the file is left out: {listed(heads)}")
    description = replace(
        described(state, path, kind), which=found.which, heads_known=heads_known, notes=tuple(notes)
    )
    refuse_differences(
        state,
        expected_shapes(description),
        f"Weights must be a whole DINOv3 ViT backbone, got {path}",
        "fetch or convert it again",
    )
    return state, description


def _fill_in(state: State, found: FoundNetwork) -> tuple[list[str], bool]:
    """Add the entries that some formats lack; returns notes, and whether the heads are known."""
    notes = []
    width = int(state[KERNEL].shape[0])
    if "mask_token" not in state:
        state["mask_token"] = state[KERNEL].new_zeros(1, width)
        notes.append("The file has no mask token: zeros are used")
    if "rope_embed.periods" in state:
        return notes, True
    heads = found.heads or _HEADS.get(width, max(width // 64, 1))
    base = found.rope_base or ROPE_BASE
    state["rope_embed.periods"] = rope_periods(width // heads, base)
    guess = "" if found.heads is not None else f", {heads} heads assumed"
    notes.append(f"The file has no RoPE periods: they are computed from base {base:g}{guess}")
    return notes, found.heads is not None


def sha256(path: str | Path) -> str:
    """Checksum of a file, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_backbone(
    vit: nn.Module, path: str | Path, *, which: str = "teacher", patch_method: str = "nearest"
) -> LoadReport:
    """Fill a `DinoVisionTransformer` from any file; arguments and errors as `fit_backbone`.

    `vit`: with storage, on any device, not sharded; values are copied in its types.
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
    the report names each change.  Every other entry must exist with the right shape.

    `expected`: the network's own state dict, sharded or not; its shapes count.  `which`: "teacher"
    or "student".  `patch_method`: one of `patch_size_adaptation.METHODS`.  Returns whole tensors on
    the CPU in the types of the file, and what was done.  Raises FileNotFoundError, WeightsError (as
    `read_backbone`; also for missing, unexpected and misshapen entries, which are all listed).
    """
    if any(value.is_meta for value in expected.values()):
        raise WeightsError(
            "A network must have storage for weights, got one on the meta device: call to_empty first"
        )
    state, description = read_backbone(path, which=which)
    notes = list(description.notes)
    patch_size = int(expected[KERNEL].shape[2])
    state, adaptation = adapt_state_dict(state, patch_size, patch_method)
    if adaptation is not None:
        notes.append(str(adaptation))
    periods = expected["rope_embed.periods"]
    if not description.heads_known and description.rope_base is not None:
        # The file does not contain the number of heads, so the network's own number is right.
        state["rope_embed.periods"] = rope_periods(4 * periods.numel(), description.rope_base)
        notes = [re.sub(r", \d+ heads assumed$", "", note) for note in notes]
    notes += _exchange_biases(state, expected, path)
    refuse_differences(
        state,
        {key: tuple(value.shape) for key, value in expected.items()},
        f"Weights must fit the network, got {description.name} ({description.flags}) from {path}",
        "set the network's size and flags to those of the file",
    )
    return state, LoadReport(description, description.patch_size, patch_size, tuple(notes))


def _exchange_biases(state: State, expected: Mapping[str, Tensor], path: str | Path) -> list[str]:
    """Bring the qkv biases into the network's form where both say the same."""
    notes = set()
    for key in [key for key in expected if key.endswith("attn.qkv.bias") and key not in state]:
        if key.replace("bias", "weight") in state:
            state[key] = torch.zeros(expected[key].shape)
            notes.add("The file has no qkv bias: zeros are used")
    for key in [key for key in state if key.endswith("attn.qkv.bias_mask") and key not in expected]:
        bias = key.removesuffix("_mask")
        if bias in state:
            state[bias] = state[bias] * state.pop(key).to(state[bias].dtype)
            notes.add("The masked k bias is written as zeros")
    for key in [key for key in state if key.endswith("attn.qkv.bias") and key not in expected]:
        if not state[key].any():
            del state[key]
            notes.add("The qkv bias is left out, because it is zero")
    for key in [key for key in expected if key.endswith("attn.qkv.bias_mask") and key not in state]:
        bias = key.removesuffix("_mask")
        if bias in state and state[bias].chunk(3)[1].any():
            raise WeightsError(
                f"A network with mask_k_bias must get weights without a bias on k, got one in {path}: "
                "build the network with mask_k_bias false (student.mask_k_bias in training)"
            )
        state[key] = k_bias_mask(expected[key].shape[0] // 3)
        notes.add("The file has no mask of the k bias: it is computed again")
    return sorted(notes)
