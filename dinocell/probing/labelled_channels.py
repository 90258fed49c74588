"""One small decoder per channel of labelled fields: does a backbone serve each channel?

A backbone that is consistent across channels should give features that segment cells in every one,
and a decoder that was trained on one channel should work on the others, which it never saw.  The
mean and the standard deviation over channels say so in two numbers each.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dinocell.errors import DataSetError
from dinocell.io import find_images, read_image
from dinocell.labels import looks_like_labels
from dinocell.pairs import Pair, find_pairs
from dinocell.probing.channel_consistency import for_json
from dinocell.probing.decoder_probe import ProbeConfig, ProbeResult, probe_features
from dinocell.probing.labelled_windows import LabelledWindow, cut_windows, require_cells_in_some
from dinocell.progress import progress
from dinocell.training.datasets import read_pair


@dataclass(frozen=True)
class ChannelScores:
    """A probe per channel, and how training and held-out windows were divided, as a sentence."""

    results: dict[str, ProbeResult]
    split: str

    @property
    def across(self) -> dict[str, dict[str, float]]:
        """By training channel: mean and standard deviation (n − 1) of AP at 0.5 over the other channels.

        `mean`, `std` and `worst`; channels without another one are left out.
        """
        found = {}
        for channel, result in self.results.items():
            values = [scores["ap50"] for scores in result.elsewhere.values()]
            if values:
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                found[channel] = {
                    "mean": float(np.mean(values)),
                    "std": spread,
                    "worst": float(min(values)),
                }
        return found

    @property
    def mean(self) -> dict[str, float]:
        return {name: float(np.mean(values)) for name, values in self._columns().items()}

    @property
    def std(self) -> dict[str, float]:
        """Standard deviation over channels (of a sample, n − 1); nan for one channel."""
        return {
            name: float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
            for name, values in self._columns().items()
        }

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        channels = {
            channel: {
                "scores": result.scores,
                "on_other_channels": result.elsewhere,
                "thresholds": result.thresholds,
                "steps": result.steps,
                "train_loss": result.train_loss,
                "num_train_windows": result.num_train,
                "num_val_windows": result.num_val,
            }
            for channel, result in self.results.items()
        }
        parts = {"split": self.split, "channels": channels, "mean": self.mean, "std": self.std}
        parts["across"] = self.across
        return for_json(parts)

    def _columns(self) -> dict[str, list[float]]:
        names = next(iter(self.results.values())).scores
        return {name: [result.scores[name] for result in self.results.values()] for name in names}


def find_channel_pairs(
    data: str | os.PathLike[str], *, labels_name: str = "labels"
) -> dict[str, list[Pair]]:
    """Labelled images by channel, from a folder of one of two layouts.

    ``CHANNEL/images`` and ``CHANNEL/labels``, paired by name; or a folder per field
    (``FIELD/CHANNEL.tif``) with a label image ``FIELD/<labels_name>.png`` for all its channels.
    Raises DataSetError (neither layout, or no channel).
    """
    folder = Path(data)
    if not folder.is_dir():
        raise DataSetError(f"Labelled channels must be a folder, got {folder}: check the path")
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    found: dict[str, list[Pair]] = {}
    if any((part / "images").is_dir() for part in parts):
        for part in parts:
            found[part.name] = find_pairs(part / "images", part / "labels", part.name)
    else:
        for part in parts:
            files = {path.stem: path for path in find_images([part], include_outputs=True)}
            labels = files.pop(labels_name, None)
            if labels is None:
                raise DataSetError(
                    f"A labelled field must hold the label image {labels_name}, got "
                    f"{', '.join(files) or 'nothing'} in {part}: give its name as "
                    "`per_channel_labels`"
                )
            for stem, path in files.items():
                if not looks_like_labels(read_image(path).pixels):
                    found.setdefault(stem, []).append(Pair(part.name, path, labels))
    if not found or not all(found.values()):
        raise DataSetError(
            f"Labelled channels must be CHANNEL/images with CHANNEL/labels, or FIELD/CHANNEL.tif with "
            f"FIELD/{labels_name}.png, got neither in {folder}: arrange the files so"
        )
    return found


def channel_scores(
    vit: nn.Module,
    data: str | os.PathLike[str],
    config: ProbeConfig,
    *,
    labels_name: str = "labels",
    channels: Sequence[str] | None = None,
    shown: bool = False,
) -> ChannelScores:
    """Train a decoder per channel and score it on all channels of the held-out places.

    A third of the images is held out, at least one, the same fields for every channel.  Of a single
    image the left half trains and the right half is held out.

    Parameters
    ----------
    vit : DinoVisionTransformer in eval mode
    data, labels_name : as `find_channel_pairs`
    config : `max_seconds` holds for each channel
    channels : of these only, in any case of letters

    Raises DataSetError, ImageFileError, ProbeTimeError, ValueError (as `find_channel_pairs`,
    `read_windows` and `probe_features`).
    """
    by_channel = find_channel_pairs(data, labels_name=labels_name)
    if channels is not None:
        wanted = {name.lower() for name in channels}
        kept = {name: pairs for name, pairs in by_channel.items() if name.lower() in wanted}
        if not kept:
            raise DataSetError(
                f"`channels` must include one of {', '.join(by_channel)}, the labelled channels in {data}, "
                f"got {', '.join(channels)}: name one of these"
            )
        by_channel = kept
    # Fields are known by the folder that holds them, or by file name where channels have folders.
    by_place = {
        channel: {
            pair.image_path.stem if pair.image_path.parent.name == "images" else pair.dataset: pair
            for pair in pairs
        }
        for channel, pairs in by_channel.items()
    }
    places = sorted(set().union(*by_place.values()))
    held_out = _held_out(places, config.seed)
    results = {}
    with progress("per channel", len(by_place) * config.steps, shown=shown) as bar:
        divided = {
            channel: _divided(pairs, held_out, config) for channel, pairs in by_place.items()
        }
        for channel, (train, val) in divided.items():
            require_cells_in_some(train, f"the training part of channel {channel}")
            require_cells_in_some(val, f"the held-out part of channel {channel}")
        for channel, (train, val) in divided.items():
            others = {name: parts[1] for name, parts in divided.items() if name != channel}

            def note(loss: float, channel: str = channel) -> None:
                bar.advance(note=f"{channel} loss {loss:.4f}")

            results[channel] = probe_features(
                vit, train, val, config, elsewhere=others, advance=note
            )
    if not held_out:
        return ChannelScores(results, "one field: its left half trains, its right half is held out")
    return ChannelScores(results, f"{len(held_out)} of {len(places)} fields are held out")


def _held_out(places: list[str], seed: int) -> set[str]:
    """Randomly chosen places, at least one and not all; none of a single place."""
    if len(places) == 1:
        return set()
    order = np.random.default_rng([seed, 3]).permutation(len(places))
    count = max(1, min(len(places) - 1, round(len(places) / 3)))
    return {places[index] for index in order[:count]}


def _divided(
    pairs: dict[str, Pair], held_out: set[str], config: ProbeConfig
) -> tuple[list[LabelledWindow], list[LabelledWindow]]:
    """Training and held-out windows; without held-out places, of the two halves of each image."""
    train: list[LabelledWindow] = []
    val: list[LabelledWindow] = []
    cut = partial(cut_windows, window_px=config.window_px, count=config.windows_per_image)
    for place, pair in sorted(pairs.items()):
        image, labels = read_pair(pair)
        width = image.shape[1]
        if held_out:
            part = val if place in held_out else train
            part += cut(place, image, labels)
        else:
            train += cut(place, image, labels, columns=(0, width // 2))
            val += cut(place, image, labels, columns=(width // 2, width))
    return train, val
