"""The four numbers that decide which pixels of a distance map become which cells."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypedDict

from dinocell.network.config import ModelConfig


class ThresholdChanges(TypedDict, total=False):
    """New values for some fields of `Thresholds`, as keyword arguments; None keeps the old value."""

    peak_threshold: float | None
    fill_threshold: float | None
    min_prominence: float | None
    min_area_px: int | None


@dataclass(frozen=True)
class Thresholds:
    """Post-processing of one model, checked when it is made.

    Attributes
    ----------
    peak_threshold, fill_threshold : float, a cell's peak is above `peak_threshold`; a pixel above
        `fill_threshold` belongs to a cell.  ``0 <= fill_threshold < peak_threshold < 1``.
    min_prominence : float in [0, 1]
        A peak that rises less than this above the saddle to a higher peak is part of that cell.  At 0
        every local maximum above `peak_threshold` is a cell.  The default is that of `ModelConfig`;
        training replaces it by the best value on the validation images.
    min_area_px : int, cells with fewer pixels become background

    Raises ValueError (a value is out of its range).
    """

    peak_threshold: float
    fill_threshold: float
    min_prominence: float = ModelConfig.min_prominence
    min_area_px: int = ModelConfig.min_area_px

    def __post_init__(self) -> None:
        if not 0.0 <= self.fill_threshold < self.peak_threshold < 1.0:
            raise ValueError(
                "Thresholds must hold 0 <= `fill_threshold` < `peak_threshold` < 1, got fill "
                f"{self.fill_threshold} and peak {self.peak_threshold}: change "
                "`fill_threshold` or `peak_threshold`"
            )
        if not 0.0 <= self.min_prominence <= 1.0:
            raise ValueError(
                f"`min_prominence` must be in [0, 1], got {self.min_prominence}: "
                f"{ModelConfig.min_prominence} is usual"
            )
        if not self.min_area_px >= 0:
            raise ValueError(
                f"`min_area_px` must be at least 0, got {self.min_area_px}: 0 keeps all cells"
            )

    @classmethod
    def of(cls, config: ModelConfig) -> Thresholds:
        """The thresholds that a model's configuration holds."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})
