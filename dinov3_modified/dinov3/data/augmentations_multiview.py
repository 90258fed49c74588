"""Crops of multi-channel fields: views by channel (ours; docs/multiview.md).

One global crop is the mean of all channels, the other a random single channel of the same field; a
network that gives both the same features must find what the channels share: the cells.
Windows are cut at native scale, before anything is averaged or resized.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3.cells.checks import one_of
from dinov3.cells.fields import ChannelField
from dinov3.cells.photometrics import FluorescencePhotometrics, photometrics_from_config
from dinov3.cells.photometrics import photometrics_on_batch as photometrics_on_batch

STRATEGIES = ("multiview", "average", "single", "pairwise", "others")
_WINDOWS = ("overlapping", "same", "independent")
_LOCAL_VIEWS = ("random", "mean", "single")
_PHOTOMETRICS = ("worker", "device", "none")

# The keys of `crops` and `multiview` that are arguments of the same name.
_CROP_KEYS = (
    "global_crops_size", "local_crops_size", "local_crops_number", "gram_teacher_crops_size",
)  # fmt: skip
_VIEW_KEYS = (
    "strategy", "random_roles", "window", "min_overlap", "zoom", "pixel_size_um", "local_view",
    "local_inside", "min_foreground", "foreground_tries", "rotate", "turn_together",
)  # fmt: skip

Window = tuple[int, int, int, int]  # top, left, height, width
View = int | tuple[int, ...] | None  # a channel, the mean of some channels, or of all


@dataclass(kw_only=True, eq=False)
class DataAugmentationMultiView:
    """Two global and some local crops of a field, each a view of its channels."""

    # `multiview` (mean and one random channel), `average` (mean twice), `single` (two channels
    # drawn apart), `pairwise` (two different channels), `others` (one channel and the mean of the
    # others, which does not contain it)
    strategy: str = "multiview"
    global_crops_size: int = 224
    local_crops_size: int = 96
    local_crops_number: int = 8
    gram_teacher_crops_size: int | None = None
    random_roles: bool = True  # which global crop is which is drawn; else the first is the mean
    # of the two global crops: `same`, `overlapping` (by `min_overlap` of the area at least), or
    # `independent`
    window: str = "overlapping"
    min_overlap: float = 0.4
    zoom: Sequence[float] = (0.7, 1.4)  # source over crop pixels, drawn on a logarithmic scale
    # what a crop's pixel at zoom 1 shows, for fields whose pixel size is known; None: one pixel of
    # the field
    pixel_size_um: float | None = None
    local_view: str = "random"  # mean or channel, evenly; `mean`, `single`
    local_inside: bool = True  # local crops lie in the box around the global ones; else anywhere
    # min_foreground, foreground_tries: windows are drawn again, so often, until that share is
    # bright; the best of them counts
    min_foreground: float = 0.05
    foreground_tries: int = 8
    rotate: bool = True  # turn by multiples of 90° and mirror
    turn_together: bool = False  # both global crops alike: with `same`, one place at one token
    photometrics: FluorescencePhotometrics = field(default_factory=FluorescencePhotometrics)
    # `worker`; `device` leaves crops as gray [1, s, s] for `photometrics_on_batch`; `none`
    photometrics_on: str = "worker"
    mean: Any = (0.485, 0.456, 0.406)
    std: Any = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("strategy", self.strategy, STRATEGIES),
            ("window", self.window, _WINDOWS),
            ("local_view", self.local_view, _LOCAL_VIEWS),
            ("photometrics", self.photometrics_on, _PHOTOMETRICS),
        ):
            one_of(f"multiview.{name}", value, known)
        low, high = self.zoom = tuple(float(value) for value in self.zoom)
        if not 0 < low <= high:
            raise ValueError(
                f"`multiview.zoom` must be 0 < low <= high, got {low}, {high}: for example [0.5, 1.5]"
            )
        if not 0 <= self.min_overlap <= 1:
            raise ValueError(
                f"`multiview.min_overlap` must be 0 to 1, got {self.min_overlap}: 0.4 is usual"
            )
        self.mean = torch.tensor(list(self.mean))[:, None, None]
        self.std = torch.tensor(list(self.std))[:, None, None]

    # --- draws ---

    def draw_views(self, channels: int) -> tuple[View, View]:
        """Channels of the two global crops; None is the mean of all."""
        if self.strategy == "average":
            return None, None
        if self.strategy == "single":
            return random.randrange(channels), random.randrange(channels)
        if self.strategy == "pairwise":
            if channels == 1:
                return 0, 0
            first, second = random.sample(range(channels), 2)
            return first, second
        one = random.randrange(channels)
        views: list[View] = [None, one]
        if self.strategy == "others" and channels > 1:
            views[0] = tuple(index for index in range(channels) if index != one)
        if self.random_roles:
            random.shuffle(views)
        return views[0], views[1]

    def draw_window(self, field: ChannelField, crop_size: int, box: Window | None = None) -> Window:
        """A square window of random zoom and place, on cells if they are found."""
        height, width = field.planes.shape[1:]
        top, left, box_height, box_width = box or (0, 0, height, width)

        def draw() -> Window:
            edge = self._draw_edge(field, crop_size)
            # A box smaller than the window is covered by it as well as may be.
            y = random.randint(*_range(top, box_height, edge, height))
            x = random.randint(*_range(left, box_width, edge, width))
            return y, x, edge, edge

        return self._on_cells(field, draw)

    def _draw_edge(self, field: ChannelField, crop_size: int) -> int:
        """Pixels of the field along a crop's edge, at a zoom that is drawn."""
        native = 1.0  # pixels of the field per pixel of a crop at zoom 1
        if self.pixel_size_um is not None and field.pixel_size_um is not None:
            native = self.pixel_size_um / field.pixel_size_um
        zoom = math.exp(random.uniform(math.log(self.zoom[0]), math.log(self.zoom[1])))
        return max(min(round(crop_size * zoom * native), *field.planes.shape[1:]), 1)

    def _on_cells(self, field: ChannelField, draw: Callable[[], Window]) -> Window:
        """The first window with enough foreground, or the best of all tries."""
        tries: list[tuple[float, Window]] = []
        while len(tries) < max(self.foreground_tries, 1):
            window = draw()
            tries.append((field.foreground_share(*window), window))
            if tries[-1][0] >= self.min_foreground:
                break
        return max(tries, key=lambda one: one[0])[1]

    def draw_second_window(self, field: ChannelField, first: Window) -> Window:
        """The other global crop's window."""
        if self.window == "same":
            return first
        if self.window == "independent":
            return self.draw_window(field, self.global_crops_size)
        height, width = field.planes.shape[1:]

        def draw() -> Window:
            other = self._draw_edge(field, self.global_crops_size)
            return self._overlapping(first, other, height, width)

        return self._on_cells(field, draw)

    def _overlapping(self, first: Window, other: int, height: int, width: int) -> Window:
        """A window of the edge `other` that shares `min_overlap` of the smaller one's area."""
        top, left, edge, _ = first
        small = min(edge, other)
        common = math.ceil(small * math.sqrt(self.min_overlap))

        def place(start: int, room: int) -> int:
            first_place = max(start + common - other, 0)
            last_place = min(start + edge - common, room - other)
            return random.randint(first_place, max(first_place, last_place))

        y, x = place(top, height), place(left, width)
        return min(y, height - other), min(x, width - other), other, other

    # --- crops ---

    def cut(self, field: ChannelField, view: View, window: Window, size: int) -> np.ndarray:
        """A view's window, resized to (size, size) float32 in [0, 1]."""
        import cv2

        part = field.window(view, *window)
        if part.shape == (size, size):
            return part
        mode = cv2.INTER_AREA if window[2] > size else cv2.INTER_CUBIC
        return np.clip(cv2.resize(part, (size, size), interpolation=mode), 0, 1)

    def _turned(self, image: np.ndarray, symmetry: int) -> np.ndarray:
        """One of the eight symmetries of the square."""
        image = np.rot90(image, symmetry % 4)
        return np.ascontiguousarray(image[:, ::-1] if symmetry >= 4 else image)

    def _finished(self, crops: list[np.ndarray], *, plain: bool = False) -> list[Tensor]:
        """Gray crops of one size → tensors of the batch."""
        x = torch.from_numpy(np.stack(crops))[:, None]  # [n, 1, s, s]
        if self.photometrics_on == "device":
            return list(x)
        if self.photometrics_on == "worker" and not plain:
            # One call a crop: each has noise of its own.
            x = torch.cat(
                [self.photometrics.apply(one[None], self.photometrics.draw(1)) for one in x]
            )
        return list((x - self.mean) / self.std)  # the mean has three channels: [3, s, s]

    def __call__(self, field: ChannelField) -> dict[str, Any]:
        """A field → the crops of `DataAugmentationDINO`, float32 [3, s, s] ([1, s, s] in [0, 1] for
        photometrics on the device)."""
        views = self.draw_views(len(field.channels))
        first = self.draw_window(field, self.global_crops_size)
        windows = (first, self.draw_second_window(field, first))
        turns = [random.randrange(8) if self.rotate else 0 for _ in range(2)]
        if self.turn_together:
            turns[1] = turns[0]

        def crops(size: int) -> list[np.ndarray]:
            return [
                self._turned(self.cut(field, view, window, size), turn)
                for view, window, turn in zip(views, windows, turns, strict=True)
            ]

        global_crops = self._finished(crops(self.global_crops_size))
        output: dict[str, Any] = {
            "weak_flag": True,
            "global_crops": global_crops,
            "global_crops_teacher": global_crops,
            "offsets": (),
        }
        if self.gram_teacher_crops_size is not None:
            gram = crops(self.gram_teacher_crops_size)
            output["gram_teacher_crops"] = self._finished(gram, plain=True)
        box = _around(*windows) if self.local_inside else None
        local = []
        for _ in range(self.local_crops_number):
            view = self._local_view(len(field.channels))
            window = self.draw_window(field, self.local_crops_size, box)
            turn = random.randrange(8) if self.rotate else 0
            local.append(self._turned(self.cut(field, view, window, self.local_crops_size), turn))
        output["local_crops"] = self._finished(local)
        return output

    def _local_view(self, channels: int) -> View:
        if self.strategy == "average" or self.local_view == "mean":
            return None
        if self.local_view == "random" and self.strategy == "multiview" and random.random() < 0.5:
            return None
        return random.randrange(channels)


def build_multiview_augmentation(cfg: Any) -> DataAugmentationMultiView:
    """From the sections `multiview` and `crops` of a configuration."""
    view, crops = cfg.multiview, cfg.crops
    return DataAugmentationMultiView(
        **{name: crops[name] for name in _CROP_KEYS},
        **{name: view[name] for name in _VIEW_KEYS},
        photometrics=photometrics_from_config(cfg),
        photometrics_on=view.photometrics,
        mean=crops.rgb_mean,
        std=crops.rgb_std,
    )


def _range(start: int, length: int, edge: int, room: int) -> tuple[int, int]:
    """First and last place of a window of `edge` within start..start+length, and within the room."""
    first, last = start, start + length - edge
    if last < first:
        first, last = last, first
    first, last = max(first, 0), min(last, room - edge)
    return min(first, last), max(first, last)


def _around(first: Window, second: Window) -> Window:
    top, left = min(first[0], second[0]), min(first[1], second[1])
    bottom = max(first[0] + first[2], second[0] + second[2])
    right = max(first[1] + first[3], second[1] + second[3])
    return top, left, bottom - top, right - left
