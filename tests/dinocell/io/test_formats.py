"""Files of microscopes: axes, sizes, values and choices, against the formats' own libraries."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from io_doubles import one_sentence, textured

from dinocell.errors import ImageFileError, MissingExtraError, UsageError
from dinocell.io import describe_image, find_images, ome_zarr, read_image

# T 2, Z 3, C 2, rows and columns
STACK = textured((2, 3, 2, 8, 6))
NAMES = ("DNA", "ER")
COLOURS = ("#0000ff", "#12cd00")


def write_czi(path: Path) -> None:
    """Two scenes of different heights; values of the second are those of the first plus one."""
    from pylibCZIrw import czi

    with czi.create_czi(str(path), compression_options="zstd1:ExplicitLevel=1") as file:
        for scene, (top, extra) in enumerate([(0, 0), (50, 2)]):
            for t, z, c in np.ndindex(2, 3, 2):
                plane = np.pad(STACK[t, z, c], ((0, extra), (0, 0))) + np.uint16(scene)
                place = {"T": t, "Z": z, "C": c}
                file.write(plane, plane=place, scene=scene, location=(0, top))
        size = {"scale_x": 0.3e-6, "scale_y": 0.3e-6, "scale_z": 1e-6}
        shown = {
            channel: czi.ChannelDisplaySettingsDataClass(
                True, czi.TintingMode.Color, czi.Rgb8Color(*bytes.fromhex(colour[1:])), 0.0, 1.0
            )
            for channel, colour in enumerate(COLOURS)
        }
        names = dict(enumerate(NAMES))
        file.write_metadata("a", channel_names=names, display_settings=shown, **size)


def write_zarr(path: Path, version: int) -> None:
    """OME-Zarr 0.4 (Zarr 2) or 0.5 (Zarr 3) with a reduced level that must not be read."""
    import zarr

    group = zarr.open_group(str(path), mode="w", zarr_format=version)
    for level, pixels in enumerate([STACK, STACK[..., ::2, ::2]]):
        array = group.create_array(
            str(level), shape=pixels.shape, dtype="u2", chunks=(1, 1, 1, 4, 4)
        )
        array[...] = pixels
    axes = [
        {"name": "t", "type": "time"},
        {"name": "z", "type": "space", "unit": "micrometer"},
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "nanometer"},
        {"name": "x", "type": "space", "unit": "nanometer"},
    ]
    scales = [[1, 1, 1, 300, 300], [1, 1, 1, 600, 600]]
    levels = [
        {"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for i, scale in enumerate(scales)
    ]
    image = {"axes": axes, "datasets": levels} | ({"version": "0.4"} if version == 2 else {})
    colours = zip(NAMES, COLOURS, strict=True)
    shown = {"channels": [{"label": name, "color": one[1:].upper()} for name, one in colours]}
    described = {"multiscales": [image], "omero": shown}
    group.attrs.update({"ome": described | {"version": "0.5"}} if version == 3 else described)


def write_lif(path: Path) -> None:
    """Two images after Leica's description of the format: no library writes it."""
    images = [("first", STACK), ("second", STACK + np.uint16(1))]
    elements, blocks = "", b""
    for name, pixels in images:
        dimensions, step = "", pixels.itemsize
        order = [
            ("X", 1, 6, 0.3e-6),
            ("Y", 2, 8, 0.3e-6),
            ("C", 0, 2, 0),
            ("Z", 3, 3, 1e-6),
            ("T", 4, 2, 1),
        ]
        for axis, number, size, length in order:
            if axis == "C":
                plane = step
            else:
                dimensions += (
                    f'<DimensionDescription DimID="{number}" NumberOfElements="{size}" Origin="0" '
                    f'Length="{length * (size - 1)}" Unit="{"s" if axis == "T" else "m"}" '
                    f'BytesInc="{step}" BitInc="0"/>'
                )
            step *= size
        channels = "".join(
            f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="16" NameOfMeasuredQuantity="" '
            f'Min="0" Max="65535" Unit="" LUTName="{channel}" IsLUTInverted="0" BytesInc="{i * plane}" '
            'BitInc="0"/>'
            for i, channel in enumerate(NAMES)
        )
        elements += (
            f'<Element Name="{name}"><Data><Image><ImageDescription><Channels>{channels}</Channels>'
            f"<Dimensions>{dimensions}</Dimensions></ImageDescription></Image></Data>"
            f'<Memory Size="{pixels.nbytes}" MemoryBlockID="Mem_{name}"/></Element>'
        )
        label = f"Mem_{name}".encode("utf-16-le")
        head = struct.pack(
            "<IIBQBI", 0x70, 10 + len(label), 0x2A, pixels.nbytes, 0x2A, len(label) // 2
        )
        blocks += head + label + pixels.tobytes()
    text = (
        '<LMSDataContainerHeader Version="2"><Element Name="project"><Data><Experiment/></Data>'
        f"<Children>{elements}</Children></Element></LMSDataContainerHeader>"
    ).encode("utf-16-le")
    head = struct.pack("<IIBI", 0x70, 5 + len(text), 0x2A, len(text) // 2)
    path.write_bytes(head + text + blocks)


def write_ome_tiff(path: Path) -> None:
    sizes = {"PhysicalSizeX": 0.3, "PhysicalSizeY": 0.3, "PhysicalSizeZ": 1.0}
    metadata = {"axes": "TZCYX", "Channel": {"Name": list(NAMES)}, **sizes}
    tifffile.imwrite(path, STACK, metadata=metadata)


WRITERS = {
    "a.czi": write_czi,
    "a.lif": write_lif,
    "v2.zarr": lambda path: write_zarr(path, 2),
    "v3.zarr": lambda path: write_zarr(path, 3),
    "a.ome.tif": write_ome_tiff,
}
SCENES = {"a.czi": 2, "a.lif": 2}


@pytest.fixture(scope="module")
def stacks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stacks")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_axes_names_and_sizes(stacks, name):
    contents = describe_image(stacks / name)
    assert len(contents.series) == SCENES.get(name, 1)
    series = contents.series[0]
    assert series.sizes == dict(zip("TZCYX", STACK.shape, strict=True))
    assert "".join(series.axes) == "TZCYX"
    assert series.dtype == np.uint16
    assert series.channel_names == NAMES
    assert series.pixel_size_um == pytest.approx((0.3, 0.3, 1.0))
    if name.endswith((".czi", ".zarr")):
        assert series.channel_colours == COLOURS


@pytest.mark.parametrize(
    ("colours", "known"),
    [([65535, "-16776961"], ("#0000ff", "#ff0000")), ([255, "red"], None)],
)
def test_colours_of_channels_in_ome_tiff(tmp_path, colours, known):
    metadata = {"axes": "CYX", "Channel": {"Color": colours}}
    tifffile.imwrite(tmp_path / "a.ome.tif", np.ones((2, 4, 5), np.uint8), metadata=metadata)
    (series,) = describe_image(tmp_path / "a.ome.tif").series
    assert series.channel_colours == known


@pytest.mark.parametrize("name", WRITERS)
def test_every_choice_gives_its_plane(stacks, name):
    def read(**choice):
        if name in SCENES:
            choice = {"scene": 0} | choice
        return read_image(stacks / name, **choice)

    image = read(time=1, z=2, channels=["er"])
    np.testing.assert_array_equal(image.pixels, STACK[1, 2, 1])
    assert (image.channel_names, image.pixel_size_um) == (("ER",), pytest.approx(0.3))
    both = read(time=0, z=1)
    np.testing.assert_array_equal(both.pixels, np.moveaxis(STACK[0, 1], 0, -1))
    np.testing.assert_array_equal(read(time=0, z=1, channels=["all"]).pixels, both.pixels)
    np.testing.assert_array_equal(
        read(time=1, z=2, channels=[1, 0]).pixels, np.moveaxis(STACK[1, 2, ::-1], 0, -1)
    )
    brightest = read(time=1, z="max", channels=[0]).pixels
    np.testing.assert_array_equal(brightest, STACK[1, :, 0].max(0))
    mean = read(time=1, z="mean").pixels
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, np.moveaxis(STACK[1].mean(0), 0, -1), rtol=1e-6)
    page = read_image(stacks / name, page=4)
    np.testing.assert_array_equal(page.pixels, np.moveaxis(STACK[1, 1], 0, -1))


