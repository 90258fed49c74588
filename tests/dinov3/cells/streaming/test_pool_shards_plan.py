"""Shared folders of entries, packed shards, and the arithmetic."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from s3_doubles import CHANNELS, write_index

from dinov3.cells.fields import make_field
from dinov3.cells.streaming import pool as pool_module
from dinov3.cells.streaming.discovery import JUMP_LITE, records_of_jump_lite
from dinov3.cells.streaming.index import FieldIndex, FieldRecord
from dinov3.cells.streaming.order import FieldOrder
from dinov3.cells.streaming.plan import Workload, make_plan
from dinov3.cells.streaming.pool import ByteCache, FieldPool, SharedFolder, shared_memory_folder
from dinov3.cells.streaming.shards import PackOptions, pack_fields
from dinov3.cells.streaming.threads import RequestThreads
from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions

# --- shared folders ---


def used_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.entry"))


def test_entries_of_a_cache_are_not_flushed(tmp_path, monkeypatch):
    """A flush costs more than the entry; its checksum finds what a power cut damaged."""

    def flush(handle):
        raise AssertionError("A cache must not wait for the disk.")

    monkeypatch.setattr(os, "fsync", flush)
    assert ByteCache(tmp_path, 1000).get("a", lambda: b"one") == b"one"
    assert used_bytes(tmp_path) == 16 + 3


def test_entries_come_back_and_are_made_once(tmp_path):
    cache = ByteCache(tmp_path, 1000)
    assert cache.get("a", lambda: b"one") == b"one"
    assert cache.get("a", lambda: b"other") == b"one"
    assert (cache.counts["misses"], cache.counts["hits"]) == (1, 1)
    cache.drop(cache.path("a"))
    assert cache.get("a", lambda: b"other") == b"other"


def test_the_least_recently_used_goes_first(tmp_path):
    cache = ByteCache(tmp_path, 250)
    for number, key in enumerate("abc"):
        cache.get(key, lambda: bytes(64))
        os.utime(cache.path(key), (number, number))
    assert cache.get("a", lambda: b"") == bytes(64), "a is used again"
    cache.get("d", lambda: bytes(64))
    assert [key for key in "abcd" if key in cache] == ["a", "c", "d"]
    assert used_bytes(tmp_path) == 240
    assert cache.counts["evictions"] == 1
    cache.get("big", lambda: bytes(900))
    assert "big" in cache, "one entry is kept, however large"


def test_retired_entries_go_before_older_ones(tmp_path):
    cache = ByteCache(tmp_path, 250)
    for key in "abc":
        cache.get(key, lambda: bytes(64))
    cache.retire("c")
    cache.retire("not there")
    cache.get("d", lambda: bytes(64))
    assert [key for key in "abcd" if key in cache] == ["a", "b", "d"]


def test_what_came_first_stays_on_request(tmp_path):
    cache = ByteCache(tmp_path, 250, keep_first=True)
    for key in "abcd":
        cache.get(key, lambda: bytes(64))
    assert [key for key in "abcd" if key in cache] == ["a", "b", "c"]
    assert cache.counts["evictions"] == 0


def test_a_lower_limit_holds_for_older_entries(tmp_path):
    cache = ByteCache(tmp_path, 1000, keep_first=True)
    for number in range(10):
        cache.get(str(number), lambda: bytes(64))
        os.utime(cache.path(str(number)), (number, number))
    cache = ByteCache(tmp_path, 250, keep_first=True)
    assert used_bytes(tmp_path) == 240
    assert [key for key in map(str, range(10)) if key in cache] == ["7", "8", "9"]
    cache.drop(cache.path("7"))
    cache.get("new", lambda: bytes(64))
    assert "new" in cache, "there is room again"
    cache.get("other", lambda: bytes(64))
    assert "other" not in cache


def test_what_killed_writers_left_behind_goes(tmp_path):
    cache = ByteCache(tmp_path, 1000, keep_first=True)
    for name, age in (("a.1.2.part", 7200), ("b.1.2.part", 1), ("c.lock", 7200)):
        (tmp_path / name).write_bytes(bytes(500))
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    cache = ByteCache(tmp_path, 1000, keep_first=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.1.2.part", "total-bytes"]
    del cache


def test_bytes_that_changed_on_the_disk_are_fetched_again(tmp_path):
    cache = ByteCache(tmp_path, 1000, keep_first=True)
    data = bytes(range(200))
    cache.get("a", lambda: data)
    content = bytearray(cache.path("a").read_bytes())
    content[90:120] = bytes(30)
    cache.path("a").write_bytes(content)
    assert cache.get("a", lambda: data) == data
    assert cache.get("a", lambda: b"no") == data
    assert (cache.counts["damaged"], cache.counts["misses"]) == (1, 2)
    cache.path("a").write_bytes(b"")
    assert cache.get("a", lambda: data) == data


def test_a_full_cache_is_not_looked_through(tmp_path, monkeypatch):
    cache = ByteCache(tmp_path, 200, keep_first=True)
    cache.get("a", lambda: bytes(64))
    monkeypatch.setattr(SharedFolder, "_entries", lambda self: pytest.fail("a scan"))
    for key in "bcdef":
        cache.get(key, lambda: bytes(64))
    assert "b" in cache
    assert "c" not in cache


def _fill(folder: Path, number: int, results) -> None:
    cache = ByteCache(folder, 10**6)
    made = []

    def make(key: str) -> bytes:
        made.append(key)
        time.sleep(0.002)
        return key.encode() * 100

    order = [str((n * 7 + number) % 40) for n in range(200)]
    right = all(cache.get(key, lambda key=key: make(key)) == key.encode() * 100 for key in order)
    results.put((right, made))


@pytest.mark.slow
def test_many_processes_make_each_entry_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_fill, args=(tmp_path, n, results)) for n in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(right for right, _ in found)
    made = [key for _, keys in found for key in keys]
    assert sorted(set(made)) == sorted({str(n) for n in range(40)})
    # A lock's file goes with its owner, so that once in a while two make the same.
    assert len(made) <= 44


def test_half_written_entries_and_dead_owners(tmp_path):
    cache = ByteCache(tmp_path, 1000)
    cache.path("a").with_suffix(".123.9.part").write_bytes(b"hal")
    cache.path("a").with_suffix(".lock").write_bytes(b"")
    assert "a" not in cache
    assert cache.get("a", lambda: b"whole") == b"whole"


def test_a_full_disk_costs_the_entry_only(tmp_path, monkeypatch, caplog):
    cache = ByteCache(tmp_path, 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cache.get("a", lambda: b"data") == b"data"
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_arrays_are_mapped_and_survive_their_eviction(tmp_path):
    pool = FieldPool(tmp_path, 20_000)
    arrays = {"a": np.arange(2000, dtype=np.uint16).reshape(2, 1000), "b": np.ones(3, np.float32)}
    made = pool.get("k", lambda: ({"name": "näme"}, arrays))
    facts, found = pool.get("k", lambda: pytest.fail("it is in the cache"))
    assert facts == made[0] == {"name": "näme"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0, 0] = 1
    for n in range(8):
        pool.get(str(n), lambda: ({}, {"a": np.zeros(4000, np.uint8)}))
    assert "k" not in pool
    np.testing.assert_array_equal(found["a"], arrays["a"])


def test_folders_of_killed_runs_are_removed(tmp_path):
    code = (
        "import sys, time\n"
        "from dinov3.cells.streaming.pool import shared_memory_folder\n"
        "print(shared_memory_folder(1000, sys.argv[1]), flush=True)\n"
        "time.sleep(900)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(pool_module.__file__).parents[3])}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(2)
    ]  # fmt: skip
    left, living = (Path(run.stdout.readline().strip()) for run in runs)
    runs[0].kill()
    runs[0].wait()
    old = tmp_path / "dinov3-fields-1-x"  # of an earlier version
    young = tmp_path / "dinov3-fields-2-x"  # is being made
    foreign = tmp_path / "something"
    for folder in (old, young, foreign):
        folder.mkdir()
    os.utime(old, (0, 0))
    # The number of a process says nothing: it may live in another container.
    living = living.rename(tmp_path / "dinov3-fields-999999999-y")
    made = shared_memory_folder(1000, str(tmp_path))
    assert made.parent == tmp_path
    assert not left.exists()
    assert not old.exists()
    assert living.exists()
    assert young.exists()
    assert foreign.exists()
    runs[1].kill()
    for run in runs:
        run.wait()
        run.stdout.close()


def test_shared_memory_without_room_is_not_used(caplog):
    made = shared_memory_folder(10**18)
    try:
        assert made.parent != Path("/dev/shm")
        assert "no room" in caplog.text
    finally:
        shutil.rmtree(made)


def test_wrong_limit(tmp_path):
    with pytest.raises(ValueError, match="must be positive"):
        SharedFolder(tmp_path, 0)


def test_threads_end_with_their_owner():
    threads = RequestThreads(2)
    assert [f.result() for f in [threads.submit(lambda n=n: n * n) for n in range(5)]] == [
        0, 1, 4, 9, 16,
    ]  # fmt: skip
    failing = threads.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing.result()
    running = list(threads._threads)
    assert len(running) == 2
    del threads
    for thread in running:
        thread.join(10)
        assert not thread.is_alive()
    assert all(t.name != "requests" or t not in running for t in threading.enumerate())


# --- packed shards ---


def opened(index: Path, **how) -> JUMPS3Dataset:
    dataset = JUMPS3Dataset(index=str(index), visits=2, spread=2, **how)
    dataset.set_options(StreamOptions(ahead=2))
    return dataset


@pytest.fixture
def source(bucket, index_file) -> JUMPS3Dataset:
    dataset = JUMPS3Dataset(index=str(index_file), visits=2, spread=2)
    dataset.set_options(StreamOptions(store=str(bucket[0]), ahead=2))
    return dataset


def whole(dataset: JUMPS3Dataset, count: int = 24):
    return [(dataset.record(n), dataset.read_field(n)) for n in range(count)]


def test_packed_fields_train_alike(source, tmp_path):
    """Same order, same pixels, from six files instead of 120."""
    names = []
    count = pack_fields(
        whole(source), tmp_path / "p", PackOptions(per_file=4), progress=names.append
    )
    assert count == 24
    assert names == [source.field_name(n) for n in range(24)]
    packed = opened(tmp_path / "p" / "fields.arrow")
    assert packed.channels == CHANNELS
    for position in range(60):
        one, two = source.load_field(position), packed.load_field(position)
        assert one.name == two.name
        np.testing.assert_array_equal(one.planes, two.planes)
        np.testing.assert_array_equal(one.low, two.low)
    assert len([p for p in (tmp_path / "p").rglob("*") if "/c/" in str(p) and p.is_file()]) == 6
    fewer = opened(tmp_path / "p" / "fields.arrow", channels="RNA+DNA")
    field = fewer.load_field(0)
    expected = source.load_field(0)
    assert field.channels == ("RNA", "DNA")
    np.testing.assert_array_equal(field.planes[0], expected.planes[CHANNELS.index("RNA")])


def test_other_programs_open_shards(source, tmp_path):
    import zarr

    pack_fields(whole(source, 5), tmp_path / "p", PackOptions())
    group = zarr.open_group(tmp_path / "p" / "fields.zarr", mode="r")
    array = group["5x64x64-uint16"]
    assert array.shape == (5, 5, 64, 64)
    np.testing.assert_array_equal(array[3], source.read_field(3).planes)


def test_bits_crop_and_scale(source, tmp_path):
    field = source.read_field(0)
    made = {}
    for name, options in {
        "8": PackOptions(bits=8), "crop": PackOptions(crop_px=32), "scale": PackOptions(scale=0.5),
    }.items():  # fmt: skip
        pack_fields(whole(source, 1), tmp_path / name, options)
        made[name] = opened(tmp_path / name / "fields.arrow").read_field(0).planes
    assert made["8"].dtype == np.uint8
    low, high = field.low[2], field.high[2]
    expected = np.clip((field.planes[2] - low) * (255 / (high - low)), 0, 255)
    np.testing.assert_allclose(made["8"][2], expected, atol=0.51)
    np.testing.assert_array_equal(made["crop"], field.planes[:, 16:48, 16:48])
    assert made["scale"].shape == (5, 32, 32)
    mean = field.planes[0, :2, :2].mean()
    assert abs(float(made["scale"][0, 0, 0]) - mean) <= 1


def test_fields_of_several_sizes(tmp_path):
    rng = np.random.default_rng(0)
    fields = []
    for n, size in enumerate((40, 48, 40)):
        planes = {c: rng.integers(1, 999, (size, 40)).astype(np.uint16) for c in "AB"}
        record = FieldRecord("p/s/b/P", "A01", str(n), dict.fromkeys("AB", "x"))
        fields.append((record, make_field(record.name, planes)))
    pack_fields(fields, tmp_path / "p", PackOptions())
    packed = opened(tmp_path / "p" / "fields.arrow")
    for n, (_, made) in enumerate(fields):
        np.testing.assert_array_equal(packed.read_field(n).planes, made.planes)


def test_packing_leaves_all_or_nothing(source, tmp_path):
    def broken():
        yield from whole(source, 3)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        pack_fields(broken(), tmp_path / "p", PackOptions())
    with pytest.raises(ValueError, match="must hold a field"):
        pack_fields([], tmp_path / "p", PackOptions())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "p").mkdir()
    with pytest.raises(FileExistsError, match="must not exist"):
        pack_fields(whole(source, 1), tmp_path / "p", PackOptions())
    with pytest.raises(ValueError, match=r"must fit into .* of 64 x 64 px, got 65"):
        pack_fields(whole(source, 1), tmp_path / "q", PackOptions(crop_px=65))


def test_a_lost_shard_is_a_lost_field(source, tmp_path, monkeypatch):
    pack_fields(whole(source), tmp_path / "p", PackOptions(per_file=4))
    shard = next(p for p in (tmp_path / "p").rglob("*") if "/c/2/" in str(p) and p.is_file())
    shard.unlink()
    monkeypatch.setattr("dinov3.data.datasets.jump_s3._FEWEST_LOST", 100)
    packed = opened(tmp_path / "p" / "fields.arrow")
    missing = {packed.field_name(n) for n in range(8, 12)}
    seen = {packed.load_field(position).name for position in range(48)}
    assert not seen & missing
    assert len(seen) == 20


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 12}, "one of 8, 16"), ({"crop_px": -1}, "0 or more"), ({"scale": 0}, "above 0"),
        ({"per_file": 0}, "at least 1"), ({"level": 0}, "1 to 22"),
    ],
)  # fmt: skip
def test_wrong_pack_options(how, message):
    with pytest.raises(ValueError, match=message):
        PackOptions(**how)


def test_an_index_of_shards_says_where_they_are(source, tmp_path):
    pack_fields(whole(source, 2), tmp_path / "p", PackOptions())
    index = FieldIndex(tmp_path / "p" / "fields.arrow")
    assert index.store == str(tmp_path / "p")
    (tmp_path / "p").rename(tmp_path / "moved")
    moved = JUMPS3Dataset(index=str(tmp_path / "moved" / "fields.arrow"), visits=1, spread=1)
    moved.set_options(StreamOptions(store=str(tmp_path / "moved")))
    assert moved.read_field(0).name == source.field_name(0)


# --- JUMP-Lite: an array a field, in Zarr of both versions ---


@pytest.fixture(scope="module")
def lite(bucket) -> dict[str, np.ndarray]:
    """Three fields below the bucket's folder, lossless (v3) and as JPEG XL (v2)."""
    import zarr
    from zarr.codecs import BloscCodec

    found = {}
    rng = np.random.default_rng(0)
    base = bucket[0] / "lite"
    for site in range(3):
        array = rng.integers(100, 4000, (5, 48, 40)).astype(np.uint16)
        name = f"source_2__B1__P{site}__A01__1"
        made = zarr.create_array(
            str(base / "zstd.zarr" / name), shape=array.shape, chunks=array.shape, dtype="uint16",
            compressors=BloscCodec(cname="zstd", shuffle="bitshuffle"),
        )  # fmt: skip
        made[...] = array
        found[name] = array
    numcodecs = pytest.importorskip("imagecodecs.numcodecs", reason="imagecodecs is not installed")
    numcodecs.register_codecs(verbose=False)
    for name, array in found.items():
        made = zarr.create_array(
            str(base / "jpegxl_lossy_hq.zarr" / name), shape=array.shape, chunks=array.shape,
            dtype="uint16", zarr_format=2, compressors=numcodecs.Jpegxl(level=99),
        )  # fmt: skip
        made[...] = array
    return found


