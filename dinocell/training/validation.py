"""Validation images: read once, predicted by all processes together."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError
from dinocell.network.model import DINOCell
from dinocell.pairs import Pair
from dinocell.progress import Progress
from dinocell.segmentation.inference import predict_distance_map
from dinocell.training.datasets import read_pair
from dinocell.training.processes import Processes

Sample = tuple[NDArray[np.float32], NDArray[np.uint32]]
"""Distance map and true labels of an image, (H, W) each."""


class ValidationImages:
    """The validation images of a run, in memory.

    Process 0 holds all of them and predicts its share; the others hold their share only.  `intensity`
    normalises the channels of images with several.  Raises DataSetError, ImageFileError (an image or its
    labels cannot be used, or no image has a cell).
    """

    def __init__(
        self, pairs: Sequence[Pair], processes: Processes, intensity: Mapping[str, float]
    ) -> None:
        self.processes = processes
        self._intensity = intensity
        self.num_images = len(pairs)
        self._samples: list[tuple[NDArray, NDArray[np.uint32]]] = []
        processes.on_main(lambda: self._read_all(pairs))
        if not processes.is_main:
            own = pairs[processes.rank :: processes.world_size]
            self._samples = [read_pair(pair, **intensity) for pair in own]

    def _read_all(self, pairs: Sequence[Pair]) -> None:
        self._samples = [read_pair(pair, **self._intensity) for pair in pairs]
        if not any(labels.any() for _, labels in self._samples):
            raise DataSetError(
                f"Validation images must hold cells, got {len(pairs)} without any: name other "
                "val_labels, or raise data.val_fraction"
            )

    def predict(
        self, model: DINOCell, bar: Progress, check_stop: Callable[[], None]
    ) -> list[Sample]:
        """Distance map and truth of every image in process 0, nothing in the others.

        `check_stop` is called before each image and may raise; `bar` gets a line every ten seconds.
        """
        model.eval()
        world_size = self.processes.world_size
        own = self._samples[::world_size] if self.processes.is_main else self._samples
        predicted, shown_at = [], time.monotonic()
        for position in range(-(-self.num_images // world_size)):
            check_stop()
            if position < len(own):
                predicted.append(predict_distance_map(model, own[position][0]))
            if time.monotonic() - shown_at > 10:
                shown_at = time.monotonic()
                done = min((position + 1) * world_size, self.num_images)
                bar.write(f"validating {done}/{self.num_images} images")
        maps = self.processes.gather(predicted, self.num_images)
        if maps is None:
            return []
        return list(zip(maps, (truth for _, truth in self._samples), strict=True))
