"""Warnings of numpy and other libraries, kept for the image that was being processed."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class LibraryWarnings:
    """Collects Python's warnings by image in place of showing them raw on the screen.

    Each image is processed by one thread at a time, so the thread tells which image is meant.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around a batch.  What the filters turn into errors or ignore stays so."""
        with warnings.catch_warnings():
            warnings.filterwarnings("always", append=True)  # for each image, not for the first only
            shown = warnings.showwarning

            def keep(message: Any, category: Any, *where: Any, **rest: Any) -> None:
                kept = getattr(self._local, "kept", None)
                if kept is None:
                    shown(message, category, *where, **rest)
                elif (note := f"{category.__name__} of Python: {message}") not in kept:
                    kept.append(note)

            warnings.showwarning = keep
            yield

    @contextmanager
    def of_image(self) -> Iterator[list[str]]:
        """Around work on one image in one thread; the list gets a sentence for each warning."""
        kept: list[str] = []
        self._local.kept = kept
        try:
            yield kept
        finally:
            self._local.kept = None