def lite_index(path: Path, lite: dict[str, np.ndarray], codec: str) -> Path:
    rows = [
        dict(zip(("Metadata_Source", "Metadata_Batch", "Metadata_Plate", "Metadata_Well",
                  "Metadata_Site"), name.split("__"), strict=True))
        for name in lite
    ]  # fmt: skip
    with mock.patch.dict(JUMP_LITE, images="lite"):
        records = list(records_of_jump_lite(rows, codec))
    return write_index(path, records, "s3://bucket")


@pytest.mark.parametrize("codec", ["zstd", "jpegxl_lossy_hq"])
def test_jump_lite_over_a_faulty_network(lite, proxy, tmp_path, codec):
    proxy.share, proxy.kinds = 0.2, ("503", "reset", "truncate", "zeroed")
    dataset = JUMPS3Dataset(index=str(lite_index(tmp_path / "i", lite, codec)), visits=1, spread=1)
    dataset.set_options(StreamOptions(endpoint=proxy.url, backoff_max_s=0.05))
    for number, array in enumerate(lite.values()):
        found = dataset.read_field(number)
        assert found.channels == CHANNELS
        if codec == "zstd":
            np.testing.assert_array_equal(found.planes, array)
        else:
            assert np.abs(found.planes.astype(int) - array).mean() < 0.2 * array.mean()


