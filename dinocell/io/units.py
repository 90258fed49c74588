"""Lengths as files state them, in µm."""

import math
import re
import unicodedata
from collections.abc import Sequence

_METRIC = (
    *(("", "", 1e6), ("d", "deci", 1e5), ("c", "centi", 1e4), ("m", "milli", 1e3)),
    *(("u", "micro", 1.0), ("n", "nano", 1e-3), ("p", "pico", 1e-6)),
)
_UM_PER_UNIT: dict[str, float] = {
    **{f"{short}m": factor for short, _, factor in _METRIC},
    **{f"{long}meter": factor for _, long, factor in _METRIC},
    **dict.fromkeys(("umeter", "u", "micron"), 1.0),
    **dict.fromkeys(("å", "angstrom", "ångstrom"), 1e-4),
    **dict.fromkeys(("in", "inch", "inche", '"'), 25_400.0),
}
"""µm in a unit of length, as `_unit_key` writes it."""

_NO_LENGTH = ("", "none", "pixel", "px", "referenceframe")  # of a picture without calibration
_COARSEST_UM = 20.0  # an ImageJ scale in inch or cm coarser than this is a printing default


def length_um(value: float | None, unit: str) -> float | None:
    """A length in µm; None where it is not positive, or the unit is none of length."""
    factor = _UM_PER_UNIT.get(_unit_key(unit))
    if value is None or factor is None or not math.isfinite(value) or value <= 0:
        return None
    return float(value) * factor


def pixel_edges_um(
    edges: Sequence[float], units: Sequence[str], notes: list[str]
) -> tuple[float, float] | None:
    """Edges of a pixel along x and y; None, and why in `notes`, where the file does not give them."""
    sizes: list[float] = []
    for edge, unit in zip(edges, units, strict=True):
        key = _unit_key(unit)
        if key in _NO_LENGTH:
            return None
        if key not in _UM_PER_UNIT:
            notes.append(
                f"The file gives the size of a pixel in {unit!r}, which is not a known unit of length: no "
                "pixel size is used; set `pixel_size_um`"
            )
            return None
        size = edge * _UM_PER_UNIT[key]
        if not math.isfinite(size) or size <= 0:
            notes.append(
                f"The file gives {edge:g} {unit} as the size of a pixel, which cannot be: no pixel size is "
                "used; set `pixel_size_um`"
            )
            return None
        if key in ("inch", "inche", "in", '"', "cm", "centimeter") and size > _COARSEST_UM:
            return None
        sizes.append(size)
    if not is_square(sizes[0], sizes[1]):
        notes.append(
            f"Pixels must be square for measurements in µm, the file gives {sizes[0]:g} × {sizes[1]:g} "
            "µm: no pixel size is used; set `pixel_size_um`"
        )
    return sizes[0], sizes[1]


def is_square(width: float, height: float) -> bool:
    """Whether two edges differ by 1 % or less."""
    return abs(width - height) <= 0.01 * max(width, height)


def _unit_key(unit: str) -> str:
    """A unit of length in one spelling: `Micrometres`, `µm` and `\\u00B5m` → `micrometer`, `um`, `um`."""
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda code: chr(int(code[1], 16)), unit)
    text = unicodedata.normalize("NFKC", text).lower().replace("\u03bc", "u")
    text = re.sub(r"[\s._-]", "", text).replace("metre", "meter").replace("ström", "strom")
    return text.removesuffix("s")
