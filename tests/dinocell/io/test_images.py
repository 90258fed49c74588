"""Files in and out: every kind that is read, everything that can be wrong with one, and what is left."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from dinocell.errors import DINOCellError, ImageFileError, MissingExtraError, UsageError
from dinocell.io import (
    find_images,
    read_image,
    read_labels,
    select_channels,
    write_image,
    write_labels,
)
from dinocell.labels import looks_like_labels

REPO = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("DINOCELL_DATA", REPO / "../shared/data")).resolve()
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"real data are not at {DATA} (set DINOCELL_DATA)"
)


def textured(shape: tuple[int, ...], dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def two_discs(value: int = 1) -> np.ndarray:
    """Two touching discs of radius 6, labelled 1 and 2 (times `value`)."""
    rows, cols = np.ogrid[:20, :32]
    labels = np.zeros((20, 32), dtype=np.int64)
    labels[(rows - 9) ** 2 + (cols - 9) ** 2 <= 36] = value
    labels[(rows - 9) ** 2 + (cols - 21) ** 2 <= 36] = 2 * value
    return labels


# ------------------------------------------------------------------------------- kinds of images


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64"]
)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (13, 9), (13, 9, 2), (6, 1, 3)])
def test_tiff_round_trip_keeps_pixels_and_dtype(tmp_path, dtype, shape):
    pixels = textured(shape, dtype)
    write_image(tmp_path / "a.tif", pixels)
    image = read_image(tmp_path / "a.tif")
    assert image.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.path == tmp_path / "a.tif"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float64"])
def test_npy_round_trip(tmp_path, dtype):
    pixels = textured((9, 5), "uint8").astype(dtype)
    write_image(tmp_path / "a.npy", pixels)
    got = read_image(tmp_path / "a.npy").pixels
    if dtype == "bool":
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, pixels * np.uint8(255))
    else:
        assert got.dtype == pixels.dtype
        np.testing.assert_array_equal(got, pixels)


def test_narrow_types_that_tiff_lacks_are_stated(tmp_path):
    write_image(tmp_path / "half.tif", textured((4, 5), "float16"))
    assert read_image(tmp_path / "half.tif").pixels.dtype == np.float32
    write_image(tmp_path / "bool.tif", np.eye(5, dtype=bool))
    np.testing.assert_array_equal(
        read_image(tmp_path / "bool.tif").pixels, np.eye(5, dtype=np.uint8) * 255
    )
    with pytest.raises(ValueError, match="32 bit"):
        write_image(tmp_path / "long.tif", textured((4, 5), "int64"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_gray_png_keeps_its_depth(tmp_path, dtype):
    pixels = textured((11, 6), dtype)
    write_image(tmp_path / "a.png", pixels)
    got = read_image(tmp_path / "a.png").pixels
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, pixels)


def test_rgb_png_and_tiff_are_channel_last_with_names(tmp_path):
    pixels = textured((8, 5, 3), "uint8")
    for name in ("a.png", "a.tif"):
        write_image(tmp_path / name, pixels)
        image = read_image(tmp_path / name)
        np.testing.assert_array_equal(image.pixels, pixels)
        assert image.channel_names == ("red", "green", "blue")


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


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_gray_stored_as_colour_comes_back_as_one_channel(tmp_path, suffix):
    gray = textured((8, 5), "uint8")
    path = tmp_path / f"a{suffix}"
    PillowImage.fromarray(np.repeat(gray[..., None], 3, axis=2)).save(path)
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, gray)
    assert image.channel_names is None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_dropped(tmp_path, suffix):
    rgba = textured((8, 5, 4), "uint8")
    PillowImage.fromarray(rgba, "RGBA").save(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").pixels, rgba[..., :3])
    gray_alpha = textured((8, 5, 2), "uint8")
    PillowImage.fromarray(gray_alpha, "LA").save(tmp_path / f"b{suffix}")
    np.testing.assert_array_equal(read_image(tmp_path / f"b{suffix}").pixels, gray_alpha[..., 0])


def test_a_fourth_sample_that_is_not_alpha_is_kept(tmp_path):
    pixels = textured((8, 5, 4), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=[0])
    image = read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.channel_names is None


def test_planar_rgb_tiff(tmp_path):
    pixels = textured((3, 8, 5), "uint8")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, np.moveaxis(pixels, 0, -1))


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


def test_one_bit_files(tmp_path):
    mask = np.random.default_rng(0).random((9, 11)) > 0.5
    for name in ("a.png", "a.tif", "a.bmp"):
        PillowImage.fromarray(mask).save(tmp_path / name)
        got = read_image(tmp_path / name).pixels
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, mask * 255)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), mask)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), mask)


@pytest.mark.parametrize("bits", [2, 4])
def test_labels_in_png_of_few_bits_are_not_stretched(tmp_path, bits):
    values = (np.arange(24).reshape(4, 6) % 2**bits).astype(np.uint8)
    PillowImage.fromarray(values).save(tmp_path / "a.png", bits=bits)
    with open(tmp_path / "a.png", "rb") as file:
        depth = file.read(26)[24]
    if depth != bits:  # Pillow packs palettes only: build the gray header by hand
        _write_packed_gray_png(tmp_path / "a.png", values, bits)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), values)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png").pixels, values * (255 // (2**bits - 1))
    )


def _write_packed_gray_png(path: Path, values: np.ndarray, bits: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = []
    for row in values:
        digits = "".join(format(int(value), f"0{bits}b") for value in row)
        digits += "0" * (-len(digits) % 8)
        rows.append(b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


def test_white_is_zero_is_inverted_for_images_only(tmp_path):
    pixels = textured((6, 7), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, 65535 - pixels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), pixels)


def test_big_endian_tiff_and_npy_come_back_native(tmp_path):
    pixels = textured((6, 7), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=">")
    np.save(tmp_path / "a.npy", pixels.astype(">u2"))
    for name in ("a.tif", "a.npy"):
        got = read_image(tmp_path / name).pixels
        assert got.dtype.isnative
        np.testing.assert_array_equal(got, pixels)


def test_jpeg_and_wrong_suffix_go_by_content(tmp_path):
    gray = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))
    PillowImage.fromarray(gray).save(tmp_path / "a.jpg", quality=95)
    got = read_image(tmp_path / "a.jpg").pixels
    assert got.shape == gray.shape
    assert np.abs(got.astype(int) - gray).max() <= 12
    os.rename(tmp_path / "a.jpg", tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, got)


# --------------------------------------------------------------- channels, stacks, pages, series


@pytest.fixture
def ome_channels(tmp_path):
    pixels = textured((3, 8, 5))
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        pixels,
        metadata={
            "axes": "CYX",
            "Channel": {"Name": ["DNA", "ER", "Mito"]},
            "PhysicalSizeX": 325,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.325,
            "PhysicalSizeYUnit": "µm",
        },
    )
    return tmp_path / "a.ome.tif", pixels


def test_ome_channels_names_and_pixel_size(ome_channels):
    path, pixels = ome_channels
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, np.moveaxis(pixels, 0, -1))
    assert image.channel_names == ("DNA", "ER", "Mito")
    assert image.pixel_size_um == pytest.approx(0.325)


@pytest.mark.parametrize(
    ("channels", "planes", "names"),
    [
        ([0], 0, ("DNA",)),
        (["mito"], 2, ("Mito",)),
        (["1"], 1, ("ER",)),
        ([2, "dna"], [2, 0], ("Mito", "DNA")),
    ],
)
def test_channels_by_position_and_name(ome_channels, channels, planes, names):
    path, pixels = ome_channels
    image = read_image(path, channels=channels)
    expected = pixels[planes] if isinstance(planes, int) else np.moveaxis(pixels[planes], 0, -1)
    np.testing.assert_array_equal(image.pixels, expected)
    assert image.channel_names == names


@pytest.mark.parametrize(
    ("channels", "sentence"),
    [
        ([3], r"no channel 3.*0 … 2 \(DNA, ER, Mito\)"),
        ([-1], "no channel -1"),
        (["AGP"], "no channel 'AGP'.*DNA, ER, Mito"),
        ([0, "DNA"], "must differ"),
        ([], "at least one channel"),
    ],
)
def test_wrong_channels_name_the_known_ones(ome_channels, channels, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_image(ome_channels[0], channels=channels)


def test_channels_must_not_be_one_text(ome_channels):
    with pytest.raises(TypeError, match="list"):
        read_image(ome_channels[0], channels="DNA")


def test_channels_of_colour_and_gray(tmp_path):
    pixels = textured((8, 5, 3), "uint8")
    write_image(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png", channels=["green"]).pixels, pixels[..., 1]
    )
    write_image(tmp_path / "gray.png", pixels[..., 0])
    np.testing.assert_array_equal(
        read_image(tmp_path / "gray.png", channels=[0]).pixels, pixels[..., 0]
    )
    with pytest.raises(UsageError, match="one channel"):
        read_image(tmp_path / "gray.png", channels=[1])


def test_select_channels_on_arrays():
    pixels = textured((4, 5, 3))
    np.testing.assert_array_equal(select_channels(pixels, None, [2]), pixels[..., 2])
    np.testing.assert_array_equal(
        select_channels(pixels, ["a", "b", "c"], ["C", 0]), pixels[..., [2, 0]]
    )
    np.testing.assert_array_equal(select_channels(pixels[..., 0], None, ["0"]), pixels[..., 0])
    np.testing.assert_array_equal(  # a name wins over a position
        select_channels(pixels, ["1", "0", "2"], ["0"]), pixels[..., 1]
    )


def test_only_the_wanted_channels_are_decoded(ome_channels, monkeypatch):
    path, _ = ome_channels
    decoded = []
    original = tifffile.TiffPage.asarray

    def spy(self, *args, **kwargs):
        decoded.append(self.index)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(tifffile.TiffPage, "asarray", spy)
    monkeypatch.setattr(tifffile.TiffFrame, "asarray", spy)
    read_image(path, channels=["ER"])
    assert decoded == [1]


def test_five_dimensional_stack_needs_a_page(tmp_path):
    stack = textured((2, 3, 4, 6, 5))  # T, Z, C, Y, X
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "TZCYX"})
    with pytest.raises(
        ImageFileError, match=r"TZCYX and sizes 2 × 3 × 4 × 6 × 5.*by `page`, 0 … 5"
    ):
        read_image(tmp_path / "a.tif")
    for page in range(6):
        np.testing.assert_array_equal(
            read_image(tmp_path / "a.tif", page=page).pixels,
            np.moveaxis(stack[page // 3, page % 3], 0, -1),
        )
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.tif", page=4, channels=[3]).pixels, stack[1, 1, 3]
    )
    for wrong in (6, -1):
        with pytest.raises(UsageError, match="0 … 5"):
            read_image(tmp_path / "a.tif", page=wrong)


def test_channel_axis_before_the_stack_axis(tmp_path):
    stack = textured((2, 3, 6, 5))
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata={"axes": "CZYX"})
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.ome.tif", page=2).pixels, np.moveaxis(stack[:, 2], 0, -1)
    )


def test_volume_stored_in_one_page(tmp_path):
    stack = textured((4, 16, 16))
    tifffile.imwrite(
        tmp_path / "a.tif", stack, volumetric=True, tile=(4, 16, 16), photometric="minisblack"
    )
    with pytest.raises(ImageFileError, match="4 × 16 × 16"):
        read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", page=2).pixels, stack[2])


def test_stack_without_a_description_is_planes_or_channels_as_told(tmp_path):
    stack = textured((5, 8, 6))
    tifffile.imwrite(tmp_path / "a.tif", stack)
    with PillowImage.fromarray(stack[0]) as first:
        first.save(
            tmp_path / "b.tif",
            save_all=True,
            append_images=[PillowImage.fromarray(plane) for plane in stack[1:]],
        )
    np.save(tmp_path / "a.npy", stack)
    for name in ("a.tif", "b.tif", "a.npy"):
        with pytest.raises(ImageFileError, match=r"5 × 8 × 6.*`page`, 0 … 4.*`channels`"):
            read_image(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, page=3).pixels, stack[3])
        np.testing.assert_array_equal(
            read_image(tmp_path / name, channels=[4, 1]).pixels, np.moveaxis(stack[[4, 1]], 0, -1)
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
    with pytest.raises(ImageFileError, match="QYXC and sizes 2 × 20 × 9 × 3"):
        read_image(tmp_path / "a.npy")
    np.testing.assert_array_equal(read_image(tmp_path / "a.npy", page=1).pixels, stack[1])


def test_several_series_need_a_page_that_counts_through_them(tmp_path):
    first, second = textured((2, 8, 6)), textured((5, 4), seed=1)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tif:
        tif.write(first, metadata={"axes": "ZYX"})
        tif.write(second, metadata={"axes": "YX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 2.0})
    with pytest.raises(ImageFileError, match="2 images of 3 planes"):
        read_image(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif", page=1).pixels, first[1])
    last = read_image(tmp_path / "a.ome.tif", page=2)
    np.testing.assert_array_equal(last.pixels, second)
    assert last.pixel_size_um == 2.0
    assert read_image(tmp_path / "a.ome.tif", page=0).pixel_size_um is None


def test_a_reduced_copy_is_not_a_second_image(tmp_path):
    pixels = textured((64, 48))
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tif:
        tif.write(pixels, subifds=1, metadata={"axes": "YX"})
        tif.write(pixels[::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif").pixels, pixels)
    with tifffile.TiffWriter(tmp_path / "b.tif") as tif:
        tif.write(pixels, metadata=None)
        tif.write(pixels[::4, ::4], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels, pixels)


def test_pictures_have_page_0_only(tmp_path):
    write_image(tmp_path / "a.png", textured((4, 5), "uint8"))
    assert read_image(tmp_path / "a.png", page=0).pixels.shape == (4, 5)
    with pytest.raises(UsageError, match="one plane"):
        read_image(tmp_path / "a.png", page=1)


def test_colour_stack_with_channels_is_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        textured((2, 8, 6, 3), "uint8"),
        photometric="rgb",
        metadata={"axes": "CYXS"},
    )
    with pytest.raises(ImageFileError, match="CYXS"):
        read_image(tmp_path / "a.ome.tif")


# ---------------------------------------------------------------------------------- pixel sizes


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int32"])  # ImageJ, ImageJ, OME
@pytest.mark.parametrize("size", [0.1625, 0.5, 1 / 3, 2.0])
def test_pixel_size_round_trip(tmp_path, dtype, size):
    write_image(tmp_path / "a.tif", textured((4, 5), dtype), pixel_size_um=size)
    assert read_image(tmp_path / "a.tif").pixel_size_um == pytest.approx(size, rel=1e-8)


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("micron", 1), ("\\u00B5m", 1), ("um", 1), ("nm", 1e-3), ("mm", 1e3)],
)
def test_imagej_units(tmp_path, unit, factor):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured((4, 5)),
        imagej=True,
        resolution=(4.0, 4.0),
        metadata={"unit": unit},
    )
    assert read_image(tmp_path / "a.tif").pixel_size_um == pytest.approx(0.25 * factor)


@pytest.mark.parametrize("unit", ["pixel", "furlong", ""])
def test_imagej_without_a_unit_of_length(tmp_path, unit):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured((4, 5)),
        imagej=True,
        resolution=(4.0, 4.0),
        metadata={"unit": unit},
    )
    assert read_image(tmp_path / "a.tif").pixel_size_um is None


@pytest.mark.parametrize("unit", ["inch", "centimeter"])
def test_bare_tiff_resolution_is_not_a_pixel_size(tmp_path, unit):
    tifffile.imwrite(
        tmp_path / "a.tif", textured((4, 5)), resolution=(1550.3, 1550.3), resolutionunit=unit
    )
    assert read_image(tmp_path / "a.tif").pixel_size_um is None


def test_printing_default_of_imagej_is_not_a_pixel_size(tmp_path):
    for resolution, expected in ((72.0, None), (50_800.0, 0.5)):
        tifffile.imwrite(
            tmp_path / "a.tif",
            textured((4, 5)),
            imagej=True,
            resolution=(resolution, resolution),
            metadata={"unit": "inch"},
        )
        assert read_image(tmp_path / "a.tif").pixel_size_um == pytest.approx(expected)


def test_oblong_pixels_give_no_size_and_a_warning(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        textured((4, 5)),
        metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7},
    )
    with pytest.warns(UserWarning, match="square"):
        assert read_image(tmp_path / "a.ome.tif").pixel_size_um is None


# ------------------------------------------------------------------------------------ bad images


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 400


def test_missing_file_and_folder(tmp_path):
    for reader in (read_image, read_labels):
        with pytest.raises(UsageError, match="There is no file") as caught:
            reader(tmp_path / "nowhere.tif")
        assert caught.value.exit_code == 2
        with pytest.raises(UsageError, match="folder"):
            reader(tmp_path)


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jpg", ".npy", ".bmp"])
def test_empty_text_and_foreign_content(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    for content, word in (
        (b"", "0 bytes"),
        (b"id,area\n1,20\n", "text"),
        ("Zellen: größer\n".encode(), "text"),
        (b"%PDF-1.7\n\x80\x81", "unknown kind"),
        (bytes(range(40)), "unknown kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageFileError, match=word) as caught:
            read_image(path)
        assert caught.value.exit_code == 1
        assert one_sentence(caught.value)


def samples(folder: Path) -> list[Path]:
    import cv2

    gray, deep = textured((40, 52), "uint8"), textured((40, 52))
    colour = textured((40, 52, 3), "uint8")
    PillowImage.fromarray(gray).save(folder / "gray.png")
    PillowImage.fromarray(deep).save(folder / "deep.png")
    PillowImage.fromarray(colour).quantize(20).save(folder / "palette.png")
    cv2.imwrite(str(folder / "colour16.png"), textured((40, 52, 3)))
    PillowImage.fromarray(colour).save(folder / "colour.jpg")
    PillowImage.fromarray(colour).save(folder / "colour.bmp")
    np.save(folder / "array.npy", deep)
    tifffile.imwrite(folder / "plain.tif", deep)
    tifffile.imwrite(folder / "strips.tif", deep, compression="zlib", rowsperstrip=8)
    tifffile.imwrite(folder / "imagej.tif", np.stack([deep, deep]), imagej=True)
    tifffile.imwrite(folder / "ome.ome.tif", np.stack([deep, deep]), metadata={"axes": "CYX"})
    PillowImage.fromarray(colour).save(folder / "libtiff.tif", compression="tiff_deflate")
    return sorted(folder.iterdir())


def pixels_or_error(path: Path) -> np.ndarray | DINOCellError:
    try:
        return read_image(path, page=0).pixels
    except DINOCellError as err:
        return err


def test_files_cut_anywhere_never_give_wrong_pixels(tmp_path, capfd):
    rng = np.random.default_rng(0)
    for path in samples(tmp_path):
        whole, content = read_image(path, page=0).pixels, path.read_bytes()
        cuts = {*rng.integers(1, len(content), 25).tolist(), 4, 8, len(content) // 2}
        refused = 0
        for cut in cuts:
            path.write_bytes(content[:cut])
            got = pixels_or_error(path)
            if isinstance(got, ImageFileError):
                assert one_sentence(got), got
                refused += 1
            else:
                np.testing.assert_array_equal(got, whole)
        assert refused >= len(cuts) // 2
    assert capfd.readouterr().err == ""


def test_damaged_bytes_never_escape_as_foreign_exceptions(tmp_path, capfd):
    rng = np.random.default_rng(0)
    for path in samples(tmp_path):
        content = path.read_bytes()
        for trial in range(30):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content) if trial % 2 else 200, 3):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged)
            got = pixels_or_error(path)
            assert one_sentence(got) if isinstance(got, DINOCellError) else got.ndim in (2, 3)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_pixels_must_be_finite(tmp_path, bad):
    pixels = textured((4, 5), "float32")
    pixels[2, 3] = bad
    for name in ("a.tif", "a.npy"):
        write_image(tmp_path / name, pixels)
        with pytest.raises(ImageFileError, match="1 of 20 are NaN or infinite"):
            read_image(tmp_path / name)


def test_complex_text_and_object_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((4, 5), dtype=np.complex64))
    tifffile.imwrite(tmp_path / "a.tif", np.ones((4, 5), dtype=np.complex64))
    for name in ("a.npy", "a.tif"):
        with pytest.raises(ImageFileError, match="complex64"):
            read_image(tmp_path / name)
    np.save(tmp_path / "a.npy", np.full((4, 5), "x"))
    with pytest.raises(ImageFileError, match="<U1"):
        read_image(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.full((4, 5), None), allow_pickle=True)
    with pytest.raises(ImageFileError, match="Python objects"):
        read_image(tmp_path / "a.npy")


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


def test_absurd_sizes_are_refused_from_the_header(tmp_path):
    _write_packed_gray_png(tmp_path / "a.png", np.zeros((1, 8), dtype=np.uint8), 2)
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageFileError, match="100,000 × 100,000 = 10,000,000,000"):
        read_image(tmp_path / "a.png")
    header_only = np.lib.format.magic(1, 0)
    with open(tmp_path / "a.npy", "wb") as file:
        assert header_only.startswith(b"\x93NUMPY")
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<u2", "fortran_order": False, "shape": (10**6, 10**6)}
        )
    with pytest.raises(ImageFileError, match="1,000,000 × 1,000,000"):
        read_image(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".bmp"])
def test_max_pixels_is_an_inclusive_limit(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".bmp":
        PillowImage.fromarray(textured((10, 20), "uint8")).save(path)
    else:
        write_image(path, textured((10, 20), "uint8"))
    assert read_image(path, max_pixels=200).pixels.shape == (10, 20)
    with pytest.raises(ImageFileError, match="up to 199 pixels"):
        read_image(path, max_pixels=199)
    with pytest.raises(ImageFileError, match="up to 199 pixels"):
        read_labels(path, max_pixels=199)


def test_pillows_own_size_guard_does_not_stop_big_images(tmp_path, monkeypatch):
    monkeypatch.setattr(PillowImage, "MAX_IMAGE_PIXELS", 50)
    pixels = textured((20, 20), "uint8")
    write_image(tmp_path / "a.png", pixels)  # 400 > 2 × 50: Pillow's open would raise
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels, pixels)
    assert PillowImage.MAX_IMAGE_PIXELS == 50


@pytest.mark.parametrize("suffix", [".czi", ".nd2", ".lif", ".ims"])
def test_formats_not_read_yet_say_what_to_do(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"anything")
    with pytest.raises(ImageFileError, match=r"cannot be read yet.*OME-TIFF"):
        read_image(path)


def test_zarr_folder_says_what_to_do(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ImageFileError, match=r"Zarr.*cannot be read yet.*OME-TIFF"):
        read_image(tmp_path / "a.zarr")


def test_unreadable_rights(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", textured((4, 5), "uint8"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageFileError, match="rights"):
        read_image(tmp_path / "a.png")


def test_multi_file_ome_with_a_missing_part(tmp_path):
    planes = textured((2, 8, 6))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:{0}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" '
        'Type="uint16" SizeX="6" SizeY="8" SizeC="2" SizeZ="1" SizeT="1">'
        '<TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:{0}</UUID>'
        '</TiffData><TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="b.ome.tif">'
        "urn:uuid:{1}</UUID></TiffData></Pixels></Image></OME>"
    )
    ids = ("0" * 8 + "-0000-0000-0000-" + "0" * 12, "1" * 8 + "-0000-0000-0000-" + "0" * 12)
    for name, plane, order in (("a", planes[0], ids), ("b", planes[1], ids[::-1])):
        text = xml.format(*ids) if order == ids else xml.format(*ids).replace(ids[0], ids[1], 1)
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", plane, description=text, metadata=None)
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.ome.tif").pixels, np.moveaxis(planes, 0, -1)
    )
    (tmp_path / "b.ome.tif").unlink()
    with pytest.raises(ImageFileError, match="other files"):
        read_image(tmp_path / "a.ome.tif")
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.ome.tif", channels=[0]).pixels, planes[0]
    )


def test_missing_codec_names_the_extra(tmp_path):
    """Without imagecodecs our own files are written and read; LZW and JPEG name the extra."""
    pixels = textured((16, 16), "uint8")
    tifffile.imwrite(tmp_path / "lzw.tif", pixels, compression="lzw")
    script = """
