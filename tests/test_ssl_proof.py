"""The comparison of pretrainings: its statistics, its split, its read-out of places, its resumption."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "benchmarks" / "ssl_proof"
SIGNS = (-1, 1)
NAMES = ("data", "views", "readouts", "report", "run")


@pytest.fixture(scope="module")
def proof() -> Iterator[Namespace]:
    """The modules of the folder, which import each other by these short names."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        yield Namespace(**{name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path[:] = before
        for name in NAMES:
            sys.modules.pop(name, None)


def test_a_paired_difference_has_its_interval_and_the_exact_p(proof: Namespace) -> None:
    same = proof.report._paired(np.full(6, 0.1))
    assert same == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1, "p": 2 / 64})
    gain = np.array([1.0, 2.0, 3.0, -10.0])
    sums = [abs(a + 2 * b + 3 * c - 10 * d) for a, b, c, d in product(SIGNS, repeat=4)]
    found = proof.report._paired(gain)
    assert found["p"] == pytest.approx(np.mean([value >= 4 for value in sums]))
    assert found["low"] < -1 < found["high"]
    assert found["mean"] == -1
    many = proof.report._paired(np.random.default_rng(0).normal(0.5, 1, 40))  # drawn signs
    assert 0 < many["p"] < 0.05
    assert many["low"] > 0


def test_seeds_are_averaged_before_units_are_compared(proof: Namespace) -> None:
    ours = {0: np.array([1.0, 2.0]), 1: np.array([3.0, 4.0]), 2: np.array([9.0, 9.0])}
    theirs = {1: np.array([1.0, 1.0]), 0: np.array([1.0, 1.0])}
    found = proof.report._difference(ours, theirs)
    assert found["by_seed"] == [0.5, 2.5]  # seed 2 has no partner
    assert found["mean"] == 1.5
    assert (found["low"], found["high"]) == (1.0, 2.0)


def test_what_is_tested_on_lies_apart_from_what_is_trained_on(proof: Namespace) -> None:
    planes = np.arange(1000, dtype=np.float32)[None, None].repeat(4, axis=1)
    left, right = proof.data.left_and_right(
        proof.data.Field("field", ("DNA",), planes, planes[0].astype(np.uint16))
    )
    assert left.planes.max() == 599
    assert right.planes.min() == 600 + 96
    assert left.nuclei.max() == 599
    assert right.nuclei.min() == 600 + 96


