"""A batch of many kinds of files that is killed again and again gives what an undisturbed run gives.

`benchmarks/soak.py` does the same with 1,000 images, and with disks and folders that fail.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.soak import Soak, contents, kill_and_resume, notes_and_failures, undisturbed
from benchmarks.soak_images import KINDS, make_plate
from dinocell.batch.options import SegmentOptions
from dinocell.batch.run import segment_files
from dinocell.io import find_images
from dinocell.network.model import save_model

COUNT, KILLS = 60, 5


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_killed_at_random_moments_equals_an_undisturbed_one(mini_model, tmp_path, workers):
    make_plate(tmp_path / "plate", COUNT, seed=5)
    save_model(tmp_path / "m.safetensors", mini_model)
    soak = Soak(tmp_path / "plate", tmp_path / "m.safetensors", COUNT, workers)
    soak.chance.seed(workers)
    expected, _ = undisturbed(soak, tmp_path / "whole")
    resumed = kill_and_resume(soak, tmp_path / "killed", KILLS)
    assert resumed.code == 1
    assert notes_and_failures(resumed.out) == notes_and_failures(
        expected
    )  # the same notes and failures
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_batch_leaves_no_file_open(mini_model, tmp_path):
    make_plate(tmp_path / "plate", len(KINDS), seed=5)
    paths = find_images([tmp_path / "plate"])
    options = SegmentOptions(device="cpu", workers=2, report=True)
    segment_files(paths[:2], tmp_path / "warm", options, model=mini_model, shown=False)
    before = sorted(os.listdir("/proc/self/fd"))
    result = segment_files(paths, tmp_path / "out", options, model=mini_model, shown=False)
    assert len(result.failures) == 5  # one more than with `page`
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert not list((tmp_path / "out").glob(".tmp-*"))
