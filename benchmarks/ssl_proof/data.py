"""Fields of the comparison: what is trained on, and what is tested on, with the truth."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the generator of scenes belongs to the tests

from tests.channel_scenes import CHANNELS, make_channel_scene  # noqa: E402

TRAIN_SHARE, GAP_PX = 0.6, 96
UNSEEN = "nf1_F7"
GENERATED, PLATES = 120, 12  # fields to train on by default, and the plates that they lie on
PROBE_FIELDS, TEST_FIELDS, TEST_PLATES = 12, 24, 6  # generated, on other plates
REPEATS = 20  # of a real field beside GENERATED ones, so that about half of what is seen is real
SKIPPED = ("mask", "brightfield")


@dataclass(frozen=True)
class Field:
    """Raw planes (C, H, W) and, where it is known, the nuclei: (H, W) labels, or a mask of 0 and 1."""

    name: str
    channels: tuple[str, ...]
    planes: NDArray[Any]
    nuclei: NDArray[Any] | None


def read_real(data: Path) -> list[Field]:
    """The fields of `cellpainting` with three or more channels."""
    files: dict[str, dict[str, Path]] = {}
    masks: dict[str, Path] = {}
    folder = data / "cellpainting"
    with (folder / "channels.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            path = folder / row["file"]
            if path.stem.endswith("MaskNuclei"):
                masks[row["field"]] = path
            elif row["channel"].lower() not in SKIPPED:
                files.setdefault(row["field"], {})[row["channel"]] = path
    found = []
    for name, channels in files.items():
        if len(channels) >= 3:
            planes = np.stack([tifffile.imread(path) for path in channels.values()])
            mask = (tifffile.imread(masks[name]) > 0).astype(np.uint8) if name in masks else None
            found.append(Field(name, tuple(channels), planes, mask))
    return found


def left_and_right(field: Field) -> tuple[Field, Field]:
    """The part of a field that is trained on, and the one that is tested on, with a gap between."""
    cut = round(TRAIN_SHARE * field.planes.shape[2])
    parts = (slice(0, cut), slice(cut + GAP_PX, None))
    left, right = (
        Field(
            field.name,
            field.channels,
            field.planes[:, :, part],
            None if field.nuclei is None else field.nuclei[:, part],
        )
        for part in parts
    )
    return left, right


@cache
def generated(kind: str, count: int, plates: int) -> list[Field]:
    """Generated fields of a `kind` (train, probe, test); fields of two kinds share no plate or cell."""
    start = {"train": 0, "probe": 100_000, "test": 200_000}[kind]
    found = []
    for number in range(count):
        scene = make_channel_scene(seed=start + number, plate=start + number % plates)
        found.append(Field(f"{kind}_{number:03d}", CHANNELS, scene.planes, scene.nuclei))
    return found


def write_training_fields(data: Path, folder: Path, count: int = GENERATED) -> None:
    """`fields.csv` and, as a control, `shuffled.csv`, whose channels show different places.

    `count` generated fields; real ones are repeated as often as keeps their share.  SystemExit if the folder
    has another number of them.
    """
    if (folder / "shuffled.csv").is_file():
        with (folder / "shuffled.csv").open(newline="", encoding="utf-8") as stream:
            found = {row["field"] for row in csv.DictReader(stream)}
        if sum(name.startswith("train_") for name in found) != count:
            raise SystemExit(f"{folder} holds another number of generated fields: give --folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str, str]]] = {"fields": [], "shuffled": []}
    real = [left_and_right(field)[0] for field in read_real(data) if field.name != UNSEEN]
    made = generated("train", count, PLATES)
    for place, field in enumerate([*real, *made]):
        for step, (channel, plane) in enumerate(zip(field.channels, field.planes, strict=True)):
            # A real field has a size of its own: its channels are shifted against each other, by more
            # than a window.  A generated one takes its channels from other fields.
            shift = step * plane.shape[0] // len(field.channels) if place < len(real) else 0
            other = made[(place - len(real) + 7 * step) % len(made)]
            names = (field.name, field.name if shift or place < len(real) else other.name)
            for index, name, rows_down in zip(
                ("fields", "shuffled"), names, (0, shift), strict=True
            ):
                file = folder / f"{name}_{channel}_{rows_down}.tif"
                if name == field.name:
                    tifffile.imwrite(file, np.roll(plane, rows_down, 0), compression="deflate")
                repeats = round(REPEATS * count / GENERATED) if place < len(real) else 1
                rows[index] += [
                    (f"{field.name}@{number}", file.name, channel) for number in range(repeats)
                ]
    for index, found in rows.items():
        with (folder / f"{index}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["field", "file", "channel"])
            writer.writerows(found)
