"""What a training starts from: the file's own choice, and the default of small data sets."""

from __future__ import annotations

import pytest
import yaml
from small_runs import small_run

from dinocell.cli import main
from dinocell.errors import ConfigError
from dinocell.network.model import load_model, load_trainable
from dinocell.training import ablation
from dinocell.training import start as module
from dinocell.training.ablation import load_ablation
from dinocell.training.start import (
    MOST_IMAGES_OF_SMALL_SETS,
    START_OF_SMALL_SETS,
    load_train_config,
)


@pytest.fixture
def described(blob_data, tmp_path):
    """A configuration of four training images that names no network."""
    mapping = small_run(blob_data, tmp_path / "run", schedule__steps=1)
    del mapping["model"]
    path = tmp_path / "few.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def run_command(*command) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(item) for item in command])
    assert left.value.code == 0


def test_a_small_set_starts_from_the_generalist(described, tmp_path, capsys, monkeypatch):
    steps = ["optimizer.lr=1e-9", "model.window_px=64", "model.overlap_px=16"]
    run_command("train", described, *steps)
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "images are few" in text]
    assert line.startswith("dinocell: 4 training images are few (at most 50)")
    assert "starts from dinocell-cells; set `model.init=null`" in line
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    start, result = load_trainable("dinocell-cells"), load_model(tmp_path / "run/model.safetensors")
    assert recorded["model"]["init"] == result.card["start"] == "dinocell-cells"
    assert recorded["model"]["low_percentile"] == start.config.low_percentile
    assert recorded["model"]["peak_threshold"] == start.config.peak_threshold
    for key, value in start.named_parameters():
        assert abs(result.state_dict()[key] - value).max() < 2e-3, key
    monkeypatch.setattr(module, "MOST_IMAGES_OF_SMALL_SETS", 1)  # as if images had come meanwhile
    run_command("train", described, *steps)
    assert "images are few" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "size"),
    [
        ("model.init=null", "small"),
        ("model.init=", "small"),
        ("backbone.weights=", "small"),
        ("backbone.weights=dinov3_vits16", "small"),
        ("backbone.lr_mult=0.1", "small"),
        ("model.size=tiny", "tiny"),
        ("model.decoder=linear", "small"),
    ],
)
def test_a_named_network_or_start_is_taken(described, override, size):
    notes: list[str] = []
    config = load_train_config(described, [override], note=notes.append)
    assert (config.model.init, config.model.size, notes) == (None, size, [])


@pytest.mark.parametrize("override", ["model.min_area_px=7", "model.window_px=192", "seed=3"])
def test_other_keys_do_not_name_a_network(described, override):
    notes: list[str] = []
    config = load_train_config(described, [override], note=notes.append)
    assert (config.model.init, config.model.size) == ("dinocell-cells", "conv")
    assert len(notes) == 1
    key, _, value = override.rpartition("=")
    assert key != "model.min_area_px" or config.model.min_area_px == int(value)


@pytest.mark.parametrize(("most", "init"), [(4, "dinocell-cells"), (3, None)])
def test_the_number_of_training_images_decides(described, monkeypatch, most, init):
    """Four of six images train; two are held out."""
    assert (MOST_IMAGES_OF_SMALL_SETS, START_OF_SMALL_SETS) == (50, "dinocell-cells")
    monkeypatch.setattr(module, "MOST_IMAGES_OF_SMALL_SETS", most)
    assert load_train_config(described).model.init == init


def test_a_run_that_has_begun_keeps_its_start(described, tmp_path, monkeypatch):
    notes: list[str] = []
    recorded = tmp_path / "run" / "config.yaml"
    recorded.parent.mkdir()
    for init in ("dinocell-cells", None):
        recorded.write_text(yaml.safe_dump({"model": {"init": init}}))
        for most in (50, 1):
            monkeypatch.setattr(module, "MOST_IMAGES_OF_SMALL_SETS", most)
            assert load_train_config(described, note=notes.append).model.init == init
    recorded.write_text(yaml.safe_dump({"model": {"init": "dinocell-tiny"}}))
    assert load_train_config(described).model.init is None, "a start that somebody had to name"
    assert notes == []


def test_images_that_are_not_here_decide_nothing(described):
    assert load_train_config(described, ["data.datasets.0.images=nowhere"]).model.init is None


def test_an_ablation_says_it_once(described, blob_data, tmp_path, capsys, monkeypatch):
    mapping = {
        "base": str(described),
        "output_dir": str(tmp_path / "out"),
        "variants": [{"name": "plain"}, {"name": "slow", "overrides": ["optimizer.lr=1e-4"]}],
        "test": [{"name": "blobs", "folder": str(blob_data)}],
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(mapping))
    inits = [run.config.model.init for run in load_ablation(path)[1]]
    assert inits == ["dinocell-cells"] * 4
    mapping["variants"][1]["overrides"] = ["model.size=tiny"]
    other = tmp_path / "unlike.yaml"
    other.write_text(yaml.safe_dump(mapping))
    with pytest.raises(ConfigError, match="All variants or none must name their start"):
        load_ablation(other)  # a gain would be that of the start

    def stop(config, shown):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        ablation.ablate(path)
    assert capsys.readouterr().err.count("training images are few") == 1


def test_a_crop_that_does_not_suit_the_start_is_refused_with_its_name(described):
    with pytest.raises(ConfigError, match="multiple of patch_size 32 of dinocell-cells, got 136"):
        load_train_config(described, ["schedule.crop_px=136"])
