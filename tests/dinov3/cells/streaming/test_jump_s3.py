"""Fields over a network: every sample right, in the same order, whatever goes wrong on the way."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pickle
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_doubles import CHANNELS, KINDS, plane, tiff, write_bucket, write_index
from waiting import wait_until

from dinov3.cells.streaming.stores import StoreUnreachable
from dinov3.data.datasets.jump_s3 import JUMPS3Dataset, StreamOptions, TooManyLost
from dinov3.data.loaders import SamplerType, make_data_loader, make_dataset

STREAM_KEYS = {option.name for option in fields(StreamOptions)}
QUICK = {"timeout_s": 60.0, "backoff_max_s": 0.05, "outage_s": 600.0, "threads": 8, "ahead": 6}


def summary(field) -> tuple[str, tuple[int, ...]]:
    """What a transform sees of a field: its name and one pixel of each channel."""
    return field.name, tuple(int(p[3, 5]) for p in field.planes)


def opened(index: Path, store: str | Path, tmp: Path | None = None, **how) -> JUMPS3Dataset:
    options = {**QUICK, **{k: how.pop(k) for k in list(how) if k in STREAM_KEYS}}
    dataset = JUMPS3Dataset(
        index=str(index), transform=summary, target_transform=_none,
        **({"visits": 4, "spread": 2} | how),
    )  # fmt: skip
    dataset.set_options(StreamOptions(store=str(store), **options), report_folder=tmp, batch_size=4)
    return dataset


def _none(_):
    return ()


def collate(samples: list) -> list:
    return [image for image, _ in samples]


def drawn(dataset, batches: int, *, workers: int = 0, advance: int = 0) -> list:
    loader = make_data_loader(
        dataset=dataset, batch_size=4, num_workers=workers, sampler_type=SamplerType.INFINITE,
        sampler_advance=4 * advance, collate_fn=collate,
    )  # fmt: skip
    batches_of = iter(loader)
    return [sample for _ in range(batches) for sample in next(batches_of)]


@pytest.fixture(scope="module")
def truth(bucket, index_file):
    """Samples of the folder itself, one after the other."""
    dataset = opened(index_file, bucket[0])
    found = [dataset[position][0] for position in range(120)]
    dataset._pool.close()
    return found


def test_samples_are_the_fields_of_the_order(bucket, index_file, truth):
    dataset = opened(index_file, bucket[0])
    assert len(dataset) == 24 * 4
    assert dataset.channels == CHANNELS
    records = {r.name: r for r in bucket[1]}
    for position, (name, pixels) in enumerate(truth):
        assert name == dataset.get_sample_name(position)
        p, f = int(records[name].plate[-1]), int(records[name].site) - 1
        assert pixels == tuple(int(plane(1000 * p + 10 * f + c)[3, 5]) for c in range(5))
    names = [name for name, _ in truth[:96]]
    assert sorted(names) == sorted(4 * list(records)), "one pass: each field, each visit"


def test_workers_change_nothing(bucket, index_file, truth):
    assert drawn(opened(index_file, bucket[0]), 12, workers=2) == truth[:48]


@pytest.mark.parametrize(("advance", "workers"), [(5, 0), (25, 0), (25, 2)])
def test_resumption_is_exact(bucket, index_file, truth, advance, workers):
    """In the middle of a field's visits, and in the second pass."""
    dataset = opened(index_file, bucket[0])
    assert drawn(dataset, 4, workers=workers, advance=advance) == truth[4 * advance :][:16]


@pytest.mark.parametrize("transport", ["obstore", "boto3"])
@pytest.mark.parametrize(
    ("kinds", "patience"),
    [
        # Answered at once: no time limit, and the usual number of retries.
        (tuple(kind for kind in KINDS if kind != "slow"), {"timeout_s": 60.0}),
        # A silence needs a time limit; on a busy machine honest answers are late, too, and again.
        (KINDS, {"timeout_s": 1.0, "retries": 10_000}),
    ],
    ids=["answered", "silent"],
)
def test_a_tenth_of_all_requests_fails_and_nothing_is_lost(
    proxy, index_file, truth, tmp_path, transport, kinds, patience
):
    pytest.importorskip(transport)
    proxy.share, proxy.kinds = 0.10, kinds
    dataset = opened(
        index_file, "", tmp_path, endpoint=proxy.url, transport=transport, threads=16, **patience
    )
    assert drawn(dataset, 30) == truth
    failed = sum(n for kind, n in proxy.counts.items() if kind != "requests")
    assert failed >= 5, "the faults must have happened"
    assert not (tmp_path / "lost.jsonl").exists()


