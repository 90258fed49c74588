"""The folder in which the commands of README and docs run: small files under the names that pages use."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from dinocell.io import read_image, read_labels, write_image, write_labels
from dinov3.models import vision_transformer

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "dinocell" / "samples"
MODELS = ROOT / "dinocell" / "models"
SIDE = 192  # of every image, in px

# A word of a command → what it gets in addition, so that it works for seconds: options that a user may give.
SHORTER = {
    "adapt": ["--steps", "1"],
    "train": [
        *("schedule.steps=2", "schedule.eval_every=2", "schedule.batch_size=1"),
        *("schedule.crop_px=64", "model.window_px=64", "model.overlap_px=16"),
    ],
    "pretrain": [
        *("optim.epochs=1", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"),
        *("train.OFFICIAL_EPOCH_LENGTH=2", "train.batch_size_per_gpu=2", "train.num_workers=0"),
        *("student.arch=vit_tiny", "student.pretrained_weights=", "multiview.photometrics=worker"),
        *("dino.head_n_prototypes=64", "dino.head_hidden_dim=64", "dino.head_bottleneck_dim=32"),
        *("ibot.head_n_prototypes=64", "ibot.head_hidden_dim=64", "ibot.head_bottleneck_dim=32"),
        *("crops.global_crops_size=64", "crops.local_crops_size=32", "crops.local_crops_number=2"),
        *("teacher.warmup_teacher_temp_epochs=0", "multiview.pixel_size_um=null"),
    ],
    "inspect": ["--windows-per-field", "2", "--window-px", "64"],
    "--per-channel-data": ["--per-channel-steps", "2"],
}
# Names in pages that depend on how long a run is.
RENAMED = {"training_999": "training_1"}


def fill(folder: Path) -> None:
    """Write all of it; `folder` is empty."""
    for name in ("configs", "benchmarks", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "dinocell").mkdir()
    (folder / "dinocell" / "samples").symlink_to(SAMPLES)
    for name in ("images", "my_images", "more_images", "plate", "PICTURES"):
        _pairs(folder / name, None)
    _pairs(folder / "images", folder / "labels")
    _pairs(folder / "val" / "images", folder / "val" / "labels")
    for split in ("train", "val"):
        data = folder / "data" / "dsb2018" / split
        _pairs(data / "images", data / "labels")
    for name in ("image.tif", "nuclei.tif"):
        shutil.copy(folder / "images" / "a.tif", folder / name)
    _czi(folder / "image.czi")
    for name in ("fields", "FIELDS", "codex_experts", "data/cellpainting"):
        _fields(folder / name)
    _index(folder / "fields", folder / "fields.csv")
    doubles = _loaded(ROOT / "tests" / "dinocell" / "datasets" / "layout_doubles.py")
    for layout, name in (
        ("livecell", "LIVECell_dataset_2021"),
        ("cellpose", "cellpose_cyto"),
        ("s-bsst265", "downloads/s-bsst265"),
    ):
        doubles.MAKERS[layout](folder / name)
    shutil.copy(MODELS / "dinocell-tiny.safetensors", folder / "FILE")
    for name in ("before.pth", "after.pth", "IN"):
        _backbone(folder / name)
    _geojson(folder)


def _pairs(images: Path, labels: Path | None) -> None:
    """Two images, and their labels."""
    images.mkdir(parents=True, exist_ok=True)
    for name, sample in (("a", "nuclei_16bit.tif"), ("b", "nuclei_small.png")):
        pixels = read_image(SAMPLES / sample).pixels[:SIDE, :SIDE]
        write_image(images / f"{name}.tif", pixels)
        if labels is not None:
            labels.mkdir(parents=True, exist_ok=True)
            truth = read_labels(SAMPLES / "labels" / f"{Path(sample).stem}.png")
            write_labels(labels / f"{name}.png", truth[:SIDE, :SIDE])


def _fields(folder: Path) -> None:
    """Three fields of two channels, one file for each, and a label image of each."""
    folder.mkdir()
    rows = [("field", "file", "channel")]
    for number in range(3):
        pixels = read_image(SAMPLES / "nuclei_16bit.tif").pixels[:, 90 * number :][:SIDE, :SIDE]
        truth = read_labels(SAMPLES / "labels" / "nuclei_16bit.png")[:, 90 * number :][:SIDE, :SIDE]
        for channel, plane in (("DNA", pixels), ("ER", np.roll(pixels, 5, 0) // 2 + 100)):
            path = Path(f"f{number}", f"{channel}.tif")
            (folder / path).parent.mkdir(exist_ok=True)
            write_image(folder / path, plane)
            rows.append((f"f{number}", str(path), channel))
        write_labels(folder / f"f{number}" / "cells_expert1.png", truth)
    with (folder / "channels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def _index(fields: Path, path: Path) -> None:
    """A table that names channels, outside of their folder."""
    with (fields / "channels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["field", "file", "channel"])
        for row in rows:
            writer.writerow([row["field"], fields / row["file"], row["channel"]])


def _czi(path: Path) -> None:
    from pylibCZIrw import czi

    with czi.create_czi(str(path)) as file:
        file.write(np.arange(64 * 48, dtype=np.uint16).reshape(64, 48), plane={"C": 0})


def _geojson(folder: Path) -> None:
    """`a.geojson`, as corrected in QuPath."""
    from dinocell.results.conversion import convert_labels

    convert_labels(folder / "labels" / "a.png", folder / "a.geojson")


def _backbone(path: Path) -> None:
    """A file as Meta's, of a small network with random weights."""
    torch.manual_seed(0)
    network = vision_transformer.vit_tiny(patch_size=8, n_storage_tokens=4, mask_k_bias=True)
    network.init_weights()
    torch.save(network.state_dict(), path)


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_programs(folder: Path, port: int) -> None:
    """`dinocell`, `python` and `curl` for the shell: of this tree, shortened, and strict."""
    folder.mkdir()
    (folder / "dinocell").write_text(
        f"""#!{sys.executable} -P
import subprocess, sys, time, urllib.request
words = sys.argv[1:]
shorter = {SHORTER!r}
program = [sys.executable, "-P", "-m", "dinocell"]
if words[0] in ("serve", "view"):
    port = {port} + (words[0] == "view")
    server = subprocess.Popen([*program, *words, "--port", str(port)], start_new_session=True,
                              stdout=open(f"{{words[0]}}.log", "w"), stderr=subprocess.STDOUT)
    open("servers", "a").write(f"{{server.pid}}\\n")
    for _ in range(600):
        time.sleep(0.2)
        assert server.poll() is None, open(f"{{words[0]}}.log").read()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{{port}}/health").read()
            sys.exit()
        except OSError:
            pass
    sys.exit("the server does not answer")
more = [option for word, options in shorter.items() if word in words for option in options]
sys.exit(subprocess.run([*program, *words, *more]).returncode)
"""
    )
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "$@"\n')
    (folder / "curl").write_text(
        f'#!/bin/sh\nexec "{shutil.which("curl")}" --fail-with-body -sS "$@"\n'
    )
    for program in folder.iterdir():
        program.chmod(0o755)


def environment(folder: Path, programs: Path) -> dict[str, str]:
    """What the commands see of their surroundings."""
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}",
        "DINOCELL_DATA": str(folder / "data"),
        "DINOCELL_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "XDG_STATE_HOME": str(folder / "state"),
        "DINOCELL_WEIGHTS": str(folder / "weights"),
        "MPLBACKEND": "agg",
        "PYTHONWARNINGS": "default",
    }
