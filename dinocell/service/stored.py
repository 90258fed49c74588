"""The files of a finished job: what the batch wrote, and what a relabel needs without the network.

image.tif     the upload, under a name of ours
result/       what `segment_files` writes
plane.npy     the gray plane (H, W); of several channels the mean
channels.npy  (H, W, C), where the plane is such a mean
map.npy       distance map (H, W) float32, or (2, H, W) with the spread of flips
about.json    pixel size, names, notes, target, thresholds
current.json  revision of the labels and the thresholds that made them; made by the first change
labels.npy    (H, W) uint32 labels of that revision
files/        further formats of that revision, written when somebody asks for them
"""

import json
import shutil
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import atomic_path, ensure_folder, write_text_atomically
from dinocell.io import read_labels
from dinocell.io.planes import MAX_PIXELS
from dinocell.pipeline import DINOCellPipeline, LoadedImage, Segmentation, output_paths
from dinocell.results.confidence import cell_scores, scored_cells
from dinocell.results.exports import EXPORT_FORMATS
from dinocell.segmentation.thresholds import Thresholds

RESULT = "result"
"""Folder of what the batch writes, in the folder of a job."""

KINDS = (*EXPORT_FORMATS, "csv", "overlay", "npy", "zip")
"""What can be downloaded: the label files of `segment`, table, picture, labels as an array, and all in one."""

_change = threading.Lock()  # of labels and revision; short, and the service has one process


class ChangedError(DINOCellError):
    """Somebody else has changed the labels since they were read."""


@dataclass(frozen=True)
class Revision:
    """What made the labels that a job has now.

    Attributes
    ----------
    number : 0 for what the batch wrote, one more with each change
    thresholds, min_score : of the last relabel
    edited : whether the labels were changed by hand after it
    """

    number: int
    thresholds: Thresholds
    min_score: float
    edited: bool = False

    def to_mapping(self) -> dict[str, Any]:
        """JSON values."""
        own = {"revision": self.number, "min_score": self.min_score, "edited": self.edited}
        return own | asdict(self.thresholds)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Revision":
        """From what `to_mapping` gives, other keys included."""
        thresholds = Thresholds(**{f.name: values[f.name] for f in fields(Thresholds)})
        return cls(
            values.get("revision", 0), thresholds, values["min_score"], bool(values.get("edited"))
        )


def keep_prediction(
    folder: Path, pipeline: DINOCellPipeline, image: LoadedImage, distance_map: NDArray
) -> None:
    """Write what `StoredResult` needs into the folder of a job; OSError if the disk refuses."""
    arrays = {"plane": image.plane, "channels": image.channels, "map": distance_map}
    for name, array in arrays.items():
        if array is not None:
            _write_array(folder / f"{name}.npy", array)
    judged = pipeline.judge(image)
    about = {
        "pixel_size_um": image.pixel_size_um,
        "channel_names": list(image.channel_names),
        "warnings": [*image.warnings, *judged.notes],
        "unfamiliar": judged.unfamiliar,
        "kind": judged.kind,
        "target": pipeline.model.config.target,
        "min_score": pipeline.min_score,
        **asdict(judged.thresholds),
    }
    write_text_atomically(folder / "about.json", json.dumps(about, indent=1))


def _write_array(path: Path, array: NDArray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)


