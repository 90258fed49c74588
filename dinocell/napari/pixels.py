"""What of the layers on the screen is segmented."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import UsageError
from dinocell.service.stored import safe_name

if TYPE_CHECKING:
    from napari.layers import Image


class Pixels(NamedTuple):
    """Arguments of `dinocell.napari.session.segment_here`."""

    pixels: NDArray[Any]
    name: str
    pixel_size_um: float | None
    channel_names: tuple[str, ...] | None


def pixels_of(layers: Sequence["Image"], step: Sequence[int] = ()) -> Pixels:
    """The plane that is shown of each layer, as the channels of one image.

    Parameters
    ----------
    layers : image layers of the same size; their names become those of the channels
    step : place along each axis of the viewer; layers of more than two axes give this plane

    Raises UsageError (no layer is given, the sizes differ, or a colour picture is one of several).
    """
    if not layers:
        raise UsageError("A layer must be chosen, got none: select one or more image layers")
    if len(layers) > 1 and any(layer.rgb for layer in layers):
        raise UsageError(
            "A colour picture must be segmented alone, got several layers: choose this one or the others"
        )
    first, planes = layers[0], [_plane(layer, step) for layer in layers]
    if len({plane.shape for plane in planes}) > 1:
        raise UsageError(
            f"Layers must have one size, got {', '.join(str(p.shape) for p in planes)}: choose others"
        )
    name, size_um = safe_name(f"{first.name}."), pixel_size_um(first.scale, first.units)
    if len(planes) == 1:
        return Pixels(planes[0], name, size_um, None)
    names = tuple(layer.name for layer in layers)
    return Pixels(np.stack(planes, axis=-1), name, size_um, names)


def _plane(layer: "Image", step: Sequence[int]) -> NDArray[Any]:
    data = layer.data[0] if layer.multiscale else layer.data
    kept = 3 if layer.rgb else 2
    if data.ndim < kept:
        raise UsageError(
            f"A layer must have rows and columns, got shape {data.shape}: choose another"
        )
    ahead = data.ndim - kept
    # the viewer may have more axes than the layer, whose axes are the last ones
    place = ((0,) * ahead + tuple(step)[: max(len(step) - 2, 0)])[-ahead:] if ahead else ()
    plane = np.asarray(
        data[tuple(min(at, size - 1) for at, size in zip(place, data.shape, strict=False))]
    )
    if layer.rgb and plane.shape[-1] == 4:
        plane = plane[..., :3]
    return plane


def pixel_size_um(scale: Sequence[float], units: Sequence[Any] | None) -> float | None:
    """Edge of a pixel in µm from what a layer says; None without a unit, or if pixels are not square."""
    if units is None or len(scale) < 2 or float(scale[-2]) != float(scale[-1]):
        return None
    unit = units[-1]
    if not unit.is_compatible_with("um"):
        return None
    return float((float(scale[-1]) * unit).to("um").magnitude)
