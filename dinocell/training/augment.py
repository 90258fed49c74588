"""Random crops: first draw the parameters, then apply them.

Labels are warped (nearest neighbour) and the distance map is computed afterwards, with a margin
around the crop, so that a cell cut by the crop's edge keeps the values it has in the whole image.
"""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dinocell.training.config import AugmentConfig

cv2.setNumThreads(0)  # loader processes are the parallelism; OpenCV's own pool deadlocks after fork


_MAX_COVERED_SHARE = 0.1  # of a pasted cell that may lie on another one
# Median of cells over that of what lies around them: in dsb2018/val at least 9, in stained tissue and phase
# contrast at most 1.
_BRIGHT_RATIO = 1.5


@dataclass(frozen=True)
class CropParameters:
    """One draw: where the crop lies, how it is turned, and what happens to its intensities.

    `centre` is (row, column) in the source image in px; `scale` > 1 enlarges; `angle_rad` turns
    counter-clockwise.  `noise_seed` seeds the noise so that applying is repeatable.
    """

    centre: tuple[float, float]
    scale: float = 1.0
    angle_rad: float = 0.0
    flip: bool = False
    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise_std: float = 0.0
    blur_sigma_px: float = 0.0
    illumination: tuple[float, float] = (0.0, 0.0)
    invert: bool = False
    empty: bool = False
    noise_seed: int = 0
    dim: float = 1.0
    background: float = 0.0
    paste: bool = False


def draw_crop(
    rng: np.random.Generator, config: AugmentConfig, height: int, width: int, crop_px: int
) -> CropParameters:
    """Draw the parameters of one crop of an image of `height` × `width` px.

    Every number is drawn whatever the switches say, so that switching one augmentation off leaves
    the others as they were.
    """

    def log_uniform(bounds: tuple[float, float]) -> float:
        low, high = np.log(bounds)
        return float(np.exp(rng.uniform(low, high)))

    scale = log_uniform(config.scale)
    half = crop_px / (2 * scale)

    def position(length: int) -> float:
        share = rng.uniform()
        # Crops stay inside where they fit, so that reflected borders are no commoner than needed.
        return float(length / 2 if length <= 2 * half else half + share * (length - 2 * half))

    centre = (position(height), position(width))
    angle = float(rng.uniform(0, 2 * np.pi))
    flip = bool(rng.uniform() < 0.5)
    gamma = log_uniform(config.gamma)
    contrast = log_uniform(config.contrast)
    brightness = float(rng.uniform(-1, 1)) * config.brightness
    noise_std = float(rng.uniform()) * config.noise_std
    blur = float(rng.uniform()) * config.blur_sigma_px * float(rng.uniform() < 0.5)
    illumination = rng.uniform(-1, 1, size=2) * config.illumination
    invert = bool(rng.uniform() < config.invert_probability)
    empty = bool(rng.uniform() < config.empty_probability)
    noise_seed = int(rng.integers(2**31))
    dim = log_uniform(config.dim)
    is_dim = bool(rng.uniform() < 0.5)
    background = float(rng.uniform()) * config.background
    paste = bool(rng.uniform() < config.paste_probability)
    return CropParameters(
        centre=centre,
        scale=scale,
        angle_rad=angle if config.rotate else 0.0,
        flip=flip and config.flip,
        gamma=gamma,
        contrast=contrast,
        brightness=brightness,
        noise_std=noise_std,
        blur_sigma_px=blur,
        illumination=(float(illumination[0]), float(illumination[1])),
        invert=invert,
        empty=empty,
        noise_seed=noise_seed,
        dim=dim if is_dim else 1.0,
        background=background,
        paste=paste,
    )


def crop_image(
    image: NDArray[np.floating], parameters: CropParameters, crop_px: int
) -> NDArray[np.float32]:
    """(H, W) floats → (crop_px, crop_px) float32, bilinear, reflected beyond the border."""
    return _warp(image, parameters, crop_px, cv2.INTER_LINEAR)


def crop_labels(labels: NDArray, parameters: CropParameters, crop_px: int) -> NDArray[np.int32]:
    """(H, W) labels → (crop_px, crop_px) int32 by nearest neighbour, reflected beyond the border.

    Labels pass through float32 and must stay below 2**24.
    """
    return _warp(labels, parameters, crop_px, cv2.INTER_NEAREST).astype(np.int32)


def _warp(
    source: NDArray, parameters: CropParameters, crop_px: int, interpolation: int
) -> NDArray[np.float32]:
    matrix, size = _crop_to_source(parameters, crop_px), (crop_px, crop_px)
    settings: dict[str, Any] = {
        "flags": interpolation | cv2.WARP_INVERSE_MAP,
        "borderMode": cv2.BORDER_REFLECT_101,
    }
    warped = cv2.warpAffine(np.asarray(source, dtype=np.float32), matrix, size, **settings)
    return np.asarray(warped, dtype=np.float32)


