"""Generated microscopy scenes with truth: images that look like fluorescence and phase contrast.

A scene is drawn in the order in which a microscope makes it: a specimen (cells with outlines and
texture), optics (blur, haze, halo), illumination, camera.  The labels come from the specimen, never
from the image, so they are exact.  Everything is a function of the seed.

Fluorescence.  A nucleus is a closed curve around its centre (an ellipse with a few harmonics, bent
along its long axis), filled with a dome of light, chromatin texture and nucleoli.  Light of nuclei
that overlap adds up.  The optics are a Gaussian point spread function plus two broad Gaussians of
haze; the camera adds shot noise, read noise, an offset and a few hot pixels.  The defaults follow
16-bit fields of U2OS nuclei (BBBC039; Caicedo et al., Cytometry A 95, 952, 2019): an offset near
115 counts, background near 160, nuclei between 300 and 1,000.

Phase contrast.  A cell is a map of phase delays: lamella, body, nucleus, nucleoli, granules.  The
image is the intensity behind a Zernike phase plate that dims and turns the light it lets through
undiffracted.  Because a real plate also catches light that is diffracted a little, it acts on a
local mean of the wave, not on its constant part; that alone gives the bright halo around cells, the
shade-off inside large ones and the bright ring around round ones (Yin, Kanade and Chen, Medical
Image Analysis 16, 1047, 2012, eq. 2-8).

Where two cells overlap, a pixel belongs to the cell in which it lies deeper (the greater distance
to that cell's own outline; a tie stays with the cell drawn first).  A cell gives up at most a tenth
of itself that way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

__all__ = ["SCENE_KINDS", "Scene", "make_scene"]

SCENE_KINDS = ("fluorescence_nuclei", "fluorescence_dim", "phase_contrast", "empty")

FloatImage = npt.NDArray[np.float64]
BoolImage = npt.NDArray[np.bool_]

_FOUR_NEIGHBOURS = ndimage.generate_binary_structure(2, 1)
_MAX_SHARED_FRACTION = 0.1  # of the smaller cell, given up to a neighbour
_SHAPES_IN_A_ROW = 100  # that find no place before the image counts as full
_PLACES_PER_SHAPE = 12


@dataclass(frozen=True, eq=False)
class Scene:
    """A generated image with its truth.

    Attributes
    ----------
    image : (H, W) uint16 or uint8 ndarray
        Camera counts (fluorescence and empty) or 8-bit gray (phase contrast).
    labels : (H, W) uint32 ndarray
        0 background, cells 1..n without gaps; every cell is one 4-connected piece.
    kind : str
        One of `SCENE_KINDS`.
    pixel_size_um : float
        Side of a pixel in micrometres.
    """

    image: npt.NDArray[np.uint16] | npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint32]
    kind: str
    pixel_size_um: float

    @property
    def num_cells(self) -> int:
        """Number of cells in the scene."""
        return int(self.labels.max(initial=0))


@dataclass(frozen=True)
class _Look:
    """Typical values of one kind, at its own pixel size."""

    pixel_size_um: float
    diameter_px: float  # of a cell of typical area, as a disc
    cells_per_megapixel: float
    touching: float
    mitotic: float


_LOOKS = {
    "fluorescence_nuclei": _Look(0.65, 28.5, 330.0, 0.35, 0.03),
    "fluorescence_dim": _Look(0.33, 46.0, 60.0, 0.2, 0.0),
    "phase_contrast": _Look(0.65, 46.0, 75.0, 0.3, 0.08),
    "empty": _Look(0.65, 27.0, 0.0, 0.0, 0.0),
}


@dataclass
class _Cell:
    """One cell on the canvas: a window and what is needed to draw it."""

    row: int  # of the window's first pixel, on the canvas
    col: int
    mask: BoolImage
    radius: FloatImage  # 0 at the centre, 1 on the outline
    form: str
    angle: float
    size_px: float  # diameter of the disc of the same area, before cutting
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def window(self) -> tuple[slice, slice]:
        h, w = self.mask.shape
        return slice(self.row, self.row + h), slice(self.col, self.col + w)


def make_scene(
    kind: str,
    *,
    height_px: int = 384,
    width_px: int = 512,
    num_cells: int | None = None,
    seed: int = 0,
    pixel_size_um: float | None = None,
    touching: float | None = None,
    mitotic: float | None = None,
    contrast: float = 1.0,
    haze: float = 1.0,
    uneven: float = 1.0,
    noise: float = 1.0,
    debris: float = 1.0,
) -> Scene:
    """Generate one microscopy image and its labels.

    Parameters
    ----------
    kind : {"fluorescence_nuclei", "fluorescence_dim", "phase_contrast", "empty"}
        Bright nuclei in 16-bit counts; few, large and faint nuclei in 16-bit counts; adherent cells in
        8-bit phase contrast; a fluorescence field without any cell.
    height_px, width_px : int
        Size of the image, at least 16.
    num_cells : int, optional
        How many cells the labels hold, cells cut by the border included; exact.  Default: a typical density
        for the kind.  0 gives a field of the same kind without cells; "empty" allows nothing else.
    seed : int
        Any integer >= 0.  The same arguments give the same scene.
    pixel_size_um : float, optional
        Side of a pixel.  Cells keep their size in micrometres, so a smaller pixel makes larger cells in
        pixels.  Default: 0.65 (fluorescence_nuclei, phase_contrast, empty), 0.33 (fluorescence_dim).
    touching : float in [0, 1], optional
        Share of cells that are put against another cell; the rest keep a gap of two pixels or more.
    mitotic : float in [0, 1], optional
        Share of dividing cells: bright plates and pairs of plates (fluorescence), rounded bright cells
        (phase contrast).
    contrast : float > 0
        Factor on the light, or the phase delay, of the cells.
    haze : float >= 0
        Factor on out-of-focus light (fluorescence) or on the halo around cells (phase contrast).
    uneven : float in [0, 2]
        Factor on the unevenness of the illumination; 0 is flat.
    noise : float >= 0
        Factor on the standard deviation of the camera's noise; 0 is a noiseless camera.
    debris : float >= 0
        Factor on the number of unlabelled specks, scratches and hot pixels ("empty" has hot pixels alone).

    Returns
    -------
    Scene
        `image` (H, W) uint16 or uint8, `labels` (H, W) uint32, the kind and the pixel size.  No cell is smaller
        than 6 % of the kind's typical area (and 9 pixels).  `contrast`, `haze`, `uneven`, `noise` and
        `debris` change the image alone, never the labels.

    Raises
    ------
    ValueError
        Unknown kind, a value out of range, or more cells than fit.
    """
    if kind not in SCENE_KINDS:
        raise ValueError(
            f"`kind` must be one of {', '.join(SCENE_KINDS)}, got {kind!r}: choose one of them."
        )
    look = _LOOKS[kind]
    height_px, width_px = _whole("height_px", height_px, 16), _whole("width_px", width_px, 16)
    seed = _whole("seed", seed, 0)
    pixel_size_um = look.pixel_size_um if pixel_size_um is None else float(pixel_size_um)
    if not (math.isfinite(pixel_size_um) and pixel_size_um > 0):
        raise ValueError(
            f"`pixel_size_um` must be a finite number > 0, got {pixel_size_um}: give micrometres."
        )
    touching = _within("touching", look.touching if touching is None else touching, 0.0, 1.0)
    mitotic = _within("mitotic", look.mitotic if mitotic is None else mitotic, 0.0, 1.0)
    contrast = _within("contrast", contrast, 1e-3, 100.0)
    haze = _within("haze", haze, 0.0, 100.0)
    uneven = _within("uneven", uneven, 0.0, 2.0)
    noise = _within("noise", noise, 0.0, 100.0)
    debris = _within("debris", debris, 0.0, 100.0)
    scale = look.pixel_size_um / pixel_size_um
    diameter_px = look.diameter_px * scale
    if diameter_px < 6.0:
        raise ValueError(
            f"`pixel_size_um` must leave cells of 6 pixels or more, got {pixel_size_um} (cells of "
            f"{diameter_px:.1f} pixels): use {look.diameter_px * look.pixel_size_um / 6.0:.2f} or less."
        )
    if num_cells is None:
        density = look.cells_per_megapixel / scale**2
        num_cells = round(density * height_px * width_px / 1e6)
    num_cells = _whole("num_cells", num_cells, 0)
    if kind == "empty" and num_cells:
        raise ValueError(
            f"`num_cells` must be 0 for an empty scene, got {num_cells}: choose another kind or leave it out."
        )

    # One stream per stage: a change of noise or optics leaves the cells where they are.
    streams = np.random.default_rng([seed, SCENE_KINDS.index(kind)]).spawn(3)
    margin_px = math.ceil(2.0 * diameter_px)
    inner = (slice(margin_px, margin_px + height_px), slice(margin_px, margin_px + width_px))
    canvas_shape = (height_px + 2 * margin_px, width_px + 2 * margin_px)
    draw = _PhaseShapes if kind == "phase_contrast" else _NucleusShapes
    placed = _place_cells(
        draw(streams[0], diameter_px, mitotic, large=kind == "fluorescence_dim"),
        rng=streams[0],
        canvas_shape=canvas_shape,
        inner=inner,
        num_cells=num_cells,
        touching=touching,
        min_area_px=max(9, round(0.06 * math.pi / 4 * diameter_px**2)),
    )
    labels_canvas, cells = placed
    if kind == "phase_contrast":
        image: FloatImage = _phase_image(
            labels_canvas, cells, streams[1], scale, contrast=contrast, halo=haze, debris=debris
        )[inner]
        image = image + 16.0 * uneven * (_illumination(image.shape, streams[2], 1.0) - 1.0)
        image = image + 1.8 * noise * streams[2].standard_normal(image.shape)
        pixels: npt.NDArray[np.uint16] | npt.NDArray[np.uint8]
        pixels = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    else:
        dim = kind == "fluorescence_dim"
        specks = 0.0 if kind == "empty" else debris
        light = _nuclei_light(canvas_shape, cells, streams[1], scale, dim=dim, debris=specks)
        light = contrast * _fluorescence_optics(light, scale, haze=haze, dim=dim)[inner]
        pixels = _camera(light, streams[2], uneven=uneven, noise=noise, debris=debris, dim=dim)
    labels = np.ascontiguousarray(labels_canvas[inner].astype(np.uint32))
    return Scene(pixels, labels, kind, pixel_size_um)


def _whole(name: str, value: int, least: int) -> int:
    """Check an integer argument; `least` is the smallest value allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer, got {value!r}: pass a whole number.")
    if value < least:
        raise ValueError(f"`{name}` must be >= {least}, got {value}: pass a larger number.")
    return int(value)