import sys
sys.modules["imagecodecs"] = None
import numpy as np
from dinocell.errors import MissingExtraError
from dinocell.io import read_image, read_labels, write_labels
folder = sys.argv[1]
labels = np.arange(12).reshape(3, 4)
write_labels(folder + "/a.tif", labels)
assert (read_labels(folder + "/a.tif") == labels).all()
try:
    read_image(folder + "/lzw.tif")
except MissingExtraError as err:
    print(err)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install imagecodecs" in done.stdout
    assert "lzw.tif" in done.stdout
    assert done.stderr == ""
    pytest.importorskip("imagecodecs", reason="the rest needs imagecodecs")
    np.testing.assert_array_equal(read_image(tmp_path / "lzw.tif").pixels, pixels)


def test_codec_error_is_raised_as_missing_extra(tmp_path, monkeypatch):
    write_image(tmp_path / "a.tif", textured((4, 5)))

    def refuse(*args, **kwargs):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    with pytest.raises(MissingExtraError, match="imagecodecs"):
        read_image(tmp_path / "a.tif")


def test_messages_of_tifffile_outside_our_reader_still_reach_its_log(caplog):
    with caplog.at_level(logging.WARNING, logger="tifffile"):
        logging.getLogger("tifffile").warning("hello")
    assert "hello" in caplog.text


