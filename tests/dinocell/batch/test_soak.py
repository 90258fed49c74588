"""A batch of many kinds of files that is killed again and again gives what an undisturbed run gives."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as PillowImage

from dinocell.batch.journal import JOURNAL_NAME, count_rows, read_journal
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.io import find_images, write_image
from dinocell.network.model import save_model

COUNT, KILLS = 50, 5
NOT_COMPARED = (JOURNAL_NAME, "report.html")  # order of completion; maps of earlier runs


def field(rng: np.random.Generator) -> np.ndarray:
    """Bright discs on noise, (H, W) float64 in 0 … 1, of another size each time."""
    height, width = rng.integers(40, 110, 2)
    rows, cols = np.mgrid[:height, :width]
    image = rng.normal(0.1, 0.02, (height, width))
    for row, col in zip(rng.integers(0, height, 6), rng.integers(0, width, 6), strict=True):
        image[np.hypot(rows - row, cols - col) < rng.uniform(5, 10)] += 0.6
    return image.clip(0, 1)


def gray16(path: Path, image: np.ndarray) -> None:
    write_image(path.with_suffix(".tif"), (image * 4000).astype(np.uint16), pixel_size_um=0.5)


def gray8_turned(path: Path, image: np.ndarray) -> None:
    exif = PillowImage.Exif()
    exif[274] = 6
    picture = PillowImage.fromarray((image * 255).astype(np.uint8))
    picture.save(path.with_suffix(".jpg"), exif=exif, quality=90)


def png16(path: Path, image: np.ndarray) -> None:
    write_image(path.with_suffix(".png"), (image * 60_000).astype(np.uint16))


def real(path: Path, image: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), image.astype(np.float32))


def bitmap(path: Path, image: np.ndarray) -> None:
    PillowImage.fromarray((image * 255).astype(np.uint8)).save(path.with_suffix(".bmp"))


def oblong(path: Path, image: np.ndarray) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.7}
    tifffile.imwrite(
        path.with_suffix(".ome.tif"), (image * 900).astype(np.uint16), metadata=metadata
    )


def constant(path: Path, image: np.ndarray) -> None:
    write_image(path.with_suffix(".tif"), np.full(image.shape, 7, np.uint8))


def latin1(path: Path, image: np.ndarray) -> None:
    gray16(path.with_name(f"{path.name}{os.fsdecode(bytes([0xE9]))}"), image)


def colour(path: Path, image: np.ndarray) -> None:
    rgb = np.stack([image, image[::-1], image[:, ::-1]], axis=-1)
    write_image(path.with_suffix(".png"), (rgb * 255).astype(np.uint8))


def cut(path: Path, image: np.ndarray) -> None:
    gray16(path, image)
    content = path.with_suffix(".tif").read_bytes()
    path.with_suffix(".tif").write_bytes(content[: len(content) // 2])


GOOD = (gray16, gray8_turned, png16, real, bitmap, oblong, constant, latin1)
BAD = (colour, cut)


@pytest.fixture(scope="module")
def plate(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plate")
    rng = np.random.default_rng(5)
    for index in range(COUNT):
        (GOOD + BAD)[index % 10](folder / f"well{index}", field(rng))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in NOT_COMPARED}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_killed_at_random_moments_equals_an_undisturbed_one(
    plate, small_model, tmp_path, workers
):
    save_model(tmp_path / "m.safetensors", small_model)
    command = [
        *(sys.executable, "-m", "dinocell", "segment", str(plate), "-m"),
        *(str(tmp_path / "m.safetensors"), "--device", "cpu", "--workers", str(workers)),
        *("--report", "--format", "tif", "--format", "geojson", "--resume", "-o"),
    ]

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, out], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole)
    expected_text, errors = undisturbed.communicate()
    assert undisturbed.returncode == 1
    assert b"Warning" not in errors
    chance = random.Random(workers)
    for kill in range(KILLS):
        target = (kill + 1) * (COUNT - len(BAD) * COUNT // 10) // (KILLS + 1) + chance.randint(0, 3)
        process = start(killed)
        while count_rows(killed / JOURNAL_NAME) < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = start(killed)
    text, errors = last.communicate()
    assert last.returncode == 1
    assert b"Traceback" not in errors
    for stream in (expected_text, text):  # the same notes and failures
        assert stream.count(b"\nfailed: ") == COUNT // 10 * len(BAD)
        assert stream.count(b"\nnote: ") == COUNT // 10 * 3
    assert contents(killed) == contents(whole)
    journals = [
        {row["name"]: row for row in read_journal(f / JOURNAL_NAME)} for f in (whole, killed)
    ]
    assert journals[0] == journals[1]
    assert len(journals[0]) == COUNT // 10 * len(GOOD)


def test_a_batch_leaves_no_file_open(plate, mini_model, tmp_path):
    paths = find_images([plate])[:20]
    options = SegmentOptions(device="cpu", workers=2, report=True)
    segment_files(paths[:2], tmp_path / "warm", options, model=mini_model, shown=False)
    before = sorted(os.listdir("/proc/self/fd"))
    result = segment_files(paths, tmp_path / "out", options, model=mini_model, shown=False)
    assert len(result.failures) == 4
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not list((tmp_path / "out").glob(".tmp-*"))
