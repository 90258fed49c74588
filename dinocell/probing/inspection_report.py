"""The result of an inspection as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dinocell import __version__
from dinocell.probing.consistency_report import ConsistencyReport, Estimate
from dinocell.probing.feature_extraction import ViewExample
from dinocell.probing.labelled_channels import ChannelScores
from dinocell.results.table import align_columns

FEATURES = ("cls", "patch_mean")
"""The two kinds of features that are scored: CLS token, mean of the patch tokens."""

TITLES = {
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
"""The estimates of a `ConsistencyReport` in the words of the table, in its order."""


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
            for name, title in TITLES.items():
                found = [item.reports[kind].estimates.get(name) for item in self.inspections]
                if not any(found) or (name.startswith("attention") and kind != FEATURES[0]):
                    continue
                chance = next((item.chance for item in found if item), math.nan)
                rows.append([title, *map(_estimate_text, found), number_text(chance)])
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

    @staticmethod
    def _channel_lines(scored: list[Inspection], cell_len: Callable[[str], int]) -> list[str]:
        lines = []
        for item in scored:
            scores = item.channel_scores
            assert scores is not None
            names = list(scores.mean)
            rows = [[f"decoder per channel ({item.name})", *names]]
            for channel, result in scores.results.items():
                rows.append([channel, *(number_text(result.scores[name]) for name in names)])
            rows.append(["mean", *(number_text(scores.mean[name]) for name in names)])
            rows.append(["std over channels", *(number_text(scores.std[name]) for name in names)])
            lines += [*align_columns(rows, width_of=cell_len), scores.split]
        return lines


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
