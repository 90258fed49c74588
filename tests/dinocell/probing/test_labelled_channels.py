"""Mean, spread and worst over channels, from scores that are known."""

import math

import pytest

from dinocell.probing.decoder_probe import ProbeResult
from dinocell.probing.inspection_report import _across_rows, _channel_rows
from dinocell.probing.labelled_channels import ChannelScores

# AP at 0.5 of the decoder of a channel (row) on each channel (column).
AP50 = {
    "DNA": {"DNA": 0.9, "ER": 0.5, "RNA": 0.3, "AGP": 0.4},
    "ER": {"DNA": 0.8, "ER": 0.6, "RNA": 0.2, "AGP": 0.2},
    "RNA": {"DNA": 0.1, "ER": 0.1, "RNA": 0.3, "AGP": 0.1},
    "AGP": {"DNA": 0.0, "ER": 0.6, "RNA": 0.6, "AGP": 0.6},
}
# Over the three other channels; the standard deviation is √(sum of squares / 2).
ACROSS = {
    "DNA": {"mean": 0.4, "std": math.sqrt((0.1**2 + 0.1**2 + 0) / 2), "worst": 0.3},
    "ER": {"mean": 0.4, "std": math.sqrt((0.4**2 + 0.2**2 + 0.2**2) / 2), "worst": 0.2},
    "RNA": {"mean": 0.1, "std": 0.0, "worst": 0.1},
    "AGP": {"mean": 0.4, "std": math.sqrt((0.4**2 + 0.2**2 + 0.2**2) / 2), "worst": 0.0},
}


def scored(table):
    results = {}
    for channel, row in table.items():
        # AP at 0.75 is another number, which must not be taken for that at 0.5.
        found = {name: {"ap50": value, "ap75": value / 7 + 0.01} for name, value in row.items()}
        own = found.pop(channel)
        results[channel] = ProbeResult(own, {}, 1, 0.0, 0.0, 2, 1, found)
    return ChannelScores(results, "1 of 3 fields are held out")


def test_each_decoder_is_summed_up_over_the_channels_that_it_never_saw():
    found = scored(AP50)
    for channel, expected in ACROSS.items():
        assert found.across[channel] == pytest.approx(expected), channel
        assert found.to_mapping()["across"][channel] == pytest.approx(expected)


def test_mean_and_spread_of_decoders_on_their_own_channels():
    found = scored(AP50)  # 0.9, 0.6, 0.3, 0.6
    assert found.mean["ap50"] == pytest.approx(0.6)
    assert found.std["ap50"] == pytest.approx(math.sqrt((0.3**2 + 0 + 0.3**2 + 0) / 3))
    assert found.mean["ap75"] == pytest.approx(0.6 / 7 + 0.01)
    unequal = scored(
        {name: {name: value} for name, value in zip("abc", (0.0, 0.1, 0.8), strict=True)}
    )
    assert unequal.mean["ap50"] == pytest.approx(0.3)  # not the median
    assert unequal.std["ap50"] == pytest.approx(math.sqrt((0.3**2 + 0.2**2 + 0.5**2) / 2))
    assert unequal.across == {}


def test_one_other_channel_has_a_mean_and_no_spread():
    found = scored({"DNA": {"DNA": 0.9, "ER": 0.5}, "ER": {"DNA": 0.7, "ER": 0.6}})
    assert found.across["DNA"] == pytest.approx(
        {"mean": 0.5, "std": math.nan, "worst": 0.5}, nan_ok=True
    )
    assert found.across["ER"]["mean"] == 0.7
    assert found.to_mapping()["across"]["ER"]["std"] is None


def test_table_has_training_channels_as_rows_and_tested_channels_as_columns():
    head, *rows = _across_rows("net", scored(AP50))
    assert head[0] == "AP@0.5 trained on (net)"
    assert head[1:] == [*AP50, "others: mean", "others: std", "others: worst"]
    for (channel, expected), row in zip(AP50.items(), rows, strict=True):
        assert row[0] == channel
        assert list(map(float, row[1:5])) == list(expected.values())
        summary = [ACROSS[channel][part] for part in ("mean", "std", "worst")]
        assert list(map(float, row[5:])) == pytest.approx(summary, abs=5e-4)
    own = {row[0]: row[1:] for row in _channel_rows("net", scored(AP50))}
    assert own["decoder per channel (net)"] == ["ap50", "ap75"]
    assert own["DNA"][0] == "0.900"
    assert own["mean"][0] == "0.600"
    assert own["std over channels"][0] == "0.245"
