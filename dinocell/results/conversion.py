"""Label files from one format to another."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError, ImageFileError, UsageError
from dinocell.files import as_utf8
from dinocell.io import describe_image, read_label_file
from dinocell.io.pyramids import add_labels_to_ome_zarr
from dinocell.results.formats import EXPORT_FORMATS, Cells, require_packages

LABEL_FORMATS = tuple(name for name, one in EXPORT_FORMATS.items() if one.holds_labels)
"""Formats of `EXPORT_FORMATS` from which labels can be read back."""

# Ends of names, the longer ones first; a name without one of them is a folder of the challenge.
_ENDINGS = {
    "_seg.npy": "cellpose",
    ".ome.tif": "ome-tiff",
    ".ome.tiff": "ome-tiff",
    ".tif": "tif",
    ".tiff": "tif",
    ".png": "png",
    ".zarr": "ome-zarr",
    ".geojson": "geojson",
    ".json": "coco",
    ".zip": "roi",
}


class Conversion(NamedTuple):
    """What `convert_labels` has written: where, in which format, how many cells, and notes."""

    path: Path
    format: str
    num_cells: int
    notes: tuple[str, ...] = ()


def convert_labels(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    image: str | os.PathLike[str] | None = None,
    page: int | None = None,
    add: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """Read labels of any format that `dinocell.io.read_label_file` knows and write them in another one.

    The numbers of the cells are kept.  Label images, OME-TIFF, OME-Zarr, COCO, `_seg.npy` and folders of the
    Cell Tracking Challenge give the same labels back; outlines that this program wrote do, too.

    Parameters
    ----------
    source : label file, or folder of OME-Zarr or of the challenge
    target : file or folder to write
    format : one of `LABEL_FORMATS`; by default the name of `target` says it
    image : the image that the labels belong to.  Its size is needed for ROIs and GeoJSON; its pixel size and
        name are written where the format holds them.
    page : which plane of a stack of labels, or frame of a folder of the challenge, counted from 0
    add : `target` is an OME-Zarr image that exists: the labels are added to it
    overwrite : replace `target`, or with `add` the labels that it has

    Raises UsageError (the format is unknown, `target` exists, `image` is needed, or the sizes differ);
    ImageFileError and its kin (`source` cannot be read, or the format cannot hold the labels);
    MissingExtraError.  Nothing is written then, and what exists stays as it was.
    """
    source, target = Path(source), Path(target)
    kind = format_of(target) if format is None else format
    if kind not in LABEL_FORMATS:
        raise UsageError(
            f"`format` must be one of {', '.join(LABEL_FORMATS)}, got {kind}: choose one of them"
        )
    if add and kind != "ome-zarr":
        raise UsageError(
            f"`add` is for OME-Zarr, got '{target}' in the format {kind}: leave it out"
        )
    if os.path.lexists(target) and not (overwrite or add):
        raise UsageError(
            f"'{target}' exists: choose another name, or set `overwrite` to replace it"
        )
    if os.path.exists(target) and os.path.exists(source) and os.path.samefile(source, target):
        raise UsageError(f"`target` must be another file than the source, got '{target}' for both")
    if not add and target.resolve() in source.resolve().parents:
        raise UsageError(
            f"`target` must not hold the source, got '{target}' for '{source}': choose another folder"
        )
    if image is None and source.suffix.lower() in (".zip", ".geojson"):
        raise UsageError(
            f"`image` must be given for ROIs and GeoJSON, which do not say how large their image is, got "
            f"'{source}' alone: name the image that the outlines belong to"
        )
    require_packages([kind])
    shape, size_um = _about_image(image)
    read = read_label_file(source, page=page, shape=shape)
    labels: NDArray[Any] = read.pixels
    if shape is not None and labels.shape != shape:
        raise DataSetError(
            f"The labels must have the size of the image, got {labels.shape[0]} × {labels.shape[1]} px in "
            f"'{source}' for {shape[0]} × {shape[1]} px: name the image that they belong to"
        )
    size_um = size_um if size_um is not None else read.pixel_size_um
    if add:
        add_labels_to_ome_zarr(target, labels, pixel_size_um=size_um, overwrite=overwrite)
    else:
        named = source if image is None else Path(image)
        file_name = "" if image is None else as_utf8(named.name)
        cells = Cells(labels, None, size_um, as_utf8(named.stem), file_name)
        EXPORT_FORMATS[kind].write(target, cells)
    num_cells = int(np.count_nonzero(np.unique(labels)))
    return Conversion(target, kind, num_cells, read.notes)


def format_of(target: Path) -> str:
    """The format of `LABEL_FORMATS` that a name says; UsageError if it is none."""
    name = target.name.lower()
    found = next((kind for end, kind in _ENDINGS.items() if name.endswith(end)), None)
    if found is None and target.suffix:
        raise UsageError(
            f"The name of the result must end in {', '.join(_ENDINGS)}, or in none for a folder of the Cell "
            f"Tracking Challenge, got '{target}': change the ending, or set `format`"
        )
    return found or "ctc"


def _about_image(
    image: str | os.PathLike[str] | None,
) -> tuple[tuple[int, int] | None, float | None]:
    """Size (H, W) and pixel size of an image; all its scenes have the same size."""
    if image is None:
        return None, None
    series = describe_image(image).series
    shapes = {one.upright_shape for one in series}
    if len(shapes) != 1:
        raise ImageFileError(
            f"The scenes of '{image}' must have one size, got {len(shapes)}: export the one that the labels "
            "belong to"
        )
    return shapes.pop(), series[0].edge_um
