"""Fields of a Cell Painting Gallery: from its load_data tables, or from a listing (ours).

Layout of the bucket: PROJECT/SOURCE/images/BATCH/images/FULL_PLATE/Images/FILE and
PROJECT/SOURCE/workspace/load_data_csv/BATCH/PLATE/load_data*.  Channel numbers mean other stains at
other sources, so only a table says what a file shows.
"""

import csv
import fnmatch
import gzip
import io
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.cells.checks import one_of
from dinov3.cells.files import write_text_atomically
from dinov3.cells.streaming.index import FieldRecord, IndexWriter, split_url
from dinov3.cells.streaming.store_options import ObjectForbidden, ObjectMissing
from dinov3.cells.streaming.stores import ObjectStore
from dinov3.data.datasets.jump_cellpainting import PATTERNS

logger = logging.getLogger("dinov3")

_TABLES = (
    "load_data_with_illum.parquet", "load_data.parquet", "load_data.csv.gz", "load_data.csv",
    "load_data_with_illum.csv.gz", "load_data_with_illum.csv",
)  # fmt: skip
_FILE_COLUMN = re.compile(r"FileName_Orig(?P<channel>\w+)")


JUMP_LITE = {
    "images": "cpg0016-jump/source_all/images/2026_jump_lite_v1.0/images_compressed",
    "table": "cpg0016-jump/source_all/workspace/publication_data/2026_jump_lite/metadata/v1.0/"
    "jump_lite_site_index.parquet",
    "masks": "cpg0016-jump/source_all/workspace/publication_data/2026_jump_lite/segmentation/"
    "2026_jump_lite_v1.0/{kind}_masks/zstd.zarr",
}
"""Where the gallery keeps JUMP-Lite (release 1.0): arrays of one field each, their list, and the
labels that Cellpose gave them."""
_JUMP_LITE_CHANNELS = ("AGP", "DNA", "ER", "Mito", "RNA")
_JUMP_LITE_CODECS = ("zstd", "jpegxl_lossy_hq", "jpegxl_lossy_mq", "jpegxl_lossy_d20")


@dataclass(frozen=True)
class PlateFolder:
    """A plate of the store, by the names of its folders."""

    project: str
    source: str
    batch: str
    plate: str  # the short name of the tables
    tables: str = ""  # folder of its load_data files, ends with a slash; empty where there are none
    images: str = ""  # folder of its images, ends with a slash; empty where it is not known

    @property
    def name(self) -> str:
        """PROJECT/SOURCE/BATCH/PLATE."""
        return "/".join((self.project, self.source, self.batch, self.plate))


def find_plates(store: ObjectStore, selection: str) -> list[PlateFolder]:
    """Plates that match `PROJECT/SOURCE/BATCH/PLATE`, each a name or a pattern with * and ?.

    Another form, or no such plate, raises ValueError, which names what there is.
    """
    parts = selection.strip("/").split("/")
    if len(parts) > 4 or not all(parts):
        raise ValueError(
            f"A selection must be PROJECT/SOURCE/BATCH/PLATE with * where any will do, got {selection!r}: "
            "shorten it"
        )
    project_p, source_p, batch_p, plate_p = [*parts, *["*"] * (4 - len(parts))]
    found: list[PlateFolder] = []
    seen: dict[str, list[str]] = {}

    def below(prefix: str, pattern: str, level: str) -> list[str]:
        if not set("*?[") & set(pattern):
            return [pattern]
        names = store.folders(prefix)
        seen.setdefault(level, []).extend(names)
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]

    for project in below("", project_p, "projects"):
        for source in below(f"{project}/", source_p, "sources"):
            tables = f"{project}/{source}/workspace/load_data_csv/"
            images = f"{project}/{source}/images/"
            for batch in below(images, batch_p, "batches"):
                with_tables = store.folders(f"{tables}{batch}/")
                with_images = store.folders(f"{images}{batch}/images/")
                seen.setdefault("plates", []).extend(with_tables or with_images)
                folder, names = f"{images}{batch}/images/", (project, source, batch)
                for plate in with_tables:
                    if fnmatch.fnmatchcase(plate, plate_p):
                        own = next((f for f in with_images if plate in (f, _short(f))), None)
                        where = "" if own is None else f"{folder}{own}/"
                        found.append(PlateFolder(*names, plate, f"{tables}{batch}/{plate}/", where))
                for full in with_images:
                    both = (full, _short(full))
                    if not set(both) & set(with_tables) and any(
                        fnmatch.fnmatchcase(name, plate_p) for name in both
                    ):
                        found.append(PlateFolder(*names, full, "", f"{folder}{full}/"))
    if not found:
        filled = ((level, names) for level, names in reversed(seen.items()) if names)
        level, there = next(filled, ("nothing", ["nothing below it"]))
        raise ValueError(
            f"A selection must match plates of {store.options.url}, got none for {selection!r}: choose "
            f"among these {level}: {', '.join(sorted(set(there))[:8])}"
        )
    return sorted(found, key=lambda one: (one.project, one.source, one.batch, one.plate))


