"""`dinov3.distributed` and FSDP's parts: one process in here, two real ones in a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov3 import distributed
from dinov3.distributed import TorchDistributedEnvironment

ROOT = Path(__file__).parents[3]
VARIABLES = [
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_JOB_NUM_NODES",
    "SLURM_JOB_NODELIST",
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in VARIABLES:
        # Set first, so that what a test exports is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_one_process_without_a_group(tmp_path):
    assert not distributed.is_enabled()
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert (distributed.get_subgroup_rank(), distributed.get_subgroup_size()) == (0, 1)
    assert distributed.is_main_process()
    assert distributed.is_subgroup_main_process()
    assert distributed.get_default_process_group() is None
    assert distributed.get_process_subgroup() is None
    value = torch.arange(3)
    assert distributed.gather_all_tensors(value)[0] is value
    given = {"a": value}
    assert distributed.reduce_dict(given) is given
    distributed.save_in_main_process(value, tmp_path / "x.pth")
    assert torch.equal(torch.load(tmp_path / "x.pth", weights_only=True), value)
    distributed.disable()


def test_environment_of_torchrun(monkeypatch):
    given = {"MASTER_ADDR": "host", "MASTER_PORT": "1234", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1",
                 "LOCAL_WORLD_SIZE": "4"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = TorchDistributedEnvironment()
    assert (found.master_addr, found.master_port, found.rank) == ("host", 1234, 5)
    assert (found.world_size, found.local_rank, found.local_world_size) == (8, 1, 4)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(RuntimeError, match="got none for LOCAL_RANK"):
        TorchDistributedEnvironment()


def test_environment_of_slurm(monkeypatch):
    given = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4",
             "SLURM_STEP_ID": "0",
                 "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu7,gpu9"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = TorchDistributedEnvironment()
    assert (found.master_addr, found.rank, found.local_rank) == ("gpu7", 3, 1)
    assert (found.world_size, found.local_world_size) == (4, 2)
    assert found.master_port == TorchDistributedEnvironment().master_port, "all tasks agree"
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert found.master_port != TorchDistributedEnvironment().master_port, "another job"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        assert found.master_port != TorchDistributedEnvironment().master_port, "another start"
        monkeypatch.setenv(name, "0")
    for job in range(100):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        assert TorchDistributedEnvironment().master_port < 32_768, "Linux gives out those above"
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")  # a site that knows better
    monkeypatch.setenv("MASTER_PORT", "29500")
    found = TorchDistributedEnvironment()
    assert (found.master_addr, found.master_port, found.rank) == ("10.0.0.7", 29500, 3)


def test_compressed_list_of_nodes_is_read_by_scontrol(monkeypatch, tmp_path):
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$3" = "gpu[03-04]" ] && printf "gpu03\\ngpu04\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-04]")
    assert TorchDistributedEnvironment().master_addr == "gpu03"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-04]", "gpu03"),
        ("gpu[7,9-12],cpu1", "gpu7"),
        ("a1,gpu[1-2]", "a1"),
        ("r[1-2]n[05-06]", "r1n05"),
        ("r[2-3]x.lab", "r2x.lab"),
    ],
)
def test_first_node_without_scontrol(monkeypatch, tmp_path, nodes, first):
    """Containers seldom have SLURM's commands."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    assert TorchDistributedEnvironment().master_addr == first


def test_export_keeps_foreign_values_by_default(monkeypatch):
    environment = TorchDistributedEnvironment()
    assert environment.export() is environment
    assert os.environ["MASTER_PORT"] == str(environment.master_port)
    os.environ["LOCAL_RANK"] = "7"
    with pytest.raises(RuntimeError, match="LOCAL_RANK must be 0, got 7"):
        environment.export()
    environment.export(overwrite=True)
    assert os.environ["LOCAL_RANK"] == "0"


def test_group_of_one_is_made_once(capsys):
    distributed.enable(overwrite=True)
    try:
        assert distributed.is_enabled()
        assert distributed.get_world_size() == 1
        with pytest.raises(RuntimeError, match="second call"):
            distributed.enable(overwrite=True)
        with pytest.raises(ValueError, match="each of 1 ranks once"):
            distributed.new_subgroups([[0], [0]])
        assert distributed.gather_all_tensors(torch.tensor(2.0)) == [torch.tensor(2.0)]
    finally:
        distributed.disable()
    assert not distributed.is_enabled()
    print("again")
    assert "again" in capsys.readouterr().out