class StoredResult:
    """The result of a job that is done.

    Parameters
    ----------
    folder : of the job
    file : name of the upload in it
    name : what downloads are called, without an ending
    """

    def __init__(self, folder: Path, file: str, name: str) -> None:
        self.folder, self.stem, self.name = folder, Path(file).stem, name
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))

    def revision(self) -> Revision:
        """What made the labels."""
        path = self.folder / "current.json"
        return Revision.of(json.loads(path.read_text("utf-8")) if path.exists() else self.about)

    def labels(self) -> NDArray[np.uint32]:
        """(H, W) labels of the revision."""
        path = self.folder / "labels.npy"
        if path.exists():
            return np.load(path)
        return read_labels(self.folder / RESULT / f"{self.stem}_labels.tif", max_pixels=MAX_PIXELS)

    def plane(self) -> NDArray[Any]:
        """The gray plane (H, W) that was segmented, as in the file; of several channels the mean."""
        return np.load(self.folder / "plane.npy")

    def colours(self) -> NDArray[np.uint8] | None:
        """(H, W, 3) of a colour picture; None of other images."""
        if self.about["channel_names"] != ["red", "green", "blue"]:
            return None
        channels = np.load(self.folder / "channels.npy")
        return channels if channels.dtype == np.uint8 else None

    def segmentation(self) -> Segmentation:
        """The image with the labels of the revision."""
        with _change:
            revision, labels = self.revision(), self.labels()
        stored, target = np.load(self.folder / "map.npy"), self.about["target"]
        mean, spread = stored if stored.ndim == 3 else (stored, None)
        if revision.edited:
            scores = cell_scores(labels, mean, target=target, spread=spread)
        else:  # those of cells that `min_score` has removed count for their neighbours
            _, scores, _ = self._separate(revision)
        channels = self.folder / "channels.npy"
        return Segmentation(
            labels=labels,
            distance_map=mean,
            image=self.plane(),
            pixel_size_um=self.about["pixel_size_um"],
            name=self.stem,
            warnings=tuple(self.about["warnings"]),
            channels=np.load(channels) if channels.exists() else None,
            channel_names=tuple(self.about["channel_names"]),
            scores=scores,
            unfamiliar=self.about["unfamiliar"],
            kind=self.about.get("kind", ""),  # jobs of earlier versions have none
        )

    def relabel(self, changes: Mapping[str, Any], *, revision: int | None = None) -> Revision:
        """Run the watershed again on the stored map; changes by hand are lost.

        `changes` are fields of `Thresholds`, and `min_score`; what is left out stays as it was.

        Raises UsageError (the values do not fit together); ChangedError (the labels have another
        revision than `revision`).
        """
        before = self.revision()
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            new = Revision.of({**before.to_mapping(), **given, "edited": False})
        except ValueError as error:
            raise UsageError(str(error)) from error
        return self._replace(self._separate(new)[0], new, revision)

    def _separate(self, by: Revision) -> tuple[NDArray[np.uint32], NDArray[Any], tuple[str, ...]]:
        return scored_cells(
            np.load(self.folder / "map.npy"),
            by.thresholds,
            target=self.about["target"],
            min_score=by.min_score,
        )

    def replace_labels(self, labels: NDArray[Any], *, revision: int) -> Revision:
        """Keep labels that were changed by hand; gaps in the numbers are closed, in their order.

        Raises UsageError (another shape than the image, or no whole numbers from 0 on); ChangedError
        (the labels have another revision than `revision`).
        """
        shape = self.labels().shape
        if labels.shape != shape or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise UsageError(
                f"Labels must be an array of whole numbers from 0 on of shape {shape}, got "
                f"{labels.dtype} of shape {labels.shape}: change the labels that the service gave"
            )
        values, places = np.unique(labels, return_inverse=True)
        compact = (places.reshape(shape) + (values[0] != 0)).astype(np.uint32)
        before = self.revision()
        new = Revision(before.number, before.thresholds, before.min_score, edited=True)
        return self._replace(compact, new, revision)

    def _replace(self, labels: NDArray[np.uint32], new: Revision, expected: int | None) -> Revision:
        with _change:
            now = self.revision().number
            if expected is not None and expected != now:
                raise ChangedError(
                    f"`revision` must be that of the labels now, {now}, got {expected}: somebody else "
                    "has changed them, so load them again"
                )
            new = Revision(now + 1, new.thresholds, new.min_score, new.edited)
            _write_array(self.folder / "labels.npy", labels)
            write_text_atomically(self.folder / "current.json", json.dumps(new.to_mapping()))
            shutil.rmtree(self.folder / "files", ignore_errors=True)
        return new

    def file(self, kind: str) -> Path:
        """A file of the revision, one of `KINDS`, written if it does not exist yet.

        Raises UsageError (an unknown kind); DINOCellError (the format cannot hold the labels, or the
        disk refuses); MissingExtraError (`roi` without its package).
        """
        if kind not in KINDS:
            raise UsageError(
                f"The format must be one of {', '.join(KINDS)}, got {kind}: choose one"
            )
        number = self.revision().number
        name = {"csv": "cells.csv", "overlay": "overlay.png", "npy": "labels.npy", "zip": "all.zip"}
        suffix = EXPORT_FORMATS[kind].suffix if kind in EXPORT_FORMATS else f"_{name[kind]}"
        if number == 0 and (written := self.folder / RESULT / f"{self.stem}{suffix}").exists():
            return written
        folder = self.folder / "files" / str(number)
        path = folder / f"{self.stem}{suffix}"
        if path.exists():
            return path
        ensure_folder(folder)
        if kind == "npy":
            _write_array(path, self.labels())
        elif kind == "zip":
            self._write_zip(path)
        else:
            formats = (kind,) if kind in EXPORT_FORMATS else ("tif",)
            self.segmentation().save(folder, formats=formats, overlay=kind == "overlay")
        return path

    def _write_zip(self, path: Path) -> None:
        """Labels, table and picture, under the names that `segment` gives them."""
        kinds = list(output_paths(path.parent, self.stem, ("tif",), overlay=True))
        files = [self.file(kind) for kind in kinds]
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for file in files:
                archive.write(file, self.download_name(file), zipfile.ZIP_DEFLATED)

    def download_name(self, file: Path) -> str:
        """What a file of this result is called where it leaves the service."""
        return self.name + file.name.removeprefix(self.stem)
