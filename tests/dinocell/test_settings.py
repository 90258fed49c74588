"""Configuration: every wrong key, type and range is one sentence; every option has a home."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dinocell.errors import ConfigError
from dinocell.network.config import BackboneConfig, ModelConfig
from dinocell.settings import config_from_mapping, config_to_mapping, load_settings
from dinocell.training.config import AugmentConfig, OptimizerConfig, ScheduleConfig, TrainConfig

ROOT = Path(__file__).parents[2]
DATA = {"datasets": [{"name": "a", "images": "i", "labels": "l"}]}


def write(path: Path, mapping: object) -> Path:
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "finetune").glob("*.yaml")), ids=str)
def test_shipped_configurations_load_and_say_how_to_run_them(path):
    config = load_settings(TrainConfig, path)
    assert config.data.datasets
    head = path.read_text().splitlines()[:6]
    assert all(line.startswith("#") for line in head[:4])
    assert any(f"dinocell train configs/finetune/{path.name}" in line for line in head)


def test_round_trip(tmp_path):
    config = load_settings(
        TrainConfig, write(tmp_path / "c.yaml", {"data": DATA, "augment": {"scale": [0.5, 2]}})
    )
    assert config.augment.scale == (0.5, 2.0)
    assert config_from_mapping(TrainConfig, config_to_mapping(config)) == config


def test_unknown_key_names_the_nearest(tmp_path):
    path = write(
        tmp_path / "c.yaml", {"data": DATA, "optimizer": {"leraning": 1, "wieght_decay": 1}}
    )
    with pytest.raises(ConfigError, match=r"optimizer\.leraning.*known: kind, lr, weight_decay"):
        load_settings(TrainConfig, path)
    path = write(tmp_path / "c.yaml", {"data": DATA, "optimizer": {"wieght_decay": 1}})
    with pytest.raises(ConfigError, match=r"did you mean optimizer\.weight_decay"):
        load_settings(TrainConfig, path)


def test_overrides_reach_nested_keys_and_lists(tmp_path):
    path = write(tmp_path / "c.yaml", {"data": DATA})
    config = load_settings(
        TrainConfig,
        path,
        ["optimizer.lr=1e-5", "data.datasets.0.weight=2", "model.pixel_size_um=0.5", "name=x"],
    )
    assert config.optimizer.lr == 1e-5
    assert config.data.datasets[0].weight == 2.0
    assert config.model.pixel_size_um == 0.5
    assert config.name == "x"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "key=value"),
        ("=3", "key=value"),
        ("optimizer.lr=fast", "of type float"),
        ("optimizer.lr=-1", "above 0"),
        ("optimizer.nothing=1", "must be known"),
        ("data.datasets.7.name=x", "one of 1 items, got 7"),
        ("name.x=3", "must lead to a key"),
        ("licence.x=3", "licence` must be of type str"),
        ("seed=true", "of type int"),
        ("augment.scale=[1]", r"augment.scale` must be of type tuple\[float, float\]"),
        ("augment.scale=3", r"of type tuple\[float, float\], got 3"),
        ("model=3", "model` must be of type ModelConfig"),
        ("name=[unclosed", "must be YAML"),
        ("seed=0b_", "must be YAML"),
        (".name=x", "key=value"),
        ("data..weight=2", "key=value"),
        ("name=???", "name` must be a value, got"),
        ("model=???", "model` must be a value, got"),
        ("name=true", "name` must be of type str, got True"),
        ("wandb.enabled=2", "wandb.enabled` must be of type bool, got 2"),
        ("wandb.enabled='true'", "wandb.enabled` must be of type bool, got 'true'"),
        ('seed="3"', "seed` must be of type int, got '3'"),
        ("seed=1.0", "seed` must be of type int, got 1.0"),
        ("optimizer.lr=true", "optimizer.lr` must be of type float, got True"),
        ("augment.scale=[1, true]", r"augment.scale\[1\]` must be of type float, got True"),
        ("optimizer.lr=.inf", "optimizer.lr` must be a finite number, got inf"),
        ("data.datasets.0.weight=-infinity", r"weight` must be a finite number, got -infinity"),
        ("augment.scale=[1, .nan]", r"augment.scale\[1\]` must be a finite number, got nan"),
        ("seed=-1", "`seed` must be between 0 and "),
        ("seed=17592186044417", "`seed` must be between 0 and "),
        ("data.datasets.-1.weight=2", "one of 1 items, got -1"),
        ("data.datasets[0].weight=2", r"must be known, got 'data.datasets\[0\]'"),
        ("data.datasets.0={name: q}", r"must have the key data.datasets\[0\].images"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    path = write(tmp_path / "c.yaml", {"data": DATA, "name": "n"})
    with pytest.raises(ConfigError, match=message):
        load_settings(TrainConfig, path, [override])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        # Text stays as it is written, for a number too; YAML reads the numbers and booleans.
        ("3", "name", "3"),
        ("010", "name", "010"),
        ("off", "name", "off"),
        ("'true'", "name", "true"),
        ("010", "seed", 8),
        ("0x10", "seed", 16),
        ("1_000", "seed", 1000),
    ],
)
def test_the_field_decides_what_a_scalar_is(tmp_path, text, key, value):
    path = write(tmp_path / "c.yaml", {"data": DATA})
    assert getattr(load_settings(TrainConfig, path, [f"{key}={text}"]), key) == value
    path.write_text(f"{path.read_text()}{key}: {text}\n")
    assert getattr(load_settings(TrainConfig, path), key) == value


def test_an_override_replaces_and_leaves_an_alias(tmp_path):
    path = write(tmp_path / "c.yaml", {"data": DATA})
    augment = "augment: {scale: &range [0.5, 2], gamma: *range, flip: no}\n"
    path.write_text(path.read_text() + augment)
    config = load_settings(TrainConfig, path, ["augment.scale.0=0.25"])
    assert (config.augment.scale, config.augment.gamma) == ((0.25, 2.0), (0.5, 2.0))
    assert not config.augment.flip
    assert load_settings(TrainConfig, path, ["augment={}"]).augment == AugmentConfig()


@pytest.mark.parametrize("text", [r"C:\d\${1}", r"\\${", "${", "a$${b.c}\\", r"${x:y}\${"])
def test_text_that_looks_like_a_reference_stays(text):
    values = {"name": text, "data": {"datasets": [{"name": text, "images": "i", "labels": text}]}}
    config = config_from_mapping(TrainConfig, values)
    assert (config.name, config.data.datasets[0].labels) == (text, text)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (ModelConfig, {"size": "huge"}, "tiny, small, base, large"),
        (ModelConfig, {"patch_size": 7}, "4, 8, 14, 16"),
        (ModelConfig, {"decoder": "mlp"}, "unet, unet_wide, linear"),
        (ModelConfig, {"target": "cube"}, "linear, sqrt"),
        (ModelConfig, {"window_px": 100}, "multiple of `model.patch_size` 8"),
        (ModelConfig, {"overlap_px": 200}, "half of `model.window_px`"),
        (ModelConfig, {"fill_threshold": 0.9}, "fill_threshold` < "),
        (ModelConfig, {"low_percentile": 99.9}, "low_percentile` < "),
        (ModelConfig, {"min_area_px": -1}, "at least 0"),
        (ModelConfig, {"drop_path_rate": 1.0}, r"\[0, 1\)"),
        (BackboneConfig, {"frozen": True}, "needs pretrained weights"),
        (BackboneConfig, {"layer_decay": 0.0}, r"\(0, 1\]"),
        (AugmentConfig, {"gamma": [0, 1]}, "0 < low <= high"),
        (AugmentConfig, {"noise_std": -1}, "at least 0"),
        (AugmentConfig, {"empty_probability": 2}, r"\[0, 1\]"),
        (OptimizerConfig, {"betas": [0.9, 1.0]}, r"\[0, 1\)"),
        (ScheduleConfig, {"precision": "fp8"}, "bf16, fp32"),
        (ScheduleConfig, {"steps": 0}, "at least 1"),
        (ScheduleConfig, {"ema_decay": 1}, r"\[0, 1\)"),
        (ScheduleConfig, {"patience": 0}, "at least 1"),
        (TrainConfig, {}, "at least one data set"),
        (TrainConfig, {"data": {"datasets": DATA["datasets"] * 2}}, "names must differ"),
        (TrainConfig, {"data": {**DATA, "val_fraction": 1.0}}, "val_fraction"),
        (TrainConfig, {"data": DATA, "schedule": {"crop_px": 100}}, "multiple of patch_size"),
        (
            TrainConfig,
            {"data": {"datasets": [{"name": "a"}]}},
            r"must have the key data.datasets\[0\].images",
        ),
        (
            TrainConfig,
            {"data": {"datasets": [{**DATA["datasets"][0], "val_images": "v"}]}},
            "both val_images and val_labels",
        ),
        (TrainConfig, {"data": {"datasets": [{**DATA["datasets"][0], "weight": 0}]}}, "above 0"),
    ],
)
def test_values_out_of_range(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_mapping(kind, values)


def test_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("CELL_DATA", "/there")
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    path = write(tmp_path / "c.yaml", {"data": DATA, "output_dir": "${CELL_DATA}/x"})
    assert load_settings(TrainConfig, path).output_dir == "/there/x"
    assert load_settings(TrainConfig, path, [r"output_dir=C:\d\${CELL_DATA}"]).output_dir == (
        r"C:\d\/there"
    )
    path = write(tmp_path / "c.yaml", {"data": DATA, "output_dir": "${NO_SUCH_VARIABLE:-here}/x"})
    assert load_settings(TrainConfig, path).output_dir == "here/x"
    path = write(tmp_path / "c.yaml", {"data": DATA, "output_dir": "${NO_SUCH_VARIABLE}/x"})
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        load_settings(TrainConfig, path)


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\x00\xff"])
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match="configuration must be"):
        load_settings(TrainConfig, path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="check the path"):
        load_settings(TrainConfig, tmp_path / "none.yaml")
