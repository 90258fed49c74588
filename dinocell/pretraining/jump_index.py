"""Indexes of a Cell Painting bucket: make one from the bucket's tables, and count what it holds."""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinocell.errors import UsageError, some
from dinocell.files import atomic_path
from dinocell.pretraining.jump_fields import streaming_errors
from dinocell.progress import progress
from dinocell.results.table import align_columns

if TYPE_CHECKING:
    from dinov3.cells.streaming.stores import ObjectStore
    from dinov3.data.datasets.jump_s3 import StreamOptions

BUCKET = "s3://cellpainting-gallery"
"""The Cell Painting Gallery: public, in us-east-1."""


@dataclass(frozen=True)
class IndexSource:
    """Where an index takes the fields of a plate from."""

    kind: str = "auto"
    """`tables` (load_data tables), `listing` (names of the image files), `auto` (tables where a plate
    has them, else the listing), or `jump-lite`."""
    channels_table: str | Path | None = None
    """For listings: CSV with number and channel, and perhaps source: the channel of a file's number."""
    table: str | Path | None = None  # JUMP-Lite's table of sites; by default fetched from the store
    codec: str = "zstd"  # of JUMP-Lite: or jpegxl_lossy_hq, jpegxl_lossy_mq, jpegxl_lossy_d20


def index_plates(
    selection: str,
    out: str | Path,
    source: IndexSource | None = None,
    *,
    store: "StreamOptions | None" = None,
    threads: int = 16,
    overwrite: bool = False,
) -> str:
    """Make the index of the plates of a selection.

    Parameters
    ----------
    selection : `PROJECT/SOURCE/BATCH/PLATE`; * stands for any text, and later parts may be left out
    out : index file.  If the call is interrupted, finished plates are kept beside it for the next
        call.
    store : how the store is read; `BUCKET` by default
    threads : plates that are read at the same time
    overwrite : replace an existing index

    Returns what was written, and which plates were left out.

    Raises UsageError, DINOCellError (no plate matches, no table names the channels, or `out`
    exists; the store cannot be read).
    """
    from dinov3.cells.streaming import discovery, stores
    from dinov3.data.datasets.jump_s3 import StreamOptions

    out, source = Path(out), source or IndexSource()
    if out.exists() and not overwrite:
        raise UsageError(
            f"`overwrite` must be set to replace an existing index, got {out}: set it, or rename"
        )
    table = source.channels_table
    channels = None if table is None else _channel_numbers(Path(table))
    with streaming_errors():
        reader = stores.ObjectStore((store or StreamOptions()).of_store(BUCKET))
        if source.kind == "jump-lite":
            return _index_jump_lite(reader, selection, out, source)
        plates = discovery.find_plates(reader, selection)
        with progress("plates", len(plates)) as bar:
            writer = discovery.make_index(
                reader,
                plates,
                out,
                kind=source.kind,
                channels=channels,
                threads=threads,
                progress=lambda name, count: bar.advance(note=f"{name}: {count} fields"),
            )
    text = f"{out}: {len(writer)} fields of {len(plates) - len(writer.skipped)} plates"
    if writer.skipped:
        text += (
            f"\nleft out: {len(writer.skipped)} plates without a load_data table and without known "
            f"channels ({some(writer.skipped)}); a `channels_table` includes them"
        )
    return text


def _index_jump_lite(reader: "ObjectStore", selection: str, out: Path, source: IndexSource) -> str:
    import pyarrow.parquet

    from dinov3.cells.streaming import discovery
    from dinov3.cells.streaming.index import IndexWriter

    if source.table is None:
        data = reader.get(discovery.JUMP_LITE["table"])
    elif Path(source.table).is_file():
        data = Path(source.table).read_bytes()
    else:
        raise UsageError(f"`table` must be a Parquet file, got {source.table}: check the path")
    rows = pyarrow.parquet.read_table(io.BytesIO(data))
    writer = IndexWriter(reader.options.url, f"JUMP-Lite, {source.codec}")
    with progress("fields", rows.num_rows) as bar:
        for batch in rows.to_batches(max_chunksize=10_000):
            sites = batch.to_pylist()
            for record in discovery.records_of_jump_lite(sites, source.codec, selection):
                writer.add(record)
            bar.advance(batch.num_rows)
    writer.write(out)
    return f"{out}: {len(writer)} fields of JUMP-Lite ({source.codec})"


