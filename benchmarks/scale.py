"""How much is lost when an image has another scale than the training images, with and without rescaling?

    python benchmarks/scale.py --data DATA/dsb2018/test             # writes results/scale_MODEL.json
    python benchmarks/scale.py --describe OUT.safetensors --config configs/finetune/generalist_conv.yaml
                                                                    # with the diameter of training cells
    python benchmarks/scale.py --two-passes --data DATA/dsb2018/val # writes results/two_passes_MODEL.json

Images and labels are enlarged and reduced, as a camera with other pixels would have taken them: pixels of
the reduced image are means (box filter), those of the enlarged one bicubic, labels those of the nearest
pixel.  They are segmented as they are (`off`), and with their true pixel size by a model that states the
pixel size of the originals (`auto`).  Written are pooled AP and, for each image, its matches at IoU 0.5.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import processor_name
from numpy.typing import NDArray
from PIL import Image

from dinocell.evaluation.evaluate import evaluate_pairs
from dinocell.io import read_labels
from dinocell.network.model import load_model, model_path, read_model_header, with_config
from dinocell.pairs import Pair, find_pairs
from dinocell.pipeline import DEFAULT_MODEL, DINOCellPipeline

MAGNIFICATIONS = (0.5, 0.7, 1.0, 1.4, 2.0, 3.0)


def describe(name: str, config_path: Path, out: Path) -> None:
    """Write a model file whose header has the typical diameter of the training cells of a configuration."""
    from safetensors.torch import load_file, save_file

    from dinocell.training.datasets import split_pairs
    from dinocell.training.final_model import typical_diameter
    from dinocell.training.start import load_train_config

    config = load_train_config(config_path)
    header = read_model_header(name)
    header["model"]["diameter_px"] = typical_diameter(split_pairs(config.data, config.seed)[0])
    text = json.dumps(header, sort_keys=True)
    save_file(load_file(model_path(name)), out, metadata={"dinocell": text})
    print(f"{out}: typical cell {header['model']['diameter_px']} px in diameter")


def resized(pixels: NDArray[Any], magnification: float) -> NDArray[Any]:
    """An image (H, W) as another camera would have taken it, in its data type."""
    size = tuple(max(1, round(side * magnification)) for side in pixels.shape[::-1])
    how = Image.Resampling.BICUBIC if magnification > 1 else Image.Resampling.BOX
    values = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, how))
    if pixels.dtype.kind == "f":
        return values
    limits = np.iinfo(pixels.dtype)
    return np.rint(values).clip(limits.min, limits.max).astype(pixels.dtype)


def cells(
    pipeline: DINOCellPipeline, pairs: list[Pair], magnification: float
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Name, true cells and cells found of every image."""
    for pair in pairs:
        plane = resized(pipeline.load(pair.image_path).plane, magnification)
        truth = Image.fromarray(read_labels(pair.labels_path).astype(np.int32))
        truth = np.asarray(truth.resize(plane.shape[::-1], Image.Resampling.NEAREST))
        found = pipeline.run(plane, pixel_size_um=1 / magnification, allow_mask=True)
        yield pair.image_path.stem, truth.astype(np.uint32), found.labels


def two_passes(name: str, data: Path, out: Path) -> None:
    """Matches at IoU 0.5 of a first pass, and of a second one at the diameter that the first has found."""
    model = load_model(name)
    rows = []
    for pair in find_pairs(data / "images", data / "labels"):
        truth = read_labels(pair.labels_path)
        first = DINOCellPipeline(model).run(pair.image_path)
        if not first.num_cells:
            continue
        areas = np.bincount(first.labels.ravel())[1:]
        diameter = 2 * float(np.sqrt(np.median(areas) / np.pi))
        second = DINOCellPipeline(model, diameter_px=diameter).run(pair.image_path)
        row: dict[str, Any] = {"name": pair.image_path.stem, "diameter_px": round(diameter, 2)}
        for key, result in (("first", first), ("second", second)):
            image = evaluate_pairs([(pair.image_path.stem, truth, result.labels)]).images[0]
            row[key] = [image.matches[0].tp, image.matches[0].fp, image.matches[0].fn]
        rows.append(row)
    typical = model.config.diameter_px or 1.0
    record: dict[str, Any] = {"model": name, "data": "/".join(data.parts[-2:]), "ap50": {}}
    for least in (1.0, 1.3, 1.6, 2.0, 3.0):
        for what in ("smaller", "either"):
            taken = [
                row
                for row in rows
                if max(
                    typical / row["diameter_px"], row["diameter_px"] / typical * (what == "either")
                )
                > least
            ]
            sums = {key: np.sum([row[key] for row in taken], axis=0) for key in ("first", "second")}
            found = {k: round(float(v[0] / v.sum()), 4) for k, v in sums.items() if np.ndim(v)}
            record["ap50"][f"{what}, more than {least:g} times"] = {"images": len(taken), **found}
            print(what, least, len(taken), found, flush=True)
    out.write_text(json.dumps(record | {"images": rows}) + "\n", encoding="utf-8")


def main() -> None:
    """Segment at each magnification, with and without rescaling, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with images/ and labels/")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--magnifications", type=float, nargs="+", default=MAGNIFICATIONS)
    parser.add_argument("--two-passes", action="store_true")
    parser.add_argument("--describe", type=Path)
    parser.add_argument("--config", type=Path)
    args = parser.parse_args()
    if args.describe:
        describe(args.model, args.config, args.describe)
        return
    results = Path(__file__).parent / "results"
    if args.two_passes:
        two_passes(args.model, args.data, results / f"two_passes_{Path(args.model).stem}.json")
        return
    model = with_config(load_model(args.model), pixel_size_um=1.0)
    pairs = find_pairs(args.data / "images", args.data / "labels")
    record: dict[str, Any] = {
        "model": args.model,
        "data": "/".join(args.data.parts[-2:]),
        "processor": processor_name(),
        "ap": {},
        "images": {},
    }
    out = results / f"scale_{Path(args.model).stem}.json"
    for magnification in args.magnifications:
        for how in ("auto", "off") if magnification != 1 else ("off",):
            pipeline = DINOCellPipeline(model, rescale=how)
            report = evaluate_pairs(cells(pipeline, pairs, magnification))
            name = f"{magnification:g} {how}"
            record["ap"][name] = {
                k: round(report.pooled[f"{k}_pooled"], 4) for k in ("ap50", "ap75", "ap90")
            }
            record["images"][name] = {
                image.name: [image.matches[0].tp, image.matches[0].fp, image.matches[0].fn]
                for image in report.images
            }
            print(name, record["ap"][name], flush=True)
            out.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