SCRIPT = """
import sys

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn

from dinov3 import distributed
from dinov3.configs import get_default_config
from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize
from dinov3.cells.strategy import average_gradients
from dinov3.cells.strategy import full_state_dict, load_full_state_dict, resolve_strategy
from dinov3.models import build_model

distributed.enable(overwrite=True)
rank = distributed.get_rank()
print(f"shown by {rank}\\n", end="")
print(f"forced by {rank}\\n", end="", force=True)

# Tensors of unequal size; numbers.
got = distributed.gather_all_tensors(torch.full((rank + 1, 3 - rank), float(rank)))
assert [tuple(t.shape) for t in got] == [(1, 3), (2, 2)], got
assert all((t == index).all() for index, t in enumerate(got))
assert distributed.gather_all_tensors(torch.tensor(rank)) == [torch.tensor(0), torch.tensor(1)]

values = {"b": torch.tensor(float(rank)), "a": torch.tensor(10.0 * rank)}
mean = distributed.reduce_dict(values)
assert (float(mean["a"]), float(mean["b"])) == (5.0, 0.5)
assert float(distributed.reduce_dict(values, average=False)["a"]) == 10.0

# Gradients: mean over processes, a missing one counts as zero, types apart.
module = nn.Module()
module.w = nn.Parameter(torch.zeros(3))
module.other = nn.Parameter(torch.zeros(2, dtype=torch.float64))
module.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
module.w.grad = torch.arange(3.0) * (rank + 1)
if rank == 0:
    module.other.grad = torch.ones(2, dtype=torch.float64)
average_gradients(module)
assert torch.equal(module.w.grad, torch.arange(3.0) * 1.5)
assert torch.equal(module.other.grad, torch.full((2,), 0.5, dtype=torch.float64))
assert module.frozen.grad is None

# A whole state dict goes in from the first process and comes out there.
cfg = get_default_config()
cfg.student.arch, cfg.student.patch_size = "vit_tiny", 16
cfg.compute_precision.param_dtype = "fp32"
torch.manual_seed(rank)  # the second process has other values, which must not matter
from dinov3.models.vision_transformer import DinoVisionTransformer
def small(device):
    with torch.device(device):
        return DinoVisionTransformer(patch_size=16, embed_dim=32, depth=2, num_heads=2, img_size=32)
source = small("cpu")
source.init_weights()
image = torch.ones(1, 3, 32, 32)
results = {}
for strategy in ("ddp", "fsdp"):
    cfg.accelerator.strategy = strategy
    cfg.accelerator.device = "cpu"
    cfg.train.compile = False
    model = nn.ModuleDict({"backbone": small("meta")})
    ac_compile_parallelize(model, [], cfg)
    state = {f"backbone.{k}": v for k, v in source.state_dict().items()} if rank == 0 or strategy == "ddp" else {}
    load_full_state_dict(model, state, strategy)
    whole = full_state_dict(model, strategy)
    if rank == 0:
        for name, value in source.state_dict().items():
            assert torch.equal(whole[f"backbone.{name}"], value), name
    else:
        assert (whole == {}) == (strategy == "fsdp")
    with torch.no_grad():
        results[strategy] = model["backbone"](image)
    first = distributed.gather_all_tensors(results[strategy])
    assert torch.equal(first[0], first[1]), strategy
torch.testing.assert_close(results["ddp"], results["fsdp"], rtol=1e-4, atol=1e-4)

distributed.new_subgroups([[0], [1]])
assert (distributed.get_subgroup_rank(), distributed.get_subgroup_size()) == (0, 1)
assert distributed.is_subgroup_main_process()
distributed.save_in_main_process(torch.tensor(rank), f"{sys.argv[1]}/{rank}.pth")
try:
    cfg.accelerator.strategy = "none"
    resolve_strategy(cfg, torch.device("cpu"))
except ValueError as error:
    assert "must have one process, got 2" in str(error)
else:
    raise AssertionError("none with two processes was accepted")
distributed.disable()
print(f"after the end {rank}\\n", end="")
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'dinov3_modified'}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script), str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Each line is one write: the two share a pipe.
    assert done.stdout.count("shown by") == 1
    assert "shown by 0" in done.stdout
    assert done.stdout.count("forced by") == 2
    assert done.stdout.count("after the end") == 2
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["0.pth", "1.pth"]


def test_gloo_where_the_work_is_on_the_cpu(monkeypatch):
    """A machine with a GPU that is asked for the CPU: NCCL would move nothing that lies there."""
    import torch
    import torch.distributed as dist

    from dinov3 import distributed
    from dinov3.distributed import torch_distributed_wrapper

    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch_distributed_wrapper.compute_on("cpu")
    distributed.enable(overwrite=True)
    try:
        assert dist.get_backend() == "gloo"
        value = torch.ones(1)
        dist.all_reduce(value)
        assert value == 1
    finally:
        distributed.disable()
        torch_distributed_wrapper.compute_on(None)
