"""The result of an inspection as a table, as JSON and as a picture."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell import __version__
from dinocell.files import atomic_path
from dinocell.probing.channel_consistency import ConsistencyReport
from dinocell.probing.feature_extraction import ViewExample
from dinocell.probing.labelled_channels import ChannelScores
from dinocell.probing.views import Estimate
from dinocell.results.table import align_columns

FEATURES = ("cls", "patch_mean", "patch")
"""The kinds of features that are scored: CLS token, mean of the patch tokens, single patch tokens."""

_FEATURE_TITLES = ("CLS token", "mean patch token", "single patch tokens")

TITLES = {
    "cosine_same_field": "cosine, one place, two channels",
    "cosine_other_place": "cosine, two places of a field, two channels",
    "cosine_other_field_same_channel": "cosine, two fields, one channel",
    "cosine_other_field_other_channel": "cosine, two fields, two channels",
    "retrieval_within_field": "retrieval within the field, top-1",
    "retrieval_turned": "retrieval within the field, turned",
    "retrieval_top1": "retrieval among all fields, top-1",
    "channel_decodability": "channel decoded by a linear probe",
    "effective_rank": "effective rank",
    "effective_rank_centered": "effective rank, centred",
    "feature_std": "spread of directions",
    "explained_by_illumination": "explained by two slopes of brightness",
    "explained_by_layout": "explained by a 4x4 thumbnail",
    "mean_view_cosine_same_field": "cosine with the mean view, one place",
    "mean_view_cosine_other_field": "cosine with the mean view, two fields",
    "mean_view_retrieval_top1": "retrieval in the mean view, top-1",
    "attention_same_field": "attention agreement, one place",
    "attention_other_field": "attention agreement, two fields",
}
"""The estimates of a `ConsistencyReport` in the words of the table, in its order."""

_MAX_CHANNELS_DRAWN = 7
_NUMBERS_WRITTEN = (
    *("cosine_same_field", "cosine_other_field_other_channel", "retrieval_within_field"),
    *("retrieval_turned", "retrieval_top1"),
    *("channel_decodability", "effective_rank_centered", "feature_std"),
    *("attention_same_field", "attention_other_field"),
)


@dataclass(frozen=True)
class Inspection:
    """Result of one checkpoint; `reports` are by `FEATURES`."""

    name: str
    facts: dict[str, Any]
    reports: dict[str, ConsistencyReport]
    example: ViewExample
    channel_scores: ChannelScores | None
    seconds: float


@dataclass(frozen=True)
class InspectionReport:
    """Results of all checkpoints of a call; `left_out` are channels and windows that were not used.

    `baselines` are what no training was needed for, measured on the same windows.
    """

    inspections: list[Inspection]
    settings: dict[str, Any]
    left_out: list[str] = field(default_factory=list)
    baselines: list[Inspection] = field(default_factory=list)

    def table(self) -> list[str]:
        """Lines of plain text: a block per kind of feature, a column per checkpoint."""
        from rich.cells import cell_len

        first = self.inspections[0].reports[FEATURES[0]]
        lines = [
            f"{first.num_fields} fields, N = {first.num_locations} windows of "
            f"{self.settings['window_px']} px, {first.num_views} views, channels "
            f"{', '.join(first.channels)}"
        ]
        columns = [*self.inspections, *self.baselines]
        for kind, head in zip(FEATURES, _FEATURE_TITLES, strict=True):
            rows = [[head, *(item.name for item in columns), "chance"]]
            for name, title in TITLES.items():
                found = [item.reports[kind].estimates.get(name) for item in columns]
                if not any(found) or (name.startswith("attention") and kind != FEATURES[0]):
                    continue
                chance = next((item.chance for item in found if item), math.nan)
                rows.append([title, *map(_estimate_text, found), number_text(chance)])
            lines += ["", *align_columns(rows, width_of=cell_len)]
        scored = [(i.name, i.channel_scores) for i in columns if i.channel_scores]
        lines += [""] if scored else []
        for item_name, scores in scored:
            lines += align_columns(_channel_rows(item_name, scores), width_of=cell_len)
            lines += align_columns(_across_rows(item_name, scores), width_of=cell_len)
            lines.append(scores.split)
        for item, kind in product(self.inspections, FEATURES):
            found_notes = item.reports[kind].warnings()
            lines += [f"note ({item.name}, {kind}): {text}" for text in found_notes]
        lines += [f"left out: {text}" for text in self.left_out[:5]]
        if len(self.left_out) > 5:
            lines.append(f"left out: {len(self.left_out) - 5} more, see inspect.json")
        return lines

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""

        def found(items: list[Inspection]) -> list[dict[str, Any]]:
            return [
                {
                    "name": item.name,
                    "facts": item.facts,
                    "seconds": round(item.seconds, 3),
                    "features": {kind: item.reports[kind].to_mapping() for kind in FEATURES},
                    "channel_scores": item.channel_scores and item.channel_scores.to_mapping(),
                }
                for item in items
            ]

        whole: dict[str, Any] = {"settings": self.settings, "left_out": self.left_out}
        whole |= {"checkpoints": found(self.inspections), "baselines": found(self.baselines)}
        return {"dinocell_version": __version__, **whole}

    def json_text(self) -> str:
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False, allow_nan=False)


def _channel_rows(name: str, scores: ChannelScores) -> list[list[str]]:
    lines = {channel: result.scores for channel, result in scores.results.items()}
    lines |= {"mean": scores.mean, "std over channels": scores.std}
    head = [f"decoder per channel ({name})", *scores.mean]
    return [head, *([k, *(number_text(v[key]) for key in scores.mean)] for k, v in lines.items())]


def _across_rows(name: str, scores: ChannelScores) -> list[list[str]]:
    """AP at 0.5 of each channel's decoder (row) on each channel (column)."""
    across = scores.across
    if not across:
        return []
    channels, summary = list(scores.results), ("mean", "std", "worst")
    rows = [[f"AP@0.5 trained on ({name})", *channels, *(f"others: {part}" for part in summary)]]
    for channel, result in scores.results.items():
        everywhere = {channel: result.scores, **result.elsewhere}
        values = [everywhere[other]["ap50"] for other in channels]
        rows.append(
            [channel, *map(number_text, [*values, *(across[channel][part] for part in summary)])]
        )
    return rows


