"""Sharding and replicas over two processes: gradients and outputs are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov3.configs import get_default_config
from dinov3.fsdp.ac_compile_parallelize import (
    activation_checkpoint_transformer,
    compile_transformer,
    get_activation_checkpoint_wrapper,
)
from dinov3.models.vision_transformer import DinoVisionTransformer

ROOT = Path(__file__).parents[3]

SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn

from dinov3 import distributed
from dinov3.configs import get_default_config
from dinov3.fsdp.ac_compile_parallelize import ac_compile_parallelize
from dinov3.cells.strategy import average_gradients
from dinov3.cells.strategy import full_state_dict, load_full_state_dict
from dinov3.models.vision_transformer import DinoVisionTransformer

distributed.enable(overwrite=True)
rank = distributed.get_rank()


def network(device):
    with torch.device(device):
        # Positions in the type of the weights: FSDP casts what goes into a block, positions too, so
        # that those in bfloat16 are applied in float32 there and in bfloat16 elsewhere.
        vit = DinoVisionTransformer(
            patch_size=8, embed_dim=32, depth=2, num_heads=2, layerscale_init=0.5,
            pos_embed_rope_dtype="fp32",
        )
        return nn.ModuleDict({"backbone": vit, "head": nn.Linear(32, 5)})


def loss_of(model, images):
    tokens = model["backbone"](images, is_training=True)["x_norm_clstoken"]
    return model["head"](tokens).square().mean()


def gradient(parameter):
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def plain(name):
    return name.replace("_checkpoint_wrapped_module.", "")


# One process with the batch of both: the mean of their gradients, and a step with it.
torch.manual_seed(0)
source = network("cpu")
source["backbone"].init_weights()
state = {name: value.clone() for name, value in source.state_dict().items()}
batch = torch.randn(4, 3, 32, 32)
own = batch[2 * rank : 2 * rank + 2]
loss_of(source, batch).backward()
expected = {name: parameter.grad for name, parameter in source.named_parameters() if parameter.grad is not None}
torch.optim.SGD(source.parameters(), lr=0.5).step()
stepped = source.state_dict()
assert max(float(g.abs().max()) for g in expected.values()) > 1e-3
reference = network("cpu")
reference.load_state_dict(state)

for strategy in ("ddp", "fsdp"):
    for checkpointing in ("none", "full", "selective"):
        cfg = get_default_config()
        cfg.accelerator.device, cfg.accelerator.strategy = "cpu", strategy
        cfg.compute_precision.param_dtype = "fp32"
        cfg.train.compile = False
        cfg.train.checkpointing = checkpointing == "selective"
        cfg.train.checkpointing_full = checkpointing == "full"
        student, teacher = network("meta"), network("meta")
        ac_compile_parallelize(student, [teacher], cfg)
        for model in (student, teacher):
            load_full_state_dict(model, state if rank == 0 or strategy == "ddp" else {}, strategy)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        loss_of(student, own).backward()
        if strategy == "ddp":
            average_gradients(student)
        for name, parameter in student.named_parameters():
            name = plain(name)
            if strategy == "fsdp":
                # Half of the rows each, the first process one more of an odd number.
                rows = parameter.shape[0]
                here = parameter.to_local().shape[0]
                assert here == ((rows + 1) // 2 if rank == 0 else rows // 2), (name, here, rows)
            if name in expected:
                torch.testing.assert_close(
                    gradient(parameter), expected[name], rtol=1e-4, atol=1e-6,
                    msg=lambda m: f"{strategy} {checkpointing} {name}: {m}",
                )
        optimizer.step()
        whole = full_state_dict(student, strategy)
        if rank == 0:
            assert whole.keys() == stepped.keys(), "names stay those of the plain network"
            for name, value in whole.items():
                torch.testing.assert_close(value, stepped[name], rtol=1e-4, atol=1e-6)
        wrapped = [type(b).__name__ != type(teacher["backbone"].blocks[0]).__name__
                   for b in student["backbone"].blocks]
        if strategy == "ddp":
            assert wrapped == [checkpointing != "none"] * 2, "teachers are never checkpointed"

# Each way into a sharded backbone, not only forward, gathers its weights first.
teacher = teacher["backbone"].eval()
reference = reference["backbone"].eval()
with torch.no_grad():
    for way in (
        lambda vit: vit(batch),
        lambda vit: vit.forward_features(batch)["x_norm_patchtokens"],
        lambda vit: torch.cat(vit.get_intermediate_layers(batch, n=2), dim=-1),
        lambda vit: vit.get_last_selfattention(batch),
    ):
        torch.testing.assert_close(way(teacher), way(reference), rtol=1e-4, atol=1e-5)
    assert teacher.blocks[0].mlp.fc1.weight.to_local().shape[0] == 64, "given back after use"

# A teacher of a process's own is whole there.
distributed.new_subgroups([[0], [1]])
student, mine, shared = network("meta"), network("meta"), network("meta")
ac_compile_parallelize(
    student, [mine, shared], cfg, dist.group.WORLD, [distributed.get_process_subgroup()]
)
shape = lambda model: tuple(model["head"].weight.to_local().shape)
assert shape(mine) == (5, 32)
assert shape(student) == shape(shared) == (3 - rank, 32), "unsaid groups are the student's"

# Computed in bfloat16, kept in float32: near the reference, not equal to it.
cfg.train.checkpointing = cfg.train.checkpointing_full = False
results = {}
for dtype in ("fp32", "bf16"):
    cfg.compute_precision.param_dtype = dtype
    model = network("meta")
    ac_compile_parallelize(model, [], cfg)
    load_full_state_dict(model, state if rank == 0 else {}, "fsdp")
    loss_of(model, own).backward()
    weight = model["backbone"].blocks[0].mlp.fc1.weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    results[dtype] = weight.grad.full_tensor()
difference = float((results["bf16"] - results["fp32"]).norm() / results["fp32"].norm())
assert 1e-5 < difference < 0.1, difference

# Some but not all processes have a gradient; a group of one averages nothing.
module = nn.Linear(2, 1)
module.weight.grad = torch.full((1, 2), float(rank + 1))
average_gradients(module, group=distributed.get_process_subgroup())
assert torch.equal(module.weight.grad, torch.full((1, 2), float(rank + 1)))
average_gradients(module)
assert torch.equal(module.weight.grad, torch.full((1, 2), 1.5))
distributed.disable()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "shards.py"
    script.write_text(SCRIPT)
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'dinov3_modified'}"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        capture_output=True, text=True, env=environment, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


class _Block(nn.Module):
    """A matrix product and its hyperbolic tangent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4) * 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.mm(x, self.weight))


