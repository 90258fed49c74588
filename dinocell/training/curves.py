"""Training curves as one picture, drawn from `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from dinocell.files import atomic_path


def draw_curves(log_path: str | Path, out_path: str | Path) -> None:
    """Loss (logarithmic) and validation AP over steps → PNG, from JSON lines that have `step`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = Path(log_path).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    scores = [(row["step"], row["val_ap50_pooled"]) for row in rows if "val_ap50_pooled" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    if losses:
        axes[0].plot(*zip(*losses, strict=True), color="#1b6ca8", linewidth=0.8)
        axes[0].set_yscale("log")
    axes[0].set(xlabel="step", ylabel="training loss (MSE)")
    if scores:
        axes[1].plot(*zip(*scores, strict=True), color="#c0392b", marker="o", markersize=3)
        axes[1].set_ylim(0, 1)
    axes[1].set(xlabel="step", ylabel="validation AP@0.5 (pooled)")
    for axis in axes:
        axis.grid(alpha=0.3)
    with atomic_path(Path(out_path)) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
