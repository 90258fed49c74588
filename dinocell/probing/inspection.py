"""`dinocell inspect`: what a backbone makes of the channels of a field, with nothing left out.

Reads checkpoints and fields, computes features, and writes the consistency score as a table,
`inspect.json` and `inspect.png`.  Several checkpoints in one call are compared on the same windows.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from dinocell import __version__
from dinocell.errors import CheckpointError, DataSetError, UsageError
from dinocell.files import atomic_path, write_text_atomically
from dinocell.network.weights import find_weights
from dinocell.probing.channel_consistency import (
    ConsistencyReport,
    Estimate,
    channel_consistency,
)
from dinocell.probing.decoder_probe import ChannelScores, ProbeConfig, channel_scores
from dinocell.probing.feature_extraction import (
    FieldImage,
    ViewExample,
    ViewFeatures,
    extract_views,
)
from dinocell.progress import Progress, progress
from dinocell.results.table import align_columns

__all__ = [
    "FEATURES",
    "FieldSource",
    "InspectedBackbone",
    "Inspection",
    "InspectionReport",
    "draw_inspection",
    "inspect_checkpoints",
    "load_backbone_of",
    "open_fields",
]

FEATURES = ("cls", "patch_mean")
"""The two kinds of features that are scored: CLS token, mean of the patch tokens."""

_TITLES = {
    "cosine_same_field": "cosine, one place, two channels",
    "cosine_other_field_same_channel": "cosine, two fields, one channel",
    "cosine_other_field_other_channel": "cosine, two fields, two channels",
    "retrieval_top1": "retrieval of the place, top-1",
    "channel_decodability": "channel decoded by a linear probe",
    "effective_rank": "effective rank",
    "effective_rank_centered": "effective rank, centred",
    "feature_std": "spread of directions",
    "mean_view_cosine_same_field": "cosine with the mean view, one place",
    "mean_view_cosine_other_field": "cosine with the mean view, two fields",
    "mean_view_retrieval_top1": "retrieval in the mean view, top-1",
    "attention_same_field": "attention agreement, one place",
    "attention_other_field": "attention agreement, two fields",
}
_MAX_CHANNELS_DRAWN = 7


@dataclass(frozen=True)
class FieldSource:
    """Fields that are read one at a time.

    Attributes
    ----------
    names : list of str
    read : callable (index) → FieldImage
    """

    names: list[str]
    read: Callable[[int], FieldImage]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[FieldImage]:
        return (self.read(index) for index in range(len(self.names)))


@dataclass(frozen=True)
class InspectedBackbone:
    """A ViT in eval mode and what is known of it: `path`, `format`, `patch_size`, ..."""

    name: str
    vit: nn.Module
    facts: dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """Result of one checkpoint.

    Attributes
    ----------
    name : str
    facts : dict
    reports : dict of ConsistencyReport, by `FEATURES`
    example : ViewExample
    channel_scores : ChannelScores or None
    seconds : float
    """

    name: str
    facts: dict[str, Any]
    reports: dict[str, ConsistencyReport]
    example: ViewExample
    channel_scores: ChannelScores | None
    seconds: float


@dataclass(frozen=True)
class InspectionReport:
    """Results of all checkpoints of a call.

    Attributes
    ----------
    inspections : list of Inspection
    settings : dict
    left_out : list of str
        Channels and windows that could not be used.
    """

    inspections: list[Inspection]
    settings: dict[str, Any]
    left_out: list[str] = field(default_factory=list)

    def table(self) -> list[str]:
        """Lines of plain text: a block per kind of feature, a column per checkpoint."""
        from rich.cells import cell_len

        first = self.inspections[0].reports[FEATURES[0]]
        lines = [
            f"{first.num_fields} fields, N = {first.num_locations} windows of "
            f"{self.settings['window_px']} px, {first.num_views} views, channels "
            f"{', '.join(first.channels)}"
        ]
        for kind in FEATURES:
            rows: list[list[str]] = [
                [
                    {"cls": "CLS token", "patch_mean": "mean patch token"}[kind],
                    *(item.name for item in self.inspections),
                    "chance",
                ]
            ]
            for name, title in _TITLES.items():
                found = [item.reports[kind].estimates.get(name) for item in self.inspections]
                if not any(found) or (name.startswith("attention") and kind != FEATURES[0]):
                    continue
                chance = next((item.chance for item in found if item), math.nan)
                rows.append([title, *map(_estimate_text, found), _number_text(chance)])
            lines += ["", *align_columns(rows, width_of=cell_len)]
        scored = [item for item in self.inspections if item.channel_scores is not None]
        if scored:
            lines += ["", *self._channel_lines(scored, cell_len)]
        for item in self.inspections:
            for kind in FEATURES:
                lines += [
                    f"note ({item.name}, {kind}): {text}" for text in item.reports[kind].warnings()
                ]
        lines += [f"left out: {text}" for text in self.left_out[:5]]
        if len(self.left_out) > 5:
            lines.append(f"left out: {len(self.left_out) - 5} more, see inspect.json")
        return lines

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        return {
            "dinocell_version": __version__,
            "settings": self.settings,
            "left_out": self.left_out,
            "checkpoints": [
                {
                    "name": item.name,
                    "facts": item.facts,
                    "seconds": round(item.seconds, 3),
                    "features": {kind: item.reports[kind].to_mapping() for kind in FEATURES},
                    "channel_scores": (
                        None if item.channel_scores is None else item.channel_scores.to_mapping()
                    ),
                }
                for item in self.inspections
            ],
        }

    def json_text(self) -> str:
        """`to_mapping` as JSON."""
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False, allow_nan=False)

    def write(self, out: str | os.PathLike[str], *, picture: bool = True) -> list[Path]:
        """Write `inspect.json` and `inspect.png` into a folder; each appears whole or not at all."""
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "inspect.json"]
        write_text_atomically(written[0], self.json_text() + "\n")
        if picture:
            written.append(folder / "inspect.png")
            draw_inspection(self, written[1])
        return written

    @staticmethod
    def _channel_lines(scored: list[Inspection], cell_len: Callable[[str], int]) -> list[str]:
        lines = []
        for item in scored:
            scores = item.channel_scores
            assert scores is not None
            names = list(scores.mean)
            rows = [[f"decoder per channel ({item.name})", *names]]
            for channel, result in scores.results.items():
                rows.append([channel, *(_number_text(result.scores[name]) for name in names)])
            rows.append(["mean", *(_number_text(scores.mean[name]) for name in names)])
            rows.append(["std over channels", *(_number_text(scores.std[name]) for name in names)])
            lines += [*align_columns(rows, width_of=cell_len), scores.split]
        return lines


def inspect_checkpoints(
    checkpoints: Sequence[str | os.PathLike[str]],
    data: str | os.PathLike[str] | FieldSource,
    *,
    index: str | os.PathLike[str] | None = None,
    pattern: str | None = None,
    channels_table: str | os.PathLike[str] | None = None,
    channels: Sequence[str] | None = None,
    windows_per_field: int = 4,
    window_px: int = 224,
    max_fields: int | None = None,
    which: str = "teacher",
    patch_size: int | None = None,
    attention: bool = True,
    per_channel_data: str | os.PathLike[str] | None = None,
    per_channel_labels: str = "labels",
    probe: ProbeConfig | None = None,
    device: str = "auto",
    batch_size: int = 8,
    seed: int = 0,
    shown: bool = True,
) -> InspectionReport:
    """Score checkpoints on the same windows of the same fields.

    Parameters
    ----------
    checkpoints : paths, or names of bundled models or fetched files
        Any backbone file that `dinocell weights info` knows, or a DINOCell model.
    data : folder of fields, or a FieldSource
    index, pattern, channels_table, channels
        As `open_fields`.
    windows_per_field, window_px : int
    max_fields : int, optional
        Take so many fields, spread evenly over the names.
    which : `teacher` or `student`
        Of a training checkpoint that holds both.
    patch_size : int, optional
        Adapt weights of another patch size to this one.
    attention : bool
        Also compare attention maps; costs a second pass.
    per_channel_data : folder, optional
        Labelled channels (`find_channel_pairs`): train a small decoder on each.
    per_channel_labels : str
        Name of the label image of a field in it.
    probe : ProbeConfig, optional
        How these decoders are trained.
    device, batch_size, seed, shown
        Where, how many views per call, of bootstrap and folds, whether progress is shown.

    Raises
    ------
    UsageError, DataSetError, ImageFileError, CheckpointError
        An option, the fields or a checkpoint do not fit; every checkpoint is read before the first
        feature is computed.
    """
    from dinocell.network.model import resolve_device

    if not checkpoints:
        raise UsageError("inspect must get a checkpoint, got none: name a file or a bundled model")
    if which not in ("teacher", "student"):
        raise UsageError(f"--which must be teacher or student, got {which!r}: choose one")
    for name, value in (
        ("--windows-per-field", windows_per_field),
        ("--window-px", window_px),
        ("--batch-size", batch_size),
        ("--max-fields", 1 if max_fields is None else max_fields),
    ):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}: raise it")
    probe = probe or ProbeConfig(seed=seed)
    where = resolve_device(device)
    if isinstance(data, FieldSource):
        source = data
    else:
        source = open_fields(
            data,
            index=index,
            pattern=pattern,
            channels_table=channels_table,
            channels=channels,
        )
    if max_fields is not None and len(source) > max_fields:
        kept = np.linspace(0, len(source) - 1, max_fields).round().astype(int).tolist()
        whole = source
        source = FieldSource(
            [whole.names[place] for place in kept], lambda place: whole.read(kept[place])
        )
    names = _short_names(checkpoints)
    # All are read before the first is measured: a wrong file is told now, not after an hour.
    backbones = [load_backbone_of(path, which=which, patch_size=patch_size) for path in checkpoints]
    for loaded in backbones:
        if window_px % loaded.facts["patch_size"]:
            raise UsageError(
                f"--window-px must be a multiple of the patch size {loaded.facts['patch_size']} of "
                f"{loaded.name}, got {window_px}: choose another"
            )
    inspections = []
    left_out: list[str] = []
    for name, loaded in zip(names, backbones, strict=True):
        started = time.monotonic()
        vit = loaded.vit.to(where)
        with progress(f"inspecting {name}", len(source), shown=shown) as bar:

            def note(field_name: str, bar: Progress = bar) -> None:
                bar.advance(note=field_name)

            features = extract_views(
                vit,
                source,
                window_px=window_px,
                windows_per_field=windows_per_field,
                channels=channels,
                batch_size=batch_size,
                attention=attention,
                advance=note,
            )
        left_out = features.left_out
        reports = _score(features, seed)
        scores = None
        if per_channel_data is not None:
            scores = channel_scores(
                vit,
                per_channel_data,
                probe,
                labels_name=per_channel_labels,
                channels=channels,
                shown=shown,
            )
        inspections.append(
            Inspection(
                name=name,
                facts=loaded.facts,
                reports=reports,
                example=features.example,
                channel_scores=scores,
                seconds=time.monotonic() - started,
            )
        )
    settings: dict[str, Any] = {
        "data": None if isinstance(data, FieldSource) else os.fspath(data),
        "index": None if index is None else os.fspath(index),
        "pattern": pattern,
        "channels_table": None if channels_table is None else os.fspath(channels_table),
        "fields": source.names,
        "channels": None if channels is None else list(channels),
        "windows_per_field": windows_per_field,
        "window_px": window_px,
        "which": which,
        "patch_size": patch_size,
        "attention": attention,
        "seed": seed,
        "device": str(where),
        "per_channel": None,
    }
    if per_channel_data is not None:
        settings["per_channel"] = {
            "data": os.fspath(per_channel_data),
            "labels": per_channel_labels,
            **asdict(probe),
        }
    return InspectionReport(inspections, settings, left_out)


def load_backbone_of(
    path: str | os.PathLike[str], *, which: str = "teacher", patch_size: int | None = None
) -> InspectedBackbone:
    """The ViT of a checkpoint file or folder, or of a DINOCell model (also a bundled one).

    Parameters
    ----------
    path : path, or name of a bundled model or a fetched file
    which : `teacher` or `student`
    patch_size : int, optional
        Adapt the patch embedding to this patch size.

    Raises
    ------
    UsageError, CheckpointError
        There is no such file, or it holds no backbone, or none that fits.
    """
    from dinocell.network.model import bundled_models, load_model, read_model_header

    name = os.fspath(path)
    is_model = name in bundled_models() and not Path(name).exists()
    if not is_model and Path(name).is_file() and Path(name).suffix == ".safetensors":
        try:
            read_model_header(name)
            is_model = True
        except CheckpointError:
            is_model = False  # another program's file: the door below says what it is
    if is_model and (patch_size is None or not Path(name).exists()):
        model = load_model(name)
        if patch_size not in (None, model.config.patch_size):
            raise UsageError(
                f"--patch-size of a bundled model must be its own, {model.config.patch_size}, got "
                f"{patch_size}: name a file, or leave the option out"
            )
        return _inspected(name, model.backbone.vit, {"format": "dinocell"})
    found = find_weights(name)
    if not found.exists():
        raise UsageError(
            f"a checkpoint must be a file, a folder or a bundled model "
            f"({', '.join(bundled_models())}), got {name}: check the path"
        )
    vit, facts = _vit_of_weights(found, which, patch_size)
    return _inspected(name, vit, facts)


def open_fields(
    data: str | os.PathLike[str],
    *,
    index: str | os.PathLike[str] | None = None,
    pattern: str | None = None,
    channels_table: str | os.PathLike[str] | None = None,
    channels: Sequence[str] | None = None,
) -> FieldSource:
    """Fields of a folder: by an index file, by its own `channels.csv`, or by a pattern of names.

    Parameters
    ----------
    data : folder
    index : path, optional
        CSV with the columns field, file, channel.
    pattern : str, optional
        `harmony`, `cellvoyager`, `imagexpress`, or a regular expression with the group `channel`.
    channels_table : path, optional
        CSV with the columns number, channel: names for the numbers that a pattern finds.
    channels : sequence of str, optional
        Of these channels only, in any case of letters; default all but bright field and masks.

    Raises
    ------
    DataSetError
        The folder or a table does not exist, or no field is found; later, a field cannot be read.
    """
    root = Path(data)
    if not root.is_dir():
        raise DataSetError(f"--data must be a folder of fields, got {root}: check the path")
    for option, table in (("--index", index), ("--channels-table", channels_table)):
        if table is not None and not Path(table).is_file():
            raise DataSetError(f"{option} must be a CSV file, got {table}: check the path")
    from dinov3.data.datasets import jump_cellpainting as module

    options: dict[str, Any] = {
        "index": None if index is None else os.fspath(Path(index).resolve()),
        "pattern": pattern,
        "channels_table": None if channels_table is None else str(Path(channels_table).resolve()),
    }
    try:
        if channels is not None:
            found = module.find_fields(os.fspath(root), **options)
            known = {name.lower(): name for item in found for name in item.files}
            options["channels"] = "+".join(known.get(name.lower(), name) for name in channels)
        dataset = module.JUMPCellPaintingMultiView(root=os.fspath(root), missing="allow", **options)
    except (ValueError, OSError) as error:
        raise DataSetError(str(error)) from error

    def read(place: int) -> FieldImage:
        try:
            item = dataset.load_field(place)
        except (ValueError, OSError) as error:
            raise DataSetError(str(error)) from error
        planes = item.planes
        if item.illumination is not None:
            planes = planes / item.illumination
        return FieldImage(item.name, tuple(item.channels), planes)

    names = [dataset.get_sample_name(place) for place in range(len(dataset))]
    return FieldSource(names, read)


# ------------------------------------------------------------------------------------- internals


def _vit_of_weights(
    path: Path, which: str, patch_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """A ViT of the shape of the file's tensors, with its weights, and facts of the file."""
    from dinov3.cells import weights as formats

    try:
        options = formats.vit_arguments(formats.describe(path, which=which))
        if patch_size is not None:
            options["patch_size"] = patch_size
        from dinov3.models.vision_transformer import DinoVisionTransformer

        vit = DinoVisionTransformer(**options)
        vit.init_weights()
        loaded = formats.load_backbone(vit, path, which=which)
    except (ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(str(error)) from error
    return vit, {"format": loaded.description.format, "notes": list(loaded.notes)}


def _inspected(name: str, vit: nn.Module, facts: Mapping[str, Any]) -> InspectedBackbone:
    known: dict[str, Any] = {
        **facts,
        "path": name,
        "patch_size": int(vit.patch_size),  # type: ignore[arg-type]
        "embed_dim": int(vit.embed_dim),  # type: ignore[arg-type]
        "depth": len(vit.blocks),  # type: ignore[arg-type]
        "num_heads": int(vit.num_heads),  # type: ignore[arg-type]
        "parameters": sum(parameter.numel() for parameter in vit.parameters()),
    }
    return InspectedBackbone(name, vit.eval().requires_grad_(False), known)


def _score(features: ViewFeatures, seed: int) -> dict[str, ConsistencyReport]:
    return {
        kind: channel_consistency(
            getattr(features, kind),
            features.fields,
            features.locations,
            features.channels,
            attention=features.attention if kind == FEATURES[0] else None,
            seed=seed,
        )
        for kind in FEATURES
    }


def _short_names(checkpoints: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The last parts of the paths, as many as tell them apart; numbered where nothing does."""
    paths = [Path(path) for path in checkpoints]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name}#{number}" for number, path in enumerate(paths, start=1)]


def _number_text(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _estimate_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    text = _number_text(estimate.value)
    if math.isfinite(estimate.low):
        text += f" [{_number_text(estimate.low)}, {_number_text(estimate.high)}]"
    return text


# ------------------------------------------------------------------------------------- picture


def draw_inspection(report: InspectionReport, path: str | os.PathLike[str]) -> None:
    """Write one PNG: per checkpoint the cosine and retrieval tables by channel, and for one window
    the channels, the attention of CLS and the first three principal components of the patches.

    The components are fitted on all channels of the window together: the same colour means the same
    feature, in every channel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [_drawn_channels(item.example) for item in report.inspections]
    columns = 1 + max(len(places) for places in shown)
    figure = Figure(figsize=(2.1 * (columns + 0.4), 6.6 * len(report.inspections)))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3 * len(report.inspections), columns, width_ratios=[1.4] + [1.0] * (columns - 1)
    )
    for block, (item, places) in enumerate(zip(report.inspections, shown, strict=True)):
        example = item.example
        scores = item.reports["cls"]
        top = 3 * block
        _draw_matrix(
            figure.add_subplot(grid[top, 0]),
            scores.cosine_by_channel,
            scores.channels,
            f"{item.name}\ncosine (CLS), one place",
        )
        _draw_matrix(
            figure.add_subplot(grid[top + 1, 0]),
            scores.retrieval_by_channel,
            scores.channels,
            "retrieval (CLS), row → column",
        )
        _write_numbers(figure.add_subplot(grid[top + 2, 0]), scores)
        colours = _principal_colours(example.patches)
        for column, place in enumerate(places, start=1):
            axes = [figure.add_subplot(grid[top + row, column]) for row in range(3)]
            axes[0].imshow(example.images[place], cmap="gray", vmin=0, vmax=1)
            axes[0].set_title(example.channels[place], fontsize=9)
            if example.attention is not None:
                axes[1].imshow(example.attention[place], cmap="magma")
            axes[2].imshow(colours[place])
            for axis in axes:
                axis.set_xticks([])
                axis.set_yticks([])
            if column == 1:
                for axis, label in zip(
                    axes, (example.field, "attention of CLS", "PCA of patches"), strict=True
                ):
                    axis.set_ylabel(label, fontsize=8)
            if example.attention is None:
                axes[1].set_axis_off()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _drawn_channels(example: ViewExample) -> list[int]:
    """Places of the channels that fit; the mean view is always the last."""
    places = list(range(len(example.channels)))
    if len(places) <= _MAX_CHANNELS_DRAWN:
        return places
    return [*places[: _MAX_CHANNELS_DRAWN - 1], places[-1]]


def _principal_colours(patches: NDArray[np.float32]) -> NDArray[np.float32]:
    """(C, h, w, D) → (C, h, w, 3) in [0, 1]: three components, 2nd to 98th percentile each."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    _, _, directions = np.linalg.svd(flat.T @ flat)
    # A direction and its opposite fit alike: the sign that makes the largest weight positive.
    for direction in directions[:3]:
        direction *= np.sign(direction[np.abs(direction).argmax()]) or 1.0
    values = flat @ directions[:3].T
    low, high = np.percentile(values, [2, 98], axis=0)
    scaled = (values - low) / np.where(high > low, high - low, 1.0)
    return np.clip(scaled, 0, 1).reshape(*patches.shape[:-1], 3).astype(np.float32)


def _draw_matrix(
    axis: Any, matrix: NDArray[np.float64], channels: Sequence[str], title: str
) -> None:
    axis.imshow(np.ma.masked_invalid(matrix), vmin=0, vmax=1, cmap="viridis")
    ticks = range(len(channels))
    axis.set_xticks(ticks, channels, rotation=60, fontsize=6)
    axis.set_yticks(ticks, channels, fontsize=6)
    axis.set_title(title, fontsize=8)
    if len(channels) <= 8:
        for row in ticks:
            for column in ticks:
                value = matrix[row, column]
                if math.isfinite(value):
                    colour = "black" if value > 0.6 else "white"
                    axis.text(
                        column, row, f"{value:.2f}", ha="center", va="center", fontsize=5,
                        color=colour,
                    )  # fmt: skip


def _write_numbers(axis: Any, scores: ConsistencyReport) -> None:
    axis.set_axis_off()
    names = (
        "cosine_same_field",
        "cosine_other_field_other_channel",
        "retrieval_top1",
        "channel_decodability",
        "effective_rank_centered",
        "feature_std",
        "attention_same_field",
        "attention_other_field",
    )
    lines = []
    for name in names:
        if name in scores.estimates:
            estimate = scores.estimates[name]
            text = f"{_TITLES[name]}: {_number_text(estimate.value)}"
            if math.isfinite(estimate.chance):
                text += f" (chance {_number_text(estimate.chance)})"
            lines.append(text)
    axis.text(0, 1, "\n".join(lines), va="top", fontsize=6, transform=axis.transAxes)
