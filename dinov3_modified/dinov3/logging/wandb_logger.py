"""Metrics and pictures to Weights & Biases (ours); a logger that fails never stops a run.

A call of wandb can raise, wait for a network, or hang with its service.  So all calls go through one
bounded queue to one daemon thread: what goes wrong there costs records and a warning, never an
iteration.  The same metrics are in training_metrics.json.
"""

from __future__ import annotations

import contextlib
import json
import logging
import netrc
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from dinov3.cells.files import write_text_atomically
from dinov3.distributed import is_main_process

logger = logging.getLogger("dinov3")

_MODES = ("auto", "online", "offline", "disabled")
_ID_FILE = "wandb_run_id.txt"
_STATE_FILE = "wandb_state.json"


def create_wandb_logger(cfg: Any, *, resume: bool = True) -> WandbLogger:
    """The logger of a run; it does nothing when `wandb.enabled` is false.

    Args:
        cfg: a whole configuration; reads its `wandb` section and `train.output_dir`.
        resume: false starts another wandb run in the same folder.
    """
    return WandbLogger(cfg, enabled=bool(cfg.wandb.enabled), resume=resume)


class WandbLogger:
    """One wandb run, the same after every resumption of the training.

    Its id is kept in OUT/wandb_run_id.txt and its last step in OUT/wandb_state.json.  A resumed run
    repeats the iterations after its checkpoint; wandb cannot take a step back, so that steps up to
    the last one are dropped and counted.  Only the first process logs.

    Args:
        cfg: a whole configuration; wandb gets it as nested plain values.
        enabled: false: nothing happens, and wandb is not imported.
        resume: false starts another wandb run.

    Attributes:
        enabled: whether records are accepted; false for good after wandb was switched off.
        mode: online, offline or disabled, after `auto` is resolved.
        run_id: of wandb.
        dropped_steps: records of steps that wandb already has.
        lost_records: records lost to a full queue or a failing call.
        last_step: the last step handed to wandb, -1 before.

    Raises:
        ValueError: a setting of the `wandb` section is out of range.
    """

    def __init__(self, cfg: Any, enabled: bool = True, *, resume: bool = True) -> None:
        settings = cfg.wandb
        _check(settings)
        self.output_dir = Path(cfg.train.output_dir)
        self.run_id: str | None = None
        self.dropped_steps = 0
        self.lost_records = 0
        self.last_step = -1
        self.mode = str(settings.mode)
        self.enabled = enabled and self.mode != "disabled" and is_main_process()
        if self.enabled:
            self.mode = _resolve_mode(self.mode)
            self.enabled = self.mode != "disabled"
        self._timeout_s = float(settings.timeout_s)
        self._finish_timeout_s = float(settings.finish_timeout_s)
        self._max_failures = int(settings.max_failures)
        self._images = bool(settings.images)
        self._failures = 0
        self._floor = -1  # last step of the run before this process
        self._call: tuple[float, float] | None = None  # start and time limit of the running call
        self._thread: threading.Thread | None = None
        self._owns_service = False
        if not self.enabled:
            self.mode = "disabled"
            return
        try:
            import wandb
        except Exception as error:  # not installed, or broken in its own ways
            logger.warning(
                "wandb.enabled must have the package wandb, got none that imports (%s): pip install "
                "'dinocell-segmentation[wandb]'; metrics go to training_metrics.json alone",
                _line(error),
            )
            self.enabled = False
            self.mode = "disabled"
            return
        self._load_state(resume)
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
            "mode": self.mode,
        }
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(int(settings.queue_size))
        self._thread = threading.Thread(
            target=self._work, args=(wandb, arguments), daemon=True, name="wandb"
        )
        self._thread.start()

    # --- called by the training ---

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record numbers of an iteration; returns at once.

        Args:
            metrics: names to numbers; tensors with one element are read in the background.
            step: the iteration.  Several calls may have the same step, none an earlier one.
        """
        kept = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in metrics.items()
        }
        self._put(partial(self._log, kept, int(step)))

    # The name in the write-up that this logger comes from.
    log_metrics = log

    def log_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Record pictures; returns at once.

        Args:
            images: names to uint8 arrays (H, W, 3).
            step: the iteration that they show.  Pictures come late from their thread, so that they
                are put at the last step, with theirs beside them as `NAME_iteration`.

        Raises:
            ValueError: not such an array.
        """
        for name, picture in images.items():
            if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
                raise ValueError(
                    f"{name} must be a uint8 array (H, W, 3), got {picture.dtype} "
                    f"{picture.shape}: convert it"
                )
        if self._images:
            copies = {name: picture.copy() for name, picture in images.items()}
            self._put(partial(self._log_images, copies, int(step)))

    def finish(self, exit_code: int = 0) -> None:
        """Write what is left, for at most `wandb.finish_timeout_s`; a second call does nothing.

        Args:
            exit_code: 0 marks the run as finished, others as failed.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._watch()
        deadline = time.monotonic() + self._finish_timeout_s
        if self.enabled:
            with contextlib.suppress(queue.Full):
                self._queue.put(partial(self._finish, exit_code), timeout=self._finish_timeout_s)
                self._queue.put(None, timeout=max(deadline - time.monotonic(), 0.01))
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                self._give_up(f"it did not finish within {self._finish_timeout_s:g} s", hung=True)
        else:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)  # ends the thread if it is only waiting
        self.enabled = False
        if self.dropped_steps or self.lost_records:
            logger.info(
                "wandb: %d repeated records were left out, %d were lost",
                self.dropped_steps,
                self.lost_records,
            )

    def _put(self, call: Callable[[], None]) -> None:
        self._watch()
        if not self.enabled:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._lose("its queue is full")

    def _watch(self) -> None:
        """Switch wandb off when the running call takes longer than its limit."""
        call = self._call
        if call is not None and time.monotonic() - call[0] > call[1]:
            self._give_up(f"a call took longer than {call[1]:g} s", hung=True)

    def _lose(self, reason: str) -> None:
        self.lost_records += 1
        if self.lost_records == 1:
            logger.warning("wandb lost a record (%s).  The training continues.", reason)

    def _give_up(self, reason: str, *, hung: bool = False) -> None:
        """Switch wandb off for good, with one warning."""
        if not self.enabled:
            return
        self.enabled = False
        logger.warning(
            "wandb is switched off: %s.  The training continues, and training_metrics.json has all "
            "metrics.",
            reason,
        )
        if self._owns_service:
            # When the program ends wandb waits for its service, without limit if that hangs.
            try:
                _end_service(kill=hung)
            except Exception as error:
                logger.info("wandb's service could not be ended: %s", _line(error))

    # --- in the background thread ---

    def _work(self, wandb: Any, arguments: dict[str, Any]) -> None:
        self._owns_service = not os.environ.get("WANDB_SERVICE")
        problem = self._try(partial(self._init, wandb, arguments), 2 * self._timeout_s)
        if problem is not None:
            self._give_up(f"it could not start ({problem})")
            return
        while (call := self._queue.get()) is not None:
            if not self.enabled:
                self._lose("wandb is switched off")
                continue
            last = getattr(call, "func", None) == self._finish
            error = self._try(call, self._finish_timeout_s if last else self._timeout_s)
            if error is None:
                self._failures = 0
                continue
            self._failures += 1
            self._lose(error)
            if last:
                self._give_up(f"it could not finish ({error})")
            elif self._failures >= self._max_failures:
                self._give_up(f"{self._failures} calls in a row failed, the last with: {error}")

    def _try(self, call: Callable[[], None], limit_s: float) -> str | None:
        """Run a call; None, or what went wrong."""
        self._call = (time.monotonic(), limit_s)
        try:
            call()
        except BaseException as error:  # wandb also raises SystemExit and KeyboardInterrupt
            return _line(error)
        finally:
            self._call = None
        return None

    def _init(self, wandb: Any, arguments: dict[str, Any]) -> None:
        wanted = {
            "init_timeout": self._timeout_s,
            "finish_timeout": self._finish_timeout_s,
            "silent": True,
            "console": "off",  # its redirection of standard output is process-wide
            "disable_git": True,
            "save_code": False,
        }
        known = getattr(wandb.Settings, "model_fields", wanted)
        settings = wandb.Settings(**{key: wanted[key] for key in wanted if key in known})
        self._wandb = wandb
        # wandb names the folder of a session by the second and would overwrite one of the same second.
        folder = Path(str(arguments.get("dir", "."))) / "wandb"
        while list(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{arguments.get('id')}")):
            time.sleep(0.1)
        self._run = wandb.init(**arguments, settings=settings)

    def _log(self, metrics: dict[str, Any], step: int) -> None:
        if step <= self._floor or step < self.last_step:
            self.dropped_steps += 1
            return
        self._advance(step)
        self._run.log({name: _plain(value) for name, value in metrics.items()}, step=step)

    def _log_images(self, images: dict[str, np.ndarray], step: int) -> None:
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

    def _finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    # --- what outlives the process ---

    def _advance(self, step: int) -> None:
        """Record the step before it is logged: a kill between the two loses one, repeats none."""
        if step == self.last_step:
            return
        self.last_step = step
        state = {"run_id": self.run_id, "last_step": step}
        try:
            _write(self.output_dir / _STATE_FILE, json.dumps(state))
        except OSError as error:
            self._lose(f"{_STATE_FILE} could not be written: {_line(error)}")

    def _load_state(self, resume: bool) -> None:
        id_path, state_path = self.output_dir / _ID_FILE, self.output_dir / _STATE_FILE
        try:
            if resume and id_path.is_file():
                self.run_id = id_path.read_text(encoding="utf-8").strip() or None
            if self.run_id is None:
                self.run_id = secrets.token_hex(4)  # not from a generator of the training
                self.output_dir.mkdir(parents=True, exist_ok=True)
                _write(id_path, self.run_id + "\n")
                return
            state = json.loads(state_path.read_text(encoding="utf-8"))
            if state["run_id"] == self.run_id:
                self._floor = self.last_step = int(state["last_step"])
        except FileNotFoundError:
            return  # killed before its first step
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.run_id = self.run_id or secrets.token_hex(4)
            logger.warning(
                "%s must be readable, got %s.  wandb run %s continues and may drop repeated steps.",
                state_path,
                _line(error),
                self.run_id,
            )


def _check(settings: Any) -> None:
    if settings.mode not in _MODES:
        raise ValueError(
            f"wandb.mode must be one of {', '.join(_MODES)}, got {settings.mode!r}: choose one"
        )
    for name in ("timeout_s", "finish_timeout_s", "queue_size", "max_failures"):
        if not settings[name] > 0:
            raise ValueError(f"wandb.{name} must be above 0, got {settings[name]}: raise it")


def _resolve_mode(mode: str) -> str:
    """`auto`: what WANDB_MODE says, else online with an API key and offline without."""
    if mode == "auto":
        variable = os.environ.get("WANDB_MODE", "")
        mode = variable if variable in ("online", "offline", "disabled") else "auto"
    if mode in ("offline", "disabled") or _has_key():
        return "online" if mode == "auto" else mode
    if mode == "online":
        logger.warning(
            "wandb.mode online must have an API key, got none.  The run is written offline: set "
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


def _end_service(*, kill: bool) -> None:
    """Keep a broken wandb-core process from delaying the end of the program.

    Args:
        kill: end the process, because it hangs; otherwise only a dead one is forgotten.
    """
    setup = sys.modules.get("wandb.sdk.wandb_setup")
    connection = getattr(getattr(setup, "_singleton", None), "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is None:
        if kill:
            logger.info("wandb's service could not be found; the program may end late")
        return
    if kill:
        process.kill()
        process.wait(5)
    if process.poll() is not None:
        # wandb would talk to its dead service when the program ends, and print a traceback.
        forget = getattr(connection, "_cleanup", None)
        if callable(forget):
            forget()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return value.item() if isinstance(value, np.generic) else value


def _write(path: Path, text: str) -> None:
    write_text_atomically(path, text)


def _line(error: BaseException) -> str:
    name = type(error).__name__
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{name}: {text}" if text else name
