"""Data sets whose cells are outlines or run lengths in JSON: COCO, LIVECell, GeoJSON."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocell.datasets.folders import beside_files, files_below
from dinocell.datasets.sample import Content, Sample, split_of
from dinocell.errors import DataSetError, ImageFileError
from dinocell.io import read_image
from dinocell.io.polygons import (
    CellMask,
    expand_run_lengths,
    fill_rings,
    paint_cells,
    run_lengths_to_mask,
)

_AREA_TYPES = ("Polygon", "MultiPolygon")
_SHOWN = 5
_NOT_AS_EXPECTED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class _Annotation(NamedTuple):
    """One cell of a COCO file: polygons as arrays [x, y, x, y, ...], or run lengths with their size."""

    image_id: Any
    shape: Any
    is_crowd: bool


def coco(source: Path, notes: list[str], *, stratified: bool = False) -> Iterator[Sample]:
    """Images and annotations of COCO files; a file's name says the split.

    Annotations of one file at a time are read; their polygons stay in memory as 32-bit numbers.
    With `stratified`, the first word of an image's name is its stratum.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.json"))
    home = source.parent if source.is_file() else source
    by_name: dict[str, list[Path]] = defaultdict(list)
    for path in files_below(home):
        by_name[path.name].append(path)
    whole = [path for path in files if path.stem.startswith("livecell_coco_")] or files
    seen: set[str] = set()
    for path in whole:
        images, annotations = _read_coco(path, notes)
        places = {key: _place(image, path, home, by_name) for key, image in images.items()}
        absent = [str(images[key].get("file_name")) for key, place in places.items() if not place]
        if absent:
            raise DataSetError(
                f"Every image of '{path}' must be below '{home}', {len(absent)} of {len(images)} are "
                f"absent ({', '.join(absent[:_SHOWN])}): download them, or remove them from the file"
            )
        for key, image_path in places.items():
            assert image_path is not None
            if image_path.stem in seen:
                raise DataSetError(
                    f"An image must be listed once, '{image_path.name}' is in several files or folders "
                    f"of '{home}': name one of the JSON files as `source`"
                )
            seen.add(image_path.stem)
            yield Sample(
                image_path.stem,
                image_path,
                partial(_read_annotated, image_path, images[key], annotations.get(key, [])),
                split_of(path.stem),
                image_path.stem.split("_")[0] if stratified else "",
            )


livecell = partial(coco, stratified=True)


def _place(
    image: dict[str, Any], path: Path, home: Path, by_name: dict[str, list[Path]]
) -> Path | None:
    name = str(image.get("file_name", ""))
    for folder in (path.parent, home):
        place = Path(os.path.abspath(folder / name))
        if place.is_relative_to(os.path.abspath(home)) and place.is_file():
            return folder / name
    found = by_name.get(Path(name).name, [])
    return found[0] if len(found) == 1 else None


