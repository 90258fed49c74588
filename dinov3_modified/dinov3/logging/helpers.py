"""Metrics over a window, printed and written as JSON lines (matches `dinov3.logging.helpers`).

Values may be tensors on a GPU: they stay there until a line is printed, so that logging does not
wait for the device in every step.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.distributed import get_world_size, is_enabled, is_main_process

__all__ = ["MetricLogger", "SmoothedValue"]

logger = logging.getLogger("dinov3")

_LINES_EVERY = 10


class SmoothedValue:
    """The last values of a metric, and its mean over all.

    Args:
        window_size: how many are kept.
        fmt: with the fields median, avg, global_avg, max and value.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.deque: deque[tuple[Any, int]] = deque(maxlen=window_size)
        self.total: Any = 0.0
        self.count = 0

    def update(self, value: Tensor | float, num: int = 1) -> None:
        """Add a value that stands for `num` samples."""
        if isinstance(value, Tensor):
            value = value.detach()
        self.deque.append((value, num))
        self.total = self.total + value * num
        self.count += num

    def synchronize_between_processes(self) -> None:
        """Make count and total those of all processes."""
        if not is_enabled():
            return
        device = self.total.device if isinstance(self.total, Tensor) else "cpu"
        if not isinstance(self.total, Tensor) and torch.cuda.is_available():
            device = torch.device("cuda")
        sums = torch.tensor([float(self.count), float(self.total)], device=device)
        torch.distributed.all_reduce(sums)
        self.count, self.total = int(sums[0]), float(sums[1])

    def _values(self) -> list[float]:
        """The window as numbers, in one copy from the device."""
        values = [value for value, _ in self.deque]
        if values and all(isinstance(value, Tensor) for value in values):
            return [float(v) for v in torch.stack([v.reshape(()).float() for v in values]).tolist()]
        return [float(value) for value in values]

    @property
    def median(self) -> float:
        """Of the window; the lower one of two."""
        values = self._values()
        return statistics.median_low(values) if values else float("nan")

    @property
    def avg(self) -> float:
        """Mean of the window."""
        values = self._values()
        return statistics.fmean(values) if values else float("nan")

    @property
    def global_avg(self) -> float:
        """Mean of all values."""
        return float(self.total) / self.count if self.count else float("nan")

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self._values(), default=float("nan"))

    @property
    def value(self) -> float:
        """The last one."""
        values = self._values()
        return values[-1] if values else float("nan")

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median,
            avg=self.avg,
            global_avg=self.global_avg,
            max=self.max,
            value=self.value,
        )


class MetricLogger:
    """Meters by name; a line on the log and one in a JSON-lines file at intervals.

    Args:
        delimiter: between the meters of a printed line.
        output_file: JSON lines: iteration, iter_time and data_time in seconds, and the median of
            every meter; written by the first process.
    """

    def __init__(self, delimiter: str = "\t", output_file: str | None = None) -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter
        self.output_file = output_file

    def update(self, **kwargs: Tensor | float) -> None:
        """Add a value to each meter; new names make meters."""
        for name, value in kwargs.items():
            if name not in self.meters:
                self.meters[name] = SmoothedValue()
            self.meters[name].update(value)

    def __getattr__(self, name: str) -> Any:
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"no meter {name}: there are {', '.join(meters) or 'none'}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """A meter with a window or format of its own."""
        self.meters[name] = meter

    def synchronize_between_processes(self) -> None:
        """Sums of all processes in every meter; all must have the same meters."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def medians(self) -> dict[str, float]:
        """Median of every meter, its mean over processes; all processes must call this."""
        names = list(self.meters)
        values = [self.meters[name].median for name in names]
        if is_enabled() and get_world_size() > 1:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            shared = torch.tensor(values, dtype=torch.float64, device=device)
            torch.distributed.all_reduce(shared)
            values = (shared / get_world_size()).tolist()
        return dict(zip(names, values, strict=True))

    def dump_in_output_file(self, iteration: int, iter_time: float, data_time: float) -> None:
        """Append a line to the file."""
        medians = self.medians()
        if self.output_file is None or not is_main_process():
            return
        record = {"iteration": iteration, "iter_time": iter_time, "data_time": data_time, **medians}
        with open(self.output_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def record(self, iteration: int, values: dict[str, float]) -> None:
        """Append a line with other values, such as those measured at longer intervals (ours)."""
        if self.output_file is None or not is_main_process():
            return
        with open(self.output_file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"iteration": iteration, **values}) + "\n")

    def log_every(
        self,
        iterable: Iterable[Any],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
    ) -> Iterator[Any]:
        """Pass items on and log after each `print_freq`-th iteration and after the last.

        Args:
            n_iterations: where to stop, counted from 0; None: at the end of `iterable`.
            start_iteration: of the first item.  Lines of the file from there on belong to a run that
                was cut off later than its last checkpoint, and are removed.
        """
        if n_iterations is None:
            n_iterations = start_iteration + len(iterable)  # type: ignore[arg-type]
        if self.output_file is not None and is_main_process():
            _cut_back(Path(self.output_file), start_iteration)
        iter_time, data_time = SmoothedValue(), SmoothedValue()
        begin = end = time.perf_counter()
        width = len(str(n_iterations))
        iteration = start_iteration
        items = iter(iterable)
        while iteration < n_iterations:
            try:
                item = next(items)
            except StopIteration:
                break
            data_time.update(time.perf_counter() - end)
            yield item
            iter_time.update(time.perf_counter() - end)
            last = iteration == n_iterations - 1
            if iteration % _LINES_EVERY == 0 or last:
                self.dump_in_output_file(iteration, iter_time.avg, data_time.avg)
            if iteration % print_freq == 0 or last:
                left = datetime.timedelta(
                    seconds=int(iter_time.global_avg * (n_iterations - iteration - 1))
                )
                parts = [
                    f"{header or ''} [{iteration:{width}d}/{n_iterations}]",
                    f"eta: {left}",
                    str(self),
                    f"time: {iter_time.avg:.4f}",
                    f"data: {data_time.avg:.4f}",
                ]
                if torch.cuda.is_available():
                    peak = torch.cuda.max_memory_allocated() / 2**20
                    parts.append(f"max mem: {peak:.0f}")
                logger.info(self.delimiter.join(part for part in parts if part))
            iteration += 1
            end = time.perf_counter()
        took = datetime.timedelta(seconds=int(time.perf_counter() - begin))
        logger.info("%s total time: %s", header or "", took)


def _cut_back(path: Path, start_iteration: int) -> None:
    """Keep whole lines of iterations before `start_iteration`."""
    if not path.is_file():
        return
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keep = json.loads(line)["iteration"] < start_iteration
        except (ValueError, KeyError, TypeError):
            keep = False  # torn when the run was killed
        if keep:
            kept.append(line)
        else:
            dropped += 1
    if dropped:
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
        logger.info(
            "%s: %d lines from iteration %d on removed", path.name, dropped, start_iteration
        )
