"""What `segment` wrote, as finished jobs of a service: `dinocell view`.

The service keeps its files in the folder `corrections` of the results.  An image is read when somebody
opens it; the network runs only when somebody asks for other thresholds or for a missed cell.  Corrected
labels are written beside the original ones as NAME_labels_vN.tif with their table; each start of the
service uses a new N, from 2 on.  The original files stay as they are.
"""

import contextlib
import csv
import hashlib
import json
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.batch.folder import SETTINGS_NAME, settings_of
from dinocell.batch.inputs import image_of
from dinocell.batch.journal import JOURNAL_NAME, read_journal
from dinocell.batch.options import IMAGE_OPTIONS, PIPELINE_OPTIONS, SegmentOptions
from dinocell.errors import DINOCellError, UsageError, some
from dinocell.files import ensure_folder, write_text_atomically
from dinocell.io import find_images, read_labels, write_labels
from dinocell.io.channel_files import ChannelFiles
from dinocell.io.planes import MAX_PIXELS, PlaneChoice
from dinocell.io.plates import PLACE_NAMES, places_of
from dinocell.io.s3 import S3Path
from dinocell.network.model import DINOCell, load_model
from dinocell.pipeline import DINOCellPipeline, Judgement, LoadedImage
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.segmentation.thresholds import ThresholdChanges
from dinocell.service.channels import Original, keep_channels
from dinocell.service.keeping import keep_about, keep_arrays
from dinocell.service.options import ServiceOptions
from dinocell.service.queue import Job, Queue
from dinocell.service.service import Service
from dinocell.service.stored import StoredResult

CORRECTIONS = "corrections"
"""Folder of the service in a folder of results."""