@pytest.mark.parametrize("name", SCENES)
def test_scenes(stacks, name):
    second = read_image(stacks / name, scene=1, time=1, z=0, channels=[0]).pixels
    np.testing.assert_array_equal(second[:8], STACK[1, 0, 0] + np.uint16(1))
    counted = read_image(stacks / name, page=6 + 3, channels=[0])
    np.testing.assert_array_equal(counted.pixels, second)
    with pytest.raises(
        ImageFileError, match=r"2 scenes.*T 2 × Z 3 × C 2.*`scene` and `time` and `z`"
    ):
        read_image(stacks / name)
    with pytest.raises(UsageError, match=r"`scene` must be 0 … 1 .*, got 2"):
        read_image(stacks / name, scene=2)
    sizes = [series.sizes["Y"] for series in describe_image(stacks / name).series]
    assert sizes == ([8, 10] if name == "a.czi" else [8, 8])


@pytest.mark.parametrize("name", sorted(set(WRITERS) - set(SCENES)))
def test_a_stack_without_a_choice_is_refused_with_what_it_holds(stacks, name):
    with pytest.raises(
        ImageFileError,
        match=r"holds T 2 × Z 3 × C 2: choose with `time` and `z`, or save one plane$",
    ):
        read_image(stacks / name)
    with pytest.raises(ImageFileError, match=r"choose with `time`, or save one plane$"):
        read_image(stacks / name, z="max")
    with pytest.raises(UsageError, match=r"`z` must be 0 … 2 .*, got 3"):
        read_image(stacks / name, z=3, time=0)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"z": "min"}, "`z` must be max, mean or a number from 0, got min"),
        ({"z": -1}, "`z` must be"),
        ({"time": -1}, "`time` must be a number from 0, got -1"),
        ({"scene": True}, "`scene` must be a number"),
        ({"page": 0, "z": 1}, "`page` must come without"),
    ],
)
def test_impossible_choices(stacks, choice, sentence):
    with pytest.raises(UsageError, match=sentence):
        read_image(stacks / "a.ome.tif", **choice)


