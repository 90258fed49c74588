"""Image transforms, each in two halves: draw, then apply (matches `dinov3.data.transforms`).

Images are PIL images in RGB, uint8 arrays (H, W, 3), or uint8 tensors (3, H, W); tensors come out.
Parameters and statistics are upstream's, which used torchvision.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional

from dinov3.cells.checks import one_of

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
RESIZE_DEFAULT_SIZE = 256
CROP_DEFAULT_SIZE = 224


class InterpolationMode(Enum):
    """Resampling filters, by PIL's names; both linear ones look at all pixels when shrinking."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"

    @property
    def filter(self) -> Image.Resampling:
        return Image.Resampling[self.name]


def make_interpolation_mode(mode_str: str) -> InterpolationMode:
    """A filter by its name; ValueError for an unknown one."""
    known = {mode.value: mode for mode in InterpolationMode}
    one_of("interpolation", mode_str, known)
    return known[mode_str]


def to_pil(image: Any) -> Image.Image:
    """PIL image in RGB of a PIL image, an array (H, W[, 3]) or a tensor ([3,] H, W).

    Numbers are uint8, or floats in [0, 1], which are rounded to 8 bits.
    """
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy() if image.ndim == 3 else image.numpy()
    array = np.asarray(image)
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or array.min() < 0 or array.max() > 1:
            raise ValueError(
                f"An image must be uint8, or float in [0, 1], got {array.dtype} from {array.min()} to "
                f"{array.max()}: rescale it, or use multiview for raw 16-bit fields"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


@dataclass(eq=False)
class Compose:
    """One transform after the other."""

    transforms: Sequence[Callable[[Any], Any]]

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


@dataclass(eq=False)
class RandomResizedCrop:
    """A window of random area and aspect, resized (Szegedy et al. 2015, section 6)."""

    size: int  # edge of the result
    scale: Sequence[float] = (0.08, 1.0)  # area over the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, drawn on a logarithmic scale
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    def draw(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) of a window; after ten misfits the largest central one."""
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(10):
            area = height * width * random.uniform(*self.scale)
            aspect = math.exp(random.uniform(low, high))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        aspect = width / height
        w, h = width, height
        if aspect < self.ratio[0]:
            h = round(w / self.ratio[0])
        elif aspect > self.ratio[1]:
            w = round(h * self.ratio[1])
        return (height - h) // 2, (width - w) // 2, h, w

    def apply(self, image: Image.Image, window: tuple[int, int, int, int]) -> Image.Image:
        """Cut the window out and resize it."""
        top, left, height, width = window
        cut = image.crop((left, top, left + width, top + height))
        return cut.resize((self.size, self.size), self.interpolation.filter)

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.apply(image, self.draw(image.height, image.width))


@dataclass(eq=False)
class RandomHorizontalFlip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if random.random() < self.p else image


_ENHANCERS: dict[str, Any] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


class ColorJitter:
    """Brightness, contrast, saturation and hue by random factors, in random order.

    `brightness`, `contrast`, `saturation`: b draws a factor from [1 - b, 1 + b], at least 0; `hue`:
    h turns the hue by a share of the circle from [-h, h]; `p`: probability of any of it.
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.2,
        hue: float = 0.1,
        p: float = 0.8,
    ) -> None:
        scales = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: (max(0.0, 1 - value), 1 + value) for name, value in scales.items()}
        self.ranges["hue"] = (-hue, hue)
        self.p = p

    def draw(self) -> list[tuple[str, float]]:
        """Names and factors in the order they act; empty with probability 1 - p."""
        if random.random() >= self.p:
            return []
        names = list(self.ranges)
        random.shuffle(names)
        return [(name, random.uniform(*self.ranges[name])) for name in names]

    def apply(self, image: Image.Image, steps: Sequence[tuple[str, float]]) -> Image.Image:
        """Brightness scales values, contrast their distance to the mean gray, saturation the
        distance to the pixel's gray, hue turns the colour circle."""
        for name, value in steps:
            if name in _ENHANCERS:
                image = _ENHANCERS[name](image).enhance(value)
            else:
                hue, saturation, lightness = image.convert("HSV").split()
                turned = np.asarray(hue).astype(np.int16) + int(value * 255)
                hue = Image.fromarray((turned % 256).astype(np.uint8))
                image = Image.merge("HSV", (hue, saturation, lightness)).convert("RGB")
        return image

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.apply(image, self.draw())


@dataclass(eq=False)
class RandomGrayscale:
    """Luma in all three channels with probability `p`."""

    p: float = 0.2

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB") if random.random() < self.p else image


