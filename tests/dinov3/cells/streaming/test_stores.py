"""Requests over real connections that fail in every way; both transports, two servers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinov3.cells.streaming import stores, transports
from dinov3.cells.streaming.store_options import (
    ObjectDamaged,
    ObjectForbidden,
    ObjectMissing,
    ObjectUnreadable,
    StoreError,
    StoreMisconfigured,
    StoreOptions,
    StoreUnreachable,
)
from dinov3.cells.streaming.stores import ObjectStore as _ObjectStore

TRANSPORTS = ("obstore", "boto3")
_opened: list[_ObjectStore] = []


def ObjectStore(settings: StoreOptions) -> _ObjectStore:
    _opened.append(_ObjectStore(settings))
    return _opened[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while _opened:
        _opened.pop().close()


def options(endpoint: str, transport: str = "obstore", **changes) -> StoreOptions:
    quick = {"backoff_s": 0.01, "backoff_max_s": 0.05, "timeout_s": 60.0, "outage_s": 600.0}
    return StoreOptions("s3://bucket", endpoint=endpoint, transport=transport, **(quick | changes))


@pytest.fixture
def names(bucket) -> dict[str, bytes]:
    root = bucket[0]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.tiff"))}


# --- two servers, two transports, one behaviour ---


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_reading_and_listing(server, transport, request, names):
    pytest.importorskip(transport)
    store = ObjectStore(options(request.getfixturevalue(server), transport))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(store.get, names)) == list(names.values())
    assert store.counts["requests"] == len(names)
    assert store.counts["bytes"] == sum(map(len, names.values()))
    prefix = "cpg0000/source_4/images/batch/images/BR1"
    expected = [(key, len(data)) for key, data in names.items() if key.startswith(prefix)]
    assert store.keys(prefix) == expected
    assert store.folders("cpg0000/source_4/images/batch/images/") == [
        f"BR{n}__2020" for n in range(3)
    ]
    assert store.folders("cpg0000/nothing/") == []
    assert store.keys("cpg0000/nothing/") == []
    with pytest.raises(ObjectMissing, match="must exist, got 404"):
        store.get("cpg0000/none.tiff")
    within = ObjectStore(
        StoreOptions(
            "s3://bucket/cpg0000/source_4", endpoint=request.getfixturevalue(server),
            transport=transport,
        )
    )  # fmt: skip
    key = next(iter(names))
    assert within.get(key.removeprefix("cpg0000/source_4/")) == names[key]
    assert within.folders("images/batch/images/") == [f"BR{n}__2020" for n in range(3)]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_signed_and_unsigned(moto, transport, monkeypatch):
    pytest.importorskip(transport)
    with pytest.raises(ObjectMissing, match="must be public, got 403"):
        ObjectStore(options(moto, transport)).get("secret.bin")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert ObjectStore(options(moto, transport, signed=True)).get("secret.bin") == b"x"


@pytest.mark.parametrize(("signed", "who"), [(False, "public"), (True, "open to the credentials")])
def test_a_refusal_says_whose_it_is(signed, who):
    class PermissionDeniedError(Exception):
        pass

    refused = pytest.raises(ObjectForbidden, match=f"plate.csv must be {who}.*, got 403: check")
    with refused, transports._translated("plate.csv", signed):
        raise PermissionDeniedError


def test_a_folder_is_a_store(bucket, names, tmp_path):
    root = bucket[0]
    store = ObjectStore(StoreOptions(str(root)))
    key = next(iter(names))
    assert store.get(key) == names[key]
    assert store.keys("cpg0000/source_4/images/batch/images/BR2")[0][0] in names
    assert store.folders("cpg0000/source_4/images/batch/images/") == [
        f"BR{n}__2020" for n in range(3)
    ]
    assert ObjectStore(StoreOptions(root.as_uri())).get(key) == names[key]
    with pytest.raises(ObjectMissing, match="none"):
        store.get("none.tiff")
    with pytest.raises(ObjectMissing, match="folder that exists"):
        ObjectStore(StoreOptions(str(tmp_path / "no"))).get(key)


# --- faults ---


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("503", "503"), ("500", "500"), ("reset", "reset"), ("reset_late", "reset"),
        ("truncate", "truncated"), ("slow", "timeout"), ("zeroed", "damaged"), ("swapped", "damaged"),
    ],
)  # fmt: skip
def test_each_fault_is_survived(proxy, names, transport, fault, counted):
    pytest.importorskip(transport)
    proxy.share, proxy.kinds = 0.35, (fault,)
    chosen = list(names)[:8]
    # Only a fault that is a silence needs a time limit.
    limit = 1.0 if fault == "slow" else 60.0
    store = ObjectStore(
        options(proxy.url, transport, retries=12, damaged_retries=12, timeout_s=limit)
    )
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(store.get, chosen))
    assert found == [names[key] for key in chosen]
    assert proxy.counts[fault] > 0, "the fault must have happened"
    retries = {k: v for k, v in store.counts.items() if k.startswith("retries.")}
    if fault == "slow":  # on a busy machine an honest answer may be late, too
        assert sum(retries.values()) >= proxy.counts[fault]
    else:
        assert sum(retries.values()) == proxy.counts[fault]
    assert set(retries) == {f"retries.{counted}"}


def test_what_arrives_is_looked_at(proxy, names):
    """Without a checksum, the reader's own check is what is left."""
    proxy.share, proxy.kinds = 0.4, ("zeroed",)
    store = ObjectStore(options(proxy.url, verify_md5=False, damaged_retries=12))

    def accept(data: bytes) -> int:
        if not any(data[:4]):
            raise ValueError("zeros")
        return len(data)

    assert [store.get(key, accept) for key in names] == [len(data) for data in names.values()]
    assert proxy.counts["zeroed"] == store.counts["retries.damaged"] > 0
    blind = ObjectStore(options(proxy.url, verify_md5=False))
    assert any(not any(blind.get(key)) for key in names), "nothing else would have noticed"


