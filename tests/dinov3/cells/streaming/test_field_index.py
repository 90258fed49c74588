"""The index of fields: what it holds, how it is made, how much it costs to open."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
from s3_doubles import CHANNELS, field_keys, write_bucket, write_index

from dinov3.cells.streaming.discovery import (
    PlateFolder,
    find_plates,
    make_index,
    records_of_listing,
    records_of_table,
)
from dinov3.cells.streaming.index import (
    FieldIndex,
    FieldRecord,
    IndexWriter,
    RowRanges,
    side_of_plate,
    split_url,
)
from dinov3.cells.streaming.store_options import ObjectForbidden
from dinov3.cells.streaming.stores import ObjectStore, StoreOptions

PLATE = PlateFolder("p", "s", "b", "BR0", "", "p/s/images/b/images/BR0__x/")


def record(plate="p/s/b/BR0", well="A01", site="1", stem="x/r01c01-", size=0, channels="ABC"):
    keys = {c: f"{stem}ch{n}.tiff" for n, c in enumerate(channels)}
    return FieldRecord(plate, well, site, keys, size)


def written(tmp_path, *records: FieldRecord) -> FieldIndex:
    return FieldIndex(write_index(tmp_path / "i.arrow", list(records), "s3://b"))


def test_round_trip(bucket, index_file):
    index = FieldIndex(index_file)
    assert len(index) == len(bucket[1]) == 24
    found = {index[row].name: index[row] for row in range(len(index))}
    assert found == {r.name: r for r in bucket[1]}
    assert index.store == "s3://bucket"
    assert index.channels() == list(CHANNELS)
    assert pickle.loads(pickle.dumps(index))[3] == index[3]
    assert index.column("bytes").sum() == sum(r.size_bytes for r in bucket[1])


def test_plates_of_equal_names_stay_apart(tmp_path):
    """Channels of two batches were once mixed, because file names hold no plate."""
    one, two = record("p/s/b1/BR0", stem="b1/r-"), record("p/s/b2/BR0", stem="b2/r-")
    index = written(tmp_path, two, one)
    assert [index[row].name for row in (0, 1)] == ["p/s/b1/BR0/A01/1", "p/s/b2/BR0/A01/1"]
    assert all(key.startswith("b1/") for key in index[0].keys.values())


@pytest.mark.parametrize(
    "names",
    [
        ["r01c01f01p01-ch1sk1fk1fl1.tiff", "r01c01f01p01-ch5sk1fk1fl1.tiff"],
        ["P_K06_T0001F001L01A01Z01C01.tif", "P_K06_T0001F001L01A03Z01C02.tif"],
        ["HTS_A01_s1_w1ABCD-12.tif", "HTS_A01_s1_w2FFFF-99.tif"],
        ["same.tif", "same.tif"],
        ["only.tif"],
        ["a{line}b.tif", "c.tif"],
    ],
)
def test_names_of_every_microscope(tmp_path, names):
    keys = {f"C{n}": f"deep/folder/{name}" for n, name in enumerate(names)}
    index = written(tmp_path, FieldRecord("p", "A01", "1", keys))
    assert index[0].keys == keys


def test_names_without_a_rule_do_not_fill_the_header(tmp_path):
    """GUIDs give each field a layout of its own; beyond a number they stand in the rows."""
    rng = np.random.default_rng(0)
    records = []
    for n in range(5000):
        keys = {c: f"f/A01_s{n}_w{i}{rng.integers(1 << 60):x}.tif" for i, c in enumerate("AB")}
        records.append(FieldRecord("p", "A01", str(n), keys))
    index = written(tmp_path, *records)
    assert len(index.layouts) <= 4097
    assert [index[row].keys for row in range(5000)] == [r.keys for r in records]


def test_sites_are_sorted_as_numbers(tmp_path):
    index = written(tmp_path, *(record(site=str(s)) for s in (10, 9, 1)))
    assert [index[row].site for row in range(3)] == ["1", "9", "10"]


def test_selection(tmp_path):
    plates = [f"p/s/b/BR{n}" for n in range(40)]
    records = [record(p, well=w) for p in plates for w in ("A01", "A02", "A03")]
    records.append(record(plates[3], well="B01", channels="AB"))
    index = written(tmp_path, *records)
    val = [p for p in plates if side_of_plate(p) == "val"]
    assert 1 <= len(val) <= 12
    assert len(index.rows(split="val")) == 3 * len(val) + (plates[3] in val)
    assert len(index.rows(split="train")) + len(index.rows(split="val")) == len(index) == 121
    assert {index[index.rows(split="val")[n]].plate for n in range(3 * len(val))} == set(val)
    assert len(index.rows(channels=["C"])) == 120
    assert len(index.rows(channels=["D"])) == 0
    assert side_of_plate("p/s/b1/BR7") == side_of_plate("other/s2/b9/BR7"), "imaged again"


def test_ranges():
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1], bool)
    rows = RowRanges.of_mask(mask)
    assert [rows[n] for n in range(len(rows))] == list(np.flatnonzero(mask))
    for count in range(8):
        first = rows.first(count)
        assert [first[n] for n in range(len(first))] == list(np.flatnonzero(mask)[:count])
    assert len(RowRanges.of_mask(np.zeros(3, bool))) == 0
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            rows[outside]


def test_wrong_writing(tmp_path):
    writer = IndexWriter("s3://b")
    with pytest.raises(ValueError, match="must hold a field"):
        writer.write(tmp_path / "x")
    writer.add(record())
    with pytest.raises(ValueError, match="must appear once"):
        writer.add(record(stem="other/"))
    with pytest.raises(ValueError, match="must have a channel"):
        writer.add(FieldRecord("p", "A01", "2", {}))
    assert list(tmp_path.iterdir()) == []


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="jump index"):
        FieldIndex(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="make it again"):
        FieldIndex(tmp_path / "text")


OPENED = """
import sys, time
import pyarrow, numpy
from dinov3.cells.streaming.index import FieldIndex
def private():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous"):  # not pages of the file, which all processes share
            return int(line.split()[1]) / 1024
