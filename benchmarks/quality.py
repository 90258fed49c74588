"""How well models find the cells of every test set: the figures of docs/results.md.

    python benchmarks/quality.py dinocell-tiny otsu              # segment and score
    python benchmarks/quality.py --table                         # print the tables of what is recorded
    python benchmarks/quality.py MODEL --pictures                # draw the best and the worst image of a set

A method is a bundled model, a model file, `otsu`: Otsu's threshold and a distance watershed, the floor,
or `stardist`: the published counts beside dsb2018/stardist_test.  `--tta` adds the mean over flips.  Each
method and set is one protocol: thresholds of the model file; it writes
benchmarks/results/quality/METHOD_SET.csv, a row per image with its counts of true, found, false and missed
cells, and the commit, the weights, the version, thresholds and training seed of the model, the processor and
the processor seconds behind them.  Tables hold pooled AP and the bounds of 95 % of 2,000 draws of as many
images.  The images of dsb2018/stardist_test that show no field of a training image have a table of their own.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from measure import processor_name
from numpy.typing import NDArray
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.segmentation import watershed

from dinocell.evaluation.errors import draw_errors, find_errors
from dinocell.evaluation.intervals import ap_intervals
from dinocell.evaluation.metrics import pooled_ap
from dinocell.evaluation.scores import evaluate_pair
from dinocell.files import atomic_path
from dinocell.io import read_labels
from dinocell.network.model import load_model, model_path
from dinocell.pairs import find_pairs
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.watershed import Thresholds

SETS = (
    "dsb2018/val", "dsb2018/test", "dsb2018/stardist_test", "bbbc039/test", "bbbc039/edge_cases",
    "mnfinder/val", "mnfinder/test", "dsb2018_tissue/val", "dsb2018_tissue/test",
    "usiigaci_phase/val", "usiigaci_phase/test", "ctc/c2c12_phase",
)  # fmt: skip
PUBLISHED = "dsb2018/stardist_test"  # the set that counts of StarDist lie beside
PARTS = {"ctc/c2c12_phase": ("01", "01_GT/SEG")}  # images and labels where they have other names
IOU = (0.5, 0.7, 0.75, 0.9)
FOLDER = Path(__file__).parent / "results" / "quality"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
PANEL_PX = 520


def otsu_watershed(image: NDArray) -> NDArray[np.uint32]:
    """Gray image (H, W) → labels: smooth, threshold, split at the peaks of the distance transform.

    Cells are the side of the threshold that covers less of the image: the dark one in stained tissue.
    """
    smooth = gaussian(image.astype(float), 1.0)
    mask = smooth > threshold_otsu(smooth)
    if mask.mean() > 0.5:
        mask = ~mask
    distance = gaussian(ndimage.distance_transform_edt(mask), 1.0)
    peaks = peak_local_max(distance, min_distance=5, labels=label(mask), exclude_border=False)
    markers = np.zeros(image.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return watershed(-distance, markers, mask=mask).astype(np.uint32)


def underscored(name: str) -> str:
    """The name of a set as part of the name of a file."""
    return name.replace("/", "_")


def folders(name: str, data: Path) -> tuple[Path, Path]:
    """Where the images and the labels of a set are."""
    images, labels = PARTS.get(name, ("images", "labels"))
    return data / name / images, data / name / labels


def seconds_of_peer(method: str, name: str) -> list[dict[str, str]]:
    """The rows of a peer's images: their names, processor seconds and weights."""
    with open(Path(method, underscored(name), "seconds.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def segmented(
    method: str, name: str, data: Path, *, tta: bool
) -> Iterator[tuple[str, NDArray, NDArray, float]]:
    """Name, truth, cells found and processor seconds of each image."""
    images, labels = folders(name, data)
    if Path(method).is_dir():
        seconds = {row["image"]: float(row["processor_s"]) for row in seconds_of_peer(method, name)}
        for pair in find_pairs(images, labels):
            image = pair.image_path.stem
            found = read_labels(Path(method, underscored(name), f"{image}.png"))
            yield image, read_labels(pair.labels_path), found, seconds[image]
        return
    # Otsu takes the plane that a model would: of colours the mean of the normalised ones.
    pipeline = DINOCellPipeline("dinocell-tiny" if method == "otsu" else method, tta=tta)
    for pair in find_pairs(images, labels):
        truth = read_labels(pair.labels_path)
        loaded = pipeline.load(pair.image_path, pixel_size_um=1.0)
        started = time.process_time()
        if method == "otsu":
            found = otsu_watershed(loaded.plane)
        else:
            found = pipeline.finish(loaded, pipeline.predict(loaded)).labels
        yield pair.image_path.stem, truth, found, time.process_time() - started


def method_name(method: str) -> str:
    """Of `runs/nuclei/model.safetensors`, which is what `train` writes, the folder: `nuclei`."""
    path = Path(method)
    return path.parent.name if path.stem == "model" and path.parent.name else path.stem


def weights_sha256(method: str, name: str) -> str:
    """Twelve digits that tell weights apart; none for Otsu."""
    if method == "otsu":
        return ""
    if Path(method).is_dir():
        return seconds_of_peer(method, name)[0]["weights_sha256"]
    return hashlib.sha256(model_path(method).read_bytes()).hexdigest()[:12]


def model_facts(method: str) -> dict[str, str]:
    """Version and training seed of the card of a model, and its thresholds."""
    if method == "otsu" or Path(method).is_dir():
        return {"version": "", "seed": "", "config": ""}
    model = load_model(method)
    thresholds = asdict(Thresholds.of(model.config))
    return {
        "version": str(model.card.get("version", "")),
        "seed": str(model.card.get("seed", "")),
        "config": " ".join(f"{name}={value}" for name, value in thresholds.items()),
    }


def published(data: Path) -> Path:
    """Write the counts of StarDist's model 2D_versatile_fluo, as they lie beside the images."""
    source = data / PUBLISHED / "stardist_2D_versatile_fluo.csv"
    rows = []
    with open(source, encoding="utf-8", newline="") as file:
        for found in csv.DictReader(file):
            truth = read_labels(folders(PUBLISHED, data)[1] / f"{found['name']}.png")
            true, pred = int(found["num_truth"]), int(found["num_predicted"])
            row = {"set": PUBLISHED, "image": found["name"]}
            row |= {"height": truth.shape[0], "width": truth.shape[1]}
            row |= {"num_truth": true, "num_pred": pred}
            for iou in (50, 75, 90):
                hits = int(found[f"tp_iou{iou}"])
                row |= {f"tp{iou}": hits, f"fp{iou}": pred - hits, f"fn{iou}": true - hits}
            rows.append(row | {"processor_s": ""})
    return write_rows("stardist", PUBLISHED, rows)


def score(method: str, name: str, data: Path, *, tta: bool) -> Path:
    """Write the rows of one method on one set."""
    behind = model_facts(method) | {
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "weights_sha256": weights_sha256(method, name),
        "processor": processor_name(),
    }
    rows = []
    for image, truth, found, seconds in segmented(method, name, data, tta=tta):
        counts = evaluate_pair(truth, found, iou_thresholds=IOU, name=image).counts()
        row = {"set": name, "image": image, "height": truth.shape[0], "width": truth.shape[1]}
        rows.append(row | counts | {"processor_s": round(seconds, 4)} | behind)
    return write_rows(method_name(method) + ("-tta" if tta else ""), name, rows)


def write_rows(title: str, name: str, rows: list[dict]) -> Path:
    """Write benchmarks/results/quality/TITLE_SET.csv."""
    path = FOLDER / f"{title}_{underscored(name)}.csv"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def draw(method: str, name: str, data: Path) -> None:
    """Write docs/images/results_SET.jpg: the image with the best and that with the worst AP at IoU 0.5.

    Of images with less than ten cells, where one error decides, none is taken if others are there.
    """
    from PIL import Image

    scored = []
    for image, truth, found, _ in segmented(method, name, data, tta=False):
        row = evaluate_pair(truth, found, iou_thresholds=IOU[:1], name=image)
        scored.append((row.counts(), image, truth, found))
    many = [item for item in scored if item[0]["num_truth"] >= 10] or scored
    many.sort(key=lambda item: item[0]["tp50"] / sum(item[0][f"{n}50"] for n in ("tp", "fp", "fn")))
    panels = []
    for _, image, truth, found in (many[-1], many[0]):
        path = next(folders(name, data)[0].glob(f"{image}.*"))
        plane = DINOCellPipeline(method).load(path, pixel_size_um=1.0).plane
        errors = find_errors(truth, found)
        panels.append(Image.fromarray(draw_errors(plane, truth, found, errors, title=image)))
    for panel in panels:
        panel.thumbnail((PANEL_PX, PANEL_PX))
    page = Image.new("RGB", (2 * PANEL_PX, max(panel.height for panel in panels)))
    for place, panel in enumerate(panels):
        page.paste(panel, (place * PANEL_PX, 0))
    page.save(PICTURES / f"results_{underscored(name)}.jpg", quality=80)


def table_row(path: Path, images: set[str] | None = None) -> list[str]:
    """Method, images, AP at three IoU with intervals at the first, false cells, seconds per megapixel.

    `images`: only these.
    """
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if images is None or row["image"] in images]
    names = [f"{part}{round(100 * iou)}" for iou in (0.5, 0.75, 0.9) for part in ("tp", "fp", "fn")]
    counts = np.array([[int(row[name]) for name in names] for row in rows]).reshape(-1, 3, 3)
    pixels = sum(int(row["height"]) * int(row["width"]) for row in rows)
    timed = all(row["processor_s"] for row in rows)
    seconds = sum(float(row["processor_s"] or 0) for row in rows)
    speed = f"{1e6 * seconds / pixels:.2f}" if timed else ""
    shown = [path.stem.removesuffix("_" + underscored(rows[0]["set"])), str(len(rows))]
    truth = sum(int(row["num_truth"]) for row in rows)
    if truth == 0:
        return [*shown, "0", f"{counts[:, 0, 1].sum()} cells found", "", "", speed]
    low, high = ap_intervals(counts[counts.sum(axis=(1, 2)) > 0])[0]
    ap = [f"{value:.3f}" for value in pooled_ap(counts)]
    return [*shown, f"{truth:,}", f"{ap[0]} ({low:.3f} to {high:.3f})", *ap[1:], speed]