@dataclass(eq=False, kw_only=True)
class GaussianBlur:
    """Gaussian blur of a 9 x 9 window, reflected at the edges.

    `p`: probability of **no** blur.  Upstream hands 1 - p on, and the released weights were trained
    so (its issue 286).  `radius_min`, `radius_max`: range of the standard deviation in pixels.
    """

    p: float = 0.5
    radius_min: float = 0.1
    radius_max: float = 2.0

    def draw(self) -> float | None:
        """Standard deviation, None for no blur."""
        if random.random() >= 1 - self.p:
            return None
        return random.uniform(self.radius_min, self.radius_max)

    def apply(self, image: Image.Image, sigma: float | None) -> Image.Image:
        """Convolve each channel with the normalised kernel exp(-x² / 2 sigma²), x from -4 to 4."""
        if sigma is None:
            return image
        import cv2

        offsets = np.arange(-4, 5, dtype=np.float64)
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
        kernel /= kernel.sum()
        array = np.asarray(image).astype(np.float32)
        blurred = cv2.sepFilter2D(array, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
        return Image.fromarray(np.rint(blurred).clip(0, 255).astype(np.uint8))

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.apply(image, self.draw())


@dataclass(eq=False)
class RandomSolarize:
    """Invert values of at least `threshold` with probability `p`."""

    threshold: int = 128
    p: float = 0.2

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, self.threshold) if random.random() < self.p else image


class ToNormalizedTensor:
    """uint8 image → float32 [3, H, W], scaled to [0, 1], minus mean, over std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(list(mean), dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(list(std), dtype=torch.float32)[:, None, None]

    def __call__(self, image: Image.Image) -> Tensor:
        array = np.array(to_pil(image))
        tensor = torch.from_numpy(array).permute(2, 0, 1).float().div_(255)
        return tensor.sub_(self.mean).div_(self.std).contiguous()


@dataclass(eq=False)
class Resize:
    """Resize the shorter side (or the longer one, or both) to `size` pixels.

    torch does it, not PIL (1 or 2 grey levels apart), as upstream's evaluation did.
    """

    size: int
    square: bool = False  # both sides, whatever the aspect
    large_side: bool = False  # the longer side
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    def new_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the result for an image's."""
        if self.square:
            return self.size, self.size
        side = (max if self.large_side else min)(height, width)
        # The other side is cut to whole pixels.
        return self.size * height // side, self.size * width // side

    def __call__(self, image: Any) -> Image.Image:
        image = to_pil(image)
        old, new = (image.height, image.width), self.new_size(image.height, image.width)
        if new == old:
            return image
        if 0 in new:
            raise ValueError(
                f"A resized image must keep a pixel, got {old} to {new}: raise resize_size {self.size}"
            )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # [1, 3, H, W] uint8
        mode = self.interpolation
        smooth = mode is not InterpolationMode.NEAREST
        how: dict[str, Any] = {"align_corners": False, "antialias": True} if smooth else {}
        return to_pil(functional.interpolate(pixels, new, mode=mode.value, **how)[0])


@dataclass(eq=False)
class CenterCrop:
    """The central `size` x `size` pixels; smaller images are padded with black."""

    size: int

    def _first(self, edge: int) -> int:
        """First row or column; an odd pixel of padding goes to the end."""
        return round((edge - self.size) / 2) if edge >= self.size else -((self.size - edge) // 2)

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = self._first(image.width), self._first(image.height)
        return image.crop((left, top, left + self.size, top + self.size))


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> Callable[[Tensor], Tensor]:
    """Float tensor [3, H, W] minus mean, over std."""

    def normalize(tensor: Tensor) -> Tensor:
        center, scale = (tensor.new_tensor(list(v))[:, None, None] for v in (mean, std))
        return (tensor - center) / scale

    return normalize


def make_base_transform(
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD
) -> ToNormalizedTensor:
    """Image → normalised float32 tensor."""
    return ToNormalizedTensor(mean, std)


def make_classification_train_transform(
    *,
    crop_size: int = CROP_DEFAULT_SIZE,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Random window, random flip, normalised."""
    steps: list[Any] = [to_pil, RandomResizedCrop(crop_size, interpolation=interpolation)]
    if hflip_prob > 0:
        steps.append(RandomHorizontalFlip(hflip_prob))
    return Compose([*steps, make_base_transform(mean, std)])


def make_resize_transform(
    *,
    resize_size: int,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
) -> Resize:
    """See `Resize`; ValueError for square and large side at once."""
    if resize_square and resize_large_side:
        raise ValueError(
            "`resize_square` must be false with resize_large_side, got true: set one of them to false"
        )
    return Resize(resize_size, resize_square, resize_large_side, interpolation)


def make_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int | None = CROP_DEFAULT_SIZE,
    resize_square: bool = False,
    resize_large_side: bool = False,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """Resize, centre crop (None or 0: none), normalised."""
    sides = {"resize_square": resize_square, "resize_large_side": resize_large_side}
    resize = make_resize_transform(resize_size=resize_size, **sides, interpolation=interpolation)
    crop = [CenterCrop(crop_size)] if crop_size else []
    return Compose([resize, *crop, make_base_transform(mean, std)])


def make_classification_eval_transform(
    *,
    resize_size: int = RESIZE_DEFAULT_SIZE,
    crop_size: int = CROP_DEFAULT_SIZE,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Compose:
    """`make_eval_transform` with ImageNet's usual sizes."""
    return make_eval_transform(**locals())
