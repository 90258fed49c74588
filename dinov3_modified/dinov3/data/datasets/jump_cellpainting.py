"""Cell Painting fields of local folders (ours): JUMP's layouts, any naming scheme, or an index.

Which channel a file holds is read from a table or from its name, never assumed: channel numbers
mean different stains at different sites.
"""

import csv
import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from dinov3.cells.checks import listed, one_of
from dinov3.cells.fields import (
    ChannelField,
    FieldError,
    decode_planes,
    make_field,
    read_illumination,
    split_channels,
)
from dinov3.cells.registry import transformed
from dinov3.data.datasets.extended import ExtendedVisionDataset

# File names of the microscopes behind JUMP: what makes a field, and the channel's number.
PATTERNS = {
    "harmony": r"(?P<well>r\d+c\d+)(?P<site>f\d+)(?P<plane>p\d+)-(?P<channel>ch\d+)\w*\.tiff?",
    "cellvoyager": r"(?P<plate>.+)_(?P<well>[A-P]\d{2})_T\d+(?P<site>F\d+)L\d+A\d+(?P<plane>Z\d+)"
    r"(?P<channel>C\d+)\.tif",
    "imagexpress": r"(?P<plate>.*?)_?(?P<well>[A-P]\d{2})_(?P<site>s\d+)_(?P<channel>w\d).*\.tif",
}
_SUFFIXES = {".tif", ".tiff", ".png", ".jpg", ".jpeg", ".npy"}
# Not stains of the cells; used only when they are asked for.
_LEFT_OUT = ("brightfield", "mask")
_VAL_SHARE = 0.1


class _Split(Enum):
    ALL = "all"
    TRAIN = "train"
    VAL = "val"


@dataclass
class FieldFiles:
    """Files of one field."""

    name: str  # key of the field; holds plate, well and site where they are known
    files: dict[str, str]  # channel → path below the root
    plate: str = ""  # fields of one plate stay on one side of a split
    split: str = ""  # "train", "val" or "" where the index says nothing
    pixel_size_um: float | None = None
    illumination: dict[str, str] = field(default_factory=dict)  # channel → path of a .npy


