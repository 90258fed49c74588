"""The result of an inspection as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.files import atomic_path
from dinocell.probing.consistency_report import ConsistencyReport
from dinocell.probing.feature_extraction import ViewExample
from dinocell.probing.inspection_report import TITLES, InspectionReport, number_text

_MAX_CHANNELS_DRAWN = 7
_NUMBERS_WRITTEN = (
    *("cosine_same_field", "cosine_other_field_other_channel", "retrieval_top1"),
    *("channel_decodability", "effective_rank_centered", "feature_std"),
    *("attention_same_field", "attention_other_field"),
)


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
