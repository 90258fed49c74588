"""`dinocell inspect`: what a backbone makes of the channels of a field, with nothing left out.

Reads checkpoints and fields, computes features, and writes the consistency score as a table,
`inspect.json` and `inspect.png`.  Several checkpoints in one call are compared on the same windows.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dinocell.errors import UsageError
from dinocell.files import write_text_atomically
from dinocell.probing.backbones import InspectedBackbone, load_backbone_of
from dinocell.probing.baselines import (
    PIXELS,
    RANDOM,
    pixel_backbones,
    principal_components,
    with_random_weights,
)
from dinocell.probing.channel_consistency import (
    ConsistencyReport,
    Suspicions,
    channel_consistency,
)
from dinocell.probing.decoder_probe import ProbeConfig
from dinocell.probing.feature_extraction import ViewFeatures, extract_views
from dinocell.probing.fields import FieldOptions, FieldSource, open_fields
from dinocell.probing.inspection_report import (
    FEATURES,
    Inspection,
    InspectionReport,
    draw_inspection,
)
from dinocell.probing.labelled_channels import ChannelScores, channel_scores
from dinocell.progress import progress

_EXTRACTED = ("window_px", "windows_per_field", "batch_size", "attention")
_SETTINGS_WRITTEN = (
    "windows_per_field",
    "window_px",
    "which",
    "patch_size",
    "attention",
    "baselines",
    "seed",
)


@dataclass(frozen=True)
class InspectOptions:
    """What is measured, and where."""

    windows_per_field: int = 4  # number of square windows of a field
    window_px: int = 224  # their edge in px
    max_fields: int | None = None  # at most so many fields, spread evenly over the names
    which: str = "teacher"  # or `student` of a training checkpoint that holds both
    patch_size: int | None = None  # adapt weights of another patch size to this one
    attention: bool = True  # also compare attention maps; this takes another pass
    baselines: bool = True  # also measure random weights of the same shape, pixels and a thumbnail
    device: str = "auto"
    batch_size: int = 8  # views per network call
    seed: int = 0  # random seed of the confidence intervals and the cross-validation

    def __post_init__(self) -> None:
        if self.which not in ("teacher", "student"):
            raise UsageError(
                f"`which` must be teacher or student, got {self.which!r}: choose one of these"
            )
        counts = ("windows_per_field", "window_px", "batch_size", "max_fields", "patch_size")
        for name, least in {**dict.fromkeys(counts, 1), "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(
                    f"`{name}` must be at least {least}, got {value}: give a larger number"
                )


@dataclass(frozen=True)
class PerChannelOptions:
    """A small decoder that is trained on each channel of labelled fields.

    `data` and `labels`, the name of the label image of a field, are those of `find_channel_pairs`.
    """

    data: str | os.PathLike[str]
    labels: str = "labels"
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def inspect_checkpoints(
    checkpoints: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | FieldSource,
    options: InspectOptions | None = None,
    *,
    reading: FieldOptions | None = None,
    per_channel: PerChannelOptions | None = None,
    shown: bool = True,
) -> InspectionReport:
    """Score checkpoints on the same windows of the same fields.

    Parameters
    ----------
    checkpoints : backbone files that `dinocell weights info` knows, DINOCell models, or bundled names
    data : folder of fields, or a FieldSource
    reading : how the files of the folder become fields, and which channels are used
    per_channel : also train a small decoder on each channel of labelled fields
    shown : show progress

    Raises UsageError, DataSetError, ImageFileError, CheckpointError (an option, the fields or a
    checkpoint do not fit; every checkpoint is read before the first feature is computed).
    """
    from dinocell.network.model import resolve_device

    if not checkpoints:
        raise UsageError("A checkpoint must be given, got none: name a file or a bundled model")
    options, reading = options or InspectOptions(), reading or FieldOptions()
    where = resolve_device(options.device)
    source = data if isinstance(data, FieldSource) else open_fields(data, reading)
    source = source.spread(options.max_fields)
    # All are read before the first is measured: a wrong file is reported now, not after an hour.
    backbones = [
        load_backbone_of(path, which=options.which, patch_size=options.patch_size)
        for path in checkpoints
    ]
    for loaded in backbones:
        if options.window_px % loaded.facts["patch_size"]:
            raise UsageError(
                f"`window_px` must be a multiple of the patch size {loaded.facts['patch_size']} of "
                f"{loaded.name}, got {options.window_px}: choose a multiple of {loaded.facts['patch_size']}"
            )
    names = _short_names(checkpoints)
    inspector = _Inspector(source, options, reading, per_channel, shown)
    inspections = [
        inspector.inspect(name, loaded.vit.to(where), loaded.facts)
        for name, loaded in zip(names, backbones, strict=True)
    ]
    baselines = []
    if options.baselines:
        for kind, made, facts in _baselines(backbones, options.seed):
            baselines.append(inspector.inspect(kind, made.to(where), facts, attention=False))
    settings = {
        "data": None if isinstance(data, FieldSource) else os.fspath(data),
        "index": reading.index and os.fspath(reading.index),
        "pattern": reading.pattern,
        "channels_table": reading.channels_table and os.fspath(reading.channels_table),
        "fields": source.names,
        "channels": None if reading.channels is None else list(reading.channels),
        **{name: getattr(options, name) for name in _SETTINGS_WRITTEN},
        "device": str(where),
        "per_channel": None,
    }
    if per_channel is not None:
        given = {"data": os.fspath(per_channel.data), "labels": per_channel.labels}
        settings["per_channel"] = given | asdict(per_channel.probe)
    return InspectionReport(inspections, settings, inspector.left_out, baselines)


@dataclass
class _Inspector:
    """Measures one network after the other on the same windows."""

    source: FieldSource
    options: InspectOptions
    reading: FieldOptions
    per_channel: PerChannelOptions | None
    shown: bool
    left_out: list[str] = field(default_factory=list)

    def inspect(
        self, name: str, vit: nn.Module, facts: dict[str, Any], *, attention: bool = True
    ) -> Inspection:
        """`attention=False`: for a network whose maps mean nothing."""
        started = time.monotonic()
        how: dict[str, Any] = {key: getattr(self.options, key) for key in _EXTRACTED}
        how["attention"] = how["attention"] and attention
        with progress(f"inspecting {name}", len(self.source), shown=self.shown) as bar:
            features = extract_views(
                vit,
                self.source,
                channels=self.reading.channels,
                advance=partial(bar.advance, 1),
                **how,
            )
        if name == PIXELS:
            features = principal_components(features)
        self.left_out = features.left_out
        reports = _score(features, self.options.seed)
        scores: ChannelScores | None = None
        asked = self.per_channel
        if asked is not None:
            scores = channel_scores(
                vit,
                asked.data,
                asked.probe,
                labels_name=asked.labels,
                channels=self.reading.channels,
                shown=self.shown,
            )
        parts = (name, facts, reports, features.example, scores)
        return Inspection(*parts, time.monotonic() - started)


def _baselines(
    backbones: Sequence[InspectedBackbone], seed: int
) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """Name, network and facts of what each shape of the checkpoints is compared with."""
    shapes: dict[tuple[Any, ...], InspectedBackbone] = {}
    for loaded in backbones:
        keys = ("patch_size", "embed_dim", "depth", "num_heads")
        shapes.setdefault(tuple(loaded.facts[key] for key in keys), loaded)
    for number, loaded in enumerate(shapes.values(), start=1):
        name = RANDOM if len(shapes) == 1 else f"{RANDOM} {number}"
        facts = {**loaded.facts, "path": None, "format": "random", "shape_of": loaded.name}
        yield name, with_random_weights(loaded.vit, seed), facts
    patch_size = backbones[0].facts["patch_size"]
    for name, made in pixel_backbones(patch_size).items():
        yield name, made, {"path": None, "format": "pixels", "patch_size": patch_size}


def write_inspection(report: InspectionReport, out: str | os.PathLike[str]) -> list[Path]:
    """Write `inspect.json` and `inspect.png` into a folder; each appears whole or not at all."""
    folder = Path(out)
    written = [folder / "inspect.json", folder / "inspect.png"]
    write_text_atomically(written[0], report.json_text() + "\n")
    draw_inspection(report, written[1])
    return written


def _score(features: ViewFeatures, seed: int) -> dict[str, ConsistencyReport]:
    places = (features.fields, features.locations, features.channels)
    reports = {
        kind: channel_consistency(
            getattr(features, kind),
            *places,
            attention=features.attention if kind == FEATURES[0] else None,
            suspicions=Suspicions(features.turned[kind], features.shortcuts),
            seed=seed,
        )
        for kind in FEATURES[:2]
    }
    # Each sampled patch is a place of its own.
    patch, count = features.patch, features.patch.shape[1]
    reports[FEATURES[2]] = channel_consistency(
        patch.reshape(-1, patch.shape[-1]),
        np.repeat(features.fields, count),
        (features.locations[:, None] * count + np.arange(count)).ravel(),
        np.repeat(features.channels, count),
        suspicions=Suspicions(features.turned["patch"].reshape(-1, patch.shape[-1])),
        seed=seed,
    )
    return reports


def _short_names(checkpoints: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; numbered where nothing does."""
    paths = [Path(path) for path in checkpoints]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name}#{number}" for number, path in enumerate(paths, start=1)]
