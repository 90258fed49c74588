"""Folders of the Cell Tracking Challenge: a label image per frame, and the tracks in a text file."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import ImageFileError, UsageError
from dinocell.files import writing_folder
from dinocell.io.write import write_labels
from dinocell.labels import as_labels
from dinocell.pairs import TRACKS_NAME

_FRAME = re.compile(r"(?:mask|man_seg|man_track)\d{3,}\.tif")


def write_challenge_folder(path: str | os.PathLike[str], labels: NDArray[Any]) -> None:
    """Write labels (H, W) as a result of one frame: ``mask000.tif`` (16 bit) and ``res_track.txt``.

    Each cell is a track of its own, from frame 0 to frame 0 without a parent (``LABEL 0 0 0``).  A folder
    of such files is replaced; any other one with contents is refused.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`); ImageFileError (a label is above 65,535,
    which the challenge's 16 bits cannot hold); DINOCellError (the folder cannot be written).
    """
    labels = as_labels(labels)
    high = int(labels.max(initial=0))
    if high > np.iinfo(np.uint16).max:
        raise ImageFileError(
            f"The Cell Tracking Challenge holds labels up to 65,535, '{path}' would need {high:,}: "
            "write tif instead"
        )
    tracks = "".join(f"{label} 0 0 0\n" for label in np.unique(labels).tolist() if label)
    with writing_folder(path, replaces=_is_challenge) as temporary:
        write_labels(temporary / "mask000.tif", labels)
        (temporary / TRACKS_NAME).write_text(tracks, encoding="utf-8", newline="")


def challenge_frame(folder: Path, number: int | None) -> Path:
    """The label image of a frame of a folder of the challenge, by its place from 0; None takes the only one.

    Raises UsageError (no such folder, no such frame, or several and none is chosen).
    """
    frames = sorted(path for path in folder.iterdir() if _FRAME.fullmatch(path.name))
    if not frames:
        raise UsageError(
            f"An image file is needed, '{folder}' is a folder without label images of the Cell Tracking "
            "Challenge: name the files in it"
        )
    if number is None and len(frames) > 1:
        raise UsageError(
            f"`page` must be given for a film, '{folder}' has {len(frames)} frames: choose one, counted "
            "from 0"
        )
    if number is not None and not 0 <= number < len(frames):
        raise UsageError(
            f"`page` must be one of the {len(frames)} frames of '{folder}', got {number}: count from 0"
        )
    return frames[number or 0]


def _is_challenge(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return TRACKS_NAME in names and all(
        name == TRACKS_NAME or _FRAME.fullmatch(name) for name in names
    )