def test_planes_without_a_meaning_are_what_the_choice_takes_them_for(tmp_path):
    stack = textured((5, 8, 6))
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata=None)
    np.save(tmp_path / "a.npy", stack)
    for path in (tmp_path / "a.tif", tmp_path / "a.npy"):
        np.testing.assert_array_equal(read_image(path, z="max").pixels, stack.max(0))
        np.testing.assert_array_equal(read_image(path, time=3).pixels, stack[3])
        np.testing.assert_array_equal(read_image(path, channels=[3]).pixels, stack[3])
    flat = stack[0]
    np.save(tmp_path / "flat.npy", flat)
    for z in (0, "max", "mean"):
        np.testing.assert_array_equal(read_image(tmp_path / "flat.npy", z=z, time=0).pixels, flat)


def test_nothing_else_is_loaded(tmp_path):
    """Chunks of other planes and levels may be damaged, and pages of other planes missing."""
    write_zarr(tmp_path / "a.zarr", 3)
    for chunk in (tmp_path / "a.zarr").rglob("c/*/*/*/*/*"):
        index = chunk.relative_to(tmp_path / "a.zarr").parts
        if index[:5] != ("0", "c", "1", "2", "1"):
            chunk.write_bytes(b"no chunk")
    image = read_image(tmp_path / "a.zarr", time=1, z=2, channels=[1])
    np.testing.assert_array_equal(image.pixels, STACK[1, 2, 1])
    with pytest.raises(ImageFileError, match="damaged or cut short"):
        read_image(tmp_path / "a.zarr", time=0, z=2)


def test_large_planes_are_read_by_bands_into_a_file(stacks, monkeypatch):
    from dinocell import scratch

    monkeypatch.setattr(scratch, "_BAND_PX", 12)  # two rows at a time
    for name in WRITERS:
        scene = {"scene": 0} if name in SCENES else {}
        image = read_image(stacks / name, time=1, z="mean", channels=[0], tile_px=4, **scene)
        assert scratch.in_file(image.pixels), name
        np.testing.assert_allclose(image.pixels, STACK[1, :, 0].mean(0), rtol=1e-6)


def test_colour_czi(tmp_path):
    from pylibCZIrw import czi

    pixels = textured((8, 6, 3), "uint8")
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        file.write(pixels[..., ::-1], plane={"C": 0})  # its order is blue, green, red
    image = read_image(tmp_path / "a.czi")
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.is_colour


