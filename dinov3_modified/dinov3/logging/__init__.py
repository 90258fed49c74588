"""Log files and metrics of a run (matches `dinov3.logging`)."""

from __future__ import annotations

import logging
import os
import sys

from dinov3.distributed import TorchDistributedEnvironment, get_rank, is_main_process
from dinov3.logging.helpers import MetricLogger, SmoothedValue

__all__ = [
    "MetricLogger",
    "SmoothedValue",
    "TorchDistributedEnvironment",
    "cleanup_logging",
    "setup_logging",
]

_MARK = "_dinov3_handler"


def setup_logging(
    output: str | None = None,
    *,
    name: str | None = None,
    level: int = logging.DEBUG,
    color: bool = True,
    capture_warnings: bool = True,
    log_to_stdout_only_in_main_process: bool = True,
) -> None:
    """Send a logger's messages to standard output and to OUT/logs/log.txt.

    Args:
        output: folder of the run, or a file ending in .txt or .log; None: no file.  Processes other
            than the first write to log.txt.rankN.
        name: of the logger; None: the root.
        level: least severe messages to show.
        color: mark warnings and errors, on a terminal.
        capture_warnings: Python's warnings become messages.
        log_to_stdout_only_in_main_process: other processes write to their file alone.
    """
    logging.captureWarnings(capture_warnings)
    logger = logging.getLogger(name)
    _remove_handlers(logger)
    logger.setLevel(level)
    logger.propagate = name is None
    line = "%(levelname).1s%(asctime)s %(process)d %(name)s %(filename)s:%(lineno)d] %(message)s"
    if is_main_process() or not log_to_stdout_only_in_main_process:
        handler: logging.Handler = logging.StreamHandler(stream=sys.stdout)
        colored = color and sys.stdout.isatty()
        handler.setFormatter(_Colored(line) if colored else logging.Formatter(line))
        _add(logger, handler, level)
    if output is None:
        return
    path = output if output.endswith((".txt", ".log")) else os.path.join(output, "logs", "log.txt")
    if get_rank() > 0:
        path = f"{path}.rank{get_rank()}"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(line))
    _add(logger, handler, level)


def cleanup_logging(*, name: str | None = None) -> None:
    """Undo `setup_logging`."""
    logging.captureWarnings(False)
    _remove_handlers(logging.getLogger(name))
    if name is None:
        _remove_handlers(logging.getLogger("dinov3"))
        logging.getLogger("dinov3").propagate = True


class _Colored(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.ERROR:
            return f"\x1b[31m{text}\x1b[0m"
        return f"\x1b[33m{text}\x1b[0m" if record.levelno >= logging.WARNING else text


def _add(logger: logging.Logger, handler: logging.Handler, level: int) -> None:
    setattr(handler, _MARK, True)
    handler.setLevel(level)
    logger.addHandler(handler)


def _remove_handlers(logger: logging.Logger) -> None:
    for handler in [h for h in logger.handlers if hasattr(h, _MARK)]:
        logger.removeHandler(handler)
        handler.close()