def test_persistent_faults_end(proxy, names):
    good, bad = list(names)[:2]
    for kind, error, message in (
        ("zeroed", ObjectDamaged, "damaged bytes 5 times"),
        ("503", ObjectUnreadable, "9 failures"),
    ):
        proxy.always = {bad: kind}
        store = ObjectStore(options(proxy.url, verify_md5=kind == "zeroed"))
        done = threading.Event()

        def others(store=store, done=done) -> None:
            while not done.is_set():
                store.get(good)

        thread = threading.Thread(target=others)
        thread.start()
        try:
            with pytest.raises(error, match=message):
                store.get(bad, lambda data: _nonzero(data))
        finally:
            done.set()
            thread.join()


def _nonzero(data: bytes) -> bytes:
    if not any(data):
        raise ValueError("zeros")
    return data


def test_objects_that_never_fit_mean_that_tags_are_no_checksums(proxy, names, caplog):
    """Encrypted buckets have such tags; a swapped object would not be the same three times."""
    keys = list(names)[:5]
    honest = proxy.answer

    def tagged(request, status, headers, body, cut=None):
        honest(request, status, headers | {"Etag": '"' + "0" * 32 + '"'}, body, cut)

    proxy.answer = tagged
    store = ObjectStore(options(proxy.url))
    for key in keys[:2]:
        assert store.get(key) == names[key]
    assert "not checksums" not in caplog.text
    for key in keys[2:]:
        assert store.get(key) == names[key]
    assert store.counts["requests"] == 3 * 3 + 2
    assert "not checksums" in caplog.text


