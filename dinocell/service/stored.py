"""The files of a finished job: what the batch wrote, and what `keeping` adds for a relabel without the network.

image.tif     the upload, under a name of ours
result/       what `segment_files` writes
plane.npy     the gray plane (H, W); of several channels the mean
channels.npy  (H, W, C), where the plane is such a mean
channel_N.npy channels of the file (H, W) that somebody has looked at
labels.npy    labels of the batch (H, W) uint32, if tiles of them were asked for
map.npy       distance map (H, W) float32, or (2, H, W) with the spread of flips
about.json    pixel size, names, channels of the file, notes, target, thresholds
files/        further formats of the labels now, written when somebody asks for them

What changes of the labels add is described in `dinocell.service.history`.
"""

import json
import re
import threading
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import ensure_folder, move_into_place, temporary_folder
from dinocell.io import read_labels
from dinocell.io.planes import MAX_PIXELS
from dinocell.pairs import IMAGE_SUFFIXES
from dinocell.results.confidence import cell_scores, scored_cells
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.results.segmented import Segmentation
from dinocell.segmentation import corrections
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.watershed import separate_cells
from dinocell.service.channels import channel_path
from dinocell.service.history import TOUCHED, Box, History, Revision, write_array
from dinocell.service.keeping import RESULT, STEM

KINDS = (*EXPORT_FORMATS, "csv", "overlay", "npy", "zip")
"""What can be downloaded: the label files of `segment`, of which folders are zipped, table, picture, labels as
an array, and all in one."""

_MOST_NAME_BYTES = 160  # most file systems allow 255, and the endings of results follow

_locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
"""One for the labels of each job; the service has one process."""

_reading = threading.Lock()  # of channels: one file in memory at a time


@dataclass(frozen=True)
class Change:
    """What a change has done: the revision now, its cells, and a box of pixels with their new labels.

    Attributes
    ----------
    numbers : (n,) numbers of the cells, ascending; there may be gaps
    touched : (m,) numbers of those that were corrected by hand
    corner : row and column of the box
    labels : (h, w) uint32 ndarray
    """

    revision: Revision
    numbers: NDArray[np.int64]
    touched: NDArray[np.int64]
    corner: tuple[int, int]
    labels: NDArray[np.uint32]


