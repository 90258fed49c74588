"""The thresholds are checked once, where they are made."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dinocell.network.config import ModelConfig
from dinocell.segmentation.thresholds import ThresholdChanges, Thresholds
from dinocell.segmentation.watershed import distance_map_to_labels


@pytest.mark.parametrize(
    ("peak", "fill"), [(0.2, 0.6), (0.5, 0.5), (1.0, 0.2), (0.6, -0.1), (math.nan, 0.2)]
)
def test_fill_is_below_peak_and_both_are_in_range(peak: float, fill: float) -> None:
    with pytest.raises(ValueError, match="0 <= `fill_threshold` < `peak_threshold` < 1"):
        Thresholds(peak, fill)


@pytest.mark.parametrize("prominence", [-0.1, 1.1, math.nan])
def test_the_prominence_is_from_0_to_1(prominence: float) -> None:
    with pytest.raises(ValueError, match=r"`min_prominence` must be in \[0, 1\]"):
        Thresholds(0.6, 0.2, prominence)


def test_the_area_is_not_negative() -> None:
    with pytest.raises(ValueError, match="`min_area_px` must be at least 0, got -1"):
        Thresholds(0.6, 0.2, min_area_px=-1)


def test_the_ends_of_each_range_are_allowed() -> None:
    assert Thresholds(0.6, 0.0, 0.0, 0).min_prominence == 0
    assert Thresholds(math.nextafter(1, 0), 0.0, 1.0).min_prominence == 1


def test_the_function_checks_its_keywords() -> None:
    with pytest.raises(ValueError, match="must hold 0 <="):
        distance_map_to_labels([[0.0]], peak_threshold=0.2, fill_threshold=0.6)


def test_a_model_configuration_holds_them() -> None:
    config = ModelConfig(peak_threshold=0.7, fill_threshold=0.3, min_prominence=0.25, min_area_px=9)
    assert Thresholds.of(config) == Thresholds(0.7, 0.3, 0.25, 9)


def test_one_default_for_the_model_and_the_function() -> None:
    assert Thresholds(0.6, 0.2).min_prominence == ModelConfig().min_prominence


def test_the_keywords_are_the_fields() -> None:
    names = {field.name for field in dataclasses.fields(Thresholds)}
    assert ThresholdChanges.__annotations__.keys() == names
