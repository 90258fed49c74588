"""Activation checkpointing, compilation, devices and strategies, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov3.cells.strategy import (
    _buckets,
    average_gradients,
    full_state_dict,
    load_full_state_dict,
    resolve_device,
    resolve_strategy,
)
from dinov3.configs import get_default_config
from dinov3.fsdp.ac_compile_parallelize import (
    ac_compile_parallelize,
    activation_checkpoint_transformer,
    compile_transformer,
    wrap_compile_block,
)
from dinov3.models.vision_transformer import DinoVisionTransformer


def network(device: str = "cpu") -> nn.ModuleDict:
    with torch.device(device):
        vit = DinoVisionTransformer(
            patch_size=8, embed_dim=32, depth=3, num_heads=2, img_size=32, drop_path_rate=0.3
        )
    if device == "cpu":
        torch.manual_seed(0)
        vit.init_weights()
    return nn.ModuleDict({"backbone": vit, "head": nn.Linear(32, 5)})


def config(**changes):
    cfg = get_default_config()
    cfg.accelerator.device = "cpu"
    cfg.train.compile = False
    for key, value in changes.items():
        section, name = key.split("__")
        cfg[section][name] = value
    return cfg


def gradients(model: nn.ModuleDict) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and how many bytes of activations were kept for them."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(1)  # of the dropped paths
    image = torch.randn(6, 3, 32, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model["backbone"](image, is_training=True)["x_norm_patchtokens"].square().sum()
    loss.backward()
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return found, kept


@pytest.mark.parametrize("full", [False, True])
def test_checkpointing_keeps_less_and_changes_nothing(full):
    plain, everything = gradients(network().train())
    model = network().train()
    activation_checkpoint_transformer(config(train__checkpointing_full=full), model)
    names = list(model.state_dict())
    assert names == list(network().state_dict()), "checkpoints keep their names"
    found, kept = gradients(model)
    assert kept < 0.7 * everything
    assert found.keys() == plain.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-7)


def test_which_checkpointing_the_configuration_asks_for():
    wrapped = {}
    for key in (None, "train__checkpointing", "train__checkpointing_full"):
        model = network("meta")
        ac_compile_parallelize(model, [], config(**({key: True} if key else {})))
        wrapped[key] = type(model["backbone"].blocks[0]).__name__
        assert next(model.parameters()).device.type == "cpu", "storage, if not yet values"
    assert wrapped == {
        None: "SelfAttentionBlock",
        "train__checkpointing": "CheckpointWrapper",
        "train__checkpointing_full": "CheckpointWrapper",
    }


def test_compiled_parts(monkeypatch):
    """Each block and each head by itself, in place; on a CPU only on request."""
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: calls.append((self, how)))
    model = network()
    compile_transformer(config(train__cudagraphs=False), model)
    assert [module for module, _ in calls] == [*model["backbone"].blocks, model["head"]]
    assert all(how == {} for _, how in calls)
    calls.clear()
    compile_transformer(config(train__cudagraphs=True), model)
    graphs = [how.get("options", {}).get("triton.cudagraphs") for _, how in calls]
    assert graphs == [True, True, True, None], "heads see another number of patches in each step"
    calls.clear()
    for on_cpu, expected in ((False, 0), (True, 8)):
        cfg = config(train__compile=True, accelerator__compile_on_cpu=on_cpu)
        ac_compile_parallelize(network("meta"), [network("meta")], cfg)
        assert len(calls) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from the tracing of torch
def test_compiled_block_gives_the_same():
    model = network().eval()
    image = torch.randn(2, 3, 32, 32)
    expected = model["backbone"](image)
    for block in model["backbone"].blocks:
        assert wrap_compile_block(block, False, is_backbone_block=True) is block
    torch.testing.assert_close(model["backbone"](image), expected, rtol=1e-3, atol=1e-4)


def test_devices():
    assert resolve_device(config()).type == "cpu"
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device(config(accelerator__device="auto")).type == wanted
    with pytest.raises(ValueError, match="must be auto, cpu, cuda"):
        resolve_device(config(accelerator__device="tpu9"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="got no CUDA device"):
            resolve_device(config(accelerator__device="cuda:1"))


def test_strategies_of_one_process():
    cpu = torch.device("cpu")
    assert resolve_strategy(config(), cpu) == "none"
    assert resolve_strategy(config(accelerator__strategy="ddp"), cpu) == "ddp"
    with pytest.raises(ValueError, match="must have a process group"):
        resolve_strategy(config(accelerator__strategy="fsdp"), cpu)
    with pytest.raises(ValueError, match="one of auto, none, ddp, fsdp, got 'zero'"):
        resolve_strategy(config(accelerator__strategy="zero"), cpu)


def test_whole_state_dict_is_a_copy():
    model = nn.Linear(2, 3)
    state = full_state_dict(model, "none")
    before = state["weight"].clone()
    nn.init.zeros_(model.weight)
    assert torch.equal(state["weight"], before)
    load_full_state_dict(model, state, "none")
    assert torch.equal(model.weight, before)
    with pytest.raises(RuntimeError, match="bias"):
        load_full_state_dict(model, {"weight": before}, "none")


def test_buckets_hold_one_type_and_have_a_size(monkeypatch):
    monkeypatch.setattr("dinov3.cells.strategy._BUCKET_BYTES", 32)
    a, b, c = torch.zeros(4), torch.zeros(4), torch.zeros(1)
    half = torch.zeros(1, dtype=torch.float16)
    assert [len(bucket) for bucket in _buckets([a, b, c, half, c])] == [2, 1, 1, 1]
    assert _buckets([]) == []
    model = nn.Linear(1, 1)
    average_gradients(model)
    assert model.weight.grad is None, "one process has nothing to average"