@pytest.mark.parametrize(("full", "products"), [(True, 2), (False, 1)])
def test_selective_checkpointing_keeps_matrix_products(full, products):
    """Both compute the tangent twice; only the full one the product, too."""
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts[str(function)] += 1
            return function(*args, **(kwargs or {}))

    cfg = get_default_config()
    cfg.train.checkpointing_full = full
    block = get_activation_checkpoint_wrapper(cfg)(_Block())
    x = torch.linspace(-1, 1, 12).reshape(3, 4)  # without gradient: backward has one product
    with Count():
        block(x).sum().backward()
    assert counts["aten.tanh.default"] == 2
    assert counts["aten.mm.default"] == products + 1
    gradient = x.T @ (1 - torch.tanh(0.5 * x) ** 2)  # of sum(tanh(x w)) by w at w = 1/2
    torch.testing.assert_close(block._checkpoint_wrapped_module.weight.grad, gradient)


@pytest.mark.slow
# Of torch's compiler itself, when it is imported and when it traces.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_network_has_the_same_gradients(checkpointing):
    """Names, too: a compiled block is compiled in place, with its checkpointing inside."""
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        vit = DinoVisionTransformer(patch_size=8, embed_dim=32, depth=1, num_heads=2)
        model = nn.ModuleDict({"backbone": vit, "head": nn.Linear(32, 5)})
        vit.init_weights()
        cfg = get_default_config()
        cfg.train.cudagraphs = False
        if checkpointing:
            activation_checkpoint_transformer(cfg, model)
        if compiled:
            compile_transformer(cfg, model)
        image = torch.ones(2, 3, 16, 16)
        tokens = model["backbone"](image, is_training=True)["x_norm_clstoken"]
        model["head"](tokens).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, fast = gradients
    assert fast.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-3, atol=1e-3)  # sums in another order