before, begun = private(), time.perf_counter()
index = FieldIndex(sys.argv[1])
rows = index.rows(split="train", channels=["A", "B", "C"])
took = time.perf_counter() - begun
for n in range(0, len(rows), len(rows) // 1000):
    index[rows[n]].keys
print(len(index), took, private() - before)
"""


@pytest.mark.slow
def test_half_a_million_rows_open_at_once(tmp_path):
    writer = IndexWriter("s3://b")
    for plate in range(150):
        for n in range(3386):
            writer.add(
                record(f"p/s/b/P{plate}", f"W{n // 9}", str(n % 9), f"p/{plate}/r{n:04d}p01-")
            )
    writer.write(tmp_path / "big.arrow")
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(tmp_path / "big.arrow")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    count, seconds, megabytes = map(float, done.stdout.split())
    print(f"{count:.0f} rows: opened and chosen in {seconds:.2f} s, {megabytes:.1f} MB of its own")
    assert count == 507_900
    assert 8 * megabytes < 320, (
        "private memory of eight workers, some 27 MB each for any number of rows"
    )


# --- tables and listings ---


def test_urls():
    assert split_url("s3://b/k/x.tiff") == ("b", "k/x.tiff")
    assert split_url("k/x.tiff") == ("", "k/x.tiff")


def table_row(**changes):
    row = {"Metadata_Plate": 1053597776, "Metadata_Well": "A01", "Metadata_Site": 3.0}
    for n, channel in enumerate(CHANNELS):
        row[f"FileName_Orig{channel}"] = f"f{n}.tiff"
        row[f"PathName_Orig{channel}"] = "/home/lab/2020/BR0__x/Images"
    return row | changes


def test_table_with_old_paths():
    (found,) = records_of_table([table_row()], PLATE)
    assert (found.plate, found.well, found.site) == ("p/s/b/BR0", "A01", "3")
    assert found.keys["DNA"] == "p/s/images/b/images/BR0__x/Images/f1.tiff"
    for path, expected in (("", "Images/f1.tiff"), ("C:\\lab\\BR0__x\\TP1", "TP1/f1.tiff")):
        (found,) = records_of_table([table_row(PathName_OrigDNA=path)], PLATE)
        assert found.keys["DNA"] == f"p/s/images/b/images/BR0__x/{expected}"


def test_table_with_urls_of_files_and_of_folders():
    changes = {f"URL_Orig{c}": f"s3://bucket/k/f{n}.tiff" for n, c in enumerate(CHANNELS)}
    (found,) = records_of_table([table_row(**changes)], PLATE)
    assert found.keys["RNA"] == "k/f4.tiff"
    changes = {f"URL_Orig{c}": "s3://bucket/other/" for c in CHANNELS}
    (found,) = records_of_table([table_row(**changes)], PLATE)
    assert found.keys["RNA"] == "other/f4.tiff"


@pytest.mark.parametrize("blank", [None, "", float("nan")])
def test_a_missing_channel_is_missing(blank):
    (found,) = records_of_table([table_row(FileName_OrigDNA=blank)], PLATE)
    assert list(found.keys) == ["AGP", "ER", "Mito", "RNA"]
    assert list(records_of_table([dict.fromkeys(table_row(), blank)], PLATE)) == []


def test_tables_that_do_not_say_enough():
    with pytest.raises(ValueError, match="must have FileName_Orig columns"):
        list(records_of_table([{"a": 1}], PLATE))
    nowhere = PlateFolder("p", "s", "b", "BR0", "t/")
    with pytest.raises(ValueError, match=r"must say where f0\.tiff is"):
        list(records_of_table([table_row()], nowhere))


HARMONY = {"ch1": "Mito", "ch5": "DNA"}


def test_listing_by_names():
    keys = [(f"i/r02c11f03p01-ch{n}sk1fk1fl1.tiff", 10) for n in (1, 5, 6)]
    keys += [("i/r02c11f03p02-ch1sk1fk1fl1.tiff", 7), ("i/Index.idx.xml", 3)]
    first, second = records_of_listing(keys, PLATE, HARMONY)
    assert (first.well, first.site, first.size_bytes) == ("B11", "3", 20)
    assert first.keys == {"DNA": keys[1][0], "Mito": keys[0][0]}
    assert (second.site, second.keys) == ("3z2", {"Mito": keys[3][0]})
    keys = [("i/BR0_K06_T0001F002L01A01Z01C01.tif", 1), ("i/BR0_K06_T0001F002L01A03Z01C02.tif", 1)]
    (found,) = records_of_listing(keys, PLATE, {"C01": "DNA", "C02": "ER"})
    assert (found.well, found.site, list(found.keys)) == ("K06", "2", ["DNA", "ER"])
    keys = [("i/HTS_A01_s4_w1ABC.tif", 1), ("i/HTS_A01_s4_w2DEF.tif", 1)]
    (found,) = records_of_listing(keys, PLATE, {"w1": "DNA", "w2": "ER"})
    assert (found.well, found.site) == ("A01", "4")


def test_listings_that_cannot_be_right():
    with pytest.raises(ValueError, match="files of known names"):
        list(records_of_listing([("i/x.tif", 1)], PLATE, HARMONY))
    twice = [("i/a/r01c01f01p01-ch1sk1.tiff", 1), ("i/b/r01c01f01p01-ch1sk1.tiff", 1)]
    with pytest.raises(ValueError, match="one file a channel"):
        list(records_of_listing(twice, PLATE, HARMONY))


@pytest.fixture
def gallery(tmp_path):
    """A folder laid out as the gallery, with tables of several forms."""
    root = tmp_path / "gallery"
    records = write_bucket(root, plates=3, per_plate=4)
    base = root / "cpg0000/source_4/workspace/load_data_csv/batch"
    for p in range(3):
        folder = base / f"BR{p}"
        folder.mkdir(parents=True)
        header = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
        header += [f"FileName_Orig{c}" for c in CHANNELS]
        lines = [",".join(header)]
        for f in range(4):
            names = [key.rpartition("/")[2] for key in field_keys(f"BR{p}", f).values()]
            lines.append(",".join([f"BR{p}", "A01", str(f + 1), *names]))
        text = "\n".join(lines) + "\n"
        if p == 0:
            (folder / "load_data.csv").write_text(text)
        elif p == 1:
            (folder / "load_data.csv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            import pyarrow.csv
            import pyarrow.parquet

            table = pyarrow.csv.read_csv(io.BytesIO(text.encode()))
            pyarrow.parquet.write_table(table, folder / "load_data_with_illum.parquet")
    return ObjectStore(StoreOptions(str(root))), records


def test_plates_are_found_by_patterns(gallery):
    store, _ = gallery
    found = find_plates(store, "cpg0000/source_4/batch/BR*")
    assert [p.plate for p in found] == ["BR0", "BR1", "BR2"]
    assert found[0].images == "cpg0000/source_4/images/batch/images/BR0__2020/"
    assert find_plates(store, "cpg*") == found
    assert [p.plate for p in find_plates(store, "*/*/*/BR[12]")] == ["BR1", "BR2"]
    for wrong, message in (
        ("cpg0000/source_4/batch/XX*", "choose among these plates: BR0, BR1, BR2"),
        ("cpg0000/source_9*", "choose among these sources: source_4"),
        ("a/b/c/d/e", "PROJECT/SOURCE/BATCH/PLATE"),
    ):
        with pytest.raises(ValueError, match=message):
            find_plates(store, wrong)


def test_tables_and_listing_give_the_same(gallery, tmp_path):
    store, records = gallery
    plates = find_plates(store, "cpg0000")
    done = []
    make_index(store, plates, tmp_path / "t.arrow", progress=lambda *a: done.append(a))
    assert sorted(done) == [(p.name, 4) for p in plates]
    channels = {"source_4": {f"ch{n + 1}": c for n, c in enumerate(CHANNELS)}}
    make_index(store, plates, tmp_path / "l.arrow", kind="listing", channels=channels)
    tables, listing = FieldIndex(tmp_path / "t.arrow"), FieldIndex(tmp_path / "l.arrow")
    expected = {r.name: r.keys for r in records}
    for index in (tables, listing):
        assert {index[n].name: index[n].keys for n in range(len(index))} == expected
    assert listing.column("bytes").sum() == sum(r.size_bytes for r in records)
    assert sorted(p.name for p in tmp_path.glob("*.plates")) == []


def test_a_table_that_may_not_be_read_stops_the_index(gallery, tmp_path, monkeypatch):
    """A listing in its place would name other channels, perhaps, in silence."""
    store, _ = gallery
    plates = find_plates(store, "cpg0000")

    def get(self, key, accept=None):
        raise ObjectForbidden(f"{key} must be public, got 403: check key and bucket")

    monkeypatch.setattr(ObjectStore, "get", get)
    with pytest.raises(ObjectForbidden, match="must be public, got 403"):
        make_index(store, plates, tmp_path / "x.arrow", threads=1)


def test_an_interrupted_index_continues(gallery, tmp_path, monkeypatch):
    store, _ = gallery
    plates = find_plates(store, "cpg0000")
    reads = []
    honest = ObjectStore.get

    def get(self, key, accept=None):
        reads.append(key)
        if "BR2" in key and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        return honest(self, key, accept)

    monkeypatch.setattr(ObjectStore, "get", get)
    with pytest.raises(KeyboardInterrupt):
        make_index(store, plates, tmp_path / "x.arrow", threads=1)
    assert not (tmp_path / "x.arrow").exists()
    (tmp_path / "again").touch()
    reads.clear()
    make_index(store, plates, tmp_path / "x.arrow", threads=1)
    assert [key for key in reads if "BR2" in key] == reads, "two plates were kept"
    assert len(FieldIndex(tmp_path / "x.arrow")) == 12


def test_what_an_index_needs(gallery, tmp_path):
    store, _ = gallery
    plates = find_plates(store, "cpg0000")
    for how, message in (
        ({"kind": "guess"}, "must be one of auto, tables, listing"),
        ({"kind": "listing"}, "must know the channels, got no row for source_4"),
    ):
        with pytest.raises(ValueError, match=message):
            make_index(store, plates, tmp_path / "x", **how)
    bare = [PlateFolder("p", "s", "b", "BR0")]
    with pytest.raises(ValueError, match="must have a load_data table"):
        make_index(store, bare, tmp_path / "x", kind="tables")
