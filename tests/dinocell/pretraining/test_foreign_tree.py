"""Pretraining with upstream's own program, which reads `sys.argv` and needs CUDA."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dinocell.errors import UsageError
from dinocell.pretraining.run import pretrain

PROGRAM = """
import json, pathlib, sys
def main(argv=None):
    assert argv is None
    out = pathlib.Path(sys.argv[sys.argv.index('--output-dir') + 1])
    if 'optim.lr=bad' in sys.argv:
        raise AssertionError('lr')
    folder = out / 'eval' / 'training_7'
    folder.mkdir(parents=True)
    (folder / 'teacher_checkpoint.pth').write_text(json.dumps(sys.argv))
"""


def forget_dinov3(forget) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "dinov3"]:
        forget(sys.modules, name)


@pytest.fixture
def config(tmp_path, monkeypatch):
    tree = tmp_path / "tree" / "dinov3"
    for name in ("models", "train"):
        (tree / name).mkdir(parents=True)
        (tree / name / "__init__.py").write_text("")
    (tree / "__init__.py").write_text("")
    (tree / "train" / "train.py").write_text(PROGRAM)
    (tmp_path / "c.yaml").write_text("train: {}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("DINOCELL_DINOV3", str(tmp_path / "tree"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    forget_dinov3(monkeypatch.delitem)  # and remember it again after the test
    yield tmp_path / "c.yaml"
    forget_dinov3(dict.__delitem__)


def test_the_program_gets_our_arguments(config, tmp_path):
    before = list(sys.argv)
    out = tmp_path / "run"
    teacher = pretrain(config, ["optim.lr=0.1"], output_dir=out, seed=5, resume=False)
    assert teacher == out / "eval" / "training_7" / "teacher_checkpoint.pth"
    assert json.loads(teacher.read_text()) == [
        *("train.py", "--config-file", str(config), "--output-dir", str(out), "--seed", "5"),
        *("--no-resume", "optim.lr=0.1"),
    ]
    assert sys.argv == before


def test_its_refusals_are_ours(config, tmp_path):
    before = list(sys.argv)
    with pytest.raises(UsageError, match=r"^lr$"):
        pretrain(config, ["optim.lr=bad"], output_dir=tmp_path / "run")
    assert sys.argv == before


def test_without_a_gpu_it_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="must have a CUDA device"):
        pretrain(config, output_dir=tmp_path / "run")
