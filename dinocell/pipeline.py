"""Image in, cells out: the one function under the command line, Python and the demo."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import UsageError
from dinocell.files import ensure_folder
from dinocell.io import refuse_long_names
from dinocell.io.planes import MAX_PIXELS, PlaneChoice
from dinocell.network.familiarity import Appearance
from dinocell.network.model import DINOCell, load_model, resolve_device, with_config
from dinocell.results.confidence import scored_cells
from dinocell.segmentation.inference import Inference, predict_distance_map, start_appearance
from dinocell.segmentation.intensity import (
    IntensityRange,
    average_channels,
    find_range,
)
from dinocell.segmentation.rescale import Scale, ScaleChoice, rescaled_shape
from dinocell.segmentation.source import read_source
from dinocell.segmentation.thresholds import ThresholdChanges, Thresholds

if TYPE_CHECKING:
    from dinocell.results.table import CellTable

DEFAULT_MODEL = "dinocell-cells"


class PipelineChanges(ThresholdChanges, ScaleChoice, total=False):
    """Thresholds and scale in place of the model's, as keyword arguments; None keeps the model's."""


class LoadedImage(NamedTuple):
    """The gray plane (H, W) to segment, its pixel size in µm, its name, what was noted on it, how its
    intensities map to those that a network sees; where the plane is the mean of several channels, these
    as they were read (H, W, C) with their names; where the model knows its training images, what
    collects how this one looks; and how many times the image is enlarged for the network."""

    plane: NDArray
    pixel_size_um: float | None
    name: str
    intensity: IntensityRange
    warnings: tuple[str, ...] = ()
    channels: NDArray | None = None
    channel_names: tuple[str, ...] = ()
    appearance: Appearance | None = None
    rescale: float = 1.0
    file_name: str = ""


class Judgement(NamedTuple):
    """What the model makes of an image: notes, how unfamiliar it is, what it resembles (see
    `Segmentation`), and the thresholds for it."""

    notes: tuple[str, ...]
    unfamiliar: float | None
    kind: str
    thresholds: Thresholds


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
    rescale : float
        How many times the image was enlarged for the network; all results are in pixels of the file.
    file_name : str
        Of the image, without folders; empty for an array.
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
    rescale: float = 1.0
    file_name: str = ""

    @property
    def num_cells(self) -> int:
        """How many cells were found."""
        return int(self.labels.max(initial=0))

    def measure(self) -> CellTable:
        """One row per cell; scikit-image's names, µm columns where the pixel size is known.

        Intensities are those of the file; with several channels each has columns of its own, such as
        `intensity_mean_DNA`.
        """
        from dinocell.results.measure import measure_labels

        one = self.channels is None
        table = measure_labels(
            self.labels,
            self.image if one else self.channels,
            pixel_size_um=self.pixel_size_um,
            channel_names=None if one else self.channel_names,
        )
        if self.scores is None:
            return table
        return replace(table, data={**table.data, "score": self.scores})

    def summary(self) -> dict[str, Any]:
        """Number of cells, confluency, mean area of this image, and how the network saw it."""
        from dinocell.results.measure import summarize

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
        formats: Sequence[str] = ("tif",),
        table: CellTable | None = None,
        overlay: bool = True,
    ) -> dict[str, Path]:
        """Write everything about this image into `folder`; the label image comes last.

        `NAME_cells.csv`, `NAME_overlay.png` (unless `overlay=False`), and one label file per format
        of `dinocell.results.formats.EXPORT_FORMATS` (`tif`, `png`, `geojson`, ...).  Each file appears
        whole or not at all; a present label file therefore means the image is done.

        Returns
        -------
        dict
            Kind → path.

        Raises
        ------
        UsageError
            A format is unknown, or none is given.
        DINOCellError
            The name is too long for the file system; nothing was written.
        """
        from dinocell.results.formats import EXPORT_FORMATS, Cells
        from dinocell.results.pictures import overlay_panel, write_png

        paths = output_paths(folder, self.name, formats, overlay=overlay)
        ensure_folder(Path(folder))
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
            self.name,
            self.file_name,
            self.image if self.channels is None else self.channels,
            self.channel_names,
        )
        for name in list(paths)[1 + overlay :]:
            EXPORT_FORMATS[name].write(paths[name], cells)
        return paths


def output_paths(
    folder: str | os.PathLike[str], name: str, formats: Sequence[str], *, overlay: bool
) -> dict[str, Path]:
    """Kind → file that `Segmentation.save` writes, in the order in which it does.

    Raises
    ------
    UsageError
        A format is unknown, or none is given.
    """
    from dinocell.results.formats import EXPORT_FORMATS

    unknown = [name for name in formats if name not in EXPORT_FORMATS]
    if unknown or not formats:
        raise UsageError(
            f"`formats` must be some of {', '.join(EXPORT_FORMATS)}, got {', '.join(unknown) or 'none'}: "
            "choose among them"
        )
    endings = {"csv": "_cells.csv"} | ({"overlay": "_overlay.png"} if overlay else {})
    for kind in sorted(formats, key=lambda item: item in ("tif", "png")):
        endings[kind] = EXPORT_FORMATS[kind].suffix
    return {kind: Path(folder) / f"{name}{ending}" for kind, ending in endings.items()}


class DINOCellPipeline:
    """A model with its settings, ready for many images.

    Parameters
    ----------
    model : DINOCell, model file or bundled name
    device : str
        Where the network runs; None leaves a given `DINOCell` where it is.
    batch_size : int
        Windows per network call.
    tile_px : int, optional
        An image of more pixels than a square of this edge (default 4096) is kept in temporary files
        and segmented band by band, to save memory; the result is the same.
    precision : `auto`, `fp32` or `bf16`
        bf16 differs in the third digit; `auto` takes it where the processor has the unit for it.
    tta : bool
        Test-time augmentation: the mean map of each window and its three flips; four times as slow.
    percentiles : (low, high), optional
        Intensities that become black and white, in place of the model's percentiles.
    min_score : float in [0, 1]
        Leave out cells whose score is lower: see `dinocell.results.confidence.cell_scores`.
    peak_threshold, fill_threshold, min_prominence, min_area_px : optional
        In place of the model's own: see `dinocell.segmentation.thresholds.Thresholds`.  A model may have
        others for each kind of image that it knows; one of the first three replaces these everywhere.
    rescale, diameter_px : optional
        The scale at which the network sees an image: see `dinocell.segmentation.rescale.Scale`.

    Raises
    ------
    UsageError, ConfigError
        The model or the device does not exist, the thresholds do not fit together, or the scale does
        not suit the model.
    """

    def __init__(
        self,
        model: DINOCell | str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        device: str | None = None,
        batch_size: int = 8,
        tile_px: int | None = None,
        precision: str = "auto",
        tta: bool = False,
        percentiles: tuple[float, float] | None = None,
        min_score: float = 0.0,
        **changes: Unpack[PipelineChanges],
    ) -> None:
        if unknown := changes.keys() - PipelineChanges.__annotations__.keys():
            raise TypeError(
                f"DINOCellPipeline does not know {', '.join(sorted(unknown))}: its other options are "
                f"{', '.join(PipelineChanges.__annotations__)}"
            )
        if not isinstance(model, DINOCell):
            model = load_model(os.fspath(model), device=device or "cpu")
        elif device is not None:
            model = model.to(resolve_device(device))
        given: dict[str, Any] = {k: value for k, value in changes.items() if value is not None}
        scaling = {name: given.pop(name) for name in ScaleChoice.__annotations__ if name in given}
        self.scale = Scale(**scaling)
        self._has_min_area = "min_area_px" in given
        if percentiles is not None:
            given["low_percentile"], given["high_percentile"] = percentiles
        self.model = with_config(model, **given).eval()
        self.scale.check_model(self.model.config)
        self.thresholds = Thresholds.of(self.model.config)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}: 8 is usual")
        self.how = Inference(batch_size, tile_px, precision, tta)
        if not 0.0 <= min_score <= 1.0:
            raise UsageError(f"`min_score` must be in 0 to 1, got {min_score}: 0 keeps all cells")
        self.min_score = min_score

    def run(
        self,
        image: NDArray | str | os.PathLike[str],
        *,
        pixel_size_um: float | None = None,
        allow_mask: bool = False,
        name: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        **choice: Unpack[PlaneChoice],
    ) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image : path or (H, W) or (H, W, C) ndarray
            Any real dtype.
        pixel_size_um : float, optional
            In place of the file's.
        allow_mask : bool
            Segment an image that looks like a label image or a binary mask.
        progress : callable (done, total), optional
            After every batch of windows.
        choice : channels, z, time, scene, page
            Which plane of a file with several, see `dinocell.io.read_image`; several channels are
            normalised one by one and averaged.

        Raises
        ------
        UsageError, ImageFileError
            The file is missing or unreadable, or its axes do not fit.
        ValueError
            The array does not fit: several channels and no choice, NaN, a mask.
        """
        loaded = self.load(image, pixel_size_um=pixel_size_um, allow_mask=allow_mask, **choice)
        loaded = loaded._replace(name=name or loaded.name)
        return self.finish(loaded, self.predict(loaded, progress=progress))

    def load(
        self,
        image: NDArray | str | os.PathLike[str],
        *,
        pixel_size_um: float | None = None,
        allow_mask: bool = False,
        max_pixels: int = MAX_PIXELS,
        **choice: Unpack[PlaneChoice],
    ) -> LoadedImage:
        """First third of `run`: the gray plane (H, W), its pixel size, its name and notes.

        A file of more than `max_pixels` pixels is refused before they are read.
        """
        source = read_source(
            image,
            max_pixels=max_pixels,
            tile_px=self.how.tile_px,
            allow_mask=allow_mask,
            **choice,
        )
        pixels, notes = source.pixels, source.notes
        if pixel_size_um is None:
            pixel_size_um = source.pixel_size_um
        else:  # the note says to do what was done
            notes = tuple(note for note in notes if "`pixel_size_um`" not in note)
        channels_read: NDArray | None = None
        if pixels.ndim == 3:
            channels_read = pixels
            pixels, noted = self._average(pixels, source.names)
            notes = (*notes, *noted)
        intensity = find_range(pixels, **self.model.config.intensity)
        rescale, how = self.scale.of_image(pixel_size_um, self.model.config)
        rescaled_shape(pixels.shape, rescale, max_pixels)
        loaded = LoadedImage(
            *(pixels, pixel_size_um, source.name, intensity, (*notes, *intensity.notes, *how)),
            *(channels_read, source.column_names),
            rescale=rescale,
            file_name=Path(image).name if isinstance(image, str | os.PathLike) else "",
        )
        if self.model.statistics is None:
            return loaded
        appearance = start_appearance(intensity, pixels.dtype, self.model.config)
        return loaded._replace(appearance=appearance)

    def predict(
        self, loaded: LoadedImage, *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Second third of `run`: what `load` gave → distance map, see `predict_distance_map`.

        Fills the appearance of `loaded`.
        """
        return predict_distance_map(
            self.model,
            loaded.plane,
            intensity=loaded.intensity,
            how=self.how,
            progress=progress,
            appearance=loaded.appearance,
            rescale=loaded.rescale,
        )

    def finish(self, loaded: LoadedImage, distance_map: NDArray[np.float32]) -> Segmentation:
        """Last third of `run`: what `predict` gave → labels.  Needs no network and no GPU."""
        judged = self.judge(loaded)
        labels, scores, left_out = scored_cells(
            distance_map,
            judged.thresholds,
            target=self.model.config.target,
            min_score=self.min_score,
        )
        return Segmentation(
            labels=labels,
            distance_map=distance_map[0] if self.how.tta else distance_map,
            image=loaded.plane,
            pixel_size_um=loaded.pixel_size_um,
            name=loaded.name,
            warnings=(*loaded.warnings, *left_out, *judged.notes),
            channels=loaded.channels,
            channel_names=loaded.channel_names,
            scores=scores,
            unfamiliar=judged.unfamiliar,
            kind=judged.kind,
            rescale=loaded.rescale,
            file_name=loaded.file_name,
        )

    def _thresholds_of(self, loaded: LoadedImage) -> Thresholds:
        """The thresholds in pixels of an image: the model's smallest area is one at the model's scale."""
        if self._has_min_area or loaded.rescale == 1:
            return self.thresholds
        area = self.thresholds.min_area_px / loaded.rescale**2
        return replace(self.thresholds, min_area_px=round(area))

    def judge(self, loaded: LoadedImage) -> Judgement:
        """What the model makes of an image that `predict` has seen."""
        notes: tuple[str, ...] = ()
        thresholds = self._thresholds_of(loaded)
        plane, statistics = loaded.plane, self.model.statistics
        if plane.size and plane.min() == plane.max():
            notes = ("Constant image: no cells can be found",)
        compared = None if statistics is None else statistics.compare(loaded.appearance)
        if compared is None:
            return Judgement(notes, None, "", thresholds)
        if compared.reasons:
            notes = (*notes, compared.note(self.model.card.get("name") or "this model"))
        kind = compared.kind
        return Judgement(
            notes,
            compared.unfamiliar,
            "" if kind is None else kind.name,
            thresholds if kind is None else replace(thresholds, **kind.thresholds),
        )

    def _average(
        self, pixels: NDArray, names: Sequence[str] | None
    ) -> tuple[NDArray[np.float32], list[str]]:
        """Mean of the normalised channels, and what was left out of each."""
        planes = np.moveaxis(pixels, 2, 0)
        ranges = [find_range(plane, **self.model.config.intensity) for plane in planes]
        notes = [
            f"channel {names[index] if names else index}: {note}"
            for index, intensity in enumerate(ranges)
            for note in intensity.notes
        ]
        return average_channels(pixels, ranges, self.how.tile_px), notes


def segment(
    image: NDArray | str | os.PathLike[str],
    *,
    model: DINOCell | str | os.PathLike[str] = DEFAULT_MODEL,
    device: str | None = None,
    **options: Any,
) -> Segmentation:
    """Segment one image; see `DINOCellPipeline` and its `run` for the options.

    Examples
    --------
    >>> result = segment("image.tif")                        # doctest: +SKIP
    >>> result.labels.max(), result.measure()["area"].mean() # doctest: +SKIP
    """
    run_names = (
        *PlaneChoice.__annotations__,
        *("pixel_size_um", "allow_mask", "name", "progress"),
    )
    run_options = {key: options.pop(key) for key in run_names if key in options}
    return DINOCellPipeline(model, device=device, **options).run(image, **run_options)
