"""Log files and metrics of a run (matches `dinov3.logging`)."""

import logging
import os
import sys

from dinov3.distributed import TorchDistributedEnvironment, get_rank, is_enabled
from dinov3.logging.helpers import MetricLogger, SmoothedValue

__all__ = [
    "MetricLogger", "SmoothedValue", "TorchDistributedEnvironment", "cleanup_logging",
    "setup_logging",
]  # fmt: skip

_MARK = "_dinov3_handler"
_LINE = "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)d] %(message)s"
_DATE = "%Y%m%d %H:%M:%S"
_WARNINGS = "py.warnings"  # where logging.captureWarnings sends Python's warnings
# Level and propagation of each logger before `setup_logging`, for `cleanup_logging`.
_before: dict[str | None, tuple[int, bool]] = {}


def setup_logging(
    output: str | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    color: bool = True,
    capture_warnings: bool = True,
    log_to_stdout_only_in_main_process: bool = True,
) -> None:
    """Send a logger's messages to standard output and to OUT/logs/log.txt; a second call replaces.

    Args:
        output: folder of the run, or a file ending in .txt or .log; None: no file.  Processes other
            than the first write to log.txt.rankN.
        name: of the logger, whose messages then no longer reach the root; None: the root.
        level: least severe messages to show.
        color: mark warnings and errors, on a terminal.
        capture_warnings: Python's warnings become messages.
        log_to_stdout_only_in_main_process: other processes write to their file alone.
    """
    # Runs set up their log before their process group; ranks are then known from the environment.
    rank = get_rank() if is_enabled() else TorchDistributedEnvironment().rank
    log = logging.getLogger(name)
    if name not in _before:
        _before[name] = (log.level, log.propagate)
    _remove_handlers(log)
    log.setLevel(level)
    log.propagate = name is None

    handlers: list[logging.Handler] = []
    if rank == 0 or not log_to_stdout_only_in_main_process:
        stream = logging.StreamHandler(stream=sys.stdout)
        on_terminal = color and sys.stdout.isatty()
        stream.setFormatter((_Colored if on_terminal else logging.Formatter)(_LINE, _DATE))
        handlers.append(stream)
    if output is not None:
        whole = output.endswith((".txt", ".log"))
        path = output if whole else os.path.join(output, "logs", "log.txt")
        path = f"{path}.rank{rank}" if rank > 0 else path
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter(_LINE, _DATE))
        handlers.append(file)
    for handler in handlers:
        setattr(handler, _MARK, True)
        handler.setLevel(level)
        log.addHandler(handler)

    logging.captureWarnings(capture_warnings)
    warnings_log = logging.getLogger(_WARNINGS)
    _remove_handlers(warnings_log, close=False)
    if capture_warnings and not any(hasattr(h, _MARK) for h in logging.getLogger().handlers):
        # Their logger passes them to the root, whose handlers are not ours then.
        for handler in handlers:
            warnings_log.addHandler(handler)


def cleanup_logging(*, name: str | None = None) -> None:
    """Undo `setup_logging` for a logger, or with None for all of them."""
    logging.captureWarnings(False)
    _remove_handlers(logging.getLogger(_WARNINGS), close=False)
    for known in list(_before) if name is None else [name]:
        log = logging.getLogger(known)
        _remove_handlers(log)
        level, propagate = _before.pop(known, (log.level, log.propagate))
        log.setLevel(level)
        log.propagate = propagate


class _Colored(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.ERROR:
            return f"\x1b[31m{text}\x1b[0m"
        return f"\x1b[33m{text}\x1b[0m" if record.levelno >= logging.WARNING else text


def _remove_handlers(log: logging.Logger, *, close: bool = True) -> None:
    for handler in [handler for handler in log.handlers if hasattr(handler, _MARK)]:
        log.removeHandler(handler)
        if close:
            handler.close()
