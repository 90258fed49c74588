"""What the training images of a model look like, so that it can tell images of another kind."""

from collections.abc import Sequence

import numpy as np

from dinocell.network.familiarity import TrainingStatistics, fit_statistics
from dinocell.network.model import DINOCell
from dinocell.pairs import Pair
from dinocell.progress import progress
from dinocell.segmentation.inference import predict_distance_map, start_appearance
from dinocell.segmentation.intensity import find_range
from dinocell.training.datasets import read_pair, spread_evenly

_MAX_IMAGES = 200


def training_statistics(
    model: DINOCell, pairs: Sequence[Pair], *, shown: bool = False
) -> TrainingStatistics | None:
    """Statistics of up to 200 images, spread evenly over `pairs`; None for too few.

    The network sees the middle of each image, two windows high and wide, in the intensities of the whole.

    Raises DataSetError, ImageFileError (an image or its labels cannot be used).
    """
    config = model.config
    side = 2 * config.window_px - config.overlap_px
    chosen = spread_evenly(pairs, _MAX_IMAGES)
    seen = []
    with progress("looking at training images", len(chosen), shown=shown) as bar:
        for pair in chosen:
            image, _ = read_pair(pair)
            intensity = find_range(image, **config.intensity)
            top, left = (max(0, (size - side) // 2) for size in image.shape)
            middle = np.ascontiguousarray(image[top : top + side, left : left + side])
            seen.append(start_appearance(intensity, image.dtype, config))
            predict_distance_map(model, middle, intensity=intensity, appearance=seen[-1])
            bar.advance()
        statistics = fit_statistics(seen)
        if statistics is None:
            bar.write("too few images to describe: the model will not flag images of another kind")
    return statistics