def _short(full: str) -> str:
    """BR00116991 of BR00116991__2020-11-05T19_51_35-Measurement1."""
    return full.partition("__")[0]


def records_of_table(
    rows: Iterable[Mapping[str, Any]], plate: PlateFolder
) -> Iterator[FieldRecord]:
    """Fields of a load_data table; ValueError if it does not name files, or where they are.

    A channel without a file name is left out of its field; a field without any is skipped.
    """
    for row in rows:
        keys = {}
        columns = [match for match in map(_FILE_COLUMN.fullmatch, row) if match]
        if not columns:
            raise ValueError(
                f"A load_data table must have FileName_Orig columns, got {', '.join(list(row)[:8])} in "
                f"{plate.tables}: choose `kind=listing`"
            )
        for match in columns:
            channel, name = match["channel"], _text(row[match[0]])
            if name:
                keys[channel] = _key(row, channel, name, plate)
        if keys:
            well, site = (_text(row.get(f"Metadata_{name}")) for name in ("Well", "Site"))
            yield FieldRecord(plate.name, well, site, dict(sorted(keys.items())))


def _text(value: Any) -> str:
    """Tables give numbers, texts and blanks for one and the same column."""
    if value is None or value != value:  # nan
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _key(row: Mapping[str, Any], channel: str, name: str, plate: PlateFolder) -> str:
    url = _text(row.get(f"URL_Orig{channel}"))
    if url:
        key = split_url(url)[1]
        return key if key.endswith(name) else f"{key.rstrip('/')}/{name}"
    path = _text(row.get(f"PathName_Orig{channel}"))
    if path.startswith("s3://"):
        return f"{split_url(path)[1].rstrip('/')}/{name}"
    if plate.images:
        # The path is that of a computer that made the table: only what is below the plate counts.
        parts = path.replace("\\", "/").strip("/").split("/")
        full = plate.images.strip("/").rpartition("/")[2]
        below = parts[parts.index(full) + 1 :] if full in parts else ["Images"]
        return plate.images + "/".join([*below, name])
    raise ValueError(
        f"A load_data table must say where {name} is, got no URL_Orig{channel} and no image folder of "
        f"{plate.name}: choose `kind=listing`"
    )


