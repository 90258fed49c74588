"""Multi-channel fields and a ViT → the features of every window through every channel.

Channels are normalised one by one over the whole field and seen gray, as the networks here see
every image; the mean view is the mean of the normalised channels (docs/multiview.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dinocell.errors import CheckpointError, DataSetError
from dinocell.probing.views import MEAN_VIEW
from dinocell.segmentation.intensity import normalize_intensity, to_model_input
from dinocell.training.datasets import spread_evenly


@dataclass(frozen=True)
class FieldImage:
    """One field: co-registered planes (C, H, W) of raw intensities, and their names."""

    name: str
    channels: tuple[str, ...]
    planes: NDArray[Any]


@dataclass(frozen=True)
class ViewExample:
    """One location for the picture, an entry per channel and the mean view last."""

    field: str
    origin: tuple[int, int]  # (row, column) of the window in px
    channels: tuple[str, ...]
    images: NDArray[np.float32]  # (C, H, W) in [0, 1]
    # (C, h, w) of CLS to the patches, mean over heads; sums to at most 1
    attention: NDArray[np.float32] | None
    patches: NDArray[np.float32]  # (C, h, w, D)


@dataclass(frozen=True)
class ViewFeatures:
    """Features of M views."""

    fields: list[str]  # M names
    channels: list[str]  # M names; the mean views are called ``mean``
    locations: NDArray[np.int64]  # (M,), number of the window, counted over all fields
    cls: NDArray[np.float32]  # (M, D), CLS token after the final norm
    patch_mean: NDArray[np.float32]  # (M, D), mean of the patch tokens after the final norm
    patch: NDArray[np.float32]  # (M, P, D), tokens of P patches, at the same places in each view
    # the same three, of windows that were turned or mirrored, with the patches turned back
    turned: dict[str, NDArray[np.float32]]
    # what a network should not answer with, as `shortcut_numbers` gives it
    shortcuts: dict[str, NDArray[np.float32]]
    attention: NDArray[np.float32] | None  # (M, heads, N) of CLS to the patches in the last block
    example: ViewExample  # of the field with the most channels, the first of such
    # sentences: channels without signal, fields with fewer windows than asked for
    left_out: list[str] = field(default_factory=list)


def normalize_channels(planes: NDArray[Any]) -> NDArray[np.float32]:
    """(C, H, W) raw planes → [0, 1], each by its own percentiles; a constant plane becomes 0."""
    return np.stack([normalize_intensity(plane) for plane in planes])


def choose_windows(image: NDArray[np.float32], window_px: int, count: int) -> list[tuple[int, int]]:
    """(row, column) of the upper left corners of at most `count` windows of `window_corners`.

    Those with the largest standard deviation in the mean view `image` (H, W) come first, because nothing
    can be found again in empty background.
    """

    def rank(corner: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        row, column = corner
        window = image[row : row + window_px, column : column + window_px]
        return -float(window.std()), corner

    return sorted(window_corners(image.shape, window_px), key=rank)[:count]


def window_corners(shape: tuple[int, ...], window_px: int) -> list[tuple[int, int]]:
    """Upper left corners of the windows of a centred grid, row by row; they do not overlap."""
    tops, lefts = (
        range(length % window_px // 2, length - window_px + 1, window_px) for length in shape
    )
    return list(product(tops, lefts))


def extract_views(
    vit: nn.Module,
    fields: Iterable[FieldImage],
    *,
    window_px: int = 224,
    windows_per_field: int = 4,
    channels: Sequence[str] | None = None,
    batch_size: int = 8,
    attention: bool = True,
    advance: Callable[[str], None] | None = None,
) -> ViewFeatures:
    """Run a ViT over the windows of fields, channel by channel and for the mean of the channels.

    Fields with one usable channel are left out: they have nothing to be compared with.

    Parameters
    ----------
    vit : DinoVisionTransformer, used where it is, in eval mode; its mode is restored
    fields : their names must differ
    window_px : a multiple of the patch size
    channels : use these only, in any case of letters; default all
    batch_size : views per network call
    attention : also the attention of CLS in the last block (another pass)
    advance : called with the name of every finished field

    Raises DataSetError (a field is smaller than a window or lacks all asked channels, two have one
    name, or there is no field with two channels); CheckpointError (the network answers with NaN);
    ValueError (`window_px` does not fit the patch size, or the network cannot give attention maps).
    """
    check_window(window_px, vit)
    if attention and not hasattr(vit, "get_last_selfattention"):
        raise ValueError(
            "`vit` must have get_last_selfattention for attention maps, got "
            f"{type(vit).__name__} without it: leave them out with `attention=False`"
        )
    collected = _Collected()
    seen: set[str] = set()
    was_training = vit.training
    vit.eval()
    try:
        for item in fields:
            if item.name in seen:
                raise DataSetError(
                    f"Fields must have different names, got {item.name} twice: name a folder in "
                    "which they differ"
                )
            seen.add(item.name)
            names, stack, missing = _usable_planes(item, channels)
            collected.left_out += missing
            if len(names) < 2:
                collected.left_out.append(f"{item.name} has one channel, left out")
            else:
                stack = np.concatenate([stack, stack.mean(axis=0, keepdims=True)])
                corners = _corners(item.name, stack[-1], window_px, windows_per_field, collected)
                for row, column in corners:
                    views = stack[:, row : row + window_px, column : column + window_px]
                    found = _run(vit, views, batch_size=batch_size, attention=attention)
                    symmetry = 1 + collected.num_locations % 7  # never the identity
                    other = _run(vit, turned(views, symmetry), batch_size=batch_size)
                    other["patches"] = turned_back(other["patches"], symmetry)
                    place = (item.name, (row, column), (*names, MEAN_VIEW))
                    collected.add(*place, views, found, other)
            if advance is not None:
                advance(item.name)
    finally:
        vit.train(was_training)
    if collected.example is None:
        raise DataSetError(
            f"Some field must have two channels, got {len(seen)} fields with fewer: name fields with "
            "several channels, or more of them with `channels`"
        )
    return collected.features(collected.example)


def check_window(window_px: int, vit: nn.Module) -> None:
    """Raise a ValueError, which names the next good size, if windows do not fit the patches of `vit`."""
    patch: int = vit.patch_size  # type: ignore[assignment]
    if window_px < patch or window_px % patch:
        raise ValueError(
            f"`window_px` must be a multiple of the patch size {patch}, got {window_px}: "
            f"{max(1, round(window_px / patch)) * patch} is next"
        )


def to_batch(images: Iterable[NDArray[np.float32]], device: torch.device) -> Tensor:
    """(H, W) images in [0, 1] → [B, 3, H, W] input of a network."""
    return torch.from_numpy(np.stack([to_model_input(image) for image in images])).to(device)


def _corners(
    name: str, mean_view: NDArray[np.float32], window_px: int, count: int, collected: _Collected
) -> list[tuple[int, int]]:
    """As `choose_windows`; too few windows are noted, and none is an error."""
    height, width = mean_view.shape
    if min(height, width) < window_px:
        raise DataSetError(
            f"A field must hold a window of {window_px} px, got {height}×{width} in {name}: choose "
            "smaller windows with `window_px`"
        )
    corners = choose_windows(mean_view, window_px, count)
    if len(corners) < count:
        collected.left_out.append(
            f"{name} holds {len(corners)} windows of {window_px} px, not {count}"
        )
    return corners


def turned(images: NDArray[Any], symmetry: int) -> NDArray[Any]:
    """(V, H, W, ...) images under one of the eight symmetries of the square; 0 is the identity."""
    images = np.rot90(images, symmetry % 4, axes=(1, 2))
    return np.ascontiguousarray(images[:, :, ::-1] if symmetry >= 4 else images)


def turned_back(images: NDArray[Any], symmetry: int) -> NDArray[Any]:
    """The inverse of `turned`."""
    images = images[:, :, ::-1] if symmetry >= 4 else images
    return np.ascontiguousarray(np.rot90(images, -(symmetry % 4), axes=(1, 2)))


def thumbnail(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(V, H, W) → (V, 16): 4 × 4 means, minus the mean of all."""
    cells = [np.array_split(row, 4, axis=2) for row in np.array_split(images, 4, axis=1)]
    small = np.stack([cell.mean(axis=(1, 2)) for row in cells for cell in row], axis=1)
    return small - small.mean(axis=1, keepdims=True)