def _within(name: str, value: float, low: float, high: float) -> float:
    """Check a real argument against a closed range."""
    value = float(value)
    if not low <= value <= high:
        raise ValueError(
            f"`{name}` must lie in [{low:g}, {high:g}], got {value:g}: pass a value inside it."
        )
    return value


# ---------------------------------------------------------------------------------------------------
# Specimen: shapes and their places


class _NoiseBank:
    """Smooth periodic noise, drawn once; windows of it are taken at random places."""

    side = 256

    def __init__(self, rng: np.random.Generator, sigmas_px: Sequence[float]) -> None:
        self._fields = []
        for sigma_px in sigmas_px:
            noise = rng.standard_normal((self.side, self.side))
            smooth = ndimage.gaussian_filter(noise, sigma_px, mode="wrap")
            self._fields.append((smooth - smooth.mean()) / smooth.std())

    def window(self, rng: np.random.Generator, index: int, shape: tuple[int, int]) -> FloatImage:
        """Cut a window of unit-variance noise out of field `index`."""
        top, left = rng.integers(0, self.side, 2)
        rows = (top + np.arange(shape[0])) % self.side
        cols = (left + np.arange(shape[1])) % self.side
        return self._fields[index][np.ix_(rows, cols)]


class _NucleusShapes:
    """Draws nuclei: interphase (oval, bean, dented), metaphase and anaphase plates."""

    def __init__(
        self, rng: np.random.Generator, diameter_px: float, mitotic: float, *, large: bool
    ) -> None:
        self._diameter_px = diameter_px
        self._mitotic = mitotic
        self._spread = 0.12 if large else 0.15
        self._ragged = _NoiseBank(rng, [max(0.8, 0.06 * diameter_px)])

    def __call__(self, rng: np.random.Generator) -> _Cell:
        if rng.random() < self._mitotic:
            return self.plate(rng, rng.choice(["metaphase", "prometaphase", "anaphase"]))
        size_px = self._diameter_px * math.exp(self._spread * rng.standard_normal())
        elongation = 1.0 + 1.3 * rng.beta(1.8, 1.9)
        bend = rng.uniform(0.0, 0.1) if rng.random() < 0.75 else rng.uniform(0.12, 0.32)
        orders = np.arange(2, 7)
        lobed = 2.6 if rng.random() < 0.08 else 1.0
        amplitudes = lobed * 0.04 * rng.standard_normal(5) / (orders - 1.0) ** 0.9
        phases = rng.uniform(0.0, 2 * np.pi, 5)
        dent = rng.uniform(0.12, 0.3) if rng.random() < 0.1 else 0.0
        dent_at = rng.uniform(-np.pi, np.pi)
        angle = rng.uniform(0.0, 2 * np.pi)
        half = math.ceil(0.95 * size_px) + 2
        along, across = _turned_grid(half, angle, rng.uniform(-0.5, 0.5, 2))
        a, b = 0.5 * size_px * math.sqrt(elongation), 0.5 * size_px / math.sqrt(elongation)
        across = across + bend * (along**2 / a - a / 3)
        u, v = along / a, across / b
        theta = np.arctan2(v, u)
        outline = 1.0 + sum(
            float(amp) * np.cos(k * theta + p)
            for k, amp, p in zip(orders, amplitudes, phases, strict=True)
        )
        gap = np.angle(np.exp(1j * (theta - dent_at)))
        outline = outline * (1.0 - dent * np.exp(-((gap / 0.35) ** 2)))
        radius = np.hypot(u, v) / outline
        extra = {"power": rng.uniform(2.6, 6.0), "roughness": rng.uniform(0.7, 1.3)}
        return _Cell(0, 0, radius < 1.0, radius, "interphase", angle, size_px, extra)

    def plate(self, rng: np.random.Generator, form: str, angle: float | None = None) -> _Cell:
        """Draw condensed chromosomes: one plate, one ragged clump, or one half of a dividing pair."""
        size_px = self._diameter_px * math.exp(0.08 * rng.standard_normal())
        length, width = {
            "metaphase": (0.43, 0.2),
            "prometaphase": (0.38, 0.31),
            "anaphase": (0.38, 0.17),
        }[form]
        angle = rng.uniform(0.0, 2 * np.pi) if angle is None else angle
        half = math.ceil(0.55 * size_px) + 2
        along, across = _turned_grid(half, angle, rng.uniform(-0.5, 0.5, 2))
        u, v = along / (length * size_px), across / (width * size_px)
        ragged = self._ragged.window(rng, 0, along.shape)
        radius = (np.abs(u) ** 2.6 + np.abs(v) ** 2.6) ** (1 / 2.6) * (1.0 + 0.13 * ragged)
        extra = {"power": 3.0, "roughness": 1.8, "pair_px": 0.55 * size_px}
        mask = _largest_piece(radius < 1.0)
        return _Cell(0, 0, mask, radius, form, angle, size_px, extra)