def test_a_mosaic_is_put_together_and_a_missing_plane_is_refused(tmp_path):
    from pylibCZIrw import czi

    pixels = textured((8, 12))
    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for left in (0, 6):
            part = np.ascontiguousarray(pixels[:, left : left + 6])
            file.write(part, plane={"Z": 0, "C": 0}, location=(left - 3, -5))
        file.write(pixels, plane={"Z": 1, "C": 0}, location=(-3, -5))
        file.write(pixels, plane={"Z": 1, "C": 1}, location=(-3, -5))
    np.testing.assert_array_equal(read_image(tmp_path / "a.czi", z=0, channels=[0]).pixels, pixels)
    with pytest.raises(ImageFileError, match="this plane is missing in it"):
        read_image(tmp_path / "a.czi", z=0, channels=[1])


def test_more_channels_than_can_be_are_damage(tmp_path):
    from pylibCZIrw import czi

    with czi.create_czi(str(tmp_path / "a.czi")) as file:
        for channel in (0, 77):
            file.write(STACK[0, 0, 0], plane={"C": channel})
    entry = [b"C\0\0\0" + struct.pack("<i", channel) for channel in (77, 5_000_000)]
    content = (tmp_path / "a.czi").read_bytes()
    assert entry[0] in content
    (tmp_path / "a.czi").write_bytes(content.replace(*entry))
    with pytest.raises(ImageFileError, match="it claims 5,000,001 channels"):
        read_image(tmp_path / "a.czi", channels=[0])


def test_complaints_of_the_library_stay_inside(stacks, tmp_path, capfd):
    content = (stacks / "a.lif").read_bytes()
    wrong = 'DimID="4"'.encode("utf-16-le"), 'DimID="3"'.encode("utf-16-le")  # two axes Z
    assert wrong[0] in content
    (tmp_path / "a.lif").write_bytes(content.replace(*wrong))
    with pytest.raises(ImageFileError, match="no image with rows and columns"):
        read_image(tmp_path / "a.lif", scene=1)
    assert capfd.readouterr() == ("", "")


def test_collections_of_zarr_images(tmp_path):
    import zarr

    top = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2)
    top.attrs["bioformats2raw.layout"] = 3
    for name in ("0", "1"):
        write_zarr(tmp_path / "a.zarr" / name, 2)
    assert len(describe_image(tmp_path / "a.zarr").series) == 2
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.zarr", scene=1, time=0, z=1, channels=[0]).pixels, STACK[0, 1, 0]
    )
    plate = zarr.open_group(str(tmp_path / "p.zarr"), mode="w", zarr_format=2)
    plate.attrs["plate"] = {"wells": [{"path": "A/1"}]}
    plate.create_group("A/1").attrs["well"] = {"images": [{"path": "0"}]}
    write_zarr(tmp_path / "p.zarr" / "A" / "1" / "0", 2)
    with pytest.raises(ImageFileError, match=r"plate of 1 wells: name a well, .*p\.zarr/A/1'"):
        read_image(tmp_path / "p.zarr")
    assert len(describe_image(tmp_path / "p.zarr" / "A" / "1").series) == 1


def test_a_folder_with_the_files_of_zarr_is_one_image(tmp_path):
    write_zarr(tmp_path / "images" / "a", 3)
    write_zarr(tmp_path / "images" / "b.zarr", 2)
    assert find_images([tmp_path / "images"]) == [
        tmp_path / "images" / "a",
        tmp_path / "images" / "b.zarr",
    ]
    assert find_images([tmp_path / "images" / "a"]) == [tmp_path / "images" / "a"]