def slopes(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(V, H, W) → (V, 2): slopes of the plane that fits the brightness, along rows and columns."""
    rows, columns = (np.linspace(-1, 1, n, dtype=np.float32) for n in images.shape[1:])
    along_rows = images.mean(axis=2) @ rows / (rows @ rows)
    return np.stack([along_rows, images.mean(axis=1) @ columns / (columns @ columns)], axis=1)


def shortcut_numbers(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What a network should not answer with, whatever the contrast: (V, H, W) → numbers by name.

    `illumination` (V, 2): slopes of the brightness; `layout` (V, 16): a 4 × 4 thumbnail without its mean.
    Both are divided by the length of the thumbnail, as the features that they explain have length 1.
    """
    small = thumbnail(images)
    length = np.linalg.norm(small, axis=1, keepdims=True)
    length = np.where(length > 0, length, 1.0).astype(np.float32)
    return {"illumination": slopes(images) / length, "layout": small / length}


def _sampled(patches: NDArray[np.float32]) -> NDArray[np.float32]:
    """(V, h, w, D) → (V, P, D): tokens on an even grid of at most 4 × 4 places."""
    rows, columns = (spread_evenly(range(n), 4) for n in patches.shape[1:3])
    return patches[:, rows][:, :, columns].reshape(len(patches), -1, patches.shape[-1])


class _Collected:
    """The views so far."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.channels: list[str] = []
        self.locations: list[int] = []
        self.parts: dict[str, list[NDArray[np.float32]]] = {}
        self.example: ViewExample | None = None
        self.left_out: list[str] = []

    @property
    def num_locations(self) -> int:
        return self.locations[-1] + 1 if self.locations else 0

    def add(
        self,
        name: str,
        corner: tuple[int, int],
        channels: tuple[str, ...],
        views: NDArray[np.float32],
        found: dict[str, NDArray[np.float32]],
        other: dict[str, NDArray[np.float32]],
    ) -> None:
        """One location through all its channels; `other` is of the turned window."""
        location = self.num_locations
        self.names += [name] * len(views)
        self.channels += channels
        self.locations += [location] * len(views)
        parts = shortcut_numbers(views)
        for prefix, features in (("", found), ("turned ", other)):
            parts[f"{prefix}cls"] = features["cls"]
            parts[f"{prefix}patch_mean"] = features["patches"].mean(axis=(1, 2))
            parts[f"{prefix}patch"] = _sampled(features["patches"])
        if "attention" in found:
            parts["attention"] = found["attention"]
        for part, array in parts.items():
            self.parts.setdefault(part, []).append(array)
        if self.example is None or len(channels) > len(self.example.channels):
            patches, maps = found["patches"], found.get("attention")
            if maps is not None:
                maps = maps.mean(axis=1).reshape(patches.shape[:3])
            self.example = ViewExample(name, corner, channels, views.copy(), maps, patches)

    def features(self, example: ViewExample) -> ViewFeatures:
        whole = {name: np.concatenate(arrays) for name, arrays in self.parts.items()}
        return ViewFeatures(
            fields=self.names,
            channels=self.channels,
            locations=np.array(self.locations, dtype=np.int64),
            cls=whole["cls"],
            patch_mean=whole["patch_mean"],
            patch=whole["patch"],
            turned={kind: whole[f"turned {kind}"] for kind in ("cls", "patch_mean", "patch")},
            shortcuts={name: whole[name] for name in ("illumination", "layout")},
            attention=whole.get("attention"),
            example=example,
            left_out=self.left_out,
        )


def _usable_planes(
    item: FieldImage, channels: Sequence[str] | None
) -> tuple[tuple[str, ...], NDArray[np.float32], list[str]]:
    """Names and normalised planes that are asked for and hold a signal; sentences on the others."""
    wanted = [name.lower() for name in (item.channels if channels is None else channels)]
    positions = [index for index, name in enumerate(item.channels) if name.lower() in wanted]
    if not positions:
        raise DataSetError(
            f"A field must have one of the channels {', '.join(channels or ())}, got "
            f"{', '.join(item.channels)} in {item.name}: correct `channels`"
        )
    stack = normalize_channels(item.planes[positions])
    names = [item.channels[index] for index in positions]
    has_signal = np.array([plane.any() for plane in stack])
    if not has_signal.any():
        raise DataSetError(
            f"A field must hold a signal, got constant planes in {item.name}: remove this field"
        )
    constant = compress(names, ~has_signal)
    missing = [f"{item.name}: channel {name} is constant, left out" for name in constant]
    return tuple(compress(names, has_signal)), stack[has_signal], missing


def _run(
    vit: nn.Module, views: NDArray[np.float32], *, batch_size: int, attention: bool = False
) -> dict[str, NDArray[np.float32]]:
    """(V, H, W) views → `cls` (V, D), `patches` (V, h, w, D), `attention` (V, heads, N)."""
    device = next(vit.parameters()).device
    patch: int = vit.patch_size  # type: ignore[assignment]
    grid = (views.shape[1] // patch, views.shape[2] // patch)
    collected: dict[str, list[NDArray[np.float32]]] = {"cls": [], "patches": []}
    with torch.inference_mode():
        for start in range(0, len(views), batch_size):
            batch = to_batch(views[start : start + batch_size], device)
            tokens = vit.forward_features(batch)  # type: ignore[operator]
            patches = tokens["x_norm_patchtokens"].unflatten(1, grid)  # [B, h, w, D]
            collected["cls"].append(tokens["x_norm_clstoken"].float().cpu().numpy())
            collected["patches"].append(patches.float().cpu().numpy())
            if attention:
                weights = vit.get_last_selfattention(batch)  # type: ignore[operator]
                first_patch = weights.shape[-1] - grid[0] * grid[1]
                rows = weights[:, :, 0, first_patch:]  # [B, heads, N]
                collected.setdefault("attention", []).append(rows.float().cpu().numpy())
    found = {name: np.concatenate(arrays) for name, arrays in collected.items()}
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"The network must answer with finite numbers, got NaN or infinite {name}: the "
                "checkpoint is damaged or of a run that diverged"
            )
    return found
