"""Generated scenes: the same from the same seed, true to their labels, near to real images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from dinocell.io import read_image, read_labels
from tests import scenes
from tests.scenes import SCENE_KINDS, make_scene

DATA = Path(os.environ.get("DINOCELL_DATA", Path(__file__).parents[1] / "../shared/data"))
CELL_KINDS = [kind for kind in SCENE_KINDS if kind != "empty"]
SMALL = {"height_px": 160, "width_px": 208}
TINY = {"height_px": 80, "width_px": 96}
FOUR = ndimage.generate_binary_structure(2, 1)


def same(one, other):
    return np.array_equal(one.image, other.image) and np.array_equal(one.labels, other.labels)


def contacts(labels, reach_px=1):
    """Pairs of cells of which two pixels are at most `reach_px` rows and columns apart."""
    pairs = set()
    for index in range(1, labels.max() + 1):
        grown = ndimage.binary_dilation(
            labels == index, np.ones((2 * reach_px + 1, 2 * reach_px + 1))
        )
        pairs |= {(index, int(other)) for other in np.unique(labels[grown]) if other > index}
    return pairs


# ------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("kind", SCENE_KINDS)
def test_same_seed_same_scene(kind):
    num_cells = 0 if kind == "empty" else 3
    one = make_scene(kind, seed=5, num_cells=num_cells, **TINY)
    assert same(one, make_scene(kind, seed=5, num_cells=num_cells, **TINY))
    other = make_scene(kind, seed=6, num_cells=num_cells, **TINY)
    assert not np.array_equal(one.image, other.image)
    assert kind == "empty" or not np.array_equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("fluorescence_nuclei", np.uint16),
        ("fluorescence_dim", np.uint16),
        ("phase_contrast", np.uint8),
        ("empty", np.uint16),
    ],
)
def test_shapes_and_types(kind, dtype):
    scene = make_scene(kind, height_px=96, width_px=131)
    assert scene.image.shape == scene.labels.shape == (96, 131)
    assert scene.image.dtype == dtype
    assert scene.labels.dtype == np.uint32
    assert scene.kind == kind
    assert scene.pixel_size_um > 0
    assert scene.num_cells == scene.labels.max(initial=0)


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_every_cell_is_one_piece_of_some_size(kind, seed):
    diameter_px = {"fluorescence_nuclei": 28.5}.get(kind, 46.0)
    scene = make_scene(kind, seed=seed, num_cells=9, touching=0.6, **SMALL)
    assert scene.num_cells == 9
    assert set(np.unique(scene.labels)) == set(range(10))
    for index in range(1, 10):
        cell = scene.labels == index
        assert ndimage.label(cell, FOUR)[1] == 1
        assert cell.sum() >= 0.06 * np.pi / 4 * diameter_px**2 - 1


def test_cells_reach_over_the_border_and_stay_whole():
    cut = 0
    for seed in range(4):
        scene = make_scene("phase_contrast", height_px=72, width_px=72, num_cells=4, seed=seed)
        assert scene.num_cells == 4
        edge = np.concatenate([scene.labels[[0, -1]].ravel(), scene.labels[:, [0, -1]].ravel()])
        cut += len(set(edge.tolist()) - {0})
        for index in range(1, 5):
            assert ndimage.label(scene.labels == index, FOUR)[1] == 1
    assert cut >= 4


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_touching_makes_contacts(kind):
    together = make_scene(kind, seed=2, num_cells=10, touching=1.0, mitotic=0.0, **SMALL)
    apart = make_scene(kind, seed=2, num_cells=7, touching=0.0, mitotic=0.0, **SMALL)
    assert len(contacts(together.labels)) >= 7
    assert contacts(apart.labels, reach_px=1) == set()


def test_a_pixel_of_two_cells_goes_to_the_one_in_which_it_lies_deeper():
    canvas = scenes._Canvas((40, 60), (slice(0, 40), slice(0, 60)), 9)
    block = np.ones((20, 20), bool)

    def cell():
        return scenes._Cell(0, 0, block, np.zeros((20, 20)), "interphase", 0.0, 20.0)

    assert canvas.add(cell(), (10, 5))  # columns 5..24
    assert canvas.add(cell(), (10, 23))  # columns 23..42: two shared columns, 23 and 24
    assert canvas.labels[15, 22:26].tolist() == [1, 1, 2, 2]
    assert not canvas.add(cell(), (10, 30)), "shares most of itself"
    other = scenes._Canvas((40, 60), (slice(0, 40), slice(0, 60)), 9)
    assert other.add(cell(), (10, 5))
    assert other.add(cell(), (10, 24))  # one shared column, equally deep: the first keeps it
    assert other.labels[15, 23:26].tolist() == [1, 1, 2]


# --------------------------------------------------------------------------------- options


@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("contrast", 0.5), ("haze", 3.0), ("uneven", 0.0), ("noise", 0.0), ("debris", 20.0)],
)
def test_appearance_changes_the_image_alone(kind, option, value):
    plain = make_scene(kind, seed=3, num_cells=2, **TINY)
    changed = make_scene(kind, seed=3, num_cells=2, **{option: value}, **TINY)
    assert np.array_equal(plain.labels, changed.labels)
    assert not np.array_equal(plain.image, changed.image)


@pytest.mark.parametrize(
    ("option", "value"),
    [("touching", 0.0), ("mitotic", 1.0), ("num_cells", 2), ("pixel_size_um", 0.5), ("seed", 1)],
)
@pytest.mark.parametrize("kind", ["fluorescence_nuclei", "phase_contrast"])
def test_geometry_changes_the_labels(kind, option, value):
    arguments = {"num_cells": 3, "touching": 0.9, **TINY}
    plain = make_scene(kind, **arguments)
    changed = make_scene(kind, **(arguments | {option: value}))
    assert not np.array_equal(plain.labels, changed.labels)


def test_contrast_sets_the_light_of_nuclei():
    means = []
    for contrast in (0.5, 1.0):
        scene = make_scene("fluorescence_nuclei", seed=1, contrast=contrast, debris=0, **SMALL)
        inside = scene.image[scene.labels > 0].mean()
        means.append(inside - np.median(scene.image[scene.labels == 0]))
    assert means[1] == pytest.approx(2 * means[0], rel=0.05)


def test_noise_scales_the_camera():
    spread = []
    for noise in (0.0, 1.0, 2.0):
        image = make_scene("empty", noise=noise, uneven=0, debris=0, **SMALL).image.astype(float)
        spread.append(image.std())
    assert spread[0] == 0.0
    assert spread[2] == pytest.approx(2 * spread[1], rel=0.02)


def test_uneven_zero_is_flat():
    arguments = {"noise": 0, "debris": 0, **SMALL}
    assert np.ptp(make_scene("empty", uneven=0.0, **arguments).image) == 0
    assert np.ptp(make_scene("empty", uneven=1.0, **arguments).image) > 5


def test_finer_pixels_make_larger_cells():
    areas = []
    for pixel_size_um in (0.65, 0.325):
        scene = make_scene(
            "fluorescence_nuclei",
            height_px=256,
            width_px=256,
            num_cells=12,
            mitotic=0.0,
            touching=0.0,
            pixel_size_um=pixel_size_um,
        )
        assert scene.pixel_size_um == pixel_size_um
        edge = np.concatenate([scene.labels[[0, -1]].ravel(), scene.labels[:, [0, -1]].ravel()])
        whole = np.setdiff1d(np.arange(1, 13), edge)
        areas.append(np.median(np.bincount(scene.labels.ravel())[whole]))
    assert 3.0 < areas[1] / areas[0] < 5.0


def test_debris_is_not_labelled():
    clean = make_scene("fluorescence_nuclei", num_cells=0, debris=0, uneven=0, **SMALL)
    dirty = make_scene("fluorescence_nuclei", num_cells=0, debris=10, uneven=0, **SMALL)
    assert clean.image.max() < 200 < dirty.image.max()
    assert dirty.num_cells == 0


def test_mitotic_nuclei_are_brighter_and_smaller():
    plain = make_scene("fluorescence_nuclei", seed=4, num_cells=8, mitotic=0.0, **SMALL)
    plates = make_scene("fluorescence_nuclei", seed=4, num_cells=8, mitotic=1.0, **SMALL)
    assert plates.image[plates.labels > 0].mean() > 1.3 * plain.image[plain.labels > 0].mean()
    assert (plates.labels > 0).sum() < 0.7 * (plain.labels > 0).sum()


def test_rounded_cells_are_bright_in_phase_contrast():
    flat = make_scene("phase_contrast", seed=4, num_cells=4, mitotic=0.0, **SMALL)
    round_ = make_scene("phase_contrast", seed=4, num_cells=4, mitotic=1.0, **SMALL)
    bright = (
        (flat.image == 255)[flat.labels > 0].mean(),
        (round_.image == 255)[round_.labels > 0].mean(),
    )
    assert bright[0] < 0.05
    assert bright[1] > 0.3


# ------------------------------------------------------------------------------------ truth


@pytest.mark.parametrize("kind", ["fluorescence_nuclei", "fluorescence_dim"])
def test_light_lies_where_the_labels_are(kind):
    from skimage.filters import threshold_otsu

    scene = make_scene(kind, seed=8, uneven=0.2, mitotic=0.0)
    smooth = ndimage.gaussian_filter(scene.image.astype(float), 1.0)
    found, truth = (
        smooth > threshold_otsu(np.minimum(smooth, np.percentile(smooth, 99))),
        scene.labels > 0,
    )
    dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    assert dice > 0.85


def test_halo_lies_around_cells_in_phase_contrast():
    scene = make_scene("phase_contrast", seed=2, mitotic=0.0, uneven=0.0, num_cells=6, **SMALL)
    outside = ndimage.distance_transform_edt(scene.labels == 0)
    gray = scene.image.astype(float)
    near, far = gray[(outside >= 1) & (outside <= 4)].mean(), gray[outside > 25].mean()
    assert near > far + 10
    assert gray[scene.labels > 0].mean() < far
    without = make_scene(
        "phase_contrast", seed=2, mitotic=0.0, uneven=0.0, haze=0.0, num_cells=6, **SMALL
    )
    gray = without.image.astype(float)
    near, far = gray[(outside >= 2) & (outside <= 4)].mean(), gray[outside > 25].mean()
    assert abs(near - far) < 4


def test_empty_scene_has_noise_and_no_cell():
    scene = make_scene("empty", seed=1)
    assert scene.num_cells == 0
    assert not scene.labels.any()
    rest = ndimage.median_filter(scene.image, 5).astype(float)
    assert np.ptp(rest) < 60, "nothing but smooth illumination remains"
    assert (scene.image - rest).std() > 3


# ------------------------------------------------------------------------------ wrong calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "brightfield"}, "must be one of fluorescence_nuclei"),
        ({"height_px": 15}, "height_px"),
        ({"seed": -1}, "seed"),
        ({"touching": 1.5}, "touching"),
        ({"noise": -1.0}, "noise"),
        ({"contrast": 0.0}, "contrast"),
        ({"pixel_size_um": 0.0}, "pixel_size_um"),
        ({"pixel_size_um": 9.0}, "cells of 6 pixels or more"),
        ({"kind": "empty", "num_cells": 1}, "must be 0 for an empty scene"),
        ({"height_px": 48, "width_px": 48, "num_cells": 60}, "must fit into the image"),
    ],
)
def test_wrong_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_scene(**({"kind": "fluorescence_nuclei"} | arguments))


@pytest.mark.parametrize("value", [2.5, True, "3"])
def test_counts_must_be_whole(value):
    with pytest.raises(TypeError, match="num_cells"):
        make_scene("fluorescence_nuclei", num_cells=value)


# ------------------------------------------------------------------------------- real images


def edge_profile(image, labels):
    """Median gray at signed distances to the cells' borders, less the background."""
    depth = ndimage.distance_transform_edt(labels > 0) - ndimage.distance_transform_edt(labels == 0)
    base = np.median(image[depth < -15])
    return base, [
        float(np.median(image[(depth > at - 0.5) & (depth <= at + 0.5)]) - base)
        for at in (-5, -2, 1, 4, 8)
    ]