def test_one_object_that_does_not_fit_leaves_the_others_checked(proxy, names):
    """The fault that the comparison is for must not end it."""
    first, second = list(names)[:2]
    honest = proxy.answer

    def half(request, status, headers, body, cut=None):
        honest(
            request,
            status,
            headers,
            body[: len(body) // 2] + bytes(len(body) - len(body) // 2),
            cut,
        )

    store = ObjectStore(options(proxy.url))
    proxy.answer = half
    store.get(first)  # so it is stored, as far as anybody can tell
    proxy.answer = honest
    assert store.get(second) == names[second]
    proxy.answer = half
    with pytest.raises(ObjectDamaged, match="its MD5 is not its ETag"):
        store.get(list(names)[2])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_parts_of_objects(server, request, bucket, names, transport):
    pytest.importorskip(transport)
    key = next(iter(names))
    data = names[key]
    url = request.getfixturevalue(server)
    for store in (
        ObjectStore(options(url, transport)),
        ObjectStore(StoreOptions(str(bucket[0]))),
    ):
        assert store.get(key, part=(10, 30)) == data[10:30]
        assert store.get(key, part=(100, None)) == data[100:]
        assert store.get(key, part=(None, 17)) == data[-17:]
        if (server, transport) != ("rclone", "obstore"):  # such an answer is read whole, and cut
            assert store.counts["bytes"] == 20 + len(data) - 100 + 17


def test_an_outage_loses_nothing_with_many_requests(proxy, names):
    """Neither at its beginning, where others have just succeeded, nor at its end, where some do first."""
    proxy.down_between = (20, 320)
    store = ObjectStore(options(proxy.url, retries=8, outage_s=600, timeout_s=60))
    with ThreadPoolExecutor(12) as threads:
        found = list(threads.map(store.get, list(names) * 3))
    assert found == list(names.values()) * 3
    assert store.counts["retries.reset"] == 300


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("status", [301, 400])
def test_lasting_refusals_are_reported_at_once(proxy, names, transport, status):
    pytest.importorskip(transport)
    honest = proxy.answer
    code = {301: "PermanentRedirect", 400: "InvalidRequest"}[status]

    def refused(request, _, headers, body, cut=None):
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
        honest(request, status, {"Content-Type": "application/xml"}, body)

    proxy.answer = refused
    store = ObjectStore(options(proxy.url, transport))
    with pytest.raises(StoreMisconfigured, match=f"got {status} .* check region, endpoint"):
        store.get(next(iter(names)))
    assert store.counts["requests"] == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_missing_credentials_are_reported_at_once(rclone, names, transport, monkeypatch, tmp_path):
    pytest.importorskip(transport)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    store = ObjectStore(options(rclone, transport, signed=True, outage_s=4))
    with pytest.raises(StoreError):
        store.get(next(iter(names)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"url": "s3://"}, "must name its bucket"),
        ({"url": "s3://b", "endpoint": "localhost:9000"}, "An endpoint must be http://"),
        ({"url": "s3://b", "endpoint": "http://"}, "An endpoint must be http://"),
    ],
)
def test_addresses_are_looked_at_first(how, message):
    with pytest.raises(ValueError, match=message):
        StoreOptions(**how)


def test_the_scheme_may_be_written_large():
    assert StoreOptions("S3://bucket/x").url == "s3://bucket/x"
    assert not StoreOptions("S3://bucket").is_folder


def test_an_outage_is_waited_for(proxy, names, caplog, monkeypatch):
    key = next(iter(names))
    monkeypatch.setattr(stores, "_SILENCE_LOGGED_S", 0.0)
    store = ObjectStore(options(proxy.url, retries=2, outage_s=600, timeout_s=60))
    proxy.down_between = (1, 7)
    assert store.get(key) == names[key]
    assert store.counts["requests"] == 7
    assert "does not answer" in caplog.text
    assert "answers again" in caplog.text


def test_an_outage_without_end(proxy, names):
    proxy.down = True
    store = ObjectStore(options(proxy.url, retries=1, outage_s=0.3))
    with pytest.raises(StoreUnreachable, match=r"must answer, got nothing for 0.3 s"):
        store.get(next(iter(names)))