def test_a_missing_field_of_jump_lite_is_lost(lite, rclone, tmp_path):
    index = lite_index(tmp_path / "i", {**lite, "source_2__B1__P9__A01__1": None}, "zstd")
    dataset = JUMPS3Dataset(index=str(index), visits=1, spread=1)
    dataset.set_options(StreamOptions(endpoint=rclone, ahead=1))
    seen = {dataset.load_field(position).name for position in range(4)}
    assert seen == {f"cpg0016-jump/source_2/B1/P{n}/A01/1" for n in range(3)}
    assert [line["field"] for line in lost_of(dataset)] == ["cpg0016-jump/source_2/B1/P9/A01/1"]


def lost_of(dataset: JUMPS3Dataset) -> list[dict]:
    return [json.loads(line) for line in dataset._lost_file().read_text().splitlines()]


def test_the_list_of_jump_lite():
    rows = [
        {"source": "source_2", "batch": "b", "plate": p, "well": "A01", "site": 2} for p in "PQ"
    ]
    found = list(records_of_jump_lite(rows, "zstd", "cpg0016-jump/source_2/b/Q"))
    assert [r.name for r in found] == ["cpg0016-jump/source_2/b/Q/A01/2"]
    assert found[0].keys["ER"].endswith("images_compressed/zstd.zarr/source_2__b__Q__A01__2#:2")
    assert len(list(records_of_jump_lite(rows, "zstd", "cpg0016-jump"))) == 2
    assert list(records_of_jump_lite(rows, "zstd", "cpg0016-jump/source_9")) == []
    with pytest.raises(ValueError, match="must be one of zstd"):
        list(records_of_jump_lite(rows, "png"))
    with pytest.raises(ValueError, match="must have the column site"):
        list(records_of_jump_lite([{"source": 1, "batch": 1, "plate": 1, "well": 1}], "zstd"))


