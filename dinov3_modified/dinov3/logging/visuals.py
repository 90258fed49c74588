"""Pictures of attention and of features, made beside the training (ours).

The training thread copies the teacher's weights to the CPU; a background thread with one core does
the rest on a network of its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["VisualLogger", "attention_picture", "pca_picture"]

logger = logging.getLogger("dinov3")


def attention_picture(images: Tensor, attention: Tensor, patch_size: int) -> np.ndarray:
    """Each image beside the CLS token's attention to its patches, head by head.

    Args:
        images: [B, 3, H, W].
        attention: [B, heads, T, T]; the last N of T tokens are the patches.

    Returns:
        uint8 (B H, (1 + heads) W, 3); each map is stretched to its own range.
    """
    height, width = images.shape[-2:]
    h, w = height // patch_size, width // patch_size
    maps = attention[:, :, 0, -h * w :].float().unflatten(-1, (h, w))
    maps = _stretched(maps).repeat_interleave(patch_size, -2).repeat_interleave(patch_size, -1)
    gray = _stretched(images[:, :, : h * patch_size, : w * patch_size].float().mean(dim=1))
    rows = torch.cat([gray[:, None], maps], dim=1)  # [B, 1 + heads, H, W]
    rows = rows.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return (rows * 255).byte()[..., None].expand(-1, -1, 3).numpy()


def pca_picture(images: Tensor, patches: Tensor, patch_size: int) -> np.ndarray:
    """Each image beside the first three principal components of all patches as red, green, blue.

    Args:
        patches: [B, N, D].

    Returns:
        uint8 (B H, 2 W, 3); components point where their largest loading is positive.
    """
    height, width = images.shape[-2:]
    h, w = height // patch_size, width // patch_size
    rows = patches.flatten(0, 1).double()
    rows = rows - rows.mean(dim=0)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    vectors = vectors[:, -3:].flip(-1)
    largest = vectors.abs().argmax(dim=0)
    vectors = vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()
    colors = (rows @ vectors).reshape(len(images), h, w, -1).permute(3, 0, 1, 2)  # [3, B, h, w]
    low, high = torch.quantile(colors.flatten(1), torch.tensor([0.01, 0.99]).double(), dim=1)
    colors = (colors - low[:, None, None, None]) / (high - low).clamp_min(1e-12)[
        :, None, None, None
    ]
    colors = colors.clamp(0, 1).permute(1, 2, 3, 0).float()
    colors = colors.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    gray = _stretched(images[:, :, : h * patch_size, : w * patch_size].float().mean(dim=1))
    gray = gray[..., None].expand(-1, -1, -1, 3)
    return (torch.cat([gray, colors], dim=2).flatten(0, 1) * 255).byte().numpy()


def _stretched(x: Tensor) -> Tensor:
    """Each picture (last two axes) to [0, 1]."""
    low, high = x.amin(dim=(-2, -1), keepdim=True), x.amax(dim=(-2, -1), keepdim=True)
    return (x - low) / (high - low).clamp_min(1e-12)


class VisualLogger:
    """Draws at intervals in a thread of its own; a picture that is still in work is not waited for.

    Args:
        make_vit: gives a network of the teacher's architecture on the CPU.
        output_dir: pictures go to OUT/visuals/attention_N.png and pca_N.png.
        on_pictures: called with (name → picture, iteration), in the background thread.

    Attributes:
        skipped: pictures left out because the one before was still in work.
    """

    def __init__(
        self,
        make_vit: Callable[[], nn.Module],
        output_dir: str | Path,
        on_pictures: Callable[[dict[str, np.ndarray], int], None] | None = None,
    ) -> None:
        self._make_vit = make_vit
        self._vit: nn.Module | None = None
        self._folder = Path(output_dir) / "visuals"
        self._on_pictures = on_pictures
        self._thread: threading.Thread | None = None
        self.skipped = 0

    def submit(self, state: Mapping[str, Tensor], images: Tensor, iteration: int) -> bool:
        """Draw from a copy of the teacher's weights.

        Args:
            state: state dict of the backbone, on the CPU, not changed any more.
            images: [B, 3, H, W].

        Returns:
            Whether it was begun.
        """
        if self._thread is not None and self._thread.is_alive():
            self.skipped += 1
            return False
        if self._vit is None:
            # Here and not in the thread: making a network draws from the generator of the training.
            with torch.random.fork_rng(devices=[]):
                self._vit = self._make_vit().eval()
        fixed = images.detach().float().cpu().clone()
        self._thread = threading.Thread(
            target=self._draw, args=(dict(state), fixed, iteration), daemon=True, name="visuals"
        )
        self._thread.start()
        return True

    def _draw(self, state: dict[str, Any], images: Tensor, iteration: int) -> None:
        try:
            vit: Any = self._vit
            vit.load_state_dict(state)
            with torch.no_grad():
                attention = vit.get_last_selfattention(images)
                patches = vit(images, is_training=True)["x_norm_patchtokens"]
            pictures = {
                "attention": attention_picture(images, attention, vit.patch_size),
                "pca": pca_picture(images, patches, vit.patch_size),
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures.items():
                _write_png(picture, self._folder / f"{name}_{iteration:07d}.png")
            if self._on_pictures is not None:
                self._on_pictures(pictures, iteration)
        except Exception:
            # Pictures are a help; whatever goes wrong with them must not end a run.
            logger.exception("pictures of iteration %d could not be made", iteration)

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait for the picture in work."""
        if self._thread is not None:
            self._thread.join(timeout_s)


def _write_png(picture: np.ndarray, path: Path) -> None:
    from PIL import Image

    part = path.with_suffix(".part")
    Image.fromarray(picture).save(part, format="PNG")
    os.replace(part, path)