def records_of_listing(
    keys: Iterable[tuple[str, int]], plate: PlateFolder, channels: Mapping[str, str]
) -> Iterator[FieldRecord]:
    """Fields of the files below a plate's folder, by the names that microscopes give.

    `keys`: (key, bytes).  `channels`: number in the file name, such as ch1, C01 or w1 → channel.
    Files of other numbers are left out.  No file of a known name, or two for one channel, raise
    ValueError.
    """
    expressions = [re.compile(pattern) for pattern in PATTERNS.values()]
    fields: dict[tuple[str, str], tuple[dict[str, str], int]] = {}
    files = unknown = 0
    for key, size in keys:
        base = key.rpartition("/")[2]
        if not base.lower().endswith((".tif", ".tiff")):
            continue
        files += 1
        match = next(filter(None, (e.fullmatch(base) for e in expressions)), None)
        if match is None:
            unknown += 1
            continue
        groups = match.groupdict()
        if (channel := channels.get(groups["channel"])) is None:
            continue
        site = _number(groups["site"])
        depth = _number(groups.get("plane") or "1")
        if depth != "1":
            site = f"{site}z{depth}"  # another focal plane is another field
        place = (_well(groups["well"]), site)
        found, total = fields.setdefault(place, ({}, 0))
        if channel in found:
            raise ValueError(
                f"A field must have one file a channel, got {found[channel]} and {key} for {channel}: "
                "their names do not tell them apart"
            )
        found[channel] = key
        fields[place] = (found, total + size)
    if not fields:
        raise ValueError(
            f"{plate.name} must have files of known names ({', '.join(PATTERNS)}) and channels, got "
            f"{files} images, {unknown} of other names: check the `channels_table`"
        )
    for (well, site), (found, total) in sorted(fields.items()):
        yield FieldRecord(plate.name, well, site, dict(sorted(found.items())), total)


def _number(text: str) -> str:
    digits = re.sub(r"\D", "", text)
    return str(int(digits)) if digits else text


def _well(text: str) -> str:
    """A01 of r01c01."""
    match = re.fullmatch(r"r(\d+)c(\d+)", text)
    if match is None:
        return text
    row, column = int(match[1]), int(match[2])
    letters = chr(64 + row) if row <= 26 else "A" + chr(64 + row - 26)
    return f"{letters}{column:02d}"


def _read_table(store: ObjectStore, folder: str) -> list[dict[str, Any]] | None:
    names = {key.rpartition("/")[2] for key, _ in store.keys(folder)}
    for name in _TABLES:
        if name not in names:
            continue
        try:
            data = store.get(f"{folder}{name}")
        except ObjectForbidden:  # a listing in its place would be another index
            raise
        except ObjectMissing:
            continue
        assert isinstance(data, bytes)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
        text = gzip.decompress(data) if name.endswith(".gz") else data
        return list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"))))
    return None


def make_index(
    store: ObjectStore,
    plates: Iterable[PlateFolder],
    out: str | Path,
    *,
    kind: str = "auto",
    channels: Mapping[str, Mapping[str, str]] | None = None,
    threads: int = 16,
    progress: Callable[[str, int], None] | None = None,
) -> IndexWriter:
    """Make an index of plates, several at once; plates that are done are kept when it is stopped.

    Args:
        out: file of the index; beside it `OUT.plates/` holds finished plates until all are.
        kind: tables, listing, or auto: tables where there are any.
        channels: source (or "") → number in file names → channel, for listings.
        progress: called with each finished plate and its number of fields.

    Returns what was written.  ValueError: no field; no table, and no channels for a listing.
    """
    one_of("kind", kind, ("auto", "tables", "listing"))
    out, plates, channels = Path(out), list(plates), channels or {}
    kept = _KeptPlates(out.with_name(f"{out.name}.plates"), store, kind, channels)
    skipped: list[str] = []
    writer = IndexWriter(store.options.url, f"{len(plates)} plates, {kind}")
    with ThreadPoolExecutor(threads) as pool:
        pending = {pool.submit(kept.make, plate): plate for plate in plates}
        try:
            for done in as_completed(list(pending)):
                plate = pending.pop(done)  # so that its result can go
                try:
                    rows = kept.rows(done.result()) or []
                except _WithoutChannels as error:
                    if kind != "auto":
                        raise
                    logger.warning("A plate was left out: %s", error)
                    skipped.append(plate.name)
                    continue
                for row in rows:
                    writer.add(FieldRecord(*row))
                if progress is not None:
                    progress(plate.name, len(rows))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if plates and len(skipped) == len(plates):
        raise ValueError(
            f"Plates must have a load_data table or known channels, got {len(skipped)} without "
            f"({skipped[0]}): give a `channels_table` with the columns source, number, channel"
        )
    writer.write(out)
    shutil.rmtree(kept.folder)
    writer.skipped = sorted(skipped)
    return writer


