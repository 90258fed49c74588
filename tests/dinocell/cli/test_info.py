"""`dinocell info`: what a file holds, the intensities of a plane, and what `segment` would do."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from dinocell.cli import main


@pytest.fixture
def stack(tmp_path):
    """T 2, Z 3, C 2; the value of a pixel is 100 T + 10 Z + C."""
    values = [100 * t + 10 * z + c for t in range(2) for z in range(3) for c in range(2)]
    pixels = np.array(values, np.uint16).reshape(2, 3, 2, 1, 1) + np.zeros((8, 6), np.uint16)
    sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeZ": 1.5}
    metadata = {"axes": "TZCYX", "Channel": {"Name": ["DNA", "ER"]}, **sizes}
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata=metadata)
    return tmp_path / "a.ome.tif"


def call(capsys, *arguments) -> tuple[int, str]:
    code = 0
    try:
        main(["info", *map(str, arguments)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().out


def test_folders_inside(capsys, stack):
    inner = stack.parent / "deeper"
    inner.mkdir()
    stack.rename(inner / stack.name)
    with pytest.raises(SystemExit):
        main(["info", str(stack.parent)])
    assert "set --recursive to search the folders inside" in capsys.readouterr().err
    code, out = call(capsys, stack.parent, "--recursive")
    assert (code, out.splitlines()[0]) == (0, str(inner / stack.name))


def test_table(capsys, stack):
    code, out = call(capsys, stack)
    rows = dict(line.strip().split("  ", 1) for line in out.splitlines()[1:])
    rows = {name: value.strip() for name, value in rows.items()}
    assert code == 0
    assert out.splitlines()[0] == str(stack)
    assert rows["format"] == "OME-TIFF"
    assert rows["axes"] == "T 2 × Z 3 × C 2 × Y 8 × X 6"
    assert rows["channels"] == "0 DNA, 1 ER"
    assert rows["pixel size"] == "x 0.25, y 0.25, z 1.5 µm"
    assert rows["data type"] == "uint16"
    assert "intensity" not in out
    assert rows["segment"].endswith(
        "holds T 2 × Z 3 × C 2: choose with --time and --z, or save one plane"
    )


@pytest.mark.parametrize(
    ("choice", "ranges", "verdict"),
    [
        ("--time 1 --z 2", {"DNA": [120, 120], "ER": [121, 121]}, "2 channels (DNA, ER)"),
        ("--time 0 --z max --channels ER", {"ER": [21, 21]}, "ready: this plane is segmented"),
        ("--page 4 --channels 0", {"DNA": [110, 110]}, "ready: this plane"),
        ("--scene 0 --time 0 --z mean --channels DNA", {"DNA": [10.0, 10.0]}, "ready: this plane"),
        (
            "--time 1 --z 0 --channels all",
            {"DNA": [100, 100], "ER": [101, 101]},
            "ready: the mean of DNA, ER is segmented, each normalised",
        ),
        ("--time 2 --z 0", {}, "--time must be 0 … 1"),
        ("--scene 1", {}, "--scene must be 0 for"),
    ],
)
def test_json(capsys, stack, choice, ranges, verdict):
    code, out = call(capsys, stack, "--json", *choice.split())
    (found,) = json.loads(out)
    (scene,) = found["scenes"]
    assert code == 0
    assert scene["axes"] == {"T": 2, "Z": 3, "C": 2, "Y": 8, "X": 6}
    assert scene["channels"] == ["DNA", "ER"]
    assert scene["pixel_size_um"] == {"x": 0.25, "y": 0.25, "z": 1.5}
    assert found["ranges"] == ranges
    assert verdict in found["segment"]
    assert found["ready"] == verdict.startswith("ready")


def test_the_verdict_is_what_segment_does(capsys, tmp_path):
    rng = np.random.default_rng(0)
    PillowImage.fromarray(rng.integers(0, 255, (8, 6, 3), np.uint8)).save(tmp_path / "colour.png")
    PillowImage.fromarray(np.kron(np.eye(2), np.ones((9, 9))) > 0).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("no image at all, but a text of some length")
    code, out = call(capsys, tmp_path, "--json")
    colour, mask, text = json.loads(out)
    assert code == 1
    assert colour["segment"] == "ready: the mean of red, green, blue is segmented, each normalised"
    assert "mask or label image" in mask["segment"]
    assert "or set --allow-mask" in mask["segment"]
    assert "its content is text" in text["error"]


def test_scenes_of_different_sizes(capsys, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tif:
        tif.write(np.ones((8, 6), np.uint8), metadata={"axes": "YX"})
        tif.write(np.ones((4, 5), np.uint8), metadata={"axes": "YX"})
    out = call(capsys, tmp_path / "a.ome.tif")[1]
    assert "  scene 0     Y 8 × X 6\n  scene 1     Y 4 × X 5\n" in out
    assert "holds 2 scenes of different sizes" in out
    out = call(capsys, tmp_path / "a.ome.tif", "--scene", "1", "--json")[1]
    assert json.loads(out)[0]["ranges"] == {"0": [1, 1]}


def test_real_files(capsys, data_dir):
    formats = data_dir / "formats"
    paths = ["cluster.nd2", "testwell96_A9_1024x1024_Nuc.czi", "ome_zarr_v04/image-03.zarr"]
    code, out = call(capsys, *(formats / name for name in paths), "--json")
    stack, plane, noise = json.loads(out)
    assert code == 0
    assert stack["scenes"][0]["axes"] == {"T": 3, "Z": 10, "C": 2, "Y": 31, "X": 38}
    assert "choose with --time and --z" in stack["segment"]
    assert (plane["ranges"], plane["ready"]) == ({"AF568": [52, 7437]}, True)
    assert "choose with --z" in noise["segment"]


def test_a_plate_in_zarr_is_described_by_its_first_field(capsys, tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed: extra [formats]")
    place = tmp_path / "p.zarr"
    group = zarr.open_group(str(place), mode="w", zarr_format=2)
    group.attrs["plate"] = {"wells": [{"path": "A/1"}]}
    well = zarr.open_group(str(place / "A" / "1"), mode="w", zarr_format=2)
    well.attrs["well"] = {"images": [{"path": "0"}, {"path": "1"}]}
    for field in "01":
        image = zarr.open_group(str(place / "A" / "1" / field), mode="w", zarr_format=2)
        image.create_array("0", shape=(8, 6), dtype="uint8")[...] = np.arange(48).reshape(8, 6)
        image.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]
    code, out = call(capsys, place)
    assert code == 0
    assert out.splitlines()[0] == str(place)
    first = place / "A" / "1" / "0"
    assert f"2 fields; below is the first of them, {first}" in out
    assert "ready: this plane is segmented" in out
    (one,) = json.loads(call(capsys, place, "--json")[1])
    assert (one["path"], one["fields"], one["field"]) == (str(place), 2, str(first))
    group.attrs["plate"] = {"wells": [{"path": "B/1"}]}
    code, out = call(capsys, place)
    assert code == 1
    assert "lacks B/1" in out