class _PhaseShapes:
    """Draws adherent cells: spindles, stars, spread and compact bodies, rounded cells."""

    def __init__(
        self, rng: np.random.Generator, diameter_px: float, mitotic: float, *, large: bool
    ) -> None:
        del large
        self._diameter_px = diameter_px
        self._mitotic = mitotic
        wave = [0.32 * diameter_px, 0.12 * diameter_px, max(0.8, 0.045 * diameter_px)]
        self._warps = _NoiseBank(rng, wave)

    def __call__(self, rng: np.random.Generator) -> _Cell:
        unit = self._diameter_px
        if rng.random() < self._mitotic:
            size_px = unit * rng.uniform(0.48, 0.64)
            half = math.ceil(0.6 * size_px) + 2
            along, across = _turned_grid(half, 0.0, rng.uniform(-0.5, 0.5, 2))
            wobble = 1.0 + 0.03 * self._warps.window(rng, 1, along.shape)
            radius = np.hypot(along, across) / (0.5 * size_px) * wobble
            return _Cell(0, 0, _largest_piece(radius < 1.0), radius, "round", 0.0, size_px)
        form = str(rng.choice(["spindle", "star", "spread", "compact"], p=[0.3, 0.42, 0.14, 0.14]))
        size = math.exp(0.18 * rng.standard_normal())
        angle = rng.uniform(0.0, 2 * np.pi)
        if form == "spindle":
            body, squeeze, ragged = 0.24 * unit * size, 1.7, 0.6
            tips = np.array([0.0, np.pi]) + rng.normal(0.0, 0.25, 2)
            reach = unit * size * rng.uniform(0.8, 1.5, 2)
            if rng.random() < 0.4:
                tips = np.append(tips, rng.uniform(0.0, 2 * np.pi))
                reach = np.append(reach, unit * size * rng.uniform(0.4, 0.8))
            widths = rng.uniform(0.22, 0.45, len(tips))
        elif form == "star":
            body, squeeze, ragged = 0.25 * unit * size, rng.uniform(1.0, 1.5), 0.8
            count = int(rng.integers(3, 6))
            steps = rng.dirichlet(np.full(count, 6.0))
            tips = 2 * np.pi * np.cumsum(steps)
            reach = unit * size * np.exp(rng.uniform(-0.8, 0.3, count))
            widths = rng.uniform(0.25, 0.5, count)
        elif form == "spread":
            body, squeeze, ragged = 0.5 * unit * size, rng.uniform(1.0, 1.6), 1.0
            count = int(rng.integers(2, 5))
            tips = rng.uniform(0.0, 2 * np.pi, count)
            reach = unit * size * rng.uniform(0.65, 1.0, count)
            widths = rng.uniform(0.2, 0.6, count)
        else:
            body, squeeze, ragged = 0.34 * unit * size, rng.uniform(1.3, 2.0), 1.3
            count = int(rng.integers(1, 4))
            tips = rng.uniform(0.0, 2 * np.pi, count)
            reach = unit * size * rng.uniform(0.45, 0.7, count)
            widths = rng.uniform(0.15, 0.4, count)
        half = math.ceil(max(float(reach.max()), body * squeeze) * 1.15) + 3
        along, across = _turned_grid(half, angle, rng.uniform(-0.5, 0.5, 2))
        shape = along.shape
        # Arms bend and fray more than the body.
        far = np.minimum(np.hypot(along, across) / unit, 1.5)
        for index, share in ((0, 0.14 * far), (1, 0.02), (2, 0.011 * ragged * (0.5 + far))):
            along = along + unit * share * self._warps.window(rng, index, shape)
            across = across + unit * share * self._warps.window(rng, index, shape)
        theta = np.arctan2(across, along)
        outline = body / np.hypot(np.cos(theta) / squeeze, np.sin(theta) * squeeze**0.5)
        for tip, length, width in zip(tips, reach, widths, strict=True):
            gap = np.abs(np.angle(np.exp(1j * (theta - tip))))
            slim = 0.85 * width * math.sqrt(unit / max(length, 0.6 * unit))
            arm = 1.6 * length * np.exp(-((gap / slim) ** 0.75))
            outline = np.maximum(
                outline, np.minimum(np.hypot(outline, arm), max(1.12 * length, body))
            )
        radius = np.hypot(along, across) / outline
        mask = ndimage.gaussian_filter((radius < 1.0).astype(float), max(0.5, 0.02 * unit)) > 0.5
        extra = {"body_px": body, "squeeze": squeeze}
        return _Cell(0, 0, _largest_piece(mask), radius, form, angle, unit * size, extra)


