"""Corrections by hand on pictures that one can draw: two touching discs, a bar, a faint disc."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dinocell.errors import UsageError
from dinocell.segmentation import corrections as by_hand
from dinocell.segmentation.distance_map import labels_to_distance_map
from dinocell.segmentation.thresholds import Thresholds

THRESHOLDS = Thresholds(0.5, 0.2, 0.05, 0)


def disc(row, column, radius, shape=(40, 60)):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


@pytest.fixture
def two():
    """Two touching discs, their map, and labels in which they are one cell, beside another one."""
    true = disc(15, 15, 8) * 1 + disc(15, 31, 8) * 2 * ~disc(15, 15, 8) + disc(30, 50, 5) * 3
    merged = np.where(true == 2, 1, true).astype(np.uint32)
    return true.astype(np.uint32), labels_to_distance_map(true.astype(np.uint32)), merged


def cells(labels) -> set[bytes]:
    return {(labels == number).tobytes() for number in np.unique(labels) if number}


def test_cells_are_removed_and_merged(two):
    true, _, merged = two
    assert cells(by_hand.remove_cells(true, [2])) == cells(true) - {(true == 2).tobytes()}
    assert (by_hand.merge_cells(true, [1, 2]) == merged).all()
    for wrong in ([1], [1, 9], [0, 1]):
        with pytest.raises(UsageError, match=r"Cells must|must name 2"):
            by_hand.merge_cells(true, wrong)


@pytest.mark.parametrize("seeds", [(), [(12, 11), (18, 35)], [(15, 22), (15, 25)]])
def test_a_valley_of_the_map_splits_a_cell(two, seeds):
    true, heights, merged = two
    split = by_hand.split_cell(merged, heights, 1, seeds)
    assert (split != true).sum() <= 0.02 * (true > 0).sum() or cells(split) == cells(true)
    assert len(cells(split)) == 3
    assert (split[true == 3] == 3).all()


def test_without_a_valley_the_closer_seed_takes_a_pixel():
    bar = np.zeros((12, 40), np.uint32)
    bar[3:9, 2:38] = 1
    heights = labels_to_distance_map(bar)
    split = by_hand.split_cell(bar, heights * 0 + (bar > 0), 1, [(6, 5), (6, 15)])
    columns = [np.nonzero(split == number)[1] for number in (1, 2)]
    assert sorted((c.min(), c.max()) for c in columns) in ([(2, 9), (10, 37)], [(2, 10), (11, 37)])
    with pytest.raises(UsageError, match="draw a line"):
        by_hand.split_cell(bar, (bar > 0).astype(np.float32), 1)
    with pytest.raises(UsageError, match="Seeds must"):
        by_hand.split_cell(bar, heights, 1, [(6, 5), (0, 0)])


def test_a_line_cuts_the_cells_that_it_crosses(two):
    true, heights, merged = two
    cut = by_hand.cut_cells(merged, heights, [(0, 22.5), (39, 24.5)])
    assert len(cells(cut)) == 3
    assert ((cut > 0) == (merged > 0)).all()
    sides = np.where(true == 1, cut[15, 10], np.where(true == 2, cut[15, 36], true))
    assert (cut != sides).sum() < 20
    for line in ([(0, 0), (5, 5)], [(15, 10), (15, 20)]):
        with pytest.raises(UsageError, match="A line must cross a cell"):
            by_hand.cut_cells(merged, heights, line)
    with pytest.raises(UsageError, match="A line must cross a cell"):
        by_hand.cut_cells(merged, heights, [(0, 22.5), (39, 24.5)], cells=[3])


def test_a_missed_cell_grows_from_a_click(two):
    true, heights, _ = two
    faint = (np.where(true == 2, 0.3, 1) * heights).astype(np.float32)
    found = np.where(true == 2, 0, true).astype(np.uint32)
    grown = by_hand.grow_cell(found, faint, (15, 34), THRESHOLDS)
    new = grown == 4
    assert (new & (true != 2)).sum() == 0
    assert new.sum() > 0.6 * (true == 2).sum()
    assert (grown[~new] == found[~new]).all()
    for at, word in (((15, 15), "cell 1"), ((0, 59), "brush"), ((99, 0), "inside the image")):
        with pytest.raises(UsageError, match=word):
            by_hand.grow_cell(found, faint, at, THRESHOLDS)


def test_the_brush_paints_around_other_cells(two):
    true, _, _ = two
    stroke = [(30, 20), (30, 55)]
    painted = by_hand.paint_cell(true, stroke, 3)
    assert (painted[true > 0] == true[true > 0]).all()
    new = painted == 4
    reach = ndimage.distance_transform_edt(~np.isin(np.arange(60), np.arange(20, 56)))
    assert new[30].sum() == ((reach <= 2.5) & (true[30] == 0)).sum()
    assert set(np.nonzero(new)[0]) == set(range(28, 33))
    assert (by_hand.paint_cell(true, stroke, 3, 3) == np.where(new, 3, true)).all()
    with pytest.raises(UsageError, match="background"):
        by_hand.paint_cell(true, [(15, 15)], 2)


def test_an_eraser_through_a_cell_leaves_two(two):
    true, _, _ = two
    erased = by_hand.erase(true, [(0, 50), (39, 50)], 1)
    assert (erased[:, 50] == 0).all()
    assert len(cells(erased)) == 4
    assert (erased[:, :45] == true[:, :45]).all()
    assert len(cells(by_hand.erase(true, [(0, 50), (39, 50)], 1, min_area_px=60))) == 3
    assert (by_hand.erase(true, [(15, 10), (15, 40)], 2, [2])[true == 1] == 1).all()
    assert len(cells(by_hand.erase(true, [(30, 50)], 9))) == 2


def test_touched_cells_stay_when_the_thresholds_change(two):
    true, _, merged = two
    split = np.where(true == 2, 9, true).astype(np.uint32)
    touched = by_hand.touched_by(merged, split)
    assert (touched == ((true == 1) | (true == 2))).all()
    found = np.where(disc(30, 50, 6), 2, merged).astype(np.uint32)
    kept = by_hand.keep_touched(found, split, touched)
    assert (kept[touched] == split[touched]).all()
    assert cells(kept) == {
        (split == 1).tobytes(),
        (split == 9).tobytes(),
        disc(30, 50, 6).tobytes(),
    }
    removed = by_hand.remove_cells(true, [3])
    kept = by_hand.keep_touched(found, removed, by_hand.touched_by(true, removed))
    assert cells(kept) == {(merged == 1).tobytes()}  # the ring around a removed cell is no cell
    nothing = np.zeros_like(touched)
    assert by_hand.keep_touched(found, split, nothing) is found


def test_unchanged_cells_keep_their_numbers(two):
    true, _, _ = two
    other = np.array([0, 70, 5, 9], np.uint16)[true]
    other[disc(4, 50, 2)] = 6
    kept = by_hand.same_numbers(true, other)
    assert (kept == np.where(disc(4, 50, 2), 4, true)).all()
    assert (by_hand.same_numbers(true, np.zeros_like(other)) == 0).all()
