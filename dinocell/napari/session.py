"""One image with its cells while somebody corrects them; knows nothing of a viewer.

The labels and every change to them lie in the folder of a job (`dinocell.service.stored`), on this
computer or at a service (`dinocell.napari.remote`).  A session keeps the labels of now beside it, and what
is selected.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import UsageError
from dinocell.files import atomic_path
from dinocell.io import write_image
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.corrections import Position
from dinocell.service.history import ChangedError
from dinocell.service.keeping import RESULT, keep_prediction
from dinocell.service.stored import Change, StoredResult

_ONE_STEP_S = 1.5
"""Relabels that follow each other faster are one step for undo, as on the page."""
UPLOAD = "image.tif"


class Result(Protocol):
    """What a session needs of a result; see `StoredResult`."""

    name: str

    def state(self) -> Change:
        """The labels of the whole image and their revision."""

    def relabel(
        self, changes: Mapping[str, Any], *, revision: int | None, amend: bool = False
    ) -> Change:
        """Other thresholds."""

    def correct(self, kind: str, values: Mapping[str, Any], *, revision: int | None) -> Change:
        """One correction."""

    def replace_labels(self, labels: NDArray[Any], *, revision: int) -> Change:
        """Labels that were painted."""

    def columns(self) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Numbers of the cells, and their measurements."""

    def copy_file(self, kind: str, target: Path) -> None:
        """Write a file of `dinocell.service.stored.KINDS`."""

    def notes(self) -> tuple[str, ...]:
        """What a careful user should know of the image."""

    def close(self) -> None:
        """Delete what was kept for the session alone."""


