"""Small arrays and files for the tests of reading and writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def textured(shape: tuple[int, ...], dtype: str = "uint16", seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.random(shape).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def two_discs(value: int = 1) -> np.ndarray:
    """Two touching discs of radius 6, labelled 1 and 2 (times `value`)."""
    rows, cols = np.ogrid[:20, :32]
    labels = np.zeros((20, 32), dtype=np.int64)
    labels[(rows - 9) ** 2 + (cols - 9) ** 2 <= 36] = value
    labels[(rows - 9) ** 2 + (cols - 21) ** 2 <= 36] = 2 * value
    return labels


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and not text.endswith(".") and len(text) < 400


def write_packed_gray_png(path: Path, values: np.ndarray, bits: int) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    rows = []
    for row in values:
        digits = "".join(format(int(value), f"0{bits}b") for value in row)
        digits += "0" * (-len(digits) % 8)
        rows.append(b"\0" + int(digits, 2).to_bytes(len(digits) // 8, "big"))
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )
