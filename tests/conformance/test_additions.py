"""What DINOCell adds: present in a tree, and working."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_weights_of_another_patch_size(ask, ask_bundled, given):
    found = ask("pretrained", given("weights"))
    expected = ask_bundled("pretrained", given("weights"))["evals"]
    start = torch.load(given("weights") / "weights.pt")["tiny/16"]
    for name in ("evals", "student"):
        assert found[name].keys() == expected.keys()
        assert all(torch.equal(found[name][key], value) for key, value in expected.items())
    # Each weight of 8 px is the sum over 2 x 2 of 16 px (docs/weights.md).
    kernel = start["patch_embed.proj.weight"]
    pooled = kernel.unflatten(2, (8, 2)).unflatten(4, (8, 2)).sum(dim=(3, 5))
    assert torch.allclose(found["student"]["patch_embed.proj.weight"], pooled, atol=1e-6)
    assert found["heads are as before"]


def fields_of(folder: Path, *, visits: int = 3) -> dict[str, str]:
    store = (folder / "store").resolve()
    return {
        "folder": f"JUMPCellPaintingMultiView:root={store}:index=table.csv",
        "store": f"JUMPS3MultiView:index={(folder / 'index.arrow').resolve()}:visits={visits}:spread=2",
    }


@pytest.fixture(scope="module")
def batches(ask, given):
    folder = given("fields")
    texts = fields_of(folder)
    view = ["multiview.strategy=multiview", "multiview.photometrics=none"]
    asked = {
        name: [f"train.dataset_path='{text}'", *view, "streaming.ahead=2"]
        for name, text in texts.items()
    }
    asked["no strategy"] = [f"train.dataset_path='{texts['folder']}'", "multiview.strategy=''"]
    asked["wrong key"] = [f"train.dataset_path='{texts['store']}'", *view, "streaming.aheads=2"]
    (folder / "views.json").write_text(json.dumps(asked))
    return ask("views", folder)


@pytest.mark.parametrize("name", ["folder", "store"])
def test_views_of_fields(batches, name):
    assert isinstance(batches[name], list), batches[name]
    for batch in batches[name]:
        assert batch["shapes"] == {
            "collated_global_crops": (8, 3, 32, 32),
            "collated_local_crops": (8, 3, 16, 16),
        }
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        pixels = batch["crops"] * std + mean
        assert torch.allclose(pixels[:, 0], pixels[:, 1], atol=1e-4), "views must be gray"
        assert pixels.min() > -1e-3
        assert pixels.max() < 1 + 1e-3
        assert pixels.std() > 0.02


def test_fields_without_a_strategy_are_refused(batches, tree):
    assert isinstance(batches["no strategy"], str), "upstream's augmentation cannot take fields"
    if tree != ROOT / "dinov3_modified":
        assert "multiview.strategy` must be set" in batches["no strategy"]


def test_an_unknown_key_of_ours_is_refused(batches, tree):
    by = "of streaming must be among" if tree == ROOT / "dinov3_modified" else "of dinocell.yaml"
    assert by in batches["wrong key"]


@pytest.mark.slow
def test_a_store_is_read_in_its_own_order(ask, ask_bundled, given):
    found = {}
    for name, one in (("tree", ask), ("bundled", ask_bundled)):
        folder = given("fields")
        text = fields_of(folder)["store"]
        changes = [
            f"train.dataset_path='{text}'", "multiview.strategy=multiview", "streaming.ahead=2",
        ]  # fmt: skip
        (folder / "order.json").write_text(json.dumps([changes, 2]))
        found[name] = one("order", folder)
    assert found["tree"] == found["bundled"]
    assert found["tree"]["0 workers"] == found["tree"]["2 workers"]
    names = [name for batch in found["tree"]["0 workers"] for name in batch]
    assert len(set(names)) == 12


def test_a_resumed_run_continues_where_the_order_stopped(ask, given):
    """Three iterations are done: the loader's first sample is the first of the fourth batch."""
    folder = given("fields")
    changes = [
        f"train.dataset_path='{fields_of(folder)['store']}'", "multiview.strategy=multiview",
        "multiview.photometrics=none", "streaming.ahead=2",
    ]  # fmt: skip
    (folder / "positions.json").write_text(json.dumps([changes, 3]))
    found = ask("positions", folder)
    asked = found["asked"][: 2 * found["batch"]]
    assert asked == list(range(3 * found["batch"], 5 * found["batch"]))


@pytest.mark.slow
def test_the_training_program_with_all_additions(ask, given, tree):
    folder = given("weights", "fields", "start")
    state = torch.load(folder / "start.pt")
    backbone = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    torch.save(backbone, folder / "backbone.pth")
    (folder / "scorer.py").write_text(
        "def make(cfg):\n"
        "    def score(vit, iteration, out):\n"
        "        assert not vit.training\n"
        "        (out / f'scored_{iteration}.txt').write_text(str(float(vit.cls_token.mean())))\n"
        "        return {'score/mine': 0.25 + iteration}\n"
        "    return score\n"
    )
    changes = [
        f"train.dataset_path='{fields_of(folder)['store']}'",
        "multiview.strategy=multiview",
        "streaming.ahead=2",
        f"student.pretrained_weights={folder}/backbone.pth",
        "optim.lr=1e-7",
        "teacher.momentum_teacher=1",
        "wandb.enabled=true",
        "wandb.mode=offline",
        "ssl_evaluation.hook=scorer:make",
        "ssl_evaluation.period_iterations=2",
        "evaluation.eval_period_iterations=4",
        "checkpointing.period=4",
    ]
    (folder / "program.json").write_text(json.dumps(changes))
    found = ask("program", folder)
    if tree != ROOT / "dinov3_modified":
        assert found["handed to watched"] == [2], "wandb must learn whether the run is resumed"
    run = folder / "run"
    scored = sorted(path.name for path in run.glob("scored_*.txt"))
    assert scored == ["scored_1.txt", "scored_3.txt"]
    written = torch.load(run / "eval/training_3/teacher_checkpoint.pth", weights_only=False)[
        "teacher"
    ]
    # With momentum 1 the teacher is the file that the run started from.
    for key, value in backbone.items():
        assert torch.equal(written[f"backbone.{key}"], value), key
    assert float((run / "scored_3.txt").read_text()) == pytest.approx(
        float(backbone["cls_token"].mean())
    )
    assert (run / "ckpt" / "3").is_dir()
    # Upstream's logger has one file, so that a score is a meter there.
    with_scores = "monitor" if tree == ROOT / "dinov3_modified" else "training"
    steps, scores = (
        [json.loads(line) for line in (run / f"{name}_metrics.json").read_text().splitlines()]
        for name in ("training", with_scores)
    )
    assert all(line["total_loss"] > 0 for line in steps)
    assert any(line.get("score/mine", 0) > 1 for line in scores)
    assert (run / "wandb_run_id.txt").is_file()
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