def test_every_field_is_fetched_once_by_all_workers_together(proxy, index_file):
    dataset = opened(index_file, "", endpoint=proxy.url, pool_gb=0.01)
    drawn(dataset, 20, workers=2)
    fetched = {key: n for key, n in proxy.attempts.items() if key.endswith(".tiff")}
    # Four fields are also read to learn their size.
    assert sorted(fetched.values())[:-20] == [1] * (len(fetched) - 20)
    assert max(fetched.values()) <= 2


def test_the_pool_holds_what_the_order_needs(tmp_path):
    """With the memory it asks for, no field of a pass is fetched twice once the pass is under way."""
    root = tmp_path / "many"
    index = write_index(tmp_path / "i", write_bucket(root, plates=10, per_plate=9), str(root))
    dataset = opened(index, root, visits=4, spread=2, ahead=30)
    for position in range(4 * 40):
        dataset.load_field(position)
        # Fetching is as far ahead as it may be: what it brought waits longest for its first use.
        concurrent.futures.wait(list(dataset._own.running.values()))
    planned = {dataset.order.visit(position).field for position in range(4 * 70)}
    assert dataset._own.reader.counts["fields"] == len(planned)


def test_passes_meet_without_fetching_twice(tmp_path):
    """But for fields whose visits lie at both ends of a pass."""
    root = tmp_path / "many"
    index = write_index(tmp_path / "i", write_bucket(root, plates=10, per_plate=9), str(root))
    dataset = opened(index, root, visits=4, spread=2, ahead=6)
    for position in range(4 * 90 * 2):
        dataset.load_field(position)
    wrapped = (4 - 1) * 2
    assert dataset._own.reader.counts["fields"] <= 2 * (90 + 2 * wrapped) + 6 + 1


def test_the_pool_has_room_for_the_largest_fields(tmp_path):
    root = tmp_path / "mixed"
    records = write_bucket(root, plates=2, per_plate=9)
    for record in records[9:]:
        for number, key in enumerate(record.keys.values()):
            (root / key).write_bytes(tiff(plane(number, size=128)))
    dataset = opened(write_index(tmp_path / "i", records, str(root)), root, ahead=2)
    dataset.prepare()
    assert dataset._field_bytes() > 5 * 128 * 128 * 2
    assert dataset._pool.limit_bytes >= dataset.order.fields_in_use * 5 * 128 * 128 * 2


def test_lost_fields_of_another_index_are_not_lost_here(bucket, index_file, tmp_path):
    other = {"number": 0, "field": "another/plate", "reason": "x"}
    (tmp_path / "lost.jsonl").write_text(json.dumps(other) + "\n")
    dataset = opened(index_file, bucket[0], tmp_path)
    names = [dataset.load_field(position).name for position in range(20)]
    assert names == [dataset.get_sample_name(position) for position in range(20)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "must begin as a TIFF"),
        (tiff(np.full((64, 64), np.nan, np.float32)), "must have"),
    ],
)
def test_other_contents_are_lost_fields_not_ended_runs(
    bucket, index_file, tmp_path, content, reason
):
    root = tmp_path / "broken"
    shutil.copytree(bucket[0], root)
    dataset = opened(index_file, root, tmp_path, max_lost_share=1.0)
    name = dataset.get_sample_name(0)
    record = next(r for r in bucket[1] if r.name == name)
    (root / record.keys["ER"]).write_bytes(content)
    assert dataset.load_field(0).name != name
    assert reason in (tmp_path / "lost.jsonl").read_text()
    assert dataset.counts()["stream/lost"] == 1


def test_a_field_that_several_workers_lost_counts_once(bucket, index_file, tmp_path):
    dataset = opened(index_file, bucket[0], tmp_path)
    dataset.prepare()
    name = dataset.field_name(3)
    line = json.dumps({"number": 3, "field": name, "reason": "x"}) + "\n"
    (tmp_path / "lost.jsonl").write_text(line * 2)
    assert dataset.counts()["stream/lost"] == 1


def test_fetching_runs_ahead(proxy, index_file):
    """While the first sample is looked at, the fields of the next steps arrive."""
    dataset = opened(index_file, "", endpoint=proxy.url, ahead=4)
    assert dataset[0]
    wanted = {v.field for step in range(5) for v in dataset.order.of_step(step, 0)}

    def there() -> set[int]:
        return {n for n in range(24) if dataset.index[dataset.rows[n]].name in dataset._pool}

    wait_until(lambda: there() >= wanted)
    assert there() == wanted