def number_text(value: float) -> str:
    """Three digits after the point, two from 10 on, - for nan."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def _estimate_text(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    text = number_text(estimate.value)
    if math.isfinite(estimate.low):
        text += f" [{number_text(estimate.low)}, {number_text(estimate.high)}]"
    return text


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
        tables = (
            (scores.cosine_by_channel, f"{item.name}\ncosine (CLS), one place"),
            (scores.retrieval_by_channel, "retrieval (CLS), row → column"),
        )
        for row, (matrix, title) in enumerate(tables):
            _draw_matrix(figure.add_subplot(grid[top + row, 0]), matrix, scores.channels, title)
        _write_numbers(figure.add_subplot(grid[top + 2, 0]), scores)
        colours = _principal_colours(example.patches)
        for column, place in enumerate(places, start=1):
            axes = [figure.add_subplot(grid[top + row, column]) for row in range(3)]
            axes[0].imshow(example.images[place], cmap="gray", vmin=0, vmax=1)
            axes[0].set_title(example.channels[place], fontsize=9)
            if example.attention is not None:
                axes[1].imshow(example.attention[place], cmap="magma")
            axes[2].imshow(colours[place])
            labels = (example.field, "attention of CLS", "PCA of patches")
            for axis, label in zip(axes, labels, strict=True):
                axis.set_xticks([])
                axis.set_yticks([])
                if column == 1:
                    axis.set_ylabel(label, fontsize=8)
            if example.attention is None:
                axes[1].set_axis_off()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _drawn_channels(example: ViewExample) -> list[int]:
    """Places of the channels that fit; the mean view is always the last."""
    *single, mean = range(len(example.channels))
    return [*single[: _MAX_CHANNELS_DRAWN - 1], mean]


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
    style = {"ha": "center", "va": "center", "fontsize": 5}
    for (row, column), value in np.ndenumerate(matrix):
        if math.isfinite(value) and len(channels) <= 8:
            colour = "black" if value > 0.6 else "white"
            axis.text(column, row, f"{value:.2f}", color=colour, **style)


def _write_numbers(axis: Any, scores: ConsistencyReport) -> None:
    axis.set_axis_off()
    lines = []
    for name in _NUMBERS_WRITTEN:
        if name in scores.estimates:
            estimate = scores.estimates[name]
            text = f"{TITLES[name]}: {number_text(estimate.value)}"
            if math.isfinite(estimate.chance):
                text += f" (chance {number_text(estimate.chance)})"
            lines.append(text)
    axis.text(0, 1, "\n".join(lines), va="top", fontsize=6, transform=axis.transAxes)
