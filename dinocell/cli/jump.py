"""`dinocell jump`: Cell Painting fields of a public bucket."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App

__all__ = ["app"]

app = App(
    name="jump",
    help="Cell Painting fields of a public bucket: index, check, local shards, arithmetic.",
    no_args_is_help=True,
)

IndexFile = Annotated[Path, typer.Argument(metavar="INDEX", help="File that `jump index` made.")]
Store = Annotated[
    str,
    typer.Option(
        "--store", help="s3://bucket or a folder.  [default: the public bucket, or the index's]"
    ),
]
Endpoint = Annotated[str, typer.Option(help="URL of another server of the S3 protocol.")]
Region = Annotated[str, typer.Option(help="Of the bucket.")]
Signed = Annotated[
    bool, typer.Option("--signed", help="Sign requests with the credentials of the environment.")
]
Transport = Annotated[str, typer.Option(help="obstore or boto3.")]


@app.command("index")
def jump_index(
    selection: Annotated[
        str,
        typer.Argument(
            metavar="PROJECT/SOURCE/BATCH/PLATE",
            help="Which plates; * and ? in any part, later parts may be left out.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The index file.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    source: Annotated[
        str,
        typer.Option(
            "--from", help="tables (load_data), listing, auto: what there is; or jump-lite."
        ),
    ] = "auto",
    channels_table: Annotated[
        Path | None,
        typer.Option(help="For listings: CSV with number, channel and perhaps source."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="JUMP-Lite's list of sites, else fetched from the store.")
    ] = None,
    codec: Annotated[
        str, typer.Option(help="Of JUMP-Lite: zstd, or jpegxl_lossy_hq, _mq or _d20.")
    ] = "zstd",
    threads: Annotated[int, typer.Option(min=1, help="Plates at once.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """List the fields of a selection of plates in one file, which training opens at once.

    Stopped, it goes on with the plates that are missing when the same command is run again.

    Example: `dinocell jump index 'cpg0000-jump-pilot/source_4/*/BR0011*' -o pilot.arrow`
    """
    from dinocell.pretraining.jump_index import IndexSource, index_plates
    from dinov3.data.datasets.jump_s3 import StreamOptions

    print(
        index_plates(
            selection,
            out,
            IndexSource(source, channels_table, table, codec),
            store=StreamOptions(store, endpoint, region, signed, transport),
            threads=threads,
            overwrite=overwrite,
        )
    )


@app.command("stats")
def jump_stats(
    index: IndexFile,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also draw it into this PNG.")
    ] = None,
) -> None:
    """Count plates, fields and channels of an index.

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
    fields: Annotated[int, typer.Option(help="So many fields, drawn by --seed.")] = 32,
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Read a sample of fields whole and look at them; exit code 1 if one is bad.

    Example: `dinocell jump verify pilot.arrow --fields 100`
    """
    from dinocell.pretraining.jump_fields import verify_index
    from dinov3.data.datasets.jump_s3 import StreamOptions

    options = StreamOptions(store, endpoint, region, signed, transport)
    report = verify_index(index, fields=fields, store=options, seed=seed)
    print(report.json_text() if json else report.text())
    if report.bad:
        raise typer.Exit(1)


@app.command("pack")
def jump_pack(
    index: IndexFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that does not exist yet.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    channels: Annotated[
        str | None, typer.Option(help="Names joined by +; default those that most fields have.")
    ] = None,
    split: Annotated[str, typer.Option(help="ALL, TRAIN or VAL, by plate.")] = "ALL",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many fields.")] = None,
    bits: Annotated[int, typer.Option(help="16, or 8 (scaled to each field's range).")] = 16,
    crop: Annotated[int, typer.Option(help="Keep so many px of the centre; 0: all.")] = 0,
    scale: Annotated[float, typer.Option(help="Shrink by this factor.")] = 1.0,
    per_file: Annotated[int, typer.Option(help="Fields of a file.")] = 64,
    level: Annotated[int, typer.Option(help="Of the compression, 1 to 22.")] = 5,
    max_lost_share: Annotated[
        float, typer.Option(help="Stop when more of the fields cannot be read.")
    ] = 0.02,
) -> None:
    """Copy fields into local shards (Zarr), which are trained on through their own index.

    Example: `dinocell jump pack pilot.arrow shards --limit 5000 --bits 8`
    """
    from dinocell.pretraining.jump_fields import streaming_errors
    from dinocell.pretraining.jump_pack import pack_index
    from dinov3.cells.streaming.shards import PackOptions
    from dinov3.data.datasets.jump_s3 import StreamOptions

    with streaming_errors():
        options = PackOptions(bits, crop, scale, per_file, level)
    print(
        pack_index(
            index,
            out,
            options,
            store=StreamOptions(store, endpoint, region, signed, transport),
            channels=channels,
            split=split,
            limit=limit,
            max_lost_share=max_lost_share,
        )
    )


@app.command("masks")
def jump_masks(
    index: IndexFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that does not exist yet.")],
    store: Store = "",
    endpoint: Endpoint = "",
    region: Region = "us-east-1",
    signed: Signed = False,
    transport: Transport = "obstore",
    kind: Annotated[str, typer.Option(help="nuclei or cell.")] = "nuclei",
    channel: Annotated[str, typer.Option(help="What the images show.")] = "DNA",
    fields: Annotated[int, typer.Option(help="So many fields that have labels.")] = 48,
    masks: Annotated[
        str | None, typer.Option(help="Folder of the label arrays, {kind} for nuclei or cell.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
) -> None:
    """Fetch fields with Cellpose's labels (JUMP-Lite's) as pseudo-truth for `ssl_evaluation.data`.

    Example: `dinocell jump masks lite.arrow pseudo --fields 48`
    """
    from dinocell.pretraining.jump_pack import export_masks
    from dinov3.data.datasets.jump_s3 import StreamOptions

    print(
        export_masks(
            index,
            out,
            store=StreamOptions(store, endpoint, region, signed, transport),
            kind=kind,
            channel=channel,
            fields=fields,
            masks=masks,
            seed=seed,
        )
    )


@app.command("plan")
def jump_plan(
    step_seconds: Annotated[float, typer.Option(help="Of a training step.")] = 0.7,
    batch: Annotated[int, typer.Option(help="Samples of a step on this node, all GPUs.")] = 64,
    cores: Annotated[float, typer.Option(help="CPU cores for data.")] = 8,
    mbps: Annotated[float, typer.Option(help="Line to the store, megabytes per second.")] = 200,
    field_mb: Annotated[float, typer.Option(help="Megabytes of a field's files.")] = 12.35,
    decode_ms: Annotated[float, typer.Option(help="CPU time to decode a field.")] = 30.0,
    augment_ms: Annotated[
        float,
        typer.Option(help="CPU time to cut the crops of a sample (2.1 with photometrics=device)."),
    ] = 16.1,
) -> None:
    """Tell what a training step needs of line and cores, name the bottleneck, recommend visits.

    Example: `dinocell jump plan --step-seconds 0.12 --batch 64 --cores 14 --mbps 1000`
    """
    from dinocell.pretraining.jump_plan import describe_plan

    print(
        describe_plan(
            step_seconds=step_seconds,
            batch=batch,
            cores=cores,
            megabytes_per_s=mbps,
            field_megabytes=field_mb,
            decode_ms=decode_ms,
            augment_ms=augment_ms,
        )
    )