def _turned_grid(
    half: int, angle: float, shift: npt.NDArray[np.float64]
) -> tuple[FloatImage, FloatImage]:
    """Coordinates along and across a direction, on a square window of side 2 half + 1."""
    row, col = np.mgrid[-half : half + 1, -half : half + 1].astype(float)
    row, col = row + shift[0], col + shift[1]
    return (
        col * math.cos(angle) + row * math.sin(angle),
        row * math.cos(angle) - col * math.sin(angle),
    )


def _largest_piece(mask: BoolImage) -> BoolImage:
    """Keep the largest 4-connected piece of a mask."""
    pieces, count = ndimage.label(mask, _FOUR_NEIGHBOURS)
    if count <= 1:
        return mask
    return pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])


def _is_one_piece(mask: BoolImage) -> bool:
    """Whether a mask is one 4-connected piece (an empty mask is not)."""
    return ndimage.label(mask, _FOUR_NEIGHBOURS)[1] == 1


def _place_cells(
    draw_shape: Callable[[np.random.Generator], _Cell],
    *,
    rng: np.random.Generator,
    canvas_shape: tuple[int, int],
    inner: tuple[slice, slice],
    num_cells: int,
    touching: float,
    min_area_px: int,
) -> tuple[npt.NDArray[np.int32], list[_Cell]]:
    """Put `num_cells` cells on a canvas; every one shows inside `inner` as one piece."""
    canvas = _Canvas(canvas_shape, inner, min_area_px)
    failed = 0
    while len(canvas.cells) < num_cells and failed < _SHAPES_IN_A_ROW:
        failed += 1
        cell = draw_shape(rng)
        if not cell.mask.any():
            continue
        want_contact = bool(canvas.cells) and rng.random() < touching
        for _ in range(_PLACES_PER_SHAPE):
            place = canvas.beside(rng, cell) if want_contact else canvas.anywhere(rng, cell)
            if place is not None and canvas.add(cell, place):
                break
        else:
            continue
        failed = 0
        if cell.form == "anaphase" and len(canvas.cells) < num_cells:
            assert isinstance(draw_shape, _NucleusShapes)
            twin = draw_shape.plate(rng, "anaphase", cell.angle + rng.normal(0.0, 0.15))
            step = cell.extra["pair_px"] * np.array([math.cos(cell.angle), -math.sin(cell.angle)])
            half_gap = (np.array(cell.mask.shape) - np.array(twin.mask.shape)) // 2
            place = np.array([cell.row, cell.col]) + half_gap + np.rint(step).astype(int)
            canvas.add(twin, (int(place[0]), int(place[1])))
    if len(canvas.cells) < num_cells:
        raise ValueError(
            f"`num_cells` must fit into the image, got {num_cells} and found room for "
            f"{len(canvas.cells)}: ask for fewer cells, a larger image or more `touching`."
        )
    return canvas.labels, canvas.cells


