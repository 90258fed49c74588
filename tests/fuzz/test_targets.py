"""The targets of fuzzing accept valid files and cut ones; what fuzzing found is kept here."""

from __future__ import annotations

import pytest
from targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_valid_and_cut_seeds(name, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    for seed in TARGETS[name].seeds():
        for content in (seed, seed[: len(seed) // 2], b""):
            TARGETS[name].run(content)
