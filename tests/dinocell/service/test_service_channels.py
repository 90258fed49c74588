"""The channels of a file beside the plane that was segmented: from the service."""

from __future__ import annotations

import io
import json
import shutil
import zipfile

import numpy as np
import pytest
import tifffile
from service_doubles import noise, upload
from test_service_view import page_of

from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.errors import DINOCellError
from dinocell.io import read_image, write_image
from dinocell.io.planes import channel_of
from dinocell.service import channels as channels_module
from dinocell.service.channels import Original, colours_of, keep_channels, keep_channels_apart
from dinocell.service.queue import size_of
from dinocell.service.tiles import MOST_CHANNELS
from dinocell.service.viewing import _fields_in

BLUE, GREEN, RED, MAGENTA = "#0000ff", "#00ff00", "#ff0000", "#ff00ff"
NAMES = ["DNA", "ER", "Mito", "Bright field"]


def stack(path, names=NAMES, dtype=np.uint16):
    """A file with a channel of noise for each name; its pixels (H, W, C)."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 200, (40, 48, len(names))).astype(dtype)
    write_image(path, pixels, channel_names=names)
    return pixels


def array_of(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.load(io.BytesIO(answer.content))


def refused(answer, status: int, words: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["a", "b", "c"], None, [BLUE, GREEN, RED]),
        (["ER", "RNA", "DNA"], None, [GREEN, RED, BLUE]),
        (["mCherry", "EGFP", "DAPI_1", "Phase"], None, [RED, GREEN, BLUE, "#ffffff"]),
        (["red", "green", "blue"], None, [RED, GREEN, BLUE]),
        (["DNA", "ER"], ["#112233", "#445566"], ["#112233", "#445566"]),
        (["DNA", "ER"], ["#ffffff", "#ffffff"], [BLUE, GREEN]),
        (["DNA", "ER"], ["#000000", "#445566"], [BLUE, GREEN]),
        (list("abcdefgh"), None, [BLUE, GREEN, RED, MAGENTA, "#00ffff", "#ffff00", BLUE, GREEN]),
    ],
)
def test_colours_are_those_of_the_file_or_the_usual_ones(names, given, expected):
    assert colours_of(names, given) == expected


def test_channels_of_one_name_are_kept_apart(client, tmp_path):
    pixels = stack(tmp_path / "a.tif", ["DAPI", "DAPI", "GFP"])
    answer = upload(client, tmp_path / "a.tif", channels=["1", "2"])
    base = f"/api/v1/jobs/{answer.json()['job']}"
    for channel in range(3):
        found = array_of(client.get(f"{base}/image", params={"channel": channel}))
        assert (found == pixels[..., channel]).all()


def test_ome_zarr_names_the_channel_that_was_segmented(client, tmp_path, mini_model):
    stack(tmp_path / "a.tif", ["DNA", "ER", "AGP"])
    for chosen, names in ((["ER"], ["ER"]), (["2"], ["AGP"]), (["0", "2"], ["DNA", "AGP"])):
        answer = upload(client, tmp_path / "a.tif", channels=chosen)
        job = f"/api/v1/jobs/{answer.json()['job']}"
        url = f"{job}/result/ome-zarr"
        with zipfile.ZipFile(io.BytesIO(client.get(url).content)) as archive:
            served = archive.read("a_labels.zarr/.zattrs")
        assert [one["label"] for one in json.loads(served)["omero"]["channels"]] == names
        out = tmp_path / "".join(chosen)
        options = SegmentOptions(
            device="cpu",
            overlay=False,
            formats=("ome-zarr",),
            channels=tuple(map(channel_of, chosen)),
        )
        segment_files([tmp_path / "a.tif"], out, options, model=mini_model, shown=False)
        assert (out / "a_labels.zarr" / ".zattrs").read_bytes() == served


def test_a_job_says_which_channels_and_planes_were_asked_for(client, tmp_path, mini_model):
    stack(tmp_path / "a.tif")
    plain = upload(client, noise(tmp_path / "b.tif", 0)).json()["job"]
    assert client.get(f"/api/v1/jobs/{plain}").json()["options"] == {}
    given = {"channels": ["ER", "0"], "min_area_px": 3}
    job = upload(client, tmp_path / "a.tif", **given).json()["job"]
    expected = {"channels": ["ER", 0], "min_area_px": 3}
    assert client.get(f"/api/v1/jobs/{job}").json()["options"] == expected
    np.save(tmp_path / "z.npy", np.random.default_rng(0).integers(0, 99, (2, 40, 48)))
    images, options = [tmp_path / "z.npy"], {"z": "max", "channels": (0,), "min_area_px": 3}
    with page_of(tmp_path, mini_model, images, **options) as page:
        (shown,) = page.get("/api/v1/jobs").json()
        assert shown["options"] == {"z": "max", "channels": [0]}


def test_every_channel_of_the_file_can_be_looked_at(client, tmp_path):
    pixels = stack(tmp_path / "a.tif")
    base = f"/api/v1/jobs/{upload(client, tmp_path / 'a.tif', channels=['ER']).json()['job']}"
    listed = client.get(f"{base}/channels").json()
    assert [one["name"] for one in listed] == NAMES
    assert [one["colour"] for one in listed] == [BLUE, GREEN, RED, "#ffffff"]
    assert [one["shown"] for one in listed] == [True, True, True, False]
    assert (array_of(client.get(f"{base}/image")) == pixels[..., 1]).all()
    place = {"level": 1, "row": 0, "column": 0}
    for channel in range(4):
        found = array_of(client.get(f"{base}/image", params={"channel": channel}))
        assert (found == pixels[..., channel]).all()
        tile = client.get(f"{base}/image/tile", params={**place, "channel": channel})
        assert (array_of(tile) == pixels[::2, ::2, channel]).all()
    several = client.get(f"{base}/image/tile", params={**place, "channel": [2, 0, 2]})
    files = io.BytesIO(several.content)
    for channel in (2, 0):
        assert (np.load(files) == pixels[::2, ::2, channel]).all()
    assert files.read() == b""  # each once
    many = client.get(f"{base}/image/tile", params={**place, "channel": MOST_CHANNELS * [0]})
    assert many.status_code == 200
    many = client.get(f"{base}/image/tile", params={**place, "channel": (MOST_CHANNELS + 1) * [0]})
    assert many.status_code == 422
    for path in ("image", "image/tile"):
        refused(client.get(f"{base}/{path}", params={**place, "channel": 4}), 422, "0 to 3 (DNA, ")
    refused(client.get(f"{base}/image", params={"channel": -1}), 422, "`channel` must be at least")
    refused(client.get(f"{base}/image", params={"channel": "DNA"}), 422, "a whole number")
    refused(client.get("/api/v1/jobs/" + 32 * "0" + "/channels"), 404, "no job")


def test_one_channel_is_no_choice(client, picture, tmp_path):
    base = f"/api/v1/jobs/{upload(client, picture).json()['job']}"
    assert client.get(f"{base}/channels").json() == []
    refused(client.get(f"{base}/image", params={"channel": 0}), 422, "which has none")
    gray = np.random.default_rng(0).integers(0, 255, (40, 48, 1)).astype(np.uint8)
    write_image(tmp_path / "gray.png", np.repeat(gray, 3, 2))  # stored as a colour picture
    base = f"/api/v1/jobs/{upload(client, tmp_path / 'gray.png').json()['job']}"
    assert client.get(f"{base}/channels").json() == []


@pytest.mark.parametrize("chosen", [[], ["green"]])
def test_colours_of_a_picture_are_channels(client, tmp_path, chosen):
    colours = np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)
    write_image(tmp_path / "a.png", colours)
    job = upload(client, tmp_path / "a.png", channels=chosen).json()["job"]
    base = f"/api/v1/jobs/{job}"
    listed = client.get(f"{base}/channels").json()
    assert [one["colour"] for one in listed] == [RED, GREEN, BLUE]
    assert array_of(client.get(f"{base}/image")).shape == (40, 48)  # the mean, or green
    for channel in range(3):
        found = array_of(client.get(f"{base}/image", params={"channel": channel}))
        assert (found == colours[..., channel]).all()
    kept = list(client.service.queue.job_folder(job).glob("channel_*.npy"))
    assert bool(kept) == bool(chosen)  # those that were segmented are there already


def test_a_channel_whose_name_is_a_number_is_not_mistaken(tmp_path):
    pixels = stack(tmp_path / "b.tif")
    metadata = {"axes": "CYX", "Channel": {"Name": ["1", "0", "same", "same"]}}
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), metadata=metadata, photometric="minisblack")
    original = Original.of(path, {"channels": ["0"]})
    names = [one["name"] for one in original.channels()]
    assert names == ["1", "0", "same", "same"]
    for position in range(4):
        assert (original.read(names, position) == pixels[..., position]).all()


def test_transmitted_light_is_shown_if_it_was_segmented(tmp_path):
    stack(tmp_path / "a.tif")
    (*_, bright) = Original.of(tmp_path / "a.tif", {"channels": ["bright field"]}).channels()
    assert (bright["shown"], bright["colour"]) == (True, "#ffffff")
    stack(tmp_path / "b.tif", list("abcdefg"))
    listed = Original.of(tmp_path / "b.tif", {"nuclei": "f"}).channels()
    assert [one["name"] for one in listed if one["shown"]] == ["a", "b", "c", "f"]


def test_planes_are_channels_if_they_were_chosen_as_such(tmp_path, client):
    pixels = np.random.default_rng(0).integers(0, 99, (3, 40, 48)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    for options, count in (({"page": 1}, 0), ({"z": "max"}, 0), ({"channels": [1]}, 3)):
        assert len(Original.of(tmp_path / "a.tif", options).channels()) == count
    job = upload(client, tmp_path / "a.tif", channels=["1"]).json()["job"]
    found = array_of(client.get(f"/api/v1/jobs/{job}/image", params={"channel": 2}))
    assert (found == pixels[2]).all()


def test_a_file_that_cannot_be_read_any_more_is_a_problem(client, tmp_path, monkeypatch):
    stack(tmp_path / "a.tif")
    base = f"/api/v1/jobs/{upload(client, tmp_path / 'a.tif', channels=['ER']).json()['job']}"
    folder = client.service.queue.job_folder(base.rpartition("/")[2])
    whole = (folder / "image.tif").read_bytes()
    (folder / "image.tif").write_bytes(whole[: len(whole) // 2])
    answer = client.get(f"{base}/image", params={"channel": 0})
    refused(answer, 500, "'image.tif'")
    assert str(folder) not in answer.text
    stack(folder / "image.tif", ["DNA", "ER", "Mito", "Bright field"])
    monkeypatch.setattr(channels_module, "_LONGEST_S", 0.001)
    refused(client.get(f"{base}/image", params={"channel": 0}), 500, "must be read within 0.001 s")
    monkeypatch.undo()
    monkeypatch.setattr(channels_module.sys, "executable", shutil.which("false"))
    refused(client.get(f"{base}/image", params={"channel": 0}), 500, "ended with code 1")
    monkeypatch.undo()
    assert client.get(f"{base}/image", params={"channel": 0}).status_code == 200
    noise(folder / "image.tif", 0, (30, 30))
    original = Original.of(folder / "image.tif", {})
    with pytest.raises(DINOCellError, match=r"size of the plane that was segmented \(40, 48\)"):
        keep_channels(folder, original, ["0"], [0])
    with pytest.raises(OSError, match="No such file"):  # the job was deleted
        keep_channels_apart(tmp_path / "gone", original, ["0"], [0])


def test_channels_count_for_the_space_of_a_job(client, tmp_path):
    stack(tmp_path / "a.tif")
    job = upload(client, tmp_path / "a.tif", channels=["ER"]).json()["job"]
    newest = upload(client, tmp_path / "a.tif", channels=["ER"]).json()[
        "job"
    ]  # it stays in any case
    queue = client.service.queue
    used = size_of(queue.job_folder(job)) + size_of(queue.job_folder(newest))
    assert queue.expire(keep_s=1e9, keep_bytes=used + 5000) == []
    assert client.get(f"/api/v1/jobs/{job}/image?channel=0").status_code == 200
    assert queue.expire(keep_s=1e9, keep_bytes=used + 5000) == [job]


def plate(folder, channels=("1", "2", "3")):
    """Files as Harmony writes them, of two sites; the pixels of the first."""
    folder.mkdir()
    paths = [
        noise(folder / f"r01c02f{site:02}p01-ch{channel}sk1fk1fl1.tiff", 10 * site + int(channel))
        for site in (1, 2)
        for channel in channels
    ]
    return paths, np.stack([read_image(path).pixels for path in paths[:3]], -1)


@pytest.mark.parametrize("chosen", [("2",), ("2", "3")])
def test_view_finds_the_channels_of_a_plate(tmp_path, mini_model, chosen):
    paths, pixels = plate(tmp_path / "plate")
    with page_of(tmp_path, mini_model, paths, channels=chosen) as client:
        jobs = client.get("/api/v1/jobs").json()
        assert len(jobs) == 2
        base = f"/api/v1/jobs/{jobs[0]['id']}"
        names = [one["name"] for one in client.get(f"{base}/channels").json()]
        assert names == (["1", "2", "3"] if len(chosen) == 1 else list(chosen))
        for channel, name in enumerate(names):
            found = array_of(client.get(f"{base}/image", params={"channel": channel}))
            assert (found == pixels[..., int(name) - 1]).all()


def test_view_says_that_the_image_is_gone(tmp_path, mini_model):
    pixels = stack(tmp_path / "a.tif")
    with page_of(tmp_path, mini_model, [tmp_path / "a.tif"], channels=("ER",)) as client:
        base = f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}"
        assert len(client.get(f"{base}/channels").json()) == 4
        assert (array_of(client.get(f"{base}/image?channel=2")) == pixels[..., 2]).all()
        (tmp_path / "a.tif").unlink()
        assert (array_of(client.get(f"{base}/image?channel=2")) == pixels[..., 2]).all()
        refused(client.get(f"{base}/image?channel=3"), 500, "a.tif is gone: put it back")
        assert (array_of(client.get(f"{base}/image")) == pixels[..., 1]).all()


def test_jobs_of_earlier_versions_have_their_plane(client, picture):
    job = upload(client, picture).json()["job"]
    about = client.service.queue.job_folder(job) / "about.json"
    known = json.loads(about.read_text())
    del known["channels"]
    about.write_text(json.dumps(known))
    assert client.get(f"/api/v1/jobs/{job}/channels").json() == []
    assert client.get(f"/api/v1/jobs/{job}/image").status_code == 200


def test_small_copies_are_no_channels_of_a_plate(tmp_path):
    for ending in ("w1", "w2", "w1_thumb"):
        noise(tmp_path / f"plate_A01_s1_{ending}.tif", 0)
    ((_, files),) = _fields_in(tmp_path, "auto").items()
    assert list(files) == ["1", "2"]
    assert _fields_in(tmp_path, "off") == {}
