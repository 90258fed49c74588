"""Progress of long work: a bar on a terminal, plain lines in a log; counts in messages."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_LINE_EVERY_S = 10.0


def count_text(number: int, noun: str) -> str:
    """A count in a message: "1 cell", "12,100 cells"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class Progress:
    """Counts the steps of a work whose total is known; `progress` makes it."""

    def __init__(self, description: str, total: int, *, shown: bool, done: int = 0) -> None:
        self.description = description
        self.total = total
        self.done = self._done_before = done
        self._started = self._last_line = time.monotonic()
        self._bar = None
        self._task = None
        self._shown = shown
        self._plain = shown and not sys.stderr.isatty()
        if shown and not self._plain:
            from rich import progress as bars
            from rich.console import Console

            self._bar = bars.Progress(
                "{task.description}",
                bars.BarColumn(),
                bars.MofNCompleteColumn(),
                bars.TimeElapsedColumn(),
                bars.TimeRemainingColumn(),
                "{task.fields[note]}",
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(description, total=total, completed=done, note="")
            self._bar.start()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more; `note` is shown beside the bar (a loss, a file name)."""
        self.done += steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif self._plain:
            now = time.monotonic()
            if now - self._last_line >= _LINE_EVERY_S:
                self._last_line = now
                rate = (self.done - self._done_before) / (now - self._started)
                remaining = timedelta(seconds=round((self.total - self.done) / rate))
                text = f"{self.description} {self.done}/{self.total}, {remaining} left"
                self.write(f"{text}: {note}" if note else text)

    def expect(self, total: int) -> None:
        """The total turned out to be another."""
        self.total = total
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total)

    def write(self, line: str) -> None:
        """Print a line to standard error without breaking the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def progress(
    description: str, total: int, *, shown: bool = True, done: int = 0
) -> Iterator[Progress]:
    """`with progress("segmenting", 12) as bar: ... bar.advance()`; `shown=False` prints nothing.

    `done` are steps of an earlier run, which the estimate of the remaining time leaves out.
    """
    bar = Progress(description, total, shown=shown, done=done)
    try:
        yield bar
    finally:
        bar.close()
