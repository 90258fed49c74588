"""What a batch tells of each image while it works on it."""

from collections.abc import Iterable
from pathlib import Path

from numpy.typing import NDArray

from dinocell.pipeline import DINOCellPipeline, LoadedImage


class Watcher:
    """Does nothing; a subclass may follow images, keep distance maps, or end the work on an image.

    The methods are called in the thread of the network, for one image after the other, but `written` in
    those that write.  An exception makes the image fail with its text, as any other error does.
    """

    def loaded(self, image: LoadedImage) -> None:
        """The file was read; its warnings are those of reading."""

    def progressed(self, done: int, total: int) -> None:
        """The network has seen `done` of `total` windows of the image."""

    def predicted(
        self, pipeline: DINOCellPipeline, image: LoadedImage, distance_map: NDArray
    ) -> None:
        """The network has finished: the map is (H, W) float32, or (2, H, W) with the spread of flips."""

    def written(self, files: Iterable[Path]) -> None:
        """Files and folders of an image are complete; it counts as done when this returns."""