class LocalResult(StoredResult):
    """A result of this computer, in a folder that `close` deletes."""

    def columns(self) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Numbers of the cells, and their measurements."""
        now, segmentation = self.segmentation()
        return now.numbers, segmentation.measure().to_dict()

    def copy_file(self, kind: str, target: Path) -> None:
        """Write a file of `dinocell.service.stored.KINDS`."""
        with atomic_path(target) as temporary:
            shutil.copyfile(self.file(kind), temporary)

    def notes(self) -> tuple[str, ...]:
        """What a careful user should know of the image."""
        return tuple(self.about["warnings"])

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_pixels(
    path: Path,
    pixels: NDArray[Any],
    *,
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] | None = None,
) -> None:
    """Write what a layer shows as a TIFF; whole numbers of 64 bits become float64.

    `pixels` is (H, W), (H, W, 3) uint8 of a colour picture, or (H, W, C) with `channel_names`.

    Raises as `dinocell.io.write_image` does.
    """
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize == 8:
        pixels = pixels.astype(np.float64)
    write_image(
        path,
        pixels,
        compression="none",
        pixel_size_um=pixel_size_um,
        channel_names=channel_names,
    )


def segment_here(
    pixels: NDArray[Any],
    *,
    model: str,
    device: str = "auto",
    name: str = "image",
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LocalResult:
    """Segment on this computer, with the labels of `dinocell segment` for the same pixels.

    Parameters
    ----------
    pixels, pixel_size_um, channel_names : as for `write_pixels`; all channels are averaged
    model : bundled name or model file
    name : of the image, for files that are written
    progress : is called with windows done and their total

    Raises UsageError, DINOCellError, ValueError: see `DINOCellPipeline`.
    """
    folder = Path(tempfile.mkdtemp(prefix="dinocell_napari_"))
    try:
        path = folder / UPLOAD
        write_pixels(path, pixels, pixel_size_um=pixel_size_um, channel_names=channel_names)
        pipeline = DINOCellPipeline(model, device=device)
        channels = None if channel_names is None else list(range(len(channel_names)))
        image = pipeline.load(path, channels=channels)
        distance_map = pipeline.predict(image, progress=progress)
        keep_prediction(folder, pipeline, image, distance_map)
        pipeline.finish(image, distance_map).save(folder / RESULT, overlay=False)
        return LocalResult(folder, f"{name}.tif", name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class Session:
    """Labels that are being corrected.

    Parameters
    ----------
    result : where they are stored

    Attributes
    ----------
    labels : (H, W) uint32 ndarray, 0 background; numbers stay when other cells go
    revision : what made them
    touched : numbers of the cells that were corrected by hand
    selected : numbers of the selected cells, in the order in which they were chosen
    """

    def __init__(self, result: Result) -> None:
        self.result = result
        self.selected: list[int] = []
        self._columns: tuple[int, NDArray[np.int64], dict[str, Any]] | None = None
        self._doubtful: tuple[float, int] | None = None
        self._relabelled = -np.inf
        self._load()

    def _load(self) -> None:
        state = self.result.state()
        self.labels, self.revision = state.labels.copy(), state.revision
        self.touched = set(state.touched.tolist())

    @property
    def num_cells(self) -> int:
        """How many cells there are."""
        return self.numbers().size

    def numbers(self) -> NDArray[np.int64]:
        """(n,) numbers of the cells, ascending, perhaps with gaps."""
        return np.flatnonzero(np.bincount(self.labels.ravel())[1:]) + 1

    def relabel(self, **changes: Any) -> None:
        """Other thresholds on the stored map; corrected cells stay.

        `changes` are fields of `Thresholds`, and `min_score`.

        Raises UsageError (they do not fit together).
        """
        now = time.monotonic()
        amend = now - self._relabelled < _ONE_STEP_S
        change = self._asked(
            lambda number: self.result.relabel(changes, revision=number, amend=amend)
        )
        self._take(change, selected=())
        self._relabelled = now

    def correct(
        self,
        kind: str,
        *,
        cells: Iterable[int] = (),
        points: Sequence[Position] = (),
        radius_px: float = 3.0,
    ) -> None:
        """One correction: remove, merge, split, cut, grow, paint, erase, undo or redo.

        Positions are (row, column) with the upper left corner of the image at (0, 0).  New and changed
        cells are selected.

        Raises UsageError (it does not fit the labels); ChangedError (somebody else has changed them: they
        were loaded again).
        """
        values = {"cells": list(cells), "points": list(points), "radius_px": radius_px}
        change = self._asked(lambda number: self.result.correct(kind, values, revision=number))
        self._relabelled = -np.inf
        before = self._box(change)
        found = np.unique(change.labels[change.labels != before])
        gone = kind in ("undo", "redo", "remove", "erase")
        self._take(change, selected=() if gone else found[found > 0].tolist())

    def adopt(self, painted: NDArray[Any]) -> bool:
        """Keep what was painted outside of the session; returns whether anything had changed.

        Raises UsageError (`painted` has another shape than the labels).
        """
        if painted.shape == self.labels.shape and np.array_equal(painted, self.labels):
            return False
        labels = np.asarray(painted)
        self._asked(lambda number: self.result.replace_labels(labels, revision=number))
        self._relabelled = -np.inf
        self._load()  # the numbers of painted cells are new
        self.selected = [cell for cell in self.selected if (self.labels == cell).any()]
        return True

    def _asked(self, work: Callable[[int], Change]) -> Change:
        """What `work` makes of the revision; loads the labels again if somebody else has changed them."""
        try:
            return work(self.revision.number)
        except ChangedError:
            self._load()
            self.selected = []
            raise

    def _box(self, change: Change) -> NDArray[np.uint32]:
        (row, column), (height, width) = change.corner, change.labels.shape
        return self.labels[row : row + height, column : column + width]

    def _take(self, change: Change, *, selected: Iterable[int]) -> None:
        self._box(change)[:] = change.labels
        self.revision, self.touched = change.revision, set(change.touched.tolist())
        self.selected = list(selected)

    def cell_at(self, row: float, column: float) -> int:
        """The number of the cell at a position, 0 for background and outside of the image."""
        place = int(np.floor(row)), int(np.floor(column))
        inside = all(0 <= at < size for at, size in zip(place, self.labels.shape, strict=True))
        return int(self.labels[place]) if inside else 0

    def select(self, cell: int, *, more: bool = False) -> None:
        """Select a cell alone, or one `more`, which is left out if it is selected; 0 selects none."""
        if not more:
            self.selected = [cell] if cell else []
        elif cell in self.selected:
            self.selected.remove(cell)
        elif cell:
            self.selected.append(cell)

    def columns(self) -> tuple[NDArray[np.int64], dict[str, Any]]:
        """Numbers of the cells, and one list of measurements per column."""
        if self._columns is None or self._columns[0] != self.revision.number:
            self._columns = (self.revision.number, *self.result.columns())
        return self._columns[1:]

    def next_doubtful(self, step: int = 1) -> tuple[float, float]:
        """Select the cell of the next lowest score; returns the middle of it, row and column.

        Raises UsageError (there is no cell).
        """
        numbers, columns = self.columns()
        scores = np.asarray(columns.get("score", []), float)
        # Corrected cells have no score.  No position in the list is kept, because cells leave it.
        order = sorted((scores[row], int(numbers[row]), row) for row in np.flatnonzero(scores >= 0))
        if not order:
            raise UsageError(
                "There must be a cell with a score, and there is none: lower the thresholds"
            )
        last = self._doubtful
        if step > 0:
            found = next((one for one in order if last is None or one[:2] > last), order[0])
        else:
            found = next((one for one in order[::-1] if last and one[:2] < last), order[-1])
        self._doubtful, row = found[:2], found[2]
        self.selected = [int(numbers[row])]
        return float(columns["centroid_row"][row]), float(columns["centroid_col"][row])

    def score(self, cell: int) -> float:
        """The score of a cell, NaN where it has none."""
        numbers, columns = self.columns()
        found = dict(zip(numbers.tolist(), columns.get("score", []), strict=False))
        score = found.get(cell)
        return np.nan if score is None else float(score)

    def centres(self, cells: Iterable[int]) -> NDArray[np.float64]:
        """(n, 2) row and column of the middle of cells, in the coordinates of pixel centres."""
        places = [np.argwhere(self.labels == cell).mean(axis=0) for cell in cells]
        return np.asarray(places, float).reshape(-1, 2)
