"""Numbers of a report: as text, and as a histogram in SVG units."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.progress import count_text


def area_histogram(areas: NDArray[np.float64], unit: str, what: str) -> dict[str, Any] | None:
    """Bars, ticks and description of a histogram of cell areas, in SVG units; None without a cell."""
    if len(areas) == 0:
        return None
    top = _nice_ceiling(max(float(np.percentile(areas, 99.5)), 1e-12))
    bins = int(np.clip(round(2 * math.sqrt(len(areas))), 8, 30))
    counts = np.histogram(np.minimum(areas, top), bins=bins, range=(0.0, top))[0]
    above = int((areas > top).sum())
    width, left, base = 520, 46, 150
    right = width - 30
    plot = right - left
    highest = max(int(counts.max()), 1)
    bars = []
    for k, value in enumerate(counts.tolist()):
        bar = (base - 14) * value / highest
        low, high = top * k / bins, top * (k + 1) / bins
        bars.append(
            {
                "x": f"{left + plot * k / bins + 0.5:.1f}",
                "y": f"{base - bar:.1f}",
                "width": f"{plot / bins - 1:.1f}",
                "height": f"{bar:.1f}",
                "title": f"{number_text(low)} to {number_text(high)} {unit}: {count_text(value, 'cell')}",
            }
        )
    median = float(np.median(areas))
    rest = f"; the last bar holds {above} larger" if above else ""
    return {
        "width": width,
        "height": 190,
        "left": left,
        "right": right,
        "base": base,
        "bars": bars,
        "ticks": [
            (f"{left + plot * share:.1f}", number_text(top * share))
            for share in (0, 0.25, 0.5, 0.75, 1)
        ],
        "median_x": f"{left + plot * min(median / top, 1.0):.1f}",
        "highest": highest,
        "unit": unit,
        "described": (
            f"Histogram of the areas of {count_text(len(areas), 'cell')} in {what}: median "
            f"{number_text(median)} {unit}, from {number_text(float(areas.min()))} to "
            f"{number_text(float(areas.max()))} {unit}{rest}."
        ),
    }


def _nice_ceiling(value: float) -> float:
    """The smallest of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 × 10^k that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    steps = (1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 6.0, 8.0, 10.0)
    return next(s * power for s in steps if s * power >= value * (1 - 1e-9))


def number_text(value: Any) -> str:
    """A table cell: whole numbers as they are, others with four digits, nothing known as a dash."""
    if value is None:
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    if isinstance(value, (float, np.floating)):
        value = float(value)
        if not math.isfinite(value):
            return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
        if value == round(value) and abs(value) < 1e15:
            return f"{round(value):,}"
        if 1e3 <= abs(value) < 1e15:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    return str(value)
