"""Variants of a training compared: what runs, what is reported, and how sure it is."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import small_run

from dinocell.cli import main
from dinocell.errors import ConfigError, DataSetError
from dinocell.evaluation.intervals import ap_intervals, gain_interval
from dinocell.evaluation.metrics import pooled_ap
from dinocell.training import ablation
from dinocell.training.ablation import ablate, load_ablation

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.usefixtures("mini_networks")


@pytest.fixture
def described(blob_data, tmp_path):
    """A file with two variants and two seeds of one step."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(small_run(blob_data, tmp_path / "unused", schedule__steps=2)))
    mapping = {
        "base": str(base),
        "overrides": ["schedule.steps=1"],
        "output_dir": str(tmp_path / "out"),
        "seeds": [0, 1],
        "variants": [{"name": "plain"}, {"name": "bce", "overrides": ["loss.kind=bce"]}],
        "test": [{"name": "blobs", "folder": str(blob_data)}],
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path, mapping


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_variant_and_seed_is_trained_once_and_scored(
    described, tmp_path, monkeypatch, capsys
):
    path, _ = described
    assert ablate(path, only=3, shown=False).rows[0]["variant"] == "bce"
    assert [folder.name for folder in (tmp_path / "out" / "bce").iterdir()] == ["seed1"]
    assert not (tmp_path / "out" / "summary.csv").exists()
    model = tmp_path / "out" / "bce" / "seed1" / "model.safetensors"
    written = model.stat().st_mtime_ns
    with pytest.raises(SystemExit) as left:
        main(["ablate", str(path)])
    assert left.value.code == 0
    assert model.stat().st_mtime_ns == written, "a finished run is not trained again"
    rows = read(tmp_path / "out" / "images.csv")
    assert len(rows) == 2 * 2 * 6
    assert {(row["variant"], row["seed"]) for row in rows} == {
        ("plain", "0"), ("plain", "1"), ("bce", "0"), ("bce", "1")
    }  # fmt: skip
    summary = read(tmp_path / "out" / "summary.csv")
    assert [row["variant"] for row in summary] == ["plain", "bce"]
    assert float(summary[0]["gain"]) == float(summary[0]["gain_high"]) == 0
    shown = capsys.readouterr().out
    assert "gain_low" in shown
    assert "summary.csv" in shown
    kinds = {run.variant: run.config.loss.kind for run in load_ablation(path)[1]}
    assert kinds == {"plain": "mse", "bce": "bce"}


def test_pooled_ap_and_gain_by_hand():
    # one seed, two images, one IoU: (found, false, missed)
    first = np.array([[[[8, 1, 1]], [[2, 4, 4]]]])
    other = np.array([[[[9, 0, 1]], [[6, 2, 2]]]])
    np.testing.assert_allclose(pooled_ap(first), [[10 / 20]])
    gain, low, high = gain_interval(first, other)
    assert gain == pytest.approx(15 / 20 - 10 / 20)
    # a draw has the first image twice, the second twice, or both
    assert low == pytest.approx(9 / 10 - 8 / 10)
    assert high == pytest.approx(6 / 10 - 2 / 10)
    assert gain_interval(first, first) == (0, 0, 0)
    assert pooled_ap(np.zeros((1, 2, 1, 3), int)).tolist() == [[0.0]]


def test_intervals_shrink_with_more_images_and_seeds_give_a_spread():
    rng = np.random.default_rng(1)
    few, many = (rng.integers(5, 20, (2, count, 3, 3)) for count in (5, 200))
    low, high = ap_intervals(few[0])[0]
    assert low < pooled_ap(few)[0, 0] < high
    widths = [np.ptp(gain_interval(counts, counts[:, :, :, ::-1])[1:]) for counts in (few, many)]
    assert widths[1] < widths[0]


def test_the_shipped_comparison_loads(data_dir, monkeypatch):
    monkeypatch.chdir(ROOT)  # its paths are those of a clone
    monkeypatch.setenv("DINOCELL_DATA", str(data_dir.resolve()))
    config, runs = load_ablation(ROOT / "configs" / "ablation" / "generalist_conv.yaml")
    assert len(runs) == len(config.variants) * len(config.seeds)
    assert runs[0].config.model.size == "conv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": []}, "`variants` must be items with names"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "names that differ"),
        ({"variants": [{"name": "a/b"}]}, "leave out slashes"),
        ({"variants": [{"name": "a", "overrides": ["seed=3"]}]}, "must leave name, seed"),
        ({"variants": [{"name": "a", "overrides": ["loss.kind=hinge"]}]}, "mse, bce"),
        ({"seeds": [1, 1]}, "`seeds` must be numbers that differ"),
        ({"test": []}, "`test` must be items"),
    ],
)
def test_wrong_descriptions(described, change, message):
    path, mapping = described
    path.write_text(yaml.safe_dump({**mapping, **change}))
    with pytest.raises(ConfigError, match=message):
        load_ablation(path)


def test_faults_are_met_before_the_first_training(described, tmp_path, monkeypatch):
    path, mapping = described
    monkeypatch.setattr(ablation, "train", None)
    with pytest.raises(ConfigError, match="`only` must be a run from 0 to 3, got 4"):
        ablate(path, only=4)
    mapping["test"][0]["folder"] = str(tmp_path)
    path.write_text(yaml.safe_dump(mapping))
    with pytest.raises(DataSetError, match="folders images and labels"):
        ablate(path)
