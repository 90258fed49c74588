"""Files in napari: what it opens, what it saves, and the bundled images."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count as count_from_0
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinocell.demo import sample_paths
from dinocell.errors import UsageError
from dinocell.io import Series, describe_image, read_image, read_labels
from dinocell.io.planes import PlaneChoice
from dinocell.napari.pixels import pixel_size_um
from dinocell.pairs import IMAGE_SUFFIXES, LABEL_NAME_ENDINGS
from dinocell.results.conversion import format_of
from dinocell.results.formats import EXPORT_FORMATS, Cells, require_packages

LayerData = tuple[Any, dict[str, Any], str]
_EAGER_BYTES = 2**29  # a larger stack is read plane by plane when it is shown


def get_reader(path: str | Sequence[str]) -> Callable[[Any], list[LayerData]] | None:
    """What reads a path, or None where it is none of ours."""
    first = Path(path if isinstance(path, str) else path[0])
    ours = first.name.lower().endswith(IMAGE_SUFFIXES) or _are_labels(first)
    return read_layers if ours else None


def _are_labels(path: Path) -> bool:
    stem = path.name.partition(".")[0]
    return stem.endswith(LABEL_NAME_ENDINGS)


def read_layers(path: str | Sequence[str]) -> list[LayerData]:
    """Layers of files: labels where the name says so (NAME_labels.tif), else one image layer per channel.

    A file of several planes becomes a stack with the axes of the file; of several scenes the first is
    shown.  The edge of a pixel becomes the scale, in µm.

    Raises UsageError, ImageFileError, MissingExtraError: see `dinocell.io.read_image`.
    """
    layers: list[LayerData] = []
    for one in [path] if isinstance(path, str) else path:
        layers += _labels(Path(one)) if _are_labels(Path(one)) else _images(Path(one))
    return layers


def _labels(path: Path) -> list[LayerData]:
    return [(read_labels(path), {"name": path.name.partition(".")[0]}, "labels")]


def _images(path: Path) -> list[LayerData]:
    contents = describe_image(path)
    series = contents.series[0]
    scene: PlaneChoice = {"scene": 0} if len(contents.series) > 1 else {}
    sizes = series.stacked
    about: dict[str, Any] = {}
    if series.edge_um is not None:
        steps = [series.pixel_size_um[2] or 1.0 if axis == "Z" else 1.0 for axis in sizes]
        about["scale"] = [*steps, series.edge_um, series.edge_um]
        about["units"] = [*("um" if axis == "Z" else "pixel" for axis in sizes), "um", "um"]
    stem = path.name.partition(".")[0]
    if not sizes:
        image = read_image(path, **scene)
        pixels, names = image.pixels, image.channel_names
        if image.is_colour:
            return [(pixels, {"name": stem, "rgb": True, **about}, "image")]
        planes = [pixels] if pixels.ndim == 2 else list(np.moveaxis(pixels, 2, 0))
    elif "S" in series.sizes:
        return [(_stack(path, series, scene, (3,)), {"name": stem, "rgb": True, **about}, "image")]
    else:
        count, names = series.sizes.get("C", 1), series.channel_names
        chosen = [[number] for number in range(count)] if count > 1 else [None]
        planes = [_stack(path, series, {**scene, "channels": one}) for one in chosen]
    if len(planes) == 1:
        return [(planes[0], {"name": stem, **about}, "image")]
    return [
        (plane, {"name": name, "blending": "additive", **about}, "image")
        for plane, name in zip(
            planes, names or map("channel {}".format, count_from_0()), strict=False
        )
    ]


def _stack(path: Path, series: Series, choice: PlaneChoice, samples: tuple[int, ...] = ()) -> Any:
    """(..., H, W) pixels of one channel, or (..., H, W, 3) colours; in memory if they are few."""
    sizes = series.stacked
    reads = []
    for page, index in enumerate(np.ndindex(*sizes.values())):
        at = dict(zip(sizes, index, strict=True))
        place: PlaneChoice = {"z": at.pop("Z", None), "time": at.pop("T", None), **choice}
        if at:  # axes that have no option: the first scene has the first pages
            place = {"page": page, "channels": choice.get("channels")}
        reads.append(partial(_plane, path, place))
    plane = (*series.upright_shape, *samples)
    shape = (*sizes.values(), *plane)
    if np.prod(shape) * np.dtype(series.dtype).itemsize <= _EAGER_BYTES:
        return np.stack([read() for read in reads]).reshape(shape)
    import dask.array
    from dask import delayed

    parts = [dask.array.from_delayed(delayed(read)(), plane, series.dtype) for read in reads]
    return dask.array.stack(parts).reshape(shape)


def _plane(path: Path, choice: PlaneChoice) -> NDArray[Any]:
    return read_image(path, **choice).pixels


def write_labels_layer(path: str, data: Any, meta: dict[str, Any]) -> list[str]:
    """Write a layer of labels in the format of the name: see `dinocell convert`.

    Raises UsageError (the layer has more than two axes, or the name is of no format); what the format
    raises.
    """
    labels = np.asarray(data)
    if labels.ndim != 2:
        raise UsageError(
            f"Labels must have two axes, got shape {labels.shape}: save the plane that you need"
        )
    target = Path(path)
    kind = format_of(target)
    require_packages([kind])
    size_um = pixel_size_um(meta.get("scale", ()), meta.get("units"))
    EXPORT_FORMATS[kind].write(target, Cells(labels, None, size_um, target.name.partition(".")[0]))
    return [path]


def sample(name: str) -> list[LayerData]:
    """A bundled image with its true labels."""
    image, labels = next(pair for pair in sample_paths() if pair[0].stem == name)
    truth = {"name": f"{name} truth", "visible": False}
    return [*_images(image), (read_labels(labels), truth, "labels")]


nuclei = partial(sample, "nuclei")
tissue = partial(sample, "tissue")
phase_contrast = partial(sample, "phase_contrast")
