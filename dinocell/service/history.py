"""The labels of a job with every change that was made to them, on disk.

current.json  number of the state, thresholds, and how many changes can be undone and redone
state_N.npy   (H, W) uint32: the label, and `TOUCHED` where somebody has corrected it by hand
undo/K.npz    what the K-th change has replaced: a box of pixels, and thresholds; `redo` likewise

A change writes the new state under a new name and then `current.json`, so that a killed process leaves
the labels before or after it.  Undo is without limit, and survives the browser and the service.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DINOCellError, UsageError
from dinocell.files import atomic_path, ensure_folder, write_text_atomically
from dinocell.segmentation.thresholds import Thresholds

TOUCHED = np.uint32(2**31)
"""This bit of a pixel says that it was corrected by hand; the others are its label."""

Box = tuple[slice, slice]


class ChangedError(DINOCellError):
    """Somebody else has changed the labels since they were read."""


@dataclass(frozen=True)
class Revision:
    """What made the labels that a job has now.

    Attributes
    ----------
    number : 0 for what the batch wrote, one more with each change
    thresholds, min_score : of the last relabel
    edited : whether labels were changed by hand
    undoable, redoable : how many changes can be undone and redone
    """

    number: int
    thresholds: Thresholds
    min_score: float
    edited: bool = False
    undoable: int = 0
    redoable: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """JSON values."""
        own = {"revision": self.number, "min_score": self.min_score, "edited": self.edited}
        own |= {"undoable": self.undoable, "redoable": self.redoable}
        return own | asdict(self.thresholds)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Revision":
        """From what `to_mapping` gives, other keys included."""
        thresholds = Thresholds(**{f.name: values[f.name] for f in fields(Thresholds)})
        return cls(
            *(values.get("revision", 0), thresholds, values["min_score"]),
            *(bool(values.get("edited")), values.get("undoable", 0), values.get("redoable", 0)),
        )


def box_of(changed: NDArray[np.bool_]) -> Box:
    """Bounding box of the true pixels; an empty one if there is none."""
    rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


class History:
    """States of labels in the folder of a job; the caller sees to it that one thread changes them.

    Parameters
    ----------
    folder : of the job
    first : the revision of the labels that the batch wrote
    """

    def __init__(self, folder: Path, first: Revision) -> None:
        self.folder, self.first = folder, first

    def revision(self) -> Revision:
        """What made the labels."""
        path = self.folder / "current.json"
        return Revision.of(json.loads(path.read_text("utf-8"))) if path.exists() else self.first

    def state(
        self, mmap_mode: Literal["r"] | None = None
    ) -> tuple[Revision, NDArray[np.uint32] | None]:
        """The revision, and its labels with their bits, read from their file as by `numpy.load`.

        None in place of labels before the first change.
        """
        while True:
            now = self.revision()
            try:
                return now, np.load(self._state_path(now), mmap_mode)
            except FileNotFoundError:
                if self.revision() == now:  # else a change in another thread has replaced it
                    return now, None

    def change(
        self,
        before: NDArray[np.uint32],
        after: NDArray[np.uint32],
        new: Revision,
        *,
        amend: bool = False,
        expected: int | None = None,
    ) -> tuple[Revision, Box]:
        """Replace the state `before` by `after`; returns the revision and the box that has changed.

        `amend` joins this change with the last one, which must have replaced all pixels, to one step.

        Raises ChangedError (the labels have another revision than `expected`).
        """
        now = self.require(expected)
        whole = new.thresholds != now.thresholds or new.min_score != now.min_score
        box = box_of(before != after)
        if whole:  # a relabel keeps all pixels, so that it can be amended
            box = slice(0, after.shape[0]), slice(0, after.shape[1])
        if not whole and box[0].stop == 0:
            return now, box
        amend = amend and now.undoable > 0 and self._replaces_all(now.undoable)
        place = now.undoable if amend else now.undoable + 1
        if not amend:
            self._keep("undo", place, before[box], box, now)
        edited = bool((after >= TOUCHED).any())
        new = Revision(now.number + 1, new.thresholds, new.min_score, edited, place, 0)
        self._set(after, new, now)
        return new, box

    def step(self, direction: str, *, expected: int | None = None) -> tuple[Revision, Box]:
        """Undo or redo one change, `direction` is one of these words.

        Raises ChangedError, UsageError (there is nothing to undo or redo).
        """
        now = self.require(expected)
        other, place = ("redo", now.undoable) if direction == "undo" else ("undo", now.redoable)
        if not place:
            raise UsageError(
                f"There must be a change to {direction}, got none: all are {direction}ne"
            )
        state = self.state()[1]
        assert state is not None  # a change has written it
        with np.load(self.folder / direction / f"{place}.npz") as entry:
            row, column = (int(value) for value in entry["corner"])
            pixels = entry["pixels"]
            then = Revision.of(json.loads(str(entry["revision"])))
        box = slice(row, row + pixels.shape[0]), slice(column, column + pixels.shape[1])
        shift = -1 if direction == "undo" else 1
        undoable, redoable = now.undoable + shift, now.redoable - shift
        self._keep(other, redoable if direction == "undo" else undoable, state[box], box, now)
        state[box] = pixels
        new = replace(
            then,
            number=now.number + 1,
            edited=bool((state >= TOUCHED).any()),
            undoable=undoable,
            redoable=redoable,
        )
        self._set(state, new, now)
        return new, box

    def require(self, expected: int | None) -> Revision:
        """The revision now; raises ChangedError if it is another one than `expected`, unless None."""
        now = self.revision()
        if expected is not None and expected != now.number:
            raise ChangedError(
                f"`revision` must be that of the labels now, {now.number}, got {expected}: somebody else "
                "has changed them, so load them again"
            )
        return now

    def _state_path(self, revision: Revision) -> Path:
        return self.folder / f"state_{revision.number}.npy"

    def _keep(
        self, kind: str, place: int, pixels: NDArray[np.uint32], box: Box, then: Revision
    ) -> None:
        ensure_folder(self.folder / kind)
        values = {
            "pixels": pixels,
            "corner": np.array((box[0].start, box[1].start)),
            "revision": np.array(json.dumps(then.to_mapping())),
        }
        # as savez_compressed, whose compression takes several times as long
        with (
            atomic_path(self.folder / kind / f"{place}.npz") as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            for name, array in values.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)

    def _replaces_all(self, place: int) -> bool:
        with np.load(self.folder / "undo" / f"{place}.npz") as entry:
            then = Revision.of(json.loads(str(entry["revision"])))
        now = self.revision()
        return (then.thresholds, then.min_score) != (now.thresholds, now.min_score)

    def _set(self, state: NDArray[np.uint32], new: Revision, old: Revision) -> None:
        write_array(self._state_path(new), state)
        write_text_atomically(self.folder / "current.json", json.dumps(new.to_mapping()))
        self._state_path(old).unlink(missing_ok=True)
        for folder in (self.folder / "files").glob("*"):
            if folder.name != str(old.number):  # whose files may be on their way to somebody
                shutil.rmtree(folder, ignore_errors=True)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write a numpy file, whole or not at all; OSError if the disk refuses."""
    with atomic_path(path) as temporary:
        np.save(temporary, array, allow_pickle=False)
