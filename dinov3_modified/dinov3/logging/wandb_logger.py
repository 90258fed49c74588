"""Metrics and pictures to Weights & Biases (ours); a logger that fails never stops a run.

Every call goes through a bounded queue to one thread.  Without an API key runs are written offline,
for `wandb sync`.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dinov3.distributed import is_main_process

__all__ = ["WandbLogger", "create_wandb_logger"]

logger = logging.getLogger("dinov3")

_MODES = ("auto", "online", "offline", "disabled")
_STATE_FILE = "wandb_state.json"
_STOP = object()
_MAX_FAILURES = 5


def create_wandb_logger(cfg: Any) -> WandbLogger:
    """The logger of a run; it does nothing when `wandb.enabled` is false, or in other processes
    than the first.

    Raises:
        ValueError: unknown `wandb.mode`.
    """
    settings = cfg.wandb
    if settings.mode not in _MODES:
        raise ValueError(
            f"wandb.mode must be one of {', '.join(_MODES)}, got {settings.mode!r}: choose one"
        )
    enabled = bool(settings.enabled) and settings.mode != "disabled" and is_main_process()
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return WandbLogger(
        cfg.train.output_dir,
        config={str(key): value for key, value in config.items()},
        enabled=enabled,
        project=settings.project,
        name=settings.name or None,
        entity=settings.entity or None,
        tags=list(settings.tags),
        mode=settings.mode,
        call_timeout_s=settings.timeout_s,
    )


class WandbLogger:
    """One run, the same after every resumption: its id and last step are kept in the output folder.

    Args:
        output_dir: of the run; wandb's own folder is OUT/wandb.
        config: nested plain values.
        enabled: false: nothing happens.
        mode: `auto` is online with an API key, offline without; `online`; `offline`.
        call_timeout_s: how long `finish` waits, and how long the service may take to start.

    Attributes:
        dropped: records that were lost: the queue was full, the step was old, or a call failed.
        run_id: of wandb.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
        project: str = "dinocell",
        name: str | None = None,
        entity: str | None = None,
        tags: list[str] | None = None,
        mode: str = "auto",
        call_timeout_s: float = 30.0,
        queue_size: int = 256,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.enabled = enabled
        self.dropped = 0
        self.run_id: str | None = None
        self._timeout_s = call_timeout_s
        self._failures = 0
        self._last_step = -1
        self._thread: threading.Thread | None = None
        if not enabled:
            return
        try:
            import wandb
        except ImportError:
            logger.warning(
                "wandb.enabled needs the package wandb, which is not here: pip install dinocell[wandb]; "
                "metrics go to training_metrics.json alone"
            )
            self.enabled = False
            return
        self._load_state()
        if mode == "auto":
            mode = "online" if _has_key() else "offline"
        if self.run_id is None:
            self.run_id = secrets.token_hex(4)
        self._start = {
            "project": project,
            "name": name,
            "entity": entity,
            "tags": tags or [],
            "config": dict(config or {}),
            "id": self.run_id,
            "resume": "allow",
            "dir": str(self.output_dir),
            "mode": mode,
        }
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=queue_size)
        self._thread = threading.Thread(target=self._work, args=(wandb,), daemon=True, name="wandb")
        self._thread.start()

    # --- called by the training ---

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers; of a step that is not after the last one nothing is kept."""
        self._put(("metrics", dict(metrics), step))

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Record pictures, uint8 (H, W, 3)."""
        self._put(("images", dict(images), step))

    def finish(self, exit_code: int = 0) -> None:
        """Write what is left, for at most the time-out."""
        if self._thread is None:
            return
        self._put((_STOP, exit_code, 0))
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            logger.warning(
                "wandb did not finish within %.0f s and is left alone; training_metrics.json has "
                "everything", self._timeout_s,
            )  # fmt: skip
        self._thread = None
        self.enabled = False

    def _put(self, item: Any) -> None:
        if not self.enabled:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lose("its queue is full")

    def _lose(self, reason: str) -> None:
        if self.dropped == 0:
            logger.warning("wandb lost a record (%s); the training goes on", reason)
        self.dropped += 1

    # --- in the background thread ---

    def _work(self, wandb: Any) -> None:
        try:
            settings = wandb.Settings(init_timeout=self._timeout_s, silent=True, console="off")
            run = wandb.init(**self._start, settings=settings)
        except BaseException as error:
            logger.warning(
                "wandb could not start (%s); the training goes on without it", _line(error)
            )
            self.enabled = False
            return
        while True:
            kind, content, step = self._queue.get()
            if kind is _STOP:
                self._try(partial(run.finish, exit_code=content), "finish")
                return
            if not self.enabled:
                continue
            if step <= self._last_step and kind == "metrics":
                self.dropped += 1
                continue
            if kind == "images":
                content = {name: wandb.Image(picture) for name, picture in content.items()}
                step = max(step, self._last_step)
            if self._try(partial(run.log, content, step=step), "log"):
                self._last_step = max(self._last_step, step)
                self._save_state()

    def _try(self, call: Any, what: str) -> bool:
        try:
            call()
        except BaseException as error:
            self._failures += 1
            self._lose(f"{what}: {_line(error)}")
            if self._failures == _MAX_FAILURES:
                logger.warning("wandb failed %d times and is switched off", _MAX_FAILURES)
                self.enabled = False
            return False
        self._failures = 0
        return True

    def _load_state(self) -> None:
        path = self.output_dir / _STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            self.run_id, self._last_step = str(state["run_id"]), int(state["last_step"])
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): a new wandb run begins", path, error)

    def _save_state(self) -> None:
        path = self.output_dir / _STATE_FILE
        part = path.with_suffix(".part")
        try:
            text = json.dumps({"run_id": self.run_id, "last_step": self._last_step})
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            self._lose(f"{_STATE_FILE}: {error}")


def _has_key() -> bool:
    """Whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
