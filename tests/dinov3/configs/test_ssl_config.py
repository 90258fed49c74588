"""Merging, checking, comparing configurations."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf

from dinov3.cells.ranges import RANGES
from dinov3.cells.validation import check_keys, leaves, warn_of_ignored_keys
from dinov3.configs import (
    IGNORED_KEYS,
    DinoV3SetupArgs,
    apply_scaling_rules_to_cfg,
    compare_configs,
    get_cfg_from_args,
    get_default_config,
    setup_config,
    write_config,
)
from dinov3.data.augmentations_multiview import build_multiview_augmentation

ROOT = Path(__file__).parents[3]


def merged(tmp_path, text: str = "", *opts: str, strict: bool = True):
    path = tmp_path / "c.yaml"
    path.write_text(text or "{}")
    args = DinoV3SetupArgs(str(path), output_dir=str(tmp_path / "out"), opts=list(opts))
    return get_cfg_from_args(args, strict=strict)


def test_order_default_file_command_line(tmp_path):
    cfg = merged(
        tmp_path,
        "optim: {lr: 0.5, epochs: 7}",
        "optim.lr=0.25",
        "crops.global_crops_size=[128,256]",
    )
    assert cfg.optim.lr == 0.25
    assert cfg.optim.epochs == 7
    assert cfg.optim.warmup_epochs == 10
    assert list(cfg.crops.global_crops_size) == [128, 256]
    assert cfg.train.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("optim: {lrr: 1}", (), r"got optim.lrr in .*c.yaml; near it: optim.lr"),
        ("nonsense: 1", (), "got nonsense in"),
        ("", ("student.pach_size=8",), "near it: student.patch_size"),
        ("", ("optim.lr=fast",), r"optim.lr` must be a number, got 'fast'"),
        ("", ("train.compile=3",), r"train.compile` must be true or false, got 3"),
        ("", ("optim.lr=true",), "must be not a truth value"),
        ("", ("train.batch_size_per_gpu=2.5",), "must be a whole number, got 2.5"),
        ("", ("optim.epochs=0.5",), "epochs` must be a whole number, got 0.5"),
        ("", ("crops.global_crops_size=[64,32.5]",), "must be a whole number, got 32.5"),
        ("", ("monitor.images=1.5",), "must be a whole number, got 1.5"),
        ("", ("ibot.mask_ratio_min_max=0.3",), "must be a list"),
        ("", ("ibot.mask_ratio_min_max=[0.3]",), "must be a list of 2 numbers"),
        ("", ("crops.rgb_std=[0.3]",), "must be a list of 3 numbers"),
        ("schedules: {lr: {peek: 1}}", (), "part of schedules.lr.peek must be one of start, peak"),
        (
            "",
            ("gram.loss_weight_schedule.end=high",),
            "end` must be a number, at least 0, got 'high'",
        ),
        ("", ("schedules.lr.warmup_epochs=0.5",), "must be a whole number, at least 0, got 0.5"),
        ("", ("optim.lr=",), r"optim.lr` must be a number, got nothing in the command line"),
        ("", ("optim.lr=-0.1",), r"optim.lr` must be at least 0, got -0.1 in"),
        ("", ("optim.lr=.nan",), r"optim.lr` must be at least 0, got nan in"),
        ("train: {batch_size_per_gpu: 0}", (), r"must be at least 1, got 0 in .*c.yaml"),
        ("", ("teacher.teacher_temp=0",), r"teacher_temp` must be above 0, got 0 in"),
        ("", ("student.drop_path_rate=1",), "must be at least 0 and below 1, got 1 in"),
        ("", ("crops.global_crops_scale=[0,1]",), "must be above 0 and at most 1, got 0 in"),
        ("", ("crops.global_crops_size=[64,null]",), "must be a number, got nothing in"),
        ("", ("gram.max_updates=-1",), "must be at least 0, or null, got -1 in"),
        ("", ("train.compile=",), "must be true or false, got None in"),
        ("", ("optim.scaling_rule=",), r"must be one of sqrt_wrt_1024, linear_wrt_256, none, got"),
        ("", ("optim.lr",), "must be key=value, got 'optim.lr'"),
        ("a: [", (), r"must be YAML, got an error in line 2, at or after the key a \("),
        ("optim:\n  lr: 1\n  epochs: {\n", (), r"in line 4, at or after the key epochs \("),
        ("optim:\n\tlr: 1\n", (), r"in line 2, at or after the key lr \(.*cannot start any token"),
        ("- 1", (), "must hold keys, got"),
    ],
)
def test_wrong_keys_and_values(tmp_path, text, opts, message):
    with pytest.raises(ValueError, match=message):
        merged(tmp_path, text, *opts)


def test_every_number_has_a_range():
    """Numbers, lists of numbers, and keys without a value; the defaults lie within."""
    default = dict(leaves(get_default_config()))
    numbers = {
        key: value
        for key, value in default.items()
        for one in (value if isinstance(value, list) and value else [value])
        if isinstance(one, (int, float)) and not isinstance(one, bool)
    }
    assert set(numbers) <= set(RANGES), "the list of ranges is that of the keys"
    assert {key for key in RANGES if key not in numbers} <= {
        key for key, value in default.items() if value is None
    }
    for key, value in numbers.items():
        assert all(one in RANGES[key] for one in (value if isinstance(value, list) else [value]))


@pytest.mark.parametrize("value", ["", "null", "fast", "-1e9"])
def test_no_number_takes_a_wrong_value(value):
    """Each key in turn: one sentence, never a traceback of the code that uses it."""
    default = get_default_config()
    for key, allowed in RANGES.items():
        change = OmegaConf.from_dotlist([f"{key}={value}"])
        if value in ("", "null") and allowed.null:
            check_keys(change, default, "here")
            continue
        if key == "crops.rgb_mean" and value == "-1e9":
            continue
        with pytest.raises(ValueError, match=rf"^`{key}` must be "):
            check_keys(change, default, "here")


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/a")
    cfg = merged(tmp_path, "student: {pretrained_weights: ~/w.pth}", "streaming.disk_cache=~/c")
    assert cfg.student.pretrained_weights == "/home/a/w.pth"
    assert cfg.streaming.disk_cache == "/home/a/c"
    assert cfg.gram.ckpt is None
    args = DinoV3SetupArgs("", output_dir="~/out")
    assert get_cfg_from_args(args).train.output_dir == "/home/a/out"


def test_what_is_allowed(tmp_path):
    """Whole numbers for shares, the second form of schedules, no strictness on request."""
    section = "{start: 0, peak: 1, end: 0, warmup_epochs: 1, cosine_epochs: 2}"
    cfg = merged(tmp_path, f"schedules: {{lr: {section}}}", "optim.lr=1", "optim.clip_grad=2")
    assert cfg.schedules.lr.cosine_epochs == 2
    assert (
        merged(tmp_path, "", f"gram.loss_weight_schedule={section}").gram.loss_weight_schedule.peak
        == 1
    )
    cfg = merged(tmp_path, "optim: {epochs: 2.0}", "crops.local_crops_size=[16.0,32]")
    assert repr((cfg.optim.epochs, list(cfg.crops.local_crops_size))) == "(2, [16, 32])"
    assert merged(tmp_path, "x: 1", strict=False).x == 1
    with pytest.raises(FileNotFoundError, match=r"must be a file, got nowhere.yaml"):
        get_cfg_from_args(DinoV3SetupArgs("nowhere.yaml"))


@pytest.mark.parametrize(
    ("rule", "factor"),
    [("sqrt_wrt_1024", 4 * (128 / 1024) ** 0.5), ("linear_wrt_256", 0.5), ("none", 1)],
)
def test_learning_rate_scaling(rule, factor):
    cfg = get_default_config()
    cfg.optim.scaling_rule = rule
    cfg.accelerator.accumulation_steps = 2
    assert apply_scaling_rules_to_cfg(cfg).optim.lr == pytest.approx(0.001 * factor)
    cfg = get_default_config()
    cfg.schedules = {}
    assert apply_scaling_rules_to_cfg(cfg).optim.lr == 0.001, "schedules scale themselves"


def test_written_before_scaling(tmp_path):
    cfg = setup_config(DinoV3SetupArgs("", output_dir=str(tmp_path)))
    assert cfg.optim.lr == pytest.approx(0.001)  # 64 → 4 sqrt(64 / 1024) = 1
    assert OmegaConf.load(tmp_path / "config.yaml").optim.lr == 0.001
    assert Path(write_config(cfg, str(tmp_path), "other.yaml")).is_file()


def test_ignored_keys_warn_and_are_documented(caplog):
    default = get_default_config()
    cfg = get_default_config()
    assert warn_of_ignored_keys(cfg, default) == []
    cfg.MODEL.DTYPE = "bf16"
    cfg.student.pos_embed_rope_dtype = "fp32"
    with caplog.at_level("WARNING"):
        assert warn_of_ignored_keys(cfg, default) == ["MODEL.DTYPE", "student.pos_embed_rope_dtype"]
    assert "MODEL.DTYPE='bf16' has no effect: compute_precision.param_dtype" in caplog.text
    known = dict(leaves(default))
    assert set(IGNORED_KEYS) <= set(known)
    text = (ROOT / "docs" / "ssl_config.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w.]+)` \|", text, flags=re.M)
    assert listed == list(IGNORED_KEYS), "the table of docs/ssl_config.md is that of IGNORED_KEYS"


class _Read:
    """A section of a configuration that notes which of its keys are read."""

    def __init__(self, section: DictConfig) -> None:
        self.section, self.names = section, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self.section[name]

    __getattr__ = __getitem__


def test_keys_of_crops_that_views_by_channel_do_not_read_warn(caplog):
    default = get_default_config()
    default.multiview.strategy = "multiview"
    crops = _Read(default.crops)
    build_multiview_augmentation(SimpleNamespace(multiview=default.multiview, crops=crops))
    # Those that the loader reads.
    read = crops.names | {"global_local_crop_pairs_ratios", "teacher_to_student_resolution_scale"}
    cfg = get_default_config()
    for name, value in default.crops.items():
        changed = [one / 2 for one in value] if isinstance(value, ListConfig) else not value
        cfg.crops[name] = changed
    assert warn_of_ignored_keys(cfg, get_default_config()) == [], "all act on pictures"
    cfg.multiview.strategy = "multiview"
    with caplog.at_level("WARNING"):
        found = warn_of_ignored_keys(cfg, get_default_config())
    assert sorted(found) == sorted(f"crops.{name}" for name in set(default.crops) - read)
    assert "crops.horizontal_flips=False has no effect: multiview.rotate turns" in caplog.text


def test_keys_of_views_by_channel_warn_without_a_strategy(caplog):
    default, cfg = get_default_config(), get_default_config()
    cfg.multiview.update({"window": "same", "noise": 0.2})
    with caplog.at_level("WARNING"):
        assert warn_of_ignored_keys(cfg, default) == ["multiview.window", "multiview.noise"]
    assert "multiview.noise=0.2 has no effect: multiview.strategy is not set" in caplog.text
    cfg.multiview.strategy = "single"
    assert warn_of_ignored_keys(cfg, default) == []


def test_ignored_keys_are_read_nowhere():
    """No line of the tree reads a key that the documentation lists as without effect."""
    tree = ROOT / "dinov3_modified" / "dinov3"
    sources = "\n".join(
        p.read_text(encoding="utf-8")
        for p in tree.rglob("*.py")
        if p.name not in ("validation.py",)
    )
    for key in IGNORED_KEYS:
        section, _, name = key.rpartition(".")
        assert f"cfg.{section}.{name}" not in sources, key
        assert f"args.{name}" not in sources or name in ("weights",), key


def test_compare():
    old, new = get_default_config(), get_default_config()
    assert compare_configs(old, new) == []
    new.train.num_workers = 3
    new.wandb.enabled = True
    new.train.dataset_path = "ImageFolder:root=b"
    assert compare_configs(old, new) == []
    new.optim.lr = 0.5
    new.crops.global_crops_size = [1, 2]
    found = compare_configs(old, new)
    assert [d.key for d in found] == ["crops.global_crops_size", "optim.lr"]
    assert str(found[1]) == "optim.lr: 0.001 → 0.5"
    del old.accelerator
    assert "accelerator.seed" in [d.key for d in compare_configs(old, new)]
    assert "accelerator.seed" not in [
        d.key for d in compare_configs(old, new, get_default_config())
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "ssl").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configurations(path, tmp_path):
    """Each is valid, opens with what, source, hardware and command, and makes a network."""
    args = DinoV3SetupArgs(str(path), output_dir=str(tmp_path))
    cfg = get_cfg_from_args(args)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in (
        "# Pretrains:",
        "# Source:",
        "# Hardware and time:",
        "# Command: dinocell pretrain",
    ):
        assert word in head, word
    from dinov3.models import build_model_from_cfg

    assert build_model_from_cfg(cfg, only_teacher=True)[0].patch_size == cfg.student.patch_size
