"""Settings that are wrong, and lists in messages, in one form (ours)."""

from collections.abc import Collection, Sequence
from typing import Any


def one_of(
    name: str, value: Any, known: Collection[Any], error: type[Exception] = ValueError
) -> None:
    """Refuse a value that is not among the known ones; `name` is what the message calls it."""
    if value not in known:
        listing = f"{'one of ' if len(known) > 1 else ''}{', '.join(map(str, known))}"
        shown = name if " " in name else f"`{name}`"
        raise error(f"{shown} must be {listing}, got {value!r}: choose one of these")


def listed(names: Sequence[Any], most: int = 8, between: str = ", ") -> str:
    """Names for a message, cut off after some."""
    more = f"{between}... ({len(names)})" if len(names) > most else ""
    return between.join(map(str, names[:most])) + more
