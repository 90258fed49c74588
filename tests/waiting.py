"""Waiting for what processes, threads and files come to, never for an amount of time."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a function returns something true; pytest's own time limit is the last guard."""
    while not condition():
        time.sleep(0.01)
