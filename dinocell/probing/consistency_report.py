"""The result of a consistency score: numbers with their intervals and the values of chance."""

import math
from dataclasses import dataclass, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % interval from fields drawn again, and the value of features that know nothing.

    nan stands for what does not exist or cannot be known, for example between fields if there is one.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan


@dataclass(frozen=True)
class ConsistencyReport:
    """The score of one kind of feature; the numbers of views do not count mean views."""

    num_fields: int
    num_locations: int
    num_views: int
    embed_dim: int  # numbers per feature; an effective rank is at most this and `num_views`
    channels: tuple[str, ...]
    # cosine_same_field (one location through two channels), cosine_other_field_same_channel,
    # cosine_other_field_other_channel, retrieval_top1, effective_rank, effective_rank_centered,
    # feature_std, channel_decodability; with mean views mean_view_cosine_same_field,
    # mean_view_cosine_other_field, mean_view_retrieval_top1; with attention maps
    # attention_same_field, attention_other_field
    estimates: dict[str, Estimate]
    # (C, C) mean cosine of one location through two channels; 1 on the diagonal, nan for channels
    # that never meet
    cosine_by_channel: Floats
    # (C, C) from the channel of the row to that of the column; nan on the diagonal
    retrieval_by_channel: Floats

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def warnings(self) -> list[str]:
        """Sentences on what the numbers do not allow to be claimed."""
        found = []
        cosine, other = (
            self.estimates[name].value
            for name in ("cosine_same_field", "cosine_other_field_other_channel")
        )
        if math.isnan(other):
            found.append(
                "there is only one field, so channels of one field cannot be compared with those of different fields"
            )
        elif cosine - other < 0.05:
            found.append(
                f"different fields are nearly as alike ({other:.3f}) as channels of one field "
                f"({cosine:.3f}): the cosine says little here"
            )
        retrieval = self.estimates["retrieval_top1"]
        if not math.isnan(retrieval.low) and retrieval.low <= retrieval.chance:
            found.append("retrieval is not better than chance")
        if self.estimates["effective_rank_centered"].value < 2:
            found.append("the features vary along fewer than two directions: collapsed")
        if self.num_fields < 20:
            found.append(f"{self.num_fields} fields: the intervals are rough")
        return found

    def to_mapping(self) -> dict[str, Any]:
        """Everything for JSON, nan as null."""
        return for_json(self) | {"warnings": self.warnings()}


def for_json(value: Any) -> Any:
    """Plain values of dataclasses, arrays and containers; null for numbers that are not finite."""
    value = vars(value) if is_dataclass(value) else value
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [for_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
