"""Fields in Zarr arrays: packed ones, one chunk a field and many chunks a file; JUMP-Lite's (ours).

Zarr v3 with its sharding codec (ZEP 2): other programs open it.  A shard ends with a table of the
places of its chunks, so a field costs one read of exactly its bytes, plus one of the table for each
shard, which is kept.  A directory of millions of fields has thousands of files.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.cells.checks import one_of
from dinov3.cells.fields import ChannelField
from dinov3.cells.files import atomic_folder
from dinov3.cells.streaming.index import FieldRecord, IndexWriter
from dinov3.cells.streaming.store_options import ObjectMissing, StoreError
from dinov3.cells.streaming.stores import ObjectStore
from dinov3.cells.streaming.transports import Range

_INDEX = "fields.arrow"
_TABLES_KEPT = 4096  # of shards, about 1 kB each
_GROUP = "fields.zarr"


@dataclass(frozen=True)
class PackOptions:
    """How fields are stored."""

    bits: int = 16  # as they came; or 8: scaled from the field's percentile range to 0 ... 255
    crop_px: int = 0  # of the centre; 0: all
    scale: float = 1.0  # enlargement, such as 0.5, by area averaging
    per_file: int = 64  # fields of a file
    level: int = 5  # of Zstandard, 1 to 22

    def __post_init__(self) -> None:
        one_of("bits", self.bits, (8, 16))
        if self.crop_px < 0:
            raise ValueError(f"`crop_px` must be 0 or more, got {self.crop_px}: 0 keeps all")
        if not 0 < self.scale <= 1:
            raise ValueError(
                f"`scale` must be above 0 and at most 1, got {self.scale}: 1 keeps the size"
            )
        if self.per_file < 1:
            raise ValueError(
                f"`per_file` must be at least 1, got {self.per_file}: give a larger number"
            )
        if not 1 <= self.level <= 22:
            raise ValueError(f"`level` must be 1 to 22, got {self.level}: 5 is usual")


def pack_fields(
    fields: Iterable[tuple[FieldRecord, ChannelField]],
    out: str | Path,
    options: PackOptions,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Write fields as shards and their index; the folder appears whole or not at all.

    Args:
        fields: in the order wanted; each may have another size, each size gets an array of its own.
        out: folder that does not exist; gets `fields.zarr` and `fields.arrow`.
        progress: called with the name of each field.

    Returns the number of fields.  Raises FileExistsError, ValueError (the folder exists; no field;
    a crop that is larger than a field).
    """
    zarr = _zarr()
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"The output folder must not exist, got {out}: name another folder")
    with atomic_folder(out) as part:
        group = zarr.open_group(str(part / _GROUP), mode="w", zarr_format=3)
        writer = IndexWriter(str(out.resolve()), "packed")
        waiting: dict[str, list[tuple[FieldRecord, tuple[str, ...], np.ndarray]]] = {}
        count = 0
        for record, made in fields:
            planes = _shaped(made, options)
            kind = "x".join(map(str, planes.shape)) + f"-{planes.dtype.name}"
            waiting.setdefault(kind, []).append((record, made.channels, planes))
            if len(waiting[kind]) == options.per_file:
                _append(group, kind, waiting.pop(kind), writer, options)
            count += 1
            if progress is not None:
                progress(record.name)
        for kind, rest in waiting.items():
            _append(group, kind, rest, writer, options)
        writer.write(part / _INDEX)
    return count


def _shaped(made: ChannelField, options: PackOptions) -> np.ndarray:
    planes = made.planes
    height, width = planes.shape[1:]
    if options.crop_px:
        size = options.crop_px
        if size > min(height, width):
            raise ValueError(
                f"`crop_px` must fit into {made.name} of {height} x {width} px, got {size}: choose a smaller crop"
            )
        top, left = (height - size) // 2, (width - size) // 2
        planes = planes[:, top : top + size, left : left + size]
    if options.scale != 1:
        import cv2

        shape = (round(planes.shape[2] * options.scale), round(planes.shape[1] * options.scale))
        planes = np.stack([cv2.resize(p, shape, interpolation=cv2.INTER_AREA) for p in planes])
    if options.bits == 8:
        low = made.low[:, None, None]
        scaled = (planes - low) * (255 / (made.high[:, None, None] - low))
        planes = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    elif planes.dtype == np.uint8:
        planes = planes.astype(np.uint16)
    return np.ascontiguousarray(planes)


