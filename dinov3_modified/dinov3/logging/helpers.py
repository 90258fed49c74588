"""Metrics over a window, printed and written as JSON lines (matches `dinov3.logging.helpers`).

Values may be tensors on a GPU: they stay there until a line is printed, then go to the host in one
copy, so that logging does not wait for the device in every step.
"""

import datetime
import json
import logging
import math
import statistics
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov3.cells.files import move_into_place, write_text_atomically
from dinov3.distributed import get_world_size, is_enabled, is_main_process

logger = logging.getLogger("dinov3")

_NAN = float("nan")
# Steps whose values may wait on the device; reached only by callers that never print.
_MAX_PENDING = 1000


class SmoothedValue:
    """The last values of a metric, and its mean over all.

    `window_size`: how many are kept; `fmt`: with the fields median, avg, global_avg, max and value.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.deque: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self._unshared: list[float] = []  # not yet averaged over processes

    def update(self, value: Tensor | float, num: int = 1) -> None:
        """Add a value that stands for `num` samples; a tensor has one element."""
        value = float(_scalar(value) if isinstance(value, Tensor) else value)
        self.deque.append(value)
        self.total += value * num
        self.count += num

    def synchronize_between_processes(self) -> None:
        """Make count and total those of all processes; the window stays this process's."""
        if not is_enabled():
            return
        count, total = _all_reduce([float(self.count), self.total])
        self.count, self.total = int(count), total

    @property
    def median(self) -> float:
        """Of the window; the lower one of two."""
        values = self.deque
        if any(math.isnan(value) for value in values):
            return _NAN
        return statistics.median_low(values) if values else _NAN

    @property
    def avg(self) -> float:
        """Mean of the window."""
        values = self.deque
        return statistics.fmean(values) if values else _NAN

    @property
    def global_avg(self) -> float:
        """Mean of all values."""
        return self.total / self.count if self.count else _NAN

    @property
    def max(self) -> float:
        """Largest of the window."""
        return max(self.deque, default=_NAN)

    @property
    def value(self) -> float:
        """The last one."""
        values = self.deque
        return values[-1] if values else _NAN

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})

    def _share(self, means: list[float]) -> None:
        """Replace the newest values by their means over processes."""
        pairs = list(zip(self._unshared, means, strict=True))
        for offset, (own, mean) in enumerate(reversed(pairs), 1):
            self.total += mean - own
            if offset <= len(self.deque):
                self.deque[-offset] = mean
        self._unshared = []


