"""Retrieval within a field and among turned windows, on places that can be searched by eye."""

import numpy as np
import pytest

from dinocell.probing.channel_consistency import Suspicions, channel_consistency
from dinocell.probing.views import MEAN_VIEW

# Three fields of one, two and three windows; a letter is what a window looks like, in both channels.
FIELDS = [0, 1, 1, 2, 2, 2]
UPRIGHT = "aabacd"


def pictures(letters):
    """A direction of its own for each letter; two views per window, as two channels see the same."""
    return np.repeat(np.eye(5)[["abcde".index(letter) for letter in letters]], 2, axis=0)


def score(upright, turned, *, mean_view=None):
    """`mean_view`: (6, 5) features of the mean view of each window, upright and turned."""
    fields, places = np.repeat(FIELDS, 2), np.repeat(np.arange(6), 2)
    features, moved, channels = pictures(upright), pictures(turned), ["DNA", "ER"] * 6
    if mean_view is not None:
        # First, so that rows of single channels are not the first rows.
        fields, places = np.append(FIELDS, fields), np.append(np.arange(6), places)
        features, moved = (np.concatenate([mean_view, part]) for part in (features, moved))
        channels = [MEAN_VIEW] * 6 + channels
    return channel_consistency(features, fields, places, channels, suspicions=Suspicions(moved))


def test_within_the_field_only_its_own_windows_are_searched():
    report = score(UPRIGHT, UPRIGHT)
    # Three windows look like "a": each finds the others as well, unless these are of other fields.
    assert report["retrieval_top1"].value == pytest.approx((3 * 1 / 3 + 3) / 6)
    assert report["retrieval_top1"].chance == pytest.approx(1 / 6)
    assert report["retrieval_within_field"].value == 1.0
    # The field of one window has nothing to search; the others have two and three windows.
    assert report["retrieval_within_field"].chance == pytest.approx((2 * 1 / 2 + 3 * 1 / 3) / 5)
    assert report["retrieval_turned"].value == 1.0
    assert report["retrieval_turned"].chance == report["retrieval_within_field"].chance


@pytest.mark.parametrize(
    ("turned", "right"),
    [
        ("abaacd", 0 + 3),  # the two windows of field 1 look like each other after the turn
        ("aabcda", 2 + 0),  # as do the three of field 2, in a circle
        ("aaaacd", 1 / 2 + 1 / 2 + 3),  # two equal answers for "a", two equal strangers for "b"
    ],
)
def test_turned_windows_are_searched_and_upright_ones_are_not(turned, right):
    report = score(UPRIGHT, turned)
    assert report["retrieval_turned"].value == pytest.approx(right / 5)
    assert report["retrieval_within_field"].value == 1.0


def test_a_question_and_its_answer_are_of_two_channels():
    """Channels that see a place in their own way find nothing, though each finds itself."""
    fields, places = np.repeat([0, 1], 4), np.repeat(np.arange(4), 2)
    features = np.eye(8)
    report = channel_consistency(
        features, fields, places, ["DNA", "ER"] * 4, suspicions=Suspicions(features)
    )
    for name in ("retrieval_within_field", "retrieval_turned"):
        assert report[name].value == pytest.approx(1 / 2)  # two strangers of equal distance


def test_mean_views_are_no_answers_within_the_field():
    strange = np.random.default_rng(0).normal(size=(6, 5))
    plain, mixed = (score(UPRIGHT, "abaacd", mean_view=mean) for mean in (None, strange))
    for name in ("retrieval_within_field", "retrieval_turned"):
        assert mixed[name] == plain[name]