class Viewed:
    """A folder of results that a service shows.

    Parameters
    ----------
    out : what `segment` was given as its output folder
    model, device : as in `SegmentOptions`, for images whose map is asked for

    Raises UsageError (the folder holds no results).
    """

    def __init__(self, out: Path, model: str, device: str) -> None:
        self.out, self.model, self.device = out, model, device
        self.rows = {row["name"]: row for row in read_journal(out / JOURNAL_NAME)}
        settings = out / SETTINGS_NAME
        if not self.rows or not settings.exists():
            raise UsageError(
                f"`out` must be a folder of results of segment, got {out}, which has no finished image: "
                "choose another folder"
            )
        self.without = [name for name in self.rows if self._label_file(name) is None]
        if len(self.without) == len(self.rows):
            raise UsageError(
                f"`out` must hold label images of the format tif or png, got {out} without any: segment with "
                "one of these formats, too, or convert the labels"
            )
        self.settings: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
        self._network: DINOCell | None = None
        self._lock = threading.Lock()  # one image is read, or predicted, at a time
        self._fields: dict[Path, dict[Any, dict[str, Path]]] = {}  # of a folder: place → channels
        self._versions: dict[str, int] = {}
        self._written: dict[str, int] = {}

    def describe(self) -> dict[str, Any]:
        """What the service says of its model."""
        names = ("peak_threshold", "fill_threshold", "min_prominence", "min_area_px")
        return {
            "name": f"results in {self.out.resolve().name}",
            "architecture": "",
            "device": "",
            "knows_training_images": False,
            "takes_images": False,
            **{name: self.settings[name] for name in names},
        }

    def notes(self) -> list[str]:
        """What somebody should know who opens the page: where corrections are written, what is missing."""
        notes = [
            f"Corrected labels are written to {self.out / 'NAME_labels_v2.tif'}, or v3 and so on where that "
            "exists"
        ]
        if self.without:
            count = "1 image is" if len(self.without) == 1 else f"{len(self.without)} images are"
            notes.append(f"{count} not shown, because labels are missing: {some(self.without)}")
        failed = _failed_in(self.out / "summary.csv")
        if failed:
            count = "1 image" if len(failed) == 1 else f"{len(failed)} images"
            notes.append(
                f"Segmentation failed for {count}, and summary.csv says why: {some(failed)}"
            )
        return notes

    def fill(self, queue: Queue) -> None:
        """List the images as finished jobs; those whose labels were made again since are forgotten."""
        jobs = {}
        for name, row in self.rows.items():
            labels = self._label_file(name)
            if labels is not None:
                text = f"{name}\0{labels.name}\0{labels.stat().st_mtime_ns}"
                summary = {k: v for k, v in row.items() if k not in ("name", "source", "input")}
                given = {**self.settings, **row.get("input", {})}
                options = {
                    k: given[k] for k in PlaneChoice.__annotations__ if given.get(k) is not None
                }
                job_id = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
                jobs[job_id] = (name, options, summary)
        queue.set_finished(jobs)

    def _label_file(self, name: str) -> Path | None:
        found = (self.out / f"{name}{EXPORT_FORMATS[kind].suffix}" for kind in ("tif", "png"))
        return next((path for path in found if path.exists()), None)

    def result(self, folder: Path, job: Job) -> StoredResult:
        """The files of a job, read from the original image when it is opened for the first time."""
        if not (folder / "about.json").exists():
            with self._lock:
                self._prepare(folder, job.name)
        name = Path(job.name)  # holds folders where files of several have one name
        return StoredResult(
            folder,
            Path(self.rows[job.name]["source"]).name,
            name.name,
            stem=name.name,
            results=self.out / name.parent,
            predict=lambda: self._predict(folder, job.name),
            read=lambda names, positions: self._read(folder, job.name, names, positions),
        )

    def _prepare(self, folder: Path, name: str) -> None:
        row, path = self.rows[name], self._label_file(name)
        if path is None:
            raise DINOCellError(
                f"The labels of {name} must be a file in {self.out}, and it is gone: segment it again"
            )
        loaded, pipeline = self._load(row)
        labels = read_labels(path, max_pixels=MAX_PIXELS)
        if labels.shape != loaded.plane.shape:
            raise DINOCellError(
                f"The image of {name} must have the size of its labels {labels.shape}, got "
                f"{loaded.plane.shape}: segment it again"
            )
        ensure_folder(folder)
        scores = _scores_in(self.out / f"{name}_cells.csv", int(labels.max(initial=0)))
        keep_arrays(folder, plane=loaded.plane, channels=loaded.channels, scores=scores)
        notes = row.get("warnings", "")
        kind, thresholds = row.get("kind", ""), pipeline.thresholds_of(loaded)
        for known in pipeline.model.statistics.kinds if pipeline.model.statistics else ():
            if known.name == kind:
                thresholds = replace(thresholds, **known.thresholds)
        judged = Judgement(
            tuple(notes.split("; ")) if notes else (), row.get("unfamiliar"), kind, thresholds
        )
        keep_about(folder, loaded, pipeline, judged, self._original(row))

    def _read(
        self, folder: Path, name: str, names: Sequence[str], positions: Sequence[int]
    ) -> None:
        """Store channels of an image."""
        with self._lock:
            _image_there(self.rows[name])
            keep_channels(folder, self._original(self.rows[name]), names, positions)

    def _original(self, row: dict[str, Any]) -> Original:
        """The file of an image; of a plate with a file for each channel, all files of the field."""
        image, options = image_of(row), {**self.settings, **row.get("input", {})}
        if "channel" in row and isinstance(image, Path) and not isinstance(image, S3Path):
            if image.parent not in self._fields:
                self._fields[image.parent] = _fields_in(image.parent, self.settings["plate"])
            files = self._fields[image.parent].get(_field_of(row), {})
            if len(files) > 1 and row["channel"] in files:
                return Original.of(
                    ChannelFiles.of(files), {**options, "channels": [row["channel"]]}
                )
        return Original.of(image, options)

    def _load(self, row: dict[str, Any]) -> tuple[LoadedImage, DINOCellPipeline]:
        source = _image_there(row)
        known = {field.name for field in fields(SegmentOptions)}
        kept: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in {**self.settings, **row.get("input", {})}.items()
            if name in known
        }
        options = SegmentOptions(**kept)
        if self._network is None:
            self._network = load_model(self.model, device=self.device)
        given = {name: getattr(options, name) for name in PIPELINE_OPTIONS}
        for name in ThresholdChanges.__annotations__:
            if given[name] == getattr(self._network.config, name):
                given[name] = None  # else it would replace the thresholds of each kind of image
        pipeline = DINOCellPipeline(self._network, **given)
        choice = {name: getattr(options, name) for name in IMAGE_OPTIONS}
        return pipeline.load(source, **choice), pipeline

    def _predict(self, folder: Path, name: str) -> None:
        """Store the distance map of an image."""
        with self._lock:
            if (folder / "map.npy").exists():
                return
            loaded, pipeline = self._load(self.rows[name])
            found = settings_of(SegmentOptions(), pipeline.model)["weights_sha256"]
            if found != self.settings["weights_sha256"]:
                raise UsageError(
                    f"`model` must be the one that made these results, got {self.model}, which is another: "
                    "start the page with that model"
                )
            if loaded.around is not None and loaded.around.image is not None:
                loaded = loaded.around.image  # the labels are of its cells
            keep_arrays(folder, map=pipeline.predict(loaded))

    def write_back(self, folder: Path, job: Job) -> None:
        """Write the labels of a job and their table as a version of their own, if they have changed."""
        if not (folder / "current.json").exists():
            return
        result = self.result(folder, job)
        number = result.revision().number
        note = folder / "written.json"
        if note.exists():
            self._written.setdefault(job.id, json.loads(note.read_text(encoding="utf-8")))
        if self._written.get(job.id) == number:
            return
        version = self._versions.get(job.name, 2)
        while (
            job.name not in self._versions
            and self._version(job.name, "labels.tif", version).exists()
        ):
            version += 1
        self._versions[job.name] = version
        now, segmentation = result.segmentation()
        segmentation.measure().to_csv(self._version(job.name, "cells.csv", version))
        target = self._version(job.name, "labels.tif", version)
        write_labels(target, segmentation.labels, pixel_size_um=segmentation.pixel_size_um)
        self._written[job.id] = now.revision.number
        write_text_atomically(note, json.dumps(now.revision.number))

    def _version(self, name: str, ending: str, version: int) -> Path:
        stem, _, suffix = ending.partition(".")
        return self.out / f"{name}_{stem}_v{version}.{suffix}"


