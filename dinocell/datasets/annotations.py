"""Data sets whose cells are outlines or run lengths in JSON: COCO, LIVECell, GeoJSON."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dinocell.datasets.folders import Images, beside_files, files_below
from dinocell.datasets.sample import (
    Content,
    Sample,
    Unlabelled,
    name_below,
    split_of,
    split_of_path,
)
from dinocell.errors import DataSetError
from dinocell.io import read_image
from dinocell.io.annotations import Annotation, annotation_masks, read_coco
from dinocell.io.polygons import paint_with_notes
from dinocell.pairs import composed

_SHOWN = 5


def coco(
    source: Path, notes: list[str], *, stratified: bool = False
) -> Iterator[Sample | Unlabelled]:
    """Images and annotations of COCO files; the name of a file or its folder says the split.

    Annotations of one file at a time are read; their polygons stay in memory as 32-bit numbers.
    An image that no file of a folder lists has no labels; one that is listed without annotations has no
    cells.  With `stratified`, the first word of an image's name is its stratum.
    """
    files = [source] if source.is_file() else files_below(source, (".json",))
    home = Path(os.path.normpath(source.parent if source.is_file() else source))
    by_name: dict[str, list[Path]] = defaultdict(list)
    pictures = Images(home)
    for path in pictures.paths:
        by_name[composed(path.name)].append(path)
    whole = [path for path in files if path.stem.startswith("livecell_coco_")] or files
    found: dict[Path, Sample] = {}
    for path in whole:
        images, annotations = read_coco(path, notes)
        unnamed = sum(image.get("file_name") in (None, "") for image in images.values())
        if unnamed:
            raise DataSetError(
                f"Every image of '{path}' must state its file in `file_name`, {unnamed} of {len(images)} have no "
                "file name: enter the names, or export the annotations again"
            )
        places = {key: _place(image, path, home, by_name) for key, image in images.items()}
        absent = [str(images[key]["file_name"]) for key, place in places.items() if not place]
        if absent:
            raise DataSetError(
                f"Every image of '{path}' must be below '{home}', {len(absent)} of {len(images)} are "
                f"absent ({', '.join(absent[:_SHOWN])}): download them, or remove them from the file"
            )
        for key, image_path in places.items():
            assert image_path is not None
            if image_path in found:
                raise DataSetError(
                    f"An image must be listed once, '{image_path}' is listed several times in "
                    f"'{source}': name one of the JSON files as `source`, or correct its list"
                )
            found[image_path] = Sample(
                image_path.stem,
                image_path,
                partial(_read_annotated, image_path, images[key], annotations.get(key, [])),
                split_of(path.stem) or split_of_path(path, home) or split_of_path(image_path, home),
                image_path.stem.split("_")[0] if stratified else "",
            )
    names = Counter(sample.name for sample in found.values())
    for path, sample in found.items():
        is_unique = names[sample.name] == 1
        yield sample if is_unique else replace(sample, name=name_below(path, home, path.stem))
    if source.is_dir():
        yield from pictures.without_labels(found)


livecell = partial(coco, stratified=True)


def _place(
    image: dict[str, Any], path: Path, home: Path, by_name: dict[str, list[Path]]
) -> Path | None:
    """The file of an image of a list, which may state a path of Windows, an address, or other folders."""
    stated = str(image["file_name"])
    names = [stated, stated.replace("\\", "/")]
    names += [unquote(names[1]), unquote(urlsplit(names[1]).path)]
    top = Path(os.path.abspath(home))
    for folder in (path.parent, home):
        for name in names:
            place = Path(os.path.abspath(folder / name))
            if place.is_relative_to(top) and place.is_file():
                return home / place.relative_to(top)
    for name in names:
        found = by_name.get(composed(Path(name).name), [])
        if len(found) > 1:
            end = f"/{composed(name).lstrip('/')}"
            found = [one for one in found if composed(f"/{one.as_posix()}").endswith(end)]
        if len(found) == 1:
            return found[0]
    return None


def _read_annotated(path: Path, entry: dict[str, Any], annotations: list[Annotation]) -> Content:
    image = read_image(path)
    shape = (image.pixels.shape[0], image.pixels.shape[1])
    listed = tuple(
        entry.get(side, size) for side, size in zip(("height", "width"), shape, strict=True)
    )
    if listed != shape:
        raise DataSetError(
            f"An image must have the size that its list states, {listed[0]} × {listed[1]} px, got "
            f"{shape[0]} × {shape[1]} in '{path}': do the images belong to these annotations?"
        )
    cells = annotation_masks(annotations, shape, path)
    notes = [*image.notes]
    labels = paint_with_notes(cells, shape, notes)
    return Content(image.pixels, labels, image.pixel_size_um, image.channel_names, tuple(notes))


geojson = partial(beside_files, suffix=".geojson", endings=("_outlines",))
