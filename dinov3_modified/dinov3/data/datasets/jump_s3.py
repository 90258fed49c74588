"""Cell Painting fields straight from an object store (ours).

A field is fetched once and visited K times; fetching runs ahead of the samples, in threads, and what
was decoded lies in a pool that all workers of a machine share.  The order of the samples is a pure
function of seed and position (`streaming.order`), whatever arrives when.
"""

import logging
import os
import time
import weakref
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

import dinov3.distributed as distributed
from dinov3.cells.checks import one_of
from dinov3.cells.fields import ChannelField, FieldError
from dinov3.cells.registry import transformed
from dinov3.cells.streaming.field_reader import FieldReader, entry_to_field, field_to_entry
from dinov3.cells.streaming.index import FieldIndex, FieldRecord
from dinov3.cells.streaming.order import FieldOrder, Visit
from dinov3.cells.streaming.pool import ByteCache, FieldPool, shared_memory_folder
from dinov3.cells.streaming.shared_files import (
    LostFields,
    append_lost,
    lost_names,
    sum_of_counts,
    write_counts,
)
from dinov3.cells.streaming.store_options import (
    ObjectDamaged,
    ObjectMissing,
    ObjectUnreadable,
    StreamOptions,
)
from dinov3.cells.streaming.stores import ObjectStore
from dinov3.cells.streaming.threads import RequestThreads
from dinov3.data.datasets.extended import ExtendedVisionDataset
from dinov3.data.datasets.jump_cellpainting import _LEFT_OUT, _Split, checked_percentiles

logger = logging.getLogger("dinov3")

USUAL_FIELD_BYTES = 5 * 1080 * 1080 * 2
_LOSSES = (ObjectMissing, ObjectDamaged, ObjectUnreadable, FieldError)
_FEWEST_LOST = 10  # no run stops before so many are lost
_MOST_STAND_INS = 50
_REPORT_EVERY_S = 2.0


class TooManyLost(OSError):
    """More fields cannot be read than a run may lose."""


