"""The process that owns the network: it takes jobs from the queue, one after the other.

The service starts it as `python -m dinocell.service.worker`.  The first line of its standard input is a
JSON object of settings; each further line says that the queue has grown.  When that input ends, the
service is gone, and the process leaves at once.  Its standard output has one JSON object in each line:
`ready` with a description of the model, or `error`; then `job` with its windows `done` and `total`
whenever a job has advanced or ended.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.batch.claims import Claimant, claimed
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.batch.units import Unit
from dinocell.batch.watcher import Watcher
from dinocell.errors import DINOCellError
from dinocell.io.s3 import keep_copies_in, place_of
from dinocell.network.model import DINOCell, load_model
from dinocell.pipeline import DINOCellPipeline, LoadedImage
from dinocell.segmentation.thresholds import Thresholds
from dinocell.service.channels import Original
from dinocell.service.keeping import RESULT, STEM, keep_prediction
from dinocell.service.queue import Job, Queue
from dinocell.service.reading import image_of_job

Report = Callable[[dict[str, Any]], None]


class _Follower(Watcher):
    """Reports how far a job is, keeps its map, and stops it when somebody has cancelled it."""

    def __init__(self, queue: Queue, job: Job, report: Report) -> None:
        self.queue, self.job, self.report = queue, job, report
        self.image = Path()  # that is segmented
        self.read_at = self.predicted_at = time.monotonic()

    def loaded(self, image: LoadedImage) -> None:
        self.read_at = time.monotonic()

    def progressed(self, done: int, total: int) -> None:
        if self.queue.stops(self.job.id):
            raise DINOCellError("The job was cancelled")
        self.report({"job": self.job.id, "done": done, "total": total})

    def predicted(
        self, pipeline: DINOCellPipeline, image: LoadedImage, distance_map: NDArray
    ) -> None:
        self.predicted_at = time.monotonic()
        folder = self.queue.job_folder(self.job.id)
        original = Original.of(self.image, self.job.options)
        keep_prediction(folder, pipeline, image, distance_map, original)


class Worker:
    """Segments the jobs of a queue with one model.

    Parameters
    ----------
    queue : where the jobs are
    model : the network
    options : what all jobs share; a job's own options come on top
    report : is called with each line of the protocol, see the module

    Attributes
    ----------
    places : where images may be read that are no uploads, see `dinocell.service.reading`
    limit_s : a job that takes longer fails, and `give_up` ends the process, which is inside of it
    """

    def __init__(
        self, queue: Queue, model: DINOCell, options: SegmentOptions, report: Report
    ) -> None:
        self.queue, self.model, self.options, self.report = queue, model, options, report
        self.places: tuple[Path, ...] = ()
        self.limit_s = threading.TIMEOUT_MAX
        self.give_up: Callable[[int], object] = os._exit

    def work_off(self) -> None:
        """Segment until no job waits."""
        while (job := self.queue.take()) is not None:
            self.report({"job": job.id, "done": 0, "total": 0})
            timer = threading.Timer(self.limit_s, self._time_is_over, [job])
            timer.daemon = True
            timer.start()
            try:
                self._segment(job)
            finally:
                timer.cancel()
            self.report({"job": job.id})

    def _time_is_over(self, job: Job) -> None:
        limit = f"{self.limit_s / 60:g} minutes"
        error = f"A job may take {limit}, and this one took longer: crop the image"
        self.queue.finish(job, error=error)
        self.report({"job": job.id})
        self.give_up(1)

    def _segment(self, job: Job) -> None:
        """Work on one job; whatever goes wrong is noted as its error."""
        folder, started = self.queue.job_folder(job.id), time.monotonic()
        follower = _Follower(self.queue, job, self.report)
        try:
            follower.image = image_of_job(folder, job, self.places)
            result = segment_files(
                [Unit(follower.image, STEM)],
                folder / RESULT,
                SegmentOptions(**vars(self.options) | _with_tuples(job.options)),
                model=self.model,
                shown=False,
                watcher=follower,
            )
        except Exception as error:
            if not isinstance(error, DINOCellError):
                traceback.print_exception(error)  # for those who look after the service
            self.queue.finish(job, error=_sentence(error, folder, job))
            return
        if result.failures:
            self.queue.finish(job, error=_sentence(result.failures[0][1], folder, job))
            return
        summary = {k: v for k, v in result.rows[0].items() if k not in ("name", "source", "input")}
        ended = time.monotonic()
        self.queue.finish(
            job,
            summary=summary,
            counts={
                "images_total": 1,
                "cells_total": summary["num_cells"],
                'seconds_total{stage="wait"}': (job.started or 0) - job.created,
                'seconds_total{stage="read"}': max(0.0, follower.read_at - started),
                'seconds_total{stage="network"}': follower.predicted_at - follower.read_at,
                'seconds_total{stage="cells"}': ended - follower.predicted_at,
            },
        )


def _with_tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _sentence(error: object, folder: Path, job: Job) -> str:
    """An error without the folders of this computer."""
    text = str(error)
    if not isinstance(error, (str, DINOCellError)):
        text = f"{type(error).__name__}: {text}"
    for path in (str(folder / job.file), str(folder)) if job.is_upload else (job.file,):
        text = text.replace(path, job.name)
    return text


def describe_model(model: DINOCell, name: str) -> dict[str, Any]:
    """What users of the service may know of the model; JSON values."""
    thresholds = Thresholds.of(model.config)
    return {
        "name": str(model.card.get("name") or Path(name).stem),
        "architecture": f"{model.config.size}/{model.config.patch_size}",
        "device": str(model.device),
        "knows_training_images": model.statistics is not None,
        **vars(thresholds),
    }


def warm_up(model: DINOCell, options: SegmentOptions) -> None:
    """Segment and measure noise, so that the first job does not wait until functions are compiled."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    pipeline = DINOCellPipeline(model, batch_size=options.batch_size, precision=options.precision)
    pipeline.run(noise).measure()


def _main() -> None:
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no protocol
    say = threading.Lock()

    def report(line: dict[str, Any]) -> None:
        with say:
            protocol.write(json.dumps(line) + "\n")
            protocol.flush()

    settings = json.loads(sys.stdin.readline())
    work = threading.Event()

    def listen() -> None:
        for _ in sys.stdin:
            work.set()
        os._exit(0)  # the queue lists the job as running; the next service takes it up again

    threading.Thread(target=listen, daemon=True).start()
    try:
        options = SegmentOptions(**settings["options"])
        folder = Path(settings["folder"])
        with claimed(folder, Claimant(), "The worker of a service"):
            keep_copies_in(folder / "copies")
            model = load_model(options.model, device=options.device)
            warm_up(model, options)
            worker = Worker(Queue(folder), model, options, report)
            worker.places = tuple(map(place_of, settings["places"]))
            worker.limit_s = settings.get("limit_s", worker.limit_s)
            worker.queue.recover(killed=settings["recover"])
            report({"ready": describe_model(model, options.model)})
            while True:
                work.clear()
                worker.work_off()
                work.wait()
    except (DINOCellError, ValueError, OSError) as error:
        report({"error": str(error), "exit_code": getattr(error, "exit_code", 1)})


if __name__ == "__main__":
    _main()
