"""Fields packed into a Zarr group: one chunk a field, many chunks a file (ours).

Zarr v3 with its sharding codec: other programs open it, any field is one read, and a directory of
millions of fields has thousands of files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.data.fields import ChannelField
from dinov3.data.streaming.index import FieldRecord, IndexWriter

__all__ = ["PackOptions", "ShardReader", "pack_fields"]

_INDEX = "fields.arrow"
_GROUP = "fields.zarr"


@dataclass(frozen=True)
class PackOptions:
    """How fields are stored.

    Attributes:
        bits: 16 as they came, or 8: scaled from the field's percentile range to 0 ... 255.
        crop_px: of the centre; 0: all.
        scale: enlargement, such as 0.5, by area averaging.
        per_file: fields of a file.
        level: of Zstandard, 1 to 22.
    """

    bits: int = 16
    crop_px: int = 0
    scale: float = 1.0
    per_file: int = 64
    level: int = 5

    def __post_init__(self) -> None:
        if self.bits not in (8, 16):
            raise ValueError(f"--bits must be 8 or 16, got {self.bits}: choose one")
        if self.crop_px < 0:
            raise ValueError(f"--crop must be 0 or more, got {self.crop_px}: 0 keeps all")
        if not 0 < self.scale <= 1:
            raise ValueError(f"--scale must be above 0 and at most 1, got {self.scale}: correct it")
        if self.per_file < 1:
            raise ValueError(f"--per-file must be at least 1, got {self.per_file}: raise it")
        if not 1 <= self.level <= 22:
            raise ValueError(f"--level must be 1 to 22, got {self.level}: 5 is usual")


def pack_fields(
    fields: Iterable[tuple[FieldRecord, ChannelField]],
    out: str | Path,
    options: PackOptions,
    *,
    progress: Callable[[str], None] | None = None,
) -> int:
    """Write fields as shards and their index; the folder appears whole or not at all.

    Args:
        fields: in the order wanted; each may have another size, each size gets an array of its own.
        out: folder that does not exist; gets `fields.zarr` and `fields.arrow`.
        progress: called with the name of each field.

    Returns:
        Number of fields.

    Raises:
        FileExistsError: the folder is there.
        ValueError: no field; a crop that is larger than a field.
    """
    zarr = _zarr()
    out = Path(out)
    if out.exists():
        raise FileExistsError(
            f"the output folder must not exist, got {out}: name another, or remove it"
        )
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        group = zarr.open_group(str(part / _GROUP), mode="w", zarr_format=3)
        writer = IndexWriter(str(out.resolve()), "packed")
        waiting: dict[str, list[tuple[FieldRecord, tuple[str, ...], np.ndarray]]] = {}
        count = 0
        for record, made in fields:
            planes = _shaped(made, options)
            kind = "x".join(map(str, planes.shape))
            waiting.setdefault(kind, []).append((record, made.channels, planes))
            if len(waiting[kind]) == options.per_file:
                _append(group, kind, waiting.pop(kind), writer, options)
            count += 1
            if progress is not None:
                progress(record.name)
        for kind, rest in waiting.items():
            _append(group, kind, rest, writer, options)
        writer.write(part / _INDEX)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return count


def _shaped(made: ChannelField, options: PackOptions) -> np.ndarray:
    planes = made.planes
    height, width = planes.shape[1:]
    if options.crop_px:
        size = options.crop_px
        if size > min(height, width):
            raise ValueError(
                f"--crop must fit into the fields, got {size} for {made.name} of {height} x {width} px: "
                "lower it"
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
    from zarr.codecs import BloscCodec

    shape = rows[0][2].shape
    if kind not in group:
        group.create_array(
            kind,
            shape=(0, *shape),
            chunks=(1, *shape),
            shards=(options.per_file, *shape),
            dtype=rows[0][2].dtype,
            compressors=BloscCodec(cname="zstd", clevel=options.level, shuffle="bitshuffle"),
        )
    array = group[kind]
    begin = array.shape[0]
    array.resize((begin + len(rows), *shape))
    array[begin:] = np.stack([planes for _, _, planes in rows])
    for number, (record, channels, planes) in enumerate(rows):
        # Every channel of a field has the same key: they are one chunk.
        key = f"{_GROUP}/{kind}#{begin + number}"
        keys = {channel: f"{key}:{place}" for place, channel in enumerate(channels)}
        writer.add(FieldRecord(record.plate, record.well, record.site, keys, int(planes.nbytes)))


class ShardReader:
    """Fields of a packed folder; may be copied to other processes.

    Args:
        folder: that `pack_fields` made, or a copy of it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._arrays: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_arrays": {}}

    @staticmethod
    def holds(key: str) -> bool:
        """Whether a key of an index is one of packed fields."""
        return ".zarr/" in key and "#" in key

    def planes(self, keys: dict[str, str]) -> dict[str, np.ndarray]:
        """Planes by channel of one field.

        Raises:
            ValueError: the folder lacks them, or a chunk is damaged.
        """
        first = next(iter(keys.values()))
        path, _, place = first.partition("#")
        row = int(place.partition(":")[0])
        try:
            if path not in self._arrays:
                self._arrays[path] = _zarr().open_array(str(Path(self.folder) / path), mode="r")
            planes = self._arrays[path][row]
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{first} must be in {self.folder}, got none ({reason})") from error
        return {channel: planes[int(key.rpartition(":")[2])] for channel, key in keys.items()}


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ValueError(
            "packed fields need the package zarr, got none: pip install 'dinocell[s3]'"
        ) from error
    return zarr