@pytest.mark.skipif(not (DATA / "bbbc039").is_dir(), reason=f"no BBBC039 images in {DATA}")
def test_nuclei_look_like_bbbc039():
    real = []
    for path in sorted((DATA / "bbbc039/train/images").glob("*.tif"))[:4]:
        labels = read_labels(path.parents[1] / "labels" / f"{path.stem}.png")
        real.append(edge_profile(read_image(path).pixels.astype(float), labels))
    scene = make_scene("fluorescence_nuclei", height_px=520, width_px=696, seed=0)
    base, profile = edge_profile(scene.image.astype(float), scene.labels)
    real_base = np.mean([item[0] for item in real])
    real_profile = np.mean([item[1] for item in real], axis=0)
    assert base == pytest.approx(real_base, rel=0.15)
    for ours, theirs in zip(profile[1:], real_profile[1:], strict=True):
        assert 0.4 < ours / theirs < 2.0
    assert profile[0] < 0.1 * profile[-1]
    flat = scene.labels == 0
    noise = (scene.image - ndimage.gaussian_filter(scene.image.astype(float), 1.0))[flat]
    assert 3 < np.percentile(np.abs(noise), 68) < 6


@pytest.mark.skipif(not (DATA / "usiigaci_phase").is_dir(), reason=f"no Usiigaci images in {DATA}")
def test_phase_contrast_looks_like_usiigaci():
    spreads, backgrounds = [], []
    for name in ("set01", "set14", "set24"):
        image = read_image(DATA / f"usiigaci_phase/train/images/{name}.png").pixels.astype(float)
        labels = read_labels(DATA / f"usiigaci_phase/train/labels/{name}.png")
        spreads.append(image[labels > 0].std())
        backgrounds.append(np.median(image[labels == 0]))
    scene = make_scene("phase_contrast", height_px=320, width_px=384, seed=0)
    gray = scene.image.astype(float)
    assert np.median(gray[scene.labels == 0]) == pytest.approx(np.mean(backgrounds), abs=6)
    assert min(spreads) / 1.5 < gray[scene.labels > 0].std() < 1.5 * max(spreads)
