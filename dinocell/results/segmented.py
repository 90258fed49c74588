"""The cells of one image with all that is known of them: measured, summarised and written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import UsageError
from dinocell.files import as_utf8, ensure_folder, saying_what_failed
from dinocell.io import refuse_long_names
from dinocell.results.compartments import with_compartments
from dinocell.results.formats import EXPORT_FORMATS, Cells
from dinocell.results.measure import measure_labels, summarize
from dinocell.results.pictures import overlay_panel, write_png
from dinocell.results.table import CellTable


@dataclass(frozen=True)
class Segmentation:
    """Cells of one image.

    Attributes
    ----------
    labels : (H, W) uint32 ndarray
        0 background, cells 1..n.
    distance_map : (H, W) float32 ndarray in [0, 1]
    image : (H, W) ndarray
        The gray plane the network saw, before normalisation; of several channels the mean after it.
    pixel_size_um : float or None
        From the file, or as given.
    name : str
        Stem of the file, or "image".
    warnings : tuple of str
        What a careful user should know (constant image, ...).
    channels : (H, W, C) ndarray or None
        Where the plane is the mean of several channels: these, as they were read.
    channel_names : tuple of str
        One name per channel, its position where the file has no names.
    scores : (n,) float64 ndarray in [0, 1] or None
        How well the distance map supports each cell: see `dinocell.results.confidence.cell_scores`.
    unfamiliar : float or None
        Distance from the model's training images as a share of the largest that is usual for images of
        their kind; above 1 a warning says so.  None where the model does not know its training images.
    kind : str
        Name of the training data that the image resembles, whose thresholds were used; empty where it
        resembles none.
    file_name : str
        Of the image, without folders; empty for an array.
    nuclei : (H, W) uint32 ndarray or None
        The nucleus of each cell, with its number, where cells were grown from nuclei.
    rescale : float
        How many times the image was enlarged for the network; all results are in pixels of the file.
    """

    labels: NDArray[np.uint32]
    distance_map: NDArray[np.float32]
    image: NDArray
    pixel_size_um: float | None = None
    name: str = "image"
    warnings: tuple[str, ...] = field(default=())
    channels: NDArray | None = None
    channel_names: tuple[str, ...] = ()
    scores: NDArray[np.float64] | None = None
    unfamiliar: float | None = None
    kind: str = ""
    file_name: str = ""
    rescale: float = 1.0
    nuclei: NDArray[np.uint32] | None = None

    @property
    def num_cells(self) -> int:
        """How many cells were found."""
        return int(self.labels.max(initial=0))

    def measure(self) -> CellTable:
        """One row per cell; scikit-image's names, µm columns where the pixel size is known.

        Intensities are those of the file; with several channels each has columns of its own, such as
        `intensity_mean_DNA`.
        """
        one = self.channels is None
        table = measure_labels(
            self.labels,
            self.image if one else self.channels,
            pixel_size_um=self.pixel_size_um,
            channel_names=None if one else self.channel_names,
        )
        if self.nuclei is not None:
            pixels = self.image if self.channels is None else self.channels
            names = None if one else self.channel_names
            table = with_compartments(table, self.labels, self.nuclei, pixels, names)
        if self.scores is None:
            return table
        return replace(table, data={**table.data, "score": self.scores})

    def summary(self) -> dict[str, Any]:
        """Number of cells, confluency, mean area of this image, and how the network saw it."""
        return summarize(self.labels, self.measure()) | self.seen()

    def seen(self) -> dict[str, float | str]:
        """The columns `rescale`, `unfamiliar` and `kind` of the summary; the last two where they are known."""
        scale: dict[str, float | str] = {"rescale": round(self.rescale, 4)}
        if self.unfamiliar is None:
            return scale
        return scale | {"unfamiliar": round(self.unfamiliar, 3), "kind": self.kind}

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        formats: str | Sequence[str] = ("tif",),
        table: CellTable | None = None,
        overlay: bool = True,
    ) -> dict[str, Path]:
        """Write everything about this image into `folder`; the label image comes last.

        `NAME_cells.csv`, `NAME_overlay.png` (unless `overlay=False`), and one label file per format
        of `dinocell.results.formats.EXPORT_FORMATS` (`tif`, `png`, `geojson`, ...).  Each file appears
        whole or not at all; a present label file therefore means the image is done.  Where cells were
        grown from nuclei, these are in `NAME_nuclei_labels.tif`.

        Returns
        -------
        dict
            Kind → path.

        Raises
        ------
        UsageError
            A format is unknown, or none is given.
        DINOCellError
            The name is too long for the file system; nothing was written.  Or the folder or a file in
            it cannot be written.
        """
        nuclei = self.nuclei is not None
        paths = output_paths(folder, self.name, formats, overlay=overlay, nuclei=nuclei)
        with saying_what_failed(folder):
            ensure_folder(paths["csv"].parent)
        refuse_long_names(paths.values())
        if table is None:
            table = self.measure()
        table.to_csv(paths["csv"])
        if overlay:
            panel = overlay_panel(
                self.image,
                self.labels,
                self.distance_map,
                title=self.name,
                pixel_size_um=self.pixel_size_um,
            )
            write_png(paths["overlay"], panel)
        cells = Cells(
            self.labels,
            table,
            self.pixel_size_um,
            as_utf8(self.name),
            as_utf8(self.file_name),
            self.image if self.channels is None else self.channels,
            self.channel_names,
            self.nuclei,
        )
        formats = list(paths)[1 + overlay + nuclei :]
        if self.nuclei is not None:
            EXPORT_FORMATS["tif"].write(paths["nuclei"], cells._replace(labels=self.nuclei))
        for name in formats:
            EXPORT_FORMATS[name].write(paths[name], cells)
        return paths


def output_paths(
    folder: str | os.PathLike[str],
    name: str,
    formats: str | Sequence[str],
    *,
    overlay: bool,
    nuclei: bool = False,
) -> dict[str, Path]:
    """Kind → file that `Segmentation.save` writes, in the order in which it does.

    `nuclei` says that cells were grown from nuclei, whose labels have a file of their own.

    Raises
    ------
    UsageError
        A format is unknown, or none is given.
    """
    formats = [formats] if isinstance(formats, str) else list(formats)
    unknown = [name for name in formats if name not in EXPORT_FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"`formats` must be some of {', '.join(EXPORT_FORMATS)}, got {', '.join(unknown) or 'none'}: "
            "choose among them"
        )
    endings = {"csv": "_cells.csv"} | ({"overlay": "_overlay.png"} if overlay else {})
    if nuclei:
        endings["nuclei"] = "_nuclei_labels.tif"
    for kind in sorted(formats, key=lambda item: item in ("tif", "png")):
        endings[kind] = EXPORT_FORMATS[kind].suffix
    return {kind: Path(folder) / f"{name}{ending}" for kind, ending in endings.items()}
