"""Cell Painting fields straight from an object store (ours).

A field is fetched once and visited K times; fetching runs ahead of the samples, in threads, and what
was decoded lies in a pool that all workers of a machine share.  The order of the samples is a pure
function of seed and position (`streaming.order`), whatever arrives when.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

import dinov3.distributed as distributed
from dinov3.cells.fields import (
    TIFF_STARTS,
    ChannelField,
    FieldError,
    decode_planes,
    is_constant,
    make_field,
)
from dinov3.cells.files import write_text_atomically
from dinov3.cells.streaming.index import FieldIndex, FieldRecord
from dinov3.cells.streaming.order import FieldOrder, Visit
from dinov3.cells.streaming.pool import ByteCache, FieldPool, shared_memory_folder
from dinov3.cells.streaming.shards import ShardReader
from dinov3.cells.streaming.stores import (
    ObjectDamaged,
    ObjectMissing,
    ObjectStore,
    ObjectUnreadable,
    StoreOptions,
)
from dinov3.cells.streaming.threads import RequestThreads
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.jump_cellpainting import _LEFT_OUT, _Split

__all__ = ["JUMPS3Dataset", "JUMPS3MultiView", "StreamOptions", "TooManyLost"]

logger = logging.getLogger("dinov3")

USUAL_FIELD_BYTES = 5 * 1080 * 1080 * 2
_LOSSES = (ObjectMissing, ObjectDamaged, ObjectUnreadable, FieldError)
_FEWEST_LOST = 10  # no run stops before so many are lost
_MOST_STAND_INS = 50
_REPORT_EVERY_S = 2.0


class TooManyLost(OSError):
    """More fields cannot be read than a run may lose."""


@dataclass(frozen=True)
class StreamOptions:
    """How fields arrive; nothing here changes which samples a run sees.

    Attributes:
        store: URL or folder in place of the index's own, for example a local copy.
        endpoint, region, signed, transport, connect_timeout_s, timeout_s, retries, backoff_max_s,
            outage_s, requests_per_s, verify_md5: see `StoreOptions`.
        threads: requests at once, of each process.
        ahead: time steps (new fields) that fetching runs ahead.
        pool_gb: memory of decoded fields, shared by the workers of a process; 0: what the order needs.
        pool_folder: where it lies; empty: shared memory.
        disk_cache: folder of fetched files; empty: none.
        disk_cache_gb: its limit, over all processes that use it.
        max_lost_share: of the fields reached; above it the run stops.
    """

    store: str = ""
    endpoint: str = ""
    region: str = "us-east-1"
    signed: bool = False
    transport: str = "obstore"
    connect_timeout_s: float = 5.0
    timeout_s: float = 30.0
    retries: int = 8
    backoff_max_s: float = 20.0
    outage_s: float = 600.0
    requests_per_s: float = 0.0
    verify_md5: bool = True
    threads: int = 16
    ahead: int = 48
    pool_gb: float = 0.0
    pool_folder: str = ""
    disk_cache: str = ""
    disk_cache_gb: float = 100.0
    max_lost_share: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("ahead", 1), ("pool_gb", 0), ("max_lost_share", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"streaming.{name} must be at least {least}, got {getattr(self, name)}: raise it"
                )
        if self.disk_cache and self.disk_cache_gb <= 0:
            raise ValueError(
                f"streaming.disk_cache_gb must be positive, got {self.disk_cache_gb}: raise it"
            )

    @classmethod
    def from_config(cls, section: Mapping[str, Any]) -> StreamOptions:
        """Of the section `streaming` of a configuration, as plain values.

        Raises:
            ValueError: an unknown key, or a value out of range.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(section) - known):
            raise ValueError(
                f"keys of streaming must be among {', '.join(sorted(known))}, got "
                f"{', '.join(unknown)}: correct them"
            )
        options = cls(**section)
        options.of_store("s3://checked")
        return options

    def of_store(self, url: str) -> StoreOptions:
        """Those of the transport."""
        known = {item.name for item in fields(StoreOptions)}
        shared = {name: value for name, value in asdict(self).items() if name in known}
        connections = max(self.threads, 1)
        return StoreOptions(url=self.store or url, connections=connections, **shared)


