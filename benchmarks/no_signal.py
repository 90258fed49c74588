"""Cells found beside pixels that are no signal (scale bars, hot pixels, borders), beside an older checkout.

    python benchmarks/no_signal.py --cases ../shared/cases/intensity.py --before OLD_CHECKOUT

The script of `--cases` writes twelve corruptions of twenty test images and scores labels against those of
the clean image (AP at IoU 0.5, pooled); here both checkouts segment the images.  Written to
benchmarks/results/no_signal.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, default=Path("../shared/cases/intensity.py"))
    data = Path(os.environ.get("DINOCELL_DATA", "../shared/data"))
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--before", type=Path, help="an older checkout to compare with")
    args = parser.parse_args()
    checkouts = {"now": HERE.parent} | ({"before": args.before.resolve()} if args.before else {})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = [sys.executable, str(args.cases)]
        subprocess.run([*cases, "--data", str(args.data), "--out", folder], check=True)
        for name, checkout in checkouts.items():
            pred = Path(folder, name)
            paths = f"{checkout}{os.pathsep}{checkout / 'dinov3_modified'}"
            command = [
                sys.executable,
                "-m",
                "dinocell",
                "segment",
                f"{folder}/images",
                "-o",
                str(pred),
            ]
            subprocess.run(
                [*command, "--device", "cpu", "--no-overlay"],
                env=os.environ | {"PYTHONPATH": paths},
                check=True,
                stdout=subprocess.DEVNULL,
            )
            scored = subprocess.run(
                [*cases, "--score", folder, "--pred", str(pred)],
                check=False,  # it fails where a goal is missed
                capture_output=True,
                text=True,
            )
            found[name] = scored.stdout
            print(name, scored.stdout, sep="\n")
    text = json.dumps({name: output.splitlines() for name, output in found.items()}, indent=1)
    (HERE / "results" / "no_signal.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
