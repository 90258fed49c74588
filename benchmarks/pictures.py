"""The pictures of the documentation, from real images.

    python benchmarks/pictures.py                # all of them: docs/images, failures in dinocell/models
    python benchmarks/pictures.py service.png    # one; needs the extra `serve`, Playwright and a Chromium
    xvfb-run python benchmarks/pictures.py napari.png   # in the environment of docs/napari.md

`PICTURES` lists them.  Samples lie in dinocell/samples, other images where DINOCELL_DATA says.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image
from quality import PICTURES as FOLDER
from quality import draw, folders

from dinocell.demo import sample_paths
from dinocell.evaluation.errors import draw_errors, find_errors
from dinocell.evaluation.matching import overlap_table
from dinocell.evaluation.metrics import match_counts
from dinocell.io import read_image, read_labels, write_image
from dinocell.pairs import find_pairs
from dinocell.pipeline import DINOCellPipeline

DATA = Path(os.environ.get("DINOCELL_DATA", "../shared/data"))
MODEL = "dinocell-cells"
MODELS = Path(__file__).parents[1] / "dinocell" / "models"  # pictures of failures, beside the cards
SAMPLES = {image.stem: image for image, _ in sample_paths()}


def demo() -> None:
    """A sample, its outlines, its cells and its distance map."""
    with tempfile.TemporaryDirectory() as folder:
        paths = DINOCellPipeline(MODEL).run(SAMPLES["nuclei"]).save(folder)
        shutil.copy(paths["overlay"], FOLDER / "demo.png")


def failures(model: str, name: str) -> None:
    """The image of a validation set with the lowest AP at IoU 0.5 among those with ten cells."""
    pipeline, worst = DINOCellPipeline(model), (2.0, b"")
    for pair in find_pairs(*folders(name, DATA)):
        truth = read_labels(pair.labels_path)
        if truth.max() < 10:
            continue
        result = pipeline.run(pair.image_path)
        ap = match_counts(overlap_table(truth, result.labels), 0.5).ap
        if ap < worst[0]:
            errors = find_errors(truth, result.labels)
            worst = (ap, draw_errors(result.image, truth, result.labels, errors, title=result.name))
    picture = Image.fromarray(worst[1])
    picture.thumbnail((900, 900))
    picture.save(MODELS / f"{model}_errors.jpg", quality=80)


def service() -> None:
    """The page of `dinocell view`, at the cell with the lowest score."""
    from playwright.sync_api import sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        program = [sys.executable, "-m", "dinocell"]
        images = [str(SAMPLES[name]) for name in ("nuclei", "tissue")]
        subprocess.run([*program, "segment", *images, "-o", "results"], cwd=folder, check=True)
        view = subprocess.Popen([*program, "view", "results", "--port", port], cwd=folder)
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            for _ in range(100):
                if _opened(page, f"http://127.0.0.1:{port}"):
                    break
                page.wait_for_timeout(200)
            page.get_by_text("tissue").first.click()
            page.wait_for_timeout(2000)
            page.get_by_role("button", name="Next doubtful").click()
            page.locator("summary", has_text="Plot").click()
            page.wait_for_timeout(1000)
            page.screenshot(path=FOLDER / "service.png")
            browser.close()
        finally:
            view.send_signal(signal.SIGTERM)
            view.wait()


def napari() -> None:
    """The panel in napari, at the cell with the lowest score; a screen, or xvfb-run, is needed."""
    from napari import Viewer
    from qtpy.QtCore import QTimer
    from qtpy.QtWidgets import QApplication

    from dinocell.napari.widget import CellsWidget

    viewer = Viewer()
    viewer.window.resize(1440, 900)
    viewer.add_image(read_image(SAMPLES["tissue"]).pixels, name="tissue")
    cells = CellsWidget(viewer)
    viewer.window.add_dock_widget(cells, name="Cells (DINOCell)", area="right")
    cells.segment()
    timer = QTimer()

    def look() -> None:
        if cells.editor is not None:
            timer.stop()
            cells.editor.doubtful()
            viewer.reset_view()
            QTimer.singleShot(1000, finish)

    def finish() -> None:
        viewer.window.screenshot(str(FOLDER / "napari.png"), canvas_only=False)
        viewer.close()

    timer.timeout.connect(look)
    timer.start(200)
    QApplication.instance().exec_()


def plate() -> None:
    """The heat map of a report: crops of bbbc039/test under the names of an Operetta; two wells are left out."""
    from playwright.sync_api import sync_playwright

    wells = [(row, column) for row in range(2, 8) for column in range(2, 12)]
    del wells[-1], wells[25]
    paths = sorted((DATA / "bbbc039" / "test" / "images").iterdir())
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        images = Path(folder, "BR7", "Images")
        images.mkdir(parents=True)
        for number, (row, column) in enumerate(wells):
            pixels = read_image(paths[number % len(paths)]).pixels
            left = 200 * (number // len(paths) % 3)
            name = f"r{row:02}c{column:02}f01p01-ch1sk1fk1fl1.tiff"
            write_image(images / name, pixels[100:300, left : left + 200])
        program = [sys.executable, "-m", "dinocell", "segment", str(images)]
        subprocess.run([*program, "-o", f"{folder}/out", "--report", "--no-overlay"], check=True)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 880, "height": 900})
        page.goto(Path(folder, "out", "report.html").as_uri())
        page.locator("div.scroll", has=page.locator("table.plate")).first.screenshot(
            path=FOLDER / "plate.png"
        )
        browser.close()


def _opened(page, address: str) -> bool:
    from playwright.sync_api import Error

    try:
        page.goto(address)
    except Error:
        return False
    return True


PICTURES: dict[str, Callable[[], None]] = {
    "demo.png": demo,
    "service.png": service,
    "napari.png": napari,
    "plate.png": plate,
    "dinocell-cells_errors.jpg": partial(failures, MODEL, "usiigaci_phase/val"),
    "dinocell-nuclei_errors.jpg": partial(failures, "dinocell-nuclei", "dsb2018/val"),
    "dinocell-tiny_errors.jpg": partial(failures, "dinocell-tiny", "dsb2018/val"),
    "results_bbbc039_test.jpg": partial(draw, MODEL, "bbbc039/test", DATA),
    "results_ctc_c2c12_phase.jpg": partial(draw, MODEL, "ctc/c2c12_phase", DATA),
    "results_dsb2018_stardist_test.jpg": partial(draw, MODEL, "dsb2018/stardist_test", DATA),
    "results_dsb2018_test.jpg": partial(draw, MODEL, "dsb2018/test", DATA),
    "results_dsb2018_val.jpg": partial(draw, MODEL, "dsb2018/val", DATA),
    "results_dsb2018_tissue_test.jpg": partial(draw, MODEL, "dsb2018_tissue/test", DATA),
    "results_dsb2018_tissue_val.jpg": partial(draw, MODEL, "dsb2018_tissue/val", DATA),
    "results_mnfinder_test.jpg": partial(draw, MODEL, "mnfinder/test", DATA),
    "results_mnfinder_val.jpg": partial(draw, MODEL, "mnfinder/val", DATA),
    "results_usiigaci_phase_test.jpg": partial(draw, MODEL, "usiigaci_phase/test", DATA),
    "results_usiigaci_phase_val.jpg": partial(draw, MODEL, "usiigaci_phase/val", DATA),
}


def main() -> None:
    """Make the named pictures, or all."""
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
        print((MODELS if "_errors" in name else FOLDER) / name, flush=True)


if __name__ == "__main__":
    main()