def test_a_small_pool_costs_requests_not_samples(proxy, index_file, truth):
    dataset = opened(index_file, "", endpoint=proxy.url, pool_gb=1e-4, ahead=1)
    assert drawn(dataset, 20) == truth[:80]
    assert dataset._pool.counts["evictions"] > 0
    assert sum(p.stat().st_size for p in dataset._pool.folder.glob("*.entry")) <= 1e5
    assert proxy.counts["requests"] > 5 * 24


def test_disk_cache(proxy, index_file, truth, tmp_path, monkeypatch):
    how = {"endpoint": proxy.url, "disk_cache": str(tmp_path / "cache")}
    assert drawn(opened(index_file, "", **how), 24) == truth[:96]
    first = proxy.counts["requests"]
    again = opened(index_file, "", **how)
    assert drawn(again, 24) == truth[:96]
    assert proxy.counts["requests"] == first, "all came from the disk"
    # A file that a failing disk has changed is fetched again.
    entry = next((tmp_path / "cache").glob("*.entry"))
    entry.write_bytes(b"II*\0" + bytes(100))
    assert drawn(opened(index_file, "", **how), 24) == truth[:96]
    assert proxy.counts["requests"] == first + 1
    small = opened(index_file, "", **how | {"disk_cache": str(tmp_path / "s")}, disk_cache_gb=2e-5)
    assert drawn(small, 24) == truth[:96]
    kept = sum(p.stat().st_size for p in (tmp_path / "s").glob("*.entry"))
    assert 0 < kept <= 2e4


# --- what is lost ---


def broken_bucket(bucket, tmp_path: Path, numbers: list[int], how: str) -> tuple[Path, list[str]]:
    """A copy of the store in which some fields lack a sound channel."""
    root = tmp_path / "broken"
    shutil.copytree(bucket[0], root)
    names = []
    for number in numbers:
        record = bucket[1][number]
        names.append(record.name)
        path = root / record.keys["ER"]
        if how == "missing":
            path.unlink()
        elif how == "empty":
            path.write_bytes(b"")
        elif how == "corrupt":
            path.write_bytes(path.read_bytes()[:500])
        elif how == "zeros":
            path.write_bytes(tiff(np.zeros((64, 64), np.uint16)))
        elif how == "size":
            path.write_bytes(tiff(plane(1, 32)))
        elif how == "stack":
            path.write_bytes(tiff(np.stack([plane(1), plane(2)])))
    return root, names


@pytest.mark.parametrize("how", ["missing", "empty", "corrupt", "zeros", "size", "stack"])
def test_a_lost_field_is_recorded_and_replaced(bucket, index_file, truth, tmp_path, how):
    root, names = broken_bucket(bucket, tmp_path, [4, 13], how)
    found = {}
    for workers in (0, 2) if how == "missing" else (0,):
        report = tmp_path / str(workers)
        dataset = opened(index_file, root, report)
        found[workers] = drawn(dataset, 24, workers=workers)
        lines = [json.loads(line) for line in (report / "lost.jsonl").read_text().splitlines()]
        assert {line["field"] for line in lines} == set(names)
        assert all(line["reason"] for line in lines)
    assert found[0] == found.get(2, found[0]), "the same stand-ins, whoever lost the field"
    for (name, pixels), (planned, right) in zip(found[0], truth, strict=False):
        if planned in names:
            assert name not in names
            assert min(pixels) >= 100, "never a black image"
        else:
            assert (name, pixels) == (planned, right)
    # After a resumption, what was lost stays lost, also if it was repaired.
    resumed = opened(index_file, bucket[0], tmp_path / "0")
    assert drawn(resumed, 4, advance=12) == found[0][48:64]


@pytest.mark.parametrize("workers", [0, 2])
def test_visits_before_a_loss_stay_whole_after_a_resumption(
    bucket, index_file, truth, tmp_path, workers
):
    """A run loses a field in its second pass, is killed, and continues from the first."""
    root, (name,) = broken_bucket(bucket, tmp_path, [4], "missing")
    first = opened(index_file, bucket[0], tmp_path)
    whole = drawn(first, 24)
    second = opened(index_file, root, tmp_path)
    second.load_field(96)  # the pool of this run is another one
    assert whole == truth[:96]
    drawn(second, 24, advance=24)
    assert name in (tmp_path / "lost.jsonl").read_text()
    resumed = opened(index_file, bucket[0], tmp_path)
    found = drawn(resumed, 30, workers=workers)
    assert found[:96] == truth[:96]
    assert name not in [name for name, _ in found[96:]]


