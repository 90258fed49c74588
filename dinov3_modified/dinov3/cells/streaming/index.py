"""A list of fields that opens at once, however long it is (ours).

One Arrow file per selection, memory-mapped, so that all processes of a machine share its pages.  A
row is a field: plate, well, site, the common beginning of its file names, and the layout, which
holds the channels and the ends of their names.  Keys are put together when they are asked for.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from dinov3.cells.files import atomic_path

_VERSION = 1
_VAL_SHARE = 0.1
_MOST_LAYOUTS = 4096  # beyond these a layout is a row's own


@dataclass(frozen=True)
class FieldRecord:
    """One field."""

    plate: str  # `PROJECT/SOURCE/BATCH/PLATE`; plates of equal names in two batches stay apart
    well: str  # such as A01; empty where it is not known
    site: str  # number of the field in its well
    keys: Mapping[str, str]  # channel → key of its file in the store
    size_bytes: int = 0  # of all files, 0 where it is not known

    @property
    def name(self) -> str:
        """Key of the field: source, batch, plate, well and site."""
        return "/".join(part for part in (self.plate, self.well, self.site) if part)


def split_url(url: str) -> tuple[str, str]:
    """`s3://bucket/key` → (bucket, key); anything else → ("", as it is)."""
    if not url.startswith("s3://"):
        return "", url
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


def side_of_plate(plate: str, val_share: float = _VAL_SHARE) -> str:
    """ "train" or "val" of a plate, by a checksum of its name alone.

    Repeated images of a plate are near-duplicates, so a plate stays on one side in every batch.
    """
    # Image folders have the time of the measurement behind the name of the plate.
    name = plate.rpartition("/")[2].partition("__")[0]
    value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
    return "val" if value / 2**64 < val_share else "train"


@dataclass(eq=False)
class IndexWriter:
    """Collects fields and writes their index."""

    store: str  # URL that the keys belong to; kept for those who read the index
    source: str = ""  # what it was made from, in words

    def __post_init__(self) -> None:
        self.skipped: list[str] = []  # plates that were left out, by name
        self._seen: set[tuple[str, str, str]] = set()
        self._rows: list[tuple[str, str, str, str, int, int]] = []
        self._layouts: dict[tuple[tuple[str, str], ...], int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: FieldRecord) -> None:
        """Take a field; ValueError if it has no channel, or was added before."""
        if not record.keys:
            raise ValueError(f"Field {record.name} must have a channel, got none: leave it out")
        place = (record.plate, record.well, record.site)
        if place in self._seen:
            raise ValueError(
                f"Field {record.name} must appear once, got it twice: source, batch, plate, well and "
                "site must tell fields apart"
            )
        self._seen.add(place)
        keys = list(record.keys.values())
        if len(keys) > 1:
            stem = os.path.commonprefix(keys)  # noqa: RUF071 (of texts, not of paths)
        else:  # the number of the channel is in the end of the name, the field in its beginning
            stem = keys[0][: max(keys[0].rfind("/") + 1, len(keys[0]) - 24)]
        ends = [key[len(stem) :] for key in keys]
        if any("{" in end for end in ends) or sum(map(len, ends)) > 64 * len(ends):
            stem, ends = "", keys
        layout = tuple(zip(record.keys, ends, strict=True))
        if layout not in self._layouts and len(self._layouts) >= _MOST_LAYOUTS:
            # Names without a rule, such as GUIDs: all of them stand in the row itself.
            stem, layout = "\n".join(keys), tuple((channel, "{line}") for channel in record.keys)
        number = self._layouts.setdefault(layout, len(self._layouts))
        self._rows.append((record.plate, record.well, record.site, stem, number, record.size_bytes))

    def write(self, path: str | Path) -> None:
        """Write the index, whole or not at all; ValueError if no field was added."""
        import pyarrow as pa

        if not self._rows:
            raise ValueError("An index must hold a field, got none: select other plates")
        # Plates in one piece each, in the order of their names; within one by well and site.
        self._rows.sort(key=lambda row: (row[0], row[1], _natural(row[2])))
        plates = sorted({row[0] for row in self._rows})
        numbers = {plate: number for number, plate in enumerate(plates)}
        columns = list(zip(*self._rows, strict=True))
        arrays = {
            "plate": pa.array([numbers[plate] for plate in columns[0]], pa.int32()),
            "well": pa.array(columns[1]).dictionary_encode(),
            "site": pa.array(columns[2]).dictionary_encode(),
            "stem": pa.array(columns[3], pa.large_string()),
            "layout": pa.array(columns[4], pa.int32()),
            "bytes": pa.array(columns[5], pa.int64()),
        }
        facts = {"version": _VERSION, "store": self.store, "source": self.source, "plates": plates}
        facts["layouts"] = list(self._layouts)
        table = pa.table(arrays, metadata={"dinocell": json.dumps(facts)})
        with (
            atomic_path(path) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table.combine_chunks(), max_chunksize=len(self._rows))


@dataclass(frozen=True)
class RowRanges:
    """Chosen rows as ranges: a few numbers, not one a row."""

    starts: np.ndarray  # first row of each range
    ends: np.ndarray  # number of chosen rows up to the end of each range

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> Self:
        padded = np.zeros(len(mask) + 2, bool)
        padded[1:-1] = mask
        edges = np.flatnonzero(padded[1:] != padded[:-1])
        starts, stops = edges[::2], edges[1::2]
        return cls(starts, np.cumsum(stops - starts))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> int:
        if not 0 <= number < len(self):
            raise IndexError(f"A number must lie below {len(self)}, got {number}: count from 0")
        place = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[place - 1]) if place else 0
        return int(self.starts[place]) + number - before

    def first(self, count: int) -> Self:
        if count >= len(self):
            return self
        place = int(np.searchsorted(self.ends, count, side="left"))
        ends = self.ends[: place + 1].copy()
        ends[-1] = count
        return type(self)(self.starts[: place + 1], ends)


class FieldIndex:
    """An index file, memory-mapped.

    Raises FileNotFoundError, ValueError (no such file; not an index, or of a later version).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._open()

    def _open(self) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ValueError(
                "An index of fields needs the package pyarrow, which is not installed: run "
                "pip install '.[s3]' in the clone of DINOCell"
            ) from error
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"An index must be a file, got {self.path}: make one with `dinocell jump index`"
            )
        try:
            reader = pa.ipc.open_file(pa.memory_map(self.path))
            facts = json.loads(reader.schema.metadata[b"dinocell"])
            self._batch = reader.get_batch(0)
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"An index must be a file that `dinocell jump index` made, got {self.path}: make it again"
            ) from error
        if facts["version"] > _VERSION:
            raise ValueError(
                f"An index must have version {_VERSION} at most, got {facts['version']}: update dinocell"
            )
        self.store: str = facts["store"]  # URL that the keys belong to
        self.source: str = facts["source"]
        self.plates: list[str] = facts["plates"]  # `PROJECT/SOURCE/BATCH/PLATE` of each number
        # (channel, end of the file name) pairs of each layout number
        self.layouts: list[list[tuple[str, str]]] = [
            [(channel, end) for channel, end in layout] for layout in facts["layouts"]
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def __getitem__(self, row: int) -> FieldRecord:
        names = ("plate", "well", "site", "stem", "layout", "bytes")
        plate, well, site, stem, layout, size = (self._batch.column(n)[row].as_py() for n in names)
        pairs = self.layouts[layout]
        if pairs[0][1] == "{line}":
            keys = dict(zip((c for c, _ in pairs), stem.split("\n"), strict=True))
        else:
            keys = {channel: stem + end for channel, end in pairs}
        return FieldRecord(self.plates[plate], well, site, keys, size)

    def column(self, name: str) -> np.ndarray:
        """plate, layout or bytes of all rows, without a copy."""
        return np.asarray(self._batch.column(self._batch.schema.get_field_index(name)).to_numpy())

    def channels(self) -> list[str]:
        """Names of all channels that a field has, sorted."""
        return sorted({channel for layout in self.layouts for channel, _ in layout})

    def rows(self, *, split: str = "all", channels: Iterable[str] = ()) -> RowRanges:
        """Rows with all of these channels; `split` is all, train or val, see `side_of_plate`."""
        plate = self.column("plate")
        wanted = set(channels)
        complete = np.array([wanted <= {c for c, _ in layout} for layout in self.layouts])
        side = np.array([split in ("all", side_of_plate(plate)) for plate in self.plates])
        return RowRanges.of_mask(side[plate] & complete[self.column("layout")])


def _natural(text: str) -> Sequence[Any]:
    return (0, int(text), "") if text.isdigit() else (1, 0, text)