class MetricLogger:
    """Meters by name; a line on the log and one in a JSON-lines file at intervals.

    What is measured at other intervals (`record`) is in a file of its own beside it,
    monitor_metrics.json, so that all lines of a file have the same keys.

    `delimiter`: between the meters of a printed line.  `output_file`: JSON lines: `iteration`,
    `iter_time` and `data_time` in seconds, the median of every meter over its window, and
    `data_wait_share`, `images_per_second` and GPU memory in MiB where they are known; written by
    the first process.  A value that is not finite is null, as JSON has no NaN.
    """

    def __init__(self, delimiter: str = "\t", output_file: str | None = None) -> None:
        self.delimiter = delimiter
        self.output_file = output_file
        self._meters: dict[str, SmoothedValue] = {}
        self._pending: list[tuple[dict[str, float | None], list[tuple[list[str], Tensor]]]] = []
        self._listeners: list[Callable[[int, dict[str, float]], None]] = []
        self._warned = False

    @property
    def meters(self) -> dict[str, SmoothedValue]:
        """All meters; values that wait on a device are fetched (this process's own)."""
        self._flush()
        return self._meters

    def update(self, **kwargs: Tensor | float) -> None:
        """Add a value to each meter; new names make meters.

        `**kwargs`: numbers or tensors with one element, on any device.  Several processes must give
        the same names.
        """
        # Tensors of a step are stacked at once: one small kernel instead of one each, and later
        # changes of a tensor in place do not reach the log.
        values: dict[str, float | None] = {}
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                scalar = _scalar(value, name)
                groups.setdefault((scalar.device, scalar.dtype), []).append((name, scalar))
                values[name] = None
            else:
                values[name] = float(value)
        stacks = [
            ([name for name, _ in group], torch.stack([scalar for _, scalar in group]))
            for group in groups.values()
        ]
        self._pending.append((values, stacks))
        if len(self._pending) >= _MAX_PENDING:
            self._flush()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        meters = self.meters
        if name in meters:
            return meters[name]
        raise AttributeError(f"No meter {name}: there are {', '.join(meters) or 'none'}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """A meter with a window or format of its own."""
        self._flush()
        self._meters[name] = meter

    def add_listener(self, listener: Callable[[int, dict[str, float]], None]) -> None:
        """Have `listener(iteration, values)` called with every line of the file (ours).

        It is called in the first process only, whether or not there is a file.
        """
        self._listeners.append(listener)

    def synchronize_between_processes(self) -> None:
        """Count and total of all processes in every meter; all must have the same meters."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def medians(self) -> dict[str, float]:
        """Median of every meter, of the values' means over processes; all processes call this."""
        self._average_over_processes()
        return {name: meter.median for name, meter in self._meters.items()}

    def dump_in_output_file(self, iteration: int, iter_time: float, data_time: float) -> None:
        """Append a line to the file; all processes call this."""
        medians = self.medians()
        share = data_time / iter_time if iter_time > 0 else _NAN
        values = {"iter_time": iter_time, "data_time": data_time, "data_wait_share": share}
        if "global_batch_size" in medians and iter_time > 0:
            values["images_per_second"] = medians["global_batch_size"] / iter_time
        self._append(self.output_file, iteration, {**values, **_gpu_memory(), **medians})

    def record(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append a line to monitor_metrics.json: values measured at longer intervals (ours)."""
        self._append(self._monitor_file, iteration, values)

    @property
    def _monitor_file(self) -> str | None:
        file = self.output_file
        return None if file is None else str(Path(file).with_name("monitor_metrics.json"))

    def _append(self, file: str | None, iteration: int, values: Mapping[str, float]) -> None:
        if not is_main_process():
            return
        if file is not None:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            line = json.dumps({"iteration": iteration, **finite}, allow_nan=False)
            try:
                # One write of one line: a run that is killed leaves at most one torn line.
                with open(file, "a", encoding="utf-8") as stream:
                    stream.write(line + "\n")
            except OSError as error:  # a full disk: checkpoints decide whether the run can continue
                logger.warning("A line of metrics could not be written (%s): make room", error)
        for listener in self._listeners:
            listener(iteration, dict(values))

    def log_every(
        self,
        iterable: Iterable[Any],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
    ) -> Iterator[Any]:
        """Pass items on and log after each `print_freq`-th iteration and after the last.

        `n_iterations`: where to stop, counted from 0; None: at the end of `iterable`.
        `start_iteration`: of the first item.  Lines of the file from there on belong to a run that
        was cut off later than its last checkpoint, and are removed; from 0 on, the whole file is
        moved to NAME.previous.
        """
        if n_iterations is None:
            n_iterations = start_iteration + len(iterable)  # type: ignore[arg-type]
        for file in (self.output_file, self._monitor_file):
            if file is not None and is_main_process():
                _cut_back(Path(file), start_iteration)
        iter_time, data_time = SmoothedValue(fmt="{avg:.6f}"), SmoothedValue(fmt="{avg:.6f}")
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
            if iteration % print_freq == 0 or iteration == n_iterations - 1:
                self.dump_in_output_file(iteration, iter_time.avg, data_time.avg)
                left = datetime.timedelta(
                    seconds=int(iter_time.global_avg * (n_iterations - iteration - 1))
                )
                parts = [
                    f"{header or ''} [{iteration:{width}d}/{n_iterations}]".strip(),
                    f"eta: {left}",
                    str(self),
                    f"time: {iter_time}",
                    f"data: {data_time}",
                    *(f"{name}: {value:.0f}" for name, value in _gpu_memory().items()),
                ]
                logger.info(self.delimiter.join(part for part in parts if part))
            iteration += 1
            end = time.perf_counter()
        took = time.perf_counter() - begin
        done = max(iteration - start_iteration, 1)
        total = datetime.timedelta(seconds=int(took))
        logger.info("%s total time: %s (%.6f s / it)", header or "", total, took / done)

    def _flush(self) -> None:
        """Bring all waiting values to the host: one copy a device and type."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, list[str], Tensor]]] = {}
        for step, (_, stacks) in enumerate(pending):
            for names, stack in stacks:
                key = (stack.device, stack.dtype)
                groups.setdefault(key, []).append((step, names, stack))
        for parts in groups.values():
            numbers = iter(torch.cat([stack for _, _, stack in parts]).tolist())
            for step, names, _ in parts:
                for name in names:
                    pending[step][0][name] = float(next(numbers))
        several = get_world_size() > 1
        for values, _ in pending:
            for name, value in values.items():
                assert value is not None
                meter = self._meters.setdefault(name, SmoothedValue())
                meter.update(value)
                if several:
                    meter._unshared.append(value)

    def _average_over_processes(self) -> None:
        """Replace what came since the last line by its mean over processes."""
        self._flush()
        world = get_world_size()
        if world < 2:
            return
        fresh = {name: meter for name, meter in self._meters.items() if meter._unshared}
        shape = ";".join(f"{name}:{len(meter._unshared)}" for name, meter in sorted(fresh.items()))
        mark = float(zlib.crc32(shape.encode()))
        # Processes with other meters would sum unlike things, or wait for each other for ever.
        top, bottom = _all_reduce([mark, -mark], torch.distributed.ReduceOp.MAX)
        if top != -bottom:
            if not self._warned:
                logger.warning(
                    "Metrics are those of this process alone: the processes have logged different ones"
                )
                self._warned = True
            for meter in fresh.values():
                meter._unshared = []
            return
        meters = [fresh[name] for name in sorted(fresh)]
        sums = iter(_all_reduce([value for meter in meters for value in meter._unshared]))
        for meter in meters:
            meter._share([next(sums) / world for _ in meter._unshared])


def _scalar(value: Tensor, name: str = "a metric") -> Tensor:
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got {tuple(value.shape)}: log its mean")
    return value.detach().reshape(())


def _all_reduce(values: list[float], op: Any = torch.distributed.ReduceOp.SUM) -> list[float]:
    """Reduce numbers over processes, on the device that the process group speaks."""
    if not values:
        return []
    on_gpu = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, op=op)
    return [float(number) for number in shared.tolist()]


def _gpu_memory() -> dict[str, float]:
    """Memory in MiB of tensors now and at most, if this process has used a GPU."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    return {
        "gpu_memory_mib": torch.cuda.memory_allocated() / 2**20,
        "gpu_max_memory_mib": torch.cuda.max_memory_allocated() / 2**20,
    }


def _cut_back(path: Path, start_iteration: int) -> None:
    """Keep whole lines of iterations before `start_iteration`."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    if start_iteration == 0:
        previous = path.with_name(f"{path.name}.previous")
        move_into_place(path, previous)
        logger.info("%s of an earlier run is now %s", path.name, previous.name)
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
    if dropped or not path.read_bytes().endswith(b"\n"):
        write_text_atomically(path, "".join(f"{line}\n" for line in kept))
        line = "%s: %d lines removed, those from iteration %d on and torn ones"
        logger.info(line, path.name, dropped, start_iteration)
