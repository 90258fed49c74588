"""Tiny data sets in the layouts of the published ones: a textured image with two cells each."""

from __future__ import annotations

import json
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from dinocell.io import write_image, write_labels
from dinocell.results.exports import write_coco_rle, write_geojson
from dinocell.results.imagej_rois import write_imagej_rois

SHAPE = (12, 16)


def truth(number: int = 0) -> np.ndarray:
    """Cell 1 with a notch, cell 2 touching it; moved down by `number`."""
    labels = np.zeros(SHAPE, np.uint16)
    labels[1 + number : 6 + number, 2:7] = 1
    labels[1 + number, 2] = 0
    labels[2 + number : 5 + number, 7:12] = 2
    return labels


def picture(number: int = 0, channels: int = 0, dtype=np.uint8) -> np.ndarray:
    shape = (*SHAPE, channels) if channels else SHAPE
    return np.random.default_rng(number).integers(0, 200, shape).astype(dtype)


def image(path: Path, number: int = 0, channels: int = 0, dtype=np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, picture(number, channels, dtype))


def labels(path: Path, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_labels(path, truth(number))


def outline(label: int, number: int = 0) -> list[float]:
    """Corners x, y, x, y, ... of a cell of `truth`."""
    top = 1 + number
    if label == 1:
        rows_cols = [(top, 3), (top, 7), (top + 5, 7), (top + 5, 2), (top + 1, 2), (top + 1, 3)]
    else:
        rows_cols = [(top + 1, 7), (top + 1, 12), (top + 4, 12), (top + 4, 7)]
    return [float(value) for row, col in rows_cols for value in (col, row)]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Outside and inside in turn, column by column."""
    runs = [(inside, len(list(pixels))) for inside, pixels in groupby(mask.T.ravel().tolist())]
    return [0] * runs[0][0] + [length for _, length in runs]


def compressed(image: np.ndarray, label: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_coco_rle(Path(folder) / "a.json", image)
        content = json.loads((Path(folder) / "a.json").read_text())
    return content["annotations"][label - 1]["segmentation"]["counts"]


def annotation(image_id: int, label: int, number: int, kind: str = "polygon") -> dict:
    segmentation: object = [outline(label, number)]
    if kind == "rle":
        segmentation = {"size": list(SHAPE), "counts": run_lengths(truth(number) == label)}
    elif kind == "compressed":
        segmentation = {"size": list(SHAPE), "counts": compressed(truth(number), label)}
    return {"image_id": image_id, "segmentation": segmentation, "iscrowd": 0, "category_id": 1}


def coco_content(names: list[str], kinds: tuple[str, str] = ("polygon", "polygon")) -> dict:
    return {
        "images": [
            {"id": 7 + n, "file_name": name, "height": SHAPE[0], "width": SHAPE[1]}
            for n, name in enumerate(names)
        ],
        "annotations": [
            annotation(7 + n, label, n, kinds[label - 1])
            for n in range(len(names))
            for label in (1, 2)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }


def livecell(source: Path) -> None:
    for split, cell_type in (("train", "A172"), ("val", "BT474"), ("test", "A172")):
        names = [f"{cell_type}_Phase_{split}_{n}.tif" for n in range(2)]
        home = "livecell_test_images" if split == "test" else "livecell_train_val_images"
        for n, name in enumerate(names):
            image(source / "images" / home / name, n)
        content = coco_content(names)
        content["annotations"] = {str(n): item for n, item in enumerate(content["annotations"])}
        (source / f"livecell_coco_{split}.json").write_text(json.dumps(content))


def cellpose(source: Path) -> None:
    for split, n in (("train", 0), ("train", 1), ("test", 2)):
        image(source / split / f"00{n}_img.png", n, 3)
        labels(source / split / f"00{n}_masks.png", n)
    gray = np.repeat(picture(1)[..., None], 3, axis=2)
    Image.fromarray(gray).save(source / "train" / "001_img.png")


def omnipose(source: Path) -> None:
    for split, folder in (("train_sorted", "5I_crop"), ("test_sorted", "caulo")):
        for n in range(2):
            image(source / "bact_phase" / split / folder / f"{n}.tif", n, dtype=np.uint16)
            labels(source / "bact_phase" / split / folder / f"{n}_masks.tif", n)


def tissuenet(source: Path, compressed: bool = False) -> None:
    source.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        both = np.stack([truth(n) for n in range(count)])
        arrays = {
            "X": np.stack([picture(n, 2, np.float32) for n in range(count)]),
            "y": np.stack([both, (both == 2).astype(both.dtype)], axis=-1).astype(np.int64),
            "meta": np.array(["more"]),
        }
        (np.savez_compressed if compressed else np.savez)(
            source / f"tissuenet_{split}.npz", **arrays
        )


def dsb2018(source: Path) -> None:
    for n in range(3):
        home = source / "stage1_train" / f"id{n}"
        image(home / "images" / f"id{n}.png", n)
        (home / "masks").mkdir()
        for label in (1, 2):
            mask = (truth(n) == label).astype(np.uint8) * 255
            Image.fromarray(mask).save(home / "masks" / f"{label}.png")


def nuinsseg(source: Path) -> None:
    for organ in ("human liver", "mouse spleen"):
        for n in range(2):
            name = f"{organ.replace(' ', '_')}_{n}"
            image(source / organ / "tissue images" / f"{name}.png", n, 3)
            labels(source / organ / "label masks modify" / f"{name}.tif", n)
            labels(source / organ / "label masks" / f"{name}.tif")


def apart(number: int = 0) -> np.ndarray:
    """`truth` with background between the two cells."""
    labels = truth(number)
    labels[:, 7] = 0
    return labels


def tnbc(source: Path) -> None:
    for n, patient in enumerate(("01", "07", "09")):
        home = source / "TNBC_NucleiSegmentation"
        image(home / f"Slide_{patient}" / f"{patient}_1.png", n, 3)
        (home / f"GT_{patient}").mkdir()
        mask = (apart(n) > 0).astype(np.uint8) * 255
        Image.fromarray(mask).save(home / f"GT_{patient}" / f"{patient}_1.png")


def lynsec(source: Path) -> None:
    for n, (folder, name) in enumerate(
        (("lynsec 1", "0_l1"), ("lynsec 2", "35_l2"), ("lynsec 2", "34_l2"), ("lynsec 3", "0_l3"))
    ):
        (source / folder).mkdir(parents=True, exist_ok=True)
        planes = [picture(n, 3), truth(n)[..., None], truth(n)[..., None] > 0]
        array = np.concatenate(planes[: 2 if folder == "lynsec 2" else 3], axis=2)
        np.save(source / folder / f"{name}.npy", array.astype(np.int32))


def vicar(source: Path) -> None:
    for n, line in enumerate(("A2058", "PC3")):
        image(source / "labelled" / line / f"{n}_img.tif", n, dtype=np.float32)
        labels(source / "labelled" / line / f"{n}_mask.png", n)


def yeastsam(source: Path) -> None:
    for n in range(2):
        image(source / "DIC" / f"{n}.tif", n, dtype=np.uint16)
        labels(source / "DIC_mask" / f"{n}.tif", n)


def s_bsst265(source: Path) -> None:
    for n in range(2):
        image(source / "dataset" / "rawimages" / f"HaCaT_{n}.tif", n)
        labels(source / "dataset" / "groundtruth" / f"HaCaT_{n}.tif", n)


def bbbc039(source: Path) -> None:
    for n, split in enumerate(("training", "validation", "test", None)):
        image(source / "images" / f"w{n}.tif", n, dtype=np.uint16)
        (source / "masks").mkdir(exist_ok=True)
        mask = np.zeros((*SHAPE, 4), np.uint8)
        mask[..., 0] = truth(n)
        mask[..., 3] = 255
        Image.fromarray(mask).save(source / "masks" / f"w{n}.png")
        if split:
            (source / "metadata").mkdir(exist_ok=True)
            (source / "metadata" / f"{split}.txt").write_text(f"w{n}.png\n")


def bbbc006(source: Path) -> None:
    for n in range(2):
        name = f"mcf-z-stacks-03212011_a0{n + 1}_s1"
        for depth in (0, 16):
            folder = source / f"BBBC006_v1_images_z_{depth:02d}"
            image(folder / f"{name}_w1abc{depth}.tif", n + depth // 16 - 1 if depth else 9)
            image(folder / f"{name}_w2abc{depth}.tif", 8)
        labels(source / "BBBC006_v1_labels" / f"{name}.png", n)


def ctc(source: Path) -> None:
    for film, kind in (("01", "ST"), ("02", "GT")):
        for n in range(2):
            image(source / film / f"t00{n}.tif", n)
            labels(source / f"{film}_{kind}" / "SEG" / f"man_seg00{n}.tif", n)
            labels(source / f"{film}_GT" / "TRA" / f"man_track00{n}.tif", n)


def coco(source: Path) -> None:
    names = ["a.tif", "b.png"]
    for n, name in enumerate(names):
        image(source / "pictures" / name, n)
    (source / "all.json").write_text(json.dumps(coco_content(names, ("compressed", "rle"))))


def seg_npy(source: Path) -> None:
    for n in range(2):
        image(source / f"{n}.tif", n)
        np.save(source / f"{n}_seg.npy", {"masks": truth(n), "filename": "a"})


def imagej_roi(source: Path) -> None:
    for n, ending in enumerate(("", "_RoiSet")):
        image(source / f"{n}.tif", n)
        write_imagej_rois(source / f"{n}{ending}.zip", truth(n))


def geojson(source: Path) -> None:
    for n, ending in enumerate(("", ".tif")):
        image(source / f"{n}.tif", n)
        write_geojson(source / f"{n}{ending}.geojson", truth(n))


MAKERS = {
    "livecell": livecell,
    "cellpose": cellpose,
    "omnipose": omnipose,
    "tissuenet": tissuenet,
    "dsb2018": dsb2018,
    "nuinsseg": nuinsseg,
    "tnbc": tnbc,
    "lynsec": lynsec,
    "vicar": vicar,
    "yeastsam": yeastsam,
    "s-bsst265": s_bsst265,
    "bbbc039": bbbc039,
    "bbbc006": bbbc006,
    "ctc": ctc,
    "coco": coco,
    "seg_npy": seg_npy,
    "imagej-roi": imagej_roi,
    "geojson": geojson,
}
