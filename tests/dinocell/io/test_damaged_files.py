"""Damaged files of every kind: pixels or one sentence of `DINOCellError`, nothing on the screen.

`test_longer` runs the same for minutes (`-m slow`).  What it finds becomes a test of its own.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_doubles import textured, two_discs
from mutations import damaged
from PIL import Image as PillowImage

from dinocell.errors import DINOCellError
from dinocell.io import read_image, read_labels, write_labels

MAX_PIXELS = 10**6
CHECKS = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)


def picture(kind: str, pixels: np.ndarray, **options) -> bytes:
    target = io.BytesIO()
    PillowImage.fromarray(pixels).save(target, format=kind, **options)
    return target.getvalue()


def tiff(pixels: np.ndarray, **options) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, pixels, **options)
    return target.getvalue()


def array(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, pixels)
    return target.getvalue()


def labels(suffix: str, folder: Path) -> bytes:
    write_labels(folder / f"a{suffix}", two_discs())
    return (folder / f"a{suffix}").read_bytes()


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> list[bytes]:
    return valid_files(tmp_path_factory.mktemp("valid"))


def valid_files(folder: Path) -> list[bytes]:
    """One small file of each kind."""
    import cv2

    gray, deep, colour = (
        *(textured((12, 14), "uint8"), textured((12, 14))),
        textured((12, 14, 3), "uint8"),
    )
    exif = PillowImage.Exif()
    exif[274] = 6
    channels = {"axes": "CYX", "Channel": {"Name": ["x", "y"]}, "PhysicalSizeX": 0.5}
    return [
        picture("PNG", gray, exif=exif),
        picture("PNG", gray > 99),
        cv2.imencode(".png", textured((12, 14, 3)))[1].tobytes(),
        picture("JPEG", colour, exif=exif),
        picture("BMP", colour),
        picture("TIFF", colour, compression="tiff_deflate"),
        array(deep),
        array(textured((5, 12, 14), "float32")),
        tiff(deep),
        tiff(deep, compression="zlib", rowsperstrip=4, predictor=2, byteorder=">"),
        tiff(textured((32, 32), "uint8"), tile=(16, 16), bigtiff=True),
        tiff(np.stack([deep, deep]), imagej=True, metadata={"axes": "CYX", "Labels": ["a", "b"]}),
        tiff(np.stack([deep, deep]), ome=True, metadata=channels),
        labels(".tif", folder),
        labels(".png", folder),
    ]


def check(path: Path, content: bytes) -> None:
    """Every way of reading ends well or in one sentence."""
    path.write_bytes(content)
    readings: tuple[tuple[Callable, dict], ...] = (
        (read_image, {}),
        (read_image, {"page": 0}),
        (read_image, {"channels": [0]}),
        (read_labels, {"page": 0}),
    )
    for read, options in readings:
        try:
            got = read(path, max_pixels=MAX_PIXELS, **options)
        except DINOCellError as error:
            got = np.zeros((1, int(len(str(error).splitlines()) == 1)))
        pixels = got if isinstance(got, np.ndarray) else got.pixels
        assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


def examples(valid: list[bytes], path: Path, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=CHECKS,
    )
    @given(st.sampled_from(valid).flatmap(damaged))
    def run(content: bytes) -> None:
        check(path, content)

    run()


@pytest.mark.timeout(300)
def test_short(valid, tmp_path, capfd):
    examples(valid, tmp_path / "a.tif", 150)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_longer(valid, tmp_path, capfd):
    examples(valid, tmp_path / "a.tif", 2_500)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("place", [8, 30, 60, -20])
def test_16_bit_colour_png_of_damaged_chunks(valid, tmp_path, capfd, place):
    """libpng printed "CRC error" and "unsigned integer out of range"."""
    content = bytearray(valid[2])
    content[place] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DINOCellError, match="damaged"):
        read_image(tmp_path / "a.png")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bigtiff", [False, True])
def test_pages_in_a_circle_end(tmp_path, bigtiff):
    """Found by atheris: reading never ended."""
    path = tmp_path / "a.tif"
    stack = textured((3, 12, 14))
    tifffile.imwrite(path, stack, photometric="minisblack", bigtiff=bigtiff, metadata=None)
    assert read_image(path, page=2).pixels.shape == (12, 14)
    with tifffile.TiffFile(path) as tif:
        first, last, layout = tif.pages[0].offset, tif.pages[2], tif.tiff
        place = last.offset + layout.tagnosize + len(last.tags) * layout.tagsize
    content = bytearray(path.read_bytes())
    content[place : place + layout.offsetsize] = struct.pack(layout.offsetformat, first)
    path.write_bytes(content)
    for read in (read_image, read_labels):
        with pytest.raises(DINOCellError, match="refer to each other in a circle"):
            read(path, page=0)


def test_tiles_of_absurd_size_are_refused(tmp_path):
    """One changed number of a file of 2 kB asked for 300 GB."""
    tifffile.imwrite(
        tmp_path / "a.tif", textured((32, 32), "uint8"), tile=(16, 16), compression="zlib"
    )
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tif:
        tif.pages[0].tags["TileWidth"].overwrite(4_294_901_776, dtype="I")
    with pytest.raises(DINOCellError, match="its tiles should have 68,718,428,416 pixels"):
        read_image(tmp_path / "a.tif")
