"""Does a backbone know a place through another channel?  The score of `dinocell inspect`, by field.

Windows are of the size that the training saw.  A query asks among the windows of its own field, seen through
another channel: as they are, turned or mirrored, and shifted by a patch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dinocell.probing.channel_consistency import Suspicions, channel_consistency
from dinocell.probing.feature_extraction import choose_windows, to_batch, turned, turned_back

WINDOW_PX, SHIFT_PX = 48, 8  # after the reduction; one patch
WINDOWS = 16  # of a field, those with the most structure
KINDS = ("cls", "patch_mean", "patch")
# Numbers of each field, and those that need several fields.
BY_FIELD = (
    "retrieval_within_field",
    "retrieval_turned",
    "retrieval_shifted",
    "cosine_same_field",
    "cosine_other_place",
)
OVER_FIELDS = (
    "cosine_other_field_other_channel",
    "channel_decodability",
    "effective_rank_centered",
)
_PLACES = np.array([1, 3, 5])  # of the 6 patches along an edge: seen by the shifted window, too

Planes = NDArray[np.float32]  # (C, h, w) in [0, 1]


def tokens(vit: nn.Module, images: Sequence[NDArray[np.float32]]) -> tuple[Planes, Planes]:
    """CLS tokens (V, D) and patch tokens (V, h, w, D) of (H, W) images of one size."""
    grid = tuple(edge // 8 for edge in images[0].shape)
    with torch.inference_mode():
        found = [
            vit.forward_features(to_batch(images[start : start + 32], torch.device("cpu")))
            for start in range(0, len(images), 32)
        ]
    cls = torch.cat([x["x_norm_clstoken"] for x in found])
    patches = torch.cat([x["x_norm_patchtokens"] for x in found])
    return cls.numpy(), patches.unflatten(1, grid).numpy()


def view_numbers(
    vit: nn.Module, fields: Sequence[tuple[str, tuple[str, ...], Planes]]
) -> dict[str, dict[str, Any]]:
    """By kind of feature: `BY_FIELD` as a list with a number for each field, `OVER_FIELDS` as a number.

    `fields` are names, channels and planes; `chance` is that of the retrievals, by field.
    """
    parts = [_features(vit, channels, planes) for _, channels, planes in fields]
    found: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        rows: dict[str, Any] = defaultdict(list)
        for number, part in enumerate(parts):
            one, same = _score([part], [number], kind, "turned"), "retrieval_within_field"
            shifted = _score([part], [number], kind, "shifted")["retrieval_turned"]
            for name in BY_FIELD:
                estimate = shifted if name == "retrieval_shifted" else one[name]
                rows[name].append(estimate.value)
            rows["chance"].append(one[same].chance)
        every = _score(parts, list(range(len(parts))), kind, "turned")
        found[kind] = {**rows, **{name: every[name].value for name in OVER_FIELDS}}
    return found


def _features(vit: nn.Module, channels: tuple[str, ...], planes: Planes) -> dict[str, Any]:
    """Features of the windows of a field, channel by channel: (windows · channels, ...) by name and kind."""
    inner = planes.mean(axis=0)[:-SHIFT_PX, :-SHIFT_PX]
    upright, moved, beside = [], [], []
    corners = choose_windows(inner, WINDOW_PX, WINDOWS)
    for place, (top, left) in enumerate(corners):
        window, shifted = (
            planes[:, top + by : top + by + WINDOW_PX, left + by : left + by + WINDOW_PX]
            for by in (0, SHIFT_PX)
        )
        upright += [*window]
        moved += [*turned(window, 1 + place % 7)]
        beside += [*shifted]
    count = len(channels)
    found: dict[str, Any] = {"channels": list(channels) * len(corners), "count": count}
    for name, images, places in (
        ("upright", upright, _PLACES),
        ("turned", moved, _PLACES),
        ("shifted", beside, _PLACES - 1),
    ):
        cls, patches = tokens(vit, images)
        if name == "turned":
            patches = np.concatenate(
                [
                    turned_back(patches[place * count : (place + 1) * count], 1 + place % 7)
                    for place in range(len(corners))
                ]
            )
        sampled = patches[:, places][:, :, places]
        found[name] = {
            "cls": cls,
            "patch_mean": patches.mean(axis=(1, 2)),
            "patch": sampled.reshape(len(patches), -1, patches.shape[-1]),
        }
    return found


def _score(parts: list[dict[str, Any]], numbers: list[int], kind: str, gallery: str) -> Any:
    """The report on some fields; `retrieval_turned` is that among the windows of the `gallery`."""
    upright, other, fields, locations, channels = [], [], [], [], []
    first = 0
    for number, part in zip(numbers, parts, strict=True):
        ours, theirs = part["upright"][kind], part[gallery][kind]
        views = len(ours)
        places = first + np.arange(views) // part["count"]
        if ours.ndim == 3:  # each sampled patch is a place of its own
            patches = ours.shape[1]
            places = (places[:, None] * patches + np.arange(patches)).ravel()
            ours, theirs = (x.reshape(-1, x.shape[-1]) for x in (ours, theirs))
        repeats = len(ours) // views
        first += views // part["count"]
        upright.append(ours)
        other.append(theirs)
        locations.append(places)
        fields += [number] * len(ours)
        channels += [name for name in part["channels"] for _ in range(repeats)]
    return channel_consistency(
        np.concatenate(upright),
        fields,
        np.concatenate(locations),
        channels,
        suspicions=Suspicions(np.concatenate(other)),
        num_bootstrap=0,
    )