def test_threads_read_and_fail_side_by_side(tmp_path, capfd):
    """The filters over the libraries' complaints belong to one thread each."""
    from concurrent.futures import ThreadPoolExecutor

    good, broken = textured((30, 40)), tmp_path / "broken.tif"
    write_image(tmp_path / "good.tif", good)
    write_image(tmp_path / "good.png", good)
    broken.write_bytes((tmp_path / "good.tif").read_bytes()[:200])
    paths = [tmp_path / "good.tif", broken, tmp_path / "good.png"] * 40
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(pixels_or_error, paths))
    for path, result in zip(paths, results, strict=True):
        if path == broken:
            assert isinstance(result, ImageFileError)
        else:
            np.testing.assert_array_equal(result, good)
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------- label images


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int8", "int16", "int32"])
def test_labels_of_every_integer_type(tmp_path, dtype):
    labels = two_discs().astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", labels)
    got = read_labels(tmp_path / "a.tif")
    assert got.dtype == np.uint32
    np.testing.assert_array_equal(got, labels)


@pytest.mark.parametrize("dtype", ["int64", "uint64", "float32", "float64"])
def test_labels_as_wide_or_whole_floats(tmp_path, dtype):
    labels = two_discs(40_000).astype(dtype)
    np.save(tmp_path / "a.npy", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.npy"), labels)
    tifffile.imwrite(tmp_path / "a.tif", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), labels)


