"""What the journal keeps of each input, so that `resume` repeats an image whose file has changed.

The mark of a file is its size, its time of change and a hash of its bytes; that of a folder (Zarr) holds
the sum of the sizes, the latest time and the hash of all of its files.  As in make, rsync and git,
equal size and time count as unchanged, which costs one question to the file system for each image.
Only if the times differ is the file read and its hash decides: a copied or touched plate is not
segmented again.  The hash is of all bytes, because a changed plane of a stack may lie anywhere; it costs
about a second per gigabyte, beside minutes of segmentation.  On S3 the tags of the objects take the place
of their bytes.
"""

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from dinocell.batch.options import IMAGE_OPTIONS, SegmentOptions
from dinocell.errors import ConfigError
from dinocell.io.channel_files import ChannelFiles
from dinocell.io.s3 import S3Path, place_of


def mark_input(path: Path | ChannelFiles, options: SegmentOptions) -> dict[str, Any]:
    """Size, time and hash of a file, and the options that say how it is read; JSON values.

    Of channels in files of their own, also these.

    Made before the file is read: a file that is replaced meanwhile then counts as changed.
    """
    mark = _image_options(options)
    paths = path.paths if isinstance(path, ChannelFiles) else [path]
    if isinstance(path, ChannelFiles):
        mark["files"] = {name: str(one.absolute()) for name, one in path.files}
    # reading refuses everything else, and a pipe would wait
    if all(one.is_file() or one.is_dir() for one in paths):
        size, time_ns = size_and_time(path)
        with suppress(PermissionError):  # reading says so in a sentence
            mark |= {"bytes": size, "mtime_ns": time_ns, "blake2b": _hash(path, size, time_ns)}
    return mark


def image_of(row: dict[str, Any]) -> Path | ChannelFiles:
    """What a row of the journal was made from."""
    files = row.get("input", {}).get("files")
    if files is None:
        return place_of(row["source"])
    return ChannelFiles.of({name: place_of(path) for name, path in files.items()})


def is_unchanged(path: Path | ChannelFiles, row: dict[str, Any]) -> bool:
    """Whether a file still has the content that a row of the journal was made from.

    A file that is gone cannot be read again, so its results count as those of an unchanged file.
    """
    mark = row.get("input", {})
    try:
        size, time_ns = size_and_time(path)
        if size != mark.get("bytes"):
            return False
        return time_ns == mark.get("mtime_ns") or _hash(path, size, time_ns) == mark.get("blake2b")
    except OSError:
        return True


def refuse_other_options(row: dict[str, Any], options: SegmentOptions) -> None:
    """Refuse to keep a result that other options gave.

    Raises ConfigError (an option that says how an image is read differs).
    """
    mark = row.get("input", {})
    for name, value in _image_options(options).items():
        if name in mark and mark[name] != value:
            raise ConfigError(
                f"`resume` must keep the options of an image, got {name} {value} for '{row['name']}', "
                f"which was segmented with {mark[name]}: undo that, or set `overwrite`"
            )


def _image_options(options: SegmentOptions) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in IMAGE_OPTIONS}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _objects(path: Any) -> list[dict[str, Any]] | None:
    """What S3 knows of a file or of all files of a folder; None for a path of this machine."""
    if not isinstance(path, S3Path):
        return None
    return [path.head()] if path.is_file() else path.objects()


def _files(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def size_and_time(path: Path | ChannelFiles) -> tuple[int, int]:
    """Bytes of a file, of all files of a folder or of all channels, and the time of the last change in ns."""
    if isinstance(path, ChannelFiles):
        sizes, times = zip(*map(size_and_time, path.paths), strict=True)
        return sum(sizes), max(times)
    if (objects := _objects(path)) is not None:
        last = max((one["last_modified"].timestamp() for one in objects), default=0.0)
        return sum(one["size"] for one in objects), int(last * 1e9)
    states = [one.stat() for one in _files(path)]
    return sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)


@lru_cache(maxsize=8)  # the planes of a file come one after the other
def _hash(path: Path | ChannelFiles, size: int, time_ns: int) -> str:
    if isinstance(path, ChannelFiles):
        every = " ".join(_hash(one, size, time_ns) for one in path.paths)
        return hashlib.blake2b(every.encode(), digest_size=16).hexdigest()
    if (objects := _objects(path)) is not None:
        tags = "\n".join(f"{one['path']}: {one['e_tag']}" for one in objects)
        return hashlib.blake2b(tags.encode(), digest_size=16).hexdigest()
    hashes = []
    for one in _files(path):
        with one.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        hashes.append(digest.hexdigest())
    if not path.is_dir():
        return hashes[0]
    names = [
        f"{one.relative_to(path)}: {hash}" for one, hash in zip(_files(path), hashes, strict=True)
    ]
    return hashlib.blake2b("\n".join(names).encode(), digest_size=16).hexdigest()
