"""Bytes → image, target → target (matches `dinov3.data.datasets.decoders`)."""

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image


class Decoder:
    """Something with `decode()`."""

    def decode(self) -> Any:
        raise NotImplementedError


@dataclass
class ImageDataDecoder(Decoder):
    """Bytes of an image file → PIL image in RGB."""

    image_data: bytes

    def decode(self) -> Image.Image:
        return Image.open(BytesIO(self.image_data)).convert("RGB")


@dataclass
class TargetDecoder(Decoder):
    """A target as it is."""

    target: Any

    def decode(self) -> Any:
        return self.target


@dataclass
class DenseTargetDecoder(Decoder):
    """Bytes of an image file → PIL image in its own mode, for label images."""

    image_data: bytes

    def decode(self) -> Image.Image:
        return Image.open(BytesIO(self.image_data))
