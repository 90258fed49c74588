"""`dinocell inspect`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dinocell.cli.options import App, Device, Which
from dinocell.errors import UsageError

__all__ = ["Fields", "Inspecting", "PerChannel", "app"]

app = App()


@dataclass(frozen=True)
class Fields:
    """Which images are read and how, named as the fields of `FieldOptions`."""

    index: Annotated[
        Path | None,
        typer.Option(
            help="Read from this CSV (columns field, file, channel) which file is which channel of which "
            "field.  [default: channels.csv in the folder of the fields]"
        ),
    ] = None
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Read channel and field from file names of this kind: harmony, cellvoyager, "
            "imagexpress, or a regular expression with the group `(?P<channel>...)`."
        ),
    ] = None
    channels_table: Annotated[
        Path | None,
        typer.Option(help="Read the names of channel numbers from this CSV; needs --pattern."),
    ] = None
    channels: Annotated[
        str | None,
        typer.Option(
            help="Use only these channels: names separated by commas.  [default: all but bright field]"
        ),
    ] = None


@dataclass(frozen=True)
class Inspecting:
    """What is measured, named as the fields of `InspectOptions`."""

    windows_per_field: Annotated[
        int, typer.Option(help="Cut this many square windows out of each field.")
    ] = 4
    window_px: Annotated[int, typer.Option(help="Cut windows with this edge length in px.")] = 224
    max_fields: Annotated[
        int | None,
        typer.Option(
            help="Use at most this many fields, spread evenly over the sorted names.  [default: all]"
        ),
    ] = None
    which: Which = "teacher"
    patch_size: Annotated[
        int | None,
        typer.Option(
            help="Adapt the weights to this patch size in px.  [default: that of the weights]"
        ),
    ] = None
    attention: Annotated[
        bool, typer.Option(help="Compare the attention maps, too; this takes a second pass.")
    ] = True
    device: Device = "auto"
    batch_size: Annotated[int, typer.Option(help="Run the network on this many views at once.")] = 8
    seed: Annotated[
        int,
        typer.Option(
            help="Use this random seed for confidence intervals, cross-validation and the small decoders."
        ),
    ] = 0


@dataclass(frozen=True)
class PerChannel:
    """The small decoder that is trained on each channel."""

    per_channel_data: Annotated[
        Path | None,
        typer.Option(
            help="Train a small decoder on each channel of the labelled fields in this folder, and "
            "report how much the scores differ."
        ),
    ] = None
    per_channel_labels: Annotated[
        str,
        typer.Option(help="Expect the label image of a field of --per-channel-data by this name."),
    ] = "labels"
    per_channel_steps: Annotated[
        int, typer.Option(min=1, help="Train each small decoder for this many steps.")
    ] = 200


@app.command()
def inspect(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Backbone files, training checkpoints or models; several are compared.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="Read the multi-channel fields of view from this folder.")
    ],
    source: Fields,
    options: Inspecting,
    per_channel: PerChannel,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write inspect.json and inspect.png to this folder."),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, not as a table.")
    ] = False,
) -> None:
    """Measure how similar the features of a backbone are in different channels of one field.

    The table shows the cosine similarity within and between fields, how often a place is found again
    in another channel, the effective rank of the features, the agreement of attention maps, and how
    well the channel can be recognised from the features. Read these scores together: a network whose
    features are all the same has a perfect cosine similarity.

    Example: `dinocell inspect dinocell-tiny --data fields -o out`
    """
    from dinocell.probing.decoder_probe import ProbeConfig
    from dinocell.probing.fields import FieldOptions
    from dinocell.probing.inspection import (
        InspectOptions,
        PerChannelOptions,
        inspect_checkpoints,
        write_inspection,
    )

    reading: dict[str, Any] = vars(source) | {"channels": _channel_names(source.channels)}
    decoders = None
    if per_channel.per_channel_data is not None:
        decoders = PerChannelOptions(
            per_channel.per_channel_data,
            per_channel.per_channel_labels,
            ProbeConfig(steps=per_channel.per_channel_steps, seed=options.seed),
        )
    report = inspect_checkpoints(
        checkpoints,
        data,
        InspectOptions(**vars(options)),
        reading=FieldOptions(**reading),
        per_channel=decoders,
    )
    print(report.json_text() if json else "\n".join(report.table()))
    if out is not None:
        for path in write_inspection(report, out):
            print(f"written: {path}", file=sys.stderr)


def _channel_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UsageError("`channels` must name a channel, got nothing: give for example DNA,ER")
    return names
