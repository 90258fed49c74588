"""Pictures: borders where they belong, colours that differ, any image type shown."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.color import rgb2lab

from dinocell.errors import DINOCellError
from dinocell.labels import cell_borders
from dinocell.results.colors import CELL_COLORS, color_distance_map, color_labels
from dinocell.results.pictures import (
    CONTOUR_COLOR,
    draw_contours,
    mean_blocks,
    overlay_panel,
    shrink_labels,
    to_display,
    write_png,
)
from tests.scenes import make_scene


def picture(text):
    """Rows of digits to a label image; a dot is background."""
    return np.array(
        [[0 if mark == "." else int(mark) for mark in line] for line in text.split()], np.uint32
    )


def touching_pairs(labels):
    """Pairs of cells that touch over a side or a corner, by brute force."""
    pairs = set()
    height, width = labels.shape
    for row in range(height):
        for col in range(width):
            for drow, dcol in ((0, 1), (1, -1), (1, 0), (1, 1)):
                r, c = row + drow, col + dcol
                if r < height and 0 <= c < width:
                    a, b = sorted((int(labels[row, col]), int(labels[r, c])))
                    if 0 < a < b:
                        pairs.add((a, b))
    return pairs


TWO = picture(
    """
    .........
    .1111222.
    .1111222.
    .1111222.
    .1111222.
    .........
    """
)


# ---------------------------------------------------------------------------------- borders


def test_borders_by_hand():
    expected = picture(
        """
        .........
        .1111111.
        .1..1111.
        .1..1111.
        .1111111.
        .........
        """
    )
    # Cell 2 is three wide: both its outer columns are border, and its middle column is inside.
    expected[2:4, 6] = 0
    assert np.array_equal(cell_borders(TWO), expected.astype(bool))


def test_contours_change_border_pixels_alone():
    image = np.tile(np.arange(9, dtype=np.uint16) * 100, (6, 1))
    shown = to_display(image)
    before = shown.copy()
    drawn = draw_contours(shown, TWO)
    border = cell_borders(TWO)
    assert (drawn[border] == CONTOUR_COLOR).all()
    assert np.array_equal(drawn[~border], shown[~border])
    assert np.array_equal(shown, before), "the input stays as it was"
    thick = draw_contours(shown, TWO, thickness_px=2)
    assert (thick[TWO > 0] == CONTOUR_COLOR).all()


def test_no_cell_draws_nothing():
    shown = to_display(np.arange(12, dtype=float).reshape(3, 4))
    assert np.array_equal(draw_contours(shown, np.zeros((3, 4), int)), shown)


# ---------------------------------------------------------------------------------- colours


def test_colors_of_touching_cells_differ():
    colors = color_labels(TWO)
    assert (colors[TWO == 0] == 0).all()
    one, two = colors[2, 2], colors[2, 6]
    assert tuple(one) in CELL_COLORS
    assert tuple(two) in CELL_COLORS
    assert not np.array_equal(one, two)


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 9, 30, 2**31]),
)
@settings(max_examples=60, deadline=None)
def test_neighbours_always_differ(height, width, seed, highest):
    labels = np.random.default_rng(seed).integers(0, highest, (height, width))
    colors = color_labels(labels)
    of = {int(value): tuple(colors[labels == value][0]) for value in np.unique(labels)}
    for value, color in of.items():
        assert (colors[labels == value] == color).all()
        assert (color == (0, 0, 0)) == (value == 0)
    for one, other in touching_pairs(labels):
        assert of[one] != of[other]


def test_neighbours_of_a_crowded_field_look_different():
    scene = make_scene(
        "fluorescence_nuclei", num_cells=40, height_px=160, width_px=208, touching=0.9
    )
    colors = color_labels(scene.labels)
    pairs = touching_pairs(scene.labels)
    assert len(pairs) > 20
    lab = rgb2lab(colors / 255.0)
    for one, other in pairs:
        gap = lab[scene.labels == one][0] - lab[scene.labels == other][0]
        assert np.linalg.norm(gap) > 20
    used = {tuple(color) for color in colors[scene.labels > 0]}
    assert used == set(CELL_COLORS)


def test_cells_close_by_differ_too():
    labels = np.zeros((5, 40), int)
    labels[1:4, ::3] = np.arange(1, 15)  # one pixel wide, two between
    colors = color_labels(labels)[2, ::3]
    assert (colors[1:] != colors[:-1]).any(axis=1).all()


def test_more_than_eight_cells_that_all_touch():
    # In pieces, so that every pair of 12 cells meets somewhere.
    rows = [[a, b] for a in range(1, 13) for b in range(1, 13) if a < b]
    labels = np.zeros((2 * len(rows), 2), int)
    labels[::2] = rows
    colors = color_labels(labels)
    assert len({tuple(colors[labels == value][0]) for value in range(1, 13)}) == 12


def test_equal_labels_get_equal_colors():
    labels = np.arange(1, 31).reshape(5, 6).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(color_labels(labels), color_labels(labels.copy()))
    assert np.array_equal(color_labels(labels), color_labels(labels.astype(np.uint8)))


def test_large_label_values():
    labels = np.zeros((4, 4), np.uint32)
    labels[:2], labels[2:] = 2**32 - 1, 70_000
    colors = color_labels(labels)
    assert not np.array_equal(colors[0, 0], colors[3, 0])
    assert (colors.sum(axis=-1) > 0).all()


def test_colours_of_cells_differ_clearly():
    lab = rgb2lab(np.array(CELL_COLORS)[None] / 255.0)[0]
    gaps = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert gaps[~np.eye(len(lab), dtype=bool)].min() > 20
    assert np.linalg.norm(lab, axis=-1).min() > 35, "all stand out against black"


# ----------------------------------------------------------------------------- distance map


def test_distance_colors_rise_in_lightness():
    ramp = color_distance_map(np.linspace(0.0, 1.0, 256, dtype=np.float32)[None])
    light = rgb2lab(ramp / 255.0)[0, :, 0]
    assert (np.diff(light) > -0.1).all(), "8-bit rounding takes back at most a trace"
    steps = np.diff(light[::16])
    assert steps.min() > 0.6 * steps.mean()
    assert ramp[0, 0].tolist() == [0, 0, 0]
    assert light[-1] > 94


def test_distance_values_outside_are_clipped():
    colors = color_distance_map(np.array([[-3.0, 0.0, 1.0, 7.0, np.inf]]))[0]
    assert np.array_equal(colors[0], colors[1])
    assert np.array_equal(colors[2], colors[3])
    assert np.array_equal(colors[2], colors[4])
    assert not np.array_equal(colors[0], colors[2])


def test_distance_map_must_be_a_plane_of_numbers():
    with pytest.raises(ValueError, match="2-D"):
        color_distance_map(np.zeros((3, 3, 1)))
    with pytest.raises(ValueError, match="NaN"):
        color_distance_map(np.array([[0.0, np.nan]]))


# ---------------------------------------------------------------------------------- display


def test_display_stretches_16_bit_counts():
    image = np.full((100, 100), 300, np.uint16)
    image[:50] = 500
    shown = to_display(image)
    assert shown.dtype == np.uint8
    assert shown.shape == (100, 100, 3)
    assert (shown[:50] == 255).all()
    assert (shown[50:] == 0).all()


def test_display_ignores_hot_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(100, 200, (64, 64)).astype(np.uint16)
    clean = to_display(image).astype(int)
    image[5, 5] = 65535
    hot = to_display(image).astype(int)
    hot[5, 5] = clean[5, 5]
    assert np.abs(hot - clean).max() <= 3


@pytest.mark.parametrize("value", [0, 7, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_constant_images_are_black(value, dtype):
    assert (to_display(np.full((3, 4), value, dtype)) == 0).all()


def test_one_bright_pixel_in_a_dark_image_shows():
    image = np.zeros((200, 200), np.uint8)
    image[3, 3] = 9
    shown = to_display(image)
    assert (shown[3, 3] == 255).all()
    assert shown.sum() == 3 * 255


def test_nan_and_infinity_are_black_and_do_not_count():
    image = np.array([[0.0, 1.0, 2.0, np.nan, np.inf, -np.inf]])
    shown = to_display(image)
    assert shown[0, :, 0].tolist() == [0, 128, 255, 0, 0, 0]
    assert (to_display(np.full((2, 2), np.nan)) == 0).all()


def test_boolean_and_negative_images():
    assert to_display(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    shown = to_display(np.array([[-4, -2, 0]], np.int32))
    assert shown[0, :, 0].tolist() == [0, 128, 255]


def test_channels_are_stretched_one_by_one():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    one = to_display(ramp)
    assert np.abs(one[..., 0] - ramp.astype(float)).max() <= 1
    assert np.array_equal(one, to_display(ramp[..., None]))
    rgb = to_display(np.dstack([ramp, 100 * ramp, 0 * ramp]))
    assert np.array_equal(rgb[..., 0], one[..., 0])
    assert np.array_equal(rgb[..., 1], one[..., 0])
    assert (rgb[..., 2] == 0).all()
    two = to_display(np.dstack([ramp, ramp[::-1]]))
    assert np.array_equal(two[..., 1], one[..., 0]), "green"
    assert np.array_equal(two[..., 0], one[::-1, :, 0])
    assert np.array_equal(two[..., 2], one[::-1, :, 0]), "magenta"
    five = to_display(np.dstack([ramp, ramp.T, ramp[::-1], ramp.T[::-1], ramp]))
    assert five.shape == (16, 16, 3)
    assert len(np.unique(five)) > 20


def test_display_can_be_shrunk():
    ramp = np.arange(400, dtype=np.uint16).reshape(20, 20)
    small, whole = to_display(ramp, 4), to_display(ramp)
    assert small.shape == (5, 5, 3)
    assert np.abs(small - mean_blocks(whole, 4)).max() <= 1, "stretched as the whole image is"


# ------------------------------------------------------------------------------------ sizes


def test_shrinking_keeps_every_cell():
    labels = np.zeros((7, 10), int)
    labels[0, 0], labels[6, 9], labels[3, 4] = 1, 2, 3
    small = shrink_labels(labels, 4)
    assert small.tolist() == [[1, 3, 0], [0, 0, 2]]
    assert np.array_equal(shrink_labels(labels, 1), labels)


def test_mean_blocks_by_hand():
    image = np.array([[0, 2, 10], [4, 6, 20], [8, 8, 7]], np.uint8)
    assert mean_blocks(image, 2).tolist() == [[3.0, 15.0], [8.0, 7.0]]
    assert mean_blocks(np.dstack([image, 2 * image]), 3)[0, 0].tolist() == pytest.approx(
        [65 / 9, 130 / 9]
    )


# ------------------------------------------------------------------------------------ panel


def test_panel_holds_its_pictures_unchanged():
    scene = make_scene("fluorescence_nuclei", height_px=300, width_px=320, num_cells=12)
    distance = (scene.labels > 0).astype(np.float32)
    panel = overlay_panel(scene.image, scene.labels, distance)
    expected = [
        to_display(scene.image),
        draw_contours(to_display(scene.image), scene.labels),
        color_labels(scene.labels),
        color_distance_map(distance),
    ]
    gap = (panel.shape[1] - 4 * 320) // 5
    top = panel.shape[0] - gap - 300
    for number, picture_ in enumerate(expected):
        left = gap + number * (320 + gap)
        assert np.array_equal(panel[top : top + 300, left : left + 320], picture_)
        assert panel[:top, left : left + 320].max() > 100, "a caption"


def test_panel_options():
    scene = make_scene("fluorescence_nuclei", height_px=260, width_px=280, num_cells=6)
    plain = overlay_panel(scene.image, scene.labels)
    with_map = overlay_panel(scene.image, scene.labels, np.zeros(scene.labels.shape))
    assert with_map.shape[1] == pytest.approx(plain.shape[1] * 4 / 3, rel=0.02)
    titled = overlay_panel(scene.image, scene.labels, title="zellen_äöü_µm_細胞.tif")
    assert titled.shape[0] > plain.shape[0]
    long = overlay_panel(scene.image, scene.labels, title="x" * 2000)
    assert long.shape == titled.shape
    barred = overlay_panel(scene.image, scene.labels, pixel_size_um=0.5)
    changed = (barred != plain).any(axis=-1)
    assert changed.any()
    assert not changed[:, 300:].any(), "the bar stands in the first picture alone"


@pytest.mark.parametrize(
    ("pixel_size_um", "length_px"), [(0.5, 40), (1.0, 50), (0.3, 33), (7.0, 29)]
)
def test_scale_bar_is_a_round_length(pixel_size_um, length_px):
    """Not above a fifth of 300 pixels: 20, 50, 10 and 200 µm."""
    panel = overlay_panel(
        np.zeros((300, 300)), np.zeros((300, 300), int), pixel_size_um=pixel_size_um
    )
    white = (panel[-60:, 8:308] == 255).all(axis=-1).sum(axis=1)
    assert white.max() == length_px


@pytest.fixture
def panel_of_at_most(monkeypatch):
    def make(side_px, *arguments):
        monkeypatch.setattr("dinocell.results.pictures._MAX_PANEL_PX", side_px)
        return overlay_panel(*arguments)

    return make


def test_large_images_are_shrunk_and_contours_stay(panel_of_at_most):
    labels = np.zeros((300, 700), int)
    labels[100:103, 200:203] = 1  # smaller than a block
    labels[150:250, 300:500] = 2
    image = np.random.default_rng(0).normal(100, 10, labels.shape)
    small = panel_of_at_most(100, image, labels)
    large = panel_of_at_most(2048, image, labels)
    assert small.shape[1] < 3 * 100 + 100
    assert large.shape[1] > 3 * 700
    assert (small == CONTOUR_COLOR).all(axis=-1).sum() > 40
    middle = small[-8 - 43 + 14, :]  # the row of the small cell
    assert (middle == CONTOUR_COLOR).all(axis=-1).any()


def test_tiny_images_are_enlarged():
    labels = np.array([[1]])
    panel = overlay_panel(np.array([[3]]), labels, np.array([[1.0]]), pixel_size_um=1.0)
    assert panel.shape[0] > 64
    two = overlay_panel(np.zeros((100, 100)), np.zeros((100, 100), int))
    assert two.shape[1] > 3 * 200


@pytest.mark.parametrize("shape", [(3, 5000), (5000, 3), (1, 1), (17, 2)])
def test_any_shape_makes_a_panel(shape):
    image = np.random.default_rng(1).integers(0, 4096, shape).astype(np.uint16)
    panel = overlay_panel(image, np.ones(shape, int), np.ones(shape))
    assert panel.dtype == np.uint8
    assert panel.shape[2] == 3
    assert max(panel.shape) <= 4 * 2048 + 100


# -------------------------------------------------------------------------------- bad input


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="same height and width"):
        draw_contours(np.zeros((3, 4, 3), np.uint8), np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="same height and width"):
        overlay_panel(np.zeros((3, 4)), np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="`distance_map` and `labels`"):
        overlay_panel(np.zeros((3, 4)), np.zeros((3, 4), int), np.zeros((4, 4)))


@pytest.mark.parametrize("shape", [(4,), (0, 5), (2, 2, 2, 2)])
def test_images_must_be_planes(shape):
    with pytest.raises(ValueError, match="at least one pixel"):
        to_display(np.zeros(shape))


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="real numbers"):
        to_display(np.zeros((2, 2), complex))
    with pytest.raises(TypeError, match="integer"):
        color_labels(np.zeros((2, 2)))


# ------------------------------------------------------------------------------------- file


def test_png_is_written_whole(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    write_png(tmp_path / "new" / "a.png", rgb)
    with Image.open(tmp_path / "new" / "a.png") as file:
        assert np.array_equal(np.asarray(file), rgb)
    assert sorted(os.listdir(tmp_path / "new")) == ["a.png"]
    with pytest.raises(DINOCellError, match="is a folder"):
        write_png(tmp_path, rgb)


def test_a_failed_png_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, **options):
        open(file, "wb").close()
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DINOCellError, match=r"a\.png' cannot be written \(disk full\)"):
        write_png(path, np.zeros((2, 2, 3), np.uint8))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]


def test_large_images_show_details_at_full_size_and_shrink_in_bands(panel_of_at_most, monkeypatch):
    labels = np.zeros((330, 300), np.uint32)
    labels[200:220, 100:130] = 3
    image = np.where(labels, 200, 20).astype(np.uint8)

    def contour_rows(picture):
        return np.flatnonzero((picture == CONTOUR_COLOR).all(axis=-1).any(axis=1))

    assert len(contour_rows(panel_of_at_most(200, image, labels))) == 10
    panel = panel_of_at_most(100, image, labels)
    assert len(contour_rows(panel)) == 5 + 20  # shrunk by 4, and below that as they are
    monkeypatch.setattr("dinocell.results.pictures._BAND_PX", 700)
    np.testing.assert_array_equal(panel_of_at_most(100, image, labels), panel)


def test_details_of_an_image_of_one_row(panel_of_at_most):
    labels = np.zeros((1, 5000), np.uint32)
    labels[0, 40:60] = 1
    assert panel_of_at_most(1000, labels, labels).ndim == 3
