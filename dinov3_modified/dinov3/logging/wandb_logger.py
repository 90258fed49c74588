"""Metrics and pictures to Weights & Biases (ours); a failure there never stops a run.

wandb keeps and uploads records in a process of its own, so that a call here only hands them over.
Every call passes `WandbLogger._try`: the first one that fails switches wandb off, with one warning.
The same metrics are in training_metrics.json.
"""

import contextlib
import json
import logging
import netrc
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from dinov3.cells.checks import one_of
from dinov3.cells.files import write_text_atomically
from dinov3.distributed import is_main_process

logger = logging.getLogger("dinov3")

_MODES = ("auto", "online", "offline", "disabled")
_ID_FILE = "wandb_run_id.txt"
_STATE_FILE = "wandb_state.json"


class WandbLogger:
    """One wandb run, the same after every resumption of the training.

    Its id is kept in OUT/wandb_run_id.txt and its last step in OUT/wandb_state.json.  A resumed run
    repeats the iterations after its checkpoint; wandb cannot take a step back, so that steps up to
    the last one are dropped and counted.  Only the first process logs.

    `cfg`: a whole configuration; wandb gets it as nested plain values.  `enabled`: false: nothing
    happens, and wandb is not imported.  `resume`: false starts another wandb run.  Raises
    ValueError (a setting of the `wandb` section is out of range).
    """

    def __init__(self, cfg: Any, enabled: bool = True, *, resume: bool = True) -> None:
        settings = cfg.wandb
        one_of("wandb.mode", settings.mode, _MODES)
        for name in ("timeout_s", "finish_timeout_s"):
            if not settings[name] > 0:
                raise ValueError(
                    f"`wandb.{name}` must be above 0, got {settings[name]}: give a larger number"
                )
        self.output_dir = Path(cfg.train.output_dir)
        self.run_id: str | None = None
        self.dropped_steps = 0  # records of steps that wandb already has
        self.last_step = -1  # the last step handed to wandb
        self._floor = -1  # last step of the run before this process
        self._images = bool(settings.images)
        self._lock = threading.Lock()  # pictures come from a thread of their own
        self._wandb: Any = None
        self._run: Any = None
        active = enabled and settings.mode != "disabled" and is_main_process()
        # online, offline or disabled; `enabled` is false for good after wandb was switched off
        self.mode: Any = _resolve_mode(str(settings.mode)) if active else "disabled"
        self.enabled = self.mode != "disabled"
        if self.enabled:
            self._try("it could not start", lambda: self._start(cfg, resume))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers of an iteration.

        `metrics`: names to numbers or tensors with one element; `step`: the iteration.  Several
        calls may have the same step, none an earlier one.
        """
        self._try("a record failed", lambda: self._log(metrics, int(step)))

    # The name in the write-up that this logger comes from.
    log_metrics = log

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Record pictures.

        `images`: names to uint8 arrays (H, W, 3).  `step`: the iteration that they show.  Pictures
        come late from their thread, so that they are put at the last step, with theirs beside them
        as `NAME_iteration`.  Raises ValueError (not such an array).
        """
        for name, picture in images.items():
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise ValueError(
                    f"{name} must be a uint8 array (H, W, 3), got {picture.dtype} "
                    f"{picture.shape}: convert the picture"
                )
        if self._images:
            self._try("a picture failed", lambda: self._log_images(images, int(step)))

    def finish(self, exit_code: int = 0) -> None:
        """Write what is left, for at most `wandb.finish_timeout_s`; a second call does nothing.

        `exit_code`: 0 marks the run as finished, others as failed.
        """
        self._try("it could not finish", lambda: self._run.finish(exit_code=exit_code))
        if self.enabled and self.dropped_steps:
            logger.info("%d repeated records were left out of wandb", self.dropped_steps)
        self.enabled = False

    def _try(self, what: str, call: Callable[[], None]) -> None:
        """Make a call of wandb; one that fails switches wandb off for good, with one warning."""
        with self._lock:
            if not self.enabled:
                return
            try:
                call()
            except (Exception, SystemExit) as error:
                self.enabled = False
                logger.warning(
                    "Logging to wandb is switched off: %s (%s); everything else continues, and a "
                    "training keeps all metrics in a file of its own", what, _line(error),
                )  # fmt: skip
                if self._wandb is not None:
                    # Now, because wandb would print a traceback for a dead service at exit.
                    with contextlib.suppress(Exception, SystemExit):
                        self._wandb.teardown()

    def _start(self, cfg: Any, resume: bool) -> None:
        settings = cfg.wandb
        try:
            import wandb
        except Exception as error:  # not installed, or broken in its own ways
            raise ImportError(
                f"{_line(error)}; run pip install '.[wandb]' in the clone of DINOCell"
            ) from error
        self._wandb = wandb
        self._load_state(resume)
        # wandb names the folder of a session by the second and would overwrite one of the same second.
        folder = self.output_dir / "wandb"
        while list(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{self.run_id}")):
            time.sleep(0.1)
        arguments = {
            "project": settings.project,
            "entity": settings.entity or None,
            "name": settings.name or self.output_dir.resolve().name,
            "group": settings.group or None,
            "tags": [str(tag) for tag in settings.tags],
            "config": OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False),
            "id": self.run_id,
            "resume": "allow",
            "dir": str(self.output_dir),
            "settings": wandb.Settings(
                init_timeout=float(settings.timeout_s),
                finish_timeout=float(settings.finish_timeout_s),
                silent=True,
                console="off",  # its redirection of standard output is process-wide
                disable_git=True,
                save_code=False,
            ),
        }
        try:
            self._run = wandb.init(**arguments, mode=self.mode)
        except Exception as error:
            if self.mode == "offline":
                raise
            logger.warning(
                "Logging to wandb could not start online (%s); the run is written offline: send it later with "
                "`wandb sync`", _line(error),
            )  # fmt: skip
            self.mode = "offline"
            self._run = wandb.init(**arguments, mode=self.mode)

    def _log(self, metrics: Mapping[str, Any], step: int) -> None:
        if step <= self._floor or step < self.last_step:
            self.dropped_steps += 1
            return
        self._advance(step)
        self._run.log({name: _plain(value) for name, value in metrics.items()}, step=step)

    def _log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        if step <= self._floor:
            self.dropped_steps += 1
            return
        row: dict[str, Any] = {}
        for name, picture in images.items():
            row[name] = self._wandb.Image(picture)
            row[f"{name}_iteration"] = step
        step = max(step, self.last_step)
        self._advance(step)
        self._run.log(row, step=step)

    # --- what outlives the process ---

    def _advance(self, step: int) -> None:
        """Record the step before it is logged: a kill between the two loses one, repeats none."""
        if step != self.last_step:
            self.last_step = step
            state = {"run_id": self.run_id, "last_step": step}
            write_text_atomically(self.output_dir / _STATE_FILE, json.dumps(state))

    def _load_state(self, resume: bool) -> None:
        id_path, state_path = self.output_dir / _ID_FILE, self.output_dir / _STATE_FILE
        if resume and id_path.is_file():
            self.run_id = id_path.read_text(encoding="utf-8").strip() or None
        if self.run_id is None:
            self.run_id = secrets.token_hex(4)  # not from a generator of the training
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_text_atomically(id_path, self.run_id + "\n")
            return
        try:
            state = json.loads(state_path.read_text(encoding="utf-8"))
            if state["run_id"] == self.run_id:
                self._floor = self.last_step = int(state["last_step"])
        except FileNotFoundError:
            return  # killed before its first step
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s must be readable, got %s; the wandb run %s continues and may drop repeated steps",
                state_path,
                _line(error),
                self.run_id,
            )


