"""Image in, cells out: the one function under the command line, Python and the demo."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from dinocell.errors import ConfigError, UsageError, raised_as
from dinocell.io.channel_files import check_one_size
from dinocell.io.planes import MAX_PIXELS, PlaneChoice, channel_of
from dinocell.network.familiarity import Appearance
from dinocell.network.model import DINOCell, load_model, resolve_device, with_config
from dinocell.results.confidence import scored_cells
from dinocell.results.segmented import Segmentation
from dinocell.segmentation.compartments import CellChoice, Surroundings, check_compartments
from dinocell.segmentation.inference import Inference, predict_distance_map, start_appearance
from dinocell.segmentation.intensity import (
    IntensityRange,
    average_channels,
    find_range,
)
from dinocell.segmentation.rescale import Scale, ScaleChoice, rescaled_shape
from dinocell.segmentation.source import read_source
from dinocell.segmentation.thresholds import ThresholdChanges, Thresholds

DEFAULT_MODEL = "dinocell-cells"


class PipelineChanges(ThresholdChanges, ScaleChoice, total=False):
    """Thresholds and scale in place of the model's, as keyword arguments; None keeps the model's."""


class LoadedImage(NamedTuple):
    """The gray plane (H, W) to segment, its pixel size in µm, its name, what was noted on it, how its
    intensities map to those that a network sees; where the plane is the mean of several channels, these
    as they were read (H, W, C) with their names; where the model knows its training images, what
    collects how this one looks; how many times the image is enlarged for the network; and what the cells
    around nuclei grow in."""

    plane: NDArray
    pixel_size_um: float | None
    name: str
    intensity: IntensityRange
    warnings: tuple[str, ...] = ()
    channels: NDArray | None = None
    channel_names: tuple[str, ...] = ()
    appearance: Appearance | None = None
    file_name: str = ""
    rescale: float = 1.0
    around: Surroundings | None = None


class Judgement(NamedTuple):
    """What the model makes of an image: notes, how unfamiliar it is, what it resembles (see
    `Segmentation`), and the thresholds for it."""

    notes: tuple[str, ...]
    unfamiliar: float | None
    kind: str
    thresholds: Thresholds


class DINOCellPipeline:
    """A model with its settings, ready for many images.

    Parameters
    ----------
    model : DINOCell, model file or bundled name
    device : `cpu`, `cuda`, `cuda:N`, `mps` or `auto` (a GPU if one exists), optional
        Where the network runs.  None leaves a given `DINOCell` where it is, and takes the CPU for a file
        or name.
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
        # As `load_model` does: in another layout convolutions round otherwise.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given: dict[str, Any] = {k: value for k, value in changes.items() if value is not None}
        scaling = {name: given.pop(name) for name in ScaleChoice.__annotations__ if name in given}
        self.scale = Scale(**scaling)
        self._has_min_area = "min_area_px" in given
        changed = {name: given[name] for name in ThresholdChanges.__annotations__ if name in given}
        with raised_as(ConfigError, ValueError):  # `ModelConfig` names keys of a training file
            self.thresholds = replace(Thresholds.of(model.config), **changed)
        if percentiles is not None:
            given["low_percentile"], given["high_percentile"] = percentiles
        self.model = with_config(model, **given).eval()
        self.scale.check_model(self.model.config)
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
        nuclei: int | str | None = None,
        cells: int | str | None = None,
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
        nuclei, cells : optional
            Segment nuclei in the channel `nuclei` and let each grow to its cell: in the distance map of
            the channels `cells` (``AGP``, ``AGP,ER`` or ``mean``), or by a ring (``ring:5um``,
            ``ring:12px``).  Nucleus and cell have one number.  `nuclei` alone is `channels` with one.
        choice : channels, z, time, scene, page
            Which plane of a file with several, see `dinocell.io.read_image`; several channels are
            normalised one by one and averaged.

        Raises
        ------
        UsageError, ImageFileError
            The file is missing or unreadable, or its axes do not fit; it has several channels, and none is
            chosen; it looks like a mask.
        ValueError
            The array is not 2-D or 3-D, holds NaN, or looks like a mask.
        """
        loaded = self.load(
            image,
            pixel_size_um=pixel_size_um,
            allow_mask=allow_mask,
            nuclei=nuclei,
            cells=cells,
            **choice,
        )
        loaded = loaded._replace(name=name or loaded.name)
        return self.finish(loaded, self.predict(loaded, progress=progress))

    def load(
        self,
        image: NDArray | str | os.PathLike[str],
        *,
        pixel_size_um: float | None = None,
        allow_mask: bool = False,
        max_pixels: int = MAX_PIXELS,
        nuclei: int | str | None = None,
        cells: int | str | None = None,
        **choice: Unpack[PlaneChoice],
    ) -> LoadedImage:
        """First third of `run`: the gray plane (H, W), its pixel size, its name and notes.

        A file of more than `max_pixels` pixels is refused before they are read.
        """
        cells = None if cells is None else str(cells)  # a position, as `nuclei` may be one
        check_compartments(nuclei, cells, choice.get("channels"))
        load = partial(
            self._load_plane,
            image,
            pixel_size_um=pixel_size_um,
            allow_mask=allow_mask,
            max_pixels=max_pixels,
        )
        if nuclei is None:
            return load(**choice)
        choice["channels"] = [channel_of(str(nuclei))]
        loaded = load(**choice)
        if cells is None:
            return loaded
        wanted = CellChoice.of(cells)
        if not wanted.channels:
            width = wanted.width_px(loaded.pixel_size_um)
            return loaded._replace(around=Surroundings(width_px=width))
        choice["channels"] = list(wanted.channels)
        whole = load(**choice)
        return _with_cell_channels(loaded, whole, (str(nuclei), cells))

    def _load_plane(
        self,
        image: NDArray | str | os.PathLike[str],
        *,
        pixel_size_um: float | None,
        allow_mask: bool,
        max_pixels: int,
        **choice: Unpack[PlaneChoice],
    ) -> LoadedImage:
        """`load` without nuclei."""
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
        else:
            if not 0 < pixel_size_um < math.inf:
                raise UsageError(
                    f"`pixel_size_um` must be above 0, got {pixel_size_um}: give micrometres"
                )
            # The note says to do what was done.
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
            file_name=Path(image).name if isinstance(image, str | os.PathLike) else "",
            rescale=rescale,
        )
        if self.model.statistics is None:
            return loaded
        appearance = start_appearance(intensity, pixels.dtype, self.model.config)
        return loaded._replace(appearance=appearance)

    def predict(
        self, loaded: LoadedImage, *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[np.float32]:
        """Second third of `run`: what `load` gave → distance map, see `predict_distance_map`.

        Fills the appearance of `loaded`, and the map of cells around nuclei.
        """
        if loaded.around is not None and loaded.around.image is not None:
            whole = self.predict(loaded.around.image, progress=progress)
            loaded.around.distance_map = whole[0] if self.how.tta else whole
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
        nuclei = None
        if loaded.around is not None:
            whole = loaded.around.image
            thresholds = judged.thresholds if whole is None else self.judge(whole).thresholds
            nuclei, labels = labels, loaded.around.grow(labels, thresholds.fill_threshold)
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
            file_name=loaded.file_name,
            rescale=loaded.rescale,
            nuclei=nuclei,
        )

    def thresholds_of(self, loaded: LoadedImage) -> Thresholds:
        """The thresholds in pixels of an image: the model's smallest area is one at the model's scale."""
        if self._has_min_area or loaded.rescale == 1:
            return self.thresholds
        area = self.thresholds.min_area_px / loaded.rescale**2
        return replace(self.thresholds, min_area_px=round(area))

    def judge(self, loaded: LoadedImage) -> Judgement:
        """What the model makes of an image that `predict` has seen."""
        notes: tuple[str, ...] = ()
        thresholds = self.thresholds_of(loaded)
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


def _with_cell_channels(
    nuclei: LoadedImage, whole: LoadedImage, names: tuple[str, str]
) -> LoadedImage:
    """`nuclei` with the image that its cells grow in; all channels of both are measured, under their names."""
    check_one_size(nuclei.plane.shape, whole.plane.shape, nuclei.file_name)
    channels, columns = whole.channels, whole.channel_names
    if channels is None:
        channels, columns = whole.plane[..., None], (names[1],)
    if names[0] not in columns:
        channels = np.concatenate([nuclei.plane[..., None], channels], axis=-1)
        columns = (names[0], *columns)
    notes = dict.fromkeys((*nuclei.warnings, *whole.warnings))
    return nuclei._replace(
        around=Surroundings(image=whole),
        channels=channels,
        channel_names=columns,
        warnings=tuple(notes),
    )


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
        *("pixel_size_um", "allow_mask", "name", "progress", "nuclei", "cells"),
    )
    run_options = {key: options.pop(key) for key in run_names if key in options}
    return DINOCellPipeline(model, device=device, **options).run(image, **run_options)