def _image_there(row: dict[str, Any]) -> Path | ChannelFiles:
    """The file of an image, or the files of its channels; DINOCellError if one of them is gone."""
    image = image_of(row)
    for path in image.paths if isinstance(image, ChannelFiles) else [image]:
        if not path.exists():
            raise DINOCellError(
                f"The image of {row['name']} must be where it was when it was segmented, and {path} is "
                "gone: put it back"
            )
    return image


def _field_of(place: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(place.get(name) for name in PLACE_NAMES if name != "channel")


def _fields_in(folder: Path, plate: str) -> dict[Any, dict[str, Path]]:
    """The files of each field of a folder by their channels; empty where the names say nothing."""
    found: dict[Any, dict[str, Path]] = {}
    with contextlib.suppress(UsageError):  # there is no image any more: who reads it says so
        paths = find_images([folder])
        for path, place in zip(paths, places_of(paths, plate), strict=True):
            if "channel" in place and "thumb" not in place["channel"]:
                found.setdefault(_field_of(place), {})[place["channel"]] = path
    return found


def _failed_in(path: Path) -> list[str]:
    """The images that a summary says `segment` failed on."""
    if not path.exists():
        return []
    # Excel may have saved it.
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return [row.get("name") or "?" for row in csv.DictReader(file) if row.get("error")]


def _scores_in(path: Path, num_cells: int) -> NDArray[np.float64]:
    """The scores of a table of cells; NaN where it has none."""
    scores = np.full(num_cells, np.nan)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("score") and 0 < int(row["label"]) <= num_cells:
                    scores[int(row["label"]) - 1] = float(row["score"])
    return scores


class Reader:
    """In place of a worker: nothing is segmented unasked."""

    def __init__(self, viewed: Viewed) -> None:
        self.model: dict[str, Any] | None = viewed.describe()

    alive = True

    def wake(self) -> None:
        """There is nothing to do."""

    def stop(self) -> None:
        """There is nothing to end."""

    def use(self, model: Path) -> None:
        """The results remain those of their model; the new one is for `segment`."""


class ViewService(Service):
    """A service that shows a folder of results, and writes corrected labels into it."""

    sweep_s = 3.0

    def __init__(self, options: ServiceOptions, queue: Queue, viewed: Viewed) -> None:
        super().__init__(options, queue)
        self.viewed, self.worker = viewed, Reader(viewed)
        viewed.fill(queue)
        queue.sweep()

    def result(self, job: Job) -> StoredResult:
        """The files of an image, read when it is opened for the first time."""
        return self.viewed.result(self.queue.job_folder(job.id), job)

    def expire(self) -> None:
        """Nothing is deleted; corrected labels are written."""
        for job in self.queue.newest(2**31):
            try:
                self.viewed.write_back(self.queue.job_folder(job.id), job)
            except (DINOCellError, OSError) as error:
                print(
                    f"dinocell: warning: corrected labels of {job.name}: {error}", file=sys.stderr
                )
