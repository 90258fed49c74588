"""How much a few numbers explain of features, where the share is known beforehand."""

import math

import numpy as np
import pytest

from dinocell.probing.channel_consistency import Suspicions, channel_consistency
from dinocell.probing.feature_extraction import FieldImage, extract_views, shortcut_numbers
from dinocell.probing.shortcuts import explained_share
from dinocell.probing.views import MEAN_VIEW, Views

FIELDS, WINDOWS, CHANNELS = 20, 30, ("DNA", "ER")
VIEWS = FIELDS * WINDOWS * len(CHANNELS)


def places(fields=FIELDS):
    field = np.repeat(np.arange(fields), WINDOWS * len(CHANNELS))
    return (
        field,
        np.repeat(np.arange(fields * WINDOWS), len(CHANNELS)),
        [*CHANNELS] * len(field[::2]),
    )


def views(features, fields=FIELDS):
    return Views.checked(features, *places(fields))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_known_shares(rng, share):
    """One coordinate follows the numbers, another one does not."""
    known, other = rng.normal(size=(2, VIEWS))
    features = np.stack([math.sqrt(share) * known, math.sqrt(1 - share) * other], axis=1)
    numbers = np.stack([3 * known + 100, rng.normal(size=VIEWS)], axis=1)
    assert explained_share(views(features), numbers) == pytest.approx(share, abs=0.03)


def test_numbers_that_have_nothing_to_do_with_the_features_explain_nothing(rng):
    """Also where there are so many numbers that a fit on the tested field would succeed."""
    features, numbers = rng.normal(size=(VIEWS, 3)), rng.normal(size=(VIEWS, 40))
    assert explained_share(views(features), numbers) == 0.0


def test_a_law_of_one_field_that_others_do_not_share_explains_nothing(rng):
    known = rng.normal(size=(VIEWS, 1))
    sign = np.where(places()[0] % 2, 1.0, -1.0)[:, None]
    assert explained_share(views(sign * known), known) < 0.02
    assert explained_share(views(known), known) > 0.99


@pytest.mark.parametrize("group", ["field", "channel", "both"])
def test_differences_between_fields_and_channels_are_not_counted(rng, group):
    """The numbers know the level of a group exactly; within fields they know nothing."""
    field, channel = places()[0], np.tile([0, 1], VIEWS // 2)
    level = {
        "field": field,
        "channel": channel * FIELDS,
        "both": np.where(channel, field, 19 - field),
    }
    level = level[group][:, None] - 9.5
    features = level + rng.normal(size=(VIEWS, 1))
    assert explained_share(views(features), level + 0.1 * rng.normal(size=(VIEWS, 1))) < 0.02


def test_three_fields_are_needed_and_features_that_vary(rng):
    for fields, is_known in ((2, False), (3, True)):
        features = rng.normal(size=(fields * WINDOWS * 2, 2))
        assert math.isfinite(explained_share(views(features, fields), features)) == is_known
    assert math.isnan(explained_share(views(np.ones((VIEWS, 2))), np.ones((VIEWS, 1))))


def test_each_shortcut_has_its_own_share_and_mean_views_have_none(rng):
    """Features of length 1 on a circle: `first` gives one coordinate, `second` a part of the other."""
    angle = rng.uniform(-math.pi, math.pi, VIEWS)
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # each is half of the variation
    doubtful = np.where(rng.random(VIEWS) < 0.4, np.sin(angle), rng.normal(size=VIEWS) * 0.5**0.5)
    field, location, channel = places()
    count = FIELDS * WINDOWS
    mixed = np.concatenate([rng.normal(size=(count, 2)), features])
    numbers = {
        "first": np.concatenate([rng.normal(size=count), np.cos(angle)])[:, None],
        "second": np.concatenate([rng.normal(size=count), doubtful])[:, None],
    }
    report = channel_consistency(
        mixed,
        np.concatenate([field[::2], field]),
        np.concatenate([location[::2], location]),
        [MEAN_VIEW] * count + channel,
        suspicions=Suspicions(mixed, numbers),
        num_bootstrap=0,
    )
    assert report["explained_by_first"].value == pytest.approx(0.5, abs=0.03)
    # A correlation of 0.4 with half of the variation.
    assert report["explained_by_second"].value == pytest.approx(0.4**2 / 2, abs=0.03)


def test_numbers_of_a_tilted_plane_by_hand():
    """The slopes, over the length of a thumbnail of the same plane; contrast does not matter."""
    across = np.linspace(-1, 1, 32)
    plane = (3 * across[:, None] + 4 * across)[None].astype(np.float32)
    cell = across.reshape(4, 8).mean(axis=1)  # brightness of the four rows of a thumbnail
    length = math.sqrt((3**2 + 4**2) * 4 * (cell**2).sum())
    found = shortcut_numbers(plane)
    np.testing.assert_allclose(found["illumination"], [[3 / length, 4 / length]], rtol=1e-4)
    expected = (3 * cell[:, None] + 4 * cell).ravel() / length
    np.testing.assert_allclose(found["layout"], expected[None], rtol=1e-4, atol=1e-6)
    again = shortcut_numbers(0.1 * plane + 7)
    for name, numbers in found.items():
        np.testing.assert_allclose(again[name], numbers, rtol=1e-3, atol=1e-4)


def test_the_numbers_of_a_window_are_those_of_its_own_channel_upright(mini_model):
    across = np.linspace(-1, 1, 32)
    planes = np.stack([across[:, None] + 0 * across, 0 * across[:, None] - across])
    item = FieldImage("a", ("down", "left"), (1000 + 500 * planes).astype(np.float32))
    vit = mini_model.backbone.vit
    found = extract_views(vit, [item], window_px=32, windows_per_field=1, attention=False)
    down, left, mean = found.shortcuts["illumination"]
    np.testing.assert_allclose([down[1], left[0]], 0, atol=0.02)
    assert down[0] > 0.3
    assert left[1] < -0.3
    np.testing.assert_allclose([mean[0], mean[1]], [down[0] / 2**0.5, left[1] / 2**0.5], atol=0.02)
    thumbnails = found.shortcuts["layout"].reshape(3, 4, 4)
    assert (np.diff(thumbnails[0], axis=0) > 0.1).all()
    assert (np.diff(thumbnails[1], axis=1) < -0.1).all()
    np.testing.assert_allclose(np.linalg.norm(thumbnails, axis=(1, 2)), 1, rtol=1e-4)