def _append(
    group: Any,
    kind: str,
    rows: list[tuple[FieldRecord, tuple[str, ...], np.ndarray]],
    writer: IndexWriter,
    options: PackOptions,
) -> None:
    from zarr.codecs import BloscCodec, Crc32cCodec

    shape = rows[0][2].shape
    if kind not in group:
        group.create_array(
            kind,
            shape=(0, *shape),
            chunks=(1, *shape),
            shards=(options.per_file, *shape),
            dtype=rows[0][2].dtype,
            # A part of a file has no checksum but its own.
            compressors=(
                BloscCodec(cname="zstd", clevel=options.level, shuffle="bitshuffle"),
                Crc32cCodec(),
            ),
        )
    array = group[kind]
    begin = array.shape[0]
    array.resize((begin + len(rows), *shape))
    array[begin:] = np.stack([planes for _, _, planes in rows])
    for row, (record, channels, planes) in enumerate(rows, begin):
        # Every channel of a field has the same key: they are one chunk.
        keys = {channel: f"{_GROUP}/{kind}#{row}:{n}" for n, channel in enumerate(channels)}
        writer.add(FieldRecord(record.plate, record.well, record.site, keys, int(planes.nbytes)))


class ShardReader:
    """Fields in Zarr arrays of a store: packed ones, and JUMP-Lite's with an array a field.

    Keys of an index are `ARRAY#ROW:CHANNEL`, without ROW where the array is one field.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._arrays: dict[str, Any] = {}

    @staticmethod
    def holds(key: str) -> bool:
        """Whether a key of an index is one of a Zarr array."""
        return ".zarr/" in key and "#" in key

    def planes(self, keys: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Planes by channel of one field.

        Raises ValueError (the store lacks them, or a chunk is damaged); StoreError (see
        `ObjectStore.get`).
        """
        first = next(iter(keys.values()))
        path, _, place = first.partition("#")
        row = place.partition(":")[0]
        attempts = 1 if self.store.options.is_folder else 1 + self.store.options.damaged_retries
        for attempt in range(1, attempts + 1):
            try:
                if not row:
                    planes = self._open(path)[...]
                else:
                    if path not in self._arrays:
                        self._arrays[path] = self._open(path)
                    planes = self._arrays[path][int(row)]
                break
            except StoreError:
                raise
            except Exception as error:
                self._arrays.pop(path, None)  # with what it keeps of a damaged answer
                if attempt < attempts:
                    self.store.close()
                    continue
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ValueError(
                    f"{first} must be in {self.store.options.url}, got none ({reason}): copy the shards again"
                ) from error
        return {channel: planes[int(key.rpartition(":")[2])] for channel, key in keys.items()}

    def _open(self, path: str) -> Any:
        zarr = _zarr()
        lossy = "jpegxl" in path
        if lossy:
            try:
                from imagecodecs.numcodecs import register_codecs
            except ImportError as error:
                raise ValueError(
                    "JPEG XL chunks need the package imagecodecs, which is not installed: run "
                    "pip install '.[formats]' in the clone of DINOCell"
                ) from error
            register_codecs(verbose=False)
        chunks = _chunk_store(self.store)
        return zarr.open_array(chunks, path=path, mode="r", zarr_format=2 if lossy else 3)


def _chunk_store(store: ObjectStore) -> Any:
    """Our store as Zarr sees one: read only; what is missing is None."""
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store
    from zarr.core.buffer import default_buffer_prototype

    ends: dict[str, bytes] = {}

    class Chunks(Store):
        supports_writes = supports_deletes = supports_listing = False

        def __init__(self) -> None:
            super().__init__(read_only=True)

        def __eq__(self, other: object) -> bool:
            return other is self

        __hash__ = Store.__hash__

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            part: Range | None = None
            if isinstance(byte_range, RangeByteRequest):
                part = byte_range.start, byte_range.end
            elif isinstance(byte_range, OffsetByteRequest):
                part = byte_range.offset, None
            elif byte_range is not None:
                part = None, byte_range.suffix
                if key in ends:
                    return prototype.buffer.from_bytes(ends[key])
            try:
                data = await asyncio.to_thread(partial(store.get, key, part=part))
            except ObjectMissing:
                return None
            assert isinstance(data, bytes)
            if part is not None and part[0] is None:
                # The table of a shard: needed for each of its fields.
                if len(ends) >= _TABLES_KEPT:
                    ends.pop(next(iter(ends)), None)
                ends[key] = data
            return prototype.buffer.from_bytes(data)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
            return [await self.get(key, prototype, part) for key, part in key_ranges]

        async def exists(self, key: str) -> bool:
            return await self.get(key, default_buffer_prototype()) is not None

        async def _refused(self, *_: Any) -> Any:
            raise PermissionError("Stores of fields are read only, and their index lists them")

        async def _not_listed(self, *_: Any) -> Any:
            await self._refused()
            yield

        set: Any = _refused
        delete: Any = _refused
        list: Any = _not_listed
        list_prefix: Any = _not_listed
        list_dir: Any = _not_listed

    return Chunks()


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ValueError(
            "Packed fields need the package zarr, which is not installed: run "
            "pip install '.[s3]' in the clone of DINOCell"
        ) from error
    return zarr