@dataclass
class _Machinery:
    """What a process opens for itself."""

    pid: int
    reader: FieldReader
    fetchers: RequestThreads
    running: dict[int, Future[Any]] = field(default_factory=dict)
    scheduled_to: int = -1
    lost: LostFields = field(default_factory=LostFields)
    reported: float = 0.0


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

    Raises FileNotFoundError, ValueError (no index, no such channel, no field).
    """

    Split = _Split
    STRING_OPTIONS = {  # noqa: RUF012
        "index": str, "channels": str, "missing": str, "visits": int, "spread": int,
        "percentile_low": float, "percentile_high": float, "pixel_size_um": float, "limit": int,
    }  # fmt: skip
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
        super().__init__(root=root, **kwargs)
        one_of("missing", missing, ("error", "skip"))
        split = _Split[split] if isinstance(split, str) else split
        self.index = FieldIndex(index)
        self.percentiles = checked_percentiles(percentile_low, percentile_high)
        self.pixel_size_um = pixel_size_um
        self.channels = self._channels(channels)
        self.rows = self.index.rows(split=split.value, channels=self.channels)
        # Fields that lack one of the channels.
        self.left_out = len(self.index.rows(split=split.value)) - len(self.rows)
        if missing == "error" and self.left_out:
            raise ValueError(
                f"All fields must have the channels {', '.join(self.channels)}, got "
                f"{self.left_out} without: set missing=skip, or name channels="
            )
        if limit is not None:
            self.rows = self.rows.first(limit)
        if not len(self.rows):
            raise ValueError(
                f"Split {split.name} of {index} must hold fields with {', '.join(self.channels)}, got "
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
            if absent := [name for name in names if name not in known]:
                raise ValueError(
                    f"`channels` must be among {', '.join(known)}, got {', '.join(absent)}: correct channels="
                )
            return names
        # Those of the layout that most fields have; surplus ones of other sources are left out.
        most = self.index.layouts[int(np.bincount(self.index.column("layout")).argmax())]
        return tuple(c for c, _ in most if not c.lower().startswith(_LEFT_OUT))

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

        `report_folder`: gets `lost.jsonl`; fields listed there are not tried again after the
        position of their loss.  `seed`: of the
        order.  `batch_size`: of a process; a warning says when a batch will hold a field twice.
        """
        self.options = options
        self._report_folder = None if report_folder is None else Path(report_folder)
        if seed is not None:
            self.order = replace(self.order, seed=seed)
        order = self.order
        if batch_size > order.visits * order.spread or (
            order.fields_in_use > order.owned(self.world - 1)
        ):
            logger.warning(
                "A batch of %d can hold a field more than once: raise spread (%d), or take more fields "
                "(%d)", batch_size, order.spread, len(self.rows),
            )  # fmt: skip

    def prepare(self, field_bytes: int = 0) -> None:
        """Make the pool that workers share; called in the main process, before they start.

        `field_bytes` is that of a decoded field, for the pool's size; 0: fetch one and see, which a
        process that will fork its workers must not do.
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
        reader = (self._own or self._new_machinery()).reader
        for number in sorted({0, count // 3, 2 * count // 3, count - 1}):
            try:
                largest = max(largest, reader.field(self.record(number)).nbytes + 4096)
            except _LOSSES:
                continue
        return largest or USUAL_FIELD_BYTES

    def __getstate__(self) -> dict[str, Any]:
        self.prepare()
        return {**self.__dict__, "_own": None}

    def _machinery(self) -> _Machinery:
        self.prepare()
        return self._opened()

    def _opened(self) -> _Machinery:
        """That of this process, perhaps without a pool."""
        if self._own is None or self._own.pid != os.getpid():
            self._own = self._new_machinery()
        return self._own

    def _new_machinery(self) -> _Machinery:
        threads = self.options.threads
        reader = FieldReader(
            ObjectStore(self.options.of_store(self.index.store)),
            threads,
            channels=self.channels,
            percentiles=self.percentiles,
            pixel_size_um=self.pixel_size_um,
            disk=self._disk,
        )
        # A field needs several requests; its own thread only waits and decodes.
        fetchers = RequestThreads(max(1, -(-threads // len(self.channels))))
        return _Machinery(os.getpid(), reader, fetchers)

    # --- samples ---

    def __len__(self) -> int:
        return len(self.rows) * self.order.visits

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return transformed(self, self.load_field(index), ())

    def get_target(self, index: int) -> tuple[()]:
        return ()

    def get_sample_name(self, index: int) -> str:
        """Key of the field of a position, as planned: a lost one has a stand-in."""
        return self.index[self.rows[self.order.visit(index).field]].name

    def get_sample_channels(self, index: int) -> tuple[str, ...]:
        """Channels of a field, which all fields have."""
        return self.channels

    def record(self, number: int) -> FieldRecord:
        """Plate, well, site and keys of a field by its number in this data set."""
        return self.index[self.rows[number]]

    def field_name(self, number: int) -> str:
        """Key of a field by its number in this data set."""
        return self.record(number).name

    def read_field(self, number: int) -> ChannelField:
        """A field by its number, read now, without pool and stand-in; for many threads at once.

        One that cannot be used raises one of `LOSSES`, a store that does not answer StoreUnreachable.
        """
        return self._opened().reader.field(self.record(number))

    def read_array(self, path: str) -> np.ndarray:
        """A Zarr array of the store that holds one field, such as its labels: (C, H, W); see above."""
        return self._opened().reader.array(path)

    def megabytes_read(self) -> float:
        """By this process from its store."""
        return 0.0 if self._own is None else self._own.reader.store.counts["bytes"] / 1e6

    def load_field(self, position: int) -> ChannelField:
        """The field of a position; of a lost one its stand-in, or TooManyLost."""
        self._run_ahead(position)
        made = self._load(self.order.visit(position), position)
        self._report(self._machinery())
        return made

    def _load(self, visit: Visit, position: int) -> ChannelField:
        number = visit.field
        _, rank = self.order.step_of(position)
        for attempt in range(1, _MOST_STAND_INS + 1):
            if position < self._lost().get(number, position + 1):
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
        raise TooManyLost(f"A field in {_MOST_STAND_INS} must be usable, got none: see lost.jsonl")

    def _pooled(self, number: int) -> ChannelField:
        """A field from the pool, from the threads that are fetching it, or fetched now."""
        own = self._machinery()
        if (running := own.running.get(number)) is not None:
            running.result()
            own.running.pop(number, None)
        return entry_to_field(*self._entry(self.record(number)))

    def _entry(self, record: FieldRecord) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What the pool holds of a field, made if need be."""
        assert self._pool is not None
        reader = self._machinery().reader
        return self._pool.get(record.name, lambda: field_to_entry(reader.field(record)))

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
                if number in own.lost.since or self.field_name(number) in self._pool:
                    continue
                own.running[number] = own.fetchers.submit(partial(self._fetch_ahead, number))
        own.scheduled_to = last

    def _fetch_ahead(self, number: int) -> None:
        """Fill the pool; what fails is met again, and counted, when the sample needs it."""
        record = self.record(number)
        try:
            self._entry(record)
        except _LOSSES as error:
            logger.debug("%s: %s", record.name, error)

    # --- losses and counts ---

    def _lost_file(self) -> Path:
        assert self._pool is not None
        return (self._report_folder or self._pool.folder) / "lost.jsonl"

    def _lost(self) -> dict[int, int]:
        """Fields that any process has lost, with the position of the loss: all see the same ones."""
        return self._machinery().lost.read(self._lost_file(), self._is_field)

    def _is_field(self, number: int, name: str) -> bool:
        # Of another index, or of another choice of fields, the number means another field.
        return number < len(self.rows) and self.field_name(number) == name

    def _lose(self, number: int, error: Exception, position: int) -> None:
        self._machinery().reader.counts["lost"] += 1
        name = self.field_name(number)
        reason = str(error).strip().split("\n")[0][:300]
        path = self._lost_file()
        append_lost(path, number, name, reason, position)
        logger.warning("Field %s is lost and replaced (%s)", name, reason)
        lost = len(self._lost())
        step, _ = self.order.step_of(position)
        reached = min(self.order.count, (step + self.order.fields_in_use) * self.world + lost)
        if lost >= _FEWEST_LOST and lost > self.options.max_lost_share * reached:
            raise TooManyLost(
                f"At most {self.options.max_lost_share:.1%} of the fields may be lost, got {lost} of "
                f"{reached} (last: {reason}): look at {path}, then repair the store, or raise "
                "streaming.max_lost_share"
            )

    def _report(self, own: _Machinery) -> None:
        """Leave this process's counts where the main process finds them."""
        now = time.monotonic()
        if now - own.reported < _REPORT_EVERY_S:
            return
        own.reported = now
        assert self._pool is not None
        # Copies first: other threads continue to count.
        counts = Counter(dict(own.reader.counts))
        counts.update(dict(own.reader.store.counts))
        counts.update({f"pool.{name}": n for name, n in dict(self._pool.counts).items()})
        if self._disk is not None:
            counts.update({f"disk.{name}": n for name, n in dict(self._disk.counts).items()})
        write_counts(self._pool.folder, counts)

    def counts(self) -> dict[str, float]:
        """Sums over this process and its workers, and the lost fields of the whole run, each once."""
        total = Counter[str]() if self._pool is None else sum_of_counts(self._pool.folder)
        hits, misses = total["pool.hits"], total["pool.misses"]
        found = {f"stream/{name}": float(value) for name, value in sorted(total.items())}
        found["stream/lost"] = float((self._pool and len(lost_names(self._lost_file()))) or 0)
        if hits + misses:
            found["stream/pool_hit_rate"] = hits / (hits + misses)
        return found


class JUMPS3MultiView(JUMPS3Dataset):
    """`JUMPS3Dataset` by the name that stands in dataset strings."""
