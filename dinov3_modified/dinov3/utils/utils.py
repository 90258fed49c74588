"""Functions on lists of token tensors and on module trees (matches `dinov3.utils.utils`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "cat_keep_shapes",
    "count_parameters",
    "named_apply",
    "named_replace",
    "uncat_with_shapes",
]


def cat_keep_shapes(x_list: Sequence[Tensor]) -> tuple[Tensor, list[torch.Size], list[int]]:
    """Stack the rows of differently shaped tensors, so that one linear layer serves all.

    Args:
        x_list: tensors [..., D] of one width D.

    Returns:
        rows [sum of rows, D], the shapes, and the number of rows of each tensor.
    """
    shapes = [x.shape for x in x_list]
    num_tokens = [x[..., 0].numel() for x in x_list]
    return torch.cat([x.flatten(0, -2) for x in x_list]), shapes, num_tokens


def uncat_with_shapes(
    flattened: Tensor, shapes: Sequence[torch.Size], num_tokens: Sequence[int]
) -> list[Tensor]:
    """Undo `cat_keep_shapes`; the width may have changed meanwhile.

    Args:
        flattened: rows [sum of rows, D'].
        shapes, num_tokens: as `cat_keep_shapes` returned them.
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

    Args:
        depth_first: children before their parent, or after it.
        include_root: also on `module` itself.
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

    Args:
        depth_first, include_root: as in `named_apply`.
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
