"""What the routes of the service share."""

from typing import Any, Protocol

from dinocell.service.news import News
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Job, Queue
from dinocell.service.stored import StoredResult


class WorkerLike(Protocol):
    """What the application needs of the worker."""

    model: dict[str, Any] | None

    def wake(self) -> None:
        """Say that the queue has grown."""

    def stop(self) -> None:
        """End it."""


class Service:
    """The queue, its worker, and the requests that wait for jobs.

    Parameters
    ----------
    options, queue : as in their classes

    Attributes
    ----------
    sweep_s : pause in seconds between two calls of `expire`
    """

    sweep_s = 60.0

    def __init__(self, options: ServiceOptions, queue: Queue) -> None:
        self.options, self.queue = options, queue
        self.worker: WorkerLike | None = None
        self.news: News | None = None

    def hear(self, line: dict[str, Any]) -> None:
        """Take a line of the worker, in any thread."""
        if self.news is not None:
            self.news.hear(line)

    def result(self, job: Job) -> StoredResult:
        """The files of a job that is done."""
        return StoredResult(self.queue.job_folder(job.id), job.file, job.name)

    def expire(self) -> None:
        """Delete what was kept long enough, or needs too much space."""
        self.queue.expire(
            keep_s=3600 * self.options.keep_hours, keep_bytes=1e9 * self.options.keep_gb
        )
