"""Every layout becomes the same folders; an interruption costs one image; bad input one sentence."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import layout_doubles as doubles
import numpy as np
import pytest
from killing import kills_of

from dinocell.cli.app import main
from dinocell.datasets import LAYOUTS, Facts, SplitOptions, describe_layouts, prepare
from dinocell.datasets.sample import Sample, split_of
from dinocell.datasets.splits import divide
from dinocell.errors import ConfigError, DataSetError, ImageFileError, UsageError
from dinocell.io import read_image, read_labels, write_image, write_labels
from dinocell.pairs import find_pairs

REAL = Path(os.environ.get("DINOCELL_DATA", "no data"))


def prepared(name: str, source: Path, out: Path, **options):
    return prepare(name, source, out, shown=False, **options)


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with open(out / "manifest.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture
def made(tmp_path):
    """Makes a tiny source of a layout."""

    def make(name: str) -> Path:
        source = tmp_path / "source"
        doubles.MAKERS[name](source)
        return source

    return make


EXPECTED = {  # name of a sample: its split and its number, which says where the cells are
    "livecell": {
        f"{kind}_Phase_{split}_{n}": (split, n)
        for split, kind in (("train", "A172"), ("val", "BT474"), ("test", "A172"))
        for n in range(2)
    },
    "omnipose": {
        **{f"bact_phase_5I_crop_{n}": ("train", n) for n in range(2)},
        **{f"bact_phase_caulo_{n}": ("test", n) for n in range(2)},
    },
    "cellpose": {"000": ("train", 0), "001": ("train", 1), "002": ("test", 2)},
    "tissuenet": {
        **{f"tissuenet_train_{n:05d}": ("train", n) for n in range(3)},
        "tissuenet_val_00000": ("val", 0),
        **{f"tissuenet_test_{n:05d}": ("test", n) for n in range(2)},
    },
    "dsb2018": {f"id{n}": ("train", n) for n in range(3)},
    "nuinsseg": {
        f"{organ}_{n}": ("train", n) for organ in ("human_liver", "mouse_spleen") for n in range(2)
    },
    "tnbc": {"01_1": ("train", 0), "07_1": ("val", 1), "09_1": ("test", 2)},
    "lynsec": {"0_l1": ("train", 0), "35_l2": ("train", 1), "0_l3": ("train", 3)},
    "vicar": {"labelled_A2058_0": ("train", 0), "labelled_PC3_1": ("train", 1)},
    "yeastsam": {str(n): ("train", n) for n in range(2)},
    "s-bsst265": {f"HaCaT_{n}": ("train", n) for n in range(2)},
    "bbbc039": {"w0": ("train", 0), "w1": ("val", 1), "w2": ("test", 2)},
    "bbbc006": {f"mcf-z-stacks-03212011_a0{n + 1}_s1": ("train", n) for n in range(2)},
    "ctc": {
        f"source_{film}_t00{n}": (split, n)
        for film, split in (("01", "train"), ("02", "val"))
        for n in range(2)
    },
    "coco": {"a": ("train", 0), "b": ("train", 1)},
    "seg_npy": {str(n): ("train", n) for n in range(2)},
    "imagej-roi": {str(n): ("train", n) for n in range(2)},
    "geojson": {str(n): ("train", n) for n in range(2)},
}


@pytest.mark.parametrize("name", doubles.MAKERS)
def test_every_layout_becomes_the_same_folders(made, tmp_path, name):
    if name == "imagej-roi":
        pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    source, out = made(name), tmp_path / "out"
    none = SplitOptions(val_fraction=0, test_fraction=0)
    result = prepared(name, source, out, splits=none)
    rows = rows_of(out)
    assert {key: row["split"] for key, row in rows.items()} == {
        key: split for key, (split, _) in EXPECTED[name].items()
    }
    for key, (_, number) in EXPECTED[name].items():
        row = rows[key]
        truth = doubles.apart(number) if name == "tnbc" else doubles.truth(number)
        assert np.array_equal(read_labels(out / row["labels"]), truth), key
        image = read_image(out / row["image"]).pixels
        assert image.shape[:2] == doubles.SHAPE
        assert row["num_cells"] == "2"
        for part in ("image", "labels"):
            written = (out / row[part]).read_bytes()
            assert hashlib.sha256(written).hexdigest() == row[f"{part}_sha256"]
        assert Path(row["source_file"]).is_file()
    for split in {split for split, _ in EXPECTED[name].values()}:
        pairs = find_pairs(out / split / "images", out / split / "labels")
        assert len(pairs) == result.manifest["splits"][split]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["licence"] == LAYOUTS[name].licence
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == [
        "manifest.csv",
        "manifest.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    again = prepared(name, source, out, splits=none)
    assert "nothing was changed" in again.text()


def test_channels_keep_their_meaning(made, tmp_path):
    source, out = made("cellpose"), tmp_path / "out"
    prepared("cellpose", source, out)
    for row in rows_of(out).values():  # 001 has three equal channels
        assert row["channels"] == "red;green;blue"
        assert read_image(out / row["image"], channels=["green"]).pixels.shape == doubles.SHAPE
    green = read_image(out / rows_of(out)["000"]["image"], channels=[1]).pixels
    assert np.array_equal(green, doubles.picture(0, 3)[..., 1])


def test_lynsec_has_colours_and_leaves_out_wrong_labels(made, tmp_path):
    text = prepared("lynsec", made("lynsec"), tmp_path / "out").text()
    assert (
        "lynsec 2 (0_l2 to 34_l2) were left out, because their labels belong to other images: 1"
        in text
    )
    for name, row in rows_of(tmp_path / "out").items():
        image = read_image(tmp_path / "out" / row["image"])
        assert (image.channel_names, image.pixels.dtype) == (("red", "green", "blue"), np.uint8)
        assert np.array_equal(image.pixels, doubles.picture(EXPECTED["lynsec"][name][1], 3))
    assert {row["stratum"] for row in rows_of(tmp_path / "out").values()} == {"l1", "l2", "l3"}


def test_fractions_of_lynsec_stay_fractions(made, tmp_path):
    source = made("lynsec")
    path = source / "lynsec 1" / "0_l1.npy"
    array = np.load(path).astype(np.float64)
    array[..., :3] /= 255
    np.save(path, array)
    prepared("lynsec", source, tmp_path / "out")
    (image,) = (tmp_path / "out").rglob("images/0_l1.*")
    assert read_image(image).pixels == pytest.approx(array[..., :3])


@pytest.mark.parametrize("compressed", [False, True])
def test_tissuenet_has_two_channels_and_two_truths(tmp_path, compressed):
    source, out = tmp_path / "source", tmp_path / "out"
    doubles.tissuenet(source, compressed)
    prepared("tissuenet-nuclei", source, out)
    row = rows_of(out)["tissuenet_train_00002"]
    image = read_image(out / row["image"])
    assert (image.channel_names, image.pixel_size_um) == (("nuclei", "membrane"), 0.5)
    assert np.array_equal(image.pixels, doubles.picture(2, 2, np.float32))
    assert np.array_equal(read_labels(out / row["labels"]), doubles.truth(2) == 2)


def samples(count: int, strata: int = 1, split: str | None = None) -> list[Sample]:
    return [
        Sample(f"{n:04d}", Path(), lambda: None, split, stratum=str(n % strata))  # type: ignore
        for n in range(count)
    ]


def test_draws_have_exact_counts_in_every_stratum_and_ignore_the_order():
    given = samples(200, strata=4)
    division = divide(given, SplitOptions(test_fraction=0.25))
    assert [sample for sample, _ in division] == given
    by_stratum = {(s.stratum, split): 0 for s, split in division}
    for sample, split in division:
        by_stratum[sample.stratum, split] += 1
    assert [by_stratum[str(s), "test"] for s in range(4)] == pytest.approx([12.5] * 4, abs=1)
    assert [by_stratum[str(s), "val"] for s in range(4)] == pytest.approx([5] * 4, abs=1)
    assert sum(split == "test" for _, split in division) == 50
    assert sum(split == "val" for _, split in division) == 20
    turned = divide(given[::-1], SplitOptions(test_fraction=0.25))
    assert turned[::-1] == division
    other = divide(given, SplitOptions(test_fraction=0.25, seed=1))
    assert other != division


def test_splits_of_the_source_stay():
    given = [
        *samples(20, split="train"),
        Sample("x", Path(), lambda: None, "test"),  # type: ignore[arg-type, return-value]
    ]
    division = divide(given, SplitOptions(val_fraction=0.25))
    assert [split for sample, split in division if sample.name == "x"] == ["test"]
    assert sum(split == "val" for _, split in division) == 5
    divided = divide(given, SplitOptions(resplit=True, max_images=10, test_fraction=0))
    assert [split for _, split in divided].count("val") == 1
    assert len(divided) == 10


def test_the_original_recipe_has_its_numbers():
    """4,500 and 500 of the 5,239 images of LIVECell, 540 and 60 of the 608 of Cellpose."""
    for available, wanted, train, val in ((5239, 5000, 4500, 500), (608, 600, 540, 60)):
        options = SplitOptions(resplit=True, max_images=wanted, test_fraction=0)
        splits = [split for _, split in divide(samples(available, 8, "test"), options)]
        assert (splits.count("train"), splits.count("val")) == (train, val)


def test_names_of_splits():
    names = (
        "Training",
        "train_sorted",
        "stage1_train",
        "validation",
        "livecell_coco_val",
        "TestSet 2",
        *("images", "testis", "heart_valve", "device-1", "trained by hand", "train_val_images"),
    )
    assert [split_of(name) for name in names] == ["train"] * 3 + ["val"] * 2 + ["test"] + [None] * 6


def test_an_interruption_costs_one_image(made, tmp_path, monkeypatch):
    source, out = made("dsb2018"), tmp_path / "out"
    prepared("dsb2018", source, tmp_path / "whole")
    from dinocell.datasets import preparation as module

    written = []

    def stops(path, *arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_labels(path, *arguments, **options)

    def counts(path, *arguments, **options):
        written.append(path)
        write_labels(path, *arguments, **options)

    monkeypatch.setattr(module, "write_labels", stops)
    with pytest.raises(KeyboardInterrupt):
        prepared("dsb2018", source, out)
    assert not out.exists()
    with open(tmp_path / "out.part" / "journal.jsonl", "a") as journal:
        journal.write('{"name": "id2", "ima')
    with pytest.raises(UsageError, match="unfinished work of this same command"):
        prepared("dsb2018", source, out, splits=SplitOptions(seed=1))
    monkeypatch.setattr(module, "write_labels", counts)
    prepared("dsb2018", source, out)
    assert len(written) == 3
    assert rows_of(out) == rows_of(tmp_path / "whole")
    assert not (tmp_path / "out.part").exists()


def test_a_kill_at_any_step_leaves_nothing_half(made, tmp_path):
    script = (
        "from pathlib import Path\n"
        "from dinocell.datasets.preparation import prepare\n"
        f"source, folder = {str(made('dsb2018'))!r}, Path({str(tmp_path)!r})\n"
        "kill_everywhere(lambda out: prepare('dsb2018', source, out, shown=False), folder)\n"
    )
    assert kills_of(script) > 10


def test_other_contents_of_the_output_folder_are_kept(made, tmp_path):
    source, out = made("coco"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds something else"):
        prepared("coco", source, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    prepared("coco", source, out)
    with pytest.raises(UsageError, match="holds something else"):
        prepared("coco", source, out, facts=Facts(licence="CC0"))


@pytest.mark.parametrize("inside", ["", "out", "deeper/out"])
def test_an_output_folder_inside_the_source_is_refused(made, inside):
    source = made("bbbc006")  # its second run would read the labels of its first
    before = sorted(source.rglob("*"))
    with pytest.raises(UsageError, match="`out` must be outside `source`"):
        prepared("bbbc006", source, source / inside)
    assert sorted(source.rglob("*")) == before


def test_an_unknown_licence_is_a_note_until_it_is_given(made, tmp_path):
    source = made("coco")
    assert "licence is unknown" in prepared("coco", source, tmp_path / "a").text()
    facts = Facts(licence="CC BY 4.0", pixel_size_um=0.25)
    known = prepared("coco", source, tmp_path / "b", facts=facts)
    assert "licence is unknown" not in known.text()
    assert known.manifest["licence"] == "CC BY 4.0"
    assert known.manifest["pixel_sizes_um"] == [0.25]


def change_coco(source: Path, change) -> None:
    path = source / "all.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_polygons_and_run_lengths_may_be_mixed_and_crowds_are_left_out(made, tmp_path):
    source = made("coco")

    def change(content):
        first = content["annotations"][0]
        first["segmentation"] = [doubles.outline(1), doubles.outline(1)]
        content["annotations"].append(doubles.annotation(7, 1, 0, "rle") | {"iscrowd": 1})
        content["annotations"].append(
            doubles.annotation(7, 2, 0) | {"segmentation": [[1, 1, 2, 2]]}
        )
        content["images"].append({"id": 9, "file_name": "empty.tif", "height": 12, "width": 16})

    doubles.image(source / "empty.tif", 5)
    change_coco(source, change)
    none = SplitOptions(val_fraction=0, test_fraction=0)
    text = prepared("coco", source, tmp_path / "out", splits=none).text()
    assert "1 crowd annotations of all.json were left out" in text
    assert "Images of all.json without an annotation count as empty of cells: 1" in text
    rows = rows_of(tmp_path / "out")
    assert np.array_equal(read_labels(tmp_path / "out" / rows["a"]["labels"]), doubles.truth(0))
    assert "1 annotations cover no pixel" in rows["a"]["notes"]
    assert rows["empty"]["num_cells"] == "0"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def larger(content):
    content["images"][0]["height"] = 13


def odd(content):
    content["annotations"][0]["segmentation"] = [[1, 2, 3, 4, 5, 6, 7]]


def other_run_lengths(content):
    content["annotations"][1]["segmentation"]["size"] = [16, 12]


def cut_run_lengths(content):
    content["annotations"][1]["segmentation"]["counts"].pop()


def no_polygons(content):
    content["annotations"][0]["segmentation"] = "a b"


def same_ids(content):
    content["images"][1]["id"] = content["images"][0]["id"]


def outside(content):
    content["images"][0]["file_name"] = str(Path(__file__))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[400] ^= 255
    path.write_bytes(content)


def compressed_and_damaged(source: Path) -> None:
    doubles.tissuenet(source, compressed=True)
    damage(source / "tissuenet_val.npz")


def no_names(content):
    del content["images"][0]["file_name"]
    content["images"][1]["file_name"] = None


def empty_name(content):
    content["images"][0]["file_name"] = ""


def unknown_image(content):
    content["annotations"][0]["image_id"] = 99


BAD = {
    "another layout": ("dsb2018", shutil.rmtree, "must hold stage1_train/ID"),
    "truncated npz": (
        "tissuenet",
        lambda s: cut(s / "tissuenet_val.npz"),
        "npz archive with the array",
    ),
    "npz of something else": (
        "tissuenet",
        lambda s: np.savez(s / "more.npz", X=np.zeros((2, 3)), y=np.zeros(2)),
        r"\(N, H, W, C\)",
    ),
    "damaged npz": ("tissuenet", compressed_and_damaged, "npz archive with the array X .error: "),
    "json without end": (
        "coco",
        lambda s: (s / "all.json").write_text("[" * 100_000),
        "must be a COCO file.*RecursionError",
    ),
    "text for a polygon": (
        "coco",
        lambda s: change_coco(s, no_polygons),
        "a.tif' .A segmentation of type str",
    ),
    "images with one id": ("coco", lambda s: change_coco(s, same_ids), "have the same id"),
    "image outside": ("coco", lambda s: change_coco(s, outside), r"absent \(/.*test_prepare.py"),
    "truncated json": ("coco", lambda s: cut(s / "all.json"), "download is complete"),
    "other json": ("coco", lambda s: (s / "all.json").write_text("[1]"), "must be a COCO file"),
    "absent image": (
        "coco",
        lambda s: (s / "pictures/a.tif").unlink(),
        r"1 of 2 are absent \(a.tif\)",
    ),
    "images without a name": (
        "coco",
        lambda s: change_coco(s, no_names),
        "must state its file in `file_name`, 2 of 2 have no file name",
    ),
    "an image with an empty name": (
        "coco",
        lambda s: change_coco(s, empty_name),
        "must state its file in `file_name`, 1 of 2 have no file name",
    ),
    "other size in the list": ("coco", lambda s: change_coco(s, larger), "13 × 16 px, got 12 × 16"),
    "odd polygon": ("coco", lambda s: change_coco(s, odd), "odd count of numbers"),
    "run lengths of another size": (
        "coco",
        lambda s: change_coco(s, other_run_lengths),
        r"Run lengths of size \[16, 12\]",
    ),
    "cut run lengths": ("coco", lambda s: change_coco(s, cut_run_lengths), "add up to 12 × 16"),
    "annotation without image": (
        "coco",
        lambda s: change_coco(s, unknown_image),
        "unknown image 99",
    ),
    "labels of another size": (
        "s-bsst265",
        lambda s: write_labels(s / "dataset/groundtruth/HaCaT_0.tif", doubles.truth()[:, 1:]),
        "same size, got 12 × 16 and 12 × 15",
    ),
    "mask of another size": (
        "dsb2018",
        lambda s: write_labels(s / "stage1_train/id0/masks/1.png", doubles.truth()[1:]),
        "as large as its image, 12 × 16 px, got 11 × 16",
    ),
    "labels saved as JPEG": (
        "yeastsam",
        lambda s: write_labels(
            s / "DIC_mask/0.tif",
            np.random.default_rng(0).integers(0, 40, doubles.SHAPE).astype(np.uint16),
        ),
        "got 'the labels of .*0.tif', which looks like intensities",
    ),
    "image that is absent": ("cellpose", lambda s: (s / "train/000_img.png").unlink(), "beside it"),
    "truncated array": ("lynsec", lambda s: cut(s / "lynsec 1/0_l1.npy"), "download is damaged"),
    "array of something else": (
        "lynsec",
        lambda s: np.save(s / "lynsec 1/0_l1.npy", np.zeros((3, 4))),
        r"shape \(H, W, 4\) or \(H, W, 5\), got float64 of shape \(3, 4\)",
    ),
    "array that would run code": (
        "lynsec",
        lambda s: np.save(s / "lynsec 1/0_l1.npy", np.array([{}])),
        "download is damaged",
    ),
    "phase image that is absent": (
        "vicar",
        lambda s: (s / "labelled/PC3/1_img.tif").unlink(),
        "beside it",
    ),
    "truncated image": (
        "omnipose",
        lambda s: cut(s / "bact_phase/test_sorted/caulo/0.tif"),
        "cut short",
    ),
    "3-D film": (
        "ctc",
        lambda s: doubles.labels(s / "01_ST/SEG/man_seg_000_012.tif"),
        "planes of 3-D films are not read",
    ),
    "GeoJSON of another image": (
        "geojson",
        lambda s: write_image(s / "0.tif", doubles.picture()[:4]),
        "must lie in the image of 4 × 16 px",
    ),
    "GeoJSON of points": (
        "geojson",
        lambda s: (s / "0.geojson").write_text(
            '{"geometry": {"type": "Point", "coordinates": [1, 2]}}'
        ),
        "must be areas, got a Point",
    ),
    "JSON of another kind": (
        "geojson",
        lambda s: (s / "0.geojson").write_text('["a", "b"]'),
        "must be GeoJSON with the outlines of cells",
    ),
}


LABELS_OF_ONE = {  # the labels to remove, and the images that have none then
    "cellpose": ("train/001_masks.png", ["train/001_img.png"]),
    "omnipose": (
        "bact_phase/test_sorted/caulo/0_masks.tif",
        ["bact_phase/test_sorted/caulo/0.tif"],
    ),
    "dsb2018": ("stage1_train/id1/masks", ["stage1_train/id1/images/id1.png"]),
    "nuinsseg": (
        "mouse spleen/label masks*/mouse_spleen_0.tif",
        ["mouse spleen/tissue images/mouse_spleen_0.png"],
    ),
    "tnbc": (
        "TNBC_NucleiSegmentation/GT_07",
        ["TNBC_NucleiSegmentation/Slide_07/07_1.png"],
    ),
    "vicar": ("labelled/PC3/1_mask.png", ["labelled/PC3/1_img.tif"]),
    "yeastsam": ("DIC_mask/1.tif", ["DIC/1.tif"]),
    "s-bsst265": ("dataset/groundtruth/HaCaT_1.tif", ["dataset/rawimages/HaCaT_1.tif"]),
    "bbbc039": ("masks/w1.png", ["images/w1.tif"]),
    "bbbc006": (
        "BBBC006_v1_labels/mcf-z-stacks-03212011_a02_s1.png",
        ["BBBC006_v1_images_z_16/mcf-z-stacks-03212011_a02_s1_w1abc16.tif"],
    ),
    "ctc": ("02_GT/SEG/man_seg001.tif", ["02/t001.tif"]),
    "seg_npy": ("1_seg.npy", ["1.tif"]),
    "imagej-roi": ("1_RoiSet.zip", ["1.tif"]),
    "geojson": ("1.tif.geojson", ["1.tif"]),
}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", LABELS_OF_ONE)
def test_images_without_labels_are_left_out_and_listed(made, tmp_path, name):
    if name == "imagej-roi":
        pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    source, out = made(name), tmp_path / "out"
    removed, alone = LABELS_OF_ONE[name]
    for path in list(source.glob(removed)):
        remove(path)
    text = prepared(name, source, out).text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["images_without_labels"] == alone
    assert len(rows_of(out)) == len(EXPECTED[name]) - 1
    names = Path(alone[0]).name
    assert f"note: Images without labels were left out: 1 ({names}); manifest.json" in text


IMAGE_OF_ONE = {  # the image, or all images of a folder, to remove, and the labels that have none then
    "nuinsseg": ("mouse spleen/tissue images/mouse_spleen_0.png", ["mouse_spleen_0.tif"]),
    "nuinsseg, a folder": (
        "mouse spleen/tissue images",
        ["mouse_spleen_0.tif", "mouse_spleen_1.tif"],
    ),
    "tnbc": ("TNBC_NucleiSegmentation/Slide_07/07_1.png", ["07_1.png"]),
    "tnbc, a folder": ("TNBC_NucleiSegmentation/Slide_07", ["07_1.png"]),
    "yeastsam": ("DIC/1.tif", ["1.tif"]),
    "s-bsst265": ("dataset/rawimages/HaCaT_1.tif", ["HaCaT_1.tif"]),
    "bbbc039": ("images/w1.tif", ["w1.png"]),
    "bbbc006": (
        "BBBC006_v1_images_z_16/mcf-z-stacks-03212011_a02_s1_w1abc16.tif",
        ["mcf-z-stacks-03212011_a02_s1.png"],
    ),
}


@pytest.mark.parametrize("case", IMAGE_OF_ONE)
def test_labels_without_an_image_are_left_out_with_a_note(made, tmp_path, case):
    name = case.split(",")[0]
    source, out = made(name), tmp_path / "out"
    removed, alone = IMAGE_OF_ONE[case]
    remove(source / removed)
    text = prepared(name, source, out).text()
    assert f"Labels without an image were left out: {len(alone)} ({', '.join(alone)})" in text
    assert len(rows_of(out)) == len(EXPECTED[name]) - len(alone)


def test_each_image_takes_the_better_of_two_label_folders(made, tmp_path):
    source = made("nuinsseg")
    remove(source / "mouse spleen/label masks modify/mouse_spleen_0.tif")
    result = prepared("nuinsseg", source, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == len(EXPECTED["nuinsseg"])
    assert result.manifest["images_without_labels"] == []
    assert any(
        "took labels of 'label masks', because 'label masks modify' has none for them: 1 (mouse"
        in note
        for note in result.manifest["notes"]
    )
    assert not any("without" in note for note in result.manifest["notes"])


@pytest.mark.parametrize(
    ("name", "taken", "other"),
    [
        ("tnbc", "TNBC_NucleiSegmentation/GT_07/07_1.png", "07_1.bmp"),
        ("s-bsst265", "dataset/groundtruth/HaCaT_1.tif", "HaCaT_1.ome.tif"),
    ],
)
def test_a_second_file_of_labels_of_an_image_is_not_without_one(made, tmp_path, name, taken, other):
    source = made(name)
    shutil.copy(source / taken, (source / taken).with_name(other))
    result = prepared(name, source, tmp_path / "out")
    assert not any("without an image" in note for note in result.manifest["notes"])


def test_coco_with_absolute_names_below_a_relative_source(made, tmp_path, monkeypatch):
    source = made("coco")
    path = source / "all.json"
    listed = json.loads(path.read_text())
    names = [image["file_name"] for image in listed["images"]]
    for image in listed["images"]:
        (place,) = source.rglob(Path(image["file_name"]).name)
        image["file_name"] = str(place.absolute())
    path.write_text(json.dumps(listed))
    monkeypatch.chdir(source.parent)
    result = prepared("coco", Path(source.name), tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == len(names)
    assert result.manifest["images_without_labels"] == []


def test_images_that_no_coco_file_of_a_folder_lists_have_no_labels(made, tmp_path):
    source = made("coco")
    doubles.image(source / "pictures" / "c.tif")
    result = prepared("coco", source, tmp_path / "out")
    assert result.manifest["images_without_labels"] == ["pictures/c.tif"]
    result = prepared("coco", source / "all.json", tmp_path / "of one file")
    assert result.manifest["images_without_labels"] == []


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("cellpose", "*/*_masks.png"),
        ("dsb2018", "*/*/masks"),
        ("nuinsseg", "*/label masks*"),
        ("tnbc", "*/GT_*"),
        ("bbbc006", "*_labels"),
        ("ctc", "*_[GS]T"),
        ("seg_npy", "*_seg.npy"),
    ],
)
def test_a_source_without_any_labels_is_refused(made, tmp_path, name, labels):
    source = made(name)
    for path in list(source.glob(labels)):
        remove(path)
    count = len(EXPECTED[name])
    with pytest.raises(DataSetError, match=rf"must have labels, none of the {count} has \("):
        prepared(name, source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


DAMAGED = {  # files that cannot be read, each kind of file, cut short or of another content
    "seg_npy": lambda s: cut(s / "0_seg.npy"),
    "imagej-roi": lambda s: cut(s / "0.zip"),
    "geojson": lambda s: cut(s / "0.geojson"),
    "tissuenet": lambda s: cut(s / "tissuenet_val.npz"),
    "lynsec": lambda s: cut(s / "lynsec 1/0_l1.npy"),
    "coco": lambda s: cut(s / "all.json"),
    "livecell": lambda s: cut(s / "livecell_coco_val.json"),
    "yeastsam": lambda s: cut(s / "DIC_mask/0.tif"),
    "omnipose": lambda s: cut(s / "bact_phase/test_sorted/caulo/0.tif"),
    "bbbc039": lambda s: cut(s / "masks/w0.png"),
}
APART = {  # files that can be read, and do not belong together
    "seg_npy": lambda s: write_image(s / "0.tif", doubles.picture()[:4]),
    "imagej-roi": lambda s: write_image(s / "0.tif", doubles.picture()[:4]),
    "geojson": lambda s: write_image(s / "0.tif", doubles.picture()[:4]),
    "coco": lambda s: change_coco(s, larger),
    "dsb2018": lambda s: write_labels(s / "stage1_train/id0/masks/1.png", doubles.truth()[1:]),
    "vicar": lambda s: (s / "labelled/PC3/1_img.tif").unlink(),
}


@pytest.mark.parametrize(
    ("name", "spoil", "code"),
    [
        *((name, spoil, 1) for name, spoil in DAMAGED.items()),
        *((name, spoil, 2) for name, spoil in APART.items()),
    ],
)
def test_damaged_files_have_one_exit_code_and_files_that_do_not_fit_another(
    made, tmp_path, capsys, name, spoil, code
):
    """README: 1 because a file is damaged, 2 because files do not belong together."""
    if name == "imagej-roi":
        pytest.importorskip("roifile", reason="roifile is not installed: extra [formats]")
    source = made(name)
    spoil(source)
    with pytest.raises(SystemExit) as left:
        main(["data", "prepare", name, str(source), "-o", str(tmp_path / "out")])
    assert left.value.code == code, capsys.readouterr().err


def test_geojson_may_leave_the_properties_empty(made, tmp_path):
    """RFC 7946, section 3.2: the value of "properties" is an object or null."""
    source = made("geojson")
    path = source / "0.geojson"
    content = json.loads(path.read_text())
    for feature in content["features"]:
        feature["properties"] = None
    path.write_text(json.dumps(content))
    prepared("geojson", source, tmp_path / "out")
    labels = read_labels(tmp_path / "out" / rows_of(tmp_path / "out")["0"]["labels"])
    assert np.array_equal(labels, doubles.truth(0))


@pytest.mark.parametrize("what", BAD)
def test_bad_sources_end_in_one_sentence_and_leave_nothing(made, tmp_path, what):
    name, spoil, message = BAD[what]
    source = made(name)
    spoil(source)
    source.mkdir(exist_ok=True)
    with pytest.raises((DataSetError, ImageFileError), match=message) as caught:
        prepared(name, source, tmp_path / "out")
    assert str(caught.value).count(". ") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_bad_image_leaves_the_finished_ones_for_the_next_try(made, tmp_path):
    source, out = made("s-bsst265"), tmp_path / "out"
    bad = source / "dataset" / "groundtruth" / "HaCaT_1.tif"
    write_labels(bad, np.kron([[0, 1], [1, 0]], np.ones((6, 8), int)).astype(np.uint16)[:, :9])
    with pytest.raises(DataSetError, match=r"1 finished images were kept in '.*out\.part'"):
        prepared("s-bsst265", source, out)
    doubles.labels(bad, 1)
    assert len(rows_of(prepared("s-bsst265", source, out).folder)) == 2


def test_calls_that_are_wrong(made, tmp_path):
    source = made("coco")
    with pytest.raises(UsageError, match="did you mean livecell"):
        prepared("LiveCell", source, tmp_path / "out")
    with pytest.raises(UsageError, match="check the path"):
        prepared("coco", tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ConfigError, match="below 1 together"):
        SplitOptions(val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ConfigError, match=r"pixel_size_um` must be above 0, got 0\.0"):
        Facts(pixel_size_um=0.0)
    shutil.copytree(source / "pictures", source / "more")
    for copy in (source / "all.json", source / "again.json"):
        copy.write_text(json.dumps(doubles.coco_content(["pictures/a.tif"])))
    with pytest.raises(DataSetError, match="listed once"):
        prepared("coco", source, tmp_path / "out")


def test_the_list_names_every_layout():
    text = describe_layouts()
    for name, layout in LAYOUTS.items():
        assert f"{name}: " in text
        assert layout.files in text
        assert not layout.holds or (layout.licence or "licence unknown") in text


@pytest.mark.skipif(not (REAL / "ctc").is_dir(), reason="DINOCELL_DATA has no ctc")
def test_a_real_film(tmp_path):
    source = REAL / "ctc" / "c2c12_phase"
    prepared("ctc", source, tmp_path / "out", facts=Facts(licence="CC BY 4.0"))
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 10
    assert sum(int(row["num_cells"]) for row in rows.values()) == 103


@pytest.mark.skipif(not (REAL / "bbbc039").is_dir(), reason="DINOCELL_DATA has no bbbc039")
def test_real_nuclei_come_back(tmp_path):
    """Real images in the folders of S-BSST265: the layout of the source is lost in our copy."""
    source = tmp_path / "source"
    for part, name in (("rawimages", "images"), ("groundtruth", "labels")):
        shutil.copytree(REAL / "bbbc039" / "val" / name, source / part)
    prepared("s-bsst265", source, tmp_path / "out")
    for name, row in rows_of(tmp_path / "out").items():
        truth = read_labels(REAL / "bbbc039" / "val" / "labels" / f"{name}.png")
        assert np.array_equal(read_labels(tmp_path / "out" / row["labels"]), truth)
