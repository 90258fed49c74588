"""The formats of results: one registry for the command line, Python, and the service.

Every file or folder appears under its name when it is complete, and the same cells give the same bytes.
An image without cells gives a valid file without cells.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from numpy.typing import NDArray

from dinocell.errors import MissingExtraError
from dinocell.io import write_labels
from dinocell.io.challenge import write_challenge_folder
from dinocell.io.optional import library
from dinocell.io.projects import write_seg_npy
from dinocell.io.pyramids import write_ome_tiff_labels, write_ome_zarr
from dinocell.results.exports import write_coco_rle, write_geojson
from dinocell.results.imagej_rois import write_imagej_rois
from dinocell.results.measure import measure_labels
from dinocell.results.table import CellTable
from dinocell.results.table_files import write_anndata, write_parquet


class Cells(NamedTuple):
    """The cells of an image, and what else is known of it.

    Attributes
    ----------
    labels : (H, W) integer ndarray, 0 is background
    table : what was measured of the same labels; formats that hold measurements leave them out without it
    pixel_size_um : edge of a pixel in µm
    name : of the image
    file_name : of the image, without folders
    image : (H, W) or (H, W, C) ndarray
    channel_names : one name per channel of the image
    nuclei : (H, W) integer ndarray, the nucleus of each cell, with its number
    """

    labels: NDArray[Any]
    table: CellTable | None = None
    pixel_size_um: float | None = None
    name: str = ""
    file_name: str = ""
    image: NDArray[Any] | None = None
    channel_names: tuple[str, ...] = ()
    nuclei: NDArray[Any] | None = None

    def measured(self) -> CellTable:
        """The table; measured now if there is none."""
        if self.table is not None:
            return self.table
        return measure_labels(
            self.labels,
            self.image,
            pixel_size_um=self.pixel_size_um,
            channel_names=self.channel_names or None,
        )


class Exporter(NamedTuple):
    """One format of `EXPORT_FORMATS`.

    Attributes
    ----------
    suffix : follows the image's name in the file name: ``_outlines.geojson``
    write : writes the cells to a path
    media_type : of the file, for HTTP; empty for a folder
    needs : modules of an extra, what needs them, and the extra; without them `write` fails
    holds_labels : whether the label of each pixel can be read back
    """

    suffix: str
    write: Callable[[Path, Cells], None]
    media_type: str
    needs: tuple[str, str, str] | None = None
    holds_labels: bool = True


def _write_label_image(path: Path, cells: Cells) -> None:
    write_labels(path, cells.labels, pixel_size_um=cells.pixel_size_um)


def _write_ome_tiff(path: Path, cells: Cells) -> None:
    write_ome_tiff_labels(path, cells.labels, pixel_size_um=cells.pixel_size_um, name=cells.name)


def _write_ome_zarr(path: Path, cells: Cells) -> None:
    write_ome_zarr(
        path,
        cells.labels,
        image=cells.image,
        pixel_size_um=cells.pixel_size_um,
        channel_names=cells.channel_names,
        name=cells.name,
        nuclei=cells.nuclei,
    )


def _write_seg_npy(path: Path, cells: Cells) -> None:
    write_seg_npy(path, cells.labels, image=cells.image, file_name=cells.file_name)


EXPORT_FORMATS: Mapping[str, Exporter] = MappingProxyType(
    {
        # 16 bit, or 32 above 65,535 cells
        "tif": Exporter("_labels.tif", _write_label_image, "image/tiff"),
        # 16 bit, at most 65,535 cells
        "png": Exporter("_labels.png", _write_label_image, "image/png"),
        "ome-tiff": Exporter("_labels.ome.tif", _write_ome_tiff, "image/tiff"),
        "ome-zarr": Exporter(
            "_labels.zarr", _write_ome_zarr, "", ("zarr", "OME-Zarr images", "formats")
        ),
        "geojson": Exporter(
            "_outlines.geojson",
            lambda path, cells: write_geojson(path, cells.labels, cells.table, cells.nuclei),
            "application/geo+json",
        ),
        "roi": Exporter(
            "_RoiSet.zip",
            lambda path, cells: write_imagej_rois(path, cells.labels),
            "application/zip",
        ),
        "coco": Exporter(
            "_coco.json",
            lambda path, cells: write_coco_rle(path, cells.labels, file_name=cells.file_name),
            "application/json",
        ),
        "cellpose": Exporter("_seg.npy", _write_seg_npy, "application/octet-stream"),
        "ctc": Exporter("_RES", lambda path, cells: write_challenge_folder(path, cells.labels), ""),
        "parquet": Exporter(
            "_cells.parquet",
            lambda path, cells: write_parquet(path, cells.measured(), image_name=cells.name),
            "application/vnd.apache.parquet",
            ("pyarrow", "Parquet files", "tables"),
            holds_labels=False,
        ),
        "h5ad": Exporter(
            "_cells.h5ad",
            lambda path, cells: write_anndata(path, cells.measured(), image_name=cells.name),
            "application/x-hdf5",
            ("anndata", "AnnData files", "tables"),
            holds_labels=False,
        ),
    }
)
"""What `dinocell segment` writes, by name."""


def require_packages(formats: Iterable[str]) -> None:
    """Raise MissingExtraError if a format needs a package that is not installed."""
    for name in formats:
        if (needs := EXPORT_FORMATS[name].needs) is not None:
            library(*needs)


def missing_formats() -> dict[str, str]:
    """Formats that need a package which is not installed, each with the sentence that says so."""
    found = {}
    for name, one in EXPORT_FORMATS.items():
        if one.needs is not None and importlib.util.find_spec(one.needs[0]) is None:
            try:
                library(*one.needs)
            except MissingExtraError as error:
                found[name] = str(error)
    return found