def test_labels_stored_as_gray_colour(tmp_path):
    labels = two_discs(100).astype(np.uint8)
    write_image(tmp_path / "a.png", np.repeat(labels[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), labels)


def test_colour_mask_is_not_a_label_image(tmp_path):
    colours = np.zeros((20, 32, 3), dtype=np.uint8)
    colours[two_discs() == 1] = (255, 0, 0)
    colours[two_discs() == 2] = (0, 255, 0)
    write_image(tmp_path / "a.png", colours)
    with pytest.raises(ImageFileError, match=r"label image is needed.*colour") as caught:
        read_labels(tmp_path / "a.png")
    assert one_sentence(caught.value)
    write_image(tmp_path / "a.tif", textured((5, 6, 2)))
    with pytest.raises(ImageFileError, match="2 channels"):
        read_labels(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (-1.0, "0 … 4,294,967,295.*-1"),
        (0.5, "whole numbers"),
        (np.nan, "whole numbers"),
        (np.inf, "whole numbers"),
        (2.0**32, "0 … 4,294,967,295"),
    ],
)
def test_impossible_labels(tmp_path, value, sentence):
    labels = two_discs().astype(np.float64)
    labels[0, 0] = value
    np.save(tmp_path / "a.npy", labels)
    with pytest.raises(ImageFileError, match=sentence):
        read_labels(tmp_path / "a.npy")


