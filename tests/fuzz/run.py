"""Fuzz one target with atheris (`pip install atheris`, Linux): what it finds becomes a test.

    make fuzz TARGET=image SECONDS=600      # image, labels, model or exports

A crash, a hang of 20 s or more than 2 GB of memory ends the run and leaves its bytes in `crash-…`,
`timeout-…` or `oom-…` in the working folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "dinov3_modified")]
if "exports" in sys.argv:  # numba cannot compile the instructions that atheris adds
    import dinocell.results.exports  # noqa: F401
with atheris.instrument_imports(include=["dinocell", "export_decoders", "tifffile"]):
    from targets import FOLDER, TARGETS


def main() -> None:
    """`run.py TARGET SECONDS [options of libFuzzer]`."""
    name, seconds, *options = sys.argv[1:]
    target = TARGETS[name]
    seeds = Path(FOLDER / "seeds")
    seeds.mkdir()
    for number, content in enumerate(target.seeds()):
        target.run(content)  # numba compiles at the first call, which would count as a hang
        (seeds / str(number)).write_bytes(content)
    os.fsync = lambda _: None  # type: ignore[assignment]
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"]
    atheris.Setup([sys.argv[0], str(seeds), *limits, "-print_final_stats=1", *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
