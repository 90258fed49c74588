"""Any folder of images, as RGB (ours)."""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov3.cells.checks import listed
from dinov3.cells.fields import TIFF_STARTS, decode_planes, has_16_bits, is_constant, robust_range
from dinov3.cells.registry import transformed
from dinov3.data.datasets.extended import ExtendedVisionDataset

logger = logging.getLogger("dinov3")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
_PERCENTILES = (0.1, 99.9)  # intensities of a 16-bit picture that become 0 and 255


class ImageFolder(ExtendedVisionDataset):
    """All images below a folder, as 8-bit RGB, in the order of their paths; hidden files are skipped.

    A picture of 16 bits is scaled by its own range, its percentiles 0.1 and 99.9 over all channels,
    so that 12-bit data keep 256 levels.  The headers of all files are read first; the log counts what
    is left out.  A file that turns out to be broken later has the next one as its stand-in.

    `root`: the folder; `split`: name of a subfolder, if only that is wanted; `extra`: without
    effect, for the common grammar of dataset strings; `max_megapixels`: larger pictures are refused,
    since they may be meant to exhaust the memory; `max_lost_share`: of the files that may be broken.
    Raises FileNotFoundError (no such folder); ValueError (no image in it, or more broken files than
    that; all are listed).
    """

    STRING_OPTIONS = {"max_megapixels": float, "max_lost_share": float}  # noqa: RUF012

    def __init__(
        self,
        *,
        root: str,
        split: str | None = None,
        extra: str | None = None,
        max_megapixels: float = 180.0,
        max_lost_share: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        self.folder = Path(root) / split if split else Path(root)
        self.max_megapixels = max_megapixels
        self.max_lost_share = max_lost_share
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"`root` must be a folder, got {self.folder}: check root and split"
            )
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        hidden = sum(path.name.startswith(".") for path in files)
        files = [path for path in files if not path.name.startswith(".")]
        pictures = [path for path in files if path.suffix.lower() in _SUFFIXES]
        if not pictures:
            raise ValueError(
                f"ImageFolder must hold images ({', '.join(sorted(_SUFFIXES))}), got none in "
                f"{self.folder}: check root and split"
            )
        found = {str(path.relative_to(self.folder)): self._problem(path) for path in pictures}
        # Names of broken files; of those found later, this process knows its own.
        self.broken = {name: problem for name, problem in found.items() if problem is not None}
        self.paths = [name for name, problem in found.items() if problem is None]
        self._count = len(found)
        self._refuse_many_broken()
        others = Counter(path.suffix.lower() or path.name for path in files) - Counter(
            path.suffix.lower() for path in pictures
        )
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5)) or "none"
        line = "%s: %d pictures; left out: %d broken, %d hidden, %d of other kinds (%s)"
        logger.info(line, self.folder, len(self), len(self.broken), hidden, others.total(), kinds)

    def _problem(self, path: Path) -> str | None:
        """What the header of a file has against it."""
        try:
            width, height = _size(path)
        except Exception as error:
            return (str(error).strip().splitlines() or [type(error).__name__])[0]
        megapixels = width * height / 1e6
        if megapixels > self.max_megapixels:
            return f"{megapixels:.0f} megapixels, more than max_megapixels={self.max_megapixels:g}"
        return None

    def _refuse_many_broken(self) -> None:
        if len(self.broken) > self.max_lost_share * self._count:
            files = [f"{name} ({problem})" for name, problem in self.broken.items()]
            raise ValueError(
                f"At most {self.max_lost_share:.1%} of the pictures may be broken, got "
                f"{len(files)} of {self._count} in {self.folder}: repair or remove {listed(files, 50)}, "
                "or raise max_lost_share or max_megapixels in the dataset string"
            )

    def get_image_data(self, index: int) -> bytes:
        return (self.folder / self.paths[index]).read_bytes()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The sample, or that of the next file which can be read."""
        for step in range(len(self)):
            name = self.paths[(index + step) % len(self)]
            if name in self.broken:
                continue
            try:
                image = decode_rgb(self.get_image_data((index + step) % len(self)), name)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.broken[name] = reason
                self._refuse_many_broken()
                logger.warning("%s is broken and replaced (%s)", name, reason)
                continue
            return transformed(self, image, None)
        raise ValueError(f"A picture of {self.folder} must be readable, got none: repair the files")

    def get_target(self, index: int) -> None:
        """There is none."""

    def get_sample_name(self, index: int) -> str:
        return self.paths[index]

    def __len__(self) -> int:
        return len(self.paths)


@contextmanager
def _any_size() -> Iterator[None]:
    """PIL's own limit on pixels is off: `max_megapixels` is in its place."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with path.open("rb") as stream:
        start = stream.read(32)
    if start[:4] in TIFF_STARTS:
        import tifffile

        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            ends = [a + n for a, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
            end, size = max(ends, default=0), path.stat().st_size
            if end > size:
                raise ValueError(f"its pixels should reach byte {end}, the file has {size}")
            return int(page.imagewidth), int(page.imagelength)
    with _any_size(), Image.open(path) as image:
        return image.size


def decode_rgb(data: bytes, name: str) -> Image.Image:
    """Bytes of a picture → 8-bit RGB; ValueError (it is none, or has channels that are no colours)."""
    if not has_16_bits(data):
        with _any_size(), Image.open(BytesIO(data)) as image:
            if image.mode in _EIGHT_BITS:
                return image.convert("RGB")
            raise ValueError(
                f"An image must have 8 or 16 bits a channel, got PIL mode {image.mode!r}: convert it"
            )
    planes = decode_planes(data, name)  # [C, H, W]
    if len(planes) not in (1, 3):
        raise ValueError(
            f"An image must have one channel or three, got {len(planes)}: use JUMPCellPaintingMultiView "
            "for raw fields"
        )
    if is_constant(planes.reshape(-1, planes.shape[-1])):
        raise ValueError(f"An image must have contrast, got {planes.flat[0]} everywhere")
    low, high = robust_range(planes.reshape(-1, planes.shape[-1]), _PERCENTILES)
    if high <= low:
        low, high = float(planes.min()), float(planes.max())
    scaled = np.clip((planes.astype(np.float32) - low) / (high - low), 0, 1)
    pixels = np.rint(255 * scaled).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