def apart_from_training(data: Path) -> set[str]:
    """Images of `PUBLISHED` whose field no image of dsb2018/train shows a part of (`mosaic_group`)."""
    with open(data / "dsb2018" / "index.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    trained = {row["mosaic_group"] for row in rows if row["split"] == "train"}
    split = PUBLISHED.rpartition("/")[2]
    return {
        row["name"] for row in rows if row["split"] == split and row["mosaic_group"] not in trained
    }


def print_tables(data: Path) -> None:
    """One Markdown table for each set, and one for the images that are apart from the training."""
    heads = ["method", "images", "cells", "AP@0.5 (95 %)", "AP@0.75", "AP@0.9", "s / megapixel"]
    for name in SETS:
        paths = sorted(FOLDER.glob(f"*_{underscored(name)}.csv"))
        parts: list[tuple[str, set[str] | None]] = [(name, None)]
        if name == PUBLISHED and (data / "dsb2018" / "index.csv").is_file():
            parts.append((f"{name}, no field of a training image", apart_from_training(data)))
        for title, images in parts if paths else ():
            print(f"\n**{title}**\n")
            rows = [table_row(path, images) for path in paths]
            for cells in (heads, ["---"] * len(heads), *rows):
                print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Score the methods on the sets, or print the tables."""
    parser = argparse.ArgumentParser(description="Score models on the test sets.")
    parser.add_argument(
        "methods", nargs="*", help="bundled models, model files, otsu, stardist, or folders"
    )
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS, metavar="SET")
    parser.add_argument("--tta", action="store_true", help="mean over four flips")
    parser.add_argument("--pictures", action="store_true", help="draw, and score nothing")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of all that is recorded"
    )
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("DINOCELL_DATA", "../shared/data"))
    )
    options = parser.parse_args()
    for method in options.methods:
        for name in options.sets:
            if method == "stardist":
                if name == PUBLISHED:
                    print("  ".join([name, *table_row(published(options.data))]), flush=True)
                continue
            if options.pictures:
                draw(method, name, options.data)
                continue
            path = score(method, name, options.data, tta=options.tta)
            print("  ".join([name, *table_row(path)]), flush=True)
    if options.table or not options.methods:
        print_tables(options.data)


if __name__ == "__main__":
    main()
