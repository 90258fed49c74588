"""Threads for requests, which the end of a program does not wait for (ours)."""

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_NICE = 5
_Tasks = queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]


class RequestThreads:
    """Like `ThreadPoolExecutor`, of `count` daemon threads, which start with the first calls.

    A request that waits for a silent server would otherwise hold up a worker that is to end.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._tasks: _Tasks = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _end, self._tasks, count)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call in a thread."""
        with self._lock:
            if len(self._threads) < self.count:
                # The thread does not know this object, so that it can end with it.
                thread = threading.Thread(
                    target=_work, args=(self._tasks,), daemon=True, name="requests"
                )
                self._threads.append(thread)
                thread.start()
        future: Future[Any] = Future()
        self._tasks.put((future, call))
        return future


def _work(tasks: _Tasks) -> None:
    # What runs ahead gives way to what makes the sample that is waited for (Linux: of each thread).
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    while (task := tasks.get()) is not None:
        future, call = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        # What was called must not live on while the thread waits.
        del task, future, call


def _end(tasks: _Tasks, count: int) -> None:
    for _ in range(count):
        tasks.put(None)