def _channel_numbers(path: Path) -> dict[str, dict[str, str]]:
    """Source ('' for every source) → number → channel."""
    if not path.is_file():
        raise UsageError(f"`channels_table` must be a CSV file, got {path}: check the path")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"number", "channel"} <= set(reader.fieldnames or ()):
            raise UsageError(
                f"{path} must have the columns number and channel, got "
                f"{', '.join(reader.fieldnames or ()) or 'none'}: add the missing columns"
            )
        found: dict[str, dict[str, str]] = {}
        for row in reader:
            found.setdefault(row.get("source") or "", {})[row["number"]] = row["channel"]
    return found


@dataclass(frozen=True)
class IndexStats:
    """Counts of an index."""

    path: str
    store: str
    fields: int
    plates: int
    by_batch: dict[str, tuple[int, int]]  # PROJECT/SOURCE/BATCH → (plates, fields)
    channels: dict[str, int]  # channel → number of fields that have it
    size_bytes: int  # of the files whose size is known
    val_fields: int  # on the validation side of the split by plate

    def text(self) -> str:
        size = f", {self.size_bytes / 1e9:.1f} GB" if self.size_bytes else ""
        lines = [
            f"{self.path}: {self.fields} fields of {self.plates} plates in {self.store}{size}",
            f"validation (by plate): {self.val_fields} fields",
            "channels: " + ", ".join(f"{name} {count}" for name, count in self.channels.items()),
        ]
        table = [(k, f"{plates} plates", f"{n} fields") for k, (plates, n) in self.by_batch.items()]
        return "\n".join([*lines, *align_columns(table)])


def index_stats(index: str | Path) -> IndexStats:
    """Count what an index holds; UsageError where it does not exist or is damaged."""
    import numpy as np

    from dinov3.cells.streaming.index import FieldIndex

    with streaming_errors():
        opened = FieldIndex(index)
    per_plate = np.bincount(opened.column("plate"), minlength=len(opened.plates))
    per_layout = np.bincount(opened.column("layout"), minlength=len(opened.layouts))
    batches: dict[str, tuple[int, int]] = {}
    for plate, count in zip(opened.plates, per_plate.tolist(), strict=True):
        name = plate.rpartition("/")[0] or plate
        plates, fields = batches.get(name, (0, 0))
        batches[name] = (plates + 1, fields + count)
    channels: Counter[str] = Counter()
    for layout, count in zip(opened.layouts, per_layout.tolist(), strict=True):
        channels.update({channel: count for channel, _ in layout})
    return IndexStats(
        str(index),
        opened.store,
        len(opened),
        len(opened.plates),
        batches,
        dict(sorted(channels.items())),
        int(opened.column("bytes").sum()),
        len(opened.rows(split="val")),
    )


def draw_stats(stats: IndexStats, path: str | Path) -> None:
    """Draw the fields of each batch and of each channel as bars, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8 + 0.28 * (len(stats.by_batch) + len(stats.channels))))
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(
        2, 1, height_ratios=[len(stats.by_batch), max(len(stats.channels), 1)]
    )
    upper.barh(list(stats.by_batch), [fields for _, fields in stats.by_batch.values()])
    upper.set_title(f"{stats.fields} fields of {stats.plates} plates")
    lower.barh(list(stats.channels), list(stats.channels.values()))
    for axes in (upper, lower):
        axes.invert_yaxis()
        axes.set_xlabel("fields")
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
