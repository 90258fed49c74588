"""`dinocell inspect`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dinocell.cli.options import App, Device
from dinocell.errors import UsageError

__all__ = ["app"]

app = App()


@app.command()
def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Backbone files, training checkpoints or models; several are compared.",
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of multi-channel fields.")],
    index: Annotated[
        Path | None,
        typer.Option(help="CSV that says which file is which channel of which field."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Names of the files instead: harmony, cellvoyager, imagexpress, or a regular "
            "expression with the group (?P<channel>...)."
        ),
    ] = None,
    channels_table: Annotated[
        Path | None,
        typer.Option(help="With --pattern: CSV that gives channel numbers their names."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write inspect.json and inspect.png here.")
    ] = None,
    channels: Annotated[
        str | None, typer.Option(help="Use these channels only: names with commas.")
    ] = None,
    windows_per_field: Annotated[int, typer.Option(help="Windows of each field.")] = 4,
    window_px: Annotated[int, typer.Option(help="Edge of a window in px.")] = 224,
    max_fields: Annotated[
        int | None, typer.Option(help="At most so many fields, spread over the names.")
    ] = None,
    which: Annotated[
        str, typer.Option(help="Of a training checkpoint: teacher or student.")
    ] = "teacher",
    patch_size: Annotated[
        int | None, typer.Option(help="Adapt weights of another patch size to this one.")
    ] = None,
    attention: Annotated[bool, typer.Option(help="Compare the attention maps too.")] = True,
    per_channel_data: Annotated[
        Path | None,
        typer.Option(
            help="Labelled channels: train a small decoder on each and report the spread."
        ),
    ] = None,
    per_channel_labels: Annotated[
        str, typer.Option(help="Name of the label image of a field in --per-channel-data.")
    ] = "labels",
    per_channel_steps: Annotated[
        int, typer.Option(min=1, help="Steps of each of these decoders.")
    ] = 200,
    device: Device = "auto",
    batch_size: Annotated[int, typer.Option(help="Views per network call.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the intervals, the folds and the decoders.")] = 0,
    json: Annotated[
        bool, typer.Option("--json", help="Print the JSON in place of the table.")
    ] = False,
) -> None:
    """Score how consistent the features of a backbone are across channels, honestly.

    Cosine within and between fields, retrieval of a place through another channel, effective rank,
    attention agreement, and how well the channel can still be decoded: to be read together, because
    collapsed features score a perfect cosine.

    Example: `dinocell inspect dinocell-tiny --data fields -o out`
    """
    from dinocell.probing.decoder_probe import ProbeConfig
    from dinocell.probing.inspection import inspect_checkpoints

    names = None
    if channels is not None:
        names = [part.strip() for part in channels.split(",") if part.strip()]
        if not names:
            raise UsageError("--channels must name a channel, got nothing: for example DNA,ER")
    report = inspect_checkpoints(
        checkpoints,
        data,
        index=index,
        pattern=pattern,
        channels_table=channels_table,
        channels=names,
        windows_per_field=windows_per_field,
        window_px=window_px,
        max_fields=max_fields,
        which=which,
        patch_size=patch_size,
        attention=attention,
        per_channel_data=per_channel_data,
        per_channel_labels=per_channel_labels,
        probe=ProbeConfig(steps=per_channel_steps, seed=seed),
        device=device,
        batch_size=batch_size,
        seed=seed,
    )
    print(report.json_text() if json else "\n".join(report.table()))
    if out is not None:
        for path in report.write(out):
            print(f"written: {path}", file=sys.stderr)
