"""Patch embeddings for another patch size (ours).

With q = p / k, summing the p x p kernel over k x k blocks is exact: the network of patch q on an
image equals the network of patch p on that image enlarged k times by repeating pixels, because
rotary positions depend on the grid alone.  So at the start a patch-8 network *is* the patch-16
network on the enlarged image, at the same cost.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dinov3.cells.checks import one_of

logger = logging.getLogger("dinov3")

METHODS = ("nearest", "bilinear", "pseudo_inverse", "bicubic")
_KEY = "patch_embed.proj.weight"


@dataclass(frozen=True)
class PatchAdaptation:
    """What `adapt_state_dict` did."""

    before: int  # patch size
    after: int
    # the one used, which is `pseudo_inverse` where `nearest` was requested and the ratio is not whole
    method: str

    def __str__(self) -> str:
        return f"patch size {self.before} → {self.after} ({self.method})"


def patch_size_of(state: Mapping[str, Tensor], key: str = _KEY) -> int:
    """Edge of the kernel in a backbone's state dict.

    Raises ValueError (no such entry, or not a square kernel).
    """
    weight = state.get(key)
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"A backbone must have a kernel {key} [D, C, p, p], got {shape}: this is no ViT backbone"
        )
    return int(weight.shape[2])


def adapt_patch_embedding(weight: Tensor, patch_size: int, method: str = "nearest") -> Tensor:
    """Kernel of a patch embedding for another patch size; the bias stays.

    Args:
        weight: [D, C, p, p].
        patch_size: the new edge q.
        method: `nearest`, sums over blocks, the adjoint of enlarging by repetition (p a multiple of
            q; otherwise `pseudo_inverse`); `bilinear`, the adjoint of bilinear enlargement within a
            patch; `pseudo_inverse`, the kernel whose products with resized patches are nearest to
            the old ones (FlexiViT, Beyer et al. 2023, eq. 4, bilinear without antialiasing);
            `bicubic`, resizing the kernel like a picture times (p / q)², for comparison.
            When `nearest` turns into `pseudo_inverse` the log says so.

    Returns [D, C, q, q] in the type of `weight`.
    """
    one_of("method", method, METHODS)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"A kernel must be [D, C, p, p], got {tuple(weight.shape)}: give patch_embed.proj.weight"
        )
    if patch_size < 1:
        raise ValueError(f"`patch_size` must be at least 1, got {patch_size}: 8 or 16 are usual")
    before = weight.shape[2]
    if before == patch_size:
        return weight
    exact = weight.double()
    used = _used_method(before, patch_size, method)
    if used != method:
        line = "patch size %d → %d is no whole ratio: %s instead of %s"
        logger.info(line, before, patch_size, used, method)
    if used == "nearest":
        block = before // patch_size
        result = exact.unflatten(3, (patch_size, block)).unflatten(2, (patch_size, block))
        result = result.sum(dim=(3, 5))
    elif used == "bilinear":
        enlarge = _resize_matrix(patch_size, before)  # [p, q]
        result = torch.einsum("dcij,iu,jv->dcuv", exact, enlarge, enlarge)
    elif used == "pseudo_inverse":
        resize = _resize_matrix(before, patch_size)  # [q, p]
        inverse = torch.linalg.pinv(resize.T)  # [q, p]
        result = torch.einsum("dcij,ui,vj->dcuv", exact, inverse, inverse)
    else:
        size = (patch_size, patch_size)
        resized = functional.interpolate(exact, size=size, mode="bicubic", align_corners=False)
        result = resized * (before / patch_size) ** 2
    return result.to(weight.dtype)


def adapt_state_dict(
    state: Mapping[str, Tensor], patch_size: int, method: str = "nearest", key: str = _KEY
) -> tuple[dict[str, Tensor], PatchAdaptation | None]:
    """A backbone's state dict for another patch size; the kernel is the only entry that changes.

    `state`: of the backbone, in upstream's names; `key`: of the kernel.  Returns the new state
    dict, and what was done (None if the size is right already).
    """
    before = patch_size_of(state, key)
    adapted = dict(state)
    if before == patch_size:
        return adapted, None
    adapted[key] = adapt_patch_embedding(state[key], patch_size, method)
    return adapted, PatchAdaptation(before, patch_size, _used_method(before, patch_size, method))


def _used_method(before: int, after: int, method: str) -> str:
    """`nearest` sums whole blocks, so it needs a whole ratio; enlarging has none."""
    return "pseudo_inverse" if method == "nearest" and before % after else method


def _resize_matrix(old: int, new: int) -> Tensor:
    """[new, old]: bilinear resizing of a line of pixels, without antialiasing."""
    lines = torch.eye(old, dtype=torch.float64)[:, None]  # one line a unit vector
    resized = functional.interpolate(lines, size=new, mode="linear", align_corners=False)
    return resized[:, 0].T
