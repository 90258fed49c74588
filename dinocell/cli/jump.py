"""`dinocell jump`: Cell Painting fields of a public bucket."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinocell.cli.options import App, argument, option

if TYPE_CHECKING:
    from dinov3.data.datasets.jump_s3 import StreamOptions

app = App(
    name="jump",
    help="Index, check and copy the Cell Painting fields of a public bucket, to train on them.",
    no_args_is_help=True,
)

IndexFile = Annotated[
    Path, typer.Argument(metavar="INDEX", help="Index file that `dinocell jump index` wrote.")
]
NewFolder = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder for the results; it must not exist yet.")
]
DrawSeed = Annotated[int, typer.Option(help="Use this random seed to choose the fields.")]


@dataclass(frozen=True)
class Store:
    """Where the images are, named as the fields of `StreamOptions`."""

    store: str = option(
        "Read from this store: s3://BUCKET or a folder.  [default: the store that the index names, or the "
        "public bucket]",
        "",
    )
    endpoint: str = option("Use the S3 server at this URL.  [default: the server of Amazon]", "")
    region: str = option("Expect the bucket in this Amazon region.", "us-east-1")
    signed: bool = option(
        "Sign requests with the credentials of the environment; a public bucket needs none.", False
    )
    transport: str = option("Use this library to read: obstore or boto3.", "obstore")

    def to_stream(self) -> "StreamOptions":
        """The options with which fields are read."""
        from dinov3.data.datasets.jump_s3 import StreamOptions

        return StreamOptions(**vars(self))


@dataclass(frozen=True)
class Source:
    """Where an index takes the fields from, named as the fields of `IndexSource`."""

    kind: str = option(
        "Find the fields in: tables (the load_data files of a plate), listing (the names of its image "
        "files), auto (tables where they exist, else the listing), or jump-lite.",
        "auto",
        "--from",
    )
    channels_table: Path | None = option(
        "Read from this CSV which channel a number in a file name means; it has the columns number and "
        "channel, and optionally source. Tables of a plate do not need it; listings do."
    )
    table: Path | None = option(
        "Read the list of JUMP-Lite's sites from this Parquet file.  [default: download it from the store]"
    )
    codec: str = option(
        "Read this version of the images of JUMP-Lite: zstd, jpegxl_lossy_hq, jpegxl_lossy_mq or "
        "jpegxl_lossy_d20.",
        "zstd",
    )


@dataclass(frozen=True)
class PackFlags:
    """How shards store a field, named as the fields of `PackOptions`."""

    bits: int = option(
        "Store pixels with this many bits: 16, or 8 after scaling to the range of the field's intensities.",
        16,
    )
    crop_px: int = option(
        "Keep a square of this edge length in px at the centre; 0 packs the whole field.",
        0,
        "--crop",
    )
    scale: float = option("Resize fields by this factor (above 0, at most 1), such as 0.5.", 1.0)
    per_file: int = option("Store this many fields in each file.", 64)
    level: int = option("Compress at this level: 1 (fast) to 22 (small).", 5)


@app.command("index")
def jump_index(
    *,
    selection: str = argument(
        "Plates to list, as folders of the bucket. Each part may contain * and ?; the last parts may be left "
        "out.",
        metavar="PROJECT/SOURCE/BATCH/PLATE",
    ),
    out: Path = option("Write the index to this file.", ..., "--out -o"),
    store: Store,
    source: Source,
    threads: int = option("List this many plates at once.", 16, min=1),
    overwrite: bool = option("Replace the index file if it exists.", False),
) -> None:
    """List the fields of many plates in one index file, so that training starts at once.

    After an interruption run the same command again: it continues with the plates that are missing.

    Example: `dinocell jump index 'cpg0000-jump-pilot/source_4/*/BR0011*' -o pilot.arrow`
    """
    from dinocell.pretraining.jump_index import IndexSource, index_plates

    taken, stream = IndexSource(**vars(source)), store.to_stream()
    print(index_plates(selection, out, taken, store=stream, threads=threads, overwrite=overwrite))


@app.command("stats")
def jump_stats(
    index: IndexFile,
    out: Path | None = option("Draw the counts into this PNG file, too.", names="--out -o"),
) -> None:
    """Count the plates, fields and channels of an index.

    Example: `dinocell jump stats pilot.arrow -o pilot.png`
    """
    from dinocell.pretraining.jump_index import draw_stats, index_stats

    stats = index_stats(index)
    print(stats.text())
    if out is not None:
        draw_stats(stats, out)
        print(f"written: {out}", file=sys.stderr)


@app.command("verify")
def jump_verify(
    index: IndexFile,
    store: Store,
    fields: int = option("Read this many fields, chosen at random.", 32),
    seed: DrawSeed = 0,
    json: bool = option("Print the result as JSON.", False),
) -> None:
    """Read a random sample of fields and check each; the exit code is 1 if one is bad.

    Example: `dinocell jump verify pilot.arrow --fields 100`
    """
    from dinocell.pretraining.jump_fields import verify_index

    report = verify_index(index, fields=fields, store=store.to_stream(), seed=seed)
    print(report.json_text() if json else report.text())
    if report.bad:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Selection:
    """Which fields are packed, named as the parameters of `pack_index`."""

    channels: str | None = option(
        "Copy these channels: names joined by +, such as DNA+ER.  [default: those that most fields have]"
    )
    split: str = option(
        "Copy the plates of this part of the data: ALL, TRAIN (training) or VAL (validation).",
        "ALL",
    )
    limit: int | None = option("Copy only this many fields.  [default: all]", min=1)
    max_lost_share: float = option(
        "Stop if more than this share of the fields (0 to 1) cannot be read.", 0.02
    )


@app.command("pack")
def jump_pack(
    index: IndexFile, out: NewFolder, store: Store, options: PackFlags, selection: Selection
) -> None:
    """Copy fields into local files (Zarr shards) with an index of their own, for fast training.

    Example: `dinocell jump pack pilot.arrow shards --limit 5000 --bits 8`
    """
    from dinocell.pretraining.jump_fields import streaming_errors
    from dinocell.pretraining.jump_pack import pack_index
    from dinov3.cells.streaming.shards import PackOptions

    with streaming_errors():
        checked = PackOptions(**vars(options))
    print(pack_index(index, out, checked, store=store.to_stream(), **vars(selection)))


@dataclass(frozen=True)
class Labels:
    """Which labels are fetched, named as the parameters of `export_masks`."""

    kind: str = option("Fetch labels of this kind: nuclei or cell.", "nuclei")
    channel: str = option("Write images of this channel.", "DNA")
    fields: int = option("Fetch this many fields that have labels.", 48)
    masks: str | None = option(
        "Read the label arrays from this folder of the store; {kind} in its name becomes nuclei or cell.  "
        "[default: the one of JUMP-Lite]"
    )
    seed: DrawSeed = 0


@app.command("masks")
def jump_masks(index: IndexFile, out: NewFolder, store: Store, labels: Labels) -> None:
    """Fetch fields with the labels that Cellpose made for JUMP-Lite, to evaluate a pretraining.

    Cellpose made the labels, not a human: use them to follow a run (`ssl_evaluation.data`), not to
    report scores.

    Example: `dinocell jump masks lite.arrow pseudo --fields 48`
    """
    from dinocell.pretraining.jump_pack import export_masks

    print(export_masks(index, out, store=store.to_stream(), **vars(labels)))


@dataclass(frozen=True)
class Load:
    """What training asks of the computer, named as the parameters of `Workload`."""

    step_seconds: float = option("Plan for training steps of this duration in seconds.", 0.7)
    batch: int = option("Plan for this many samples in a step, over all GPUs of the computer.", 64)
    cores: float = option("Use this many CPU cores to load data.", 8)
    megabytes_per_s: float = option(
        "Assume this bandwidth to the store, in megabytes per second.", 200, "--mbps"
    )
    field_megabytes: float = option(
        "Assume this size of the files of a field, in megabytes.", 12.35, "--field-mb"
    )
    decode_ms: float = option("Assume this CPU time to decode a field, in milliseconds.", 30.0)
    augment_ms: float = option(
        "Assume this CPU time to cut the crops of a sample, in milliseconds; about 2.1 with "
        "multiview.photometrics=device.",
        16.1,
    )


@app.command("plan")
def jump_plan(load: Load) -> None:
    """Compute the bandwidth and the CPU cores that training needs, and name the bottleneck.

    The table has a line for each number of visits: how often a field is used each time it is loaded.

    Example: `dinocell jump plan --step-seconds 0.12 --batch 64 --cores 14 --mbps 1000`
    """
    from dinocell.pretraining.jump_fields import streaming_errors
    from dinov3.cells.streaming.plan import Workload, make_plan

    with streaming_errors():
        work = Workload(**vars(load))
    print(make_plan(work).text())
