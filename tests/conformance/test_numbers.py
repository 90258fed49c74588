"""The same weights and inputs give the same numbers in a tree and in the bundled one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparison import assert_close

BUNDLED = Path(__file__).resolve().parents[2] / "dinov3_modified"


def test_forward_and_gradients(ask, ask_bundled, given):
    theirs, ours = (one("forward", given("weights")) for one in (ask, ask_bundled))
    assert_close(theirs, ours, 1e-5)


def test_losses(ask, ask_bundled, given):
    theirs, ours = (one("losses", given()) for one in (ask, ask_bundled))
    assert_close(theirs, ours, 1e-5)


@pytest.mark.slow
def test_two_training_steps(ask, ask_bundled, given):
    theirs, ours = (one("step", given("start")) for one in (ask, ask_bundled))
    assert all(torch.isfinite(value).all() for value in theirs.values())
    assert_close(theirs, ours, 1e-4)


@pytest.fixture(scope="module")
def saved(ask, ask_bundled, given, tree):
    """Folders and contents of what each tree saved."""
    made = {}
    for name, one in (("tree", ask), ("bundled", ask_bundled)):
        folder = given()
        made[name] = folder, one("save", folder)
        if tree == BUNDLED:
            return dict.fromkeys(("tree", "bundled"), made[name])
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), [("tree", "bundled"), ("bundled", "tree")])
def test_checkpoints_of_one_are_read_by_the_other(saved, ask, ask_bundled, given, writer, reader):
    folder, content = saved[writer]
    own = given()
    (own / "other.txt").write_text(str(folder))
    found = {"tree": ask, "bundled": ask_bundled}[reader]("load", own)
    assert found["iteration"] == 6
    assert found["steps"] == [1.0]
    for name in ("student", "teacher"):
        assert found[name].keys() == content[name].keys()
        assert all(torch.equal(found[name][k], v) for k, v in content[name].items())
    for key, value in content["teacher"].items():
        assert torch.equal(found["from the teacher file"][key], value), key