def test_the_control_pairs_channels_of_different_places(
    proof: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no training field is the unseen one."""
    planes = np.stack([np.full((640, 640), value, np.uint16) for value in range(3)])
    planes += np.arange(640, dtype=np.uint16)[:, None] * 3  # each row has another value
    real = [
        proof.data.Field(name, ("DNA", "ER", "Actin"), planes, None)
        for name in ("seen", proof.data.UNSEEN)
    ]
    monkeypatch.setattr(proof.data, "read_real", lambda root: real)
    proof.data.write_training_fields(tmp_path, tmp_path, 12)
    rows: dict[str, dict[str, list[str]]] = {}
    for name in ("fields", "shuffled"):
        rows[name] = {}
        with (tmp_path / f"{name}.csv").open(newline="") as stream:
            for row in csv.DictReader(stream):
                assert proof.data.UNSEEN not in row["file"]
                assert (tmp_path / row["file"]).is_file()
                rows[name].setdefault(row["field"], []).append(row["file"])
    assert rows["fields"].keys() == rows["shuffled"].keys()
    with pytest.raises(SystemExit, match="another number of generated fields"):
        proof.data.write_training_fields(tmp_path, tmp_path, 24)
    # A tenth of the usual number of generated fields: real ones are repeated a tenth as often.
    assert sorted(rows["fields"])[:2] == ["seen@0", "seen@1"]
    assert len(rows["fields"]) == 2 + 12
    for field, files in rows["fields"].items():
        sources = {file.rsplit("_", 2)[0] for file in files}
        shifts = {file.rsplit("_", 1)[1] for file in files}
        assert (len(sources), shifts) == (1, {"0.tif"}), field
    for field, files in rows["shuffled"].items():
        places = {(file.rsplit("_", 2)[0], file.rsplit("_", 1)[1]) for file in files}
        assert len(places) == len(files), field


class Backbone(nn.Module):
    """Answers with a function of the pixels of each patch: [B, h, w, 64] to [B, h, w, D]."""

    patch_size = 8

    def __init__(self, describe: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.describe = describe

    def forward_features(self, images: Tensor) -> dict[str, Tensor]:
        cells = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3)
        patches = self.describe(cells).flatten(1, 2)
        return {"x_norm_patchtokens": patches, "x_norm_clstoken": patches.flatten(1)}


def _pixels(cells: Tensor) -> Tensor:
    return cells - 0.5


def _pixels_by_size(cells: Tensor) -> Tensor:
    """As they are after any turn of the patch."""
    return cells.sort(dim=-1).values - 0.5


def _place_in_the_window(cells: Tensor) -> Tensor:
    count = cells.shape[1] * cells.shape[2]
    return torch.eye(count).reshape(*cells.shape[1:3], count).expand(len(cells), -1, -1, -1)


def _one_scene(seed: int) -> tuple[str, tuple[str, ...], Any]:
    """A field whose channels are the same picture."""
    plane = gaussian_filter(np.random.default_rng(seed).normal(0, 1, (220, 220)), 1.5)
    plane = (plane - plane.min()) / np.ptp(plane)
    return str(seed), ("DNA", "ER"), np.stack([plane] * 2).astype(np.float32)


def test_a_network_that_knows_the_pixels_of_a_patch_finds_places_again(proof: Namespace) -> None:
    """Also where the window is shifted by a patch; a turned patch has other pixels."""
    found = proof.views.view_numbers(Backbone(_pixels), [_one_scene(0), _one_scene(1)])
    patch = found["patch"]
    assert patch["retrieval_within_field"] == [1, 1]
    assert patch["retrieval_shifted"] == [1, 1]
    assert max(patch["retrieval_turned"]) < 0.5
    assert patch["chance"] == pytest.approx([1 / (16 * 9)] * 2)
    assert patch["cosine_same_field"] == pytest.approx([1, 1])
    assert max(patch["cosine_other_place"]) < 0.9
    assert found["cls"]["retrieval_within_field"] == [1, 1]
    assert found["cls"]["chance"] == pytest.approx([1 / 16] * 2)


def test_turned_patches_are_compared_at_their_place(proof: Namespace) -> None:
    found = proof.views.view_numbers(Backbone(_pixels_by_size), [_one_scene(0), _one_scene(1)])
    assert found["patch"]["retrieval_turned"] == [1, 1]


def test_a_network_that_knows_only_the_place_in_the_window_finds_nothing(proof: Namespace) -> None:
    backbone = Backbone(_place_in_the_window)
    found = proof.views.view_numbers(backbone, [_one_scene(0), _one_scene(1)])
    # The right window is one of 16 equal ones; in a shifted one the patch has another place.
    assert found["patch"]["retrieval_within_field"] == pytest.approx([1 / 16] * 2)
    assert found["patch"]["retrieval_shifted"] == pytest.approx([1 / (16 * 9)] * 2)


def test_a_row_that_lacks_a_read_out_is_completed_and_kept(
    proof: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = proof.run, []
    old = {"arm": "dense", "seed": 0, "steps": 100, "commit": "old", "train_s": 1.0, "score_s": 2.0}
    old |= {"probe": {"nf1": 1, "generated": 2}, "decoder": {"DNA": 3}, "labels": {"1": 4}}
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    (tmp_path / "ssl_proof_100.json").write_text(json.dumps({"runs": [old]}))
    monkeypatch.setattr(run, "train", lambda *given: made.append("trained") or "teacher")
    readouts = proof.readouts
    monkeypatch.setattr(readouts, "load_backbone_of", lambda teacher: Namespace(vit=None))
    monkeypatch.setattr(readouts, "_probe_fields", lambda root, domain: (domain, ""))
    monkeypatch.setattr(readouts, "_probe", lambda vit, *fields: made.append(fields[0]) or 5)
    monkeypatch.setattr(readouts, "_views", lambda vit, root: {"real": 6})
    monkeypatch.setattr(readouts, "_decoders_five", lambda vit, root: {"ER": 7})
    args = Namespace(steps=100, start=None, generated=120)
    known = run._finished(tmp_path, 100, "ssl_proof_")[("dense", 0)]
    run._run("dense", 0, args, tmp_path / "runs", known)
    assert made == ["trained", "five"]  # nothing that was there is made again
    row = run._finished(tmp_path / "runs", 100, "ssl_proof_")[("dense", 0)]
    assert {name: row[name] for name in ("commit", "train_s", "decoder", "labels")} == {
        name: old[name] for name in ("commit", "train_s", "decoder", "labels")
    }
    assert row["probe"] == {"nf1": 1, "generated": 2, "five": 5}
    assert row["views"] == {"real": 6}
    assert row["decoder_five"] == {"ER": 7}
    assert set(row["added"]) == {"commit", "train_s", "score_s"}
    run._run("dense", 0, args, tmp_path / "runs", row)
    assert made == ["trained", "five"]  # a finished row is not run again
    with pytest.raises(SystemExit, match="another number of steps"):
        run._run("dense", 0, Namespace(steps=200, start=None, generated=120), tmp_path / "runs")
    with pytest.raises(SystemExit, match="another number of steps or fields"):
        run._run("dense", 0, Namespace(steps=100, start=None, generated=240), tmp_path / "runs")
    assert run._finished(tmp_path / "runs", 100, "ssl_proof_", 240) == {}


def test_the_command_of_a_file_names_what_was_run(proof: Namespace) -> None:
    arms = list(proof.run.ARMS)
    assert len(arms) == 1 + proof.report.TRAINED_ARMS
    table = {"DNA": {"DNA": [0.9], "ER": [0.8]}, "ER": {"DNA": [0.8], "ER": [0.9]}}
    sys.path.append(str(FOLDER.parent))  # for measure.py

    def command(which: list[str], seeds: tuple[int, ...], generated: int = 120) -> str:
        rows = [
            {"arm": arm, "seed": seed, "probe": {"nf1": table}, "labels": {}}
            for arm, seed in [("random", 0), *product(which, seeds)]
        ]
        text: str = proof.report.summary(rows, 400, generated=generated)["command"]
        return text.removeprefix("python benchmarks/ssl_proof/run.py --steps 400 ")

    assert command(arms[1:], (0, 1, 2)) == "--seeds 3"
    assert command(["dense"], (2,), 2400) == "--seed 2 --generated 2400 --only dense"
    assert (
        command(["single", "dense"], (1, 2)) == "--seed 1 and --seed 2 --only single --only dense"
    )
