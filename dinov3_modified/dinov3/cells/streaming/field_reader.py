"""Fields of a store, decoded and checked, by the requests of one process (ours)."""

import threading
import time
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np

from dinov3.cells.fields import (
    TIFF_STARTS,
    ChannelField,
    FieldError,
    decode_planes,
    is_constant,
    make_field,
)
from dinov3.cells.streaming.index import FieldRecord
from dinov3.cells.streaming.pool import ByteCache
from dinov3.cells.streaming.shards import ShardReader
from dinov3.cells.streaming.stores import ObjectStore
from dinov3.cells.streaming.threads import RequestThreads


@dataclass(eq=False)
class FieldReader:
    """Reads fields for one process; for many threads at once.

    `counts` has the fields, and the milliseconds of decoding and preparing.
    """

    store: ObjectStore  # where the keys of the records are
    threads: int  # requests at once
    _: KW_ONLY
    channels: tuple[str, ...]  # of each field, in this order
    percentiles: tuple[float, float]  # intensities that become 0 and 1
    pixel_size_um: float | None = None  # of all fields, if it is known
    disk: ByteCache | None = None  # keeps the files that were fetched

    def __post_init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.shards = ShardReader(self.store)
        self._requests = RequestThreads(self.threads)
        self._lock = threading.Lock()

    def field(self, record: FieldRecord) -> ChannelField:
        """All channels of a field at once, decoded and checked.

        Raises ObjectMissing, ObjectDamaged, ObjectUnreadable, FieldError (the field cannot be
        used); StoreUnreachable, StoreMisconfigured (no field of the store can be read now).
        """
        keys = {channel: record.keys[channel] for channel in self.channels}
        if ShardReader.holds(next(iter(keys.values()))):
            try:
                planes = self.shards.planes(keys)
            except ValueError as error:
                raise FieldError(str(error)) from error
            return self._made(record, planes)
        futures = [self._requests.submit(partial(self._plane, record, c)) for c in self.channels]
        planes = {c: future.result() for c, future in zip(self.channels, futures, strict=True)}
        return self._made(record, planes)

    def _made(self, record: FieldRecord, planes: dict[str, np.ndarray]) -> ChannelField:
        begun = time.perf_counter()
        made = make_field(
            record.name, planes, pixel_size_um=self.pixel_size_um, percentiles=self.percentiles
        )
        with self._lock:
            self.counts["prepare_ms"] += round(1000 * (time.perf_counter() - begun))
            self.counts["fields"] += 1
        return made

    def _plane(self, record: FieldRecord, channel: str) -> np.ndarray:
        key = record.keys[channel]
        name = f"{record.name} ({channel})"

        def accept(data: bytes) -> tuple[bytes, np.ndarray]:
            begun = time.perf_counter()
            if key.lower().endswith((".tif", ".tiff")) and data[:4] not in TIFF_STARTS:
                raise FieldError(
                    f"{name} must begin as a TIFF, got {data[:4]!r}: the file is damaged"
                )
            planes = decode_planes(data, name)
            with self._lock:
                self.counts["decode_ms"] += round(1000 * (time.perf_counter() - begun))
            if len(planes) != 1:
                raise FieldError(f"{name} must be one plane, got {len(planes)}: leave it out")
            if is_constant(planes[0]):
                raise FieldError(
                    f"{name} must have contrast, got {planes[0].flat[0]} everywhere: leave it out"
                )
            return data, planes[0]

        kept: list[np.ndarray] = []

        def fetch() -> bytes:
            got: Any = self.store.get(key, accept)
            kept.append(got[1])
            return got[0]

        entry = f"{self.store.options.endpoint} {self.store.options.url}/{key}"
        data = fetch() if self.disk is None else self.disk.get(entry, fetch)
        if not kept:
            try:
                return accept(data)[1]
            except FieldError:
                assert self.disk is not None
                self.disk.drop(self.disk.path(entry))  # a disk can fail too
                fetch()
        return kept[0]

    def array(self, path: str) -> np.ndarray:
        """A Zarr array of the store that holds one field, (C, H, W); FieldError: there is none."""
        try:
            return self.shards.planes({"": f"{path}#:0"})[""][None]
        except ValueError as error:
            raise FieldError(str(error)) from error


def field_to_entry(made: ChannelField) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a field, as `FieldPool` keeps them."""
    facts = {name: getattr(made, name) for name in ("name", "channels", "pixel_size_um")}
    arrays = {name: getattr(made, name) for name in ("planes", "low", "high")}
    return facts, arrays | {"foreground": made.foreground.astype(np.uint8)}


def entry_to_field(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> ChannelField:
    """The field of `field_to_entry`."""
    known: dict[str, Any] = facts | arrays
    known["channels"] = tuple(facts["channels"])
    known["foreground"] = arrays["foreground"].astype(bool)
    return ChannelField(**known)