@pytest.mark.parametrize("name", ["a.czi", "a.lif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_cut_short(stacks, tmp_path, name, share):
    content = (stacks / name).read_bytes()
    (tmp_path / name).write_bytes(content[: max(40, int(share * len(content)))])
    with pytest.raises(ImageFileError, match="damaged or cut short") as caught:
        read_image(tmp_path / name, scene=1, time=1, z=2)
    assert one_sentence(caught.value)


def test_damaged_zarr(stacks, tmp_path):
    for name in ("v2.zarr", "v3.zarr"):
        place = tmp_path / name
        shutil.copytree(stacks / name, place)
        shutil.rmtree(place / "0")
        with pytest.raises(ImageFileError, match=r"must hold its full resolution.*array '0'"):
            read_image(place)
        for file in (place / ".zattrs", place / "zarr.json"):
            file.unlink(missing_ok=True)
        with pytest.raises(ImageFileError, match="must state its 'multiscales'"):
            read_image(place)
    place = tmp_path / "c.zarr"
    shutil.copytree(stacks / "v2.zarr", place)
    described = json.loads((place / ".zattrs").read_text())
    described["multiscales"][0]["axes"].pop()
    (place / ".zattrs").write_text(json.dumps(described))
    with pytest.raises(ImageFileError, match="Axes must differ and have y and x"):
        read_image(place)
    steps = [{"type": "scale", "scale": [1, 2, 3]}]
    for wrong in ("x", {"datasets": 1}, [{}], [{"datasets": []}], [{"datasets": [{"path": 0}]}],
                  [{"datasets": [{"path": "0", "coordinateTransformations": steps}]}]):  # fmt: skip
        (place / ".zattrs").write_text(json.dumps({"multiscales": wrong}))
        with pytest.raises(ImageFileError, match="must list arrays, axes and scales") as caught:
            read_image(place)
        assert one_sentence(caught.value)
    for leads_out in (
        "../v2.zarr/0",
        str(stacks / "v2.zarr" / "0"),
        "a/../../v2.zarr/0",
        "..\\v2.zarr",
    ):
        (place / ".zattrs").write_text(
            json.dumps({"multiscales": [{"datasets": [{"path": leads_out}]}]})
        )
        with pytest.raises(ImageFileError, match="must lie in it") as caught:
            read_image(place)
        assert one_sentence(caught.value)
        (place / ".zattrs").write_text(json.dumps({"well": {"images": [{"path": leads_out}]}}))
        with pytest.raises(ImageFileError, match="must lie in it"):
            read_image(place)
    (place / ".zattrs").write_text("{")
    with pytest.raises(ImageFileError, match="damaged or cut short") as caught:
        read_image(place)
    assert one_sentence(caught.value)


def test_a_zarr_that_is_deleted_while_it_is_read(stacks, tmp_path, monkeypatch):
    """Its chunks would count as empty."""
    place = tmp_path / "a.zarr"
    shutil.copytree(stacks / "v2.zarr", place)
    bands = ome_zarr.row_bands

    def deleting(shape):
        shutil.rmtree(place, ignore_errors=True)
        return bands(shape)

    monkeypatch.setattr(ome_zarr, "row_bands", deleting)
    with pytest.raises(ImageFileError, match="was deleted while it was read"):
        read_image(place, scene=0, time=0, z=0, channels=[0])


def test_ome_tiff_without_its_xml_is_a_plain_stack(tmp_path):
    write_ome_tiff(tmp_path / "a.ome.tif")
    content = (tmp_path / "a.ome.tif").read_bytes()
    (tmp_path / "a.ome.tif").write_bytes(content.replace(b"OME", b"ABC"))
    with pytest.raises(ImageFileError, match="holds 12 planes") as caught:
        read_image(tmp_path / "a.ome.tif")
    assert one_sentence(caught.value)
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif", page=5).pixels, STACK[0, 2, 1])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("a.czi", "pylibCZIrw.czi", "pylibCZIrw"),
        ("a.lif", "liffile", "liffile"),
        ("v2.zarr", "zarr", "zarr"),
    ],
)
def test_a_missing_library_names_the_extra(stacks, monkeypatch, name, module, package):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"package {package}, .*\[formats\]"):
        read_image(stacks / name)


def test_real_czi(data_dir):
    path = data_dir / "formats" / "testwell96_A9_1024x1024_Nuc.czi"
    contents = describe_image(path)
    (series,) = contents.series
    assert (contents.format, series.axes, series.shape) == ("CZI", "YX", (1024, 1024))
    assert (series.channel_names, series.channel_colours) == (("AF568",), ("#ff1800",))
    assert series.pixel_size_um[:2] == pytest.approx((0.457, 0.457), abs=1e-3)
    assert series.acquired is not None
    assert series.acquired.startswith("2016-07-04T14:52:08")
    image = read_image(path)
    assert image.pixels.dtype == np.uint16
    assert image.pixel_size_um == pytest.approx(0.457, abs=1e-3)
    oracle = pytest.importorskip("czifile", reason="another reader of CZI")
    np.testing.assert_array_equal(image.pixels, oracle.imread(path).squeeze())