def create_wandb_logger(cfg: Any, *, resume: bool = True) -> WandbLogger:
    """The logger of a run; it does nothing when `wandb.enabled` is false.

    `cfg`: a whole configuration; reads its `wandb` section and `train.output_dir`.  `resume`: false
    starts another wandb run in the same folder.
    """
    return WandbLogger(cfg, enabled=bool(cfg.wandb.enabled), resume=resume)


def _resolve_mode(mode: str) -> str:
    """`auto`: what WANDB_MODE says, else online with an API key and offline without."""
    if mode == "auto":
        variable = os.environ.get("WANDB_MODE", "")
        mode = variable if variable in ("online", "offline", "disabled") else "auto"
    if mode in ("offline", "disabled") or _has_key():
        return "online" if mode == "auto" else mode
    if mode == "online":
        logger.warning(
            "`wandb.mode` online must have an API key, got none; the run is written offline: set "
            "WANDB_API_KEY or call `wandb login`, and send it later with `wandb sync`"
        )
    return "offline"


def _has_key() -> bool:
    """Whether wandb could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = address.split("://")[-1].split("/")[0]
    try:
        known = netrc.netrc(os.environ.get("NETRC") or str(Path.home() / ".netrc"))
    except (OSError, netrc.NetrcParseError, RuntimeError):
        return False
    # Such files may name the host with or without its port.
    return any(known.authenticators(name) for name in (host, host.split(":")[0]))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return value.item() if isinstance(value, np.generic) else value


def _line(error: BaseException) -> str:
    name = type(error).__name__
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{name}: {text}" if text else name
