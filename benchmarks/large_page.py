"""A large image on the page of `dinocell serve`, in headless Chromium.

    python benchmarks/large_page.py                 # 20,000 x 20,000 px with 100,000 cells
    python benchmarks/large_page.py --channels 4    # and four channels, which are shown in colours

A finished job is written by hand: 16-bit pixels, labels, no map.  Its channels all have the same pixels.
When the service has loaded its model and Chromium has started, which both take all cores for seconds,
Chromium opens the page; then the mouse drags the picture and the wheel zooms for `--seconds`.  Measured are
the time from the address to the first picture, the intervals between the frames that Chromium draws
(`requestAnimationFrame`) while labels are shown, once while the service measures the cells and once
afterwards, and how long that takes.

Writes a line to benchmarks/results/large_page.jsonl.  The load of the machine is part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "large_page.jsonl"

_FRAMES = """
() => { const runs = Boolean(window.frames_); window.frames_ = []; if (runs) return; const next = (t) => { frames_.push(t); requestAnimationFrame(next); };
        requestAnimationFrame(next); }
"""
_FIRST = """
() => new Promise((done) => { const look = () => {
    const canvas = document.getElementById("canvas");
    const [x, y] = [canvas?.width >> 1, canvas?.height >> 1];
    const there = canvas?.width > 1 && canvas.getContext("2d").getImageData(x - 40, y - 40, 80, 80).data.some((v) => v);
    if (there) done(performance.now()); else requestAnimationFrame(look); };
    look(); })
"""


def make_job(folder: Path, side: int, num_cells: int, num_channels: int) -> None:
    """A finished job in a queue: squares on a grid, bright on a ramp with noise."""
    from dinocell.service.channels import channel_path, colours_of
    from dinocell.service.queue import Queue

    queue = Queue(folder)
    job = queue.add("large", "image.tif", {}, lambda path: path.write_bytes(b"x"), limit=9)
    place = queue.job_folder(job.id)
    per_row = round(num_cells**0.5)
    spacing = side // per_row
    shape = (side, side)
    plane = np.lib.format.open_memmap(place / "plane.npy", "w+", np.uint16, shape)
    labels = np.lib.format.open_memmap(place / "labels.npy", "w+", np.uint32, shape)
    at = np.arange(side)
    inside = (at % spacing < spacing * 2 // 3) & (at // spacing < per_row)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 200, (spacing, side)).astype(np.uint16)
    for row in range(side):
        labels[row] = np.where(
            inside & inside[row], row // spacing * per_row + at // spacing + 1, 0
        )
        plane[row] = 2000 * (labels[row] > 0) + noise[row % spacing]
    count = int(labels.max())
    np.save(place / "scores.npy", rng.random(count))
    about = {"pixel_size_um": None, "channel_names": [], "warnings": [], "unfamiliar": None}
    about |= {"target": "sqrt", "min_score": 0.0, "peak_threshold": 0.5, "fill_threshold": 0.2}
    about |= {"min_prominence": 0.1, "min_area_px": 0}
    about["channels"] = [
        {"name": f"{channel}", "colour": colour, "shown": True}
        for channel, colour in enumerate(colours_of(["0"] * num_channels, None))
    ]
    for channel in range(num_channels):
        os.link(place / "plane.npy", channel_path(place, channel))
    (place / "about.json").write_text(json.dumps(about))
    summary = {"num_cells": count, "warnings": ""}
    summary |= {"image_height_px": side, "image_width_px": side}
    taken = queue.take()
    assert taken is not None
    queue.finish(taken, summary=summary)
    queue.close()


def until_ready(address: str) -> None:
    """Wait until the service has its model."""
    for _ in range(600):
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(address):
            return
        time.sleep(0.1)


def move(page, seconds: float) -> dict[str, float]:
    """Drag and zoom; frames per second and the longest interval in ms."""
    box = page.locator("#canvas").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.evaluate(_FRAMES)
    ends, turn = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        turn += 1
        page.mouse.move(*middle)
        page.mouse.down()
        for step in range(12):
            way = (-1) ** (turn // 2) * 25 * step
            page.mouse.move(middle[0] + way, middle[1] + way / 2)
        page.mouse.up()
        for _ in range(4):
            page.mouse.wheel(0, -250 if turn % 6 < 3 else 250)
            page.wait_for_timeout(30)
    times = np.diff(page.evaluate("() => window.frames_"))
    return {
        "frames": len(times),
        "frames_per_s": round(1000 / float(times.mean()), 1),
        "median_ms": round(float(np.median(times)), 1),
        "p95_ms": round(float(np.percentile(times, 95)), 1),
        "longest_ms": round(float(times.max()), 1),
        "share_within_33_ms": round(float((times < 34).mean()), 3),
    }


def main() -> None:
    """Measure and write a line of results."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--channels", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=15.0)
    given = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    row = {"side_px": given.side, "command": " ".join(["python", *sys.argv])}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        make_job(Path(folder), given.side, given.cells, given.channels)
        command = [sys.executable, "-m", "dinocell", "serve", "-o", folder, "--port", "8765"]
        command += ["--model", "dinocell-tiny", "--device", "cpu"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert "DINOCell is at" in service.stdout.readline()
            until_ready("http://127.0.0.1:8765/health")
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.goto("about:blank")
            page.wait_for_timeout(4000)
            row["load"], row["settled"] = os.getloadavg()[0], True
            page.goto("http://127.0.0.1:8765", wait_until="commit")
            row["first_picture_ms"] = round(page.evaluate(_FIRST))  # since the address was opened
            measured = time.monotonic()
            row["while_measuring"] = move(page, given.seconds)
            page.wait_for_function(
                "() => document.getElementById('status').textContent === ''", timeout=570_000
            )
            row["measured_after_s"] = round(time.monotonic() - measured, 1)
            row["afterwards"] = move(page, given.seconds)
            row["load_at_the_end"] = os.getloadavg()[0]
            row["chromium"] = browser.version
            browser.close()
        finally:
            service.terminate()
            service.wait(60)
    row |= {
        "cells": given.cells,
        "channels": given.channels,
        "cores": os.cpu_count(),
        "machine": platform.processor() or "x86_64",
    }
    row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
