"""News of jobs from the thread of the worker to requests that wait for them."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

from dinocell.service.queue import FINAL, Job


class News:
    """Wakes the requests that follow a job.

    Parameters
    ----------
    loop : the event loop of the requests
    get : the job of an id, from the queue
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, get: Callable[[str], Job | None]) -> None:
        self.loop, self.get = loop, get
        self.windows: dict[str, tuple[int, int]] = {}
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._ended = False

    def hear(self, line: dict[str, Any]) -> None:
        """Take a line of the worker, in any thread; a worker that died concerns every job."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._pass_on, line)

    def end(self) -> None:
        """The service stops: nobody follows a job any longer.  May be called in a signal handler."""
        self._ended = True
        self.hear({})

    def _pass_on(self, line: dict[str, Any]) -> None:
        job_id = line.get("job")
        if job_id is not None and "total" in line:
            self.windows[job_id] = (line["done"], line["total"])
        elif job_id is not None:
            self.windows.pop(job_id, None)
        ids = [job_id] if job_id is not None else list(self._waiting)
        for followed in ids:
            for event in self._waiting.get(followed, ()):
                event.set()

    async def follow(self, job_id: str, *, beat_s: float = 15.0) -> AsyncIterator[Job | None]:
        """The job now and after each of its steps until it has ended; None every `beat_s` without news.

        Ends earlier when the service stops.
        """
        event = asyncio.Event()
        self._waiting[job_id].add(event)
        try:
            while True:
                event.clear()
                job = await asyncio.to_thread(self.get, job_id)
                if job is None:
                    return
                yield job
                if job.state in FINAL or self._ended:
                    return
                while True:
                    try:
                        await asyncio.wait_for(event.wait(), beat_s)
                        break
                    except TimeoutError:
                        yield None
        finally:
            self._waiting[job_id].discard(event)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
