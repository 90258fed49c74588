"""A backbone as a file of Meta's, Hugging Face's, timm's or our format."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dinov3.cells.checks import listed, one_of
from dinov3.cells.files import atomic_path, write_text_atomically
from dinov3.cells.weights.architecture import (
    KERNEL,
    ROPE_BASE,
    WeightsDescription,
    described,
    expected_shapes,
    has_k_bias,
    rope_periods,
)
from dinov3.cells.weights.containers import HEADER
from dinov3.cells.weights.fit import State, WeightsError, refuse_differences
from dinov3.cells.weights.foreign import hf_config, to_hf, to_timm

logger = logging.getLogger("dinov3")

FORMATS = ("meta", "hf", "timm", "dinocell")
_SUFFIXES = {
    "meta": (".pth", ".pt"),
    "dinocell": (".safetensors",),
    "timm": (".safetensors", ".pth", ".pt", ".bin"),
    "hf": (".safetensors", ""),
}


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
        overwrite: replace an existing output; in a folder, only its two files.
        notes: a list to which what the format has no place for is added; without one it is logged.

    Returns the path that was written.  Raises FileExistsError (the output exists, and `overwrite`
    is false); WeightsError (unknown format, wrong suffix, an incomplete backbone, or flags that the
    format cannot hold).
    """
    path = Path(path)
    targets = _targets(path, format, overwrite)
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    if KERNEL not in plain or "rope_embed.periods" not in plain:
        raise WeightsError(
            f"A backbone must have {KERNEL} and rope_embed.periods, got {listed(list(plain))}: read "
            "it with read_backbone"
        )
    description = described(plain, path, format)
    refuse_differences(
        plain,
        expected_shapes(description),
        "A backbone must be whole before it is written, got differences",
        "read it with read_backbone",
    )
    key_bias = has_k_bias(plain)
    plain, losses = _in_names_of(format, plain, description)
    if format == "hf" and len(targets) == 1 and description.rope_base != ROPE_BASE:
        raise WeightsError(
            f"A lone .safetensors must have a RoPE base of {ROPE_BASE:g}, got "
            f"{description.rope_base}: write a folder, whose config.json holds the base"
        )
    if len(targets) > 1:
        config = json.dumps(hf_config(description, key_bias), indent=2) + "\n"
        write_text_atomically(targets[1], config)
    with atomic_path(targets[0]) as temporary:
        if targets[0].suffix == ".safetensors":
            _save_safetensors(plain, temporary, description, ours=format == "dinocell")
        else:
            torch.save(plain, temporary)
    if notes is not None:
        notes += losses
    else:
        for loss in losses:
            logger.warning("%s: %s", path, loss)
    return path


def _targets(path: Path, format: str, overwrite: bool) -> list[Path]:
    """The files to write: one, or the weights and the configuration of a Hugging Face folder."""
    one_of("format", format, FORMATS, WeightsError)
    suffixes = _SUFFIXES[format]
    if path.suffix not in suffixes:
        known = " or ".join(suffix or "a folder" for suffix in suffixes)
        raise WeightsError(
            f"The output of format {format} must be {known}, got {path}: change the ending"
        )
    folder = path.suffix == ""
    if folder and path.exists() and not path.is_dir():
        raise FileExistsError(
            f"The output must be a folder, got the file {path}: choose another name"
        )
    if not folder and path.is_dir():
        raise FileExistsError(
            f"The output must be a file, got the folder {path}: choose another name"
        )
    targets = [path / "model.safetensors", path / "config.json"] if folder else [path]
    existing = [target for target in targets if target.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"The output must not exist, got {existing[0]}: choose another name, or set `overwrite`"
        )
    others = [file for file in path.glob("*.safetensors") if file != targets[0]] if folder else []
    if others:
        raise FileExistsError(
            f"A folder of Hugging Face must hold one model, got {others[0]} in it: choose another folder"
        )
    return targets


def _in_names_of(
    format: str, state: State, description: WeightsDescription
) -> tuple[State, list[str]]:
    """The entries under the names of a format, and what it has no place for."""
    if format not in ("hf", "timm"):
        return state, []
    periods = state["rope_embed.periods"]
    computed = rope_periods(4 * periods.numel(), description.rope_base or 1.0)
    exact = torch.allclose(periods.float(), computed, rtol=1e-5)
    renamed, losses = (to_hf if format == "hf" else to_timm)(state, description)
    if not exact:
        losses.append("RoPE periods are rounded here and computed in float32 there")
    return renamed, losses


def _save_safetensors(
    state: State, path: Path, description: WeightsDescription, *, ours: bool
) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if ours:
        left_out = ("path", "notes", "which", "heads_known")
        facts = {key: value for key, value in asdict(description).items() if key not in left_out}
        metadata[HEADER] = json.dumps(facts)
    save_file(state, path, metadata=metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library writes files that only their owner can read
