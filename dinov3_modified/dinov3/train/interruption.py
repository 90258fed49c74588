"""Signals that ask a run to stop (ours): noted at once, acted on between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["STOP_SIGNALS", "StopRequest"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Context that notes SIGTERM, SIGUSR2 and SIGINT; a second SIGINT interrupts as usual.

    Schedulers send the signal to the whole process group or to one process only, so processes ask
    one another every `period` steps whether anyone was told to stop.

    Args:
        device: of the small tensor that is summed over processes.
        period: steps between two questions; without other processes every step counts.
    """

    def __init__(self, device: torch.device, period: int = 10) -> None:
        self.device = device
        self.period = period
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
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

    def agreed(self, step: int) -> bool:
        """Whether all processes stop after this step."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.received is not None
        if step % self.period:
            return False
        told = torch.tensor(float(self.received is not None), device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return bool(told.item())
