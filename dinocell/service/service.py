"""What the routes of the service share."""

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dinocell.service.channels import Original, keep_channels_apart
from dinocell.service.learning import Learning
from dinocell.service.metrics import production_figures
from dinocell.service.news import News
from dinocell.service.options import ServiceOptions
from dinocell.service.production import Production
from dinocell.service.queue import Job, Queue
from dinocell.service.reading import image_of_job, places_to_read
from dinocell.service.stored import StoredResult, safe_name
from dinocell.service.uploads import Uploads
from dinocell.service.web import web_places

_PLACES = 4  # requests that compute or write files at once
_MOST_LOOKED_AT = 1000  # newest jobs, for corrected ones


class WorkerLike(Protocol):
    """What the application needs of the worker."""

    model: dict[str, Any] | None

    @property
    def alive(self) -> bool:
        """Whether it can take jobs now."""

    def wake(self) -> None:
        """Say that the queue has grown."""

    def stop(self) -> None:
        """End it."""

    def use(self, model: Path) -> None:
        """Segment with another model from now on."""


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
        self.production: Production | None = None
        if options.wandb is not None:
            self.production = Production(
                queue.folder, options.wandb, options.wandb_seconds, self.figures
            )
        self.learning = Learning(queue.folder / "learning", options.device, options.learn_minutes)
        self.model = options.model
        self.places = threading.BoundedSemaphore(_PLACES)
        self.uploads = Uploads(queue.folder / "uploads")
        self.readable = places_to_read(options.read_from)
        self.web = web_places(options.read_from)

    def hear(self, line: dict[str, Any]) -> None:
        """Take a line of the worker, in any thread."""
        if self.news is not None:
            self.news.hear(line)

    def figures(self) -> dict[str, float]:
        """What is recorded at Weights & Biases."""
        return production_figures(self.queue.counters(), self.queue.depths())

    def enqueue(
        self,
        name: str,
        file: str,
        options: Mapping[str, Any],
        write: Callable[[Path], None],
        job_id: str = "",
    ) -> Job:
        """Queue an image with the limits of the service; the other parameters are those of `Queue.add`."""
        job = self.queue.add(
            *(safe_name(name), file, {**options, "max_pixels": self.options.max_pixels}, write),
            limit=self.options.queue,
            limit_bytes=1e9 * self.options.keep_gb,
            job_id=job_id,
        )
        if self.worker is not None:
            self.worker.wake()
        return job

    def result(self, job: Job) -> StoredResult:
        """The files of a job that is done."""
        folder = self.queue.job_folder(job.id)

        def read(names: Sequence[str], positions: Sequence[int]) -> None:
            original = Original.of(image_of_job(folder, job, self.readable), job.options)
            keep_channels_apart(folder, original, names, positions)

        return StoredResult(folder, job.name + Path(job.file).suffix, job.name, read=read)

    def corrected(self) -> list[StoredResult]:
        """The images that somebody has corrected, the latest last."""
        found = []
        for job in self.queue.newest(_MOST_LOOKED_AT):
            current = self.queue.job_folder(job.id) / "current.json"
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if job.state == "done" and current.exists():
                    result = self.result(job)
                    if result.revision().edited:
                        found.append((current.stat().st_mtime_ns, result))
        return [result for _, result in sorted(found, key=lambda item: item[0])]

    def learn(self) -> None:
        """Adapt the model to the corrected images; UsageError, see `Learning.start`."""
        self.learning.start(self.corrected(), self.model)

    def keep_learned(self) -> None:
        """Segment with the model that was learned from now on; UsageError, see `Learning.keep`."""
        path = self.learning.keep(lambda model: self.worker.use(model) if self.worker else None)
        self.model = str(path)

    def expire(self) -> None:
        """Delete what was kept long enough, or needs too much space."""
        keep_s = 3600 * self.options.keep_hours
        self.queue.expire(keep_s=keep_s, keep_bytes=1e9 * self.options.keep_gb)
        self.uploads.expire(keep_s)
