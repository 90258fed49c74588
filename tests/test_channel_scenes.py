"""The generated five-channel fields: same for the same seed, one geometry, effects of the plate."""

import numpy as np
import pytest

from tests.channel_scenes import CHANNELS, make_channel_scene


def brightness(scene, index, where):
    plane = scene.planes[index].astype(float)
    return plane[where].mean() - np.percentile(plane, 5)


def test_the_same_arguments_give_the_same_field():
    one, again, other = (make_channel_scene(size_px=96, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.planes, again.planes)
    assert not np.array_equal(one.nuclei, other.nuclei)
    assert one.planes.shape == (5, 96, 96)
    assert one.planes.dtype == np.uint16


def test_every_nucleus_lies_in_its_cell():
    scene = make_channel_scene(size_px=128, seed=3)
    inside = scene.nuclei > 0
    np.testing.assert_array_equal(scene.cells[inside], scene.nuclei[inside])
    assert (scene.cells > 0).sum() > 1.3 * inside.sum()


@pytest.mark.parametrize("channel", CHANNELS)
def test_channels_show_their_part_of_the_cell(channel):
    scene = make_channel_scene(size_px=256, seed=4)
    inside = scene.nuclei > 0
    cytoplasm = (scene.cells > 0) & ~inside
    background = scene.cells == 0
    index = CHANNELS.index(channel)
    nucleus, around, outside = (
        brightness(scene, index, part) for part in (inside, cytoplasm, background)
    )
    assert around > outside
    assert (nucleus > around) == (channel == "DNA")


def test_a_plate_changes_the_light_and_not_the_cells():
    first, second = (make_channel_scene(size_px=128, seed=5, plate=plate) for plate in (0, 1))
    np.testing.assert_array_equal(first.nuclei, second.nuclei)
    gain = [np.ptp(s.planes.astype(float), axis=(1, 2)) for s in (first, second)]
    assert np.abs(np.log(gain[0] / gain[1])).max() > 0.1
