"""Datasets around datasets (matches `dinov3.data.adapters`)."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

__all__ = ["DatasetWithEnumeratedTargets", "extend_samples_with_index"]


class DatasetWithEnumeratedTargets(Dataset[Any]):
    """Targets become (index, target); padded to a multiple with targets (-1, ...).

    Args:
        pad_dataset: repeat samples up to a multiple of `num_replicas`.
        num_replicas: number of processes.
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
                    "num_replicas must be given for a padded data set, got None: give the number of "
                    "processes"
                )
            self._padded_size = -(-self._size // num_replicas) * num_replicas

    def get_image_relpath(self, index: int) -> str:
        """As the inner data set's."""
        return self._dataset.get_image_relpath(index % self._size)

    def get_image_data(self, index: int) -> bytes:
        """As the inner data set's."""
        return self._dataset.get_image_data(index % self._size)

    def get_target(self, index: int) -> tuple[int, Any]:
        """(index, target), index -1 for padding."""
        target = self._dataset.get_target(index % self._size)
        return (-1 if index >= self._size else index), target

    def get_sample_decoder(self, index: int) -> Any:
        """As the inner data set's."""
        return self._dataset.get_sample_decoder(index % self._size)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        image, target = self._dataset[index % self._size]
        target = index if target is None else target
        return image, ((-1 if index >= self._size else index), target)

    def __len__(self) -> int:
        return self._padded_size


def extend_samples_with_index(dataset_class: type) -> type:
    """A subclass whose samples end with their index."""

    class DatasetWithIndex(dataset_class):
        def __getitem__(self, index: int) -> tuple[Any, ...]:
            return (*super().__getitem__(index), index)

    return DatasetWithIndex
