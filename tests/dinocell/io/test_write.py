"""What is written comes back, and is described."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from io_doubles import textured, two_discs

from dinocell.errors import ImageFileError
from dinocell.io import (
    read_image,
    read_labels,
    write_image,
    write_labels,
)


def test_tiff_round_trip_keeps_pixels_and_dtype(tmp_path):
    types = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")
    shapes = ((1, 1), (1, 7), (7, 1), (13, 9, 2), (6, 1, 3))
    cases = [((13, 9), dtype) for dtype in types]
    cases += [(shape, dtype) for shape in shapes for dtype in ("uint8", "uint16", "float64")]
    for shape, dtype in cases:
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


def test_pixel_size_round_trip(tmp_path):
    for dtype in ("uint16", "int32"):  # ImageJ, OME
        for size in (0.1625, 1 / 3, 2.0):
            write_image(tmp_path / "a.tif", textured((4, 5), dtype), pixel_size_um=size)
            assert read_image(tmp_path / "a.tif").pixel_size_um == pytest.approx(size, rel=1e-8)


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".png", ".npy"])
def test_labels_round_trip_in_the_narrowest_type(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    types = {0: "uint16", 255: "uint16", 65_535: "uint16", 65_536: "uint32", 2**32 - 1: "uint32"}
    for high, dtype in types.items():
        if suffix == ".png" and dtype == "uint32":
            continue
        labels = two_discs()
        labels[labels == 2] = high
        assert write_labels(path, labels) == np.dtype(dtype)
        assert read_image(path).pixels.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(read_labels(path), labels)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


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


@pytest.mark.parametrize("ending", ["tif", "ome.tif", "png", "npy"])
def test_the_same_image_gives_the_same_bytes(tmp_path, ending):
    """Also as OME-TIFF, whose identifier follows from the pixels; above 65,535 cells labels are OME."""
    image = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for number in range(2):
        write_image(tmp_path / f"{number}.{ending}", image)
        write_labels(
            tmp_path / f"{number}_labels.tif", image * np.uint32(70_000), pixel_size_um=0.5
        )
    write_image(tmp_path / f"2.{ending}", image + 1)
    first, same, other = ((tmp_path / f"{n}.{ending}").read_bytes() for n in range(3))
    assert first == same != other
    assert len({(tmp_path / f"{n}_labels.tif").read_bytes() for n in range(2)}) == 1


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


@pytest.mark.parametrize("high", [60_000, 70_000])
def test_large_label_images_are_written_in_tiles(tmp_path, monkeypatch, high):
    labels = np.random.default_rng(0).integers(0, high + 1, (700, 530)).astype(np.uint32)
    monkeypatch.setattr("dinocell.scratch.TILE_PX", 600)
    write_labels(tmp_path / "a.tif", labels, pixel_size_um=0.5)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].tile == (512, 512)
        assert file.is_ome
        assert not file.is_bigtiff
        assert file.pages[0].dtype == (np.uint16 if high < 65_536 else np.uint32)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), labels)
    assert read_image(tmp_path / "a.tif").pixel_size_um == 0.5
    monkeypatch.setattr("dinocell.io.write._CLASSIC_BYTES", 1000)
    write_labels(tmp_path / "b.tif", labels)
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert file.is_bigtiff
    np.testing.assert_array_equal(read_labels(tmp_path / "b.tif"), labels)
