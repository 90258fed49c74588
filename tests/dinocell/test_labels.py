"""The check of label images and the borders of cells."""

from __future__ import annotations

import numpy as np
import pytest

from dinocell.labels import as_labels, cell_borders, check_labels

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