def test_backoff_is_random_and_bounded(proxy, names, monkeypatch):
    proxy.always = {next(iter(names)): "503"}
    waits = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)
    store = ObjectStore(
        options(proxy.url, retries=8, backoff_s=1.0, backoff_max_s=16.0, outage_s=0)
    )
    with pytest.raises(StoreError):
        store.get(next(iter(names)))
    assert len(waits) == 8
    assert all(0 <= wait <= min(16, 2**n) for n, wait in enumerate(waits))
    assert len(set(waits)) == 8


def test_budget_of_requests(bucket, names, monkeypatch):
    """The n-th request starts n / rate after the first."""
    waits = []
    monkeypatch.setattr(stores.time, "sleep", waits.append)
    monkeypatch.setattr(stores.time, "monotonic", lambda: 100.0)
    store = ObjectStore(StoreOptions(str(bucket[0]), requests_per_s=4))
    for key in list(names)[:5]:
        store.get(key)
    assert waits == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


# --- processes ---


def _digests(store: _ObjectStore, keys: list[str], results) -> None:
    try:
        results.put([hashlib.md5(store.get(key)).hexdigest() for key in keys])
    except StoreError as error:
        results.put(str(error))


def _in_processes(method: str, store: _ObjectStore, keys: list[str]) -> list:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [context.Process(target=_digests, args=(store, keys, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join()
    return found


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_store_that_was_used_goes_to_spawned_processes(rclone, names, transport):
    """Each process makes its own clients."""
    pytest.importorskip(transport)
    store = ObjectStore(options(rclone, transport, timeout_s=20.0))
    keys = list(names)[:30]
    store.get(keys[0])
    found = _in_processes("spawn", store, keys)
    assert found == [[hashlib.md5(names[key]).hexdigest() for key in keys]] * 2


FORKED = """
import hashlib, json, os, sys
from dinov3.cells.streaming.store_options import StoreError, StoreOptions
from dinov3.cells.streaming.stores import ObjectStore

url, transport, keys = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
store = ObjectStore(StoreOptions("s3://bucket", endpoint=url, transport=transport, timeout_s=600))
store.get(keys[0])
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            print(json.dumps([hashlib.md5(store.get(key)).hexdigest() for key in keys]), flush=True)
        except StoreError as error:
            print(json.dumps(str(error)), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
os._exit(0)
"""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_store_that_was_used_in_forked_processes(rclone, names, transport):
    """Right bytes (boto3 has been seen to give another worker's), or a sentence in place of a hang.

    In a program of its own: a fork of this one would also copy locks that its threads hold.
    """
    pytest.importorskip(transport)
    keys = list(names)[:30]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, rclone, transport, json.dumps(keys)],
        capture_output=True, text=True, timeout=900, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(stores.__file__).parents[3])},
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 3
    if transport == "obstore":
        assert all("must start by forkserver or spawn" in text for text in found)
    else:
        assert found == [[hashlib.md5(names[key]).hexdigest() for key in keys]] * 3


def test_a_copy_has_no_connection(rclone, names):
    store = ObjectStore(options(rclone))
    store.get(next(iter(names)))
    copy = pickle.loads(pickle.dumps(store))
    assert copy.options == store.options
    assert copy._transport is None
    assert not copy.counts
    assert store._pid == os.getpid()


# --- wrong settings ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": ""}, "got nothing"),
        ({"url": "http://bucket"}, "named by its endpoint"),
        ({"transport": "curl"}, "one of obstore, boto3"),
        ({"timeout_s": 0}, "timeout_s` must be positive"),
        ({"retries": -1}, "`retries` must be 0 or more"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        StoreOptions(**({"url": "s3://bucket"} | changes))


def test_time_is_bounded_by_the_timeout(proxy, names):
    """The server is silent until the client gives up."""
    proxy.always = dict.fromkeys(names, "slow")
    store = ObjectStore(options(proxy.url, timeout_s=0.3, retries=1, outage_s=0))
    with pytest.raises(StoreUnreachable, match="timeout"):
        store.get(next(iter(names)))
