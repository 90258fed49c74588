"""Fields of a folder, read one at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from dinocell.errors import DataSetError, raised_as
from dinocell.probing.feature_extraction import FieldImage
from dinocell.training.datasets import spread_evenly


@dataclass(frozen=True)
class FieldSource:
    """Fields that are read one at a time, by their place among the names."""

    names: list[str]
    read: Callable[[int], FieldImage]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[FieldImage]:
        return (self.read(index) for index in range(len(self.names)))

    def spread(self, count: int | None) -> Self:
        """At most `count` of these fields, spread evenly over the names; None keeps all."""
        kept = spread_evenly(range(len(self)), count)
        names = [self.names[place] for place in kept]
        return replace(self, names=names, read=lambda place: self.read(kept[place]))


@dataclass(frozen=True)
class FieldOptions:
    """How files become channels of fields."""

    index: str | os.PathLike[str] | None = None  # CSV with the columns field, file, channel
    # `harmony`, `cellvoyager`, `imagexpress`, or a regular expression with the group `channel`
    pattern: str | None = None
    # CSV with the columns number, channel: names for the numbers that a pattern finds
    channels_table: str | os.PathLike[str] | None = None
    # only these, in any case of letters; by default all but bright field and masks
    channels: Sequence[str] | None = None


def open_fields(data: str | os.PathLike[str], options: FieldOptions | None = None) -> FieldSource:
    """Fields of a folder: by an index file, by its own `channels.csv`, or by a pattern of names.

    Raises DataSetError (the folder or a table does not exist, or no field is found; later, a field
    cannot be read).
    """
    options = options or FieldOptions()
    index, channels_table, channels = options.index, options.channels_table, options.channels
    root = Path(data)
    if not root.is_dir():
        raise DataSetError(f"`data` must be a folder of fields, got {root}: check the path")
    for name, table in (("index", index), ("channels_table", channels_table)):
        if table is not None and not Path(table).is_file():
            raise DataSetError(f"`{name}` must be a CSV file, got {table}: check the path")
    from dinov3.data.datasets import jump_cellpainting as module

    reading: dict[str, Any] = {
        "index": None if index is None else os.fspath(Path(index).resolve()),
        "pattern": options.pattern,
        "channels_table": None if channels_table is None else str(Path(channels_table).resolve()),
    }
    with raised_as(DataSetError, ValueError, OSError):
        if channels is not None:
            found = module.find_fields(os.fspath(root), **reading)
            known = {name.lower(): name for item in found for name in item.files}
            reading["channels"] = "+".join(known.get(name.lower(), name) for name in channels)
        dataset = module.JUMPCellPaintingMultiView(root=os.fspath(root), missing="allow", **reading)

    def read(place: int) -> FieldImage:
        with raised_as(DataSetError, ValueError, OSError):
            item = dataset.load_field(place)
        planes = item.planes
        if item.illumination is not None:
            planes = planes / item.illumination
        return FieldImage(item.name, tuple(item.channels), planes)

    names = [dataset.get_sample_name(place) for place in range(len(dataset))]
    return FieldSource(names, read)