class _Canvas:
    """Labels of the cells placed so far, with the depth of each pixel in the cell that owns it."""

    gap_px = 2

    def __init__(
        self, shape: tuple[int, int], inner: tuple[slice, slice], min_area_px: int
    ) -> None:
        self.labels = np.zeros(shape, np.int32)
        self.cells: list[_Cell] = []
        self._near = np.zeros(shape, bool)  # within the gap of a cell
        self._depth = np.zeros(shape, np.float64)
        self._inner = inner
        self._min_area_px = min_area_px

    def anywhere(self, rng: np.random.Generator, cell: _Cell) -> tuple[int, int] | None:
        """A random place at which the cell keeps the gap to all others, or None."""
        h, w = cell.mask.shape
        rows, cols = self._inner
        reach = 0.3 * cell.size_px
        row = round(rng.uniform(rows.start - reach, rows.stop + reach)) - h // 2
        col = round(rng.uniform(cols.start - reach, cols.stop + reach)) - w // 2
        if not self._holds(row, col, cell):
            return None
        if (self._near[row : row + h, col : col + w] & cell.mask).any():
            return None
        return row, col

    def beside(self, rng: np.random.Generator, cell: _Cell) -> tuple[int, int] | None:
        """A place against a random cell: slide away from its centre until little is shared."""
        h, w = cell.mask.shape
        other = self.cells[int(rng.integers(len(self.cells)))]
        centre = np.array(
            [other.row + other.mask.shape[0] // 2, other.col + other.mask.shape[1] // 2]
        )
        angle = rng.uniform(0.0, 2 * np.pi)
        step = np.array([math.sin(angle), math.cos(angle)])
        allowed = rng.uniform(0.0, _MAX_SHARED_FRACTION) * cell.mask.sum()
        for distance in range(2, h + w + sum(other.mask.shape), 2):
            row, col = np.rint(centre + distance * step).astype(int) - (h // 2, w // 2)
            if not self._holds(row, col, cell):
                return None
            taken = self.labels[row : row + h, col : col + w][cell.mask] > 0
            if taken.sum() <= allowed:
                if not (self._near[row : row + h, col : col + w] & cell.mask).any():
                    return None
                return int(row), int(col)
        return None

    def add(self, cell: _Cell, place: tuple[int, int]) -> bool:
        """Paint the cell where it lies deeper than its neighbours; refuse what breaks a rule."""
        row, col = place
        if not self._holds(row, col, cell):
            return False
        h, w = cell.mask.shape
        window = (slice(row, row + h), slice(col, col + w))
        depth = ndimage.distance_transform_edt(np.pad(cell.mask, 1))[1:-1, 1:-1]
        wins = cell.mask & (depth > self._depth[window])
        shared = cell.mask & (self.labels[window] > 0)
        if shared.sum() > _MAX_SHARED_FRACTION * cell.mask.sum():
            return False
        number = len(self.cells) + 1
        region = self._region(window)
        after = self.labels[region].copy()
        after[window[0].start - region[0].start :, window[1].start - region[1].start :][:h, :w][
            wins
        ] = number
        shown = self._inner_part(region)
        for index in np.union1d(self.labels[window][shared], [number]):
            piece = after == index
            if not _is_one_piece(piece) or not _is_one_piece(piece[shown]):
                return False
            if piece[shown].sum() < self._min_area_px:
                return False
            whole = cell.mask if index == number else self.cells[index - 1].mask
            if piece.sum() < (1.0 - _MAX_SHARED_FRACTION) * whole.sum():
                return False
        self.labels[region] = after
        self._depth[window][wins] = depth[wins]
        near = ndimage.binary_dilation(np.pad(cell.mask, self.gap_px), iterations=self.gap_px)
        g = self.gap_px
        self._near[row - g : row + h + g, col - g : col + w + g] |= near
        cell.row, cell.col = int(row), int(col)
        self.cells.append(cell)
        return True

    def _holds(self, row: int, col: int, cell: _Cell) -> bool:
        """Whether the window, with the gap around it, lies on the canvas."""
        h, w = cell.mask.shape
        g = self.gap_px
        return (
            row >= g
            and col >= g
            and row + h + g <= self.labels.shape[0]
            and col + w + g <= self.labels.shape[1]
        )

    def _region(self, window: tuple[slice, slice]) -> tuple[slice, slice]:
        """The window grown so that it holds every cell it touches, whole."""
        indices = np.unique(self.labels[window])
        parts = [window, *(self.cells[i - 1].window for i in indices if i)]
        return (
            slice(min(p[0].start for p in parts), max(p[0].stop for p in parts)),
            slice(min(p[1].start for p in parts), max(p[1].stop for p in parts)),
        )

    def _inner_part(self, region: tuple[slice, slice]) -> tuple[slice, slice]:
        """The part of a region that lies in the image, in the region's own coordinates."""
        return tuple(  # type: ignore[return-value]
            slice(max(i.start - r.start, 0), max(i.stop - r.start, 0))
            for i, r in zip(self._inner, region, strict=True)
        )


# ---------------------------------------------------------------------------------------------------
# Fluorescence


def _unit_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_px: float) -> FloatImage:
    """Gaussian noise smoothed to `sigma_px`, mean 0, standard deviation 1."""
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), sigma_px, mode="reflect")
    return (smooth - smooth.mean()) / smooth.std()


