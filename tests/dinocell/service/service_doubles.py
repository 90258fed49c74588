"""What the tests of the service share: a worker in a thread, uploads, images."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dinocell.service.serve import shared_options
from dinocell.service.worker import Worker, describe_model

if TYPE_CHECKING:
    from dinocell.service.service import Service


class WorkerThread:
    """As `WorkerProcess`, in this process; `hold` stops it from taking jobs."""

    def __init__(self, service: Service, model) -> None:
        self.model = describe_model(model, "mini")
        self.worker = Worker(service.queue, model, shared_options(service.options), service.hear)
        self.worker.places = service.readable
        self.work, self.ended, self.free = threading.Event(), threading.Event(), threading.Event()
        self.free.set()
        self.busy = threading.Lock()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.ended.is_set():
            self.work.wait()
            self.work.clear()
            self.free.wait()
            with self.busy:
                if self.free.is_set():
                    self.worker.work_off()
                else:  # held since
                    self.work.set()

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def wake(self) -> None:
        self.work.set()

    def hold(self) -> None:
        self.free.clear()
        with self.busy:  # a job that has just ended is followed by a look for the next one
            pass

    def release(self) -> None:
        self.free.set()
        self.wake()

    def use(self, model: Path) -> None:
        from dinocell.network.model import load_model

        self.worker.model = load_model(str(model))
        self.model = describe_model(self.worker.model, str(model))

    def stop(self) -> None:
        self.ended.set()
        self.release()
        self.thread.join()


def upload(client, path: Path, *, to: str = "segment", **fields):
    """Post an image; `fields` become the form."""
    with path.open("rb") as file:
        return client.post(f"/api/v1/{to}", files={"image": (path.name, file)}, data=fields)


def finished(client, job_id: str) -> dict:
    """The job when its events have ended."""
    with client.stream("GET", f"/api/v1/jobs/{job_id}/events") as stream:
        for _ in stream.iter_lines():
            pass
    return client.get(f"/api/v1/jobs/{job_id}").json()


def noise(path: Path, seed: int, shape=(40, 48)) -> Path:
    """An image of which the small network finds cells."""
    from dinocell.io import write_image

    rng = np.random.default_rng(seed)
    write_image(path, rng.integers(0, 4000, shape).astype(np.uint16))
    return path


def add_finished(service: Service, side: int, spacing: int) -> np.ndarray:
    """A finished job of a square image with one bright square of half the spacing in each place of a grid.

    Returns its labels, which are numbered row by row.
    """
    per_row = side // spacing
    rows, columns = np.divmod(np.arange(side), spacing)[0], np.arange(side) // spacing
    numbers = rows[:, None] * per_row + columns + 1
    inside = (np.arange(side) % spacing < spacing // 2) & (rows < per_row)
    labels = np.where(inside[:, None] & inside, numbers, 0).astype(np.uint32)
    job = service.queue.add("large", "image.tif", {}, lambda path: path.write_bytes(b"x"), limit=9)
    folder = service.queue.job_folder(job.id)
    np.save(folder / "plane.npy", (1000 * (labels > 0) + np.arange(side) % 256).astype(np.uint16))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "scores.npy", np.linspace(0.2, 1, int(labels.max())))
    about = {"pixel_size_um": None, "channel_names": [], "warnings": [], "unfamiliar": None}
    about |= {"target": "sqrt", "min_score": 0.0, "peak_threshold": 0.5, "fill_threshold": 0.2}
    about |= {"min_prominence": 0.1, "min_area_px": 0}
    (folder / "about.json").write_text(json.dumps(about))
    summary = {"num_cells": int(labels.max()), "warnings": ""}
    summary |= {"image_height_px": side, "image_width_px": side}
    taken = service.queue.take()
    assert taken is not None
    service.queue.finish(taken, summary=summary)
    return labels
