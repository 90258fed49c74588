"""PNG, JPEG, BMP and arrays."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from io_doubles import textured, write_packed_gray_png
from PIL import Image as PillowImage

from dinocell.errors import ImageFileError, UsageError
from dinocell.io import (
    describe_image,
    read_image,
    read_labels,
    write_image,
)


def test_16_bit_colour_png_is_not_cut_to_8_bit(tmp_path):
    import cv2

    rgb = textured((8, 5, 3), "uint16")
    assert cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    image = read_image(tmp_path / "a.png")
    assert image.pixels.dtype == np.uint16
    np.testing.assert_array_equal(image.pixels, rgb)
    gray = np.repeat(rgb[..., :1], 3, axis=2)
    cv2.imwrite(str(tmp_path / "gray.png"), gray)
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png").pixels, rgb[..., 0])
    with_alpha = np.dstack([rgb[..., ::-1], textured((8, 5), "uint16", seed=1)])
    cv2.imwrite(str(tmp_path / "alpha.png"), with_alpha)
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png").pixels, rgb)


def test_palette_png_is_expanded_for_images_and_kept_for_labels(tmp_path):
    positions = textured((6, 7), "uint8") % 4
    picture = PillowImage.fromarray(positions, "P")
    colours = [(0, 0, 0), (255, 0, 0), (0, 255, 0), (9, 8, 7)]
    picture.putpalette([value for colour in colours for value in colour])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 255, 128, 255]))
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png").pixels, np.array(colours, dtype=np.uint8)[positions]
    )
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), positions)


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_in_png_of_few_bits_are_not_stretched(tmp_path, bits):
    values = (np.arange(24).reshape(4, 6) % 2**bits).astype(np.uint8)
    PillowImage.fromarray(values).save(tmp_path / "a.png", bits=bits)
    with open(tmp_path / "a.png", "rb") as file:
        depth = file.read(26)[24]
    if depth != bits:  # Pillow packs palettes only: build the gray header by hand
        write_packed_gray_png(tmp_path / "a.png", values, bits)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png").pixels, values * (255 // (2**bits - 1))
    )


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 8, 3), (8, 8, 3)),
        ((1, 8, 9), (8, 9)),
        ((8, 9, 1), (8, 9)),
        ((1, 1, 9), (1, 9)),
        ((40, 30, 16), (40, 30, 16)),
    ],
)
def test_npy_axes(tmp_path, shape, expected):
    pixels = textured(shape)
    np.save(tmp_path / "a.npy", pixels)
    got = read_image(tmp_path / "a.npy").pixels
    np.testing.assert_array_equal(got, pixels.reshape(expected))


def test_npy_4d_needs_a_page(tmp_path):
    stack = textured((2, 20, 9, 3))
    np.save(tmp_path / "a.npy", stack)
    with pytest.raises(ImageFileError, match="2 planes × C 3"):
        read_image(tmp_path / "a.npy")
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", page=1).pixels, stack[1])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 5, 3)])
def test_images_without_pixels_are_refused(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ImageFileError, match="at least one pixel"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("shape", [(), (7,)])
def test_npy_needs_two_axes(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ImageFileError, match="two or three axes"):
        read_image(tmp_path / "a.npy")


def test_npz_is_not_an_image(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(ImageFileError, match="unknown kind"):
        read_image(tmp_path / "a.npz")


def test_pillows_own_size_guard_does_not_stop_big_images(tmp_path, monkeypatch):
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 50)
    pixels = textured((20, 20), "uint8")
    write_image(tmp_path / "a.png", pixels)  # 400 > 2 × 50: Pillow's open would raise
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, pixels)
    assert PillowImage.MAX_IMAGE_PIXELS == 50


def test_pictures_have_page_0_only(tmp_path):
    write_image(tmp_path / "a.png", textured((4, 5), "uint8"))
    assert read_image(tmp_path / "a.png", page=0).pixels.shape == (4, 5)
    with pytest.raises(UsageError, match="one plane"):
        read_image(tmp_path / "a.png", page=1)


# What a viewer shows of the stored rows [[1, 2, 3], [4, 5, 6]], by orientation (EXIF 2.3, tag 274).
UPRIGHT = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[4, 1], [5, 2], [6, 3]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[3, 6], [2, 5], [1, 4]],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_are_turned_upright_as_their_file_states(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    exif = PillowImage.Exif()
    exif[274] = orientation
    stored = np.array(UPRIGHT[1], np.uint8)
    PillowImage.fromarray(stored).save(path, exif=exif)
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, UPRIGHT[orientation])
    assert describe_image(path).series[0].upright_shape == image.pixels.shape
    np.testing.assert_array_equal(read_labels(path), UPRIGHT[orientation])
    assert image.pixels.flags.c_contiguous
    stated = f"(orientation {orientation}): it was turned upright"
    assert [stated in note for note in image.notes] == [True] * (orientation != 1)


def test_photographs_are_turned_upright(tmp_path):
    stored = np.zeros((16, 24, 3), np.uint8)
    stored[:8, :8] = 250, 20, 20  # upper left as stored: upper right when turned to the right
    exif = PillowImage.Exif()
    exif[274] = 6
    PillowImage.fromarray(stored).save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = read_image(tmp_path / "a.jpg").pixels
    assert pixels.shape == (24, 16, 3)
    assert pixels[4, 12, 0] > 200 > pixels[4, 4, 0]


def test_16_bit_colour_png_is_turned_upright(tmp_path):
    import struct
    import zlib

    import cv2

    rgb = textured((4, 6, 3), "uint16")
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    block = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, 3, 0) + b"\0" * 4
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, rgb[::-1, ::-1])


def test_damaged_exif_leaves_a_picture_as_it_is(tmp_path, capfd):
    pixels = textured((4, 6), "uint8")
    PillowImage.fromarray(pixels).save(
        tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, pixels)
    assert capfd.readouterr().err == ""