def find_fields(
    root: str | Path,
    *,
    index: str | None = None,
    pattern: str | None = None,
    channels_table: str | None = None,
) -> list[FieldFiles]:
    """Fields below a folder, sorted by name.

    Args:
        index: CSV with the columns field, file, channel, and perhaps plate, split, pixel_size_um,
            illumination; files are below the CSV's folder.  Without it, and without `pattern`,
            channels.csv of the root is taken if it is such a table.
        pattern: a name of `PATTERNS`, or a regular expression for file names with the groups
            `channel` and any others, which together make a field with the file's folder.
        channels_table: CSV with the columns number and channel (and perhaps plate), which names the
            channels of a pattern; without it they keep the names in the pattern.

    Raises:
        FileNotFoundError, FieldError: no folder or table; nothing is found, a table lacks a column.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"`root` must be a folder of fields, got {root}: check the path")
    if index is None and pattern is None and (folder / "channels.csv").is_file():
        index = str(folder / "channels.csv")
    if index is not None:
        path = Path(index) if Path(index).is_absolute() or Path(index).is_file() else folder / index
        fields = _from_index(path, folder)
    elif pattern is not None:
        fields = _from_pattern(folder, pattern, channels_table)
    else:
        raise FieldError(
            f"Something must say which file is which channel of which field, got neither the table "
            f"channels.csv in {root} nor `index` nor `pattern`: give a table as `index`, or a `pattern` "
            f"of file names ({', '.join(PATTERNS)}, or a regular expression)"
        )
    return sorted(fields, key=lambda item: item.name)


def _rows(path: Path, wanted: tuple[str, ...]) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"A table of fields or channels must be a CSV file that exists, got {path}: check `index` or "
            "`channels_table`, which are searched in the current folder and then in that of the fields"
        )
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        names = reader.fieldnames or []
        if missing := [name for name in wanted if name not in names]:
            raise FieldError(
                f"{path} must have the columns {', '.join(wanted)}, got {', '.join(names) or 'none'}: add "
                f"{', '.join(missing)}"
            )
        return list(reader)


def _from_index(path: Path, root: Path) -> list[FieldFiles]:
    found: dict[str, FieldFiles] = {}
    several: dict[tuple[str, str], list[str]] = {}
    base = path.parent
    for row in _rows(path, ("field", "file", "channel")):
        name, channel = row["field"], row["channel"]
        several.setdefault((name, channel), []).append(row["file"])
        side = (row.get("split") or "").lower()
        item = found.setdefault(name, FieldFiles(name, {}, row.get("plate") or "", side))
        if row.get("pixel_size_um"):
            item.pixel_size_um = float(row["pixel_size_um"])
        if row.get("illumination"):
            item.illumination[channel] = str(base / row["illumination"])
        item.files.setdefault(channel, str(base / row["file"]))
    # A "field" that lists one channel many times is a folder of single-channel fields.
    for (name, channel), files in several.items():
        if len(files) > 1 and channel.lower() not in _LEFT_OUT:
            item = found[name]
            if set(item.files) != {channel}:
                raise FieldError(
                    f"Field {name} must have one file a channel, got {len(files)} of {channel}: give each "
                    "field a name of its own"
                )
            del found[name]
            for file in files:
                single = f"{name}/{Path(file).stem}"
                found[single] = FieldFiles(
                    single, {channel: str(base / file)}, item.plate, item.split, item.pixel_size_um
                )
    if not found:
        raise FieldError(f"{path} must list fields, got no row: add one row for each file")
    return list(found.values())


def _from_pattern(root: Path, pattern: str, channels_table: str | None) -> list[FieldFiles]:
    try:
        expression = re.compile(PATTERNS.get(pattern, pattern))
    except re.error as error:
        raise FieldError(
            f"`pattern` must be {', '.join(PATTERNS)} or a regular expression, got {pattern!r} ({error}): "
            "correct it"
        ) from error
    if "channel" not in expression.groupindex:
        raise FieldError(
            f"`pattern` must have a group (?P<channel>...), got {pattern!r}: mark the channel in it"
        )
    names: dict[tuple[str, str], str] = {}
    if channels_table is not None:
        path = Path(channels_table)
        for row in _rows(path if path.is_file() else root / path, ("number", "channel")):
            names[row.get("plate") or "", row["number"]] = row["channel"]
    found: dict[str, FieldFiles] = {}
    paths = [p for p in sorted(root.rglob("*")) if p.suffix.lower() in _SUFFIXES and p.is_file()]
    for path in paths:
        match = expression.fullmatch(path.name)
        if match is None:
            continue
        groups = match.groupdict()
        number = groups.pop("channel")
        folder = path.parent.relative_to(root).as_posix()
        plate = groups.get("plate") or (folder if folder != "." else "")
        channel = names.get((plate, number), names.get(("", number), number))
        if channels_table is not None and channel == number:
            raise FieldError(
                f"{channels_table} must name every channel, got no row for {number} of {path.name}: add a row for this number"
            )
        key = "/".join(part for part in (folder, *groups.values()) if part and part != ".")
        item = found.setdefault(key, FieldFiles(key, {}, plate))
        if channel in item.files:
            raise FieldError(
                f"Field {key} must have one file a channel, got {Path(item.files[channel]).name} and "
                f"{path.name} for {channel}: add a group to the pattern that tells them apart"
            )
        item.files[channel] = str(path)
    if not found:
        raise FieldError(
            f"{root} must hold files that match the pattern {pattern!r}, got {len(paths)} images and no "
            "match: correct the pattern"
        )
    return list(found.values())


def checked_percentiles(low: float, high: float) -> tuple[float, float]:
    """Both, if they are 0 <= low < high <= 100; else ValueError."""
    if not 0 <= low < high <= 100:
        raise ValueError(
            f"Percentiles must be 0 <= low < high <= 100, got {low} and {high}: 0.1 and 99.9 are usual"
        )
    return low, high


class JUMPCellPaintingMultiView(ExtendedVisionDataset):
    """Fields with all their channels, for `DataAugmentationMultiView`.

    Args:
        root: folder of the data.
        split: ALL, TRAIN or VAL: by the index's column, else a tenth of the plates (of the fields,
            where no plate is known) by a checksum of their names.
        extra: folder of illumination images CHANNEL.npy, for all fields.
        index, pattern, channels_table: see `find_fields`.
        channels: names joined by +, in the order wanted; all but bright field and masks by default.
        missing: of a field that lacks one of `channels`: `error`, `skip` the field, or `allow` it
            with what it has.
        percentile_low, percentile_high: intensities that become 0 and 1.
        pixel_size_um: of all fields, where the index does not tell.
        cache_mb: memory of each process for fields that were read.
        limit: use the first so many fields.

    Raises:
        FileNotFoundError, FieldError: see `find_fields`; no field is left, a channel is missing.
    """

    Split = _Split
    # Images are `ChannelField`s, for `DataAugmentationMultiView`.
    gives_fields = True
    STRING_OPTIONS = {  # noqa: RUF012
        "index": str, "pattern": str, "channels_table": str, "channels": str, "missing": str,
        "percentile_low": float, "percentile_high": float, "pixel_size_um": float,
        "cache_mb": int, "limit": int,
    }  # fmt: skip

    def __init__(
        self,
        *,
        root: str,
        split: _Split | str = _Split.ALL,
        extra: str | None = None,
        index: str | None = None,
        pattern: str | None = None,
        channels_table: str | None = None,
        channels: str | None = None,
        missing: str = "error",
        percentile_low: float = 0.1,
        percentile_high: float = 99.9,
        pixel_size_um: float | None = None,
        cache_mb: int = 512,
        limit: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root=root, **kwargs)
        one_of("missing", missing, ("error", "skip", "allow"))
        split = _Split[split] if isinstance(split, str) else split
        self.percentiles = checked_percentiles(percentile_low, percentile_high)
        self.pixel_size_um = pixel_size_um
        self.illumination_folder = extra
        self.cache_bytes = cache_mb * 2**20
        self._cache: OrderedDict[tuple[tuple[str, str], ...], ChannelField] = OrderedDict()
        found = find_fields(root, index=index, pattern=pattern, channels_table=channels_table)
        if split is not _Split.ALL:
            found = [item for item in found if _side(item) in (split.value, "all")]
        if not found:
            raise FieldError(
                f"Split {split.name} of {root} must hold fields, got none: use ALL, or give the index a "
                "column split"
            )
        self.channels = tuple(channels.split("+")) if channels else None
        self.fields = self._chosen(found, missing)[:limit]

    def _chosen(self, found: list[FieldFiles], missing: str) -> list[FieldFiles]:
        """Fields with the wanted channels."""
        known = sorted({channel for item in found for channel in item.files})
        wanted = self.channels or tuple(c for c in known if c.lower() not in _LEFT_OUT)
        if absent := [c for c in wanted if _stem(c) not in known and c not in known]:
            raise FieldError(
                f"`channels` must be among {', '.join(known)}, got {', '.join(absent)}: correct channels="
            )
        chosen, lacking = [], []
        for item in found:
            files = {c: item.files[c] for c in wanted if c in item.files}
            stems = [_stem(c) for c in wanted if c not in item.files]
            files |= {stem: item.files[stem] for stem in stems if stem in item.files}
            complete = all(c in files or _stem(c) in files for c in wanted)
            if not complete and missing != "allow":
                lacking.append(item.name)
                continue
            if files:
                chosen.append(FieldFiles(**{**vars(item), "files": files}))
        if lacking and missing == "error":
            raise FieldError(
                f"All fields must have the channels {', '.join(wanted)}, got {len(lacking)} without: "
                f"{listed(lacking)}; name other channels=, or set missing=skip or missing=allow"
            )
        if not chosen:
            raise FieldError(f"Fields with {', '.join(wanted)} must exist, got none: set channels=")
        return chosen

    def get_image_data(self, index: int) -> Any:
        return {c: Path(path).read_bytes() for c, path in self.fields[index].files.items()}

    def get_target(self, index: int) -> tuple[()]:
        return ()

    def get_sample_name(self, index: int) -> str:
        return self.fields[index].name

    def get_sample_channels(self, index: int) -> tuple[str, ...]:
        """Channels of a field that have files."""
        return tuple(self.fields[index].files)

    def load_field(self, index: int) -> ChannelField:
        """Read a field, or take it from this process's cache.

        A plane that is unreadable, constant, or of another size than the others raises FieldError.
        """
        item = self.fields[index]
        # By file, so that a field that an index lists often (to be seen often) is held once.
        key = tuple(item.files.items())
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        planes: dict[str, np.ndarray] = {}
        for channel, data in self.get_image_data(index).items():
            read = decode_planes(data, f"{item.name} ({channel})")
            planes |= split_channels(item.name, read, channel)
        if wanted := self.channels:
            planes = {c: p for c, p in planes.items() if c in wanted or _stem(c) in wanted}
        paths = item.illumination
        if self.illumination_folder is not None:
            paths = {c: str(Path(self.illumination_folder) / f"{c}.npy") for c in planes}
        made = make_field(
            item.name,
            planes,
            illumination=read_illumination(paths) if paths else None,
            pixel_size_um=item.pixel_size_um or self.pixel_size_um,
            percentiles=self.percentiles,
        )
        self._cache[key] = made
        total = sum(kept.nbytes for kept in self._cache.values())
        while total > self.cache_bytes and len(self._cache) > 1:
            total -= self._cache.popitem(last=False)[1].nbytes
        return made

    def _image(self, index: int) -> Any:
        return self.load_field(index)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return transformed(self, self._image(index), self.get_target(index))

    def __getstate__(self) -> dict[str, Any]:
        # Each process fills its own cache.
        return {**self.__dict__, "_cache": OrderedDict()}

    def __len__(self) -> int:
        return len(self.fields)


class JUMPCellPainting(JUMPCellPaintingMultiView):
    """The mean of a field's channels as an RGB picture, for upstream's augmentation."""

    gives_fields = False

    def _image(self, index: int) -> np.ndarray:
        made = self.load_field(index)
        height, width = made.planes.shape[1:]
        gray = np.rint(made.window(None, 0, 0, height, width) * 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)


def _stem(channel: str) -> str:
    """Channel of the file that holds this plane: rgb of rgb_0."""
    return re.sub(r"_\d+$", "", channel)


def _side(item: FieldFiles) -> str:
    """ "train" or "val" of a field."""
    if item.split:
        return "val" if item.split.startswith("val") else item.split
    key = item.plate or item.name
    value = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return "val" if value / 2**64 < _VAL_SHARE else "train"
