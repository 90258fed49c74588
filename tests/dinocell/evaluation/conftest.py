"""Random label pairs that err as segmentations do, shared by the tests of scores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, binary_erosion

NUM_PAIRS = 200


def _discs(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Up to 9 ellipses; later ones cover earlier ones, so that cells touch and come in pieces."""
    rows, columns = np.indices(shape)
    labels = np.zeros(shape, np.uint32)
    for number in range(1, rng.integers(0, 10) + 1):
        row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        radii = rng.uniform(1.0, 7.0, 2)
        inside = ((rows - row) / radii[0]) ** 2 + ((columns - column) / radii[1]) ** 2 <= 1
        labels[inside] = number
    return labels


def _mosaic(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Nearest-seed regions: cells everywhere, no background."""
    rows, columns = np.indices(shape)
    seeds = rng.uniform(0, min(shape), (rng.integers(1, 9), 2))
    distances = (rows[..., None] - seeds[:, 0]) ** 2 + (columns[..., None] - seeds[:, 1]) ** 2
    return (distances.argmin(-1) + 1).astype(np.uint32)


def _segmented_badly(rng: np.random.Generator, truth: np.ndarray) -> np.ndarray:
    """The truth with cells moved, grown, shrunk, split, merged, lost and invented."""
    pred = np.zeros_like(truth)
    next_label = int(truth.max()) + 1
    cells = [int(cell) for cell in np.unique(truth) if cell]
    for cell in cells:
        mask = truth == cell
        fate = rng.choice(["keep", "move", "grow", "shrink", "split", "merge", "lose"])
        if fate == "lose":
            continue
        if fate == "move":
            mask = np.roll(mask, tuple(rng.integers(-3, 4, 2)), (0, 1))
        elif fate == "grow":
            mask = binary_dilation(mask, iterations=int(rng.integers(1, 3)))
        elif fate == "shrink":
            mask = binary_erosion(mask, iterations=1)
        pred[mask] = int(rng.choice(cells)) if fate == "merge" else cell
        if fate == "split":
            half = mask & (np.indices(truth.shape)[int(rng.integers(2))] % 7 < 3)
            pred[half] = next_label
            next_label += 1
    if rng.random() < 0.5:
        row, column = rng.integers(0, truth.shape[0]), rng.integers(0, truth.shape[1])
        pred[row : row + 4, column : column + 4] = next_label
    return pred


def _renumbered(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Cells get other numbers, in another order and with gaps, some above 65,535."""
    new = np.concatenate([[0], rng.choice(80_000, int(labels.max()), replace=False) + 1])
    return new.astype(np.uint32)[labels]


def _random_pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    kind = rng.choice(["discs", "mosaic", "noise"], p=[0.7, 0.15, 0.15])
    shape = (int(rng.integers(8, 36)), int(rng.integers(8, 36)))
    if kind == "noise":  # every object meets every other: matchings are contested
        shape = (int(rng.integers(1, 7)), int(rng.integers(1, 7)))
        truth, pred = rng.integers(0, 5, (2, *shape)).astype(np.uint32)
    else:
        truth = (_discs if kind == "discs" else _mosaic)(rng, shape)
        pred = _segmented_badly(rng, truth)
    if rng.random() < 0.5:
        truth, pred = _renumbered(rng, truth), _renumbered(rng, pred)
    return truth, pred


@pytest.fixture(scope="session")
def random_pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """200 (truth, pred) pairs; some without cells on one side, on both, or without background."""
    rng = np.random.default_rng(20240607)
    return [_random_pair(rng) for _ in range(NUM_PAIRS)]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real images; tests that ask for it are skipped where it is absent."""
    root = Path(__file__).parents[3]
    folder = root / os.environ.get("DINOCELL_DATA", "../shared/data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set DINOCELL_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def expert_labels(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cells of one tissue image as drawn by two experts, thousands each."""
    from PIL import Image

    folder = data_dir / "codex_experts" / "R001_X003_Y004"
    first, second = (
        np.asarray(Image.open(folder / f"cells_expert{n}.png")).astype(np.uint32) for n in (1, 2)
    )
    return first, second