def test_real_nd2(data_dir, tmp_path, monkeypatch):
    import nd2

    path = data_dir / "formats" / "cluster.nd2"
    whole = nd2.imread(path)
    contents = describe_image(path)
    (series,) = contents.series
    assert (contents.format, series.text()) == ("ND2", "T 3 × Z 10 × C 2")
    assert series.shape == whole.shape == (3, 10, 2, 31, 38)
    assert series.pixel_size_um == pytest.approx((0.168, 0.168, 0.5), abs=1e-3)
    assert series.channel_names == ("5-FAM/pH 9.0", "FM 4-64/2% CHAPS")
    assert series.channel_colours == ("#78e90f", "#fe0100")
    assert series.acquired == "2014-06-18T13:55:23Z"
    assert whole[0, 3].max(axis=(1, 2)).tolist() == [2915, 1043]
    for time, z, channel in np.ndindex(3, 10, 2):
        image = read_image(path, time=time, z=z, channels=[channel])
        np.testing.assert_array_equal(image.pixels, whole[time, z, channel])
    image = read_image(path, time=2, z="max")
    np.testing.assert_array_equal(image.pixels, np.moveaxis(whole[2].max(0), 0, -1))
    with pytest.raises(ImageFileError, match=r"T 3 × Z 10 × C 2: choose with `time` and `z`"):
        read_image(path)
    content = path.read_bytes()
    for share in (0.1, 0.99):
        (tmp_path / "a.nd2").write_bytes(content[: int(share * len(content))])
        with pytest.raises(ImageFileError, match="damaged or cut short") as caught:
            read_image(tmp_path / "a.nd2", time=0, z=0)
        assert one_sentence(caught.value)
    (tmp_path / "a.nd2").write_bytes(content.replace(b"ImageDataSeq|5!", b"ImageDataXeq|5!"))
    assert read_image(tmp_path / "a.nd2", time=0, z=4).pixels.any()
    with pytest.raises(ImageFileError, match="this plane is missing in it"):
        read_image(tmp_path / "a.nd2", time=0, z=5)
    monkeypatch.setitem(__import__("sys").modules, "nd2", None)
    with pytest.raises(MissingExtraError, match=r"package nd2, .*\[formats\]"):
        read_image(path)


def test_real_zarr(data_dir):
    import zarr

    path = data_dir / "formats" / "ome_zarr_v04" / "image-03.zarr"
    (series,) = describe_image(path).series
    assert describe_image(path).format == "OME-Zarr 0.4"
    assert (series.axes, series.shape, series.dtype) == ("ZYX", (2, 100, 100), np.float64)
    assert series.pixel_size_um == (1.0, 1.0, 1.0)
    whole = zarr.open_array(str(path / "0"), mode="r")[...]
    np.testing.assert_array_equal(read_image(path, z=1).pixels, whole[1])
    np.testing.assert_array_equal(read_image(path, z="max").pixels, whole.max(0))


def test_real_tiffs(data_dir):
    formats, challenge = data_dir / "formats", data_dir / "ctc"
    scenes = describe_image(formats / "WP96_4Pos_B4-10_DAPI.ome.tiff").series
    assert [(series.axes, series.shape) for series in scenes] == [("YX", (640, 640))] * 5
    assert scenes[0].pixel_size_um[:2] == pytest.approx((0.2, 0.2))
    for scene in range(5):
        path = formats / "WP96_4Pos_B4-10_DAPI.ome.tiff"
        np.testing.assert_array_equal(
            read_image(path, scene=scene).pixels, tifffile.imread(path, series=scene)
        )
    (tissue,) = describe_image(formats / "HE_example.ome.tif").series
    assert (tissue.text(), tissue.channel_names) == ("C 3", ("red", "green", "blue"))
    (hyperstack,) = describe_image(formats / "imagej_hyperstack_2channel.tif").series
    assert (hyperstack.axes, hyperstack.shape) == ("CYX", (2, 450, 450))
    assert hyperstack.channel_colours == ("#00ff00", "#0000ff")
    (field,) = describe_image(
        formats / "operetta_plate" / "Images" / "r03c03f01p01-ch1sk1fk1fl1.tiff"
    ).series
    assert (field.shape, field.dtype) == ((1080, 1080), np.uint16)
    for path in sorted(challenge.glob("*/*/t*.tif")):
        stored = tifffile.imread(path)
        (series,) = describe_image(path).series
        assert (series.shape, series.dtype) == (stored.shape, stored.dtype)
        if stored.ndim == 3:
            assert series.text() == "5 planes"
            np.testing.assert_array_equal(read_image(path, z="max").pixels, stored.max(0))
            stored = stored[2]
        image = read_image(path, z=2 if series.num_planes > 1 else None)
        np.testing.assert_array_equal(image.pixels, stored)
