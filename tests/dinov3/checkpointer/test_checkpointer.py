"""Checkpoints: whole or absent, kept by number, damaged ones recognised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3.checkpointer import (
    CheckpointRetentionPolicy,
    cleanup_checkpoint,
    find_all_checkpoints,
    find_latest_checkpoint,
    find_latest_valid_checkpoint,
    init_fsdp_model_from_checkpoint,
    keep_checkpoint_copy,
    keep_last_n_checkpoints,
    load_checkpoint,
    register_dont_save_hooks,
    save_checkpoint,
)

ROOT = Path(__file__).parents[3]


def trained(seed: int = 0, steps: int = 2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_loaded_checkpoint_continues_equally(tmp_path):
    model, optimizer = trained()
    save_checkpoint(
        tmp_path / "7", iteration=7, model=model, optimizer=optimizer, note=torch.ones(2)
    )
    other, fresh = trained(seed=5)
    note = torch.zeros(2)
    assert load_checkpoint(tmp_path / "7", model=other, optimizer=fresh, note=note) == 7
    assert equal(model, other)
    assert torch.equal(note, torch.ones(2))
    for both, step in ((model, optimizer), (other, fresh)):
        step.zero_grad()
        both(torch.ones(3, 4)).square().sum().backward()
        step.step()
    assert equal(model, other), "the optimiser's moments came along"


def test_files_and_manifest(tmp_path):
    model, _ = trained()
    save_checkpoint(tmp_path / "3", iteration=3, model=model)
    names = {p.name for p in (tmp_path / "3").iterdir()}
    assert {".metadata", "COMPLETE.json"} < names
    assert [p.name for p in tmp_path.iterdir()] == ["3"], "no temporary folder is left"
    listed = json.loads((tmp_path / "3" / "COMPLETE.json").read_text())["files"]
    assert set(listed) == names - {"COMPLETE.json"}


def test_overwriting(tmp_path):
    model, _ = trained()
    save_checkpoint(tmp_path / "3", iteration=3, model=model)
    with pytest.raises(FileExistsError, match="must not exist already"):
        save_checkpoint(tmp_path / "3", iteration=3, model=model, overwrite=False)
    other, _ = trained(seed=2)
    save_checkpoint(tmp_path / "3", iteration=3, model=other)
    loaded, _ = trained(seed=9)
    load_checkpoint(tmp_path / "3", model=loaded)
    assert equal(loaded, other)


def test_finding_and_keeping(tmp_path):
    model, _ = trained()
    assert find_latest_checkpoint(tmp_path / "none") is None
    for iteration in (2, 10, 9):
        save_checkpoint(tmp_path / str(iteration), iteration=iteration, model=model)
    (tmp_path / "notes").mkdir()
    keep_checkpoint_copy(tmp_path / "2")
    keep_checkpoint_copy(tmp_path / "2")
    assert [p.name for p in find_all_checkpoints(tmp_path)] == ["2", "9", "10"]
    assert find_latest_checkpoint(tmp_path) == tmp_path / "10"
    keep_last_n_checkpoints(tmp_path, None)
    assert len(find_all_checkpoints(tmp_path)) == 3
    keep_last_n_checkpoints(tmp_path, 2)
    assert [p.name for p in find_all_checkpoints(tmp_path)] == ["9", "10"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "2_keep", "9", "notes"]
    loaded, _ = trained(seed=9)
    assert load_checkpoint(tmp_path / "2_keep", model=loaded) == 2


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "missing", "no manifest and metadata", "torn manifest"]
)
def test_damaged_checkpoints_are_skipped(tmp_path, caplog, damage):
    model, _ = trained()
    for iteration in (1, 2):
        save_checkpoint(tmp_path / str(iteration), iteration=iteration, model=model)
    folder = tmp_path / "2"
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(content[:-7])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing":
        shard.unlink()
    elif damage == "torn manifest":
        (folder / "COMPLETE.json").write_text('{"files": {')
    else:
        (folder / "COMPLETE.json").unlink()
        (folder / ".metadata").unlink()
    with caplog.at_level("WARNING", logger="dinov3"):
        assert find_latest_valid_checkpoint(tmp_path) == tmp_path / "1"
    assert f"Checkpoint {folder} is skipped" in caplog.text


@pytest.mark.parametrize("change", [-1, 1])
def test_another_checksum_is_damage(tmp_path, change):
    save_checkpoint(tmp_path / "1", iteration=1, model=trained()[0])
    manifest = tmp_path / "1" / "COMPLETE.json"
    listed = json.loads(manifest.read_text())
    listed["files"][".metadata"]["crc32"] += change
    manifest.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="another checksum"):
        find_latest_valid_checkpoint(tmp_path)


def test_an_optimizer_that_has_gradients_but_made_no_step(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path / "1", iteration=1, model=model, optimizer=optimizer)
    other, fresh = trained(seed=3, steps=0)
    other(torch.ones(3, 4)).square().sum().backward()
    load_checkpoint(tmp_path / "1", model=other, optimizer=fresh)
    assert equal(model, other)
    for own, loaded in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[own]["exp_avg"], fresh.state[loaded]["exp_avg"])


def test_upstreams_checkpoint_without_manifest_counts(tmp_path):
    model, _ = trained()
    save_checkpoint(tmp_path / "4", iteration=4, model=model)
    (tmp_path / "4" / "COMPLETE.json").unlink()
    assert find_latest_valid_checkpoint(tmp_path) == tmp_path / "4"


def test_what_does_not_fit(tmp_path):
    model, _ = trained()
    save_checkpoint(tmp_path / "4", iteration=4, model=model)
    with pytest.raises(ValueError, match=r"must hold .metadata"):
        load_checkpoint(tmp_path, model=model)
    with pytest.raises(ValueError, match="must fit this configuration"):
        load_checkpoint(tmp_path / "4", model=nn.Sequential(nn.Linear(4, 9)))
    larger = nn.Sequential(*model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must fit this configuration"):
        load_checkpoint(tmp_path / "4", model=larger)
    assert load_checkpoint(tmp_path / "4", model=larger, strict_loading=False) == 4


CHILD = """
import resource, sys
import torch
from torch import nn
from dinov3.checkpointer import save_checkpoint
torch.manual_seed(1)
model = nn.Linear(400, 400)
mode, folder = sys.argv[1:]
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
print("saving", flush=True)
while True:
    save_checkpoint(folder + "/5", iteration=5, model=model)