def test_label_stack_needs_a_page(tmp_path):
    stack = np.stack([two_discs(), 3 * two_discs()]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata={"axes": "TYX"})
    with pytest.raises(ImageFileError, match="`page`"):
        read_labels(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif", page=1), stack[1])


# -------------------------------------------------------------------------------- writing labels


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".png", ".npy"])
@pytest.mark.parametrize("high", [0, 2, 255, 256, 65_535])
def test_labels_round_trip_as_16_bit(tmp_path, suffix, high):
    labels = two_discs()
    labels[labels == 2] = high
    path = tmp_path / f"a{suffix}"
    assert write_labels(path, labels) == np.uint16
    assert read_image(path).pixels.dtype == np.uint16
    np.testing.assert_array_equal(read_labels(path), labels)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".npy"])
@pytest.mark.parametrize("high", [65_536, 70_000, 2**32 - 1])
def test_more_than_65535_labels_are_32_bit(tmp_path, suffix, high):
    labels = two_discs()
    labels[labels == 2] = high
    path = tmp_path / f"a{suffix}"
    assert write_labels(path, labels) == np.uint32
    assert read_image(path).pixels.dtype == np.uint32
    np.testing.assert_array_equal(read_labels(path), labels)


def test_70000_cells_survive(tmp_path):
    labels = np.arange(280 * 251, dtype=np.uint32).reshape(280, 251)
    write_labels(tmp_path / "a.tif", labels)
    got = read_labels(tmp_path / "a.tif")
    np.testing.assert_array_equal(got, labels)
    assert len(np.unique(got)) == 70_280


