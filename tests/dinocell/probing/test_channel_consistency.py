"""The consistency score on features whose right answer is known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from dinocell.probing.channel_consistency import (
    channel_consistency,
    effective_rank,
    feature_std,
    retrieval_credit,
    standardize_attention,
)
from dinocell.probing.views import MEAN_VIEW

FIELDS, WINDOWS, DIM = 12, 4, 32
CHANNELS = ("DNA", "ER", "RNA", "AGP", "Mito")


def views():
    rows = [
        (field, field * WINDOWS + window, channel)
        for field in range(FIELDS)
        for window in range(WINDOWS)
        for channel in CHANNELS
    ]
    fields, locations, channels = zip(*rows, strict=True)
    return np.array(fields), np.array(locations), np.array(channels)


def score(features, **options):
    return channel_consistency(features, *views(), **options)


def by_location(rng):
    return rng.normal(size=(FIELDS * WINDOWS, DIM))[views()[1]]


def by_channel(rng):
    vectors = rng.normal(size=(len(CHANNELS), DIM))
    return vectors[[CHANNELS.index(name) for name in views()[2]]]


def test_collapsed_features_have_a_perfect_cosine_and_nothing_else():
    rng = np.random.default_rng(0)
    constant = np.tile(rng.normal(size=DIM).astype(np.float32), (FIELDS * WINDOWS * 5, 1))
    constant *= 1 + 1e-7 * rng.normal(size=constant.shape).astype(np.float32)  # rounding
    report = score(constant)
    for name in ("cosine_same_field", "cosine_other_field_same_channel"):
        assert report[name].value == pytest.approx(1.0, abs=1e-9)
    assert report["retrieval_top1"].value == pytest.approx(1 / 48)
    assert report["retrieval_top1"].chance == pytest.approx(1 / 48)
    assert report["channel_decodability"].value == pytest.approx(1 / 5)
    assert report["effective_rank"].value == pytest.approx(1.0, abs=1e-3)
    assert report["effective_rank_centered"].value == 0.0
    assert report["feature_std"].value < 1e-5
    text = " ".join(report.warnings())
    assert "cosine says little" in text
    assert "not better than chance" in text
    assert "collapsed" in text


def test_perfect_invariance_finds_every_place_and_hides_the_channel():
    report = score(by_location(np.random.default_rng(1)))
    assert report["cosine_same_field"].value == pytest.approx(1.0)
    assert abs(report["cosine_other_field_other_channel"].value) < 0.05
    assert report["retrieval_top1"].value == 1.0
    assert report["channel_decodability"].value == pytest.approx(1 / 5)
    assert report["effective_rank_centered"].value > 25
    assert report["feature_std"].value > 0.9
    assert [text for text in report.warnings() if "fields:" not in text] == []


def test_features_of_the_channel_alone_are_decoded_and_find_nothing():
    report = score(by_channel(np.random.default_rng(2)))
    assert report["cosine_other_field_same_channel"].value == pytest.approx(1.0)
    assert report["retrieval_top1"].value == pytest.approx(1 / 48)
    assert report["channel_decodability"].value == 1.0
    assert report["effective_rank"].value < 5.01


def test_random_features_are_at_chance():
    report = score(np.random.default_rng(3).normal(size=(FIELDS * WINDOWS * 5, DIM)))
    for name in ("retrieval_top1", "channel_decodability"):
        assert report[name].low < report[name].chance < report[name].high
    assert abs(report["cosine_same_field"].value) < 0.02
    assert report["feature_std"].value == pytest.approx(1.0, abs=0.02)


def test_place_and_channel_together_are_retrieved_and_decoded():
    rng = np.random.default_rng(4)
    report = score(by_location(rng) + by_channel(rng))
    assert report["retrieval_top1"].value > 0.9
    assert report["channel_decodability"].value > 0.9


def test_cosines_are_means_over_the_pairs_of_a_double_loop():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(FIELDS * WINDOWS * 5, DIM)) + 0.5
    fields, locations, channels = views()
    kept = rng.random(len(fields)) < 0.5  # channels missing here and there
    features, fields, locations, channels = (
        item[kept] for item in (features, fields, locations, channels)
    )
    report = channel_consistency(features, fields, locations, channels)
    sums: dict[str, list[float]] = {"here": [], "beside": [], "same": [], "other": []}
    for first, second in itertools.combinations(range(len(features)), 2):
        left, right = features[first], features[second]
        cosine = left @ right / math.sqrt((left @ left) * (right @ right))
        if locations[first] == locations[second]:
            sums["here"].append(cosine)
        elif fields[first] == fields[second] and channels[first] != channels[second]:
            sums["beside"].append(cosine)
        elif fields[first] != fields[second]:
            sums["same" if channels[first] == channels[second] else "other"].append(cosine)
    assert report["cosine_same_field"].value == pytest.approx(np.mean(sums["here"]))
    assert report["cosine_other_place"].value == pytest.approx(np.mean(sums["beside"]))
    assert report["cosine_other_field_same_channel"].value == pytest.approx(np.mean(sums["same"]))
    assert report["cosine_other_field_other_channel"].value == pytest.approx(np.mean(sums["other"]))


def test_length_of_features_does_not_matter():
    rng = np.random.default_rng(6)
    features = by_location(rng) + rng.normal(size=(FIELDS * WINDOWS * 5, DIM))
    scaled = score(features * rng.uniform(0.5, 2, size=(len(features), 1)))
    plain = score(features)
    for name in ("cosine_same_field", "retrieval_top1", "channel_decodability", "feature_std"):
        assert scaled[name].value == pytest.approx(plain[name].value)


def test_order_of_views_does_not_matter():
    rng = np.random.default_rng(7)
    features = by_location(rng) + rng.normal(size=(FIELDS * WINDOWS * 5, DIM))
    order = rng.permutation(len(features))
    fields, locations, channels = views()
    mixed = channel_consistency(features[order], fields[order], locations[order], channels[order])
    for name, estimate in score(features).estimates.items():
        assert mixed[name].value == pytest.approx(estimate.value), name


def test_retrieval_by_hand_counts_ties_as_shares():
    similarities = np.array([[3.0, 1, 2], [3, 3, 2], [3, 3, 3], [1, 3, 2], [2, 2, 3]])
    right = np.array([0, 0, 0, 0, 0])
    assert retrieval_credit(similarities, right).tolist() == pytest.approx([1, 0.5, 1 / 3, 0, 0])


def test_intervals_draw_fields_and_shrink_with_their_number():
    rng = np.random.default_rng(8)
    features = by_location(rng) + 1.2 * rng.normal(size=(FIELDS * WINDOWS * 5, DIM))
    few = views()[0] < 4
    fields, locations, channels = views()
    small = channel_consistency(features[few], fields[few], locations[few], channels[few])
    large = score(features)
    for report in (small, large):
        for name in ("cosine_same_field", "retrieval_top1", "cosine_other_field_same_channel"):
            assert report[name].low < report[name].value < report[name].high
    name = "cosine_same_field"
    assert large[name].high - large[name].low < small[name].high - small[name].low
    # Windows of a field that are copies of each other add no information: the interval stays.
    copied = np.repeat(by_location(rng)[:: WINDOWS * 5], WINDOWS * 5, axis=0)
    copied += 0.3 * np.repeat(rng.normal(size=(FIELDS, 5, DIM)), WINDOWS, axis=0).reshape(-1, DIM)
    wide = score(copied)[name]
    assert wide.high - wide.low > 0.005
    assert math.isnan(score(features, num_bootstrap=0)[name].low)
    other = score(features, seed=1)[name]
    assert other.value == large[name].value
    assert other.low != large[name].low


def test_mean_view_is_compared_apart():
    rng = np.random.default_rng(9)
    place = rng.normal(size=(FIELDS * WINDOWS, DIM))
    fields, locations, channels = views()
    noise = 0.1 * rng.normal(size=(len(fields), DIM))
    features = np.concatenate([place[locations] + noise, place])
    report = channel_consistency(
        features,
        np.concatenate([fields, np.arange(FIELDS).repeat(WINDOWS)]),
        np.concatenate([locations, np.arange(FIELDS * WINDOWS)]),
        [*channels, *[MEAN_VIEW] * (FIELDS * WINDOWS)],
    )
    assert report.channels == CHANNELS
    assert report.num_views == len(fields)
    assert report["mean_view_cosine_same_field"].value > 0.95
    assert abs(report["mean_view_cosine_other_field"].value) < 0.1
    assert report["mean_view_retrieval_top1"].value == 1.0
    assert report["mean_view_retrieval_top1"].chance == pytest.approx(1 / 48)
    without = score(features[: len(fields)])
    assert "mean_view_retrieval_top1" not in without.estimates
    assert without["cosine_same_field"].value == report["cosine_same_field"].value


def test_attention_agrees_within_a_place_and_a_flat_map_with_nothing():
    rng = np.random.default_rng(10)
    maps = rng.random((FIELDS * WINDOWS, 3, 16))[views()[1]]
    features = by_location(rng)
    report = score(features, attention=maps)
    assert report["attention_same_field"].value == pytest.approx(1.0)
    assert abs(report["attention_other_field"].value) < 0.05
    flat = score(features, attention=np.full_like(maps, 1 / 16))
    assert flat["attention_same_field"].value == 0.0
    expected = np.mean([np.corrcoef(maps[0, head], maps[5, head])[0, 1] for head in range(3)])
    rows = standardize_attention(maps)
    assert rows[0] @ rows[5] == pytest.approx(expected)


def test_kind_of_field_gives_the_channel_not_away():
    """Half of the fields have three channels, half have three others: invariance stays at 1/3."""
    rng = np.random.default_rng(11)
    fields, locations, channels = [], [], []
    for field, window in itertools.product(range(8), range(4)):
        for channel in ("DNA", "ER", "RNA") if field % 2 else ("DNA", "AGP", "Mito"):
            fields.append(field)
            locations.append(field * 4 + window)
            channels.append(channel)
    place = rng.normal(size=(32, DIM)) + 5 * rng.normal(size=(2, DIM))[np.arange(32) // 4 % 2]
    features = place[locations]
    report = channel_consistency(features, fields, locations, channels)
    assert report["channel_decodability"].value == pytest.approx(1 / 3)
    assert report["channel_decodability"].chance == pytest.approx(1 / 3)
    assert report["retrieval_top1"].value == 1.0
    assert np.isnan(report.cosine_by_channel[1, 3])  # ER or RNA never meets AGP or Mito
    assert np.allclose(report.cosine_by_channel, report.cosine_by_channel.T, equal_nan=True)


def test_decoder_is_not_tested_on_its_own_fields():
    """A channel mark that changes from field to field is no channel mark."""
    rng = np.random.default_rng(12)
    fields, locations, channels = views()
    marks = rng.normal(size=(FIELDS, 5, DIM))
    number = np.array([CHANNELS.index(name) for name in channels])
    for features, low, high in ((marks[fields, number], 0, 0.45), (marks[0, number], 1, 1)):
        report = channel_consistency(features, fields, locations, channels, num_bootstrap=0)
        assert low <= report["channel_decodability"].value <= high


def test_channel_matrices_by_hand():
    features = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0]])
    report = channel_consistency(features, [0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], list("ababab"))
    assert report.cosine_by_channel[0, 1] == pytest.approx(2 / 3)
    # a of place 0 is found at once; a of place 1 finds b of place 1 only; a of place 2 is wrong.
    # Ties: place 0 has two equal answers (b0, b2).
    assert report.retrieval_by_channel[0, 1] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert np.isnan(report.retrieval_by_channel[0, 0])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_effective_rank_of_equal_singular_values(rank):
    basis = np.linalg.qr(np.random.default_rng(13).normal(size=(20, 20)))[0]
    assert effective_rank(basis[:rank]) == pytest.approx(rank)


def test_effective_rank_formula_and_edges():
    values = np.array([3.0, 2.0, 1.0])
    shares = values / 6
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(np.diag(values)) == pytest.approx(expected)
    assert effective_rank(np.zeros((4, 3))) == 0.0
    far = np.random.default_rng(14).normal(size=(200, 4)) + 1000
    assert effective_rank(far) < 1.1
    assert effective_rank(far, centered=True) > 3.9


def test_spread_of_unit_vectors_by_hand():
    assert feature_std(np.array([[1.0, 0], [0, 5]])) == pytest.approx(0.5 * math.sqrt(2))
    assert feature_std(np.ones((5, 3))) == pytest.approx(0.0)


def test_one_field_says_what_it_cannot_say():
    report = channel_consistency(
        np.random.default_rng(15).normal(size=(4, 8)), [0] * 4, [0, 0, 1, 1], list("abab")
    )
    assert math.isnan(report["cosine_other_field_same_channel"].value)
    assert math.isnan(report["channel_decodability"].value)
    assert math.isnan(report["cosine_same_field"].low)
    assert any("only one field" in text for text in report.warnings())
    text = json.dumps(report.to_mapping(), allow_nan=False)
    assert json.loads(text)["estimates"]["channel_decodability"]["value"] is None


def test_wrong_input_is_refused():
    features = np.ones((4, 3))
    good = ([0, 0, 1, 1], [0, 0, 1, 1], list("abab"))
    with pytest.raises(ValueError, match="a field, location and channel per row"):
        channel_consistency(features[:3], *good)
    with pytest.raises(ValueError, match="must be finite"):
        channel_consistency(features * np.nan, *good)
    with pytest.raises(ValueError, match="each channel once"):
        channel_consistency(features, good[0], good[1], list("aaab"))
    with pytest.raises(ValueError, match="lie in one field"):
        channel_consistency(features, [0, 1, 1, 1], good[1], good[2])
    with pytest.raises(ValueError, match="seen through two channels"):
        channel_consistency(features, good[0], [0, 1, 2, 3], good[2])
    with pytest.raises(ValueError, match="a map per view"):
        channel_consistency(features, *good, attention=np.ones((3, 2, 4)))
    with pytest.raises(ValueError, match="M, heads, N"):
        channel_consistency(features, *good, attention=np.ones((4, 4)))
