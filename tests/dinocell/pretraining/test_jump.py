"""`dinocell jump`: from a bucket's tables to an index, a check, shards and a plan."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinocell.cli import main

CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")
SELECTION = "cpg0000-jump-pilot/source_4/2020_B/*"


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    """Two plates of four fields, laid out as the gallery, with load_data tables."""
    root = tmp_path_factory.mktemp("gallery") / "bucket"
    base = root / "cpg0000-jump-pilot/source_4"
    rng = np.random.default_rng(0)
    for plate in ("BR1", "BR2"):
        images = base / f"images/2020_B/images/{plate}__2020/Images"
        images.mkdir(parents=True)
        header = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
        lines = [",".join([*header, *(f"FileName_Orig{c}" for c in CHANNELS)])]
        for site in range(1, 5):
            names = [f"r01c01f{site:02d}p01-ch{n}sk1fk1fl1.tiff" for n in range(1, 6)]
            for name in names:
                pixels = rng.integers(10, 4000, (48, 48)).astype(np.uint16)
                tifffile.imwrite(images / name, pixels)
            lines.append(",".join([plate, "A01", str(site), *names]))
        tables = base / f"workspace/load_data_csv/2020_B/{plate}"
        tables.mkdir(parents=True)
        (tables / "load_data.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def index(gallery, tmp_path, capsys) -> Path:
    path = tmp_path / "pilot.arrow"
    code, out, _ = call(capsys, "jump", "index", SELECTION, "-o", path, "--store", gallery)
    assert code == 0
    assert "8 fields of 2 plates" in out
    return path


def test_index_and_stats(index, capsys, tmp_path, gallery):
    code, out, _ = call(capsys, "jump", "stats", index, "-o", tmp_path / "s.png")
    assert code == 0
    assert f"8 fields of 2 plates in {gallery}" in out
    assert "AGP 8, DNA 8, ER 8, Mito 8, RNA 8" in out
    assert "cpg0000-jump-pilot/source_4/2020_B" in out
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_an_index_is_not_replaced_unasked(index, capsys, gallery):
    before = index.read_bytes()
    arguments = ("jump", "index", "cpg0000-jump-pilot/*/*/BR1", "-o", index, "--store", gallery)
    code, _, err = call(capsys, *arguments)
    assert (code, "overwrite" in err) == (2, True)
    assert index.read_bytes() == before
    code, out, _ = call(capsys, *arguments, "--overwrite")
    assert (code, "4 fields of 1 plates" in out) == (0, True)


def test_listing_needs_the_meaning_of_channels(capsys, gallery, tmp_path):
    out = tmp_path / "l.arrow"
    arguments = ("jump", "index", SELECTION, "-o", out, "--store", gallery, "--from", "listing")
    code, _, err = call(capsys, *arguments)
    assert (code, "must know the channels" in err) == (2, True)
    table = tmp_path / "channels.csv"
    rows = "".join(f"source_4,ch{n},{c}\n" for n, c in enumerate(CHANNELS, start=1))
    table.write_text("source,number,channel\n" + rows)
    code, text, _ = call(capsys, *arguments, "--channels-table", table)
    assert (code, "8 fields" in text) == (0, True)
    table.write_text("a,b\n")
    code, _, err = call(capsys, *arguments, "--channels-table", table, "--overwrite")
    assert (code, "columns number and channel" in err) == (2, True)


def test_a_plate_without_a_table_is_listed_or_named(capsys, gallery, tmp_path):
    root = tmp_path / "bucket"
    shutil.copytree(gallery, root)
    shutil.rmtree(next(root.rglob("load_data_csv")) / "2020_B" / "BR2")
    out = tmp_path / "x.arrow"
    arguments = ("jump", "index", SELECTION, "-o", out, "--store", root)
    code, text, _ = call(capsys, *arguments)
    assert code == 0
    assert "4 fields of 1 plates" in text
    assert "left out: 1 plates without a load_data table" in text
    assert "BR2__2020" in text
    table = tmp_path / "channels.csv"
    rows = "".join(f"source_4,ch{n},{c}\n" for n, c in enumerate(CHANNELS, start=1))
    table.write_text("source,number,channel\n" + rows)
    code, text, _ = call(capsys, *arguments, "--channels-table", table, "--overwrite")
    assert (code, "8 fields of 2 plates" in text) == (0, True)
    shutil.rmtree(next(root.rglob("load_data_csv")) / "2020_B" / "BR1")
    code, _, err = call(capsys, *arguments, "--overwrite")
    assert (code, "must have a load_data table or known channels" in err) == (2, True)


def test_plates_of_a_call_with_other_options_are_indexed_again(capsys, gallery, tmp_path):
    """What an interrupted call left must not bring its meaning of the channels."""
    out = tmp_path / "x.arrow"
    table = tmp_path / "channels.csv"
    arguments = ("jump", "index", SELECTION, "-o", out, "--store", gallery, "--from", "listing")
    table.write_text("number,channel\nch1,ER\nch2,DNA\n")
    work = tmp_path / "x.arrow.plates"
    code, _, _ = call(capsys, *arguments, "--channels-table", table)
    assert code == 0
    from dinov3.cells.streaming.index import FieldIndex

    keys = FieldIndex(out)[0].keys
    # As if it had been stopped before its end.
    work.mkdir()
    name = "cpg0000-jump-pilot__source_4__2020_B__BR1.json"
    wrong = [["cpg0000-jump-pilot/source_4/2020_B/BR1", "A01", "1", {"ER": keys["DNA"]}, 0]]
    (work / name).write_text(json.dumps({"made_with": "other", "rows": wrong}))
    (work / "left.part").write_text("{")
    code, _, _ = call(capsys, *arguments, "--channels-table", table, "--overwrite")
    assert code == 0
    assert dict(FieldIndex(out)[0].keys) == dict(keys)
    assert not work.exists()


def test_fields_that_lack_a_channel_are_counted(capsys, gallery, tmp_path):
    root = tmp_path / "bucket"
    shutil.copytree(gallery, root)
    table = next(root.rglob("BR2/load_data.csv"))
    lines = table.read_text().splitlines()
    lines[1] = ",".join([*lines[1].split(",")[:-1], ""])
    table.write_text("\n".join(lines) + "\n")
    out = tmp_path / "x.arrow"
    assert call(capsys, "jump", "index", SELECTION, "-o", out, "--store", root)[0] == 0
    code, text, _ = call(capsys, "jump", "verify", out)
    assert (code, "7 fields read" in text) == (0, True)
    assert "1 more of the index lack a channel" in text
    _, text, _ = call(capsys, "jump", "verify", out, "--json")
    assert json.loads(text)["incomplete"] == 1
    code, text, _ = call(capsys, "jump", "pack", out, tmp_path / "p")
    assert (code, "left out: 1 fields without AGP, DNA" in text) == (0, True)


def test_index_of_jump_lite(capsys, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    columns = {"Metadata_Source": ["source_2"] * 2, "Metadata_Batch": ["b"] * 2,
               "Metadata_Plate": ["P", "Q"], "Metadata_Well": ["A01"] * 2, "Metadata_Site": [1, 1]}  # fmt: skip
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "sites.parquet")
    out = tmp_path / "lite.arrow"
    arguments = ("jump", "index", "cpg0016-jump", "-o", out, "--from", "jump-lite", "--table")
    code, text, _ = call(capsys, *arguments, tmp_path / "sites.parquet")
    assert (code, "2 fields of JUMP-Lite (zstd)" in text) == (0, True)
    _, text, _ = call(capsys, "jump", "stats", out)
    assert "2 fields of 2 plates in s3://cellpainting-gallery" in text
    code, _, err = call(capsys, *arguments, tmp_path / "none", "--overwrite")
    assert (code, "must be a Parquet file" in err) == (2, True)
    code, _, err = call(
        capsys, *arguments, tmp_path / "sites.parquet", "--overwrite", "--codec", "gif"
    )
    assert (code, "must be one of zstd" in err) == (2, True)


def test_masks_become_a_data_set_for_the_evaluation(capsys, tmp_path):
    """Sites of two plates with labels, one without; read by the evaluation itself."""
    import pyarrow as pa
    import pyarrow.parquet
    import zarr

    from dinocell.pairs import find_pairs

    root = tmp_path / "store"
    images = root / "cpg0016-jump/source_all/images/2026_jump_lite_v1.0/images_compressed/zstd.zarr"
    labels = root / "masks/nuclei_masks"
    rng = np.random.default_rng(0)
    sites = [("P", 1), ("P", 2), ("Q", 1), ("Q", 2)]
    truth = {}
    for plate, site in sites:
        name = f"source_2__b__{plate}__A01__{site}"
        pixels = rng.integers(1, 999, (5, 40, 40)).astype(np.uint16)
        zarr.save_array(images / name, pixels)
        if (plate, site) != ("Q", 2):
            mask = np.kron(rng.integers(0, 9, (1, 4, 4)), np.ones((10, 10))).astype(np.uint16)
            zarr.save_array(labels / name, mask)
            truth[name] = (pixels[1], mask[0])
    columns = {"Metadata_Source": ["source_2"] * 4, "Metadata_Batch": ["b"] * 4,
               "Metadata_Plate": [p for p, _ in sites], "Metadata_Well": ["A01"] * 4,
               "Metadata_Site": [s for _, s in sites]}  # fmt: skip
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "sites.parquet")
    index = tmp_path / "lite.arrow"
    call(capsys, "jump", "index", "*", "-o", index, "--from", "jump-lite", "--table",
         tmp_path / "sites.parquet", "--store", root)  # fmt: skip
    arguments = ("jump", "masks", index, tmp_path / "pseudo", "--fields", 4)
    own = ("--masks", "masks/{kind}_masks")
    code, text, err = call(capsys, *arguments, *own)
    assert code == 0, err
    assert "2 + 1 fields" in text or "1 + 2 fields" in text
    assert "1 without" in text
    seen = {}
    for side in ("train", "val"):
        for pair in find_pairs(*(tmp_path / "pseudo" / side / n for n in ("images", "labels"))):
            seen[pair.image_path.stem] = tuple(
                map(tifffile.imread, (pair.image_path, pair.labels_path))
            )
    assert seen.keys() == truth.keys()
    for name, (image, mask) in truth.items():
        np.testing.assert_array_equal(seen[name][0], image)
        np.testing.assert_array_equal(seen[name][1], mask)
    code, _, err = call(capsys, *arguments, *own)
    assert (code, "must not exist" in err) == (2, True)
    other = ("jump", "masks", index, tmp_path / "other")
    code, _, err = call(capsys, *other, *own, "--kind", "cell")
    assert (code, "must have cell labels" in err) == (1, True)
    for wrong, message in ((("--kind", "dog"), "nuclei or cell"), (("--fields", 1), "at least 2")):
        code, _, err = call(capsys, *other, *wrong)
        assert (code, message in err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_verify(index, capsys, gallery, tmp_path):
    code, out, _ = call(capsys, "jump", "verify", index)
    assert code == 0
    assert "8 fields read" in out
    assert ", 0 bad" in out
    broken = tmp_path / "broken"
    shutil.copytree(gallery, broken)
    next(broken.rglob("*f02p01-ch3*")).write_bytes(b"")
    code, out, _ = call(capsys, "jump", "verify", index, "--store", broken, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["checked"] == 8
    assert len(report["bad"]) == 1
    code, out, _ = call(capsys, "jump", "verify", index, "--fields", 3, "--json")
    assert json.loads(out)["checked"] == 3


def test_pack_and_train_from_shards(index, capsys, tmp_path):
    shards = tmp_path / "shards"
    code, out, _ = call(capsys, "jump", "pack", index, shards, "--bits", 8, "--limit", 5)
    assert code == 0
    assert "5 fields" in out
    from dinov3.data.loaders import make_dataset

    dataset = make_dataset(dataset_str=f"JUMPS3MultiView:index={shards / 'fields.arrow'}:visits=2")
    assert len(dataset) == 10
    assert dataset[0][0].planes.dtype == np.uint8
    code, _, err = call(capsys, "jump", "pack", index, shards)
    assert (code, "must not exist" in err) == (2, True)


def test_pack_says_what_it_left_out(index, capsys, gallery, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(gallery, broken)
    next(broken.rglob("*f02p01-ch3*")).unlink()
    arguments = ("jump", "pack", index, tmp_path / "p", "--store", broken)
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "At most 2.0% of 8 fields may be unreadable, got 1" in err
    assert not (tmp_path / "p").exists()
    code, out, _ = call(capsys, *arguments, "--max-lost-share", 0.2)
    assert code == 0
    assert "7 fields" in out
    assert "left out: cpg0000-jump-pilot/source_4/2020_B/" in out


def test_plan(capsys):
    code, out, _ = call(capsys, "jump", "plan", "--mbps", 1000, "--step-seconds", 0.7)
    assert code == 0
    assert "take visits=2" in out
    code, out, _ = call(capsys, "jump", "plan", "--cores", 1)
    assert "held up by the cores" in out
    code, _, err = call(capsys, "jump", "plan", "--batch", 0)
    assert (code, "batch must be positive" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "none.arrow"], "An index must be a file"),
        (["verify", "none.arrow"], "An index must be a file"),
        (["index", "a/b/c/d/e", "-o", "x", "--store", "."], "PROJECT/SOURCE/BATCH/PLATE"),
        (["index", "none*", "-o", "x", "--store", "."], "must match plates"),
        (["index", "a", "-o", "x", "--store", "http://b"], "A store must be s3://bucket"),
        (["index", "a", "-o", "x", "--transport", "curl"], "one of obstore, boto3"),
        (["index", "a*", "-o", "x", "--store", "/nonexistent"], "A store must be a folder"),
    ],
)
def test_wrong_calls(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, "jump", *arguments)
    assert code in (1, 2)
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_wrong_choices(index, capsys):
    for arguments, message in (
        (["pack", index, "out", "--split", "HALF"], "ALL, TRAIN or VAL"),
        (["pack", index, "out", "--bits", 12], "one of 8, 16"),
        (["pack", index, "out", "--channels", "GFP"], "must be among"),
        (["verify", index, "--fields", 0], "must be at least 1, got 0"),
    ):
        code, _, err = call(capsys, "jump", *arguments)
        assert (code, message in err) == (2, True), err
