"""Datasets around datasets (matches `dinov3.data.adapters`)."""

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset[Any]):
    """Targets become (index, target); padded to a multiple with targets (-1, ...).

    `pad_dataset`: repeat samples up to a multiple of `num_replicas`; `num_replicas`: number of
    processes.
    """

    def __init__(
        self, dataset: Any, pad_dataset: bool = False, num_replicas: int | None = None
    ) -> None:
        self._dataset = dataset
        self._size = len(dataset)
        self._padded_size = self._size
        if pad_dataset:
            if num_replicas is None:
                raise ValueError(
                    "`num_replicas` must be set for a padded data set, got None: give the number of processes"
                )
            self._padded_size = -(-self._size // num_replicas) * num_replicas

    def _inner(self, index: int) -> int:
        """Index in the inner data set: the padding repeats it from the start."""
        return index % self._size

    def _number(self, index: int) -> int:
        return index if index < self._size else -1

    def get_image_relpath(self, index: int) -> str:
        return self._dataset.get_image_relpath(self._inner(index))

    def get_image_data(self, index: int) -> bytes:
        return self._dataset.get_image_data(self._inner(index))

    def get_target(self, index: int) -> tuple[int, Any]:
        """(index, target), index -1 for padding."""
        return self._number(index), self._dataset.get_target(self._inner(index))

    def get_sample_decoder(self, index: int) -> Any:
        return self._dataset.get_sample_decoder(self._inner(index))

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        if not 0 <= index < self._padded_size:
            raise IndexError(
                f"`index` must be in 0..{self._padded_size - 1}, got {index}: see len()"
            )
        image, target = self._dataset[self._inner(index)]
        if target is None and index < self._size:
            target = index
        return image, (self._number(index), target)

    def __len__(self) -> int:
        return self._padded_size


def extend_samples_with_index(dataset_class: type) -> type:
    """A subclass whose samples end with their index."""

    class DatasetWithIndex(dataset_class):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            return (*super().__getitem__(index), index)

    return DatasetWithIndex
