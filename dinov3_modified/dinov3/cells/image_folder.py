"""Any folder of images, as RGB (ours)."""

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from dinov3.data.datasets.decoders import ImageDataDecoder
from dinov3.data.datasets.extended import ExtendedVisionDataset

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}


class _EightBitDecoder(ImageDataDecoder):
    """Refuses what a conversion to RGB would clip."""

    def decode(self) -> Image.Image:
        with Image.open(BytesIO(self.image_data)) as image:
            if image.mode not in _EIGHT_BITS:
                raise ValueError(
                    f"An image must have 8 bits a channel, got PIL mode {image.mode!r}: use "
                    "JUMPCellPaintingMultiView for raw images, or convert it"
                )
            return image.convert("RGB")


class ImageFolder(ExtendedVisionDataset):
    """All images below a folder, as 8-bit RGB, in the order of their paths; hidden files are skipped.

    `root`: the folder; `split`: name of a subfolder, if only that is wanted; `extra`: without
    effect, for the common grammar of dataset strings.  Raises FileNotFoundError (no such folder);
    ValueError (no image in it).
    """

    def __init__(
        self, *, root: str, split: str | None = None, extra: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_decoder=_EightBitDecoder, root=root, **kwargs)
        folder = Path(root) / split if split else Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"`root` must be a folder, got {folder}: check root and split")
        self.paths = [
            str(path.relative_to(folder))
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
        ]
        self.folder = folder
        if not self.paths:
            raise ValueError(
                f"ImageFolder must hold images ({', '.join(sorted(_SUFFIXES))}), got none in {folder}: "
                "check root and split"
            )

    def get_image_data(self, index: int) -> bytes:
        return (self.folder / self.paths[index]).read_bytes()

    def get_target(self, index: int) -> None:
        """There is none."""

    def get_sample_name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)
