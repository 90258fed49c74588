"""`dinocell jump`: Cell Painting fields of a public bucket."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinocell.cli.options import App

if TYPE_CHECKING:
    from dinov3.data.datasets.jump_s3 import StreamOptions

__all__ = ["PackFlags", "Source", "Store", "app"]

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

    store: Annotated[
        str,
        typer.Option(
            help="Read from this store: s3://BUCKET or a folder.  [default: the store that the index "
            "names, or the public bucket]"
        ),
    ] = ""
    endpoint: Annotated[
        str,
        typer.Option(help="Use the S3 server at this URL.  [default: the server of Amazon]"),
    ] = ""
    region: Annotated[str, typer.Option(help="Expect the bucket in this region.")] = "us-east-1"
    signed: Annotated[
        bool,
        typer.Option(
            "--signed",
            help="Sign requests with the credentials of the environment; a public bucket needs none.",
        ),
    ] = False
    transport: Annotated[str, typer.Option(help="Use this library to read: obstore or boto3.")] = (
        "obstore"
    )

    def to_stream(self) -> StreamOptions:
        """The options with which fields are read."""
        from dinov3.data.datasets.jump_s3 import StreamOptions

        return StreamOptions(**vars(self))


@dataclass(frozen=True)
class Source:
    """Where an index takes the fields from, named as the fields of `IndexSource`."""

    kind: Annotated[
        str,
        typer.Option(
            "--from",
            help="Find the fields in: tables (the load_data files of a plate), listing (the names of "
            "its image files), auto (tables where they exist, else the listing), or jump-lite.",
        ),
    ] = "auto"
    channels_table: Annotated[
        Path | None,
        typer.Option(
            help="Read from this CSV which channel a number in a file name means; it has the columns "
            "number and channel, and may have source. Only for listings."
        ),
    ] = None
    table: Annotated[
        Path | None,
        typer.Option(
            help="Read the sites of JUMP-Lite from this file.  [default: download it from the store]"
        ),
    ] = None
    codec: Annotated[
        str,
        typer.Option(
            help="Read this version of the images of JUMP-Lite: zstd, jpegxl_lossy_hq, "
            "jpegxl_lossy_mq or jpegxl_lossy_d20."
        ),
    ] = "zstd"


@dataclass(frozen=True)
class PackFlags:
    """How shards store a field, named as the fields of `PackOptions`."""

    bits: Annotated[
        int,
        typer.Option(
            help="Store pixels with this many bits: 16, or 8 after scaling to the range of the field."
        ),
    ] = 16
    crop_px: Annotated[
        int,
        typer.Option(
            "--crop",
            help="Keep a square of this edge length in px at the centre; 0 keeps the field.",
        ),
    ] = 0
    scale: Annotated[
        float,
        typer.Option(help="Resize fields by this factor (above 0, at most 1), such as 0.5."),
    ] = 1.0
    per_file: Annotated[int, typer.Option(help="Store this many fields in each file.")] = 64
    level: Annotated[int, typer.Option(help="Compress at this level: 1 (fast) to 22 (small).")] = 5


@app.command("index")
def jump_index(
    selection: Annotated[
        str,
        typer.Argument(
            metavar="PROJECT/SOURCE/BATCH/PLATE",
            help="Plates to list. Each part may contain * and ?; the last parts may be left out.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the index to this file.")],
    store: Store,
    source: Source,
    threads: Annotated[int, typer.Option(min=1, help="List this many plates at once.")] = 16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the index file if it exists.")
    ] = False,
) -> None:
    """List the fields of many plates in one index file, so that training starts at once.

    After an interruption run the same command again: it continues with the plates that are missing.

    Example: `dinocell jump index 'cpg0000-jump-pilot/source_4/*/BR0011*' -o pilot.arrow`
    """
    from dinocell.pretraining.jump_index import IndexSource, index_plates

    print(
        index_plates(
            selection,
            out,
            IndexSource(**vars(source)),
            store=store.to_stream(),
            threads=threads,
            overwrite=overwrite,
        )
    )


@app.command("stats")
def jump_stats(
    index: IndexFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Draw the counts into this PNG file, too.")
    ] = None,
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
    fields: Annotated[int, typer.Option(help="Read this many fields, chosen at random.")] = 32,
    seed: DrawSeed = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Read a random sample of fields and check each; the exit code is 1 if one is bad.

    Example: `dinocell jump verify pilot.arrow --fields 100`
    """
    from dinocell.pretraining.jump_fields import verify_index

    report = verify_index(index, fields=fields, store=store.to_stream(), seed=seed)
    print(report.json_text() if json else report.text())
    if report.bad:
        raise typer.Exit(1)


