"""Numbers that add up over images, and their ratios."""

import math
from dataclasses import fields
from typing import Any, TypeVar

_Counts = TypeVar("_Counts", bound="Counts")


class Counts:
    """Base of frozen dataclasses of which ``+`` adds up every field."""

    def __add__(self: _Counts, other: _Counts) -> _Counts:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in names}
        return type(self)(**sums)


def ratio(numerator: float, denominator: float) -> float:
    """Quotient of two counts; nan where the denominator is 0."""
    return numerator / denominator if denominator else math.nan
