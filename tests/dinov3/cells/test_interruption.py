"""Signals between two steps: noted at once, agreed on by all processes, asked for in time."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from dinov3.cells import interruption
from dinov3.cells.interruption import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_one_process_stops_after_any_step(number):
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP is ignored
    try:
        with StopRequest(torch.device("cpu")) as stop:
            assert not stop.agreed(1)
            os.kill(os.getpid(), number)
            assert stop.agreed(2)
            assert stop.received is number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest(torch.device("cpu")):  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_the_first_interrupt_says_how_to_stop_at_once(capfd):
    with StopRequest(torch.device("cpu")) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert capfd.readouterr().err == ""
        stop.received = None
        signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_an_ignored_hangup_stays_ignored():
    """As `nohup` leaves it: the end of the terminal does not end the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(torch.device("cpu")) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.agreed(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("step_s", "asked_after"),
    [
        (0.01, [1, 2, 12, 22]),  # ten at most
        (1.0, [1, 2, 5, 8, 11, 14, 17, 20, 23]),  # about three seconds
        (20.0, list(range(1, 25))),  # each: a preempted job may have half a minute
    ],
)
def test_the_longer_the_steps_the_more_often_processes_ask(monkeypatch, step_s, asked_after):
    asked: list[int] = []
    now = 0.0

    def shared(_, op):
        asked.append(step)

    monkeypatch.setattr(interruption.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(interruption.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(interruption.dist, "all_reduce", shared)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now)
    stop = StopRequest(torch.device("cpu"))
    for step in range(1, 25):
        now += step_s
        assert not stop.agreed(step)
    assert asked == asked_after


def test_the_signal_of_another_process_stops_this_one(monkeypatch):
    monkeypatch.setattr(interruption.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(interruption.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(interruption.dist, "all_reduce", lambda shared, op: shared[0].fill_(1.0))
    assert StopRequest(torch.device("cpu")).agreed(7)
