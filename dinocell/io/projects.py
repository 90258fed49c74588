"""Labels in the files of other programs: `_seg.npy` of Cellpose, ROI zips of ImageJ and Fiji."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import DataSetError, DINOCellError, ImageFileError, UsageError
from dinocell.files import writing
from dinocell.io.optional import library
from dinocell.io.polygons import fill_rings, paint_with_notes
from dinocell.labels import as_labels, cell_borders

_LINES = ("LINE", "POLYLINE", "FREELINE", "ANGLE", "POINT", "NOROI")
# What numpy's arrays, types and numbers are made of in a pickle.
_NUMPY_NAMES = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}


def read_seg_npy(path: Path) -> NDArray[Any]:
    """The masks (H, W) of a `_seg.npy` file; everything else in it is ignored and never run.

    Raises ImageFileError (the file holds no masks, or is damaged).
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            read(file)
            content = _ArraysOnly(file).load()
        content = content.item() if isinstance(content, np.ndarray) else content
        masks = content["masks"]
    except Exception as error:  # damaged pickles raise anything
        raise ImageFileError(
            f"'{path}' must be a `_seg.npy` file of Cellpose with masks, it holds none or is cut short "
            f"({type(error).__name__}): save it again in Cellpose"
        ) from error
    if not isinstance(masks, np.ndarray) or masks.ndim != 2:
        raise ImageFileError(
            f"The masks of '{path}' must be one image (H, W), got "
            f"{getattr(masks, 'shape', type(masks).__name__)}: save one plane of a stack"
        )
    return masks


def write_seg_npy(
    path: str | os.PathLike[str],
    labels: NDArray[Any],
    *,
    image: NDArray[Any] | None = None,
    file_name: str = "",
) -> None:
    """Write labels as a project of Cellpose, which its window opens and its training reads.

    Parameters
    ----------
    path : file to write, by custom ``NAME_seg.npy`` beside the image NAME
    labels : (H, W) integer ndarray; stored as uint16 when no label is above 65,535, else uint32
    image : (H, W) or (H, W, C) ndarray, optional: kept in the file, which then opens without the image
    file_name : name of the image's file; Cellpose looks for it in the folder of the project

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`); DINOCellError (the file cannot be
    written).

    Notes
    -----
    No label is lost where numbers have gaps; Cellpose closes these when it opens the file.  ``flows`` is
    empty: Cellpose computes it again when thresholds are changed there.
    """
    labels = as_labels(labels)
    num_cells = int(labels.max(initial=0))
    masks = labels.astype(np.uint16) if num_cells <= np.iinfo(np.uint16).max else labels
    content: dict[str, Any] = {
        "outlines": masks * cell_borders(masks),
        "masks": masks,
        "chan_choose": [0, 0],
        "ismanual": np.zeros(len(np.unique(masks[masks > 0])), bool),
        "filename": file_name,
        "flows": [],
        "diameter": np.nan,
    }
    if image is not None:
        content["img"] = np.ascontiguousarray(image)
    with writing(path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(content, dtype=object), allow_pickle=True)


class _Ignored:
    """Stands for every object of a pickle that is no array."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _ArraysOnly(pickle.Unpickler):
    """Makes arrays and plain values; other classes and functions are replaced by `_Ignored`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and name in _NUMPY_NAMES:
            return super().find_class(module, name)
        return _Ignored


def read_roi_labels(
    path: Path, shape: tuple[int, int] | None, notes: list[str]
) -> NDArray[np.uint32]:
    """Fill the ROIs of a zip in an image of (H, W) = `shape`.

    A ROI whose name is a whole number is the cell of that number, as far as no other ROI has it.

    Raises MissingExtraError (without roifile); UsageError (`shape` is None); ImageFileError (no zip of
    ROIs, a line or a point among them, or ROIs of several slices); DataSetError (one outside the image).
    """
    if shape is None:
        raise UsageError(
            f"`shape` must be given for a zip of ROIs, which does not say how large its image is, got "
            f"'{path}' alone: write the labels as TIFF in ImageJ, or give the image"
        )
    roifile = library("roifile", "ImageJ ROIs")
    masks, planes = [], []
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()  # two entries may have one name
            entries = [entry for entry in listed if entry.filename.lower().endswith(".roi")]
            for entry in entries:
                name, roi = entry.filename, roifile.ImagejRoi.frombytes(archive.read(entry))
                planes.append((roi.position, roi.z_position, roi.t_position))
                if roi.roitype.name in _LINES:
                    raise ImageFileError(
                        f"ROIs of cells must be areas, '{name}' of '{path}' is of type "
                        f"{roi.roitype.name.lower()}: delete it in the ROI manager"
                    )
                rings = [np.asarray(ring)[:, ::-1] for ring in roi.coordinates(multi=True)]
                corners = np.concatenate(rings)
                if (corners < -1).any() or (corners > np.array(shape) + 1).any():
                    raise DataSetError(
                        f"ROIs must lie in the image of {shape[0]} × {shape[1]} px, '{name}' of "
                        f"'{path}' reaches from {corners.min(axis=0).tolist()} to "
                        f"{corners.max(axis=0).tolist()} (row, column): do they belong to this image?"
                    )
                masks.append(fill_rings(rings, shape))
    except DINOCellError:
        raise
    except Exception as error:  # a damaged zip or ROI raises anything
        raise ImageFileError(
            f"'{path}' must be a zip of ImageJ ROIs, it is damaged or cut short ({error}): save it "
            "again in the ROI manager"
        ) from error
    if listed and not entries:  # without any file it is an image without cells
        raise ImageFileError(
            f"'{path}' must be a zip of ImageJ ROIs, it holds no file that ends in .roi: give the zip "
            "that the ROI manager writes"
        )
    for slices in map(set, zip(*planes, strict=True)):
        if len(known := sorted(slices - {0})) > 1:  # 0 is every slice
            raise ImageFileError(
                f"ROIs must lie on one slice, those of '{path}' lie on {', '.join(map(str, known[:5]))}: save "
                "those of one slice, or remove their positions in the ROI manager"
            )
    stems = [Path(entry.filename).stem for entry in entries]
    numbers = [int(stem) if stem.isdecimal() else None for stem in stems]
    return paint_with_notes(masks, shape, notes, numbers)