@dataclass
class _Machinery:
    """What a process opens for itself."""

    pid: int
    store: ObjectStore
    requests: RequestThreads
    fetchers: RequestThreads
    shards: ShardReader
    running: dict[int, Future[Any]] = field(default_factory=dict)
    scheduled_to: int = -1
    lost: dict[int, str] = field(default_factory=dict)
    lost_bytes: int = 0
    reported: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


class JUMPS3Dataset(ExtendedVisionDataset):
    """Fields of an index, each visited several times, for `DataAugmentationMultiView`.

    An index of this data set is a *position* of the order of all processes, without end;
    `len()` is the number of positions of one pass.

    Args:
        index: file that `dinocell jump index` made.
        split: ALL, TRAIN or VAL, by plate.
        channels: names joined by +; by default those that most fields have, but bright field.
        missing: of fields that lack one of them: `skip`, or `error`.
        visits: samples of each fetched field (K).
        spread: K * spread samples lie between two visits of a field; a batch of at most so many
            holds a field once.
        seed: of the order.
        percentile_low, percentile_high: intensities that become 0 and 1.
        pixel_size_um: of all fields, if it is known.
        limit: use the first so many fields.
        options: how fields arrive; the training program sets them by `set_options`.

    Raises:
        FileNotFoundError, ValueError: no index, no such channel, no field.
    """

    Split = _Split
    STRING_OPTIONS = {  # noqa: RUF012
        "index": str,
        "channels": str,
        "missing": str,
        "visits": int,
        "spread": int,
        "percentile_low": float,
        "percentile_high": float,
        "pixel_size_um": float,
        "limit": int,
    }
    LOSSES = _LOSSES
    gives_fields = True
    # Loaders then count positions in place of drawing indices.
    orders_itself = True

    def __init__(
        self,
        *,
        index: str,
        split: _Split | str = _Split.ALL,
        channels: str | None = None,
        missing: str = "skip",
        visits: int = 16,
        spread: int = 8,
        seed: int = 0,
        percentile_low: float = 0.1,
        percentile_high: float = 99.9,
        pixel_size_um: float | None = None,
        limit: int | None = None,
        options: StreamOptions | None = None,
        root: str | None = None,
        extra: str | None = None,
        **kwargs: Any,
    ) -> None:
        del extra
        super().__init__(root=root, **kwargs)
        if missing not in ("error", "skip"):
            raise ValueError(f"missing must be error or skip, got {missing!r}: choose one")
        if not 0 <= percentile_low < percentile_high <= 100:
            raise ValueError(
                "percentiles must be 0 <= low < high <= 100, got "
                f"{percentile_low} and {percentile_high}: 0.1 and 99.9 are usual"
            )
        split = _Split[split] if isinstance(split, str) else split
        self.index = FieldIndex(index)
        self.percentiles = (percentile_low, percentile_high)
        self.pixel_size_um = pixel_size_um
        self.channels = self._channels(channels)
        self.rows = self.index.rows(split=split.value, channels=self.channels)
        # Fields that lack one of the channels.
        self.left_out = len(self.index.rows(split=split.value)) - len(self.rows)
        if missing == "error" and self.left_out:
            raise ValueError(
                f"all fields must have the channels {', '.join(self.channels)}, got "
                f"{self.left_out} without: set missing=skip, or name channels="
            )
        if limit is not None:
            self.rows = self.rows.first(limit)
        if not len(self.rows):
            raise ValueError(
                f"split {split.name} of {index} must hold fields with {', '.join(self.channels)}, got "
                "none: use ALL, or other channels="
            )
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.order = FieldOrder(
            len(self.rows), visits=visits, spread=spread, seed=seed, world=self.world
        )
        self.options = options or StreamOptions()
        self._report_folder: Path | None = None
        self._pool: FieldPool | None = None
        self._disk: ByteCache | None = None
        self._own: _Machinery | None = None

    def _channels(self, wanted: str | None) -> tuple[str, ...]:
        known = self.index.channels()
        if wanted:
            names = tuple(wanted.split("+"))
            absent = [name for name in names if name not in known]
            if absent:
                raise ValueError(
                    f"channels must be among {', '.join(known)}, got {', '.join(absent)}: correct "
                    "channels="
                )
            return names
        # Those of the layout that most fields have; surplus ones of other sources are left out.
        most = int(np.bincount(self.index.column("layout")).argmax())
        return tuple(
            channel
            for channel, _ in self.index.layouts[most]
            if not channel.lower().startswith(_LEFT_OUT)
        )

    # --- how it is set up ---

    def set_options(
        self,
        options: StreamOptions,
        *,
        report_folder: str | Path | None = None,
        seed: int | None = None,
        batch_size: int = 1,
    ) -> None:
        """What a run knows beyond the data set's string, before the first sample.

        Args:
            report_folder: gets `lost.jsonl`; fields listed there are not tried again.
            seed: of the order.
            batch_size: of a process; a warning says when a batch will hold a field twice.
        """
        self.options = options
        self._report_folder = None if report_folder is None else Path(report_folder)
        if seed is not None:
            self.order = FieldOrder(
                self.order.count,
                visits=self.order.visits,
                spread=self.order.spread,
                seed=seed,
                world=self.world,
            )
        if batch_size > self.order.visits * self.order.spread or self.order.fields_in_use > (
            self.order.owned(self.world - 1)
        ):
            logger.warning(
                "a batch of %d can hold a field more than once: raise spread (%d), or take more fields "
                "(%d)", batch_size, self.order.spread, len(self.rows),
            )  # fmt: skip

    def prepare(self, field_bytes: int = 0) -> None:
        """Make the pool that workers share; called in the main process, before they start.

        Args:
            field_bytes: of a decoded field, for the pool's size; 0: fetch one and see.  A process
                that will fork its workers must not fetch.
        """
        if self._pool is not None:
            return
        if self.options.disk_cache:
            self._disk = ByteCache(
                self.options.disk_cache, int(self.options.disk_cache_gb * 1e9), keep_first=True
            )
        needed = self.order.pool_fields(self.options.ahead)
        limit = int(self.options.pool_gb * 1e9) or needed * (field_bytes or self._field_bytes())
        folder = shared_memory_folder(limit, self.options.pool_folder)
        self._pool = FieldPool(folder, limit)
        # Workers have copies that end before; those of a killed run go when the next one starts.
        weakref.finalize(self, FieldPool.close, self._pool)

    def _field_bytes(self) -> int:
        """Of the largest of some decoded fields; of a usual one where none can be read.

        They are spread over the index: plates of different microscopes differ in size.
        """
        count = len(self.rows)
        largest = 0
        for number in sorted({0, count // 3, 2 * count // 3, count - 1}):
            try:
                largest = max(largest, self._fetch(self.record(number)).nbytes + 4096)
            except _LOSSES:
                continue
        return largest or USUAL_FIELD_BYTES

    def __getstate__(self) -> dict[str, Any]:
        self.prepare()
        return {**self.__dict__, "_own": None}

    def _machinery(self) -> _Machinery:
        self.prepare()
        own = self._own
        if own is None or own.pid != os.getpid():
            own = self._own = self._new_machinery()
        return own

    def _new_machinery(self) -> _Machinery:
        threads = self.options.threads
        store = ObjectStore(self.options.of_store(self.index.store))
        return _Machinery(
            os.getpid(),
            store,
            RequestThreads(threads),
            # A field needs several requests; its own thread only waits and decodes.
            RequestThreads(max(1, -(-threads // len(self.channels)))),
            ShardReader(store),
        )

    # --- samples ---

    def __len__(self) -> int:
        return len(self.rows) * self.order.visits

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = self._image(index)
        if self.transforms is not None:
            return self.transforms(image, ())
        if self.transform is not None:
            image = self.transform(image)
        target: Any = ()
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _image(self, position: int) -> Any:
        return self.load_field(position)

    def get_target(self, index: int) -> tuple[()]:
        """There is none."""
        return ()

    def get_sample_name(self, index: int) -> str:
        """Key of the field of a position, as planned: a lost one has a stand-in."""
        return self.index[self.rows[self.order.visit(index).field]].name

    def record(self, number: int) -> FieldRecord:
        """Plate, well, site and keys of a field by its number in this data set."""
        return self.index[self.rows[number]]

    def field_name(self, number: int) -> str:
        """Key of a field by its number in this data set."""
        return self.record(number).name

    def read_field(self, number: int) -> ChannelField:
        """A field by its number, read now, without pool and stand-in; for many threads at once.

        Raises:
            One of `LOSSES`: the field cannot be used.  StoreUnreachable: nothing answers.
        """
        if self._own is None or self._own.pid != os.getpid():
            self._own = self._new_machinery()
        return self._fetch(self.record(number))

    def read_array(self, path: str) -> np.ndarray:
        """A Zarr array of the store that holds one field, such as its labels: (C, H, W).

        Raises:
            One of `LOSSES`: there is none.  StoreUnreachable: nothing answers.
        """
        if self._own is None or self._own.pid != os.getpid():
            self._own = self._new_machinery()
        try:
            return self._own.shards.planes({"": f"{path}#:0"})[""][None]
        except ValueError as error:
            raise FieldError(str(error)) from error

    def megabytes_read(self) -> float:
        """By this process from its store."""
        return 0.0 if self._own is None else self._own.store.counts["bytes"] / 1e6

    def load_field(self, position: int) -> ChannelField:
        """The field of a position; of a lost one its stand-in.

        Raises:
            TooManyLost, StoreUnreachable.
        """
        self._run_ahead(position)
        made = self._load(self.order.visit(position), position)
        self._report(self._machinery())
        return made

    def _load(self, visit: Visit, position: int) -> ChannelField:
        number = visit.field
        _, rank = self.order.step_of(position)
        for attempt in range(1, _MOST_STAND_INS + 1):
            if number not in self._lost():
                try:
                    made = self._pooled(number)
                except _LOSSES as error:
                    self._lose(number, error, position)
                else:
                    if self._pool is not None and self.order.is_last(visit, rank):
                        # Else it would outlast fields that were fetched before it was last used.
                        self._pool.retire(self.field_name(number))
                    return made
            number = self.order.replacement(visit, attempt, rank)
        raise TooManyLost(
            f"a field in {_MOST_STAND_INS} must be readable, got none: see lost.jsonl"
        )

    def _pooled(self, number: int) -> ChannelField:
        """A field from the pool, from the threads that are fetching it, or fetched now."""
        own = self._machinery()
        running = own.running.get(number)
        if running is not None:
            running.result()
            own.running.pop(number, None)
        record = self.record(number)
        assert self._pool is not None
        facts, arrays = self._pool.get(record.name, partial(self._entry, record))
        return ChannelField(
            facts["name"],
            arrays["planes"],
            tuple(facts["channels"]),
            arrays["low"],
            arrays["high"],
            None,
            facts["pixel_size_um"],
            arrays["foreground"].astype(bool),
        )

    def _entry(self, record: FieldRecord) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        made = self._fetch(record)
        facts = {
            "name": made.name,
            "channels": list(made.channels),
            "pixel_size_um": made.pixel_size_um,
        }
        arrays = {
            "planes": made.planes,
            "low": made.low,
            "high": made.high,
            "foreground": made.foreground.astype(np.uint8),
        }
        return facts, arrays

    def _fetch(self, record: FieldRecord) -> ChannelField:
        """All channels of a field at once, decoded and looked at."""
        own = self._own or self._new_machinery()
        keys = {channel: record.keys[channel] for channel in self.channels}
        if ShardReader.holds(next(iter(keys.values()))):
            try:
                planes = own.shards.planes(keys)
            except ValueError as error:
                raise FieldError(str(error)) from error
            return self._made(own, record, planes)
        futures = {
            channel: own.requests.submit(partial(self._plane, own, record, channel))
            for channel in self.channels
        }
        planes = {channel: future.result() for channel, future in futures.items()}
        return self._made(own, record, planes)

    def _made(
        self, own: _Machinery, record: FieldRecord, planes: dict[str, np.ndarray]
    ) -> ChannelField:
        begun = time.perf_counter()
        try:
            made = make_field(
                record.name,
                planes,
                pixel_size_um=self.pixel_size_um,
                percentiles=self.percentiles,
            )
        except FieldError:
            raise
        except ValueError as error:
            raise FieldError(f"{record.name} must be a field that can be used ({error})") from error
        with own.lock:
            own.counts["prepare_ms"] += round(1000 * (time.perf_counter() - begun))
            own.counts["fields"] += 1
        return made

    def _plane(self, own: _Machinery, record: FieldRecord, channel: str) -> np.ndarray:
        key = record.keys[channel]
        name = f"{record.name} ({channel})"

        def accept(data: bytes) -> tuple[bytes, np.ndarray]:
            begun = time.perf_counter()
            if key.lower().endswith((".tif", ".tiff")) and data[:4] not in TIFF_STARTS:
                raise FieldError(f"{name} must begin as a TIFF, got {data[:4]!r}")
            planes = decode_planes(data, name)
            with own.lock:
                own.counts["decode_ms"] += round(1000 * (time.perf_counter() - begun))
            if len(planes) != 1:
                raise FieldError(f"{name} must be one plane, got {len(planes)}")
            if is_constant(planes[0]):
                raise FieldError(f"{name} must have contrast, got {planes[0].flat[0]} everywhere")
            return data, planes[0]

        disk = self._disk
        if disk is None:
            found: Any = own.store.get(key, accept)
            return found[1]
        kept: list[np.ndarray] = []

        def fetch() -> bytes:
            got: Any = own.store.get(key, accept)
            kept.append(got[1])
            return got[0]

        entry = f"{own.store.options.endpoint} {own.store.options.url}/{key}"
        data = disk.get(entry, fetch)
        if kept:
            return kept[0]
        try:
            return accept(data)[1]
        except FieldError:
            disk.drop(entry)  # a disk can fail too
            fetched: Any = own.store.get(key, accept)
            return fetched[1]

    # --- ahead of the samples ---

    def _run_ahead(self, position: int) -> None:
        """Have the fields of the next steps fetched: each by one of the workers."""
        own = self._machinery()
        step, rank = self.order.step_of(position)
        last = step + self.options.ahead
        begin = max(own.scheduled_to + 1, step)
        if begin > last:
            return
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        own.running = {number: one for number, one in own.running.items() if not one.done()}
        assert self._pool is not None
        for coming in range(begin, last + 1):
            for visit in self.order.of_step(coming, rank):
                number = visit.field
                # By place, so that neighbours in time go to different workers.
                if visit.place % workers != worker or number in own.running:
                    continue
                if number in own.lost or self.field_name(number) in self._pool:
                    continue
                own.running[number] = own.fetchers.submit(partial(self._fetch_ahead, number))
        own.scheduled_to = last

    def _fetch_ahead(self, number: int) -> None:
        """Fill the pool; what fails is met again, and counted, when the sample needs it."""
        record = self.record(number)
        assert self._pool is not None
        try:
            self._pool.get(record.name, partial(self._entry, record))
        except _LOSSES as error:
            logger.debug("%s: %s", record.name, error)

    # --- losses and counts ---

    def _lost_file(self) -> Path:
        assert self._pool is not None
        return (self._report_folder or self._pool.folder) / "lost.jsonl"

    def _lost(self) -> dict[int, str]:
        """Fields that any process has lost: all see the same ones."""
        own = self._machinery()
        path = self._lost_file()
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return own.lost
        if size != own.lost_bytes:
            with path.open("rb") as stream:
                stream.seek(own.lost_bytes)
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            for line in whole.splitlines():
                entry = json.loads(line)
                number = entry["number"]
                # Of another index, or of another choice of fields, the number means another field.
                if number < len(self.rows) and self.field_name(number) == entry["field"]:
                    own.lost[number] = entry["reason"]
            own.lost_bytes += len(whole)
        return own.lost

    def _lost_names(self) -> set[str]:
        """Fields in the file of lost ones; several workers may have written one."""
        if self._pool is None:
            return set()
        try:
            lines = self._lost_file().read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return set()
        return {json.loads(line)["field"] for line in lines if line.endswith("}")}

    def _lose(self, number: int, error: Exception, position: int) -> None:
        own = self._machinery()
        own.counts["lost"] += 1
        name = self.field_name(number)
        reason = str(error).strip().split("\n")[0][:300]
        entry = {"number": number, "field": name, "reason": reason}
        path = self._lost_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write of a short line: appended whole, also beside other processes.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (json.dumps(entry) + "\n").encode())
        finally:
            os.close(descriptor)
        logger.warning("field %s is lost and replaced (%s)", name, reason)
        lost = len(self._lost())
        step, _ = self.order.step_of(position)
        reached = (step + self.order.fields_in_use) * self.world + lost
        reached = min(self.order.count, reached)
        if lost >= _FEWEST_LOST and lost > self.options.max_lost_share * reached:
            raise TooManyLost(
                f"at most {self.options.max_lost_share:.1%} of the fields may be lost, got {lost} of "
                f"{reached} (last: {reason}): look at {path}, then mend the store, or raise "
                "streaming.max_lost_share"
            )

    def _report(self, own: _Machinery) -> None:
        """Leave this process's counts where the main process finds them."""
        now = time.monotonic()
        if now - own.reported < _REPORT_EVERY_S:
            return
        own.reported = now
        assert self._pool is not None
        # Copies first: threads go on counting.
        counts = Counter(dict(own.counts))
        counts.update(dict(own.store.counts))
        counts.update({f"pool.{name}": n for name, n in dict(self._pool.counts).items()})
        if self._disk is not None:
            counts.update({f"disk.{name}": n for name, n in dict(self._disk.counts).items()})
        path = self._pool.folder / f"counts-{own.pid}.json"
        try:
            write_text_atomically(path, json.dumps(counts))
        except OSError as error:
            logger.debug("counts cannot be written: %s", error)

    def counts(self) -> dict[str, float]:
        """Sums over this process and its workers: requests, bytes, retries, hits; lost fields.

        Lost are those of the whole run, each once, before its resumption too.
        """
        total: Counter[str] = Counter()
        if self._pool is not None:
            for path in self._pool.folder.glob("counts-*.json"):
                try:
                    total.update(json.loads(path.read_text(encoding="utf-8")))
                except (OSError, ValueError):  # it is being replaced
                    continue
        hits, misses = total["pool.hits"], total["pool.misses"]
        found = {f"stream/{name}": float(value) for name, value in sorted(total.items())}
        found["stream/lost"] = float(len(self._lost_names()))
        if hits + misses:
            found["stream/pool_hit_rate"] = hits / (hits + misses)
        return found


class JUMPS3MultiView(JUMPS3Dataset):
    """`JUMPS3Dataset` by the name that stands in dataset strings."""
