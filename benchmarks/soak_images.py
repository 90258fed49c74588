"""The images of `benchmarks/soak.py`: twenty kinds of files, of which five cannot be segmented."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image as PillowImage

from dinocell.io import write_image

ODD_NAMES = (
    "two words",
    "50%",
    'tail\'d "q"',
    "Zelle-µ-細胞",
    "a\nb",
    "-dash",
    "p_cells",
    "n" * 200,
)


def scene(rng: np.random.Generator) -> np.ndarray:
    """Bright discs on noise, (H, W) float64 in 0 … 1, of another size each time."""
    height, width = rng.integers(40, 110, 2)
    rows, cols = np.mgrid[:height, :width]
    image = rng.normal(0.1, 0.02, (height, width))
    for row, col in zip(rng.integers(0, height, 6), rng.integers(0, width, 6), strict=True):
        image[np.hypot(rows - row, cols - col) < rng.uniform(5, 10)] += 0.6
    return image.clip(0, 1)


# --- the kinds: each writes one file, whose name starts with `path` ---


def gray16(path: Path, image: np.ndarray) -> None:
    write_image(f"{path}.tif", (image * 4000).astype(np.uint16), pixel_size_um=0.5)


def gray8_compressed(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(f"{path}.TIFF", (image * 255).astype(np.uint8), compression="zlib")


def float32(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(f"{path}.tif", image.astype(np.float32) * 3.5 - 1)


def uint32(path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(f"{path}.tif", (image * 4e9).astype(np.uint32))


def colour(path: Path, image: np.ndarray) -> None:
    rgb = np.stack([image, image[::-1], image[:, ::-1]], axis=-1)
    write_image(f"{path}.png", (rgb * 255).astype(np.uint8))


def several_channels(path: Path, image: np.ndarray) -> None:
    planes = (np.stack([image, image[::-1]]) * 900).astype(np.uint16)
    channels = {"Name": ["DNA", "ER"]}
    tifffile.imwrite(f"{path}.ome.tif", planes, metadata={"axes": "CYX", "Channel": channels})


def several_pages(path: Path, image: np.ndarray) -> None:
    pages = (np.stack([image, image / 2, image / 3]) * 900).astype(np.uint16)
    tifffile.imwrite(f"{path}.tif", pages, photometric="minisblack")


def oblong_pixels(path: Path, image: np.ndarray) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7}
    tifffile.imwrite(f"{path}.ome.tif", (image * 900).astype(np.uint16), metadata=metadata)


def array(path: Path, image: np.ndarray) -> None:
    np.save(f"{path}.npy", image.astype(">f8"))


def png16(path: Path, image: np.ndarray) -> None:
    write_image(f"{path}.png", (image * 60_000).astype(np.uint16))


def turned_jpeg(path: Path, image: np.ndarray) -> None:
    exif = PillowImage.Exif()
    exif[274] = 6
    PillowImage.fromarray((image * 255).astype(np.uint8)).save(f"{path}.jpg", exif=exif, quality=90)


def bitmap(path: Path, image: np.ndarray) -> None:
    PillowImage.fromarray((image * 255).astype(np.uint8)).save(f"{path}.bmp")


def tiny(path: Path, image: np.ndarray) -> None:
    gray16(path, image[: 1 + image.shape[0] % 4, : 1 + image.shape[1] % 4])


def constant(path: Path, image: np.ndarray) -> None:
    write_image(f"{path}.tif", np.full(image.shape, 7, np.uint8))


def saturated(path: Path, image: np.ndarray) -> None:
    values = (image * 4000).astype(np.uint16)
    values[-9:, -30:] = 65_535
    write_image(f"{path}.tif", values)


def no_data(path: Path, image: np.ndarray) -> None:
    values = image.astype(np.float32) * 900
    values[:8] = -9999
    tifffile.imwrite(f"{path}.tif", values)


def odd_name(path: Path, image: np.ndarray) -> None:
    odd = (*ODD_NAMES, os.fsdecode(b"\xe9"))[image.size % (len(ODD_NAMES) + 1)]
    gray16(path.with_name(f"{path.name}{odd}"), image)


def broken(path: Path, image: np.ndarray) -> None:
    content = b"II*\0" + image.tobytes()[:500] if image.size % 3 else b""
    Path(f"{path}.tif").write_bytes(content)


def truncated(path: Path, image: np.ndarray) -> None:
    gray16(path, image)
    content = Path(f"{path}.tif").read_bytes()
    Path(f"{path}.tif").write_bytes(content[: len(content) // 2])


def label_image(path: Path, image: np.ndarray) -> None:
    write_image(f"{path}.png", (image > 0.4).astype(np.uint16) * (1 + image.size % 3))


GOOD = (
    gray16, gray8_compressed, float32, uint32, several_pages, oblong_pixels, array, png16, turned_jpeg,
    bitmap, tiny, constant, saturated, no_data, odd_name, colour,
)  # fmt: skip
BAD = (several_channels, broken, truncated, label_image)
KINDS = GOOD + BAD


def make_plate(folder: Path, count: int, seed: int) -> None:
    """`count` files of `KINDS`, taking turns."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for index in range(count):
        KINDS[index % len(KINDS)](folder / f"well{index}", scene(rng))
