"""Generated five-channel fields with truth, for experiments on consistency across channels.

Nuclei come from `tests.scenes`; a cell is what lies nearest to its nucleus, up to a radius of its own.
All channels draw the same cells, each with its own texture, so that what they share is the geometry:

- DNA: the nuclei, as `make_scene` draws them.
- ER: cytoplasm that fades with the distance from the nucleus, which is dark.
- RNA: nucleoli and an even cytoplasm.
- AGP: cell borders and a Golgi beside each nucleus.
- Mito: filaments in the cytoplasm.

Then come bleed-through between neighbouring channels, defocus, uneven illumination, gain and offset,
and noise.  A *plate* fixes its share of these (the batch effect); a field varies around it.
These are drawings, not a model of biology: they have exact truth and nothing else to offer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from tests.scenes import make_scene

__all__ = ["CHANNELS", "ChannelScene", "make_channel_scene"]

CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")

Floats = npt.NDArray[np.float64]

_LIGHT = 700.0  # counts of bright structures over the background


@dataclass(frozen=True, eq=False)
class ChannelScene:
    """A field of `CHANNELS` with its truth.

    `planes` is (5, H, W) uint16; `nuclei` and `cells` are (H, W) uint32 with the same number for a cell
    and its nucleus.
    """

    planes: npt.NDArray[np.uint16]
    nuclei: npt.NDArray[np.uint32]
    cells: npt.NDArray[np.uint32]
    pixel_size_um: float


def make_channel_scene(
    *, size_px: int = 256, seed: int = 0, plate: int = 0, num_cells: int | None = None
) -> ChannelScene:
    """Generate one field; the same arguments give the same field.

    Parameters
    ----------
    size_px : height and width
    seed : of the specimen and of what varies between fields of a plate
    plate : fields of one plate share the larger part of bleed-through, defocus, illumination and gain
    num_cells : as `tests.scenes.make_scene`
    """
    scene = make_scene(
        "fluorescence_nuclei",
        height_px=size_px,
        width_px=size_px,
        seed=seed,
        num_cells=num_cells,
        uneven=0,
        noise=0.3,
        debris=0,
    )
    rng = np.random.default_rng([seed, plate, 1])
    nuclei = scene.labels
    cells = _cells(nuclei, rng)
    dna = np.clip(scene.image.astype(float) - np.percentile(scene.image, 5), 0, None)
    light = np.stack([dna / max(np.percentile(dna, 99.5), 1.0), *_cytoplasm(nuclei, cells, rng)])
    seen = _microscope(light, np.random.default_rng([plate, 2]), rng)
    return ChannelScene(seen, nuclei, cells, scene.pixel_size_um)


def _cells(nuclei: npt.NDArray[np.uint32], rng: np.random.Generator) -> npt.NDArray[np.uint32]:
    """Each nucleus with the pixels nearest to it, up to 6 to 16 px away."""
    distance, nearest = ndimage.distance_transform_edt(nuclei == 0, return_indices=True)
    owner = nuclei[tuple(nearest)]
    reach = rng.uniform(6, 16, int(nuclei.max(initial=0)) + 1)
    wobble = 1 + 0.25 * _smooth(rng, nuclei.shape, 5)
    return np.where(distance <= reach[owner] * wobble, owner, 0).astype(np.uint32)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> Floats:
    """Smooth noise with mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _cytoplasm(
    nuclei: npt.NDArray[np.uint32], cells: npt.NDArray[np.uint32], rng: np.random.Generator
) -> list[Floats]:
    """ER, RNA, AGP and Mito as light, about 0 to 1."""
    shape, count = nuclei.shape, int(nuclei.max(initial=0)) + 1
    inside, body = nuclei > 0, cells > 0
    cytoplasm = body & ~inside
    from_nucleus = ndimage.distance_transform_edt(~inside)
    bright = np.exp(0.3 * rng.standard_normal((4, count)))[:, cells]  # level of each cell

    er = np.where(cytoplasm, np.exp(-from_nucleus / 9), 0.12 * inside)
    er = er * (1 + 0.25 * _smooth(rng, shape, 1.2))
    nucleoli = inside * np.clip(_smooth(rng, shape, 2.0) - 1.0, 0, 1.2)
    rna = 0.45 * cytoplasm + 0.2 * inside + 0.9 * nucleoli
    rna = rna * (1 + 0.15 * _smooth(rng, shape, 1.5))
    edge = ndimage.grey_dilation(cells, size=3) != ndimage.grey_erosion(cells, size=3)
    from_edge = ndimage.distance_transform_edt(~edge)
    golgi = cytoplasm * (from_nucleus < 6) * np.clip(_smooth(rng, shape, 3.0) - 0.8, 0, 1.5)
    agp = body * (0.8 * np.exp(-from_edge / 1.5) + 0.15) + 0.7 * golgi
    fine = _smooth(rng, shape, 1.0) - 0.6 * _smooth(rng, shape, 2.5)
    mito = cytoplasm * np.clip(fine, 0, 2.0) * 0.6 + 0.05 * body
    return [level * part for level, part in zip(bright, (er, rna, agp, mito), strict=True)]


def _microscope(
    light: Floats, plate: np.random.Generator, field: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Bleed-through, defocus, illumination, gain, offset and noise of `light` (C, H, W)."""
    channels, height, width = light.shape
    leaks = plate.uniform(0, 0.12, channels)  # from the channel before
    light = light + leaks[:, None, None] * np.roll(light, 1, axis=0)
    blur = plate.uniform(0.6, 1.4, channels) + np.abs(0.25 * field.standard_normal(channels))
    gain = np.exp(plate.normal(0, 0.5, channels) + field.normal(0, 0.15, channels))
    offset = plate.uniform(90, 400, channels)
    slope = plate.uniform(-0.25, 0.25, (channels, 2)) + field.normal(0, 0.05, (channels, 2))
    row, column = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    planes = []
    for index, plane in enumerate(light):
        seen = ndimage.gaussian_filter(plane, blur[index])
        seen = (seen + 0.06) * (1 + slope[index, 0] * row + slope[index, 1] * column)
        counts = _LIGHT * gain[index] * seen
        counts += np.sqrt(np.clip(counts, 0, None)) * field.standard_normal(plane.shape)
        counts += offset[index] + 6 * field.standard_normal(plane.shape)
        planes.append(np.clip(np.rint(counts), 0, 65535).astype(np.uint16))
    return np.stack(planes)
