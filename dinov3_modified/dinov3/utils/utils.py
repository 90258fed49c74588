"""Functions on lists of token tensors and on module trees (matches `dinov3.utils.utils`)."""

import os
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def cat_keep_shapes(x_list: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size], list[int]]:
    """Stack the rows of differently shaped tensors, so that one linear layer serves all.

    `x_list`: tensors [..., D] of one width D.  Returns rows [sum of rows, D], the shapes, and the
    number of rows of each tensor.
    """
    shapes = [x.shape for x in x_list]
    num_tokens = [x[..., 0].numel() for x in x_list]
    return torch.cat([x.flatten(0, -2) for x in x_list]), shapes, num_tokens


def uncat_with_shapes(
    flattened: Tensor, shapes: Sequence[torch.Size], num_tokens: Sequence[int]
) -> list[Tensor]:
    """Undo `cat_keep_shapes`; the width may have changed meanwhile.

    `flattened`: rows [sum of rows, D']; `shapes`, `num_tokens`: as `cat_keep_shapes` returned them.
    """
    parts = flattened.split(list(num_tokens))
    width = flattened.shape[-1]
    return [part.reshape(*shape[:-1], width) for part, shape in zip(parts, shapes, strict=True)]


def named_apply(
    fn: Callable[..., object],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Call `fn(module=..., name=...)` on every submodule, with its dotted name.

    `depth_first`: children before their parent, or after it; `include_root`: also on `module`
    itself.
    """
    if include_root and not depth_first:
        fn(module=module, name=name)
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        named_apply(fn, child, full_name, depth_first, include_root=True)
    if include_root and depth_first:
        fn(module=module, name=name)
    return module


def named_replace(
    fn: Callable[..., nn.Module],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Replace every submodule by `fn(module=..., name=...)`; returns the (new) root.

    `depth_first`, `include_root`: as in `named_apply`.
    """
    if include_root and not depth_first:
        module = fn(module=module, name=name)
    for child_name, child in list(module.named_children()):
        full_name = f"{name}.{child_name}" if name else child_name
        setattr(
            module, child_name, named_replace(fn, child, full_name, depth_first, include_root=True)
        )
    if include_root and depth_first:
        module = fn(module=module, name=name)
    return module


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_batchnorms(model: nn.Module) -> bool:
    """Whether any submodule is a batch normalisation."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return any(isinstance(module, kinds) for module in model.modules())


def fix_random_seeds(seed: int = 31) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def get_sha() -> str:
    """Commit, state and branch of the checkout this file lies in, for the log; N/A outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        commit, branch = git("rev-parse", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD")
        state = "has uncommitted changes" if git("status", "--porcelain") else "clean"
    except (OSError, subprocess.CalledProcessError):
        commit, state, branch = "N/A", "N/A", "N/A"
    return f"sha: {commit}, status: {state}, branch: {branch}"


def get_conda_env() -> tuple[str | None, str | None]:
    """Name and path of the conda environment, None without."""
    return os.environ.get("CONDA_DEFAULT_ENV"), os.environ.get("CONDA_PREFIX")


def as_torch_dtype(dtype: str) -> torch.dtype:
    """fp32, fp16, bf16 or torch's own name → dtype; raises ValueError (unknown)."""
    short = {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
    }
    found = short.get(dtype, getattr(torch, dtype, None))
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"`precision` must be one of {', '.join(short)}, got {dtype!r}: choose one of these"
        )
    return found