def _nuclei_light(
    shape: tuple[int, int],
    cells: Sequence[_Cell],
    rng: np.random.Generator,
    scale: float,
    *,
    dim: bool,
    debris: float,
) -> FloatImage:
    """Light of the nuclei before the optics, in camera counts."""
    chromatin = _unit_noise(rng, shape, 0.9 * scale)
    chromatin += 0.5 * _unit_noise(rng, shape, 2.2 * scale)
    uneven = _unit_noise(rng, shape, 7.0 * scale)
    light = np.zeros(shape)
    level = 46.0 if dim else 620.0
    for cell in cells:
        here = cell.window
        # Annotators draw a nucleus where its light has fallen by half, a little inside its true end.
        inwards = np.clip(0.96 * cell.radius, 0.0, 1.0) ** cell.extra["power"]
        dome = np.sqrt(np.clip(1.0 - inwards, 0.0, 1.0))
        rough = cell.extra["roughness"]
        texture = 1.0 + 0.085 * rough * chromatin[here] + 0.06 * uneven[here]
        brightness = level * math.exp(0.22 * rng.standard_normal())
        if cell.form == "interphase":
            texture = texture * _nucleoli(cell, rng, scale)
        else:
            brightness *= {"metaphase": 2.3, "prometaphase": 1.7, "anaphase": 2.0}[cell.form]
        light[here] += brightness * dome * np.clip(texture, 0.2, None)
    # Fragments and dirt that carry dye; too small to count as cells.
    count = rng.poisson(debris * 18.0 * shape[0] * shape[1] / 4e5)
    for row, col in rng.uniform(0.0, 1.0, (count, 2)) * (np.array(shape) - 1):
        _add_spot(light, row, col, rng.uniform(0.5, 1.1) * scale, level * rng.uniform(0.1, 0.7))
    return light


def _nucleoli(cell: _Cell, rng: np.random.Generator, scale: float) -> FloatImage:
    """A factor below 1 where DNA is thin: one to four dark spots inside the nucleus."""
    factor = np.ones(cell.mask.shape)
    centre = np.array(cell.mask.shape) // 2
    for _ in range(int(rng.integers(0, 5))):
        row, col = centre + 0.22 * cell.size_px * rng.standard_normal(2)
        sigma = scale * rng.uniform(0.8, 1.9)
        _add_spot(factor, row, col, sigma, -rng.uniform(0.08, 0.3))
    return factor


def _add_spot(image: FloatImage, row: float, col: float, sigma_px: float, height: float) -> None:
    """Add a Gaussian spot in place; what lies outside the image is left out."""
    reach = math.ceil(3.5 * sigma_px)
    top, left = max(int(row) - reach, 0), max(int(col) - reach, 0)
    bottom, right = int(row) + reach + 1, int(col) + reach + 1
    part = image[top : max(bottom, 0), left : max(right, 0)]
    rows = np.arange(top, top + part.shape[0])[:, None] - row
    cols = np.arange(left, left + part.shape[1])[None, :] - col
    part += height * np.exp(-(rows**2 + cols**2) / (2 * sigma_px**2))