"""


def start(mode: str, folder: Path) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "dinov3_modified"), OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), mode, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_full_disk_leaves_the_old_checkpoint(tmp_path):
    """The system really refuses to write on: a file may have 200 kB only."""
    model, _ = trained()
    save_checkpoint(tmp_path / "5", iteration=5, model=model)
    process = start("full", tmp_path)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "could not be written to" in errors
    assert "earlier checkpoints are intact" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["5"]
    loaded, _ = trained(seed=9)
    load_checkpoint(tmp_path / "5", model=loaded)
    assert equal(loaded, model)


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """A save that is cut off leaves the checkpoint before it whole."""
    process = start("loop", tmp_path)
    part = tmp_path / ".5.part"
    while not ((tmp_path / "5").exists() and part.exists()):  # the second save has begun
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    found = find_latest_valid_checkpoint(tmp_path)
    # Between two renames of one moment there is neither; afterwards there is always one.
    assert found is not None or (tmp_path / ".5.old").exists()
    if found is not None:
        assert load_checkpoint(found, model=nn.Linear(400, 400)) == 5


def test_entries_that_are_not_saved(tmp_path):
    model, _ = trained()
    register_dont_save_hooks(model, dont_save=["2.weight", "2.bias"])
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    save_checkpoint(tmp_path / "1", iteration=1, model=model)
    other, _ = trained(seed=3)
    kept = other[2].weight.clone()
    register_dont_save_hooks(other, dont_save=["2.weight", "2.bias"])
    load_checkpoint(tmp_path / "1", model=other)
    assert torch.equal(other[0].weight, model[0].weight)
    assert torch.equal(other[2].weight, kept)


# --- teachers ---


def teacher() -> nn.ModuleDict:
    return nn.ModuleDict({"backbone": nn.Linear(3, 3), "dino_head": nn.Linear(3, 2)})


def test_teacher_from_a_file_and_from_folders(tmp_path):
    source = teacher()
    torch.save({"teacher": source.state_dict()}, tmp_path / "t.pth")
    save_checkpoint(tmp_path / "sharded", iteration=0, model=source)
    save_checkpoint(tmp_path / "run", iteration=0, model=nn.ModuleDict({"teacher": source}))
    for name in ("t.pth", "sharded", "run"):
        loaded = teacher()
        init_fsdp_model_from_checkpoint(loaded, str(tmp_path / name))
        assert torch.equal(loaded.backbone.weight, source.backbone.weight), name
    alone = nn.ModuleDict({"backbone": nn.Linear(3, 3)})
    init_fsdp_model_from_checkpoint(alone, str(tmp_path / "t.pth"), skip_load_keys=["dino_head"])
    assert torch.equal(alone.backbone.weight, source.backbone.weight)


def test_teachers_that_do_not_fit(tmp_path):
    torch.save({"teacher": teacher().state_dict()}, tmp_path / "t.pth")
    other = nn.ModuleDict({"backbone": nn.Linear(3, 4), "more": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match=r"2 missing: more.weight, more.bias") as caught:
        init_fsdp_model_from_checkpoint(other, str(tmp_path / "t.pth"))
    assert "2 unexpected: dino_head.weight" in str(caught.value)
    assert "backbone.weight (3, 3) instead of (4, 3)" in str(caught.value)
    torch.save(teacher().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match=r"goes to student.pretrained_weights"):
        init_fsdp_model_from_checkpoint(teacher(), str(tmp_path / "bare.pth"))
    (tmp_path / "bad.pth").write_bytes(b"<Error>")
    with pytest.raises(ValueError, match="a web page or an error message"):
        init_fsdp_model_from_checkpoint(teacher(), str(tmp_path / "bad.pth"))
    with pytest.raises(FileNotFoundError, match="must be a file or a DCP folder"):
        init_fsdp_model_from_checkpoint(teacher(), str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"must have .metadata"):
        init_fsdp_model_from_checkpoint(teacher(), str(tmp_path))
    model, _ = trained()
    save_checkpoint(tmp_path / "no", iteration=0, model=model)
    with pytest.raises(ValueError, match="must hold a teacher"):
        init_fsdp_model_from_checkpoint(teacher(), str(tmp_path / "no"))


def test_retention(tmp_path):
    names = ["model_0001.pth", "model_best.pth", "model_final.pth"]
    kept = {
        CheckpointRetentionPolicy.ALL: set(names),
        CheckpointRetentionPolicy.BEST: {names[1]},
        CheckpointRetentionPolicy.LAST: {names[2]},
        CheckpointRetentionPolicy.LAST_AND_BEST: set(names[1:]),
        CheckpointRetentionPolicy.NONE: set(),
    }
    for policy, expected in kept.items():
        for name in names:
            (tmp_path / name).write_bytes(b"x")
        cleanup_checkpoint(str(tmp_path), policy)
        assert {p.name for p in tmp_path.iterdir()} == expected
    assert CheckpointRetentionPolicy.ALL.max_to_keep is None
    assert CheckpointRetentionPolicy.LAST.max_to_keep == 1