@app.command("pack")
def jump_pack(
    index: IndexFile,
    out: NewFolder,
    store: Store,
    options: PackFlags,
    channels: Annotated[
        str | None,
        typer.Option(
            help="Copy these channels: names joined by +, such as DNA+ER.  [default: those that most "
            "fields have]"
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(help="Copy the plates of this part of the data: ALL, TRAIN or VAL."),
    ] = "ALL",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Copy only this many fields.  [default: all]")
    ] = None,
    max_lost_share: Annotated[
        float,
        typer.Option(help="Stop if more than this share of the fields (0 to 1) cannot be read."),
    ] = 0.02,
) -> None:
    """Copy fields into local files (Zarr shards) with an index of their own, for fast training.

    Example: `dinocell jump pack pilot.arrow shards --limit 5000 --bits 8`
    """
    from dinocell.pretraining.jump_fields import streaming_errors
    from dinocell.pretraining.jump_pack import pack_index
    from dinov3.cells.streaming.shards import PackOptions

    with streaming_errors():
        checked = PackOptions(**vars(options))
    print(
        pack_index(
            index,
            out,
            checked,
            store=store.to_stream(),
            channels=channels,
            split=split,
            limit=limit,
            max_lost_share=max_lost_share,
        )
    )


@app.command("masks")
def jump_masks(
    index: IndexFile,
    out: NewFolder,
    store: Store,
    kind: Annotated[
        str, typer.Option(help="Fetch labels of this kind: nuclei or cell.")
    ] = "nuclei",
    channel: Annotated[str, typer.Option(help="Write images of this channel.")] = "DNA",
    fields: Annotated[int, typer.Option(help="Fetch this many fields that have labels.")] = 48,
    masks: Annotated[
        str | None,
        typer.Option(
            help="Read the label arrays from this folder of the store, with {kind} in place of nuclei "
            "or cell."
        ),
    ] = None,
    seed: DrawSeed = 0,
) -> None:
    """Fetch fields with the labels that Cellpose made for JUMP-Lite, to evaluate a pretraining.

    The labels are no human annotation: use them to follow a run (`ssl_evaluation.data`), not to
    report scores.

    Example: `dinocell jump masks lite.arrow pseudo --fields 48`
    """
    from dinocell.pretraining.jump_pack import export_masks

    print(
        export_masks(
            index,
            out,
            store=store.to_stream(),
            kind=kind,
            channel=channel,
            fields=fields,
            masks=masks,
            seed=seed,
        )
    )


@app.command("plan")
def jump_plan(
    step_seconds: Annotated[
        float, typer.Option(help="Plan for training steps of this duration in seconds.")
    ] = 0.7,
    batch: Annotated[
        int,
        typer.Option(help="Plan for this many samples in a step, over all GPUs of the computer."),
    ] = 64,
    cores: Annotated[float, typer.Option(help="Use this many CPU cores to load data.")] = 8,
    megabytes_per_s: Annotated[
        float,
        typer.Option("--mbps", help="Assume this bandwidth to the store, in megabytes per second."),
    ] = 200,
    field_megabytes: Annotated[
        float,
        typer.Option("--field-mb", help="Assume this size of the files of a field, in megabytes."),
    ] = 12.35,
    decode_ms: Annotated[
        float, typer.Option(help="Assume this CPU time to decode a field, in milliseconds.")
    ] = 30.0,
    augment_ms: Annotated[
        float,
        typer.Option(
            help="Assume this CPU time to cut the crops of a sample, in milliseconds; about 2.1 with "
            "photometrics=device."
        ),
    ] = 16.1,
) -> None:
    """Compute the bandwidth and the CPU cores that training needs, and name the bottleneck.

    The table has a line for each number of visits: how often a field is used each time it is loaded.

    Example: `dinocell jump plan --step-seconds 0.12 --batch 64 --cores 14 --mbps 1000`
    """
    from dinocell.pretraining.jump_plan import describe_plan

    print(
        describe_plan(
            step_seconds=step_seconds,
            batch=batch,
            cores=cores,
            megabytes_per_s=megabytes_per_s,
            field_megabytes=field_megabytes,
            decode_ms=decode_ms,
            augment_ms=augment_ms,
        )
    )
