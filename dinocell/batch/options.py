"""The options of a batch, and what is refused before a model is loaded."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dinocell.errors import UsageError
from dinocell.io.planes import MAX_PIXELS, PlaneChoice, Selection
from dinocell.network.precision import PRECISIONS
from dinocell.pipeline import DEFAULT_MODEL
from dinocell.results.formats import EXPORT_FORMATS
from dinocell.segmentation.compartments import check_compartments
from dinocell.segmentation.rescale import Scale

# Not part of what an image's result depends on, so a resumed run may change them (the model is known
# by the hash of its weights).
FREE_OPTIONS = (
    *("model", "device", "batch_size", "tile_px", "max_pixels", "workers"),
    *("report", "resume", "overwrite"),
)

EACH = "each"
"""The word for every place along an axis."""

EACH_OPTIONS = ("scene", "time", "z")
"""Options that may be this word, as they stand in the names of results."""

IMAGE_OPTIONS = (
    *PlaneChoice.__annotations__,
    *("nuclei", "cells", "pixel_size_um", "allow_mask"),
)
"""Options that say how a file is read: images of one folder may differ in them."""

PIPELINE_OPTIONS = (
    *("batch_size", "tile_px", "precision", "tta", "percentiles", "min_score"),
    *("rescale", "diameter_px"),
    *("peak_threshold", "fill_threshold", "min_prominence", "min_area_px"),
)
"""Options of `DINOCellPipeline`."""


@dataclass(frozen=True)
class SegmentOptions:
    """The options of `dinocell segment`; None keeps the value of the model or of the image file.

    Attributes
    ----------
    model : model file or name of a bundled model
    device : `auto`, `cpu`, `cuda`, `cuda:N` or `mps`
    formats : label files to write, see `dinocell.results.formats.EXPORT_FORMATS`
    channels, page, z, time, scene : which plane of a file is segmented, see `dinocell.io.read_image`;
        several channels are averaged.  With the word `each` for `z`, `time` or `scene` every plane along
        that axis is segmented, with results of its own
    plate : how file names say well, site and channel, see `dinocell.io.plates.places_of`
    nuclei, cells : channel of the nuclei, and what their cells grow in, see `DINOCellPipeline.run`
    pixel_size_um : edge of a pixel in µm, above 0
    peak_threshold, fill_threshold, min_prominence, min_area_px : see `Thresholds`
    min_score : cells whose score (0 to 1) is lower are left out
    batch_size : windows per call of the network
    tile_px : images of more pixels than a square of this edge are kept in files; changes no result
    max_pixels : images of more pixels are refused before they are read
    precision : `auto`, `fp32` or `bf16`
    tta : predict each window in four orientations and take the mean map
    rescale, diameter_px : the scale at which the network sees an image, see `Scale`
    percentiles : intensities that become black and white, in % of the pixels
    workers : threads that finish and write results
    overlay, report : also write outlines as a picture, and one HTML page
    resume, overwrite : keep or replace results that the folder has; without either they are refused
    allow_mask : accept images that look like masks or label images
    """

    model: str = DEFAULT_MODEL
    device: str = "auto"
    formats: tuple[str, ...] = ("tif",)
    channels: tuple[int | str, ...] | None = None
    page: int | None = None
    z: int | str | None = None
    time: int | str | None = None
    scene: int | str | None = None
    plate: str = "auto"
    nuclei: str | None = None
    cells: str | None = None
    pixel_size_um: float | None = None
    peak_threshold: float | None = None
    fill_threshold: float | None = None
    min_prominence: float | None = None
    min_area_px: int | None = None
    min_score: float = 0.0
    batch_size: int = 8
    tile_px: int | None = None
    max_pixels: int = MAX_PIXELS
    precision: str = "auto"
    tta: bool = False
    rescale: str | float = "auto"
    diameter_px: float | None = None
    percentiles: tuple[float, float] | None = None
    workers: int = 1
    overlay: bool = True
    report: bool = False
    resume: bool = False
    overwrite: bool = False
    allow_mask: bool = False


def check_call(inputs: Sequence[Any], options: SegmentOptions) -> None:
    """Refuse what cannot be done, before a model is loaded.

    Raises UsageError (nothing to do, an unknown or impossible value of an option).
    """
    if not inputs:
        raise UsageError("At least one image must be given, got none: name files or folders")
    check_options(options)


def check_options(options: SegmentOptions) -> None:
    """The part of `check_call` that needs no images.

    Raises UsageError (an unknown or impossible value, or two options that exclude each other).
    """
    for fault in _faults(options):
        raise UsageError(fault)
    Scale(options.rescale, options.diameter_px)
    check_compartments(options.nuclei, options.cells, options.channels)
    given = {name: getattr(options, name) for name in EACH_OPTIONS}
    places: dict[str, Any] = {name: 0 if value == EACH else value for name, value in given.items()}
    Selection(options.channels, options.page, **places)


def _faults(options: SegmentOptions) -> Iterator[str]:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", options.device):
        yield f"`device` must be auto, cpu, cuda, cuda:N or mps, got {options.device!r}: choose one"
    unknown = [name for name in options.formats if name not in EXPORT_FORMATS]
    if unknown or not options.formats:
        known, given = ", ".join(EXPORT_FORMATS), ", ".join(unknown) or "none"
        yield f"`formats` must be one of {known}, got {given}: choose one of them"
    if options.precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        yield f"`precision` must be one of {known}, got {options.precision!r}: choose one"
    shares = options.percentiles
    if shares and not 0 <= shares[0] < shares[1] <= 100:
        yield f"`percentiles` must hold 0 <= low < high <= 100, got {shares}: 1 and 99.8 are usual"
    if not 0.0 <= options.min_score <= 1.0:
        yield f"`min_score` must be in 0 to 1, got {options.min_score}: 0 keeps all cells"
    if options.tile_px is not None and options.tile_px < 1:
        yield f"`tile_px` must be at least 1, got {options.tile_px}: leave it out"
    if options.max_pixels < 1:
        yield f"`max_pixels` must be at least 1, got {options.max_pixels}: leave it out"
    if options.page is not None and options.page < 0:
        yield f"`page` must be at least 0, got {options.page}: count from 0"
    if options.pixel_size_um is not None and not 0 < options.pixel_size_um < float("inf"):
        yield f"`pixel_size_um` must be above 0, got {options.pixel_size_um}: give micrometres"
    if options.resume and options.overwrite:
        yield "`resume` and `overwrite` exclude each other, got both: choose one"
