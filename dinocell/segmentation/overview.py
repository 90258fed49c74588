"""What an image file holds, and what `segment` would do with it."""

import os
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from dinocell.errors import DINOCellError
from dinocell.io import Image, Series, describe_image, read_image
from dinocell.io.planes import PlaneChoice
from dinocell.scratch import row_bands
from dinocell.segmentation.source import Source, source_of


@dataclass(frozen=True)
class Overview:
    """What a file holds; see `as_dict` for the keys.

    Attributes
    ----------
    scenes : tuple of Series
    image : the chosen plane, or None where none is chosen or it cannot be read
    verdict : what `segment` does with the file, or why it refuses it
    is_ready : whether it does anything
    """

    path: str
    format: str
    scenes: tuple[Series, ...]
    image: Image | None
    verdict: str
    is_ready: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON values: path, format, scenes, ranges (lowest and highest value by channel), segment, ready."""
        return {
            "path": self.path,
            "format": self.format,
            "scenes": [_scene_values(scene) for scene in self.scenes],
            "ranges": self.ranges(),
            "segment": self.verdict,
            "ready": self.is_ready,
        }

    def ranges(self) -> dict[str, list[float]]:
        """Lowest and highest value of each channel of the chosen plane."""
        if self.image is None:
            return {}
        pixels = self.image.pixels
        stack = pixels[..., None] if pixels.ndim == 2 else pixels
        names = self.image.channel_names or tuple(map(str, range(stack.shape[2])))
        found = {}
        for place, name in enumerate(names):
            bands = [stack[rows, :, place] for rows in row_bands(stack.shape)]
            low, high = min(band.min() for band in bands), max(band.max() for band in bands)
            found[name if names.count(name) == 1 else f"{name}_{place}"] = [low.item(), high.item()]
        return found

    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and its value."""
        first = self.scenes[0]
        found = [("format", self.format)]
        if len(self.scenes) > 1:
            found.append(("scenes", str(len(self.scenes))))
        if len({scene.shape for scene in self.scenes}) == 1:
            found.append(("axes", _axes_text(first)))
        else:
            found += [(f"scene {n}", _axes_text(scene)) for n, scene in enumerate(self.scenes)]
        if first.channel_names:
            named = [f"{place} {name}" for place, name in enumerate(first.channel_names)]
            found.append(("channels", ", ".join(named)))
        sizes = [
            f"{axis} {um:.4g}" for axis, um in zip("xyz", first.pixel_size_um, strict=True) if um
        ]
        found.append(("pixel size", f"{', '.join(sizes)} µm" if sizes else "not known"))
        found.append(("data type", _scene_values(first)["dtype"]))
        if first.acquired:
            found.append(("acquired", first.acquired))
        ranges = self.ranges()
        texts = {name: f"{low:g} to {high:g}" for name, (low, high) in ranges.items()}
        one = len(texts) == 1
        found += [("intensity" if one else f"intensity {n}", text) for n, text in texts.items()]
        found += [("note", note) for note in first.notes]
        found.append(("segment", self.verdict))
        return found


def inspect_image(
    path: str | os.PathLike[str], *, allow_mask: bool = False, **choice: Unpack[PlaneChoice]
) -> Overview:
    """What a file holds, the intensities of the chosen plane, and what `segment` would do with it.

    Parameters are those of `dinocell.segmentation.source.read_source`.  Raises UsageError, ImageFileError and
    MissingExtraError (the file itself cannot be read; that a plane must be chosen is no error).
    """
    contents = describe_image(path)
    image: Image | None = None
    try:
        image = read_image(path, **choice)
        source = source_of(image, choice.get("channels"), allow_mask=allow_mask)
        verdict, is_ready = _what_is_done(source), True
    except DINOCellError as error:
        verdict, is_ready = str(error), False
    return Overview(os.fspath(path), contents.format, contents.series, image, verdict, is_ready)


def _what_is_done(source: Source) -> str:
    if source.pixels.ndim == 2:
        return "ready: this plane is segmented"
    return f"ready: the mean of {', '.join(source.column_names)} is segmented, each normalised"


def _axes_text(scene: Series) -> str:
    height, width = scene.upright_shape
    return f"{scene.text()}{' × ' if scene.text() else ''}Y {height} × X {width}"


def _scene_values(scene: Series) -> dict[str, Any]:
    sizes = scene.sizes | dict(zip("YX", scene.upright_shape, strict=True))
    return {
        "name": scene.name,
        "axes": {("C" if axis == "S" else axis): size for axis, size in sizes.items()},
        "dtype": np.dtype(scene.dtype).name,
        "channels": list(scene.channel_names or ()),
        "pixel_size_um": dict(zip("xyz", scene.pixel_size_um, strict=True)),
        "acquired": scene.acquired,
        "notes": list(scene.notes),
    }
