"""The choice of channels and planes."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from io_doubles import textured
from PIL import Image as PillowImage

from dinocell.errors import ImageFileError, UsageError
from dinocell.io import (
    read_image,
    select_channels,
    write_image,
)


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
        ([3], r"got 3.*0 to 2 \(DNA, ER, Mito\)"),
        ([-1], "got -1: the image has channels"),
        (["AGP"], "got 'AGP'.*DNA, ER, Mito.*for example DNA"),
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


@pytest.mark.parametrize(
    ("channel", "position"), [(488, 1), ("488", 1), (1, 1), ("2", 2), (405, 0), ("0", 0)]
)
def test_a_name_comes_before_a_position(channel, position):
    pixels = textured((4, 5, 3))
    chosen = select_channels(pixels, ["405", "488", "561"], [channel])
    np.testing.assert_array_equal(chosen, pixels[..., position])


def test_two_channels_of_one_name_are_chosen_by_position():
    pixels = textured((4, 5, 3))
    with pytest.raises(UsageError, match="name of the channels 0 and 2: give the position"):
        select_channels(pixels, ["DAPI", "ER", "dapi"], ["DAPI"])
    np.testing.assert_array_equal(
        select_channels(pixels, ["DAPI", "ER", "dapi"], ["2"]), pixels[..., 2]
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


def test_stack_without_a_description_is_planes_or_channels_on_request(tmp_path):
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
        with pytest.raises(ImageFileError, match=r"holds 5 planes.*`page`, 0 … 4.*`channels`"):
            read_image(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, page=3).pixels, stack[3])
        np.testing.assert_array_equal(
            read_image(tmp_path / name, channels=[4, 1]).pixels, np.moveaxis(stack[[4, 1]], 0, -1)
        )