def test_png_refuses_more_than_65535_labels(tmp_path):
    with pytest.raises(ImageFileError, match=r"65,535.*70,000.*\.tif"):
        write_labels(tmp_path / "a.png", two_discs(35_000))
    assert list(tmp_path.iterdir()) == []


def test_label_tiffs_describe_themselves(tmp_path):
    write_labels(tmp_path / "a.tif", two_discs(), pixel_size_um=0.25)
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        described = tif.imagej_metadata
        assert (described["min"], described["max"], described["unit"]) == (0.0, 2.0, "um")
        assert "0 is background" in described["Info"]
    write_labels(tmp_path / "b.tif", two_discs(40_000), pixel_size_um=0.25)
    with tifffile.TiffFile(tmp_path / "b.tif") as tif:
        assert tif.is_ome
        assert "0 is background" in tif.ome_metadata
    for name in ("a.tif", "b.tif"):
        assert read_image(tmp_path / name).pixel_size_um == pytest.approx(0.25)


def test_compression_changes_the_file_and_not_the_labels(tmp_path):
    labels = np.kron(two_discs(), np.ones((8, 8), dtype=np.int64))
    write_labels(tmp_path / "a.tif", labels)
    write_labels(tmp_path / "b.tif", labels, compression="none")
    small, large = ((tmp_path / name).stat().st_size for name in ("a.tif", "b.tif"))
    assert small < large / 5
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), read_labels(tmp_path / "b.tif"))


