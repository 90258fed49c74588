"""Reading by content: what comes back, and one sentence for everything that can be wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from io_doubles import one_sentence, textured, two_discs, write_packed_gray_png
from PIL import Image as PillowImage

from dinocell.errors import DINOCellError, ImageFileError, MissingExtraError, UsageError
from dinocell.io import (
    read_image,
    read_labels,
    write_image,
)

REPO = Path(__file__).resolve().parents[3]


def test_jpeg_and_wrong_suffix_go_by_content(tmp_path):
    gray = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))
    PillowImage.fromarray(gray).save(tmp_path / "a.jpg", quality=95)
    got = read_image(tmp_path / "a.jpg").pixels
    assert got.shape == gray.shape
    assert np.abs(got.astype(int) - gray).max() <= 12
    os.rename(tmp_path / "a.jpg", tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, got)


def test_missing_file_and_folder(tmp_path):
    for reader in (read_image, read_labels):
        with pytest.raises(UsageError, match="There is no file") as caught:
            reader(tmp_path / "nowhere.tif")
        assert caught.value.exit_code == 2
        with pytest.raises(UsageError, match="folder"):
            reader(tmp_path)


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
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

    gray, deep = textured((20, 26), "uint8"), textured((20, 26))
    colour = textured((20, 26, 3), "uint8")
    PillowImage.fromarray(gray).save(folder / "gray.png")
    PillowImage.fromarray(deep).save(folder / "deep.png")
    PillowImage.fromarray(colour).quantize(20).save(folder / "palette.png")
    cv2.imwrite(str(folder / "colour16.png"), textured((20, 26, 3)))
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
        cuts = {*rng.integers(1, len(content), 10).tolist(), 4, 8, len(content) // 2}
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
        for trial in range(10):
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


def test_absurd_sizes_are_refused_from_the_header(tmp_path):
    write_packed_gray_png(tmp_path / "a.png", np.zeros((1, 8), dtype=np.uint8), 2)
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


def test_formats_not_read_yet_say_what_to_do(tmp_path):
    path = tmp_path / "a.oib"
    path.write_bytes(b"anything")
    with pytest.raises(ImageFileError, match=r"cannot be read yet.*OME-TIFF"):
        read_image(path)


def test_unreadable_rights(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", textured((4, 5), "uint8"))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageFileError, match="rights"):
        read_image(tmp_path / "a.png")


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


def test_threads_read_and_fail_side_by_side(tmp_path, capfd):
    """The filters over the libraries' complaints belong to one thread each."""
    from concurrent.futures import ThreadPoolExecutor

    good, broken = textured((30, 40)), tmp_path / "broken.tif"
    write_image(tmp_path / "good.tif", good)
    write_image(tmp_path / "good.png", good)
    broken.write_bytes((tmp_path / "good.tif").read_bytes()[:200])
    paths = [tmp_path / "good.tif", broken, tmp_path / "good.png"] * 15
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(pixels_or_error, paths))
    for path, result in zip(paths, results, strict=True):
        if path == broken:
            assert isinstance(result, ImageFileError)
        else:
            np.testing.assert_array_equal(result, good)
    assert capfd.readouterr().err == ""


def test_big_endian_tiff_and_npy_come_back_native(tmp_path):
    pixels = textured((6, 7), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=">")
    np.save(tmp_path / "a.npy", pixels.astype(">u2"))
    for name in ("a.tif", "a.npy"):
        got = read_image(tmp_path / name).pixels
        assert got.dtype.isnative
        np.testing.assert_array_equal(got, pixels)


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


def test_one_bit_files(tmp_path):
    mask = np.random.default_rng(0).random((9, 11)) > 0.5
    for name in ("a.png", "a.tif", "a.bmp"):
        PillowImage.fromarray(mask).save(tmp_path / name)
        got = read_image(tmp_path / name).pixels
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, mask * 255)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), mask)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), mask)


def test_labels_of_every_integer_type(tmp_path):
    for dtype in ("uint8", "uint16", "uint32", "int8", "int16", "int32"):
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


def test_real_formats(data_dir):
    formats = data_dir / "formats"
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
    with pytest.raises(ImageFileError, match="5 scenes: choose with `scene`"):
        read_image(formats / "WP96_4Pos_B4-10_DAPI.ome.tiff")
    last = read_image(formats / "WP96_4Pos_B4-10_DAPI.ome.tiff", page=4)
    assert last.pixels.shape == (640, 640)
    assert last.pixel_size_um == pytest.approx(0.2)
    plate = formats / "operetta_plate" / "Images"
    with pytest.raises(ImageFileError, match="text"):
        read_image(plate / "Index.idx.xml")


def _has_jpeg_codec() -> bool:
    try:
        import imagecodecs
    except ImportError:
        return False
    return bool(imagecodecs.JPEG8.available)