# --- arithmetic ---


def test_plan_of_the_pilot():
    """64 samples in 0.7 s, fields of 12.35 MB: 1,129 MB/s without reuse, 71 MB/s at K = 16."""
    plan = make_plan(Workload(step_seconds=0.7, batch=64, cores=8, megabytes_per_s=200))
    by = {need.visits: need for need in plan.needs}
    assert by[1].megabytes_per_s == pytest.approx(64 / 0.7 * 12.35)
    assert by[16].megabytes_per_s == pytest.approx(70.6, abs=0.1)
    assert by[16].requests_per_s == pytest.approx(64 / 0.7 / 16 * 5)
    assert by[16].connections == pytest.approx(by[16].requests_per_s * 0.2)
    assert by[1].decode_cores == pytest.approx(64 / 0.7 * 0.030)
    assert by[1].augment_cores == by[64].augment_cores == pytest.approx(64 / 0.7 * 0.0161)
    assert plan.recommended == 8
    assert "the network" in plan.advice


def test_plan_names_the_bottleneck():
    few = make_plan(Workload(step_seconds=0.1, batch=64, cores=2, megabytes_per_s=5000))
    assert few.recommended is None
    assert "held up by the cores" in few.advice
    assert "photometrics=device" in few.advice
    slow = make_plan(Workload(step_seconds=0.1, batch=64, cores=64, megabytes_per_s=10))
    assert slow.recommended is None
    assert "held up by the network" in slow.advice
    many = make_plan(Workload(step_seconds=0.7, batch=64, cores=64, megabytes_per_s=50))
    assert many.recommended == 32
    assert "pixels repeat" in many.advice