@pytest.mark.parametrize(
    ("labels", "options", "kind"),
    [
        (two_discs().astype(float), {}, TypeError),
        (np.zeros((2, 3, 4), dtype=int), {}, ValueError),
        (np.zeros((0, 4), dtype=int), {}, ValueError),
        (-two_discs(), {}, ValueError),
        (two_discs() * 2**31, {}, ValueError),
        (two_discs(), {"compression": "lzw"}, ValueError),
        (two_discs(), {"pixel_size_um": 0.0}, ValueError),
        (two_discs(), {"pixel_size_um": float("nan")}, ValueError),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, labels, options, kind):
    with pytest.raises(kind):
        write_labels(tmp_path / "a.tif", labels, **options)
    assert list(tmp_path.iterdir()) == []


def test_write_image_checks_its_arguments(tmp_path):
    for path, pixels, options in (
        ("a.jpg", np.zeros((4, 5), dtype=np.uint8), {}),
        ("a.png", np.zeros((4, 5), dtype=np.float32), {}),
        ("a.png", np.zeros((4, 5, 4), dtype=np.uint8), {}),
        ("a.tif", np.zeros((4, 5, 2)), {"channel_names": ["one"]}),
        ("a.tif", np.zeros(4), {}),
    ):
        with pytest.raises(ValueError):
            write_image(tmp_path / path, pixels, **options)
    with pytest.raises(TypeError):
        write_image(tmp_path / "a.tif", np.zeros((4, 5), dtype=complex))
    assert list(tmp_path.iterdir()) == []


def test_channel_names_round_trip(tmp_path):
    for dtype in ("uint8", "float64"):
        pixels = textured((6, 7, 3), dtype)
        write_image(tmp_path / "a.tif", pixels, channel_names=["DNA", "ER", "Mito"])
        image = read_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(image.pixels, pixels)
        assert image.channel_names == ("DNA", "ER", "Mito")


# --------------------------------------------------------------------------------- atomic writing


def test_write_that_dies_inside_the_encoder_leaves_the_old_labels(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write_labels(path, two_discs())
    before = path.read_bytes()

    def full_disk(target, *args, **kwargs):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tifffile, "imwrite", full_disk)
    with pytest.raises(ImageFileError, match="No space left on device"):
        write_labels(path, 5 * two_discs())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tif"]


def test_path_below_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ImageFileError, match="cannot be written"):
        write_labels(tmp_path / "file" / "a.tif", two_discs())


# ------------------------------------------------------------------------------ masks, not images


def test_masks_and_labels_are_recognised():
    mask = (two_discs() > 0).astype(np.uint8)
    for pixels in (
        mask,
        mask * 255,
        mask.astype(bool),
        two_discs(),
        two_discs().astype(np.float32),
        255 - mask * 255,
        two_discs(30_000).astype(np.uint16),
        two_discs(2**30),
        np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20), dtype=int)),  # no background
    ):
        assert looks_like_labels(pixels)
    colours = np.array([(0, 0, 0), (255, 30, 0), (0, 90, 255)], dtype=np.uint8)[two_discs()]
    assert looks_like_labels(colours)


def test_images_are_not_taken_for_masks():
    rows, cols = np.mgrid[:64, :64]
    blob = 200 * np.exp(-((rows - 30) ** 2 + (cols - 30) ** 2) / 200)
    dark = np.random.default_rng(0).poisson(0.02, (64, 64))  # photon counts, mostly 0
    for pixels in (
        textured((64, 64), "uint8"),
        textured((64, 64), "float32"),
        textured((64, 64, 3), "uint8"),
        textured((64, 64, 2), "uint8"),
        blob.astype(np.uint8),
        (blob / 20).astype(np.uint8),  # ten gray levels: flat steps that follow one another
        dark,
        np.zeros((64, 64), dtype=np.uint16),
        np.full((64, 64), 7),
        np.ones((1, 1)),
        np.zeros((0, 3)),
        two_discs() + 0.5,
    ):
        assert not looks_like_labels(pixels)


# ---------------------------------------------------------------------------------- finding files


