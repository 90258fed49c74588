"""A fine-tuning of seconds, for tests of the loop in one process and in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def small_run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Four steps on the blobs; `section__key=value` and `key=value` change the configuration."""
    mapping: dict[str, Any] = {
        "output_dir": str(out),
        "device": "cpu",
        "model": {
            "size": "tiny",
            "patch_size": 16,
            "image_channels": 4,
            "window_px": 32,
            "overlap_px": 8,
            "layerscale_init": 0.3,
        },
        "data": {
            "datasets": [
                {"name": "blobs", "images": str(data / "images"), "labels": str(data / "labels")}
            ],
            "val_fraction": 0.34,
        },
        "optimizer": {"lr": 2e-3, "warmup_steps": 2},
        "schedule": {
            "steps": 4,
            "batch_size": 2,
            "precision": "fp32",
            "eval_every": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "ema_decay": 0.9,
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            mapping.setdefault(section, {})[name] = value
        else:
            mapping[section] = value
    return mapping
