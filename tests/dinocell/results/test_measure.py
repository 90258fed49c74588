"""Measurements against hand-computed pictures, scikit-image and brute force."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import regionprops_table

from dinocell.results import measure
from dinocell.results.measure import (
    SCIKIT_IMAGE_NAMES,
    measure_labels,
    summarize,
)
from dinocell.results.table import CellTable

INTENSITIES = [name for name in SCIKIT_IMAGE_NAMES if name.startswith("intensity")]
SHAPES = [name for name in SCIKIT_IMAGE_NAMES if name not in INTENSITIES]


def picture(text: str) -> np.ndarray:
    """Rows of digits to a label image; a dot is background."""
    return np.array(
        [[0 if mark == "." else int(mark) for mark in line] for line in text.split()], np.uint32
    )


def blobs(rng: np.random.Generator, kind: int) -> np.ndarray:
    """Random label images: smooth blobs, diagonal contacts, or labels scattered in pieces."""
    shape = tuple(rng.integers(1, 60, 2))
    noise = ndimage.gaussian_filter(rng.random(shape), (0.0, 0.8, 1.6, 3.0)[kind % 4])
    mask = noise > np.quantile(noise, (0.3, 0.5, 0.7)[kind % 3])
    labels = ndimage.label(mask, structure=np.ones((3, 3)) if kind % 2 else None)[0]
    if kind % 5 == 4:
        labels = mask * rng.integers(0, 5, shape)
    return (labels * 1000).astype(np.uint32)


def one_row(table: CellTable) -> dict[str, float]:
    """The only row of a table; missing values are None."""
    (row,) = table.rows()
    return row


def test_rectangle_by_hand() -> None:
    row = one_row(measure_labels(picture(".....  .555. .555. .....")))
    expected = {
        "label": 5,
        "centroid_row": 1.5,
        "centroid_col": 2.0,
        "bbox_min_row": 1,
        "bbox_min_col": 1,
        "bbox_max_row": 3,
        "bbox_max_col": 4,
        "touches_border": False,
        "area": 6,
        "area_convex": 6,
        "area_filled": 6,
        "equivalent_diameter_area": math.sqrt(24 / math.pi),
        "perimeter": 6.0,  # six border pixels, each a straight step
        "axis_major_length": 4 * math.sqrt(2 / 3),  # variance of 0, 1, 2
        "axis_minor_length": 4 * math.sqrt(1 / 4),  # variance of 0, 1
        "feret_diameter_max": math.sqrt(10),  # (1, 0.5) to (2, 3.5)
        "eccentricity": math.sqrt(1 - (1 / 4) / (2 / 3)),
        "aspect_ratio": math.sqrt((2 / 3) / (1 / 4)),
        "roundness": 24 / (math.pi * 16 * 2 / 3),
        "solidity": 1.0,
        "extent": 1.0,
        "euler_number": 1,
        "num_neighbors": 0,
        "nearest_border_distance": None,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert abs(row["orientation"]) == pytest.approx(math.pi / 2)  # the major axis lies along a row


def test_one_pixel_by_hand() -> None:
    row = one_row(measure_labels([[0, 0], [0, 3]]))
    assert row["area"] == row["area_convex"] == row["area_filled"] == 1
    assert row["perimeter"] == 0
    assert row["circularity"] == 1
    assert row["axis_major_length"] == row["axis_minor_length"] == row["eccentricity"] == 0
    assert row["orientation"] == -math.pi / 4
    assert row["feret_diameter_max"] == 1
    assert row["aspect_ratio"] is None
    assert row["roundness"] is None
    assert row["touches_border"]


def test_each_edge_and_corner_of_the_image_is_its_border() -> None:
    table = measure_labels(picture("1.2.3 ..... 4.9.5 ..... 6.7.8"))
    assert table["touches_border"].tolist() == [True] * 8 + [False]


def test_ring_by_hand() -> None:
    row = one_row(measure_labels(picture("..... .111. .1.1. .111. .....")))
    assert (row["area"], row["area_filled"], row["area_convex"]) == (8, 9, 9)
    assert row["euler_number"] == 0
    assert row["solidity"] == pytest.approx(8 / 9)
    assert row["extent"] == pytest.approx(8 / 9)
    assert (row["centroid_row"], row["centroid_col"]) == (2, 2)


def test_hole_open_at_a_corner_is_not_filled() -> None:
    row = one_row(measure_labels(picture("11. 1.1 111")))
    assert row["area_filled"] == row["area"] == 7


def test_cell_inside_the_hole_of_another() -> None:
    table = measure_labels(picture("11111 1...1 1.2.1 1...1 11111"))
    assert table["area"].tolist() == [16, 1]
    assert table["area_filled"].tolist() == [25, 1]
    assert table["num_neighbors"].tolist() == [1, 1]
    assert table["nearest_border_distance"].tolist() == [2, 2]


def test_circularity_falls_from_disc_to_line() -> None:
    rows, cols = np.mgrid[-45:46, -45:46]
    for radius, least in ((40, 0.985), (20, 0.96), (8, 0.9)):
        disc = (np.hypot(rows, cols) <= radius).astype(np.int32)
        assert least < one_row(measure_labels(disc))["circularity"] <= 1
    ellipse = (np.hypot(rows / 2, cols) <= 22).astype(np.int32)
    assert one_row(measure_labels(ellipse))["circularity"] == pytest.approx(0.84, abs=0.02)
    line = np.zeros((3, 44), np.int32)
    line[1, 2:42] = 1
    # 40 crossings along columns, 1 along the row, 40 along either diagonal
    perimeter = math.pi / 4 * (41 + 80 / math.sqrt(2))
    row = one_row(measure_labels(line))
    assert row["perimeter_crofton"] == pytest.approx(perimeter)
    assert row["circularity"] == pytest.approx(160 * math.pi / perimeter**2)
    assert row["aspect_ratio"] is None


def test_a_line_in_any_direction_has_no_minor_axis() -> None:
    row = one_row(measure_labels(picture("1...... ...1... ......1")))
    assert row["axis_minor_length"] == 0
    assert row["aspect_ratio"] is None
    assert row["eccentricity"] == 1


def test_thin_cell_keeps_its_minor_axis() -> None:
    row = one_row(measure_labels(np.ones((2, 80), int)))
    assert row["axis_minor_length"] == pytest.approx(2)  # variance 1/4
    assert row["aspect_ratio"] == pytest.approx(math.sqrt((80**2 - 1) / 12 / 0.25))


def test_object_in_two_pieces_is_one_cell() -> None:
    row = one_row(measure_labels(picture("11.. .... ..11")))
    assert row["area"] == 4
    assert row["euler_number"] == 2
    assert (row["centroid_row"], row["centroid_col"]) == (1, 1.5)
    assert (row["bbox_max_row"], row["bbox_max_col"]) == (3, 4)


@pytest.mark.parametrize("kind", range(20))
def test_equals_scikit_image(kind: int) -> None:
    rng = np.random.default_rng(kind)
    labels = blobs(rng, kind)
    image = rng.integers(0, 60_000, (*labels.shape, 2)).astype((np.uint16, np.float64)[kind % 2])
    ours = measure_labels(labels, image)
    theirs = regionprops_table(
        labels,
        image,
        properties=sorted({name.split("-")[0] for name in SCIKIT_IMAGE_NAMES.values()}),
    )
    pairs = {name: SCIKIT_IMAGE_NAMES[name] for name in SHAPES}
    for name in INTENSITIES:
        pairs |= {f"{name}_{c}": f"{SCIKIT_IMAGE_NAMES[name]}-{c}" for c in (0, 1)}
    assert set(pairs.values()) == set(theirs)
    for name, their_name in pairs.items():
        if name == "orientation":  # an axis: equal modulo pi, undefined for round shapes
            directed = ours["axis_major_length"] > ours["axis_minor_length"] + 1e-3
            turn = np.sin(ours[name] - theirs[their_name])[directed]
            np.testing.assert_allclose(turn, 0, atol=1e-9, err_msg=name)
        elif ours[name].dtype.kind == "i":
            np.testing.assert_array_equal(ours[name], theirs[their_name], err_msg=name)
        else:
            np.testing.assert_allclose(
                ours[name], theirs[their_name], rtol=1e-9, atol=1e-6, err_msg=name
            )


def test_orientation_is_minus_pi_over_4_to_pi_over_4_as_in_scikit_image() -> None:
    for labels in (np.eye(9, dtype=int), np.eye(9, dtype=int)[:, ::-1], np.ones((5, 5), int)):
        theirs = regionprops_table(labels, properties=["orientation"])["orientation"]
        assert measure_labels(labels)["orientation"] == pytest.approx(theirs)


def test_intensity_by_hand() -> None:
    labels = [[1, 1, 2], [1, 1, 0]]
    table = measure_labels(labels, [[1, 2, 9], [3, 10, 77]])
    values = {name.removeprefix("intensity_"): table[name].tolist() for name in table.columns[-6:]}
    assert values == {
        "mean": [4, 9],
        "std": [math.sqrt((9 + 4 + 1 + 36) / 4), 0],
        "min": [1, 9],
        "max": [10, 9],
        "median": [2.5, 9],
        "integrated": [16, 9],
    }


def test_channels_have_their_names() -> None:
    rng = np.random.default_rng(3)
    labels = blobs(rng, 2)
    planes = rng.random((2, *labels.shape)).astype(np.float32)
    image = np.moveaxis(planes, 0, -1)  # not contiguous
    named = measure_labels(labels, image, channel_names=["DNA", "ER"])
    numbered = measure_labels(labels, image)
    gray = measure_labels(labels, planes[1])
    gray_named = measure_labels(labels, planes[1], channel_names=("ER",))
    for name in ("mean", "std", "min", "max", "median", "integrated"):
        np.testing.assert_array_equal(named[f"intensity_{name}_ER"], gray[f"intensity_{name}"])
        np.testing.assert_array_equal(
            named[f"intensity_{name}_DNA"], numbered[f"intensity_{name}_0"]
        )
        np.testing.assert_array_equal(
            gray_named[f"intensity_{name}_ER"], numbered[f"intensity_{name}_1"]
        )
    assert not np.array_equal(named["intensity_mean_DNA"], named["intensity_mean_ER"])


def test_nan_stays_with_its_cell_and_channel() -> None:
    image = np.ones((2, 4, 2))
    image[1, 0, 1] = np.nan
    image[0, 2, :] = np.nan  # background
    table = measure_labels([[1, 1, 0, 2], [1, 1, 0, 2]], image)
    for name in ("mean", "std", "min", "max", "median", "integrated"):
        assert np.isnan(table[f"intensity_{name}_1"]).tolist() == [True, False]
        assert np.isfinite(table[f"intensity_{name}_0"]).all()


def test_micrometres() -> None:
    labels = blobs(np.random.default_rng(6), 6)
    plain = measure_labels(labels)
    half = measure_labels(labels, pixel_size_um=0.5)
    assert not [name for name in plain.columns if "_um" in name]
    added = [name for name in half.columns if name not in plain]
    assert {"area_um2", "perimeter_um", "axis_major_length_um", "centroid_row_um"} <= set(added)
    for name in added:
        pixels = name.removesuffix("_um2").removesuffix("_um")
        factor = 0.25 if name.endswith("_um2") else 0.5
        np.testing.assert_array_equal(half[name], plain[pixels] * factor)
    for name in plain.columns:
        np.testing.assert_array_equal(half[name], plain[name])
    assert half.pixel_size_um == 0.5


@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (0, 0), (0, 4)])
def test_image_without_cells_gives_the_same_columns(shape: tuple[int, int]) -> None:
    options: dict[str, Any] = {"pixel_size_um": 0.3, "channel_names": ["DNA", "ER"]}
    full = measure_labels([[1, 2]], np.ones((1, 2, 2)), **options)
    empty = measure_labels(np.zeros(shape, np.uint16), np.ones((*shape, 2)), **options)
    assert len(empty) == 0
    assert empty.columns == full.columns
    assert [empty[name].dtype for name in empty.columns] == [
        full[name].dtype for name in full.columns
    ]
    summary = summarize(np.zeros(shape, np.uint16), empty)
    assert summary["num_cells"] == 0
    assert summary["area_mean"] is None
    assert summary["confluency_percent"] == (0 if 0 not in shape else None)
    assert set(summary) == set(summarize([[1, 2]], full))
    json.dumps(summary, allow_nan=False)


def test_more_cells_than_16_bits_hold() -> None:
    labels = np.arange(1, 257 * 257 + 1).reshape(257, 257)
    table = measure_labels(labels, labels, neighbor_distance_px=1)
    np.testing.assert_array_equal(table["label"], labels.ravel())
    np.testing.assert_array_equal(table["intensity_mean"], labels.ravel())
    assert table["area"].sum() == 257**2
    assert np.bincount(table["num_neighbors"]).tolist() == [0, 0, 4, 4 * 255, 255**2]
    assert summarize(labels, table)["num_cells"] == 257**2


def test_largest_label() -> None:
    labels = np.array([[2**32 - 1, 0, 70_000]])
    assert measure_labels(labels)["label"].tolist() == [70_000, 2**32 - 1]
    with pytest.raises(ValueError, match=r"must lie in 0\.\.4294967295, got 4294967296"):
        measure_labels(labels + np.array([[1, 0, 0]]))


def test_measures_do_not_depend_on_numbers_place_or_memory_layout() -> None:
    rng = np.random.default_rng(7)
    labels = blobs(rng, 7)
    image = rng.random(labels.shape)
    before = labels.copy()
    table = measure_labels(labels, image)
    np.testing.assert_array_equal(labels, before)
    renumbered = measure_labels((labels.astype(np.int64) * 3 + 5) * (labels > 0), image)
    np.testing.assert_array_equal(renumbered["label"], table["label"] * 3 + 5)
    moved = measure_labels(np.pad(labels, ((3, 1), (8, 2))), np.pad(image, ((3, 1), (8, 2))))
    fortran = measure_labels(np.asfortranarray(labels), np.asfortranarray(image))
    for name in table.columns[1:]:
        np.testing.assert_array_equal(fortran[name], table[name])
        np.testing.assert_array_equal(renumbered[name], table[name])
        if name == "touches_border":
            assert not moved[name].any()
            continue
        shift = 3 if "_row" in name else 8 if "_col" in name else 0
        if name != "orientation":
            np.testing.assert_allclose(moved[name], table[name] + shift, rtol=1e-9, atol=1e-9)


def test_turned_cells_keep_their_measures() -> None:
    labels = blobs(np.random.default_rng(3), 3)
    table, turned = measure_labels(labels), measure_labels(np.rot90(labels))
    for name in table.columns:
        if "_row" not in name and "_col" not in name and name != "orientation":
            np.testing.assert_allclose(turned[name], table[name], rtol=1e-9, err_msg=name)
    width = labels.shape[1]
    np.testing.assert_allclose(turned["centroid_row"], width - 1 - table["centroid_col"])
    np.testing.assert_array_equal(turned["bbox_min_row"], width - table["bbox_max_col"])
    np.testing.assert_allclose(turned["centroid_col"], table["centroid_row"])


def test_every_column_is_described() -> None:
    described = measure.__doc__ or ""
    for name in measure_labels([[1]], [[1]]).columns:
        assert name in described


def test_summary_by_hand() -> None:
    labels = picture("1100 1100 0002 0000".replace("0", "."))
    table = measure_labels(labels)
    summary = summarize(labels, table)
    assert summary["num_cells"] == 2
    assert summary["num_cells_touching_border"] == 2
    assert summary["confluency_percent"] == pytest.approx(100 * 5 / 16)
    assert summary["cells_per_megapixel"] == 125_000
    assert summary["area_mean"] == summary["area_median"] == 2.5
    assert summary["area_std"] == 1.5
    assert summary["num_neighbors_mean"] == 1
    assert (summary["image_height_px"], summary["image_width_px"]) == (4, 4)
    assert "cells_per_mm2" not in summary

    known = summarize(labels, measure_labels(labels, pixel_size_um=3))
    assert known["image_area_mm2"] == pytest.approx(144e-6)
    assert known["cells_per_mm2"] == pytest.approx(2 / 144e-6)
    assert known["area_um2_mean"] == known["area_um2_median"] == 22.5
    assert known["area_um2_std"] == 13.5
    assert {name: known[name] for name in summary} == summary
    json.dumps(known, allow_nan=False)


def test_summary_refuses_a_foreign_table() -> None:
    with pytest.raises(ValueError, match=r"add up to 2 px where the labels have 1"):
        summarize([[1, 0]], measure_labels([[1, 1]]))
    with pytest.raises(ValueError, match=r"add up to 1 px where the labels have 2"):
        summarize([[1, 1]], measure_labels([[1, 0]]))


@pytest.mark.parametrize(
    ("labels", "options", "kind", "message"),
    [
        (np.ones((2, 2), bool), {}, TypeError, "integer label image, got dtype bool"),
        (np.ones((2, 2)), {}, TypeError, "integer label image, got dtype float64"),
        (np.ones((2, 2, 2), int), {}, ValueError, r"2-D \(H, W\), got shape \(2, 2, 2\)"),
        ([[-1, 1]], {}, ValueError, "0 and above, got -1"),
        ([[1]], {"pixel_size_um": 0}, ValueError, "`pixel_size_um` must be a positive number"),
        ([[1]], {"pixel_size_um": math.nan}, ValueError, "must be a positive number, got nan"),
        ([[1]], {"pixel_size_um": math.inf}, ValueError, "must be a positive number, got inf"),
        ([[1]], {"neighbor_distance_px": 0.5}, ValueError, "at least 1"),
        ([[1]], {"neighbor_distance_px": math.inf}, ValueError, "finite"),
        ([[1]], {"channel_names": ["DNA"]}, ValueError, "must come with an image"),
        ([[1]], {"image": [[1, 2]]}, ValueError, r"shape \(1, 1\) like the labels"),
        ([[1]], {"image": np.ones((1, 1, 1, 1))}, ValueError, "channels last"),
        ([[1]], {"image": [[1j]]}, TypeError, "real numbers, got complex128"),
        ([[1]], {"image": [["a"]]}, TypeError, "real numbers"),
        ([[1]], {"image": [[1]], "channel_names": "D"}, TypeError, r"write \['D'\]"),
        ([[1]], {"image": [[1]], "channel_names": []}, ValueError, "1 different names"),
        ([[1]], {"image": [[1]], "channel_names": ["D", "E"]}, ValueError, "1 different names"),
        ([[1]], {"image": [[[1, 2]]], "channel_names": ["D", "D"]}, ValueError, "2 different"),
        ([[1]], {"image": [[[1, 2]]], "channel_names": ["D", ""]}, ValueError, "2 different"),
    ],
)
def test_wrong_arguments(labels, options, kind, message) -> None:
    with pytest.raises(kind, match=message):
        measure_labels(labels, **options)


@pytest.mark.parametrize(("most_px", "expected"), [(1, [4, 2, 3]), (7, [6, 3]), (99, [9])])
def test_intensities_are_gathered_from_a_few_pixels_at_a_time(monkeypatch, most_px, expected):
    """Whole cells, together fewer than `most_px` pixels, or a single one that is larger."""
    labels = picture("1122 1133 ...3")
    image = np.arange(12.0).reshape(3, 4) ** 2
    whole = measure_labels(labels, image)
    gathered = []

    def noted(values, ends):
        gathered.append(len(values))
        return statistics(values, ends)

    statistics = measure._statistics
    monkeypatch.setattr(measure, "_statistics", noted)
    monkeypatch.setattr(measure, "_GATHERED_PX", most_px)
    parts = measure_labels(labels, image)
    assert gathered == expected
    for name in INTENSITIES:
        np.testing.assert_array_equal(parts[name], whole[name])


@pytest.mark.parametrize("band_px", [1, 300, 1000])
def test_measuring_band_by_band_gives_the_same_table(monkeypatch, band_px):
    rng = np.random.default_rng(3)
    labels = np.kron(rng.integers(0, 9, (13, 11)), np.ones((5, 7), int)).astype(np.uint32)
    labels[rng.random(labels.shape) < 0.2] = 0
    labels[labels == 4] = 70_000
    image = rng.normal(size=labels.shape)
    whole = measure_labels(labels, image)
    monkeypatch.setattr("dinocell.scratch._BAND_PX", band_px)
    monkeypatch.setattr("dinocell.results.measure._GATHERED_PX", band_px)
    parts = measure_labels(labels, image)
    assert whole.columns == parts.columns
    for name in whole.columns:
        np.testing.assert_array_equal(whole[name], parts[name], err_msg=name)