@pytest.fixture
def folder(tmp_path):
    for name in (
        "img10.tif",
        "img2.tif",
        "IMG1.PNG",
        "a_labels.tif",
        "a_overlay.png",
        "a_distance_map.tif",
        ".hidden.png",
        "notes.txt",
        "sub/deep.jpg",
        ".git/x.png",
        "data.zarr/0.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_folder_in_natural_order_without_hidden_files_and_outputs(folder):
    assert names(find_images([folder]), folder) == ["IMG1.PNG", "img2.tif", "img10.tif"]


def test_recursive_goes_into_folders_but_not_into_zarr(folder):
    found = names(find_images([folder], recursive=True), folder)
    assert found == ["IMG1.PNG", "img2.tif", "img10.tif", "sub/deep.jpg"]


def test_outputs_on_request(folder):
    found = names(find_images([folder], include_outputs=True), folder)
    assert {"a_labels.tif", "a_overlay.png", "a_distance_map.tif"} <= set(found)


def test_files_come_first_come_first_listed_and_once(folder):
    found = find_images([folder / "img10.tif", folder, str(folder / "img10.tif")])
    assert names(found, folder) == ["img10.tif", "IMG1.PNG", "img2.tif"]
    assert find_images([folder / "a_labels.tif"]) == [folder / "a_labels.tif"]
    assert find_images([folder / "notes.txt"]) == [folder / "notes.txt"]
    assert find_images([folder / "data.zarr"]) == [folder / "data.zarr"]


def test_patterns(folder):
    assert names(find_images([str(folder / "*.tif")]), folder) == ["img2.tif", "img10.tif"]
    assert names(find_images([str(folder / "**" / "*")]), folder) == [
        "IMG1.PNG",
        "img2.tif",
        "img10.tif",
        "sub/deep.jpg",
    ]
    assert names(find_images([str(folder / "su?")], recursive=True), folder) == ["sub/deep.jpg"]
    (folder / "odd[1].tif").write_bytes(b"x")
    assert names(find_images([folder / "odd[1].tif"]), folder) == ["odd[1].tif"]


def test_nothing_found_is_a_wrong_call(folder):
    with pytest.raises(UsageError, match="There is no file or folder"):
        find_images([folder / "nowhere"])
    (folder / "empty").mkdir()
    (folder / "empty" / "a.czi").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"\.tif, \.tiff, \.png.*\.czi files cannot be read yet"):
        find_images([folder / "empty"])
    with pytest.raises(UsageError, match="holds none"):
        find_images([str(folder / "*.bmp")])
    with pytest.raises(UsageError, match="empty list"):
        find_images([])
    with pytest.raises(TypeError, match="list"):
        find_images(str(folder))


# ------------------------------------------------------------------------------------- real files


@needs_data
def test_real_formats():
    formats = DATA / "formats"
    tissue = read_image(formats / "HE_example.ome.tif") if _has_jpeg_codec() else None
    if tissue is not None:
        assert tissue.pixels.shape == (1484, 1380, 3)
        assert tissue.pixel_size_um == pytest.approx(0.50008, rel=1e-4)
        assert tissue.channel_names == ("red", "green", "blue")
    hyperstack = read_image(formats / "imagej_hyperstack_2channel.tif")
    assert hyperstack.pixels.shape == (450, 450, 2)
    assert hyperstack.pixels.dtype == np.uint8
    assert hyperstack.pixel_size_um is None  # the file says 1 pixel per pixel
    np.testing.assert_array_equal(
        read_image(formats / "imagej_hyperstack_2channel.tif", channels=[1]).pixels,
        hyperstack.pixels[..., 1],
    )
    with pytest.raises(ImageFileError, match="5 images"):
        read_image(formats / "WP96_4Pos_B4-10_DAPI.ome.tiff")
    last = read_image(formats / "WP96_4Pos_B4-10_DAPI.ome.tiff", page=4)
    assert last.pixels.shape == (640, 640)
    assert last.pixel_size_um == pytest.approx(0.2)
    with pytest.raises(ImageFileError, match=r"CZI.*cannot be read yet"):
        read_image(formats / "testwell96_A9_1024x1024_Nuc.czi")
    with pytest.raises(ImageFileError, match=r"ND2.*cannot be read yet"):
        read_image(formats / "cluster.nd2")
    with pytest.raises(ImageFileError, match=r"Zarr.*cannot be read yet"):
        read_image(formats / "ome_zarr_v04" / "image-03.zarr")
    plate = formats / "operetta_plate" / "Images"
    with pytest.raises(ImageFileError, match="text"):
        read_image(plate / "Index.idx.xml")


def _has_jpeg_codec() -> bool:
    try:
        import imagecodecs
    except ImportError:
        return False
    return bool(imagecodecs.JPEG8.available)


@needs_data
def test_camera_pitch_is_not_taken_for_the_pixel_size():
    pytest.importorskip("imagecodecs", reason="the Operetta file is LZW-compressed")
    plate = DATA / "formats" / "operetta_plate" / "Images"
    image = read_image(plate / "r03c03f01p01-ch1sk1fk1fl1.tiff")
    assert image.pixels.shape == (1080, 1080)
    assert image.pixels.dtype == np.uint16
    assert image.pixel_size_um is None  # its resolution tag, 6.45 µm, is the camera's


@needs_data
def test_real_stack_of_planes():
    path = DATA / "ctc" / "yeast_baby" / "01_zstack" / "t000.tif"
    with pytest.raises(ImageFileError, match="QYX and sizes 5 × 117 × 117"):
        read_image(path)
    assert read_image(path, page=4).pixels.shape == (117, 117)


@needs_data
def test_real_images_and_labels_are_told_apart():
    """A tenth of the collections here; the figures of all are in `looks_like_labels`."""
    wrong = []
    for collection in ("dsb2018", "dsb2018_tissue", "bbbc039", "usiigaci_phase"):
        for kind, expected in (("images", False), ("labels", True)):
            for path in sorted((DATA / collection).glob(f"*/{kind}/*"))[::10]:
                pixels = read_image(path).pixels
                if np.ptp(pixels) > 0 and looks_like_labels(pixels) != expected:
                    wrong.append(path)
    assert wrong == []
