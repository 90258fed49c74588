"""Text and scale bars on pictures."""

import math
import unicodedata
from typing import Any


def load_font(size: int) -> Any:
    """Pillow's built-in font: the same on every machine."""
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def plain_text(text: str) -> str:
    """Text in the characters that Pillow's built-in font has (ASCII)."""
    text = text.replace("µ", "u").replace("\u03bc", "u").replace("×", "x")
    text = text.replace("–", "-").replace("—", "-")
    parts = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in parts)


def fitted(text: str, font: Any, width_px: float) -> str:
    """Shorten a text in its middle until it fits."""
    if font.getlength(text) <= width_px:
        return text

    def cut(keep: int) -> str:
        return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]

    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(cut(middle)) <= width_px:
            fits = middle
        else:
            too_long = middle
    return cut(fits) if fits else ""


def draw_scale_bar(draw: Any, box: tuple[int, int, int, int], step_um: float) -> None:
    """A bar of 1, 2 or 5 times a power of ten µm, near a fifth of the width, in the lower right."""
    left, _, right, bottom = box
    length_um = _round_length(step_um * (right - left) / 5.0)
    length_px = max(1, round(length_um / step_um))
    text = f"{length_um:g} um" if length_um < 1000 else f"{length_um / 1000:g} mm"
    font = load_font(13)
    x1, y1 = right - 10, bottom - 10
    draw.rectangle((x1 - length_px - 1, y1 - 4, x1, y1 + 1), fill=(0, 0, 0))
    draw.rectangle((x1 - length_px, y1 - 3, x1 - 1, y1), fill=(255, 255, 255))
    anchor = (x1 - length_px / 2, y1 - 6)
    draw.text(
        anchor,
        text,
        font=font,
        fill=(255, 255, 255),
        anchor="mb",
        stroke_width=1,
        stroke_fill=(0, 0, 0),
    )


def _round_length(wanted_um: float) -> float:
    """The largest of 1, 2, 5 × 10^k that is not above the wanted length."""
    power = 10.0 ** math.floor(math.log10(wanted_um))
    return max(f * power for f in (1.0, 2.0, 5.0) if f * power <= wanted_um * (1 + 1e-9))
