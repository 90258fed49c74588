"""Pictures of attention and of features, made beside the training (ours).

The training thread hands over a copy of the teacher's weights on the CPU; a background thread with
one core does the rest on a network of its own, so that neither mode nor random numbers nor gradients
of the training networks are touched.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3.cells.files import atomic_path

logger = logging.getLogger("dinov3")

_Rgb = Sequence[float]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
# Dark to bright in even steps of lightness, so that the map also reads in gray.
_RAMP = (
    (0.05, 0.03, 0.15), (0.35, 0.07, 0.45), (0.75, 0.22, 0.33), (0.97, 0.55, 0.18), (1, 1, 0.8),
)  # fmt: skip


def attention_picture(
    images: Tensor, attention: Tensor, patch_size: int, *, mean: _Rgb = _MEAN, std: _Rgb = _STD
) -> np.ndarray:
    """Each image beside the CLS token's attention to its patches, head by head.

    `images`: [B, 3, H, W], normalised by `mean` and `std`.  `attention`: [B, heads, T, T], or its
    CLS rows [B, heads, T]; the last N of T tokens are the patches, those before (CLS and storage
    tokens) are left out.  Returns uint8 (B h p, (1 + heads) w p, 3); each map is stretched to its
    own range.
    """
    h, w = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    rows = attention[:, :, 0] if attention.ndim == 4 else attention  # [B, heads, T]
    if rows.shape[-1] <= h * w:
        raise ValueError(
            f"`attention` must have CLS and {h * w} patches, got {rows.shape[-1]} tokens: give that of "
            f"images {tuple(images.shape[-2:])} with patches of {patch_size}"
        )
    maps = _stretched(rows[..., -h * w :].detach().float().unflatten(-1, (h, w)))
    colors = _ramp(_enlarged(maps, patch_size)).permute(0, 2, 1, 3, 4)  # [B, H, heads, W, 3]
    shown = _shown(images, patch_size, mean, std)[:, :, None]  # [B, H, 1, W, 3]
    return _to_bytes(torch.cat([shown, colors], dim=2).flatten(2, 3).flatten(0, 1))


def pca_colors(patches: Tensor) -> Tensor:
    """First three principal components of all patches together as red, green and blue.

    The sign of a component, which the decomposition leaves open, is the one with which its third
    moment over the patches is positive: it does not jump when features change a little.

    `patches`: [B, N, D], D at least 3.  Returns [B, N, 3] float32 in [0, 1], from the 1st to the
    99th percentile of each component; 0.5 throughout in a component that all patches share.
    """
    rows = patches.detach().flatten(0, 1).double()
    energy = rows.square().sum()
    rows = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    scores = rows @ vectors[:, -3:].flip(-1)  # [B N, 3]
    scores = torch.where((scores**3).sum(dim=0) < 0, -scores, scores)
    low, high = torch.from_numpy(np.quantile(scores.numpy(), [0.01, 0.99], axis=0))
    colors = ((scores - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    # Components that are rounding errors, of the features or of the others, would be coloured noise.
    flat = values[-3:].flip(-1) <= torch.maximum(1e-12 * values[-1], 1e-20 * energy)
    colors[:, flat] = 0.5
    return colors.float().unflatten(0, patches.shape[:2])


def pca_picture(
    images: Tensor, patches: Tensor, patch_size: int, *, mean: _Rgb = _MEAN, std: _Rgb = _STD
) -> np.ndarray:
    """Each image beside `pca_colors` of its patches.

    `images`: [B, 3, H, W], normalised by `mean` and `std`; `patches`: [B, N, D].  Returns uint8 (B
    h p, 2 w p, 3).
    """
    h, w = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    colors = pca_colors(patches).unflatten(1, (h, w)).permute(3, 0, 1, 2)  # [3, B, h, w]
    colors = _enlarged(colors, patch_size).permute(1, 2, 3, 0)  # [B, H, W, 3]
    shown = _shown(images, patch_size, mean, std)
    return _to_bytes(torch.cat([shown, colors], dim=2).flatten(0, 1))


@dataclass(eq=False)
class VisualLogger:
    """Draws at intervals in a thread of its own, and skips a picture while the one before is unfinished.

    The same images are drawn each time: the first that are handed in, kept in OUT/visuals/images.pt
    for the resumption of the run.
    """

    make_vit: Callable[[], nn.Module]  # of the teacher's architecture, on the CPU, with any weights
    output_dir: str | Path  # pictures go to OUT/visuals/attention_N.png and pca_N.png
    # called with (name → picture, iteration), in the background thread
    on_pictures: Callable[[dict[str, np.ndarray], int], None] | None = None
    _: KW_ONLY
    # mean, std: the normalisation of the images, for showing them
    mean: _Rgb = _MEAN
    std: _Rgb = _STD

    def __post_init__(self) -> None:
        self._vit: nn.Module | None = None
        self._images: Tensor | None = None
        self._folder = Path(self.output_dir) / "visuals"
        self._colors = {"mean": tuple(self.mean), "std": tuple(self.std)}
        self._thread: threading.Thread | None = None
        self.skipped = 0  # pictures left out because the one before was unfinished
        self.failed = 0  # pictures that could not be made

    @property
    def busy(self) -> bool:
        """Whether a picture is unfinished, so that `submit` would skip the next."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, state: Mapping[str, Tensor], images: Tensor, iteration: int) -> bool:
        """Draw from a copy of the teacher's weights; returns at once.

        `state`: state dict of the backbone, not changed any more (`full_state_dict` gives a copy).
        `images`: [B, 3, H, W] on any device; only those of the first call count.  Returns whether
        the drawing was started.
        """
        if self.busy:
            self.skipped += 1
            return False
        try:
            if self._images is None:
                self._images = self._fixed_images(images)
            if self._vit is None:
                # Here and not in the thread: making a network draws random numbers.
                with torch.random.fork_rng(devices=[]):
                    self._vit = self.make_vit().eval().requires_grad_(False)
        except Exception:
            self._fail(iteration)
            return False
        self._thread = threading.Thread(
            target=self._draw, args=(dict(state), iteration), daemon=True, name="visuals"
        )
        self._thread.start()
        return True

    def close(self, timeout_s: float = 60.0) -> bool:
        """Wait at most `timeout_s` for the unfinished picture; returns whether none is left."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self.busy:
            logger.warning("A picture was not finished within %g s and is left out", timeout_s)
        if self.skipped:
            logger.info("%d pictures were skipped: the one before was unfinished", self.skipped)
        return not self.busy

    def _fail(self, iteration: int) -> None:
        # Pictures are a help; whatever goes wrong with them must not end a run.
        self.failed += 1
        logger.warning("Pictures of iteration %d could not be made", iteration, exc_info=True)

    def _fixed_images(self, images: Tensor) -> Tensor:
        path = self._folder / "images.pt"
        if path.is_file():
            return torch.load(path, map_location="cpu", weights_only=True)
        own = images.detach().to("cpu", torch.float32, copy=True)
        with atomic_path(path) as temporary:
            torch.save(own, temporary)
        return own

    def _draw(self, state: dict[str, Tensor], iteration: int) -> None:
        try:
            _use_one_core()
            vit: Any = self._vit
            images = self._images
            assert images is not None
            vit.load_state_dict(state)
            rows, patches = [], []
            with torch.no_grad():
                for image in images.split(1):  # T by T weights of one image at a time
                    rows.append(vit.get_last_selfattention(image)[:, :, 0])
                    patches.append(vit(image, is_training=True)["x_norm_patchtokens"])
            size = vit.patch_size
            pictures = {
                "attention": attention_picture(images, torch.cat(rows), size, **self._colors),
                "pca": pca_picture(images, torch.cat(patches), size, **self._colors),
            }
            for name, picture in pictures.items():
                with atomic_path(self._folder / f"{name}_{iteration:07d}.png") as temporary:
                    Image.fromarray(picture).save(temporary, format="PNG")
            if self.on_pictures is not None:
                self.on_pictures(pictures, iteration)
        except Exception:
            self._fail(iteration)


def _use_one_core() -> None:
    """Let torch use one core in this thread only."""
    usual = torch.get_num_threads()
    if usual == 1:
        return
    torch.set_num_threads(1)
    # The number is kept per thread, and once more for threads to come: that one is put back.
    restore = threading.Thread(target=torch.set_num_threads, args=(usual,))
    restore.start()
    restore.join()


def _stretched(x: Tensor) -> Tensor:
    """Each picture (last two axes) to [0, 1]; a flat one to 0."""
    low, high = x.amin(dim=(-2, -1), keepdim=True), x.amax(dim=(-2, -1), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


def _enlarged(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _ramp(x: Tensor) -> Tensor:
    """[...] in [0, 1] → colours [..., 3]."""
    ramp = torch.tensor(_RAMP, dtype=x.dtype)
    place = x.clamp(0, 1) * (len(_RAMP) - 1)
    below = place.floor().long().clamp_max(len(_RAMP) - 2)
    share = (place - below)[..., None]
    return ramp[below] * (1 - share) + ramp[below + 1] * share


def _shown(images: Tensor, patch: int, mean: _Rgb, std: _Rgb) -> Tensor:
    """Normalised images → colours [B, h p, w p, 3] in [0, 1]."""
    height, width = (math.floor(size / patch) * patch for size in images.shape[-2:])
    rgb = images[..., :height, :width].detach().float().permute(0, 2, 3, 1)
    return (rgb * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)


def _to_bytes(x: Tensor) -> np.ndarray:
    return (x * 255).round().to(torch.uint8).numpy()