def test_a_list_of_losses_without_positions_is_of_the_whole_run(bucket, index_file, tmp_path):
    dataset = opened(index_file, bucket[0], tmp_path)
    name = dataset.get_sample_name(0)
    line = {"number": dataset.order.visit(0).field, "field": name, "reason": "x"}
    (tmp_path / "lost.jsonl").write_text(json.dumps(line) + "\n")
    assert dataset.load_field(0).name != name


def test_too_many_lost_stop_the_run(bucket, index_file, tmp_path):
    root, _ = broken_bucket(bucket, tmp_path, list(range(0, 24, 2)), "missing")
    dataset = opened(index_file, root, tmp_path)
    with pytest.raises(
        TooManyLost, match=r"At most 2.0% of the fields may be lost, got 10 of"
    ) as e:
        drawn(dataset, 24)
    assert "must be in" in str(e.value)
    assert "streaming.max_lost_share" in str(e.value)
    patient = opened(index_file, root, tmp_path / "patient", max_lost_share=0.9)
    assert len(drawn(patient, 24)) == 96


def test_an_empty_store_stops_the_run(index_file, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TooManyLost, match="must be in"):
        drawn(opened(index_file, tmp_path / "nothing", tmp_path), 1)


def test_a_dead_server_stops_the_run(proxy, index_file):
    proxy.down = True
    dataset = opened(index_file, "", endpoint=proxy.url, outage_s=0.2, retries=1)
    with pytest.raises(StoreUnreachable, match="must answer"):
        dataset[0]


def test_counts_of_all_workers(proxy, index_file, monkeypatch):
    monkeypatch.setattr("dinov3.data.datasets.jump_s3._REPORT_EVERY_S", 0.0)
    proxy.share, proxy.kinds = 0.2, ("503",)
    dataset = opened(index_file, "", endpoint=proxy.url)
    drawn(dataset, 24)
    counts = dataset.counts()
    assert counts["stream/requests"] >= 5 * 24
    assert counts["stream/retries.503"] > 0
    assert counts["stream/bytes"] > 5 * 24 * 8000
    assert counts["stream/lost"] == 0
    # The pool is filled ahead, so that nearly every sample finds its field.
    assert counts["stream/pool_hit_rate"] > 0.7


# --- selection, options, wrong input ---


def test_switching_to_a_local_copy_is_one_option(proxy, bucket, index_file, truth):
    over = drawn(opened(index_file, "", endpoint=proxy.url), 6)
    local = drawn(opened(index_file, bucket[0]), 6, advance=6)
    assert over + local == truth[:48]


