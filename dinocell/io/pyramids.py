"""Write labels and images as pyramids, of which viewers read only what they show: OME-TIFF, OME-Zarr.

Each level has half of the edges of the one before.  Of labels it takes every second pixel, so that no
number is invented; of images the mean of two by two pixels.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np
from numpy.typing import NDArray

from dinocell.errors import ImageFileError
from dinocell.files import write_text_atomically, writing, writing_folder
from dinocell.io.ome_zarr import ZARR_LABELS, is_one_image
from dinocell.io.optional import library
from dinocell.io.read import describe_image
from dinocell.labels import as_labels

_TILE_EDGE_PX = 512
_CHUNK_EDGE_PX = 1024
_CLASSIC_BYTES = 2**32 - 2**25  # what a TIFF with 32-bit offsets holds beside its header
_CREATOR = {"name": "DINOCell"}
"""In the attributes of what `write_ome_zarr` has made, which it may therefore replace."""


def write_ome_tiff_labels(
    path: str | os.PathLike[str],
    labels: NDArray[Any],
    *,
    pixel_size_um: float | None = None,
    name: str = "",
) -> None:
    """Write a label image (H, W) as OME-TIFF: tiles in a pyramid, lossless, BigTIFF above 4 GB.

    Numbers are uint16 when no label is above 65,535, else uint32.  `name` becomes the name of the image;
    its channel is called ``labels``.

    Raises TypeError, ValueError (see `dinocell.labels.as_labels`; or an edge is 0); DINOCellError (the
    file cannot be written).
    """
    import tifffile

    full = _narrow(labels)
    levels = list(_levels(full, _TILE_EDGE_PX, mean=False))
    content = hashlib.sha256(full.data).hexdigest()
    metadata: dict[str, Any] = {
        "axes": "YX",
        "Name": name or "labels",
        "Channel": {"Name": ["labels"]},
        # of the content in place of tifffile's random one, so that the same labels give the same bytes
        "UUID": f"urn:uuid:{uuid5(NAMESPACE_OID, content)}",
    }
    if pixel_size_um is not None:
        for axis in "XY":
            metadata |= {f"PhysicalSize{axis}": pixel_size_um, f"PhysicalSize{axis}Unit": "µm"}
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "tile": (_TILE_EDGE_PX, _TILE_EDGE_PX),
        "compression": "zlib",
        "software": "DINOCell",
    }
    large = sum(level.nbytes for level in levels) > _CLASSIC_BYTES
    with (
        writing(path) as temporary,
        tifffile.TiffWriter(temporary, ome=True, bigtiff=large) as tif,
    ):
        tif.write(levels[0], subifds=len(levels) - 1, metadata=metadata, **options)
        for level in levels[1:]:
            tif.write(level, subfiletype=1, metadata=None, **options)


def write_ome_zarr(
    path: str | os.PathLike[str],
    labels: NDArray[Any],
    *,
    image: NDArray[Any] | None = None,
    pixel_size_um: float | None = None,
    channel_names: Sequence[str] = (),
    name: str = "",
    nuclei: NDArray[Any] | None = None,
) -> None:
    """Write an image with its labels as OME-Zarr 0.4, the version that most viewers read.

    Parameters
    ----------
    path : folder to make, by custom ``NAME.zarr``.  One that this function has made is replaced; any
        other folder with contents is refused.
    labels : (H, W) integer ndarray, becomes ``labels/cells``
    image : (H, W) or (H, W, C) ndarray, optional: the image in the folder.  Without one the labels take
        its place as well, because labels of OME-Zarr belong to an image.
    channel_names : one name per channel
    name : of the image
    nuclei : (H, W) integer ndarray, optional, becomes ``labels/nuclei``

    Raises MissingExtraError (without the extra `formats`); TypeError, ValueError (see
    `dinocell.labels.as_labels`; or an edge is 0); DINOCellError (the folder cannot be written).
    """
    zarr = library("zarr", "OME-Zarr images")
    full = _narrow(labels)
    with writing_folder(path, replaces=_is_ours) as temporary:
        planes = full[None] if image is None else _channels_first(image)
        _write_multiscales(
            zarr,
            temporary,
            planes,
            "cyx",
            name=name,
            pixel_size_um=pixel_size_um,
            attributes={
                "creator": _CREATOR,
                "omero": {"channels": _channels(planes, channel_names)},
            },
        )
        _write_labels(zarr, temporary / "labels", full, pixel_size_um, ZARR_LABELS)
        if nuclei is not None:
            _write_labels(zarr, temporary / "labels", _narrow(nuclei), pixel_size_um, "nuclei")


def add_labels_to_ome_zarr(
    path: str | os.PathLike[str],
    labels: NDArray[Any],
    *,
    pixel_size_um: float | None = None,
    name: str = ZARR_LABELS,
    overwrite: bool = False,
) -> None:
    """Add a label image to an OME-Zarr image that exists, as ``labels/NAME``.

    The image itself is not changed, but for consolidated metadata, which are brought up to date.  Its
    version of Zarr is kept (OME-Zarr 0.4 or 0.5), and its pixel size, where it states one, is that of
    the labels in place of `pixel_size_um`: else viewers would show them at another place.

    Raises MissingExtraError (without the extra `formats`); ImageFileError (there is no such image, it has
    another size than the labels, or it has labels of that name and not `overwrite`); DINOCellError (the
    folder cannot be written).
    """
    zarr = library("zarr", "OME-Zarr images")
    folder = Path(path)
    if not is_one_image(folder):
        raise ImageFileError(
            f"'{path}' must be one OME-Zarr image, to which labels can be added: name its folder"
        )
    (about,) = describe_image(folder).series
    size = (about.sizes["Y"], about.sizes["X"])
    if size != np.shape(labels):
        raise ImageFileError(
            f"Labels must have the size of their image, got {np.shape(labels)} for {size} px of '{path}': "
            "name the image that they belong to"
        )
    pixel_size_um = pixel_size_um if about.edge_um is None else about.edge_um
    target = folder / "labels" / name
    if target.exists() and not overwrite:
        raise ImageFileError(f"'{path}' has labels named '{name}': set `overwrite` to replace them")
    version = 3 if (folder / "zarr.json").is_file() else 2
    _write_labels(zarr, folder / "labels", _narrow(labels), pixel_size_um, name, version)
    _consolidate_again(zarr, folder / "labels", version)


def _consolidate_again(zarr: Any, folder: Path, version: int) -> None:
    """Bring up to date the consolidated metadata that a group and those above it have.

    Programs that find these do not look further: they would not see new labels.
    """
    for group in (folder, *folder.absolute().parents):
        file = group / (".zgroup" if version == 2 else "zarr.json")
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8")
        if (group / ".zmetadata").is_file() or json.loads(text).get("consolidated_metadata"):
            with warnings.catch_warnings(action="ignore"):  # Zarr 3 does not specify them yet
                zarr.consolidate_metadata(str(group), zarr_format=version)


def _narrow(labels: NDArray[Any]) -> NDArray[Any]:
    labels = as_labels(labels)
    if labels.size == 0:
        raise ValueError(
            f"`labels` must have at least one pixel, got shape {labels.shape}: give the whole array"
        )
    fits = labels.max() <= np.iinfo(np.uint16).max
    return labels.astype(np.uint16) if fits else labels


def _channels_first(image: NDArray[Any]) -> NDArray[Any]:
    image = image[..., None] if image.ndim == 2 else image
    image = image.astype(np.uint8) if image.dtype == np.bool_ else image
    return np.moveaxis(image, -1, 0)


def _levels(full: NDArray[Any], edge_px: int, *, mean: bool) -> Iterator[NDArray[Any]]:
    """The array (..., H, W) and its halves, until one fits into a tile."""
    yield full
    while max(full.shape[-2:]) > edge_px:
        full = _mean_of_four(full) if mean else np.ascontiguousarray(full[..., ::2, ::2])
        yield full


def _mean_of_four(pixels: NDArray[Any]) -> NDArray[Any]:
    """Mean of two by two pixels in the data type of the image; an odd edge repeats its last pixel."""
    odd = [(0, 0)] * (pixels.ndim - 2) + [(0, n % 2) for n in pixels.shape[-2:]]
    padded = np.pad(pixels, odd, mode="edge")
    height, width = (n // 2 for n in padded.shape[-2:])
    mean = padded.reshape(*padded.shape[:-2], height, 2, width, 2).mean(axis=(-3, -1))
    return (mean if pixels.dtype.kind == "f" else np.rint(mean)).astype(pixels.dtype)


def _channels(planes: NDArray[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """What viewers need to show each channel: its name, gray, and its range of values."""
    channels = []
    for number, plane in enumerate(planes):
        low, high = float(plane.min()), float(plane.max())
        channels.append(
            {
                "label": names[number] if names else str(number),
                "color": "FFFFFF",
                "active": True,
                "window": {"min": low, "start": low, "end": high, "max": high},
            }
        )
    return channels


def _write_multiscales(
    zarr: Any,
    folder: Path,
    full: NDArray[Any],
    axes: str,
    *,
    name: str,
    pixel_size_um: float | None,
    attributes: dict[str, Any],
    version: int = 2,
) -> None:
    """One group of OME-Zarr with the arrays of a pyramid in it."""
    ome_version = "0.4" if version == 2 else "0.5"
    described: list[dict[str, Any]] = []
    for axis in axes:
        described.append({"name": axis, "type": "channel" if axis == "c" else "space"})
        if axis != "c" and pixel_size_um is not None:
            described[-1]["unit"] = "micrometer"
    datasets = []
    for number, level in enumerate(
        _levels(full, _CHUNK_EDGE_PX, mean="image-label" not in attributes)
    ):
        chunk = [
            1 if axis == "c" else min(_CHUNK_EDGE_PX, n)
            for axis, n in zip(axes, level.shape, strict=True)
        ]
        separated = {"dimension_names": list(axes)} if version == 3 else {
            "chunk_key_encoding": {"name": "v2", "separator": "/"}
        }  # fmt: skip
        array = zarr.create_array(
            str(folder / str(number)),
            shape=level.shape,
            chunks=tuple(chunk),
            dtype=level.dtype,
            fill_value=0,
            zarr_format=version,
            **separated,
        )
        array[...] = level
        edge = (pixel_size_um or 1.0) * 2**number
        scale = [1.0 if axis == "c" else edge for axis in axes]
        datasets.append(
            {
                "path": str(number),
                "coordinateTransformations": [{"type": "scale", "scale": scale}],
            }
        )
    image = {"axes": described, "datasets": datasets, "name": name or folder.name}
    if version == 2:
        image["version"] = ome_version
        content = {"multiscales": [image], **attributes}
    else:
        content = {"ome": {"version": ome_version, "multiscales": [image], **attributes}}
    _write_group(folder, content, version)


def _write_group(folder: Path, attributes: dict[str, Any], version: int) -> None:
    if version == 2:
        write_text_atomically(folder / ".zgroup", json.dumps({"zarr_format": 2}))
        write_text_atomically(folder / ".zattrs", json.dumps(attributes, indent=1))
        return
    content = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    write_text_atomically(folder / "zarr.json", json.dumps(content, indent=1))


def _write_labels(
    zarr: Any,
    home: Path,
    labels: NDArray[Any],
    pixel_size_um: float | None,
    name: str,
    version: int = 2,
) -> None:
    """The label image `name` in the group `home`, then the list of the names in it."""
    with writing_folder(home / name, replaces=lambda _: True) as temporary:
        about = {"image-label": {"version": "0.4", "source": {"image": "../../"}}}
        if version == 3:
            del about["image-label"]["version"]
        _write_multiscales(
            zarr,
            temporary,
            labels,
            "yx",
            name=name,
            pixel_size_um=pixel_size_um,
            attributes=about,
            version=version,
        )
    file = home / (".zattrs" if version == 2 else "zarr.json")
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    before = before if version == 2 else before.get("attributes", {})
    listed = before if version == 2 else {"version": "0.5"} | before.get("ome", {})
    listed |= {"labels": sorted({*listed.get("labels", ()), name})}
    _write_group(home, listed if version == 2 else before | {"ome": listed}, version)


def _is_ours(folder: Path) -> bool:
    try:
        content = json.loads((folder / ".zattrs").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("creator") == _CREATOR
