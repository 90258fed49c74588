"""`examples/browser`: the page finds the cells that `segment` finds, in headless Chromium."""

from __future__ import annotations

import functools
import http.server
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from dinocell.demo import sample_paths
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.thresholds import Thresholds
from dinocell.segmentation.watershed import separate_cells

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SAMPLES = [path for path, _ in sample_paths()]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]
SEGMENT = """async ({ name, bytes }) => {
  const { segment } = await import("./page.js");
  const file = new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name);
  const { labels, map, width, height, kind, unfamiliar } = await segment(file);
  return { labels: Array.from(labels), map: Array.from(map), width, height, kind, unfamiliar };
}"""
SEPARATE = """async ({ map, width, height, thresholds }) => {
  const { separateCells } = await import("./cells.js");
  return Array.from(separateCells(Float32Array.from(map), width, height, thresholds));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the example, built as its README says."""
    folder = tmp_path_factory.mktemp("site") / "examples" / "browser"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "vendor"))
    (folder.parents[1] / "dinocell").symlink_to(EXAMPLE.parents[1] / "dinocell")  # with the models
    command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode and "ENOTFOUND" in done.stderr + done.stdout:
        pytest.skip("the registry of npm cannot be reached")
    assert done.returncode == 0, done.stderr
    subprocess.run(["npm", "run", "build"], cwd=folder, check=True, capture_output=True)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, site):
    page = browser.new_page()
    page.set_default_timeout(120_000)
    outside = []
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(site) else None)
    page.goto(site)
    yield page
    page.close()
    assert [url for url in outside if not url.startswith(("data:", "blob:"))] == []


def segmented(page, path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, float | None]]:
    import base64

    content = base64.b64encode(path.read_bytes()).decode()
    found = page.evaluate(SEGMENT, {"name": path.name, "bytes": content})
    shape = found["height"], found["width"]
    labels = np.reshape(np.array(found["labels"], np.uint32), shape)
    return (
        labels,
        np.reshape(np.array(found["map"], np.float32), shape),
        (
            found["kind"],
            found["unfamiliar"],
        ),
    )


def test_the_page_finds_the_cells_of_segment(page):
    """Pixel by pixel, with the kind that the model recognises: sums of 8-bit products are exact everywhere."""
    pipeline = DINOCellPipeline("dinocell-fast")
    for path in SAMPLES:
        expected = pipeline.run(path)
        labels, distance_map, (kind, unfamiliar) = segmented(page, path)
        assert np.abs(distance_map - expected.distance_map).max() < 1e-5
        assert kind == expected.kind
        if kind:
            assert unfamiliar == pytest.approx(expected.unfamiliar, rel=1e-3)
        np.testing.assert_array_equal(labels, expected.labels, err_msg=path.name)


def test_labels_of_any_map_are_those_of_the_program(page):
    """Plateaus, ridges and equal peaks, where an order of the queues or of equal pixels shows."""
    rng = np.random.default_rng(0)
    for levels, shape in ((4, (40, 50)), (12, (64, 33)), (4000, (50, 60))):
        noise = rng.integers(0, levels, shape) / levels
        smooth = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
        distance_map = smooth.astype(np.float32)
        for thresholds in (Thresholds(0.6, 0.3, 0.1, 3), Thresholds(0.5, 0.45, 0.0, 0)):
            arguments = {
                "map": distance_map.ravel().tolist(),
                "width": shape[1],
                "height": shape[0],
                "thresholds": vars(thresholds),
            }
            found = np.reshape(page.evaluate(SEPARATE, arguments), shape)
            np.testing.assert_array_equal(found, separate_cells(distance_map, thresholds))


def test_a_user_downloads_the_labels(page, tmp_path):
    from dinocell.io import read_labels

    page.set_input_files("#file", SAMPLES[1])
    page.wait_for_selector("#download:not([hidden])")
    assert "cells in" in page.inner_text("#status")
    with page.expect_download() as started:
        page.click("#download")
    path = tmp_path / started.value.suggested_filename
    started.value.save_as(path)
    assert path.name == f"{SAMPLES[1].stem}_labels.tif"
    assert str(read_labels(path).max()) in page.inner_text("#status")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_function("document.getElementById('status').textContent.startsWith('a.png: ')")
    assert "cells" not in page.inner_text("#status")