@pytest.mark.parametrize(
    "wrong", [{"step_seconds": 0}, {"batch": -1}, {"cores": 0}, {"megabytes_per_s": 0},
              {"decode_ms": -1}],
)  # fmt: skip
def test_wrong_plans(wrong):
    with pytest.raises(ValueError, match="must be"):
        make_plan(
            Workload(**({"step_seconds": 1, "batch": 1, "cores": 1, "megabytes_per_s": 1} | wrong))
        )


def test_numbers_that_are_none_are_refused():
    for name in ("step_seconds", "megabytes_per_s", "decode_ms"):
        for value in (float("nan"), float("inf")):
            given = {"step_seconds": 0.7, "batch": 64, "cores": 8, "megabytes_per_s": 200.0}
            with pytest.raises(ValueError, match="must be"):
                make_plan(Workload(**(given | {name: value})))


def test_memory_is_that_of_the_data_set():
    plan = make_plan(Workload(step_seconds=0.7, batch=64, cores=8, megabytes_per_s=200))
    order = FieldOrder(10_000, visits=16, spread=8)
    need = next(need for need in plan.needs if need.visits == 16)
    assert need.pool_gb == pytest.approx(order.pool_fields(StreamOptions().ahead) * 11.7 / 1000)


# --- parts of packed files ---


