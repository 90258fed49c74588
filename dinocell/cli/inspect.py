"""`dinocell inspect`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinocell.cli.options import App, Device, Which, argument, channel_names, option

app = App()


@dataclass(frozen=True)
class Fields:
    """Which images are read and how, named as the fields of `FieldOptions`."""

    index: Path | None = option(
        "Read from this CSV (columns field, file, channel) which file is which channel of which field.  "
        "[default: channels.csv in the folder of the fields]"
    )
    pattern: str | None = option(
        "Read channel and field from file names of this kind: harmony, cellvoyager, imagexpress, or a "
        "regular expression with the group `(?P<channel>...)`."
    )
    channels_table: Path | None = option(
        "Read the names of channel numbers from this CSV; needs --pattern."
    )
    channels: str | None = option(
        "Use only these channels: names separated by commas.  [default: all but bright field]"
    )


@dataclass(frozen=True)
class Inspecting:
    """What is measured, named as the fields of `InspectOptions`."""

    windows_per_field: int = option("Cut this many square windows out of each field.", 4)
    window_px: int = option("Cut windows with this edge length in px.", 224)
    max_fields: int | None = option(
        "Use at most this many fields, spread evenly over the sorted names.  [default: all]"
    )
    which: Which = "teacher"
    patch_size: int | None = option(
        "Adapt the weights to this patch size in px.  [default: that of the weights]"
    )
    attention: bool = option("Compare the attention maps, too; this takes another pass.", True)
    baselines: bool = option(
        "Compare with random weights of the same shape, raw pixels and a 4x4 thumbnail; this doubles "
        "the time.",
        True,
    )
    device: Device = "auto"
    batch_size: int = option("Run the network on this many views at once.", 8)
    seed: int = option(
        "Use this random seed for confidence intervals, cross-validation and the small decoders.", 0
    )


@dataclass(frozen=True)
class PerChannel:
    """The small decoder that is trained on each channel."""

    per_channel_data: Path | None = option(
        "Train a small decoder on each channel of the labelled fields in this folder, and report how much "
        "the scores differ."
    )
    per_channel_labels: str = option(
        "Read the label image of this name (without suffix) in each field of --per-channel-data.",
        "labels",
    )
    per_channel_steps: int = option("Train each small decoder for this many steps.", 200, min=1)


@app.command()
def inspect(
    *,
    checkpoints: list[str] = argument(
        "Backbone files, training checkpoints or models; several are compared.",
        metavar="CHECKPOINT...",
    ),
    data: Path = option("Read the multi-channel fields of view from this folder.", ...),
    source: Fields,
    options: Inspecting,
    per_channel: PerChannel,
    out: Path | None = option(
        "Write inspect.json and inspect.png to this folder.", names="--out -o"
    ),
    json: bool = option("Print the result as JSON, not as a table.", False),
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

    reading: dict[str, Any] = vars(source) | {"channels": channel_names(source.channels)}
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
