"""The check of label images and the borders of cells."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from dinocell.errors import DataSetError
from dinocell.io import read_labels
from dinocell.labels import (
    as_labels,
    cell_borders,
    check_labels,
    looks_like_labels,
    require_cells,
)

TOUCHING = np.repeat([[1, 1, 1, 2, 2, 2]], 3, axis=0)


def test_what_fits_is_kept() -> None:
    labels = np.array([[1, 2]], np.uint32)
    assert as_labels(labels) is labels
    assert as_labels(labels.astype(np.int8)).dtype == np.uint32
    assert as_labels(np.zeros((3, 4), np.int64).T).flags.c_contiguous
    assert as_labels(np.array([[2**32 - 1]])).tolist() == [[2**32 - 1]]
    assert as_labels(np.zeros((0, 5), np.int64)).shape == (0, 5)
    wide = np.array([2**64 - 1], np.uint64)
    assert check_labels(wide) is wide


def test_what_is_no_label_image_is_refused_by_its_name() -> None:
    for wrong in (np.zeros((3, 4)), np.zeros((3, 4), bool)):
        with pytest.raises(TypeError, match=f"`truth` must be an integer .* {wrong.dtype}"):
            check_labels(wrong, "truth")
    with pytest.raises(ValueError, match="`labels` must hold labels of 0 and above, got -1"):
        as_labels([[0, -1]])
    with pytest.raises(ValueError, match="got 4294967296"):
        as_labels([[2**32]])
    for function in (as_labels, cell_borders):
        with pytest.raises(ValueError, match=r"2-D \(H, W\), got shape \(2, 3, 4\)"):
            function(np.zeros((2, 3, 4), int))
    with pytest.raises(TypeError, match="thickness_px"):
        cell_borders(TOUCHING, thickness_px=1.5)
    with pytest.raises(ValueError, match="thickness_px"):
        cell_borders(TOUCHING, thickness_px=0)


def test_border_of_a_square_is_its_rim() -> None:
    labels = np.zeros((11, 11), int)
    labels[1:10, 1:10] = 4
    for thickness in (1, 2, 4):
        expected = labels > 0
        expected[1 + thickness : 10 - thickness, 1 + thickness : 10 - thickness] = False
        assert np.array_equal(cell_borders(labels, thickness_px=thickness), expected)
    assert cell_borders(labels, thickness_px=50).sum() == 81


def test_touching_cells_both_have_a_border_and_the_edge_of_the_image_is_none() -> None:
    assert (cell_borders(TOUCHING) == np.array([[0, 0, 1, 1, 0, 0]], bool)).all()
    assert not cell_borders(np.ones((4, 4), int)).any()
    assert not cell_borders(np.zeros((4, 4), int)).any()
    assert cell_borders([[0, 0], [0, 3]]).tolist() == [[False, False], [False, True]]


def test_borders_equal_scikit_image() -> None:
    from scipy import ndimage
    from skimage.segmentation import find_boundaries

    for seed in range(5):
        rng = np.random.default_rng(seed)
        cells = ndimage.gaussian_filter(rng.random((23, 31)), 1) > 0.5
        labels = rng.integers(0, 4, (23, 31)) * cells
        assert np.array_equal(cell_borders(labels), find_boundaries(labels, mode="inner"))


def two_discs(value: int = 1) -> np.ndarray:
    """Two touching discs of radius 6, labelled 1 and 2 (times `value`)."""
    rows, cols = np.ogrid[:20, :32]
    labels = np.zeros((20, 32), dtype=np.int64)
    labels[(rows - 9) ** 2 + (cols - 9) ** 2 <= 36] = value
    labels[(rows - 9) ** 2 + (cols - 21) ** 2 <= 36] = 2 * value
    return labels


def test_masks_and_labels_are_recognised():
    mask = (two_discs() > 0).astype(np.uint8)
    for pixels in (
        mask,
        mask * 255,
        mask.astype(bool),
        two_discs(),
        two_discs().astype(np.float32),
        255 - mask * 255,
        two_discs(30_000).astype(np.uint16),
        two_discs(2**30),
        np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20), dtype=int)),  # no background
    ):
        assert looks_like_labels(pixels)
    colours = np.array([(0, 0, 0), (255, 30, 0), (0, 90, 255)], dtype=np.uint8)[two_discs()]
    assert looks_like_labels(colours)


def test_images_are_not_taken_for_masks():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    rows, cols = np.mgrid[:64, :64]
    blob = 200 * np.exp(-((rows - 30) ** 2 + (cols - 30) ** 2) / 200)
    dark = np.random.default_rng(0).poisson(0.02, (64, 64))  # photon counts, mostly 0
    for pixels in (
        noise,
        noise / 255,
        np.dstack([noise, noise.T, noise[::-1]]),
        np.dstack([noise, noise.T]),
        blob.astype(np.uint8),
        (blob / 20).astype(np.uint8),  # ten gray levels: flat steps that follow one another
        dark,
        np.zeros((64, 64), dtype=np.uint16),
        np.full((64, 64), 7),
        np.ones((1, 1)),
        np.zeros((0, 3)),
        two_discs() + 0.5,
    ):
        assert not looks_like_labels(pixels)


def test_real_images_and_labels_are_distinguished(data_dir):
    """Some of the collections; the figures of all are in `looks_like_labels`."""
    from dinocell.io import read_image

    wrong = []
    for collection in ("dsb2018", "dsb2018_tissue", "bbbc039", "usiigaci_phase"):
        for kind, expected in (("images", False), ("labels", True)):
            for path in sorted((data_dir / collection).glob(f"*/{kind}/*"))[::50]:
                pixels = read_image(path).pixels
                if np.ptp(pixels) > 0 and looks_like_labels(pixels) != expected:
                    wrong.append(path)
    assert wrong == []


def cells() -> np.ndarray:
    """Twelve discs of 9 px radius in (90, 120)."""
    rows, columns = np.mgrid[:90, :120]
    image = np.zeros((90, 120), np.uint8)
    for label in range(12):
        row, column = 15 + 30 * (label // 4), 15 + 30 * (label % 4)
        image[np.hypot(rows - row, columns - column) < 9] = label + 1
    return image


def as_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image * 20).save(buffer, "JPEG")
    return np.asarray(Image.open(buffer))


def resized(image: np.ndarray, order: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((240, 180), order))


NO_LABELS = {
    "mask": (lambda x: (x > 0).astype(np.uint8), "a mask: its 12 separate objects"),
    "mask of 255": (lambda x: 255 * (x > 0).astype(np.uint8), "a mask: its 12 separate objects"),
    "JPEG": (as_jpeg, "saved as JPEG"),
    "interpolated": (lambda x: resized(x, Image.Resampling.BILINEAR), "resized with interpolation"),
    "background 1": (lambda x: x + 1, "labelled background"),
    "outlines": (lambda x: x * cell_borders(x), "outlines: 12 of 12 cells are thin lines"),
    "outlines of 2 px": (lambda x: x * cell_borders(x, thickness_px=2), "outlines: 12 of 12"),
    "outlines, cut": (lambda x: (x * cell_borders(x))[10:], "outlines: 8 of 12"),
    "ilastik": (lambda x: 1 + (x > 0).astype(np.uint8), "labelled background"),
    "inverted": (lambda x: (x == 0).astype(np.uint8), "labelled background"),
    "intensities": (
        lambda x: (30 + 9 * x + np.random.default_rng(0).integers(0, 9, x.shape)).astype(np.uint8),
        "intensities",
    ),
}


@pytest.mark.parametrize("kind", NO_LABELS)
def test_what_has_the_form_of_labels_but_is_none_is_refused(kind: str) -> None:
    change, reason = NO_LABELS[kind]
    with pytest.raises(DataSetError, match=reason) as error:
        require_cells(change(cells()), "set/a.png")
    assert "'set/a.png'" in str(error.value)


def test_the_cure_of_outlines_gives_the_cells_back() -> None:
    apart = np.pad(cells(), 20)
    beside = np.roll(apart, 14, axis=1)
    touching = np.where(beside, beside + 12, apart)
    lines = touching * cell_borders(touching)
    with pytest.raises(DataSetError, match=r"binary_fill_holes\(labels == number\)"):
        require_cells(lines, "a.png")
    for number in np.unique(lines[lines > 0]):
        lines[ndimage.binary_fill_holes(lines == number)] = number
    assert np.array_equal(lines, touching)


@pytest.mark.parametrize(
    "labels",
    [
        cells(),
        np.zeros((9, 9), np.uint8),
        np.pad(np.ones((9, 9), np.uint8), 6),  # one cell
        resized(cells(), Image.Resampling.NEAREST),
        np.where(np.arange(120) % 30 < 2, 0, cells()),  # a line parts four cells
        cells()[:20, :20],  # a cell that fills most of the image
        cells() * cell_borders(cells(), thickness_px=4),  # thick rings
        np.kron(cells() * cell_borders(cells()), np.ones((5, 5), np.uint8)),  # lines of 5 px
        cells() * (cell_borders(cells()) | (cells() > 5)),  # some cells are filled
    ],
)
def test_labels_are_labels(labels: np.ndarray) -> None:
    require_cells(labels, "a.png")


def test_real_labels_are_labels(data_dir: Path) -> None:
    paths = [
        path
        for path in sorted(data_dir.glob("*/*/labels/*"))[::9]
        if path.suffix in (".png", ".tif")
    ]
    assert len(paths) > 50
    for path in paths:
        require_cells(read_labels(path), path)


def test_half_precision_is_compared_without_overflow(tmp_path):
    """Warnings are errors here."""
    labels = np.zeros((32, 32), np.float16)
    labels[4:28, 4:28] = 3
    assert looks_like_labels(labels)
    np.save(tmp_path / "half.npy", labels)
    assert read_labels(tmp_path / "half.npy").max() == 3
