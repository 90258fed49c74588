"""CPU time of one multi-view sample, 2 x 224 + 8 x 96 crops of a five-channel 1080 x 1080 field.

python benchmarks/multiview_augmentation.py     # writes benchmarks/results/multiview_augmentation.json
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

RESULT = Path(__file__).parent / "results" / "multiview_augmentation.json"


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    from dinov3.cells import fields
    from dinov3.data import augmentations_multiview as views

    rng = np.random.default_rng(0)
    planes = {c: rng.gamma(2, 300, (1080, 1080)).astype(np.uint16) for c in "ABCDE"}
    field = fields.make_field("benchmark", planes)
    times: dict[str, list[float]] = {}
    for place in ("worker", "device", "none"):
        made = views.DataAugmentationMultiView(photometrics_on=place)
        made(field)
        times[place] = []
        for _ in range(40):
            begin = time.process_time()
            made(field)
            times[place].append(1000 * (time.process_time() - begin))
        median = statistics.median(times[place])
        print(f"photometrics {place:6}: {median:.1f} ms of one core a sample")
    record = {
        "command": "python benchmarks/multiview_augmentation.py",
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "processor_ms_per_sample": times,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
