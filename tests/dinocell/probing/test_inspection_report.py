"""Which features the columns and blocks of the report are of; numbers of each kind are its own."""

import numpy as np
import pytest

from dinocell.probing.channel_consistency import channel_consistency
from dinocell.probing.feature_extraction import ViewExample, ViewFeatures
from dinocell.probing.inspection import _score
from dinocell.probing.inspection_report import (
    FEATURES,
    Inspection,
    InspectionReport,
    number_text,
)

FIELDS, WINDOWS, PATCHES, CHANNELS = 4, 3, 2, ("DNA", "ER")
PLACES = FIELDS * WINDOWS
NUM_PLACES = {"cls": WINDOWS, "patch_mean": WINDOWS, "patch": WINDOWS * PATCHES}  # of a field
EXAMPLE = ViewExample("f0", (0, 0), CHANNELS, np.zeros((2, 2, 2)), None, np.zeros((2, 1, 1, 3)))
HEADS = dict(zip(FEATURES, ("CLS token", "mean patch token", "single patch tokens"), strict=True))


def features(*, turned_away=None):
    """Every place has a direction of its own in each kind of feature, and keeps it when turned.

    With `turned_away`, a kind, each place looks turned as another place of its field does.
    """
    directions = np.repeat(np.eye(PLACES), len(CHANNELS), axis=0)
    single = np.repeat(np.eye(PLACES * PATCHES).reshape(PLACES, PATCHES, -1), 2, axis=0)
    wider = np.pad(directions, ((0, 0), (0, 1)))
    upright = {"cls": directions, "patch_mean": wider, "patch": single}
    # Of a field the windows change their places in a circle.
    step = len(CHANNELS)
    by_field = np.arange(len(directions)).reshape(FIELDS, WINDOWS * step)
    other = np.roll(by_field, step, axis=1).ravel()
    turned = {
        kind: array[other] if kind == turned_away else array for kind, array in upright.items()
    }
    rng = np.random.default_rng(0)
    return ViewFeatures(
        fields=[f"f{number // (WINDOWS * step)}" for number in range(len(directions))],
        channels=[*CHANNELS] * PLACES,
        locations=np.repeat(np.arange(PLACES), step),
        **upright,
        turned=turned,
        shortcuts={
            name: rng.normal(size=(len(directions), 2)) for name in ("illumination", "layout")
        },
        attention=None,
        example=EXAMPLE,
    )


@pytest.mark.parametrize("turned_away", FEATURES)
def test_each_kind_is_compared_with_its_own_turned_features(turned_away):
    reports = _score(features(turned_away=turned_away), 0)
    for kind in FEATURES:
        expected = 0.0 if kind == turned_away else 1.0
        assert reports[kind]["retrieval_turned"].value == expected, kind
        assert reports[kind]["retrieval_within_field"].value == 1.0


def test_each_report_is_of_its_own_features_and_each_patch_is_a_place():
    reports = _score(features(), 0)
    assert [reports[kind].embed_dim for kind in FEATURES] == [12, 13, 24]
    assert [reports[kind].num_locations for kind in FEATURES] == [12, 12, 24]
    assert [reports[kind].num_views for kind in FEATURES] == [24, 24, 48]
    for kind, number in NUM_PLACES.items():
        assert reports[kind]["retrieval_top1"].value == 1.0
        assert reports[kind]["retrieval_within_field"].chance == pytest.approx(1 / number)
    assert "explained_by_layout" in reports["cls"].estimates
    assert "explained_by_layout" not in reports["patch"].estimates


@pytest.fixture(scope="module")
def report():
    """Two networks whose six reports have other numbers each; single patches of the first collapsed."""
    rng = np.random.default_rng(1)
    items = []
    for name in ("first", "second"):
        reports = {}
        for kind, number in NUM_PLACES.items():
            fields = np.repeat(np.arange(FIELDS), number * 2)
            locations = np.repeat(np.arange(FIELDS * number), 2)
            noise = rng.normal(size=(len(fields), 8))
            place = rng.normal(size=(FIELDS * number, 8))[locations]
            collapsed = (name, kind) == ("first", "patch")
            made = np.ones_like(noise) if collapsed else place + rng.uniform(0.5, 1.5) * noise
            channels = [*CHANNELS] * (FIELDS * number)
            reports[kind] = channel_consistency(made, fields, locations, channels)
        items.append(Inspection(name, {}, reports, EXAMPLE, None, 1.0))
    return InspectionReport(items[:1], {"window_px": 32}, [], items[1:])


def blocks(table):
    """The lines under each head, by kind."""
    found, kind = {}, None
    for line in table:
        kind = next((name for name, head in HEADS.items() if line.startswith(head)), kind)
        kind = kind if line and not line.startswith("note") else None
        if kind is not None:
            found.setdefault(kind, []).append(line)
    return found


@pytest.mark.parametrize("kind", FEATURES)
def test_table_has_a_block_of_each_kind_with_its_numbers(report, kind):
    head, *lines = blocks(report.table())[kind]
    assert head.split()[-3:] == ["first", "second", "chance"]
    titles = {
        "cosine_same_field": "cosine, one place, two channels",
        "cosine_other_place": "cosine, two places of a field, two channels",
        "retrieval_within_field": "retrieval within the field, top-1",
        "effective_rank": "effective rank ",
    }
    columns = [item.reports[kind] for item in (*report.inspections, *report.baselines)]
    for name, title in titles.items():
        (line,) = [line for line in lines if line.startswith(title)]
        rest = line.removeprefix(title)
        places = []
        for scores in columns:
            places.append(rest.index(number_text(scores[name].value)))
        assert places == sorted(places), name
    (line,) = [line for line in lines if line.startswith(titles["retrieval_within_field"])]
    assert line.split()[-1] == number_text(1 / NUM_PLACES[kind])


def test_numbers_of_the_table_differ_from_column_to_column(report):
    """Otherwise the test above would not see that one column stands in place of another."""
    items = (*report.inspections, *report.baselines)
    found = [item.reports[kind]["cosine_same_field"].value for item in items for kind in FEATURES]
    assert len({number_text(value) for value in found}) == 6


def test_notes_name_the_kind_that_they_are_about(report):
    notes = [line for line in report.table() if "fewer than two directions" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note (first, patch): ")


def test_json_has_each_kind_with_its_numbers(report):
    whole = report.to_mapping()
    for part, items in (("checkpoints", report.inspections), ("baselines", report.baselines)):
        (written,) = whole[part]
        assert list(written["features"]) == list(FEATURES)
        for kind in FEATURES:
            for name, estimate in items[0].reports[kind].estimates.items():
                found = written["features"][kind]["estimates"][name]["value"]
                assert found == pytest.approx(estimate.value, nan_ok=True), (kind, name)
