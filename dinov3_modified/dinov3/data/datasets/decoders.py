"""Bytes → image, target → target (matches `dinov3.data.datasets.decoders`)."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image


class Decoder:
    """Something with `decode()`."""

    def decode(self) -> Any:
        """The decoded thing."""
        raise NotImplementedError


class ImageDataDecoder(Decoder):
    """Bytes of an image file → PIL image in RGB."""

    def __init__(self, image_data: bytes) -> None:
        self._image_data = image_data

    def decode(self) -> Image.Image:
        """Opened and converted."""
        return Image.open(BytesIO(self._image_data)).convert("RGB")


class TargetDecoder(Decoder):
    """A target as it is."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def decode(self) -> Any:
        """The target."""
        return self._target


class DenseTargetDecoder(Decoder):
    """Bytes of an image file → PIL image in its own mode, for label images."""

    def __init__(self, image_data: bytes) -> None:
        self._image_data = image_data

    def decode(self) -> Image.Image:
        """Opened, not converted."""
        return Image.open(BytesIO(self._image_data))
