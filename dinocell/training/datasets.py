"""Folders of images and labels → training crops.

A crop is a pure function of (seed, index): no sampler state, no dependence on loader processes, so
a resumed run sees exactly what the uninterrupted one would have seen.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dinocell.errors import DataSetError
from dinocell.io import read_image, read_labels
from dinocell.labels import looks_like_labels, require_cells
from dinocell.pairs import Pair, find_pairs
from dinocell.progress import progress
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.intensity import (
    average_channels,
    check_values,
    find_range,
    normalize_intensity,
    to_model_input,
)
from dinocell.training import augment
from dinocell.training.config import DataConfig, DatasetConfig, TrainConfig

_MARGIN_SHARE = 0.25  # of the crop, on each side, so that cut cells keep their true distances

Item = TypeVar("Item")


def split_pairs(config: DataConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs of all data sets.

    A given validation split is taken as it is; otherwise `val_fraction` of each set (at least one
    image) is held out, drawn by `seed`.  Raises DataSetError (as `find_pairs`; or a set of a single
    image without a given split).
    """
    train: list[Pair] = []
    val: list[Pair] = []
    for index, dataset in enumerate(config.datasets):
        own = dataset.name, dataset.channels or ()
        pairs = find_pairs(dataset.images, dataset.labels, *own)
        if dataset.val_images is not None and dataset.val_labels is not None:
            train += pairs
            val += find_pairs(dataset.val_images, dataset.val_labels, *own)
            continue
        if len(pairs) < 2:
            raise DataSetError(
                f"Data set {dataset.name!r} must have at least two images to hold one out, got "
                f"{len(pairs)}: add images or name val_images and val_labels"
            )
        order = np.random.default_rng([seed, index]).permutation(len(pairs))
        held_out = max(1, min(len(pairs) - 1, round(config.val_fraction * len(pairs))))
        chosen = set(order[:held_out].tolist())
        train += [pair for position, pair in enumerate(pairs) if position not in chosen]
        val += [pair for position, pair in enumerate(pairs) if position in chosen]
    return train, spread_evenly(val, config.max_val_images)


def spread_evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """At most `count` of `items`, spread evenly over them with both ends; None keeps all."""
    if count is None or len(items) <= count:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def read_pair(pair: Pair, **intensity: float) -> tuple[NDArray, NDArray[np.uint32]]:
    """Gray image (H, W) and labels (H, W) of a pair.

    The image is raw; of several `pair.channels`, and of a colour picture without any, it is the mean
    after `intensity` (the options of `find_range`) has normalised each, as `segment` does it.

    Raises DataSetError (the image has several channels and none is chosen, or the sizes differ).
    """
    file = read_image(pair.image_path, channels=pair.channels or None)
    image = file.pixels
    check_values(image, f" in {pair.image_path}", DataSetError)
    if image.ndim == 3 and (pair.channels or file.is_colour):
        planes = np.moveaxis(image, 2, 0)
        image = average_channels(image, [find_range(plane, **intensity) for plane in planes])
    labels = read_labels(pair.labels_path, shape=image.shape[:2])
    if image.ndim != 2:
        raise DataSetError(
            f"Training images must be gray (H, W), got shape {image.shape} in {pair.image_path}: "
            "choose with `channels` (of the data set), or save one of them"
        )
    if looks_like_labels(image):
        raise DataSetError(
            f"Training images must hold intensities, got what looks like a label image in "
            f"{pair.image_path}: are images and labels swapped?"
        )
    if image.shape != labels.shape:
        raise DataSetError(
            f"An image and its labels must have the same size, got {image.shape} and {labels.shape} for "
            f"{pair.image_path.name}: check that the names belong together"
        )
    require_cells(labels, pair.labels_path)
    return image, labels