def _fluorescence_optics(light: FloatImage, scale: float, *, haze: float, dim: bool) -> FloatImage:
    """Point spread function and out-of-focus light."""
    sharp = ndimage.gaussian_filter(light, (1.4 if dim else 0.8) * scale)
    close = ndimage.gaussian_filter(light, 3.0 * scale)
    wide = ndimage.gaussian_filter(light, 24.0 * scale)
    return sharp + haze * (0.12 * close + 0.06 * wide)


def _illumination(shape: tuple[int, ...], rng: np.random.Generator, uneven: float) -> FloatImage:
    """Illumination around 1: a dome off the centre plus a slope, darkest in a corner."""
    row = np.linspace(-1.0, 1.0, shape[0])[:, None]
    col = np.linspace(-1.0, 1.0, shape[1])[None, :]
    at = rng.uniform(-0.4, 0.4, 2)
    slope = rng.uniform(-0.35, 0.35, 2)
    fall = (row - at[0]) ** 2 + (col - at[1]) ** 2
    bent = 0.5 * slope[0] * row * np.abs(row) + slope[1] * col
    dome = -0.2 * fall + 0.25 * bent
    return 1.0 + uneven * (dome - dome.max())


def _camera(
    light: FloatImage,
    rng: np.random.Generator,
    *,
    uneven: float,
    noise: float,
    debris: float,
    dim: bool,
) -> npt.NDArray[np.uint16]:
    """Camera counts of a light image: background, illumination, shot and read noise, hot pixels."""
    offset, background, counts_per_electron, read_noise = 112.0, 48.0, 0.4, 2.0
    if dim:
        offset, background = 118.0, 62.0
    seen = np.clip((background + light) * _illumination(light.shape, rng, uneven), 0.0, None)
    electrons = seen / counts_per_electron
    shot = (rng.poisson(electrons) - electrons) * counts_per_electron
    read = read_noise * rng.standard_normal(light.shape)
    columns = 0.5 * rng.standard_normal((1, light.shape[1]))
    counts = offset + seen + noise * (shot + read + columns)
    hot = rng.random(light.shape) < 8e-6 * debris
    counts = counts + hot * rng.exponential(400.0, light.shape)
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


# ---------------------------------------------------------------------------------------------------
# Phase contrast


def _phase_image(
    labels: npt.NDArray[np.int32],
    cells: Sequence[_Cell],
    rng: np.random.Generator,
    scale: float,
    *,
    contrast: float,
    halo: float,
    debris: float,
) -> FloatImage:
    """Gray values (about 125 on the background) behind the phase plate, before the camera."""
    shape = labels.shape
    phase = contrast * _cell_phase(labels, cells, rng, scale)
    phase += 0.009 * _unit_noise(rng, shape, 9.0 * scale)
    phase += 0.004 * _unit_noise(rng, shape, 2.2 * scale)
    _add_dirt(phase, rng, scale, debris)
    gray = 125.0 * _phase_plate(phase, scale, halo)
    gray += 2.0 * _unit_noise(rng, shape, 30.0 * scale)
    return gray


def _cell_phase(
    labels: npt.NDArray[np.int32], cells: Sequence[_Cell], rng: np.random.Generator, scale: float
) -> FloatImage:
    """Phase delay of the cells in radians."""
    shape = labels.shape
    phase = np.zeros(shape)
    fine = _unit_noise(rng, shape, 1.0 * scale)
    medium = _unit_noise(rng, shape, 2.5 * scale)
    coarse = _unit_noise(rng, shape, 8.0 * scale)
    for number, cell in enumerate(cells, start=1):
        here = cell.window
        mask = labels[here] == number
        depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        if cell.form == "round":
            ball = np.sqrt(np.clip(1.0 - np.clip(cell.radius, 0.0, 1.0) ** 2, 0.0, 1.0))
            height = rng.uniform(5.4, 7.4)
            grains = 0.2 * fine[here] + 0.3 * medium[here]
            phase[here] += mask * (height * ball + grains * ball)
            continue
        thick = {"spindle": 1.0, "star": 0.9, "spread": 0.5, "compact": 1.6}[cell.form]
        thick *= math.exp(0.25 * rng.standard_normal())
        # One flank is steeper than the other, and the steep one carries the brighter halo.
        side = rng.uniform(0.0, 2 * np.pi)
        rows, cols = (np.linspace(-1.0, 1.0, n) for n in mask.shape)
        flank = 1.0 + 0.8 * (math.sin(side) * rows[:, None] + math.cos(side) * cols[None, :])
        flank = np.clip(flank + 0.25 * coarse[here], 0.15, None)
        lamella = 0.2 * thick * flank * (1.0 - np.exp(-depth / (2.2 * scale)))
        rim = 0.12 * thick * np.exp(-(((depth - 1.5 * scale) / (1.0 * scale)) ** 2))
        rim = rim * np.clip(0.4 + 0.8 * medium[here], 0.0, 2.0)
        body = 0.1 * thick * np.exp(-(np.clip(cell.radius, 0.0, 3.0) ** 2) / 0.5)
        relative = depth / max(float(depth.max()), 1.0)
        grains = thick * (0.032 * fine[here] + 0.014 * medium[here]) * (0.5 + relative)
        one = lamella + rim + body + grains
        _add_organelles(one, mask, cell, relative, rng, scale, thick)
        phase[here] += mask * one
    return phase


