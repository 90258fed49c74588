"""Signals that ask a run to stop (ours): recorded at once, obeyed between two steps."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist

from dinov3.distributed import get_rank, get_world_size

_PATIENCE = b"\nstopping after this step; Ctrl-C again stops at once, and loses what is not saved\n"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """Context that records `STOP_SIGNALS`; a second SIGINT interrupts as usual, as the first one says.

    A SIGHUP that is ignored, as under nohup, stays ignored.

    Schedulers send the signal to the whole process group or to one process only, so the processes
    exchange what they have received.  Each exchange waits for the slowest process, so there is one in
    about `period_s`: after a step at least, after ten at most.

    `device`: of the small tensor that is shared by the processes.  `period_s`: seconds between two
    exchanges; a preempted job may have thirty in all.
    """

    def __init__(self, device: torch.device, period_s: float = 3.0) -> None:
        self.device = device
        self.period_s = period_s
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._asked: tuple[int, float] | None = None  # step and time of the last exchange
        self._next_step = 0

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # only the main thread may set handlers: then there are none
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signal.Signals(number)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT and get_rank() == 0:
            # Not by `print`: the signal may have come while the stream's buffer was written.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(sys.stderr.fileno(), _PATIENCE)

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after this step, with the same answer in all of them.

        True in the first exchange after any of them got a request.
        """
        if get_world_size() == 1:
            return self.received is not None
        if self._asked is not None and step < self._next_step:
            return False
        now = time.monotonic()
        step_s = 0.0
        if self._asked is not None:
            step_s = (now - self._asked[1]) / max(step - self._asked[0], 1)
        shared = torch.tensor([float(self.received is not None), step_s], device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        stop, slowest_s = shared.tolist()  # the same in all processes, and so is the next step
        steps = int(self.period_s / slowest_s) if slowest_s > 0 else 1
        self._asked, self._next_step = (step, now), step + max(1, min(steps, 10))
        return bool(stop)


class Stopped(Exception):
    """A signal ended the run after its state was saved; `iteration` is the last one done."""

    def __init__(self, signal_name: str, iteration: int) -> None:
        super().__init__(
            f"The run was stopped by {signal_name} after iteration {iteration}; a checkpoint was "
            "saved; run the same command to continue"
        )
        self.signal_name = signal_name
        self.iteration = iteration


class Interrupted(Stopped):
    """A second SIGINT ended the run in the middle of a step, which is lost.

    `saved`: iteration of the newest checkpoint, None without one.
    """

    def __init__(self, saved: int | None) -> None:
        kept = "no checkpoint" if saved is None else f"the checkpoint after iteration {saved}"
        after = "start again" if saved is None else "continue from there"
        Exception.__init__(
            self,
            f"The run was interrupted before its state was saved; the output folder has {kept}; run "
            f"the same command to {after}",
        )
        self.signal_name = signal.SIGINT.name
        self.iteration = -1 if saved is None else saved
