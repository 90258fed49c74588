"""`dinocell jump`: indexes of a Cell Painting bucket, their check, packing, and the arithmetic."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.errors import DataSetError, DINOCellError, UsageError
from dinocell.files import atomic_folder, atomic_path
from dinocell.progress import progress

__all__ = [
    "BUCKET",
    "IndexStats",
    "StoreChoice",
    "VerifyReport",
    "describe_plan",
    "draw_stats",
    "export_masks",
    "index_plates",
    "index_stats",
    "pack_index",
    "verify_index",
]

BUCKET = "s3://cellpainting-gallery"
"""The Cell Painting Gallery: public, in us-east-1."""


@dataclass(frozen=True)
class StoreChoice:
    """Which store is read and how; empty values are those of the index or of AWS."""

    store: str = ""
    endpoint: str = ""
    region: str = "us-east-1"
    signed: bool = False
    transport: str = "obstore"

    def options(self, default: str) -> Any:
        """`StoreOptions` of the streaming package."""
        from dinov3.cells.streaming import stores

        try:
            return stores.StoreOptions(
                self.store or default,
                endpoint=self.endpoint,
                region=self.region,
                signed=self.signed,
                transport=self.transport,
            )
        except ValueError as error:
            raise UsageError(str(error)) from error


def index_plates(
    selection: str,
    out: str | Path,
    *,
    store: StoreChoice | None = None,
    source: str = "auto",
    channels_table: str | Path | None = None,
    table: str | Path | None = None,
    codec: str = "zstd",
    threads: int = 16,
    overwrite: bool = False,
) -> str:
    """Make the index of the plates of a selection.

    Parameters
    ----------
    selection : str
        `PROJECT/SOURCE/BATCH/PLATE`, with * where any will do; later parts may be left out.
    out : path
        Index file; plates that are done are kept beside it when it is stopped.
    source : auto, tables, listing or jump-lite
    channels_table : path, optional
        CSV with the columns number and channel, and perhaps source: what file names mean.

    table : path, optional
        JUMP-Lite's list of sites; fetched from the store by default.
    codec : str
        Of JUMP-Lite: zstd, jpegxl_lossy_hq, jpegxl_lossy_mq or jpegxl_lossy_d20.

    Returns
    -------
    str
        What was written.

    Raises
    ------
    UsageError
        Nothing matches, tables say too little, the file is there already.
    DINOCellError
        The store cannot be read.
    """
    from dinov3.cells.streaming import discovery, stores

    out = Path(out)
    if out.exists() and not overwrite:
        raise UsageError(f"OUT must not exist, got {out}: use --overwrite, or name another file")
    channels = None if channels_table is None else _channel_numbers(Path(channels_table))
    reader = stores.ObjectStore((store or StoreChoice()).options(BUCKET))
    try:
        if source == "jump-lite":
            return _index_jump_lite(reader, selection, out, table, codec)
        plates = discovery.find_plates(reader, selection)
        with progress("plates", len(plates)) as bar:
            writer = discovery.make_index(
                reader,
                plates,
                out,
                source=source,
                channels=channels,
                threads=threads,
                progress=lambda name, count: bar.advance(note=f"{name}: {count} fields"),
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except stores.StoreError as error:
        raise DINOCellError(str(error)) from error
    text = f"{out}: {len(writer)} fields of {len(plates) - len(writer.skipped)} plates"
    if writer.skipped:
        shown = ", ".join(writer.skipped[:5]) + (", ..." if len(writer.skipped) > 5 else "")
        text += (
            f"\nleft out: {len(writer.skipped)} plates without a load_data table and without known "
            f"channels ({shown}); --channels-table includes them"
        )
    return text


def _index_jump_lite(
    reader: Any, selection: str, out: Path, table: str | Path | None, codec: str
) -> str:
    import io

    import pyarrow.parquet

    from dinov3.cells.streaming import discovery

    if table is not None and not Path(table).is_file():
        raise UsageError(f"--table must be a Parquet file, got {table}: check the path")
    data = (
        Path(table).read_bytes() if table is not None else reader.get(discovery.JUMP_LITE["table"])
    )
    rows = pyarrow.parquet.read_table(io.BytesIO(data))
    from dinov3.cells.streaming.index import IndexWriter

    writer = IndexWriter(reader.options.url, f"JUMP-Lite, {codec}")
    with progress("fields", rows.num_rows) as bar:
        for batch in rows.to_batches(max_chunksize=10_000):
            for record in discovery.records_of_jump_lite(batch.to_pylist(), codec, selection):
                writer.add(record)
            bar.advance(batch.num_rows)
    writer.write(out)
    return f"{out}: {len(writer)} fields of JUMP-Lite ({codec})"


def _channel_numbers(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        raise UsageError(f"--channels-table must be a CSV file, got {path}: check the path")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        if not {"number", "channel"} <= set(reader.fieldnames or ()):
            raise UsageError(
                f"{path} must have the columns number and channel, got "
                f"{', '.join(reader.fieldnames or ()) or 'none'}: add them"
            )
        found: dict[str, dict[str, str]] = {}
        for row in reader:
            found.setdefault(row.get("source") or "", {})[row["number"]] = row["channel"]
    return found


@dataclass(frozen=True)
class IndexStats:
    """Counts of an index.

    Attributes
    ----------
    path, store : str
    fields, plates : int
    by_batch : dict, `PROJECT/SOURCE/BATCH` → (plates, fields)
    channels : dict, channel → fields that have it
    size_bytes : int, of the files whose size is known
    val_fields : int, on the validation side of the split
    """

    path: str
    store: str
    fields: int
    plates: int
    by_batch: dict[str, tuple[int, int]]
    channels: dict[str, int]
    size_bytes: int
    val_fields: int

    def text(self) -> str:
        """A table."""
        size = f", {self.size_bytes / 1e9:.1f} GB" if self.size_bytes else ""
        lines = [
            f"{self.path}: {self.fields} fields of {self.plates} plates in {self.store}{size}",
            f"validation (by plate): {self.val_fields} fields",
            "channels: " + ", ".join(f"{name} {count}" for name, count in self.channels.items()),
        ]
        width = max(len(name) for name in self.by_batch)
        for name, (plates, fields) in self.by_batch.items():
            lines.append(f"{name:{width}}  {plates:5} plates  {fields:9} fields")
        return "\n".join(lines)


def _opened(index: str | Path) -> Any:
    try:
        from dinov3.cells.streaming.index import FieldIndex

        return FieldIndex(index)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def index_stats(index: str | Path) -> IndexStats:
    """Count what an index holds.

    Raises
    ------
    UsageError
        No such index.
    """
    import numpy as np

    opened = _opened(index)
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
    """Draw fields per batch and per channel as a picture."""
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
    with atomic_path(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@dataclass(frozen=True)
class VerifyReport:
    """Result of a check.

    Attributes
    ----------
    checked : int
    bad : dict, field → reason
    megabytes : float, that were read
    incomplete : int, fields of the index that lack a channel that most have; not read
    """

    checked: int
    bad: dict[str, str]
    megabytes: float
    incomplete: int = 0

    def text(self) -> str:
        """One line, and one for each bad field."""
        head = f"{self.checked} fields read ({self.megabytes:.1f} MB), {len(self.bad)} bad"
        if self.incomplete:
            head += f"; {self.incomplete} more of the index lack a channel that most have: not read"
        return "\n".join([head, *(f"bad: {name}: {why}" for name, why in self.bad.items())])

    def json_text(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {
                "checked": self.checked,
                "bad": self.bad,
                "megabytes": self.megabytes,
                "incomplete": self.incomplete,
            }
        )


def _dataset(index: str | Path, store: StoreChoice, channels: str | None, split: str) -> Any:
    """Fields of an index, each once, without a pool."""
    from dinov3.data.datasets import jump_s3 as module

    try:
        dataset = module.JUMPS3Dataset(
            index=str(index), split=split, channels=channels, visits=1, spread=1
        )
        store.options(dataset.index.store)
        dataset.set_options(
            module.StreamOptions(
                store=store.store,
                endpoint=store.endpoint,
                region=store.region,
                signed=store.signed,
                transport=store.transport,
            )
        )
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    return dataset


def verify_index(
    index: str | Path,
    *,
    count: int = 32,
    store: StoreChoice | None = None,
    seed: int = 0,
    threads: int = 4,
) -> VerifyReport:
    """Read a sample of fields whole: length, image, size, contrast.

    Parameters
    ----------
    count : int
        Fields, drawn by `seed`; all if there are fewer.

    Raises
    ------
    UsageError
        No such index.
    DINOCellError
        Nothing answers.
    """
    from dinov3.cells.streaming import stores

    if count < 1:
        raise UsageError(f"--fields must be at least 1, got {count}: raise it")
    dataset = _dataset(index, store or StoreChoice(), None, "ALL")
    total = len(dataset.rows)
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    bad: dict[str, str] = {}

    def one(number: int) -> tuple[str, str]:
        name = dataset.field_name(number)
        try:
            dataset.read_field(number)
        except dataset.LOSSES as error:
            return name, str(error).strip().split("\n")[0]
        return name, ""

    with ThreadPoolExecutor(threads) as pool, progress("fields", len(chosen)) as bar:
        try:
            for name, reason in pool.map(one, chosen):
                if reason:
                    bad[name] = reason
                bar.advance(note=name)
        except stores.StoreError as error:
            raise DINOCellError(str(error)) from error
    return VerifyReport(len(chosen), bad, dataset.megabytes_read(), dataset.left_out)


def pack_index(
    index: str | Path,
    out: str | Path,
    *,
    store: StoreChoice | None = None,
    channels: str | None = None,
    split: str = "ALL",
    limit: int | None = None,
    bits: int = 16,
    crop_px: int = 0,
    scale: float = 1.0,
    per_file: int = 64,
    level: int = 5,
    threads: int = 4,
    max_lost_share: float = 0.02,
) -> str:
    """Copy fields of an index into local shards that train alike.

    Parameters
    ----------
    out : folder that does not exist
    bits, crop_px, scale, per_file, level
        As `PackOptions`.
    limit : int, optional
        The first so many fields.
    max_lost_share : float
        Of the fields; unreadable ones are left out and said.

    Returns
    -------
    str
        What was written.

    Raises
    ------
    UsageError
        Wrong options; the folder is there.
    DINOCellError
        Nothing answers; too many fields cannot be read.
    """
    from dinov3.cells.streaming import shards, stores

    if split not in ("ALL", "TRAIN", "VAL"):
        raise UsageError(f"--split must be ALL, TRAIN or VAL, got {split!r}: choose one")
    try:
        options = shards.PackOptions(bits, crop_px, scale, per_file, level)
    except ValueError as error:
        raise UsageError(str(error)) from error
    dataset = _dataset(index, store or StoreChoice(), channels, split)
    total = len(dataset.rows) if limit is None else min(limit, len(dataset.rows))
    lost: dict[str, str] = {}

    def fields() -> Iterator[tuple[Any, Any]]:
        def one(number: int) -> tuple[Any, Any, str]:
            try:
                return dataset.record(number), dataset.read_field(number), ""
            except dataset.LOSSES as error:
                return dataset.record(number), None, str(error).strip().split("\n")[0]

        with ThreadPoolExecutor(threads) as pool:
            # A few at a time: what waits to be written is in memory.
            for begin in range(0, total, 4 * threads):
                numbers = range(begin, min(begin + 4 * threads, total))
                for record, made, reason in pool.map(one, numbers):
                    if made is None:
                        lost[record.name] = reason
                        if len(lost) > max(max_lost_share * total, 0):
                            raise DataSetError(
                                f"at most {max_lost_share:.1%} of {total} fields may be unreadable, "
                                f"got {len(lost)} (last: {reason}): mend the store, or raise "
                                "--max-lost-share"
                            )
                        continue
                    yield record, made

    try:
        with progress("fields", total) as bar:
            count = shards.pack_fields(
                fields(), out, options, progress=lambda name: bar.advance(note=name)
            )
    except stores.StoreError as error:
        raise DINOCellError(str(error)) from error
    except (ValueError, FileExistsError) as error:
        raise UsageError(str(error)) from error
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    text = (
        f"{out}: {count} fields, {size / 1e6:.1f} MB; train with index={Path(out) / 'fields.arrow'}"
    )
    if dataset.left_out:
        text += (
            f"\nleft out: {dataset.left_out} fields without {', '.join(dataset.channels)}; name others "
            "with --channels"
        )
    return "\n".join([text, *(f"left out: {name}: {why}" for name, why in lost.items())])


def export_masks(
    index: str | Path,
    out: str | Path,
    *,
    store: StoreChoice | None = None,
    kind: str = "nuclei",
    channel: str = "DNA",
    count: int = 48,
    masks: str | None = None,
    seed: int = 0,
) -> str:
    """Fields with the labels that the gallery keeps for them, as a data set of images and labels.

    The labels are Cellpose's, made for JUMP-Lite: pseudo-truth, good enough to follow a pretraining
    with (`ssl_evaluation.data`), not to report.  Sites of cpg0016 have the same names everywhere, so
    the index may be of the original images too.

    Parameters
    ----------
    out : folder that does not exist
        Gets `train` and `val`, each with `images` and `labels`; a third of the plates is for `val`
        (of the fields, where there is one plate).
    kind : nuclei or cell
    channel : str
        What the images show.
    count : int
        Fields; those without labels are passed over.
    masks : str, optional
        Folder of the label arrays below the store.

    Returns
    -------
    str
        What was written.

    Raises
    ------
    UsageError
        Wrong options; the folder is there.
    DINOCellError
        No field has labels; nothing answers.
    """

    from dinov3.cells.streaming import stores

    out = Path(out)
    if kind not in ("nuclei", "cell"):
        raise UsageError(f"--kind must be nuclei or cell, got {kind!r}: choose one")
    if count < 2:
        raise UsageError(f"--fields must be at least 2, got {count}: raise it")
    if out.exists():
        raise UsageError(f"OUT must not exist, got {out}: name another folder, or remove it")
    dataset = _dataset(index, store or StoreChoice(), channel, "ALL")
    from dinov3.cells.streaming.discovery import JUMP_LITE

    folder = masks or JUMP_LITE["masks"]
    numbers = list(range(len(dataset.rows)))
    random.Random(seed).shuffle(numbers)
    found: list[tuple[str, str, Any, Any]] = []
    without = 0
    try:
        with progress("fields", min(count, len(numbers))) as bar:
            for number in numbers:
                record = dataset.record(number)
                site = "__".join((*record.plate.split("/")[1:], record.well, record.site))
                try:
                    labels = dataset.read_array(f"{folder.format(kind=kind)}/{site}")[0]
                    made = dataset.read_field(number)
                except dataset.LOSSES:
                    without += 1
                    if without > 20 * count and not found:
                        break
                    continue
                if labels.shape != made.planes.shape[1:]:
                    without += 1
                    continue
                found.append((record.plate, site, made.planes[0], labels))
                bar.advance(note=site)
                if len(found) == count:
                    break
        if len(found) < 2:
            raise DINOCellError(
                f"at least 2 fields must have {kind} labels in {folder.format(kind=kind)}, got "
                f"{len(found)} of {len(found) + without}: use an index of JUMP-Lite or cpg0016"
            )
        with atomic_folder(out) as temporary:
            sides = _write_masks(temporary, found)
    except stores.StoreError as error:
        raise DINOCellError(str(error)) from error
    return (
        f"{out}: {sides['train']} + {sides['val']} fields with {kind} labels (Cellpose's: "
        f"pseudo-truth), {without} without; train with ssl_evaluation.data={out}"
    )


def _write_masks(folder: Path, found: list[tuple[str, str, Any, Any]]) -> Counter[str]:
    """Write the fields of every third plate for validation, the others for training."""
    import tifffile

    plates = sorted({plate for plate, *_ in found})
    third = set(plates[::3]) if len(plates) > 1 else set()
    sides: Counter[str] = Counter()
    for place, (plate, site, image, labels) in enumerate(found):
        val = plate in third if third else place % 3 == 0
        side = folder / ("val" if val else "train")
        for name, array in (("images", image), ("labels", labels)):
            (side / name).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(side / name / f"{site}.tif", array, compression="deflate")
        sides[side.name] += 1
    return sides


def describe_plan(
    *,
    step_seconds: float,
    batch: int,
    cores: float,
    megabytes_per_s: float,
    field_megabytes: float = 12.35,
    decode_ms: float = 30.0,
    augment_ms: float = 16.1,
) -> str:
    """The needs of a training step as a table, and what to take.

    Raises
    ------
    UsageError
        A number that is not positive.
    """
    try:
        from dinov3.cells.streaming.plan import make_plan

        plan = make_plan(
            step_seconds=step_seconds,
            batch=batch,
            cores=cores,
            megabytes_per_s=megabytes_per_s,
            field_megabytes=field_megabytes,
            decode_ms=decode_ms,
            augment_ms=augment_ms,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    lines = [
        f"{plan.samples_per_s:.1f} samples/s; {field_megabytes:g} MB a field, {decode_ms:g} ms to decode "
        f"it, {augment_ms:g} ms to cut a sample's crops",
        "visits    MB/s  requests/s  connections  decode cores  crop cores  pool GB  used  bottleneck",
    ]
    for need in plan.needs:
        lines.append(
            f"{need.visits:6} {need.megabytes_per_s:7.0f} {need.requests_per_s:11.0f} "
            f"{need.connections:12.0f} {need.decode_cores:13.2f} {need.augment_cores:11.2f} "
            f"{need.pool_gb:8.1f} {100 * need.data_share:4.0f}%  {need.bottleneck}"
        )
    return "\n".join([*lines, plan.advice])