def _add_organelles(
    phase: FloatImage,
    mask: BoolImage,
    cell: _Cell,
    relative: FloatImage,
    rng: np.random.Generator,
    scale: float,
    thick: float,
) -> None:
    """Nucleus with nucleoli, granules around it, now and then bright vesicles; in place."""
    inside = np.argwhere(relative > 0.72)
    if not len(inside):
        return
    at = inside[rng.integers(len(inside))].astype(float)
    rows, cols = np.indices(mask.shape, dtype=float)
    turn = cell.angle + rng.normal(0.0, 0.3)
    u = ((cols - at[1]) * math.cos(turn) + (rows - at[0]) * math.sin(turn)) / (11.0 * scale)
    v = ((rows - at[0]) * math.cos(turn) - (cols - at[1]) * math.sin(turn)) / (7.5 * scale)
    away = np.hypot(u, v)
    phase -= 0.1 * (away < 1.0) * (1.0 - away**4)
    phase += 0.1 * np.exp(-(((away - 1.0) * 7.5 * scale) ** 2) / (2 * (0.9 * scale) ** 2))
    for _ in range(int(rng.integers(1, 5))):
        row, col = at + 2.6 * scale * rng.standard_normal(2)
        _add_spot(phase, row, col, scale * rng.uniform(0.9, 1.5), rng.uniform(0.3, 0.5))
    for _ in range(int(rng.integers(15, 55))):
        row, col = at + 9.0 * scale * rng.standard_normal(2)
        _add_spot(phase, row, col, scale * rng.uniform(0.6, 0.9), rng.normal(0.08, 0.12))
    if rng.random() < 0.12:
        for _ in range(int(rng.integers(2, 9))):
            row, col = at + 7.0 * scale * rng.standard_normal(2)
            _add_spot(phase, row, col, scale * rng.uniform(0.9, 1.6), -rng.uniform(0.7, 1.6))


def _add_dirt(phase: FloatImage, rng: np.random.Generator, scale: float, debris: float) -> None:
    """Unlabelled specks, small clumps and scratches of the dish, in place."""
    shape = np.array(phase.shape)
    megapixels = phase.size / 1e6
    for row, col in rng.uniform(0.0, 1.0, (rng.poisson(200 * debris * megapixels), 2)) * (
        shape - 1
    ):
        height = rng.uniform(0.02, 0.25) if rng.random() < 0.96 else -rng.uniform(0.1, 0.4)
        _add_spot(phase, row, col, scale * rng.uniform(0.7, 1.7), height)
    for row, col in rng.uniform(0.0, 1.0, (rng.poisson(40 * debris * megapixels), 2)) * (shape - 1):
        for _ in range(int(rng.integers(4, 14))):
            dr, dc = 3.5 * scale * rng.standard_normal(2)
            _add_spot(
                phase, row + dr, col + dc, scale * rng.uniform(0.7, 1.2), rng.uniform(0.0, 0.2)
            )
    rows, cols = np.indices(phase.shape, dtype=float)
    for _ in range(rng.poisson(1.2 * debris * megapixels)):
        angle, at = rng.uniform(0.0, np.pi), rng.uniform(0.0, 1.0, 2) * shape
        away = (rows - at[0]) * math.cos(angle) - (cols - at[1]) * math.sin(angle)
        phase -= rng.uniform(0.03, 0.08) * np.exp(-(away**2) / (2 * (0.8 * scale) ** 2))


def _phase_plate(phase: FloatImage, scale: float, halo: float) -> FloatImage:
    """Intensity behind a positive phase plate, 1 on an empty background.

    The wave exp(i phase) is imaged by a slightly defocused lens; its local mean, which passes the
    plate's ring, is dimmed to 45 % of its amplitude and turned back by a quarter of a wave.
    """
    plate = 0.45
    size = [fft.next_fast_len(n + round(60 * scale)) for n in phase.shape]
    pad = [(0, s - n) for s, n in zip(size, phase.shape, strict=True)]
    wave = np.exp(1j * np.pad(phase, pad, mode="symmetric"))
    freq = np.fft.fftfreq(size[0])[:, None] ** 2 + np.fft.fftfreq(size[1])[None, :] ** 2
    freq = freq * scale**2
    lens = np.exp(-2 * np.pi**2 * 0.62**2 * freq + 1j * np.pi * 1.2 * freq)
    near, far = (np.exp(-2 * np.pi**2 * sigma**2 * freq) for sigma in (4.0, 13.0))
    low = 0.85 * near + 0.15 * far
    spectrum = fft.fft2(wave)
    whole = fft.ifft2(spectrum * lens)
    mean = fft.ifft2(spectrum * low)
    direct = spectrum[0, 0] / wave.size
    mean = direct + halo * (mean - direct)
    seen = np.abs(whole - mean - 1j * plate * mean) ** 2 / plate**2
    return seen[: phase.shape[0], : phase.shape[1]]
