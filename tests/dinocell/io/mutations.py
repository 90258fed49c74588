"""Damage to small valid files, drawn by hypothesis: what fuzzing programs do to bytes."""

from __future__ import annotations

from hypothesis import strategies as st

_EXTREME = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, *, header: int = 400) -> bytes:
    """One to four changes of bytes, most of them among the first `header`."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(
            st.integers(0, min(header, len(changed)) if draw(st.booleans()) else len(changed))
        )
        kind = draw(st.sampled_from(("replace", "number", "remove", "insert", "cut")))
        if kind == "replace":
            new = draw(st.binary(min_size=1, max_size=2))
            changed[place : place + len(new)] = new
        elif kind == "number":
            size, order = (
                draw(st.sampled_from((1, 2, 4, 8))),
                draw(st.sampled_from(("big", "little"))),
            )
            value = draw(st.sampled_from(_EXTREME)) % 256**size
            changed[place : place + size] = value.to_bytes(size, order)
        elif kind == "remove":
            del changed[place : place + draw(st.integers(1, 16))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=16))
        else:
            del changed[place:]
    return bytes(changed)