def apply_intensity(image: NDArray[np.float32], parameters: CropParameters) -> NDArray[np.float32]:
    """Gamma, contrast, brightness, gradient, dimming, background, inversion, blur, noise; in [0, 1].

    A dimmed crop has as much less noise: the range of its image is set by something brighter.
    """
    out = np.clip(image, 0.0, 1.0)
    if parameters.gamma != 1.0:
        out = out**parameters.gamma
    mean = out.mean()
    out = (out - mean) * parameters.contrast + mean + parameters.brightness
    if any(parameters.illumination):
        rows = np.linspace(-0.5, 0.5, out.shape[0], dtype=np.float32)[:, None]
        columns = np.linspace(-0.5, 0.5, out.shape[1], dtype=np.float32)[None, :]
        gradient = parameters.illumination[0] * rows + parameters.illumination[1] * columns
        out = out * (1 + 2 * gradient)
    if parameters.dim != 1.0 or parameters.background > 0:
        out = np.maximum(out, 0.0) * parameters.dim + parameters.background
    if parameters.invert:
        out = 1.0 - out
    if parameters.blur_sigma_px > 0.1:
        out = cv2.GaussianBlur(
            out.astype(np.float32), (0, 0), parameters.blur_sigma_px, borderType=cv2.BORDER_REFLECT
        )
    if parameters.noise_std > 0:
        rng = np.random.default_rng(parameters.noise_seed)
        noise_std = parameters.noise_std * parameters.dim
        out = out + noise_std * rng.standard_normal(out.shape, dtype=np.float32)
    return np.clip(out, 0.0, 1.0).astype(np.float32)


def paste_cells(
    image: NDArray[np.float32],
    labels: NDArray[np.int32],
    other: NDArray[np.float32],
    other_labels: NDArray[np.int32],
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Lay the cells of another crop over one, where they hide next to nothing of its own cells.

    Images are (h, w) and the middles of their (H, W) labels.  Each pasted cell comes with 2 px of its
    surroundings, and the brighter of the two pixels stays, as fluorescence would show.  Returns a new
    image and new labels; or those given, where the other crop's cells do not stand out bright (stained
    tissue, phase contrast).
    """
    margin = (labels.shape[0] - image.shape[0]) // 2
    inner = slice(margin, margin + image.shape[0])
    inside = other_labels[inner, inner] > 0
    if not inside.any() or inside.all():
        return image, labels
    if np.median(other[inside]) < _BRIGHT_RATIO * np.median(other[~inside]):
        return image, labels
    area = np.bincount(other_labels.ravel())
    covered = np.bincount(other_labels[labels > 0], minlength=area.size)
    kept = covered <= _MAX_COVERED_SHARE * area
    kept[0] = False
    cells = kept[other_labels]
    joined = np.where(cells & (labels == 0), other_labels + labels.max(initial=0), labels)
    around = cv2.dilate(cells.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    pasted = np.where(around[inner, inner], np.maximum(image, other), image)
    return pasted.astype(np.float32), joined.astype(np.int32)


def gap_mask(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """(H, W) labels → pixels within two of which lie two different cells."""
    values = labels.astype(np.float32)
    kernel = np.ones((5, 5), np.uint8)
    largest = cv2.dilate(values, kernel)
    smallest = cv2.erode(np.where(labels > 0, values, np.float32(2**25)), kernel)  # above any label
    return (largest > 0) & (largest != smallest)


def empty_crop(parameters: CropParameters, crop_px: int) -> NDArray[np.float32]:
    """A field without cells as `normalize_intensity` shows it: noise, vignetting, faint haze.

    The noise bound of the normalisation leaves white noise a standard deviation of about 0.05
    (1 / `min_contrast_sigma`); blurred noise and haze come on top.
    """
    rng = np.random.default_rng(parameters.noise_seed)
    noise = rng.standard_normal((crop_px, crop_px), dtype=np.float32)
    sigma = rng.uniform(0.0, 1.5)
    if sigma > 0.3:
        noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), sigma), dtype=np.float32)
        noise /= noise.std() + 1e-6
    haze = rng.standard_normal((crop_px, crop_px), dtype=np.float32)
    haze = np.asarray(cv2.GaussianBlur(haze, (0, 0), crop_px / 6), dtype=np.float32)
    haze /= np.abs(haze).max() + 1e-6
    level, haze_level = rng.uniform(0.05, 0.3), rng.uniform(0.0, 0.15)
    out = level + rng.uniform(0.01, 0.08) * noise + haze_level * haze
    return np.clip(out, 0.0, 1.0).astype(np.float32)


def _crop_to_source(parameters: CropParameters, crop_px: int) -> NDArray[np.float64]:
    """2×3 matrix from crop (x, y) to source (x, y), pixel centres at integers (OpenCV's order)."""
    cosine, sine = np.cos(parameters.angle_rad), np.sin(parameters.angle_rad)
    mirror = -1.0 if parameters.flip else 1.0
    linear = np.array([[cosine * mirror, -sine], [sine * mirror, cosine]]) / parameters.scale
    middle = (crop_px - 1) / 2
    row, column = parameters.centre
    source = np.array([column - 0.5, row - 0.5])
    return np.column_stack([linear, source - linear @ np.array([middle, middle])])