def _read_coco(path: Path, notes: list[str]) -> tuple[dict[Any, Any], dict[Any, list[_Annotation]]]:
    """Images by their id, and the annotations of each."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=_compact)
        images = {image["id"]: image for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError("Several images have the same id")
        annotations = content["annotations"]
        annotations = annotations.values() if isinstance(annotations, dict) else annotations
        grouped: dict[Any, list[_Annotation]] = defaultdict(list)
        crowds = 0
        for annotation in annotations:
            if not isinstance(annotation, _Annotation):
                raise TypeError("An annotation has no segmentation")
            crowds += annotation.is_crowd
            if not annotation.is_crowd:
                grouped[annotation.image_id].append(annotation)
        categories = len(content.get("categories", []))
    except (OSError, *_NOT_AS_EXPECTED) as error:
        raise DataSetError(
            f"'{path}' must be a COCO file with images and annotations ({type(error).__name__}: "
            f"{error}): check that the download is complete"
        ) from error
    unknown = [key for key in grouped if key not in images]
    if unknown:
        raise DataSetError(
            f"Every annotation of '{path}' must belong to an image of its list, got the unknown image "
            f"{unknown[0]!r}: download the file again"
        )
    if crowds:
        notes.append(
            f"{crowds} crowd annotations of {path.name} were left out: they are no single cells"
        )
    if categories > 1:
        notes.append(f"The {categories} categories of {path.name} are all taken as cells")
    empty = len(images) - len(grouped)
    if empty:
        notes.append(
            f"{empty} images of {path.name} have no annotation: they count as empty of cells"
        )
    return images, grouped


def _compact(item: dict[str, Any]) -> Any:
    """An annotation without what is not used, its polygons as arrays: a tenth of the memory."""
    if "segmentation" not in item:
        return item
    shape = item["segmentation"]
    if isinstance(shape, list):
        shape = [np.asarray(polygon, np.float32) for polygon in shape]
    return _Annotation(item["image_id"], shape, bool(item.get("iscrowd", 0)))


def _read_annotated(path: Path, entry: dict[str, Any], annotations: list[_Annotation]) -> Content:
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
    cells, empty = [], 0
    for annotation in annotations:
        try:
            cell = _annotated_mask(annotation.shape, shape)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataSetError(
                f"Each annotation must be polygons or run lengths of its image's size, got another one "
                f"for '{path.name}' ({error}): check the annotations"
            ) from error
        cells.append(cell)
        empty += cell is None
    labels, overlap_px = paint_cells(cells, shape)
    notes = [*image.notes]
    if empty:
        notes.append(f"{empty} annotations cover no pixel")
    if overlap_px:
        notes.append(f"{overlap_px} px belong to several cells: the smaller cell is on top")
    return Content(image.pixels, labels, image.pixel_size_um, image.channel_names, tuple(notes))


def _annotated_mask(segmentation: Any, shape: tuple[int, int]) -> CellMask | None:
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != shape:
            raise ValueError(f"Run lengths of size {segmentation['size']}")
        counts = segmentation["counts"]
        counts = expand_run_lengths(counts) if isinstance(counts, str) else counts
        return run_lengths_to_mask(counts, shape)
    if not isinstance(segmentation, list):
        raise ValueError(f"A segmentation of type {type(segmentation).__name__}")
    rings = []
    for polygon in segmentation:
        if polygon.ndim != 1 or len(polygon) % 2 or not np.isfinite(polygon).all():
            raise ValueError("A polygon with an odd count of numbers")
        rings.append(polygon.reshape(-1, 2)[:, ::-1])
    parts = [part for ring in rings if len(ring) > 2 and (part := fill_rings([ring], shape))]
    if len(parts) < 2:
        return parts[0] if parts else None
    together = np.zeros(shape, bool)
    for top, left, mask in parts:
        together[top : top + mask.shape[0], left : left + mask.shape[1]] |= mask
    return CellMask(0, 0, together)


def geojson_labels(path: Path, shape: tuple[int, int]) -> NDArray[np.uint32]:
    """Labels of a GeoJSON file of QuPath: one cell per area; lines and points are refused."""
    try:
        return _geojson_cells(path, shape)
    except _NOT_AS_EXPECTED as error:
        raise ImageFileError(
            f"'{path}' must be GeoJSON with the outlines of cells ({type(error).__name__}: {error}): "
            "export the objects in QuPath again"
        ) from error


def _geojson_cells(path: Path, shape: tuple[int, int]) -> NDArray[np.uint32]:
    """Labels (H, W) of the areas of a GeoJSON file; cells are taken before annotations.

    Raises ValueError and its like (no GeoJSON, lines or points, an area outside the image).
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    features = content.get("features", [content]) if isinstance(content, dict) else content
    kinds = Counter(_kind(feature) for feature in features)
    if kinds["cell"] and kinds["annotation"]:  # regions around the cells
        features = [feature for feature in features if _kind(feature) == "cell"]
    cells = []
    for feature in features:
        geometry = feature["geometry"]
        if geometry["type"] not in _AREA_TYPES:
            raise ValueError(f"Outlines must be areas, got a {geometry['type']}")
        parts = geometry["coordinates"]
        parts = [parts] if geometry["type"] == "Polygon" else parts
        rings = [np.asarray(ring, np.float64)[:, 1::-1] for part in parts for ring in part]
        corners = np.concatenate(rings)
        if (corners < -1).any() or (corners > np.array(shape) + 1).any():
            raise ValueError(
                f"Outlines must lie in the image of {shape[0]} × {shape[1]} px, one reaches to "
                f"{corners.max(axis=0).tolist()}"
            )
        cells.append(fill_rings(rings, shape))
    return paint_cells(cells, shape)[0]


def _kind(feature: dict[str, Any]) -> str:
    kind = (feature.get("properties") or {}).get("objectType", "annotation")
    return "cell" if kind in ("cell", "detection") else kind


geojson = partial(beside_files, suffix=".geojson", endings=("_outlines",), read=geojson_labels)
