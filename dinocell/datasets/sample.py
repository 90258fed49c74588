"""One labelled image of a data set, and what every reader of a layout shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import NDArray

from dinocell.errors import DataSetError, some

SPLITS = ("train", "val", "test")

MANIFESTS = ("manifest.csv", "manifest.json")
"""Files beside the splits of a prepared data set."""

PROGRESS = ("journal.jsonl", "recipe.json")
"""Files beside the splits until all of them are written."""


@dataclass(frozen=True)
class Content:
    """Pixels and labels of a sample.

    Attributes
    ----------
    image : (H, W) or (H, W, C) ndarray, in the data type of the source
    labels : (H, W) integer ndarray
        0 is background, every other number one cell; the numbers may have gaps.
    pixel_size_um : edge of a pixel in µm, None if the source does not say
    channel_names : one per channel, None if the source has no names
    notes : what was left out of this image
    """

    image: NDArray
    labels: NDArray
    pixel_size_um: float | None = None
    channel_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A sample before its pixels are read.

    Attributes
    ----------
    name : becomes the name of its files; differs from all others of the data set
    source_file : the file of its image, or of the archive that holds it
    read : reads image and labels
    split : "train", "val" or "test" if the source says so, else None
    stratum : cell type, organ or the like; each gets its share of every split
    """

    name: str
    source_file: Path
    read: Callable[[], Content]
    split: str | None = None
    stratum: str = ""


@dataclass(frozen=True)
class Unlabelled:
    """An image of the source that has no labels: it is left out, and the manifest lists it."""

    source_file: Path


def split_of(text: str) -> str | None:
    """The split that a folder or file is named after: `Training`, `livecell_coco_val`; else None.

    A whole word of the name must say it: `testis` and `valve` are tissues, and `dev 2` is no `device`.
    `train_val` is no single split.
    """
    words = [word for word in re.split(r"[\s_.-]+", text.lower()) if word]
    found = {match.lastgroup for match in map(_SPLIT_WORD.fullmatch, words) if match}
    return found.pop() if len(found) == 1 else None


_SPLIT_WORD = re.compile(
    r"(?:stage\d+)?(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:ing)?))"
    r"(?:set|data|images)?\d*"
)


def split_of_path(path: Path, source: Path) -> str | None:
    """The split that the innermost folder between `source` and a file is named after."""
    folders = path.relative_to(source).parts[:-1]
    return next(filter(None, map(split_of, reversed(folders))), None)


def name_below(path: Path, source: Path, stem: str) -> str:
    """`stem` behind the names of the folders between `source` and the file, but for those of splits."""
    folders = path.relative_to(source).parts[:-1]
    kept = [part for part in folders if split_of(part) is None and part.lower() not in _PLAIN]
    return "_".join([*(part.replace(" ", "_") for part in kept), stem])


_PLAIN = ("images", "image", "img", "masks", "labels", "data")


def labelled(
    found: Iterable[Sample | Unlabelled], source: Path, layout: str
) -> tuple[list[Sample], list[Path]]:
    """The samples of a source, and its images without labels; `layout` says what a reader looks for.

    Raises DataSetError (nothing is found, or no image has labels).
    """
    samples, alone = [], []
    for one in found:
        if isinstance(one, Sample):
            samples.append(one)
        else:
            alone.append(one.source_file)
    if alone and not samples:
        raise DataSetError(
            f"The images of '{source}' must have labels, none of the {len(alone)} has "
            f"({some([path.name for path in alone])}): they must lie as {layout}"
        )
    if not samples:
        raise DataSetError(
            f"`source` must hold {layout}, '{source}' holds none: check the folder and the name of the "
            "data set"
        )
    return samples, alone