class StoredResult:
    """The result of a job that is done.

    Parameters
    ----------
    folder : of the job
    file_name : of the image, for formats that say it
    name : what downloads are called, without an ending
    stem : how the files of the batch begin
    results : folder of what the batch wrote; `RESULT` in `folder` by default
    predict : writes `map.npy` where it is missing, see `dinocell.service.viewing`
    read : writes channels of the file, given the names of all and the positions of some
    """

    def __init__(
        self,
        folder: Path,
        file_name: str,
        name: str,
        *,
        stem: str = STEM,
        results: Path | None = None,
        predict: Callable[[], None] | None = None,
        read: Callable[[Sequence[str], Sequence[int]], None] | None = None,
    ) -> None:
        self.folder, self.file_name, self.name, self.stem = folder, file_name, name, stem
        self.results, self.predict, self._read = results or folder / RESULT, predict, read
        self.about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.history = History(folder, Revision.of(self.about))
        self._lock = _locks[folder]

    def revision(self) -> Revision:
        """What made the labels."""
        return self.history.revision()

    def state(self) -> Change:
        """The labels of the whole image as corrections number them, and their revision."""
        with self._lock:
            revision, state = self.revision(), self._state()
        return _change_of(revision, state, (slice(0, state.shape[0]), slice(0, state.shape[1])))

    def _state(self) -> NDArray[np.uint32]:
        state = self.history.state()[1]
        return self._as_found() if state is None else state

    def _as_found(self) -> NDArray[np.uint32]:
        """The labels of the batch."""
        if (self.folder / "labels.npy").exists():  # quicker to read
            return np.load(self.folder / "labels.npy")
        paths = [
            self.results / f"{self.stem}{EXPORT_FORMATS[kind].suffix}" for kind in ("tif", "png")
        ]
        return read_labels(next(filter(Path.exists, paths), paths[0]), max_pixels=MAX_PIXELS)

    def labels(self) -> NDArray[np.uint32]:
        """(H, W) labels now, 1..n without gaps."""
        return _without_gaps(self.state())

    def plane(self) -> NDArray[Any]:
        """The gray plane (H, W) that was segmented, as in the file; of several channels the mean."""
        return np.load(self.folder / "plane.npy")

    def channels(self) -> list[dict[str, Any]]:
        """The channels of the file, see `Original.channels`; empty where it has one."""
        return self.about.get("channels", [])  # jobs of earlier versions have none

    def stored_pixels(self, channel: int | None = None) -> NDArray[Any]:
        """(H, W) `plane`, or a channel, in its file: only what is used is read.

        Raises UsageError (the channel does not exist); DINOCellError (it cannot be read any more).
        """
        if channel is None:
            return np.load(self.folder / "plane.npy", mmap_mode="r")
        known = self.channels()
        names = [one["name"] for one in known]
        if channel >= len(names):
            has = f"the channels 0 to {len(names) - 1} ({', '.join(names)})" if names else "none"
            raise UsageError(
                f"`channel` must be a channel of the image, which has {has}, got {channel}: choose one, or "
                "leave it out for the plane that was segmented"
            )
        # of those that were segmented; not by a name that two channels have
        segmented = self.about["channel_names"]
        if names[channel] in segmented and names.count(names[channel]) == 1:
            if len(segmented) == 1:
                return self.stored_pixels()
            place = segmented.index(names[channel])
            return np.load(self.folder / "channels.npy", mmap_mode="r")[..., place]
        path = channel_path(self.folder, channel)
        if not path.exists() and self._read is not None:
            with _reading:
                others = [place for place, one in enumerate(known) if one["shown"]]
                wanted = dict.fromkeys([channel, *others])  # they will be asked for next
                missing = [one for one in wanted if not channel_path(self.folder, one).exists()]
                try:
                    if channel in missing:
                        self._read(names, missing)
                except (DINOCellError, OSError):
                    if not path.exists():  # else another one of them is at fault
                        raise
        return np.load(path, mmap_mode="r")

    def stored_labels(self) -> tuple[int, NDArray[np.uint32]]:
        """The labels now with `TOUCHED` in their file, and the number of their revision.

        The file is written when it is asked for first.
        """
        now, stored = self.history.state(mmap_mode="r")
        if stored is None:
            path = self.folder / "labels.npy"
            with self._lock:
                if not path.exists():
                    write_array(path, self._as_found())
            stored = np.load(path, mmap_mode="r")
        return now.number, stored

    def segmentation(self) -> tuple[Change, Segmentation]:
        """The labels now, and the image with them, their gaps closed."""
        now = self.state()
        labels = _without_gaps(now)
        scores, mean = self._scores(now, labels)
        channels = self.folder / "channels.npy"
        return now, Segmentation(
            labels=labels,
            distance_map=mean,
            image=self.plane(),
            pixel_size_um=self.about["pixel_size_um"],
            name=self.name,
            file_name=self.file_name,
            warnings=tuple(self.about["warnings"]),
            channels=np.load(channels) if channels.exists() else None,
            channel_names=tuple(self.about["channel_names"]),
            scores=scores,
            unfamiliar=self.about["unfamiliar"],
            kind=self.about.get("kind", ""),  # jobs of earlier versions have none
            rescale=self.about.get("rescale", 1.0),  # earlier versions did not rescale
        )

    def _scores(
        self, now: Change, labels: NDArray[np.uint32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Scores of the cells, NaN of those that were changed by hand, and the map that says so."""
        target, touched = self.about["target"], np.isin(now.numbers, now.touched)
        as_found = self._is_grown and not now.revision.edited
        if as_found or not (self.folder / "map.npy").exists():
            # those of the table, of cells that are as they were
            table = np.load(self.folder / "scores.npy")
            known = np.append(table, np.nan)[np.minimum(now.numbers - 1, table.size)]
            whole = labels_to_distance_map(labels, target=target)
            return np.where(touched, np.nan, known), whole
        mean, spread = self._map()
        if not now.revision.edited:
            # those of cells that `min_score` has removed count for their neighbours
            scores = self._separate(now.revision)[1]
            if scores.size == now.numbers.size:  # else another device has made the labels
                return scores, mean
        scores = cell_scores(labels, mean, target=target, spread=spread)
        return np.where(touched, np.nan, scores), mean

    @property
    def _is_grown(self) -> bool:
        """Whether the cells were grown from nuclei; their map is that of the cells."""
        return bool(self.about.get("grown"))

    def _map(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        stored = self._stored_map()
        return (stored[0], stored[1]) if stored.ndim == 3 else (stored, None)

    def _stored_map(self) -> NDArray[np.float32]:
        if self.predict is not None and not (self.folder / "map.npy").exists():
            self.predict()
        return np.load(self.folder / "map.npy")

    def relabel(
        self, changes: Mapping[str, Any], *, revision: int | None = None, amend: bool = False
    ) -> Change:
        """Run the watershed again on the stored map; cells that were touched by hand stay.

        `changes` are fields of `Thresholds`, and `min_score`; what is left out stays as it was.
        `amend` makes one step of this and the relabel before it.

        Raises UsageError (the values do not fit together, or the cells were grown from nuclei);
        ChangedError (the labels have another revision than `revision`).
        """
        if self._is_grown:
            raise UsageError(
                "Other thresholds are for cells that the network has found, and these were grown from "
                "nuclei: segment the image again with other thresholds"
            )
        given = {name: value for name, value in changes.items() if value is not None}
        with self._lock:
            before = self.history.require(revision)
            try:
                new = Revision.of({**before.to_mapping(), **given})
            except ValueError as error:
                raise UsageError(str(error)) from error
            state = self._state()
            kept = state >= TOUCHED
            labels = self._labels_by(new)
            if kept.any():
                labels = corrections.keep_touched(labels, state & ~TOUCHED, kept)
                labels[kept] |= TOUCHED
            return self._changed(state, labels, new, amend=amend)

    def _labels_by(self, by: Revision) -> NDArray[np.uint32]:
        """Labels of the stored map; scores take time, and only `min_score` needs them."""
        if by.min_score > 0:
            return self._separate(by)[0]
        return separate_cells(self._map()[0], by.thresholds)

    def _separate(self, by: Revision) -> tuple[NDArray[np.uint32], NDArray[Any], tuple[str, ...]]:
        return scored_cells(
            self._stored_map(),
            by.thresholds,
            target=self.about["target"],
            min_score=by.min_score,
        )

    def correct(self, kind: str, values: Mapping[str, Any], *, revision: int | None) -> Change:
        """One correction by hand.

        `kind` is remove, merge, split, cut, grow, paint, erase, undo or redo; `values` has `cells`,
        `points` (row, column) and `radius_px`, see `dinocell.segmentation.corrections`.

        Raises UsageError (the correction does not fit the labels); ChangedError (the labels have
        another revision than `revision`).
        """
        with self._lock:
            now = self.history.require(revision)
            if kind in ("undo", "redo"):
                new, box = self.history.step(kind)
                return _change_of(new, self._state(), box)
            state = self._state()
            labels = self._corrected(kind, values, state & ~TOUCHED, now)
            return self._keep_touched(state, labels, now)

    def _corrected(
        self, kind: str, values: Mapping[str, Any], labels: NDArray[np.uint32], now: Revision
    ) -> NDArray[np.uint32]:
        cells, points, radius_px = values["cells"], values["points"], values["radius_px"]
        if kind not in ("remove", "merge", "split") and not points:
            raise UsageError("`points` must hold one position or more, got none: choose one")
        match kind:
            case "remove":
                return corrections.remove_cells(labels, cells)
            case "merge":
                return corrections.merge_cells(labels, cells)
            case "split":
                (cell,) = cells if len(cells) == 1 else (0,)
                return corrections.split_cell(labels, self._map()[0], cell, points)
            case "cut":
                return corrections.cut_cells(labels, self._map()[0], points, cells)
            case "grow":
                return corrections.grow_cell(labels, self._map()[0], points[0], now.thresholds)
            case "paint":
                return corrections.paint_cell(labels, points, radius_px, *cells[:1])
        least = now.thresholds.min_area_px
        return corrections.erase(labels, points, radius_px, cells, min_area_px=least)

    def replace_labels(self, labels: NDArray[Any], *, revision: int) -> Change:
        """Keep labels that were changed by hand; cells that are as they were count as not touched.

        Raises UsageError (another shape than the image, or no whole numbers from 0 on); ChangedError
        (the labels have another revision than `revision`).
        """
        with self._lock:
            now, state = self.history.require(revision), self._state()
            shape = state.shape
            if labels.shape != shape or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
                raise UsageError(
                    f"Labels must be an array of whole numbers from 0 on of shape {shape}, got "
                    f"{labels.dtype} of shape {labels.shape}: change the labels that the service gave"
                )
            numbered = corrections.same_numbers(state & ~TOUCHED, labels)
            return self._keep_touched(state, numbered, now)

    def _keep_touched(
        self, state: NDArray[np.uint32], labels: NDArray[np.uint32], now: Revision
    ) -> Change:
        touched = corrections.touched_by(state & ~TOUCHED, labels) | (state >= TOUCHED)
        labels[touched] |= TOUCHED
        return self._changed(state, labels, now)

    def _changed(
        self,
        before: NDArray[np.uint32],
        after: NDArray[np.uint32],
        new: Revision,
        *,
        amend: bool = False,
    ) -> Change:
        revision, box = self.history.change(before, after, new, amend=amend)
        return _change_of(revision, after, box)

    def file(self, kind: str) -> Path:
        """A file of the labels now, one of `KINDS`; raises as `files`."""
        return self.files((kind,))[kind]

    def files(self, kinds: Collection[str]) -> dict[str, Path]:
        """Files of the labels now, all of one revision, written where they do not exist yet.

        They may be gone after two more changes of the labels.

        Raises UsageError (an unknown kind); DINOCellError (the format cannot hold the labels, or the
        disk refuses); MissingExtraError (`roi` without its package).
        """
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UsageError(
                f"The format must be one of {', '.join(KINDS)}, got {unknown[0]}: choose one"
            )
        number = self.revision().number
        if not all(self._place(kind, number).exists() for kind in kinds):
            # beside `files`, of which those of old revisions may be deleted at any time
            with temporary_folder(self.folder) as folder:
                number, files = self._written(folder, kinds)
                for kind, file in files.items():
                    place = self._place(kind, number)
                    if not place.exists():
                        ensure_folder(place.parent)
                        move_into_place(file, place)
        return {kind: self._place(kind, number) for kind in kinds}

    def _written(self, folder: Path, kinds: Collection[str]) -> tuple[int, dict[str, Path]]:
        """Write kinds of files, and maybe others, into a folder; returns the number of their revision."""
        files: dict[str, Path] = {}
        if set(kinds) == {"npy"}:
            now = self.state()
            labels = _without_gaps(now)
        else:
            now, segmentation = self.segmentation()
            labels = segmentation.labels
            formats = [kind for kind in kinds if kind in EXPORT_FORMATS]
            if "zip" in kinds or not formats:
                formats.append("tif")
            overlay = "zip" in kinds or "overlay" in kinds
            files = segmentation.save(folder, formats=formats, overlay=overlay)
        if "npy" in kinds:
            files["npy"] = folder / "labels.npy"
            np.save(files["npy"], labels, allow_pickle=False)
        if "zip" in kinds:
            files["zip"] = self._all_in_one(files, now.revision.number)
        zipped = {kind: _zipped(file) for kind, file in files.items() if file.is_dir()}
        return now.revision.number, files | zipped

    def _place(self, kind: str, number: int) -> Path:
        """Where a file of a revision is, or belongs."""
        name = {"csv": "cells.csv", "overlay": "overlay.png", "npy": "labels.npy", "zip": "all.zip"}
        suffix = EXPORT_FORMATS[kind].suffix if kind in EXPORT_FORMATS else f"_{name[kind]}"
        if kind in EXPORT_FORMATS and not EXPORT_FORMATS[kind].media_type:
            suffix += ".zip"
        if number == 0 and (written := self.results / f"{self.stem}{suffix}").exists():
            return written
        return self.folder / "files" / str(number) / f"{self.stem}{suffix}"

    def _all_in_one(self, files: Mapping[str, Path], number: int) -> Path:
        """Labels, table and picture; those of the batch, which are complete, where it has written them."""
        path = files["tif"].with_name("all.zip")
        with zipfile.ZipFile(path, "w") as archive:
            for kind in ("tif", "csv", "overlay"):
                place = self._place(kind, number)
                source = place if place.parent == self.results else files[kind]
                archive.write(source, files[kind].name, zipfile.ZIP_DEFLATED)
        return path

    def download_name(self, file: Path) -> str:
        """What a file of this result is called where it leaves the service."""
        return self.name + file.name.removeprefix(self.stem)


def _change_of(revision: Revision, state: NDArray[np.uint32], box: Box) -> Change:
    labels = state & ~TOUCHED
    numbers = np.flatnonzero(np.bincount(labels.ravel()))
    touched = np.unique(labels[state > TOUCHED]).astype(np.int64)
    corner = box[0].start, box[1].start
    return Change(revision, numbers[numbers > 0], touched, corner, labels[box])


def _without_gaps(now: Change) -> NDArray[np.uint32]:
    numbers = np.zeros(int(now.numbers.max(initial=0)) + 1, np.uint32)
    numbers[now.numbers] = np.arange(1, now.numbers.size + 1)
    return numbers[now.labels]


def _zipped(folder: Path) -> Path:
    """A zip of a format that is a folder, which is its only entry at the top."""
    path = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, folder.name / file.relative_to(folder))
    return path


def stored_name(filename: str) -> str:
    """The name of an upload in the folder of its job; its content decides how it is read."""
    ending = Path(filename).suffix.lower()
    return f"{STEM}{ending if ending in IMAGE_SUFFIXES else '.tif'}"


def safe_name(filename: str | None) -> str:
    """A name for downloads and messages from the name of an upload: no folders, no control characters."""
    stem = re.split(r"[/\\]", filename or "")[-1].rpartition(".")[0] or (filename or "")
    kept = re.sub(r"[^\w .()+-]+", "_", re.split(r"[/\\]", stem)[-1]).strip(" ._")
    return kept[:80].encode()[:_MOST_NAME_BYTES].decode(errors="ignore") or "image"
