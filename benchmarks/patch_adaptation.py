"""How far each way of adapting a patch-16 embedding to patch 8 is from the patch-16 network.

A ViT-S of 12 blocks with random weights (LayerScale 0.5) looks at an image of 64 x 64 patches' worth
with a 1/f spectrum; its patch tokens at patch 8 are compared with those of the patch-16 network on the
image enlarged twice, by repetition, bilinearly and bicubically: relative difference (Frobenius).

    python benchmarks/patch_adaptation.py      # writes benchmarks/results/patch_adaptation.json
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

RESULT = Path(__file__).parent / "results" / "patch_adaptation.json"


def natural_image(edge: int, seed: int) -> torch.Tensor:
    """[1, 3, edge, edge] with amplitudes falling as 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(edge), np.fft.fftfreq(edge)))
    frequency[0, 0] = np.inf
    spectrum = rng.normal(size=(3, edge, edge)) + 1j * rng.normal(size=(3, edge, edge))
    image = np.fft.ifft2(spectrum / frequency).real
    return torch.from_numpy(image / image.std())[None].float()


def smooth(kernel: torch.Tensor) -> torch.Tensor:
    """Kernels of trained networks are smooth: blurred by three taps each way, scaled back."""
    taps = torch.tensor([0.25, 0.5, 0.25])
    weight = (taps[:, None] * taps)[None, None]
    flat = kernel.flatten(0, 1)[:, None]
    for _ in range(2):
        flat = functional.conv2d(functional.pad(flat, (1, 1, 1, 1), mode="replicate"), weight)
    blurred = flat[:, 0].view_as(kernel)
    return blurred * (kernel.norm() / blurred.norm())


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    from dinov3.checkpointer import patch_size_adaptation as adaptation
    from dinov3.models import vision_transformer as vits

    torch.manual_seed(0)
    options = {"layerscale_init": 0.5, "n_storage_tokens": 4, "pos_embed_rope_dtype": "fp32"}
    large, small = vits.vit_small(16, **options).eval(), vits.vit_small(8, **options).eval()
    large.init_weights()
    state = large.state_dict()
    state["patch_embed.proj.weight"] = smooth(state["patch_embed.proj.weight"])
    large.load_state_dict(state)
    x = natural_image(192, 1)
    enlarged = {
        "nearest": functional.interpolate(x, scale_factor=2, mode="nearest"),
        "bilinear": functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
        "bicubic": functional.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False),
    }
    plain = functional.interpolate(
        state["patch_embed.proj.weight"], size=(8, 8), mode="bicubic", align_corners=False
    )
    kernels = {
        m: adaptation.adapt_patch_embedding(state["patch_embed.proj.weight"], 8, m)
        for m in adaptation.METHODS
    }
    kernels["bicubic without the factor 4"] = plain
    table = {}
    with torch.no_grad():
        expected = {
            k: large(v, is_training=True)["x_norm_patchtokens"] for k, v in enlarged.items()
        }
        for name, kernel in kernels.items():
            small.load_state_dict({**state, "patch_embed.proj.weight": kernel})
            tokens = small(x, is_training=True)["x_norm_patchtokens"]
            table[name] = {k: float((tokens - v).norm() / v.norm()) for k, v in expected.items()}
            cells = "  ".join(f"{k} {v:.2e}" for k, v in table[name].items())
            print(f"{name:30} {cells}")
    record = {
        "command": "python benchmarks/patch_adaptation.py",
        "date": time.strftime("%Y-%m-%d"),
        "relative_difference": table,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
