"""Images that a job reads where they are, in places that whoever started the service has named.

A path is judged by where it really leads, so that neither `..` nor a symbolic link leaves these places.
The answer for a path outside is the same whether it exists or not, and nothing is ever listed.  The worker
judges the path again right before it reads, because a link may have changed while the job waited.
"""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from dinocell.errors import DINOCellError, UsageError
from dinocell.io.s3 import S3Path, place_of
from dinocell.pairs import is_zarr
from dinocell.service.queue import Job


class ForbiddenError(DINOCellError):
    """A path leads out of the places that may be read."""


def is_web(text: str) -> bool:
    """Whether a place is an address on the web, see `dinocell.service.web`."""
    return text.lower().startswith(("http://", "https://"))


def places_to_read(given: Iterable[str]) -> tuple[Path, ...]:
    """The folders with their links followed, and the addresses on S3; those on the web are left out.

    Raises UsageError (one is no folder, or an address without a bucket).
    """
    places: list[Path] = []
    for text in given:
        if is_web(text):
            continue
        place = place_of(text)
        if not isinstance(place, S3Path):
            place = Path(os.path.realpath(place))
            if not place.is_dir():
                raise UsageError(f"`read_from` must be a folder that exists, got {text}: check it")
        places.append(place)
    return tuple(places)


def readable(text: str, places: Iterable[Path]) -> Path:
    """The file or OME-Zarr folder that a path leads to, or the address on S3, which is not asked yet.

    Raises ForbiddenError (it is in none of `places`, of `places_to_read`); UsageError (the path is
    relative; there is no such image, or it is a device or pipe, or an OME-Zarr folder with links in it).
    """
    path = place_of(text)
    is_remote = isinstance(path, S3Path)
    if not is_remote and (not path.is_absolute() or "\0" in text):
        raise UsageError(f"`path` must be absolute, got {text!r}: begin it with /")
    real = path if is_remote else Path(os.path.realpath(path))
    if ".." in real.parts or not any(real.is_relative_to(place) for place in places):
        raise ForbiddenError(
            "The service may not read there: choose a path in a folder that it was started with"
        )
    if not is_remote and not _is_image(real):
        raise UsageError(
            "`path` must be a file, or a folder in OME-Zarr format without links, and there is none: check it"
        )
    return real


def image_of_job(folder: Path, job: Job, places: Iterable[Path]) -> Path:
    """The upload in the folder of a job, or what its path leads to; raises as `readable`."""
    return folder / job.file if job.is_upload else readable(job.file, places)


def _is_image(path: Path) -> bool:
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return True
    except OSError:
        return False
    if not is_zarr(path):
        return False
    return not any(
        os.path.islink(os.path.join(folder, name))
        for folder, folders, files in os.walk(path)
        for name in (*folders, *files)
    )
