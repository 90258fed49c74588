"""A dataset of encoded images (matches `dinov3.data.datasets.extended`, without torchvision)."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from dinov3.cells.registry import transformed
from dinov3.data.datasets.decoders import Decoder, ImageDataDecoder, TargetDecoder


class ExtendedVisionDataset(Dataset[Any]):
    """Subclasses give `get_image_data`, `get_target` and `__len__`.

    Args:
        image_decoder, target_decoder: classes with `decode()`.
        root: folder of the data.
        transforms: (image, target) → both; excludes the other two.
        transform, target_transform: of image and target alone.
    """

    def __init__(
        self,
        image_decoder: type[Decoder] = ImageDataDecoder,
        target_decoder: type[Decoder] = TargetDecoder,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._start(*args, **kwargs)
        self.image_decoder: Callable[[Any], Decoder] = image_decoder
        self.target_decoder: Callable[[Any], Decoder] = target_decoder

    def _start(
        self,
        root: str | None = None,
        transforms: Callable[..., Any] | None = None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        if transforms is not None and (transform is not None or target_transform is not None):
            raise ValueError(
                "`transforms` must come alone, got transform or target_transform beside it: give one form"
            )
        self.root = root
        self.transforms = transforms
        self.transform = transform
        self.target_transform = target_transform

    def get_image_data(self, index: int) -> bytes:
        raise NotImplementedError

    def get_target(self, index: int) -> Any:
        raise NotImplementedError

    def get_sample_name(self, index: int) -> str:
        """Name of a sample, for messages."""
        return f"sample {index}"

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            image = self.image_decoder(self.get_image_data(index)).decode()
        except Exception as error:
            raise RuntimeError(
                f"{self.get_sample_name(index)} must be readable, got an error ({error}): repair or remove it"
            ) from error
        target = self.target_decoder(self.get_target(index)).decode()
        return transformed(self, image, target)

    def __len__(self) -> int:
        raise NotImplementedError
