"""The result of an inspection as a table and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from itertools import product
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
    """Result of one checkpoint; `reports` are by `FEATURES`."""

    name: str
    facts: dict[str, Any]
    reports: dict[str, ConsistencyReport]
    example: ViewExample
    channel_scores: ChannelScores | None
    seconds: float


@dataclass(frozen=True)
class InspectionReport:
    """Results of all checkpoints of a call; `left_out` are channels and windows that were not used."""

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
            title = {"cls": "CLS token", "patch_mean": "mean patch token"}[kind]
            rows = [[title, *(item.name for item in self.inspections), "chance"]]
            for name, title in TITLES.items():
                found = [item.reports[kind].estimates.get(name) for item in self.inspections]
                if not any(found) or (name.startswith("attention") and kind != FEATURES[0]):
                    continue
                chance = next((item.chance for item in found if item), math.nan)
                rows.append([title, *map(_estimate_text, found), number_text(chance)])
            lines += ["", *align_columns(rows, width_of=cell_len)]
        scored = {
            i.name: i.channel_scores for i in self.inspections if i.channel_scores is not None
        }
        lines += [""] if scored else []
        for item_name, scores in scored.items():
            lines += [
                *align_columns(_channel_rows(item_name, scores), width_of=cell_len),
                scores.split,
            ]
        for item, kind in product(self.inspections, FEATURES):
            found_notes = item.reports[kind].warnings()
            lines += [f"note ({item.name}, {kind}): {text}" for text in found_notes]
        lines += [f"left out: {text}" for text in self.left_out[:5]]
        if len(self.left_out) > 5:
            lines.append(f"left out: {len(self.left_out) - 5} more, see inspect.json")
        return lines

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        checkpoints = [
            {
                "name": item.name,
                "facts": item.facts,
                "seconds": round(item.seconds, 3),
                "features": {kind: item.reports[kind].to_mapping() for kind in FEATURES},
                "channel_scores": item.channel_scores and item.channel_scores.to_mapping(),
            }
            for item in self.inspections
        ]
        return {
            "dinocell_version": __version__,
            "settings": self.settings,
            "left_out": self.left_out,
            "checkpoints": checkpoints,
        }

    def json_text(self) -> str:
        """`to_mapping` as JSON."""
        return json.dumps(self.to_mapping(), indent=2, ensure_ascii=False, allow_nan=False)


def _channel_rows(name: str, scores: ChannelScores) -> list[list[str]]:
    lines = {channel: result.scores for channel, result in scores.results.items()}
    lines |= {"mean": scores.mean, "std over channels": scores.std}
    rows = [[f"decoder per channel ({name})", *scores.mean]]
    rows += [
        [first, *(number_text(line[key]) for key in scores.mean)] for first, line in lines.items()
    ]
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