def test_processes_share_no_field(bucket, index_file, monkeypatch):
    monkeypatch.setattr("dinov3.distributed.get_world_size", lambda group=None: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr("dinov3.distributed.get_rank", lambda group=None, rank=rank: rank)
        monkeypatch.setattr("dinov3.data.samplers.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("dinov3.data.samplers.get_world_size", lambda: 2)
        seen.append([name for name, _ in drawn(opened(index_file, bucket[0]), 12)])
    assert sorted(set(seen[0]) | set(seen[1])) == sorted(r.name for r in bucket[1])
    assert not set(seen[0]) & set(seen[1])


def test_string_options(bucket, index_file):
    text = f"JUMPS3MultiView:index={index_file}:channels=DNA+ER:visits=2:spread=3:limit=5"
    dataset = make_dataset(dataset_str=text)
    dataset.set_options(StreamOptions(store=str(bucket[0])))
    assert (len(dataset), dataset.order.spread) == (10, 3)
    field = dataset[0][0]
    assert field.channels == ("DNA", "ER")
    narrow = make_dataset(
        dataset_str=f"{text}:percentile_low=20:percentile_high=80:pixel_size_um=0.6"
    )
    narrow.set_options(StreamOptions(store=str(bucket[0])))
    other = narrow[0][0]
    assert other.pixel_size_um == 0.6
    assert (other.low > field.low).all()
    assert (other.high < field.high).all()


def test_split_and_seed(bucket, tmp_path):
    root = tmp_path / "many"
    records = write_bucket(root, plates=30, per_plate=1)
    index = write_index(tmp_path / "i", records, str(root))
    sides = {}
    for split in ("TRAIN", "VAL", "ALL"):
        dataset = JUMPS3Dataset(index=str(index), split=split)
        sides[split] = {dataset.get_sample_name(p) for p in range(len(dataset))}
    assert sides["TRAIN"] | sides["VAL"] == sides["ALL"]
    assert not sides["TRAIN"] & sides["VAL"]
    assert sides["VAL"]
    names = []
    for seed in (0, 1):
        dataset.set_options(StreamOptions(), seed=seed)
        names.append([dataset.get_sample_name(p) for p in range(50)])
    assert names[0] != names[1]


def test_missing_channels(bucket, tmp_path):
    records = list(bucket[1])
    keys = {c: k for c, k in records[0].keys.items() if c != "ER"}
    records[0] = type(records[0])(records[0].plate, records[0].well, records[0].site, keys)
    index = write_index(tmp_path / "i", records, str(bucket[0]))
    assert len(JUMPS3Dataset(index=str(index), visits=1)) == 23
    assert len(JUMPS3Dataset(index=str(index), visits=1, channels="DNA")) == 24
    with pytest.raises(ValueError, match="1 without"):
        JUMPS3Dataset(index=str(index), missing="error")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"channels": "DNA+GFP"}, "must be among AGP, DNA, ER, Mito, RNA, got GFP"),
        ({"missing": "allow"}, "one of error, skip"),
        ({"percentile_low": 99, "percentile_high": 1}, "low < high"),
        ({"visits": 0}, "`visits` must be at least 1"),
        ({"limit": 0}, "must hold fields"),
        ({"index": "nothing.arrow"}, "jump index"),
    ],
)
def test_wrong_data_sets(index_file, how, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        JUMPS3Dataset(**({"index": str(index_file)} | how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"threads": 0}, "streaming.threads` must be at least 1"),
        ({"disk_cache": "x", "disk_cache_gb": 0}, "disk_cache_gb` must be positive"),
    ],
)
def test_wrong_options(how, message):
    with pytest.raises(ValueError, match=message):
        StreamOptions(**how)


def test_big_batches_warn(index_file, caplog):
    dataset = JUMPS3Dataset(index=str(index_file), visits=2, spread=2)
    dataset.set_options(StreamOptions(), batch_size=4)
    assert not caplog.records
    dataset.set_options(StreamOptions(), batch_size=5)
    assert "more than once" in caplog.text


def test_the_pool_goes_with_its_data_set(bucket, index_file):
    dataset = opened(index_file, bucket[0])
    assert dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    folder = dataset._pool.folder
    assert copy._pool.folder == folder
    assert copy[0] == dataset[0]
    assert str(os.getpid()) in folder.name
    del copy
    assert folder.is_dir(), "a worker's copy leaves it"
    del dataset
    wait_until(lambda: not folder.exists())  # what is being fetched ends first


def test_orders_of_their_own_need_an_endless_sampler(bucket, index_file):
    with pytest.raises(ValueError, match="infinite sampler"):
        make_data_loader(
            dataset=opened(index_file, bucket[0]), batch_size=2, num_workers=0,
            sampler_type=SamplerType.EPOCH,
        )  # fmt: skip


def test_real_fields(data_dir, tmp_path):
    """16-bit planes of three sites, through the same path as the bucket's."""
    from dinov3.cells.streaming.index import FieldRecord
    from dinov3.data.datasets.jump_cellpainting import JUMPCellPaintingMultiView

    root = data_dir / "cellpainting"
    local = JUMPCellPaintingMultiView(root=str(root), channels="DNA+ER", missing="skip")
    records = [
        FieldRecord(
            f"plate{n}", "", "1", {c: os.path.relpath(f, root) for c, f in item.files.items()}
        )
        for n, item in enumerate(local.fields)
    ]
    index = write_index(tmp_path / "i", records, str(root))
    dataset = JUMPS3Dataset(index=str(index), visits=1, spread=1)
    assert len(dataset) >= 3
    for position in range(len(dataset)):
        found = dataset.load_field(position)
        number = int(found.name.split("/")[0].removeprefix("plate"))
        expected = local.load_field(number)
        assert torch.equal(
            *(torch.from_numpy(np.array(f.planes, np.int32)) for f in (found, expected))
        )
        np.testing.assert_array_equal(found.low, expected.low)
        np.testing.assert_array_equal(found.foreground, expected.foreground)
