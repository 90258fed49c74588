"""Distance maps against hand-computed pictures, brute force, scipy and the `edt` package."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial.distance import cdist

from dinocell.network.config import ModelConfig
from dinocell.segmentation.distance_map import DEFAULT_TARGET, TARGETS, labels_to_distance_map

SMALL_LABELS = hnp.arrays(
    np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 3)
)


def picture(text: str) -> np.ndarray:
    """Rows of digits to a label image; a dot is background."""
    return np.array([[0 if mark == "." else int(mark) for mark in line] for line in text.split()])


def linear(labels: np.ndarray) -> np.ndarray:
    return labels_to_distance_map(labels, target="linear")


def brute_force(labels: np.ndarray) -> np.ndarray:
    """Linear map from all distances between the pixels of a cell and the pixels outside it."""
    expected = np.zeros(labels.shape)
    for cell in np.unique(labels[labels != 0]):
        inside, outside = np.argwhere(labels == cell), np.argwhere(labels != cell)
        if len(outside) == 0:
            expected[labels == cell] = 1.0
            continue
        depth = cdist(inside, outside).min(axis=1)
        expected[tuple(inside.T)] = depth / depth.max()
    return expected


def depth_in_px(labels: np.ndarray) -> np.ndarray:
    """Distance of the pixels of a single cell to the nearest pixel outside, not yet divided."""
    inside, outside = np.argwhere(labels != 0), np.argwhere(labels == 0)
    return cdist(inside, outside).min(axis=1)


def blobs(rng: np.random.Generator, shape: tuple[int, int], num_cells: int) -> np.ndarray:
    """Touching cells in one or several pieces, with holes, some cut by the border."""
    rows, columns = np.indices(shape)
    labels = np.zeros(shape, np.uint32)
    for cell in range(1, num_cells + 1):
        row, column = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        radius = np.hypot((rows - row) / rng.uniform(0.6, 1.6), columns - column)
        outer = rng.uniform(3, 25)
        labels[(radius < outer) & (radius > outer * rng.choice([0.0, 0.0, 0.5]))] = cell
    labels[rng.random(shape) < 0.002] = 0
    return labels


# ---- pictures drawn by hand ---------------------------------------------------------------


def test_a_square_by_hand() -> None:
    labels = picture(".......  .11111. .11111. .11111. .11111. .11111. .......")
    expected = np.array(
        [
            [0, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 1, 0],
            [0, 1, 2, 2, 2, 1, 0],
            [0, 1, 2, 3, 2, 1, 0],
            [0, 1, 2, 2, 2, 1, 0],
            [0, 1, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ]
    )
    assert linear(labels) == pytest.approx(expected / 3)
    assert labels_to_distance_map(labels, target="sqrt") == pytest.approx(np.sqrt(expected / 3))


def test_the_distance_is_euclidean_not_city_block() -> None:
    labels = picture("11111 11111 1.111 11111 11111")
    assert linear(labels)[0, 4] == pytest.approx(1.0)  # the deepest: sqrt(4 + 9) away from the hole
    assert linear(labels)[4, 4] == pytest.approx(1.0)
    assert linear(labels)[0, 2] == pytest.approx(math.sqrt(5 / 13))
    assert linear(labels)[0, 1] == pytest.approx(math.sqrt(4 / 13))
    assert linear(labels)[1, 2] == pytest.approx(math.sqrt(2 / 13))


def test_another_cell_is_outside() -> None:
    assert linear(picture("1112222")).tolist() == [
        pytest.approx([1, 2 / 3, 1 / 3, 1 / 4, 2 / 4, 3 / 4, 1])
    ]
    assert linear(picture("...... .1122. .1122. ......")).max(initial=0) == 1.0
    assert np.array_equal(linear(picture("...... .1122. ......"))[1], [0, 1, 1, 1, 1, 0])


def test_the_image_border_is_not_outside() -> None:
    labels = picture("111.. 111.. 111.. 111.. 111..")
    assert linear(labels) == pytest.approx(np.tile([1, 2 / 3, 1 / 3, 0, 0], (5, 1)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 9)])
def test_a_cell_that_fills_the_image_is_one_everywhere(target: str, shape: tuple[int, int]) -> None:
    labels = np.full(shape, 3)
    assert np.array_equal(labels_to_distance_map(labels, target=target), np.ones(shape))


@pytest.mark.parametrize("target", TARGETS)
def test_one_pixel(target: str) -> None:
    labels = np.zeros((5, 4), np.uint8)
    labels[2, 1] = 200
    assert np.array_equal(labels_to_distance_map(labels, target=target), labels > 0)


def test_a_ring_is_deepest_along_its_middle() -> None:
    labels = picture(
        "......... .1111111. .1111111. .1111111. .111.111. .1111111. .1111111. .1111111. ........."
    )
    depth = linear(labels)
    assert depth[4, 4] == 0  # the hole
    assert depth[4, 3] == depth[3, 4] == depth[1, 1]
    # Two steps from the border: all around, at most sqrt(8) from the hole.
    middle_line = np.zeros((9, 9), bool)
    middle_line[2:7, 2:7] = True
    middle_line[3:6, 3:6] = False
    assert np.array_equal(depth == 1, middle_line)


def test_the_pieces_of_a_cell_share_one_maximum() -> None:
    labels = picture("....... .111.1. .111... .111... .......")
    assert linear(labels)[1, 5] == 0.5
    assert linear(labels)[2, 2] == 1.0


@pytest.mark.parametrize("target", TARGETS)
def test_two_touching_discs_are_parted_by_a_valley(target: str) -> None:
    rows, columns = np.indices((25, 45))
    labels = np.zeros((25, 45), np.uint16)
    labels[np.hypot(rows - 12, columns - 12) < 11] = 1
    labels[np.hypot(rows - 12, columns - 32) < 10] = 2  # columns 22 and 23 touch in row 12
    assert labels[12, 21:25].tolist() == [1, 1, 2, 2]
    depth = labels_to_distance_map(labels, target=target)
    share = (lambda part: part) if target == "linear" else math.sqrt
    assert depth[12, [12, 22, 23, 32]] == pytest.approx([1, share(1 / 11), share(1 / 10), 1])
    along = depth[12, 12:33]
    assert (np.diff(along[:11]) < 0).all()  # down to column 22 and from 23 up again
    assert (np.diff(along[11:]) > 0).all()


def test_a_cell_cut_by_the_border_is_deepest_there() -> None:
    rows, columns = np.indices((20, 21))
    labels = (np.hypot(rows + 3, columns - 10) < 9).astype(int)
    depth = linear(labels)
    assert depth[0].max() == 1 > depth[1:].max()
    assert depth[5, 10] == pytest.approx(1 / depth_in_px(labels).max())


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (4, 6)])
def test_no_cell_gives_zeros(shape: tuple[int, int]) -> None:
    empty = labels_to_distance_map(np.zeros(shape, np.uint16))
    assert empty.shape == shape
    assert empty.dtype == np.float32
    assert not empty.any()


def test_a_list_is_an_array() -> None:
    assert labels_to_distance_map([[0, 5], [0, 0]]).tolist() == [[0, 1], [0, 0]]


# ---- laws ---------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(labels=SMALL_LABELS)
def test_equals_brute_force(labels: np.ndarray) -> None:
    depth = linear(labels)
    assert depth == pytest.approx(brute_force(labels), abs=1e-6)
    assert labels_to_distance_map(labels, target="sqrt") == pytest.approx(np.sqrt(depth), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(labels=SMALL_LABELS)
def test_turning_the_image_turns_the_map(labels: np.ndarray) -> None:
    assert np.array_equal(linear(labels.T), linear(labels).T)
    assert np.array_equal(linear(labels[::-1]), linear(labels)[::-1])
    assert np.array_equal(linear(labels[:, ::-1]), linear(labels)[:, ::-1])


@settings(max_examples=40, deadline=None)
@given(labels=SMALL_LABELS, target=st.sampled_from(TARGETS))
def test_every_cell_peaks_at_exactly_one(labels: np.ndarray, target: str) -> None:
    depth = labels_to_distance_map(labels, target=target)
    assert depth.dtype == np.float32
    assert depth.flags.c_contiguous
    assert np.array_equal(depth > 0, labels > 0)
    for cell in np.unique(labels[labels > 0]):
        assert depth[labels == cell].max() == 1.0


@pytest.mark.parametrize(
    ("dtype", "numbers"),
    [
        (np.uint8, (0, 255, 7, 128)),
        (np.int8, (0, 127, 1, 2)),
        (np.uint16, (0, 65_535, 3, 40_000)),
        (np.int32, (0, 2**31 - 1, 70_000, 9)),
        (np.uint32, (0, 2**32 - 1, 100_000, 2**24)),
        (np.int64, (0, 2**62, 2**24 - 1, 2**24)),
        (np.uint64, (0, 2**64 - 1, 2**64 - 2, 2**63)),
        (np.dtype(">u2"), (0, 65_535, 256, 1)),
    ],
)
def test_numbers_and_dtypes_do_not_matter(dtype: np.dtype, numbers: tuple[int, ...]) -> None:
    plain = np.random.default_rng(3).integers(0, 4, (11, 13)).repeat(3, 0).repeat(3, 1)
    renamed = np.array(numbers, dtype)[plain]
    assert renamed.dtype == dtype
    assert np.array_equal(linear(renamed), linear(plain))
    assert np.array_equal(linear(renamed[:, ::2]), linear(plain[:, ::2]))


def test_more_cells_than_16_bits_can_number() -> None:
    """300 x 301 cells of 1 x 3 pixels side by side: each pixel is one step from another cell."""
    labels = np.arange(1, 300 * 301 + 1).reshape(300, 301).repeat(3, axis=1)
    assert np.array_equal(linear(labels), np.ones(labels.shape))
    columns = np.arange(70_000).repeat(3)[None].repeat(2, axis=0) + 1  # no cell above or below
    expected = np.tile([1 / 2, 1, 1 / 2], (2, 70_000))
    expected[:, :3], expected[:, -3:] = [1, 2 / 3, 1 / 3], [1 / 3, 2 / 3, 1]  # cut by the border
    np.testing.assert_allclose(linear(columns), expected, rtol=1e-6)


def test_large_numbers_without_background() -> None:
    labels = np.array([[2**40, 2**40, 2**41]])
    assert linear(labels).tolist() == [[1.0, 0.5, 1.0]]


def test_the_labels_are_left_alone() -> None:
    labels = np.ascontiguousarray(picture("..1 .11 222"), dtype=np.int32)
    before = labels.copy()
    labels.flags.writeable = False
    depth = labels_to_distance_map(labels)
    assert np.array_equal(labels, before)
    assert np.array_equal(labels_to_distance_map(np.asfortranarray(labels)), depth)


def test_far_distances_are_exact() -> None:
    """70,000 px to the next border: the square does not fit 32 bits."""
    labels = np.ones((3, 140_001), np.uint8)
    labels[:, 0] = labels[:, -1] = 0
    steps = np.minimum(np.arange(140_001), np.arange(140_001)[::-1])
    np.testing.assert_allclose(linear(labels), np.tile(steps / 70_000, (3, 1)), rtol=1e-6)
    assert np.array_equal(linear(labels.T), linear(labels).T)


def test_threads_do_not_disturb_each_other() -> None:
    images = [blobs(np.random.default_rng(seed), (120, 90), 15) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(labels_to_distance_map, images))
    for image, depth in zip(images, together, strict=True):
        assert np.array_equal(depth, labels_to_distance_map(image))


# ---- oracles ------------------------------------------------------------------------------


def test_equals_scipy_cell_by_cell() -> None:
    labels = blobs(np.random.default_rng(5), (150, 210), 40)
    expected = np.zeros(labels.shape)
    for cell in np.unique(labels[labels > 0]):
        depth = ndimage.distance_transform_edt(labels == cell)
        expected = np.maximum(expected, depth / depth.max())
    np.testing.assert_allclose(linear(labels), expected, atol=1e-6)


def test_equals_the_edt_package() -> None:
    edt = pytest.importorskip("edt", reason="the package edt is not installed")
    labels = blobs(np.random.default_rng(6), (400, 300), 150)
    depth = edt.edt(labels, black_border=False)
    deepest = np.zeros(labels.max() + 1)
    np.maximum.at(deepest, labels, depth)
    deepest[0] = 1
    expected = np.where(labels > 0, depth / deepest[labels], 0)
    np.testing.assert_allclose(linear(labels), expected, atol=1e-6)


# ---- options and errors -------------------------------------------------------------------


def test_the_target_changes_the_map() -> None:
    labels = np.pad(np.ones((5, 5), int), 1)
    assert linear(labels)[1, 1] == pytest.approx(1 / 3)
    assert labels_to_distance_map(labels, target="sqrt")[1, 1] == pytest.approx(1 / math.sqrt(3))
    default = labels_to_distance_map(labels)
    assert np.array_equal(default, labels_to_distance_map(labels, target=DEFAULT_TARGET))


def test_the_configuration_knows_the_same_targets() -> None:
    assert ModelConfig().target == DEFAULT_TARGET
    assert [ModelConfig(target=target).target for target in TARGETS] == list(TARGETS)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2-D \(H, W\), got shape \(3, 4, 5\)"):
        labels_to_distance_map(np.zeros((3, 4, 5), int))
    with pytest.raises(TypeError, match="integer label image, got dtype float64"):
        labels_to_distance_map(np.zeros((3, 4)))
    with pytest.raises(TypeError, match="integer label image, got dtype bool"):
        labels_to_distance_map(np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="0 and above, got -2"):
        labels_to_distance_map(np.array([[0, -2]]))
    with pytest.raises(ValueError, match="'linear', 'sqrt', got 'cubic'"):
        labels_to_distance_map(np.zeros((3, 4), int), target="cubic")
