"""Cells in JSON: COCO with polygons or run lengths, and GeoJSON as QuPath writes it."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError, ImageFileError, UsageError
from dinocell.io.planes import check_size
from dinocell.io.polygons import (
    CellMask,
    expand_run_lengths,
    fill_rings,
    paint_with_notes,
    run_lengths_to_mask,
)

_AREA_TYPES = ("Polygon", "MultiPolygon")
_NOT_AS_EXPECTED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Annotation(NamedTuple):
    """One cell of a COCO file: polygons as arrays [x, y, x, y, ...], or run lengths with their size."""

    image_id: Any
    shape: Any
    is_crowd: bool
    number: Any = None


def read_coco(path: Path, notes: list[str]) -> tuple[dict[Any, Any], dict[Any, list[Annotation]]]:
    """Images of a COCO file by their id, and the annotations of each; see `_single_cells` for crowds.

    Raises ImageFileError (no COCO file, or a damaged one); DataSetError (an annotation of an unknown image).
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=_compact)
        images = {image["id"]: image for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError("Several images have the same id")
        annotations = content["annotations"]
        annotations = annotations.values() if isinstance(annotations, dict) else annotations
        grouped: dict[Any, list[Annotation]] = defaultdict(list)
        for annotation in annotations:
            if not isinstance(annotation, Annotation):
                raise TypeError("An annotation has no segmentation")
            grouped[annotation.image_id].append(annotation)
        categories = len(content.get("categories", []))
    except (OSError, *_NOT_AS_EXPECTED) as error:
        raise ImageFileError(
            f"'{path}' must be a COCO file with images and annotations ({type(error).__name__}: "
            f"{error}): check that the download is complete"
        ) from error
    unknown = [key for key in grouped if key not in images]
    if unknown:
        raise DataSetError(
            f"Every annotation of '{path}' must belong to an image of its list, got the unknown image "
            f"{unknown[0]!r}: download the file again"
        )
    grouped = _single_cells(grouped, path.name, notes)
    if categories > 1:
        notes.append(f"The {categories} categories of {path.name} are all taken as cells")
    empty = len(images) - sum(map(bool, grouped.values()))
    if empty:
        notes.append(
            f"Images of {path.name} without an annotation count as empty of cells: {empty}"
        )
    return images, grouped


def _single_cells(
    grouped: dict[Any, list[Annotation]], file_name: str, notes: list[str]
) -> dict[Any, list[Annotation]]:
    """The annotations without crowds; all of them if all are marked as crowds."""
    crowds = sum(one.is_crowd for own in grouped.values() for one in own)
    if not crowds:
        return grouped
    if crowds == sum(map(len, grouped.values())):
        notes.append(
            f"All {crowds} annotations of {file_name} are marked as crowds, as CVAT marks painted masks: they "
            "are taken as single cells"
        )
        return grouped
    notes.append(
        f"{crowds} crowd annotations of {file_name} were left out: they are no single cells (CVAT marks "
        "painted masks as crowds, too: set iscrowd to 0 where that is the case)"
    )
    return {key: [one for one in own if not one.is_crowd] for key, own in grouped.items()}


def _compact(item: dict[str, Any]) -> Any:
    """An annotation without what is not used, its polygons as arrays: a tenth of the memory."""
    if "segmentation" not in item:
        return item
    shape = item["segmentation"]
    if isinstance(shape, list):
        shape = [np.asarray(polygon, np.float32) for polygon in shape]
    return Annotation(item["image_id"], shape, bool(item.get("iscrowd", 0)), item.get("id"))


def annotation_masks(
    annotations: list[Annotation], shape: tuple[int, int], path: Path
) -> list[CellMask | None]:
    """The pixels of each annotation of an image of (H, W) = `shape`; None where it covers no pixel.

    Raises ImageFileError, which names `path` (an annotation is no polygon or run length of this size).
    """
    try:
        return [_mask(annotation.shape, shape) for annotation in annotations]
    except _NOT_AS_EXPECTED as error:
        raise ImageFileError(
            f"Each annotation must be polygons or run lengths of its image's size, got another one "
            f"for '{path.name}' ({error}): check the annotations"
        ) from error


def _mask(segmentation: Any, shape: tuple[int, int]) -> CellMask | None:
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != shape:
            raise ValueError(f"Run lengths of size {segmentation['size']}")
        counts = segmentation["counts"]
        counts = expand_run_lengths(counts) if isinstance(counts, str) else counts
        return run_lengths_to_mask(counts, shape)
    if not isinstance(segmentation, list):
        raise ValueError(f"A segmentation of type {type(segmentation).__name__}")
    if not segmentation:
        raise ValueError("A box without an outline")
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


def read_coco_labels(path: Path, max_pixels: int, notes: list[str]) -> NDArray[np.uint32]:
    """Labels (H, W) of a COCO file of one image; the id of an annotation is the cell's number.

    Raises DataSetError, ImageFileError (as `read_coco` and `annotation_masks`; or the file has several
    images, or its image more than `max_pixels`).
    """
    images, annotations = read_coco(path, notes)
    if len(images) != 1:
        raise DataSetError(
            f"'{path}' must be a COCO file of one image, got {len(images)}: prepare the images as a data "
            "set with `dinocell data prepare coco`"
        )
    ((key, image),) = images.items()
    try:
        shape = (int(image["height"]), int(image["width"]))
        if min(shape) < 1:
            raise ValueError(f"{shape[0]} × {shape[1]}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataSetError(
            f"'{path}' must state height and width of its image, it does not: export it again"
        ) from error
    check_size(path, *shape, 1, max_pixels)
    own = annotations.get(key, [])
    masks = annotation_masks(own, shape, path)
    return paint_with_notes(masks, shape, notes, [annotation.number for annotation in own])


def read_json_labels(
    path: Path, shape: tuple[int, int] | None, max_pixels: int, notes: list[str]
) -> NDArray[np.uint32]:
    """Labels of a COCO or GeoJSON file, and notes on them; `shape` is only needed for GeoJSON."""
    with open(path, "rb") as file:
        head = file.read(4096)
    is_coco = path.suffix.lower() == ".json" and b'"Feature' not in head
    if is_coco:
        return read_coco_labels(path, max_pixels, notes)
    return read_geojson_labels(path, shape, notes)


def read_geojson_labels(
    path: Path, shape: tuple[int, int] | None, notes: list[str]
) -> NDArray[np.uint32]:
    """Labels of a GeoJSON file of QuPath: one cell per area; cells are taken before annotations.

    A cell's number is its property or measurement `label`, else its name where that is a whole number; a
    cell without a number, or with one that another cell has (QuPath copies the name of a divided cell), gets
    a new one.

    Raises UsageError (`shape` is None); ImageFileError (no GeoJSON, lines or points, or areas of several
    planes); DataSetError (an area outside the image).
    """
    if shape is None:
        raise UsageError(
            f"`shape` must be given for GeoJSON, which does not say how large its image is, got '{path}' "
            "alone: give the image"
        )
    try:
        return _geojson_cells(path, shape, notes)
    except _NOT_AS_EXPECTED as error:
        raise ImageFileError(
            f"'{path}' must be GeoJSON with the outlines of cells ({type(error).__name__}: {error}): "
            "export the objects in QuPath again"
        ) from error


def _geojson_cells(path: Path, shape: tuple[int, int], notes: list[str]) -> NDArray[np.uint32]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    features = content.get("features", [content]) if isinstance(content, dict) else content
    kinds = {_kind(feature) for feature in features}
    taken = "cell" if "cell" in kinds else "annotation"  # which else are regions around the cells
    features = [feature for feature in features if _kind(feature) == taken or taken not in kinds]
    planes = sorted({_plane(feature["geometry"]) for feature in features})
    if len(planes) > 1:
        raise ValueError(
            f"Outlines must lie in one plane, got (z, t) = {' and '.join(map(str, planes[:5]))}"
        )
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
            raise DataSetError(
                f"Outlines must lie in the image of {shape[0]} × {shape[1]} px, one of '{path}' reaches from "
                f"{corners.min(axis=0).tolist()} to {corners.max(axis=0).tolist()} (row, column): do they "
                "belong to this image?"
            )
        cells.append(fill_rings(rings, shape))
    return paint_with_notes(cells, shape, notes, [_number(feature) for feature in features])


def _kind(feature: dict[str, Any]) -> str:
    kind = (feature.get("properties") or {}).get("objectType", "annotation")
    return "cell" if kind in ("cell", "detection") else kind


def _plane(geometry: dict[str, Any]) -> tuple[int, int]:
    """Places along z and in time; QuPath leaves out those of the first plane."""
    plane = geometry.get("plane") or {}
    return int(plane.get("z", 0)), int(plane.get("t", 0))


def _number(feature: dict[str, Any]) -> Any:
    properties = feature.get("properties") or {}
    measured = properties.get("measurements")
    name = str(properties.get("name"))
    found = properties.get("label", measured.get("label") if isinstance(measured, dict) else None)
    return found if found is not None else int(name) if name.isdecimal() else None