@dataclass
class _KeptPlates:
    """Finished plates in a folder, so that an index that was interrupted continues with the others."""

    folder: Path
    store: ObjectStore
    source: str
    channels: Mapping[str, Mapping[str, str]]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # What a plate was made with: one that was kept by another call must not slip in.
        numbers = {k: dict(v) for k, v in self.channels.items()}
        origin = (self.store.options.url, self.store.options.endpoint, self.source)
        self.made_with = json.dumps([*origin, numbers], sort_keys=True)

    def rows(self, kept: Path) -> list[Any] | None:
        """Fields of a plate's file; None where there is none of this call's settings."""
        try:
            content = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        fits = isinstance(content, dict) and content.get("made_with") == self.made_with
        return content["rows"] if fits else None

    def make(self, plate: PlateFolder) -> Path:
        """The file of a plate, read from the store unless it was kept."""
        kept = self.folder / f"{plate.name.replace('/', '__')}.json"
        if self.rows(kept) is None:
            records = _records(self.store, plate, self.source, self.channels)
            rows = [[r.plate, r.well, r.site, dict(r.keys), r.size_bytes] for r in records]
            write_text_atomically(kept, json.dumps({"made_with": self.made_with, "rows": rows}))
        return kept


class _WithoutChannels(ValueError):
    """A plate that can only be listed, of a source whose channel numbers are not known."""


def _records(
    store: ObjectStore, plate: PlateFolder, source: str, channels: Mapping[str, Mapping[str, str]]
) -> Iterator[FieldRecord]:
    if source in ("auto", "tables") and plate.tables:
        table = _read_table(store, plate.tables)
        if table is not None:
            yield from records_of_table(table, plate)
            return
    if source == "tables":
        raise ValueError(f"{plate.name} must have a load_data table, got none: use `kind=listing`")
    numbers = channels.get(plate.source) or channels.get("")
    if not numbers:
        raise _WithoutChannels(
            f"A listing of {plate.name} must know the channels, got no row for {plate.source}: give "
            "a `channels_table` with the columns source, number, channel"
        )
    if not plate.images:
        raise ValueError(f"{plate.name} must have an image folder, got none: check the selection")
    yield from records_of_listing(store.keys(plate.images), plate, numbers)


def records_of_jump_lite(
    rows: Iterable[Mapping[str, Any]], codec: str, selection: str = "*"
) -> Iterator[FieldRecord]:
    """Fields of JUMP-Lite's list of sites; ValueError for an unknown codec or a missing column.

    Args:
        rows: with source, batch, plate, well and site, perhaps with `Metadata_` before.
        codec: zstd (lossless), jpegxl_lossy_hq, jpegxl_lossy_mq or jpegxl_lossy_d20.
        selection: `PROJECT/SOURCE/BATCH/PLATE` with * and ?, later parts may be left out.
    """
    one_of("codec", codec, _JUMP_LITE_CODECS)
    pattern = selection.strip("/")
    for row in rows:
        lower = {str(name).lower().removeprefix("metadata_"): name for name in row}
        parts = {}
        for name in ("source", "batch", "plate", "well", "site"):
            if name not in lower:
                raise ValueError(
                    f"JUMP-Lite's list must have the column {name}, got {list(row)}: check the `table`"
                )
            parts[name] = _text(row[lower[name]])
        plate = "/".join(("cpg0016-jump", parts["source"], parts["batch"], parts["plate"]))
        if not any(fnmatch.fnmatchcase(plate, p) for p in (pattern, f"{pattern}/*")):
            continue
        array = f"{JUMP_LITE['images']}/{codec}.zarr/{'__'.join(parts.values())}"
        keys = {c: f"{array}#:{place}" for place, c in enumerate(_JUMP_LITE_CHANNELS)}
        yield FieldRecord(plate, parts["well"], parts["site"], keys)
