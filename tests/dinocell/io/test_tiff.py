"""TIFF, OME-TIFF and ImageJ TIFF: planes and pixel sizes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import tifffile
from io_doubles import textured

from dinocell.errors import ImageFileError, UsageError
from dinocell.io import (
    read_image,
    read_labels,
)


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


def test_white_is_zero_is_inverted_for_images_only(tmp_path):
    pixels = textured((6, 7), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="miniswhite")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, 65535 - pixels)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif"), pixels)


def test_five_dimensional_stack_needs_a_page(tmp_path):
    stack = textured((2, 3, 4, 6, 5))  # T, Z, C, Y, X
    tifffile.imwrite(tmp_path / "a.tif", stack, imagej=True, metadata={"axes": "TZCYX"})
    with pytest.raises(ImageFileError, match=r"holds T 2 × Z 3 × C 4: choose with `time` and `z`"):
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
    with pytest.raises(ImageFileError, match="holds Z 4: choose with `z`"):
        read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", page=2).pixels, stack[2])


def test_several_series_need_a_page_that_counts_through_them(tmp_path):
    first, second = textured((2, 8, 6)), textured((5, 4), seed=1)
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tif:
        tif.write(first, metadata={"axes": "ZYX"})
        tif.write(second, metadata={"axes": "YX", "PhysicalSizeX": 2.0, "PhysicalSizeY": 2.0})
    with pytest.raises(
        ImageFileError, match=r"2 scenes of different sizes, the first of Z 2 .*`scene` and `z`"
    ):
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


def test_colour_stack_with_channels_is_refused(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        textured((2, 8, 6, 3), "uint8"),
        photometric="rgb",
        metadata={"axes": "CYXS"},
    )
    with pytest.raises(ImageFileError, match="CYXS"):
        read_image(tmp_path / "a.ome.tif")


@pytest.mark.parametrize(
    ("unit", "factor"),
    [
        *(("micron", 1), ("\\u00B5m", 1), ("um", 1), ("nm", 1e-3), ("mm", 1e3), ("Microns", 1)),
        *(("micrometers", 1), ("Micrometre", 1), ("nanometers", 1e-3), ("millimetres", 1e3)),
        *(("inches", 25_400), ("\\u00C5", 1e-4), ("\\u212B", 1e-4), ("\\u00E5ngstr\\u00F6m", 1e-4)),
        *(("angstroms", 1e-4), ("meter", 1e6)),
    ],
)
def test_imagej_units(tmp_path, unit, factor):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured((4, 5)),
        imagej=True,
        resolution=(4.0 * factor, 4.0 * factor),
        metadata={"unit": unit},
    )
    image = read_image(tmp_path / "a.tif")
    assert image.pixel_size_um == pytest.approx(0.25)
    assert image.notes == ()


@pytest.mark.parametrize(("y_unit", "expected"), [("nm", 0.5), ("um", None), ("parsec", None)])
def test_imagej_may_give_the_rows_another_unit(tmp_path, y_unit, expected):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured((4, 5)),
        imagej=True,
        resolution=(2.0, 0.002),
        metadata={"unit": "micron", "yunit": y_unit},
    )
    image = read_image(tmp_path / "a.tif")
    assert image.pixel_size_um == (expected and pytest.approx(expected))
    assert len(image.notes) == (expected is None)


@pytest.mark.parametrize(("unit", "notes"), [("pixels", 0), ("", 0), ("furlong", 1), ("sec", 1)])
def test_imagej_without_a_unit_of_length(tmp_path, unit, notes):
    tifffile.imwrite(
        tmp_path / "a.tif",
        textured((4, 5)),
        imagej=True,
        resolution=(4.0, 4.0),
        metadata={"unit": unit},
    )
    image = read_image(tmp_path / "a.tif")
    assert image.pixel_size_um is None
    assert [f"in {unit!r}, which is not a known unit" in note for note in image.notes] == [
        True
    ] * notes


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_impossible_sizes_give_no_size_and_a_note(tmp_path, size):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        textured((4, 5)),
        metadata={"axes": "YX", "PhysicalSizeX": 1.5, "PhysicalSizeY": 1.5},
    )
    content = (tmp_path / "a.ome.tif").read_bytes()
    (tmp_path / "a.ome.tif").write_bytes(content.replace(b'"1.5"', f'"{size}"'.encode().ljust(5)))
    image = read_image(tmp_path / "a.ome.tif")
    assert image.pixel_size_um is None
    assert len(image.notes) == 1


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


def test_oblong_pixels_give_no_size_and_a_note(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        textured((4, 5)),
        metadata={"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7},
    )
    image = read_image(tmp_path / "a.ome.tif")
    assert image.pixel_size_um is None
    (note,) = image.notes
    assert "the file gives 0.5 × 0.7 µm: no pixel size is used" in note


@pytest.mark.parametrize("name", ["{}/inner/b.tif", "../inner/b.tif", "inner/b.tif"])
def test_an_ome_file_opens_no_files_of_other_folders(tmp_path, name):
    (tmp_path / "own" / "inner").mkdir(parents=True)
    (tmp_path / "inner").mkdir()
    for folder in (tmp_path / "own" / "inner", tmp_path / "inner"):
        tifffile.imwrite(folder / "b.tif", np.ones((8, 8), np.uint8))
    xml = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:a"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" '
        'Type="uint8" SizeX="8" SizeY="8" SizeZ="1" SizeC="1" SizeT="1"><TiffData IFD="0" '
        f'PlaneCount="1"><UUID FileName="{name.format(tmp_path)}">urn:uuid:b</UUID></TiffData>'
        "</Pixels></Image></OME>"
    )
    path = tmp_path / "own" / "a.ome.tif"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint8), description=xml, metadata=None)
    with pytest.raises(ImageFileError, match="a file of another folder"):
        read_image(path)


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


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"</OME>", b"     <"), (b"Pixels", b"Pixelz"), (b'SizeX="6"', b'SizeX="9"')],
    ids=["cut short", "without pixels", "of another image"],
)
def test_ome_metadata_that_cannot_be_used_is_a_note(tmp_path, old, new):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, textured((2, 8, 6)), metadata=metadata)
    assert not read_image(path, channels=[0]).notes
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    (note,) = read_image(path, page=0).notes
    assert "OME metadata that the file should have is missing, damaged" in note


def test_messages_of_tifffile_outside_our_reader_still_reach_its_log(caplog):
    with caplog.at_level(logging.WARNING, logger="tifffile"):
        logging.getLogger("tifffile").warning("hello")
    assert "hello" in caplog.text


def test_camera_pitch_is_not_taken_for_the_pixel_size(data_dir):
    pytest.importorskip("imagecodecs", reason="the Operetta file is LZW-compressed")
    plate = data_dir / "formats" / "operetta_plate" / "Images"
    image = read_image(plate / "r03c03f01p01-ch1sk1fk1fl1.tiff")
    assert image.pixels.shape == (1080, 1080)
    assert image.pixels.dtype == np.uint16
    assert image.pixel_size_um is None  # its resolution tag, 6.45 µm, is the camera's


def test_real_stack_of_planes(data_dir):
    path = data_dir / "ctc" / "yeast_baby" / "01_zstack" / "t000.tif"
    with pytest.raises(ImageFileError, match="holds 5 planes"):
        read_image(path)
    assert read_image(path, page=4).pixels.shape == (117, 117)