class CropDataset(Dataset):
    """Endless augmented crops: item `index` depends on the seed and the index only.

    Every file is read once at the start, so that a bad one is met before the first step.

    A set of `data.datasets` is drawn by its `weight` (default: its pixels), an image within it by the
    square root of its pixels.  Normalised images and labels of up to `data.cache_bytes` are kept in
    memory, the rest is read again.  `length` is steps × batch size.
    """

    def __init__(
        self, pairs: Sequence[Pair], config: TrainConfig, *, length: int, shown: bool = False
    ) -> None:
        self.pairs = list(pairs)
        self.model = config.model
        self.augment = config.augment
        self.gap_weight = config.loss.gap_weight
        self.crop_px = config.schedule.crop_px or config.model.window_px
        self.seed = config.seed
        self.length = length
        self._margin_px = round(self.crop_px * _MARGIN_SHARE)
        self._cache: dict[int, tuple[NDArray[np.float16], NDArray[np.float32]]] = {}
        self._datasets = config.data.datasets
        self._pixels = np.zeros(len(self.pairs))
        used = 0
        with progress("reading training images", len(self.pairs), shown=shown) as bar:
            for index in range(len(self.pairs)):
                item = self._read(index)
                self._pixels[index] = item[0].size
                used += item[0].nbytes + item[1].nbytes
                if used <= config.data.cache_bytes:
                    self._cache[index] = item
                bar.advance()
        self.probabilities = _pair_probabilities(self.pairs, self._datasets, self._pixels)

    def only(self, chosen: Sequence[int], *, length: int) -> "CropDataset":
        """The crops of a data set of the pairs at these positions; no file is read again for it."""
        other = copy.copy(self)
        other.pairs = [self.pairs[position] for position in chosen]
        other.length = length
        known = {place: self._cache.get(position) for place, position in enumerate(chosen)}
        other._cache = {place: item for place, item in known.items() if item is not None}
        other._pixels = self._pixels[list(chosen)]
        other.probabilities = _pair_probabilities(other.pairs, self._datasets, other._pixels)
        return other

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised crop (3, crop, crop), distance map and weight (1, crop, crop), all float32."""
        rng = np.random.default_rng([self.seed, index])
        pair = int(rng.choice(len(self.pairs), p=self.probabilities))
        source = self._cache.get(pair) or self._read(pair)
        parameters = self._draw(rng, source)
        if parameters.empty:
            crop = augment.empty_crop(parameters, self.crop_px)
            distance_map, weight = np.zeros_like(crop), np.ones_like(crop)
        else:
            crop, cells = self._cut(source, parameters)
            if parameters.paste:
                other = dataclasses.replace(self._draw(rng, source), scale=parameters.scale)
                crop, cells = augment.paste_cells(crop, cells, *self._cut(source, other))
            crop = augment.apply_intensity(crop, parameters)
            inner = slice(self._margin_px, self._margin_px + self.crop_px)
            distance_map = labels_to_distance_map(cells, target=self.model.target)[inner, inner]
            weight = np.ones_like(crop)
            if self.gap_weight > 0:
                weight += self.gap_weight * augment.gap_mask(cells)[inner, inner]
        return (
            torch.from_numpy(to_model_input(crop)),
            torch.from_numpy(np.ascontiguousarray(distance_map[None])),
            torch.from_numpy(weight[None]),
        )

    def _draw(
        self, rng: np.random.Generator, source: tuple[NDArray, NDArray]
    ) -> augment.CropParameters:
        height, width = source[0].shape
        return augment.draw_crop(rng, self.augment, height, width, self.crop_px)

    def _cut(
        self, source: tuple[NDArray, NDArray], parameters: augment.CropParameters
    ) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Image (crop, crop) and labels with the margin on each side."""
        image, labels = source
        return (
            augment.crop_image(image, parameters, self.crop_px),
            augment.crop_labels(labels, parameters, self.crop_px + 2 * self._margin_px),
        )

    def _read(self, index: int) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        image, labels = read_pair(self.pairs[index], **self.model.intensity)
        if labels.max(initial=0) >= 2**24:
            raise DataSetError(
                f"Training labels must be below 16,777,216, got {labels.max()} in "
                f"{self.pairs[index].labels_path}: renumber them from 1"
            )
        normalized = normalize_intensity(image, **self.model.intensity)
        return normalized.astype(np.float16), labels.astype(np.float32)


def _pair_probabilities(
    pairs: Sequence[Pair], datasets: Sequence[DatasetConfig], pixels: NDArray[np.float64]
) -> NDArray[np.float64]:
    probabilities = np.zeros(len(pairs))
    for dataset in datasets:
        members = np.array([pair.dataset == dataset.name for pair in pairs])
        weight = pixels[members].sum() if dataset.weight is None else dataset.weight
        share = np.sqrt(pixels) * members
        probabilities += weight * share / share.sum()
    return probabilities / probabilities.sum()
