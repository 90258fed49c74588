"""Labels (and, if there is one, the image) to a table with one row per cell, and to one summary.

Columns carry scikit-image's names and values, so that a table can be compared with
`skimage.measure.regionprops_table`; where scikit-image numbers the parts of a property
(``centroid-0``) the name here says which part it is (``centroid_row``), and
`SCIKIT_IMAGE_NAMES` translates.  Lengths are in pixels; the same in micrometres, under a name
that ends in ``_um`` or ``_um2``, is added when the pixel size is known.

=====================================  =============================================================
column                                 meaning
=====================================  =============================================================
label                                  the cell's number in `labels`
centroid_row, centroid_col             mean pixel position; pixel (0, 0) has its centre at 0, 0
bbox_min_row, bbox_min_col,            bounding box, half open: rows ``min <= row < max``
bbox_max_row, bbox_max_col
touches_border                         the box reaches an edge of the image: the cell may be cut
area                                   number of pixels
area_convex                            pixels in the convex hull of the pixels' edge mid-points
area_filled                            pixels with holes filled
equivalent_diameter_area               diameter of the disc with this area
perimeter                              border length by border-pixel configurations (Benkrid &
                                       Crookes; 4-neighbourhood)
perimeter_crofton                      border length from counted line crossings in 4 directions
axis_major_length, axis_minor_length   axes of the ellipse with the same second moments
orientation                            angle of the major axis against the row axis,
                                       -pi/2..pi/2 rad; -pi/4 for a shape without direction
feret_diameter_max                     longest distance between two points of the convex hull
eccentricity                           of that ellipse: 0 circle, towards 1 line
aspect_ratio                           axis_major_length / axis_minor_length, NaN for a line
roundness                              4 area / (pi axis_major_length²), NaN for one pixel
circularity                            4 pi area / perimeter_crofton²: 1 for a disc, towards 0 for
                                       a line or a ragged border; at most 1 (see `measure_labels`)
solidity                               area / area_convex
extent                                 area / area of the bounding box
euler_number                           pieces minus holes (8-connected)
num_neighbors                          cells whose border lies within `neighbor_distance_px`
nearest_border_distance                distance to the closest pixel of any other cell, 1 when
                                       they touch side by side; NaN when there is no other cell
intensity_mean, intensity_std,         of the image under the cell; with several channels one
intensity_min, intensity_max,          column each, ``intensity_mean_DNA``
intensity_median,
intensity_integrated                   sum over the cell's pixels
score                                  added by `dinocell.pipeline.Segmentation.measure`: how well the
                                       distance map supports the cell, 0..1 (see `confidence`)
=====================================  =============================================================

A cell is all pixels of one label, also where they form several pieces.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.compilation import njit
from dinocell.labels import as_labels
from dinocell.results.convex_hull import hull_area_and_feret
from dinocell.results.neighbors import count_neighbors
from dinocell.results.runs import Runs
from dinocell.results.shape_kernels import (
    CROFTON_WEIGHTS,
    EULER_WEIGHTS,
    border_counts,
    hole_area,
)
from dinocell.results.table import CellTable

_SAME_NAMES = (
    "label area area_convex area_filled equivalent_diameter_area perimeter perimeter_crofton "
    "axis_major_length axis_minor_length orientation feret_diameter_max eccentricity solidity extent "
    "euler_number intensity_mean intensity_std intensity_min intensity_max intensity_median"
)
SCIKIT_IMAGE_NAMES: Mapping[str, str] = MappingProxyType(
    {name: name for name in _SAME_NAMES.split()}
    | {"centroid_row": "centroid-0", "centroid_col": "centroid-1"}
    | {"bbox_min_row": "bbox-0", "bbox_min_col": "bbox-1"}
    | {"bbox_max_row": "bbox-2", "bbox_max_col": "bbox-3"}
)
"""Column here -> column of `skimage.measure.regionprops_table`, for all that both have."""

_LENGTHS = (
    "centroid_row",
    "centroid_col",
    "equivalent_diameter_area",
    "perimeter",
    "perimeter_crofton",
    "axis_major_length",
    "axis_minor_length",
    "feret_diameter_max",
    "nearest_border_distance",
)
_AREAS = ("area", "area_convex", "area_filled")
_GATHERED_PX = 2**22
"""Pixels under cells whose values are gathered at a time."""
_STATISTICS = ("mean", "std", "min", "max", "median", "integrated")

_Array = NDArray[Any]


def measure_labels(
    labels: ArrayLike,
    image: ArrayLike | None = None,
    *,
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] | None = None,
    neighbor_distance_px: float = 5.0,
) -> CellTable:
    """Measure every cell of a label image.

    Parameters
    ----------
    labels : (H, W) integer array_like
        0 is background, every other value is a cell; values need not be consecutive and may
        exceed 65,535.  A label in several pieces is one cell.
    image : (H, W) or (H, W, C) real array_like, optional
        Adds the intensity columns.  A NaN under a cell makes that cell's intensities of that
        channel NaN and touches no other cell.
    pixel_size_um : float, optional
        Side of a pixel in micrometres; adds the columns in micrometres (``_um``, ``_um2``).
    channel_names : sequence of str, optional
        One name per channel: ``intensity_mean_DNA``.  Default: the channel's number for an
        (H, W, C) image, no suffix for an (H, W) image.
    neighbor_distance_px : float
        Two cells are neighbours when the centres of some pixel of one and some pixel of the
        other are at most this far apart (Euclidean; touching side by side is 1).  At least 1.

    Returns
    -------
    CellTable
        Rows ascend by label; columns are those of the table at the top of this module.  Without
        a cell there are 0 rows and the same columns with the same types.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`; or the image does not fit the labels or
    is complex; the channel names do not fit; `pixel_size_um` is not above 0; `neighbor_distance_px` is
    below 1).

    Notes
    -----
    All columns in `SCIKIT_IMAGE_NAMES` equal scikit-image 0.26: counts exactly, the others to
    rounding (1e-9 relative; the minor axis of a line, exactly 0 in theory, to 1e-6 px).
    Intensity statistics are computed in float64 whatever the type of the image.

    `circularity` takes the Crofton perimeter because it stays right for round cells of any size:
    for discs of radius 5 to 40 px the ratio is 0.88 to 1.03 (0.97 and more from 20 px on), for a
    large 2:1 ellipse 0.82 to 0.85 (0.84 is true), whereas `perimeter` gives 1.11 falling to 0.91,
    and 0.76.  A diamond, in return, gets 0.87 where 0.79 is true.  What exceeds 1 is cut to 1.

    References
    ----------
    Perimeter: K. Benkrid and D. Crookes, "Design and FPGA implementation of a perimeter
    estimator", 2000.  Crofton perimeter and Euler number: J. Ohser, W. Nagel and K. Schladitz,
    "The Euler number of discretized sets", 2002.  Roundness: E. P. Cox, "A method of assigning
    numerical and percentage values to the degree of roundness of sand grains", 1927.
    """
    labels = as_labels(labels)
    channels = _channels(labels.shape, image, channel_names)
    if pixel_size_um is not None and not 0 < (pixel_size_um := float(pixel_size_um)) < math.inf:
        raise ValueError(
            f"`pixel_size_um` must be a positive number, got {pixel_size_um}: leave it out if unknown"
        )
    distance = float(neighbor_distance_px)
    if not 1 <= distance < math.inf:
        raise ValueError(
            f"`neighbor_distance_px` must be a finite number of at least 1 (side by side), got "
            f"{neighbor_distance_px!r}: choose a distance between pixel centres"
        )

    runs = Runs.of(labels)
    data: dict[str, _Array] = {"label": runs.label}
    data |= _position_columns(runs)
    data |= _shape_columns(runs, data, distance)
    for suffix, channel in channels:
        data |= _intensity_columns(runs, channel, suffix)
    if pixel_size_um is not None:
        for name in _LENGTHS:
            data[f"{name}_um"] = data[name] * pixel_size_um
        for name in _AREAS:
            data[f"{name}_um2"] = data[name] * pixel_size_um**2
    return CellTable(data, pixel_size_um)


def summarize(labels: ArrayLike, table: CellTable) -> dict[str, Any]:
    """Summarise one image: how many cells, how much of the image, how large.

    Parameters
    ----------
    labels : (H, W) integer array_like
        The label image that was measured.
    table : CellTable
        `measure_labels(labels, ...)`; its pixel size is used where it is known.

    Returns
    -------
    dict of str to int, float or None
        Ready for JSON.  ``num_cells``; ``num_cells_touching_border``; ``confluency_percent``
        (share of image pixels that belong to a cell, 0..100); ``cells_per_megapixel``; mean,
        median and standard deviation (of the population) of ``area``; means of ``perimeter``,
        ``eccentricity``, ``solidity``, ``circularity``, ``num_neighbors`` and ``intensity_mean`` (of each
        channel; the last without a further ``_mean`` in its name), over all cells, those at
        the image's edge included; ``image_height_px``, ``image_width_px``.  With a column ``score`` also
        ``quality``, its mean (0..1).  With a pixel size also ``pixel_size_um``, ``image_area_mm2``,
        ``cells_per_mm2`` and the ``area_um2`` statistics.  Statistics over cells are None when there is
        no cell, densities None when the image has no pixel.

    Raises
    ------
    ValueError
        `table` does not belong to `labels`: the numbers of cell pixels differ.  Also see
        `dinocell.labels.as_labels`.
    """
    labels = as_labels(labels)
    foreground = int(np.count_nonzero(labels))
    if int(table["area"].sum()) != foreground:
        raise ValueError(
            f"`table` must be measured on these `labels`, got areas that add up to "
            f"{int(table['area'].sum())} px where the labels have {foreground}: call "
            "`measure_labels(labels)` again"
        )
    num_cells = len(table)
    summary: dict[str, Any] = {
        "image_height_px": labels.shape[0],
        "image_width_px": labels.shape[1],
        "num_cells": num_cells,
        "num_cells_touching_border": int(np.count_nonzero(table["touches_border"])),
        "confluency_percent": _ratio(100.0 * foreground, labels.size),
        "cells_per_megapixel": _ratio(1e6 * num_cells, labels.size),
    }
    if "score" in table:
        summary["quality"] = float(table["score"].mean()) if num_cells else None
    summary |= _spread(table["area"], "area")
    for name in ("perimeter", "eccentricity", "solidity", "circularity", "num_neighbors"):
        summary[f"{name}_mean"] = float(table[name].mean()) if num_cells else None
    for name in table.columns:
        if name.startswith("intensity_mean"):
            summary[name] = float(table[name].mean()) if num_cells else None
    pixel_size_um = table.pixel_size_um
    if pixel_size_um is not None:
        image_area_mm2 = labels.size * pixel_size_um**2 * 1e-6
        summary["pixel_size_um"] = pixel_size_um
        summary["image_area_mm2"] = image_area_mm2
        summary["cells_per_mm2"] = _ratio(num_cells, image_area_mm2)
        summary |= _spread(table["area"] * pixel_size_um**2, "area_um2")
    return summary


def _ratio(value: float, whole: float) -> float | None:
    return value / whole if whole else None


def _spread(values: _Array, name: str) -> dict[str, float | None]:
    return {
        f"{name}_mean": float(values.mean()) if len(values) else None,
        f"{name}_median": float(np.median(values)) if len(values) else None,
        f"{name}_std": float(values.std()) if len(values) else None,
    }


def _channels(
    shape: tuple[int, ...], image: ArrayLike | None, channel_names: Sequence[str] | None
) -> list[tuple[str, _Array]]:
    """Check the image and return (column suffix, (H, W) channel) pairs."""
    if image is None:
        if channel_names is not None:
            raise ValueError(
                f"`channel_names` must come with an image, got {channel_names!r} alone: pass "
                "`image` or leave the names out"
            )
        return []
    array = np.asarray(image)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"`image` must hold real numbers, got {array.dtype}: convert it first")
    if array.ndim not in (2, 3) or array.shape[:2] != shape:
        raise ValueError(
            f"`image` must have shape {shape} like the labels, or {(*shape, 'C')} with channels "
            f"last, got {array.shape}: move or crop its axes"
        )
    planes = [array] if array.ndim == 2 else [array[..., c] for c in range(array.shape[2])]
    if channel_names is None:
        if array.ndim == 2:
            return [("", array)]
        return [(f"_{number}", plane) for number, plane in enumerate(planes)]
    if isinstance(channel_names, str):
        raise TypeError(
            f"`channel_names` must be a sequence of names, got the string {channel_names!r}: "
            f"write [{channel_names!r}]"
        )
    names = list(channel_names)
    if len(names) != len(planes) or len(set(names)) != len(names) or not all(names):
        raise ValueError(
            f"`channel_names` must be {len(planes)} different names, one per channel, got "
            f"{names!r}: name each channel once"
        )
    return [(f"_{name}", plane) for name, plane in zip(names, planes, strict=True)]


# --- columns ------------------------------------------------------------------------------------


def _position_columns(runs: Runs) -> dict[str, _Array]:
    length = runs.stop - runs.start
    area = runs.fold(np.add, length)
    middle = (runs.start + runs.stop - 1) / 2  # mean column of a run
    min_row = runs.fold(np.minimum, runs.row)
    max_row = runs.fold(np.maximum, runs.row) + 1
    min_col = runs.fold(np.minimum, runs.start)
    max_col = runs.fold(np.maximum, runs.stop)
    height, width = runs.shape
    return {
        "centroid_row": runs.fold(np.add, runs.row * length) / area,
        "centroid_col": runs.fold(np.add, middle * length) / area,
        "bbox_min_row": min_row,
        "bbox_min_col": min_col,
        "bbox_max_row": max_row,
        "bbox_max_col": max_col,
        "touches_border": (
            (min_row == 0) | (min_col == 0) | (max_row == height) | (max_col == width)
        ),
        "area": area,
    }


def _shape_columns(
    runs: Runs, position: Mapping[str, _Array], neighbor_distance_px: float
) -> dict[str, _Array]:
    area = position["area"]
    min_row, max_row = position["bbox_min_row"], position["bbox_max_row"]
    min_col, max_col = position["bbox_min_col"], position["bbox_max_col"]
    box = (max_row - min_row) * (max_col - min_col)

    num_cells = len(runs.label)
    quads, steps, border_cell, border_pixel = border_counts(runs)
    perimeter_crofton = quads @ CROFTON_WEIGHTS
    neighbors, nearest = count_neighbors(
        num_cells, runs.shape, border_cell, border_pixel, neighbor_distance_px
    )
    area_convex, feret = hull_area_and_feret(
        runs.first, runs.row, runs.start, runs.stop, min_row, max_row
    )
    holes = hole_area(
        runs.first, runs.row, runs.start, runs.stop, min_row, max_row, min_col, max_col
    )
    moments = _moment_columns(runs, position)
    major, minor = moments["axis_major_length"], moments["axis_minor_length"]
    with np.errstate(divide="ignore", invalid="ignore"):
        circularity = np.minimum(4 * math.pi * area / perimeter_crofton**2, 1.0)
        aspect_ratio = np.where(minor > 1e-6, major / minor, np.nan)
        roundness = np.where(major > 0, 4 * area / (math.pi * major**2), np.nan)
    return {
        "area_convex": area_convex,
        "area_filled": area + holes,
        "equivalent_diameter_area": np.sqrt(4 * area / math.pi),
        "perimeter": steps @ np.array([1.0, math.sqrt(2), (1 + math.sqrt(2)) / 2]),
        "perimeter_crofton": perimeter_crofton,
        "axis_major_length": major,
        "axis_minor_length": minor,
        "orientation": moments["orientation"],
        "feret_diameter_max": feret,
        "eccentricity": moments["eccentricity"],
        "aspect_ratio": aspect_ratio,
        "roundness": roundness,
        "circularity": circularity,
        "solidity": area / area_convex,
        "extent": area / box,
        "euler_number": quads @ EULER_WEIGHTS,
        "num_neighbors": neighbors,
        "nearest_border_distance": nearest,
    }


def _moment_columns(runs: Runs, position: Mapping[str, _Array]) -> dict[str, NDArray[np.float64]]:
    """Axes and direction of the ellipse that has the same second central moments as the cell.

    A run of L pixels has the variance (L² − 1) / 12 along its row about its own middle.  By the parallel
    axis theorem its share of the cell's moments follows from that and from the position of its middle,
    so the sums over runs equal those over pixels, and the time is linear in the runs.  The eigenvalues of
    the symmetric 2 x 2 matrix are mean ± half.  (Ellipse of equal moments: R. M. Haralick and L. G.
    Shapiro, "Computer and Robot Vision", volume 1, 1992, appendix A.)
    """
    area = position["area"]
    length = (runs.stop - runs.start).astype(np.float64)
    d_row = runs.row - position["centroid_row"][runs.cell]
    d_col = (runs.start + runs.stop - 1) / 2 - position["centroid_col"][runs.cell]
    var_row = runs.fold(np.add, length * d_row**2) / area
    var_col = runs.fold(np.add, length * (d_col**2 + (length**2 - 1) / 12)) / area
    covariance = runs.fold(np.add, length * d_row * d_col) / area

    mean = (var_row + var_col) / 2
    half = np.hypot((var_row - var_col) / 2, covariance)
    large = mean + half
    # rounding leaves about 1e-16 of `large` where the small eigenvalue is 0: a line
    small = np.where(mean - half > 1e-14 * large, mean - half, 0.0)
    directed = half > 1e-10 * large
    with np.errstate(divide="ignore", invalid="ignore"):
        eccentricity = np.where(large > 0, np.sqrt(1 - small / large), 0.0)
    return {
        "axis_major_length": 4 * np.sqrt(large),
        "axis_minor_length": 4 * np.sqrt(small),
        "eccentricity": eccentricity,
        "orientation": np.where(
            directed, 0.5 * np.arctan2(2 * covariance, var_row - var_col), -math.pi / 4
        ),
    }


def _intensity_columns(runs: Runs, channel: _Array, suffix: str) -> dict[str, NDArray[np.float64]]:
    length = runs.stop - runs.start
    end = np.cumsum(length)
    statistics = np.empty((len(runs.label), len(_STATISTICS)))
    ends = np.append(0, end)[runs.first]  # where a cell's pixels end among those of all cells
    first = 0
    while first < len(runs.label):  # some cells at a time, or one that is larger
        stop = max(first + 1, int(np.searchsorted(ends, ends[first] + _GATHERED_PX)) - 1)
        part = slice(runs.first[first], runs.first[stop])
        rows = np.repeat(runs.row[part], length[part])
        begin = end[part] - length[part] - ends[first]
        cols = np.arange(len(rows)) + np.repeat(runs.start[part] - begin, length[part])
        values = channel[rows, cols].astype(np.float64)
        statistics[first:stop] = _statistics(values, ends[first : stop + 1] - ends[first])
        first = stop
    return {
        f"intensity_{name}{suffix}": statistics[:, position].copy()
        for position, name in enumerate(_STATISTICS)
    }


@njit
def _statistics(values: _Array, ends: _Array) -> _Array:
    """Mean, standard deviation, minimum, maximum, median and sum of values[ends[k]:ends[k+1]]."""
    result = np.empty((len(ends) - 1, 6), np.float64)
    for k in range(len(ends) - 1):
        part = values[ends[k] : ends[k + 1]]
        total = 0.0
        low = part[0]
        high = part[0]
        for value in part:
            total += value
            low = min(low, value)
            high = max(high, value)
        if total != total:
            result[k] = np.nan
            continue
        mean = total / len(part)
        spread = 0.0
        for value in part:
            spread += (value - mean) ** 2
        result[k, 0] = mean
        result[k, 1] = math.sqrt(spread / len(part))
        result[k, 2] = low
        result[k, 3] = high
        result[k, 4] = np.median(part)
        result[k, 5] = total
    return result
