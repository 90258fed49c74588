"""How often are images of the training's kind flagged (false alarms), and images of other kinds (hits)?

    python benchmarks/unfamiliar.py                                 # rates of dinocell-tiny; writes results/
    python benchmarks/unfamiliar.py --whole                         # on whole images, into the same file
    python benchmarks/unfamiliar.py --model MODEL                   # of another one; its own file of results
    python benchmarks/unfamiliar.py --describe OUT.safetensors --config configs/finetune/dsb2018_tiny.yaml
                                    # with newly fitted statistics; --graph FILE.onnx: these in a graph, too

Images of the data sets that the model was trained on should not be flagged.  The statistics come from the
training and validation images of the configuration alone; every rate is of images that neither the
training nor the fit has seen.  Half of the foreign images of each set (`mark_halves`, seeded) and the
set `for development alone` helped to choose how images are compared; `foreign, report` counts the other
half.  Of images larger than `--crop` only the middle is segmented, unless `--whole` is given; then the sets
without a goal are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import skimage
import sklearn
from scipy.ndimage import gaussian_filter

from dinocell.files import atomic_path
from dinocell.io import read_image
from dinocell.network.familiarity import Appearance, KnownKinds
from dinocell.network.model import HEADER_KEY, DINOCell, read_model_header, save_model
from dinocell.pipeline import DINOCellPipeline
from dinocell.segmentation.inference import predict_distance_map

HERE = Path(__file__).parent
DATA = Path(os.environ.get("DINOCELL_DATA", HERE / "../../shared/data"))
PICTURES = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png",
    "rocket.jpg",
)  # fmt: skip
SPLIT_SEED = 20261129
Named = Iterator[tuple[str, np.ndarray]]


def files(pattern: str) -> Named:
    """Images of the data folder."""
    for path in sorted(DATA.glob(pattern)):
        if path.suffix.lower() in (".png", ".tif", ".tiff") and "Mask" not in path.name:
            yield str(path.relative_to(DATA)), read_image(path).pixels


def gray_pictures(*names: str | Path) -> Named:
    """Pictures, mostly those that scikit-image brings along, their colours averaged."""
    for name in names:
        pixels = skimage.io.imread(PICTURES / name)
        gray = pixels if pixels.ndim == 2 else pixels[..., :3].mean(axis=2).astype(np.uint8)
        yield Path(name).name, gray


def stretched(values: np.ndarray) -> np.ndarray:
    return (255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)


def noise() -> Named:
    """Noise over much of its data type's range, and structures made of noise."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        shape = (256, 256) if seed % 2 else (300, 200)
        white = rng.standard_normal(shape)
        yield f"white, 8 bit {seed}", (128 + 40 * white).clip(0, 255).astype(np.uint8)
        yield f"white, 16 bit {seed}", (30000 + 6000 * white).clip(0, 65535).astype(np.uint16)
        yield f"uniform {seed}", rng.integers(0, 256, shape).astype(np.uint8)
        yield f"Poisson, mean 60 {seed}", rng.poisson(60, shape).astype(np.uint8)
        yield f"exponential {seed}", rng.exponential(30, shape).clip(0, 255).astype(np.uint8)
        frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
        frequency[0, 0] = 1.0
        for power in (1, 2):
            spectrum = np.fft.fft2(white) / frequency**power
            yield f"1/f^{power} {seed}", stretched(np.fft.ifft2(spectrum).real)
        for sigma in (1, 2, 4, 8):
            yield f"white, blurred by {sigma} px {seed}", stretched(gaussian_filter(white, sigma))
        for share in (0.1, 0.4):
            pixels = (100 + 3 * white).astype(np.uint8)
            drawn = rng.random(shape)
            pixels[drawn < share / 2], pixels[drawn > 1 - share / 2] = 0, 255
            yield f"salt and pepper, {share:.0%} {seed}", pixels