def test_a_packed_field_is_read_alone(source, tmp_path):
    pack_fields(whole(source, 8), tmp_path / "p", PackOptions(per_file=8))
    file_bytes = sum(
        p.stat().st_size
        for p in (tmp_path / "p").rglob("*")
        if p.is_file() and p.name != "fields.arrow"
    )
    dataset = JUMPS3Dataset(index=str(tmp_path / "p" / "fields.arrow"), visits=1, spread=1)
    for number in range(4):
        name = dataset.field_name(number)
        assert dataset.read_field(number).name == name
    read = dataset._own.reader.store.counts["bytes"]
    assert 0.4 * file_bytes < read < 0.6 * file_bytes, (
        "4 of 8 fields, and the table of the file once"
    )


@pytest.mark.parametrize("transport", ["obstore", "boto3"])
def test_damaged_parts_are_fetched_again(source, tmp_path, transport, rclone_of):
    pack_fields(whole(source, 6), tmp_path / "bucket", PackOptions(per_file=3))
    proxy = rclone_of(tmp_path)
    proxy.share, proxy.kinds = 0.3, ("zeroed", "truncate", "503")
    dataset = JUMPS3Dataset(index=str(tmp_path / "bucket" / "fields.arrow"), visits=1, spread=1)
    dataset.set_options(
        StreamOptions(
            store="s3://bucket", endpoint=proxy.url, transport=transport, backoff_max_s=0.05
        )
    )
    for number in range(6):
        name = dataset.field_name(number)
        expected = next(i for i in range(len(source.rows)) if source.field_name(i) == name)
        np.testing.assert_array_equal(
            dataset.read_field(number).planes, source.read_field(expected).planes
        )
    assert proxy.counts["zeroed"] > 0


def test_fields_of_other_types_are_packed_apart(tmp_path):
    def fields():
        rng = np.random.default_rng(0)
        for number in range(4):
            planes = rng.integers(1, 900, (2, 16, 16)).astype(
                np.uint16 if number < 2 else np.float32
            )
            if number >= 2:
                planes /= 1000
            made = make_field(f"f{number}", {"a": planes[0], "b": planes[1]})
            yield FieldRecord("P", "A01", str(number), {"a": "x", "b": "y"}), made

    given = [made.planes for _, made in fields()]
    pack_fields(fields(), tmp_path / "p", PackOptions())
    dataset = JUMPS3Dataset(index=str(tmp_path / "p" / "fields.arrow"), visits=1, spread=1)
    for number in range(4):
        site = int(dataset.record(number).site)
        np.testing.assert_array_equal(dataset.read_field(number).planes, given[site])