def faint_noise() -> Named:
    """Noise as a camera makes it without light: an empty field looks the same."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        yield f"Poisson, mean 4 {seed}", rng.poisson(4, (256, 256)).astype(np.uint8)
        yield f"white, 16 bit {seed}", rng.normal(200, 8, (256, 256)).astype(np.uint16)


def for_development() -> Named:
    """Pictures of other packages, drawings, and noise of other seeds and kinds."""
    photographs = Path(sklearn.__file__).parent / "datasets/images"
    yield from gray_pictures(*(photographs / name for name in ("china.jpg", "flower.jpg")))
    pictures = Path(matplotlib.get_data_path()) / "sample_data"
    names = ("grace_hopper.jpg", "logo2.png", "Minduka_Present_Blue_Pack.png")
    yield from gray_pictures(*(pictures / name for name in names))
    drawings = ("color", "horse", "logo", "phantom", "microaneurysms", "cell", "chessboard_GRAY")
    yield from gray_pictures(*(f"{name}.png" for name in drawings))
    for seed in range(10, 14):
        rng = np.random.default_rng(seed)
        shape = (256, 320)
        white = rng.standard_normal(shape)
        frequency = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij"))
        frequency[0, 0] = 1.0
        for power in (0.5, 1, 1.5, 2, 2.5):
            spectrum = np.fft.fft2(white) / frequency**power
            yield f"1/f^{power} {seed}", stretched(np.fft.ifft2(spectrum).real)
        for sigma in (1.5, 3, 6):
            yield f"white, blurred by {sigma} px {seed}", stretched(gaussian_filter(white, sigma))
        blobs = skimage.data.binary_blobs(256, rng=seed) * 200
        yield f"blobs {seed}", (blobs + rng.normal(20, 5, (256, 256))).clip(0, 255).astype(np.uint8)
        yield f"uniform {seed}", rng.integers(0, 256, shape).astype(np.uint8)


SETS: dict[str, tuple[str, Callable[[], Named]]] = {
    "fluorescent nuclei: dsb2018/test": ("own", lambda: files("dsb2018/test/images/*")),
    "fluorescent nuclei: dsb2018/stardist_test": (
        "own",
        lambda: files("dsb2018/stardist_test/images/*"),
    ),
    "fluorescent nuclei: bbbc039/test": ("own", lambda: files("bbbc039/test/images/*")),
    "empty fields: bbbc039/edge_cases": ("own", lambda: files("bbbc039/edge_cases/images/*")),
    "phase contrast: usiigaci_phase/test": (
        "foreign",
        lambda: files("usiigaci_phase/test/images/*"),
    ),
    "phase contrast: ctc/c2c12_phase": ("foreign", lambda: files("ctc/c2c12_phase/*/t*.tif")),
    "bright field: ctc/yeast_baby": ("other", lambda: files("ctc/yeast_baby/0?/t*.tif")),
    "H&E and smears: dsb2018_tissue/test": (
        "foreign",
        lambda: files("dsb2018_tissue/test/images/*"),
    ),
    "noise": ("foreign", noise),
    "photographs": ("foreign", lambda: gray_pictures(*PHOTOGRAPHS)),
    "text, immunohistochemistry, retina": (
        "foreign",
        lambda: gray_pictures("page.png", "text.png", "ihc.png", "retina.jpg"),
    ),
    "for development alone": ("development", for_development),
    "stars (Hubble deep field)": ("other", lambda: gray_pictures("hubble_deep_field.jpg")),
    "noise of a dark camera": ("other", faint_noise),
    "nuclei and micronuclei: mnfinder": ("other", lambda: files("mnfinder/[vt][ae][ls]*/images/*")),
    "H2B movie: mitocheck": ("other", lambda: files("unlabelled/mitocheck_movie/*")),
    "Cell Painting: JUMP, all channels": ("other", lambda: files("cellpainting/jump_A/*")),
    "Cell Painting: CPJUMP1": ("other", lambda: files("cellpainting/cpjump1*/*")),
    "Cell Painting: paediatric, all channels": ("other", lambda: files("cellpainting/pedi*/*")),
    "Cell Painting: NF1": ("other", lambda: files("cellpainting/nf1*/*")),
    "Cell Painting: BBBC022": ("other", lambda: files("cellpainting/bbbc022*/*")),
}
"""Name → kind (`own` must not be flagged, `foreign` must, `other` has no goal), images."""


def mark_halves(sets: dict[str, dict]) -> None:
    """Say of the images of foreign sets which half chose the design; views of a scene are on one side."""
    rng = np.random.default_rng(SPLIT_SEED)
    for _, found in sorted(sets.items()):
        if found["kind"] != "foreign":
            continue
        rows = found["images"]
        scenes = [row["image"].replace("_left", "").replace("_right", "") for row in rows]
        ordered = sorted(set(scenes))
        drawn = rng.permutation(len(ordered))
        chosen = {ordered[place] for place in drawn[: (len(ordered) + 1) // 2]}
        for row, scene in zip(rows, scenes, strict=True):
            row["half"] = "development" if scene in chosen else "report"


def rates(sets: dict[str, dict]) -> dict[str, dict]:
    """How many images of each kind are flagged, and of each half of the foreign ones."""
    kinds: dict[str, list[bool]] = {}
    for found in sets.values():
        for row in found["images"]:
            kinds.setdefault(found["kind"], []).append(row["note"] is not None)
            if "half" in row:
                half = f"{found['kind']}, {row['half']}"
                kinds.setdefault(half, []).append(row["note"] is not None)
    return {
        kind: {
            "flagged": sum(notes),
            "images": len(notes),
            "share": round(sum(notes) / len(notes), 4),
            "interval": wilson(sum(notes), len(notes)),
        }
        for kind, notes in kinds.items()
    }


def wilson(flagged: int, count: int) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.96
    share = flagged / count
    centre = share + z**2 / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return [
        round(float(max(0.0, (centre + sign * half) / (1 + z**2 / count))), 4) for sign in (-1, 1)
    ]


def look(pipeline: DINOCellPipeline, name: str, pixels: np.ndarray, crop: int | None) -> dict:
    """Segment one image, or its middle `crop` px, and say how unfamiliar it is."""
    if crop is not None:
        top, left = (max(0, (size - crop) // 2) for size in pixels.shape[:2])
        pixels = pixels[top : top + crop, left : left + crop]
    channels = None if pixels.ndim == 2 else [0, 1, 2]
    result = pipeline.run(np.ascontiguousarray(pixels), channels=channels, allow_mask=True)
    notes = [note for note in result.warnings if "does not look like" in note]
    return {
        "image": name,
        "unfamiliar": None if result.unfamiliar is None else round(result.unfamiliar, 3),
        "kind": result.kind,
        "cells": result.num_cells,
        "note": notes[0] if notes else None,
    }


def describe(model: DINOCell, config_path: Path, out: Path) -> None:
    """Write the model with statistics of the images that a configuration names; all else stays."""
    from dinocell.training.datasets import split_pairs
    from dinocell.training.final_model import training_statistics
    from dinocell.training.start import load_train_config

    config = load_train_config(config_path)
    train, val = split_pairs(config.data, config.seed)
    found = training_statistics(model, [*train, *val], shown=True)
    assert found is not None
    known = model.statistics.kinds if model.statistics else ()
    thresholds = {kind.name: kind.thresholds for kind in known}
    model.statistics = KnownKinds(
        tuple(replace(kind, thresholds=thresholds.get(kind.name, {})) for kind in found.kinds)
    )
    save_model(out, model, half=True)


def describe_graph(graph: Path, source: Path) -> None:
    """Write the statistics of a model file into the header of a graph that was exported from it."""
    import onnx

    header, proto = read_model_header(graph), onnx.load(graph)
    header["statistics"] = read_model_header(source)["statistics"]
    header["source_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    onnx.helper.set_model_props(proto, {HEADER_KEY: json.dumps(header, sort_keys=True)})
    with atomic_path(graph) as temporary:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))


def cost(pipeline: DINOCellPipeline) -> dict[str, float]:
    """Processor seconds of a prediction of 512 x 512 px with and without collecting; best of three."""
    image = np.random.default_rng(0).random((512, 512), np.float32)
    seconds = {}
    for name, appearance in (("without", None), ("with", Appearance())):
        took = []
        for _ in range(3):
            started = time.process_time()
            predict_distance_map(pipeline.model, image, appearance=appearance)
            took.append(time.process_time() - started)
        seconds[name] = round(min(took), 3)
    return seconds


def main() -> None:
    """Look at every set and write the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dinocell-tiny")
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--whole", action="store_true", help="segment whole images")
    parser.add_argument("--describe", type=Path)
    parser.add_argument("--graph", type=Path)
    parser.add_argument(
        "--config", type=Path, default=HERE.parent / "configs/finetune/dsb2018_tiny.yaml"
    )
    options = parser.parse_args()
    pipeline = DINOCellPipeline(options.model)
    if options.describe:
        describe(pipeline.model, options.config, options.describe)
        if options.graph:
            describe_graph(options.graph, options.describe)
        return
    known = pipeline.model.card["data"]
    title = (
        "unfamiliar"
        if options.model == "dinocell-tiny"
        else f"unfamiliar_{Path(options.model).stem}"
    )
    out = HERE / "results" / f"{title}.json"
    crop = None if options.whole else options.crop
    record = json.loads(out.read_text()) if out.is_file() else {}
    part: dict = {"model": options.model, "rates": {}, "sets": {}}
    record["whole images" if options.whole else f"middle {crop} px"] = part
    for name, (kind, images) in SETS.items():
        if any(f": {data}/" in name for data in known):
            kind = "own"
        if options.whole and kind == "other":
            continue
        rows = [look(pipeline, *image, crop) for image in images()]
        flagged = sum(row["note"] is not None for row in rows)
        interval = wilson(flagged, len(rows))
        part["sets"][name] = {
            "kind": kind, "flagged": flagged, "interval": interval, "images": rows,
        }  # fmt: skip
        print(
            f"{name:45} {flagged:3} of {len(rows):3}  [{interval[0]:.3f}, {interval[1]:.3f}]",
            flush=True,
        )
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    mark_halves(part["sets"])
    part["rates"] = rates(part["sets"])
    print(json.dumps(part["rates"], indent=1))
    part["cost_s"] = cost(pipeline)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
