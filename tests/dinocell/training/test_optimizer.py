"""Learning rates, parameter groups, averaged weights, and Muon beside torch's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run

from dinocell.errors import ConfigError
from dinocell.network.model import DINOCell
from dinocell.settings import config_from_mapping
from dinocell.training.config import TrainConfig
from dinocell.training.optimizer import (
    MuonAdamW,
    average_weights,
    learning_rate_factor,
    orthogonalized,
    parameter_groups,
)

pytestmark = pytest.mark.usefixtures("mini_networks")


def make_config(**changes: Any) -> TrainConfig:
    return config_from_mapping(TrainConfig, small_run(Path(), Path(), **changes))


def test_averaged_weights_by_hand():
    """Decay 0.1 = (1 + 0) / (10 + 0) in the first step, then 2 / 11, then at most 0.15."""
    model = torch.nn.BatchNorm1d(1)
    torch.nn.init.zeros_(model.weight)
    averaged = average_weights(model, 0.15)
    expected = 0.0
    for value, decay in ((1.0, 0.1), (3.0, 0.15)):
        torch.nn.init.constant_(model.weight, value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.add_(1)
        averaged.update_parameters(model)
        expected = decay * expected + (1 - decay) * value
        assert float(averaged.module.weight) == pytest.approx(expected)
        assert float(averaged.module.running_mean) == pytest.approx(expected)
    assert int(averaged.module.num_batches_tracked) == 2


def test_learning_rate_by_hand():
    config = make_config().optimizer
    config = replace(config, warmup_steps=4, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, config, 15) for step in range(15)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == pytest.approx(1.0)
    assert factors[9] == pytest.approx(0.55)
    assert factors[14] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_parameter_groups_cover_each_parameter_once():
    config = make_config(backbone__lr_mult=0.5, backbone__layer_decay=0.8)
    model = DINOCell(config.model)
    groups = parameter_groups(model, config)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    of = {id(p): group for group in groups for p in group["params"]}
    vit = model.backbone.vit
    assert of[id(vit.norm.weight)]["lr_scale"] == pytest.approx(0.5)
    assert of[id(vit.blocks[3].mlp.fc1.weight)]["lr_scale"] == pytest.approx(0.5 * 0.8)
    assert of[id(vit.patch_embed.proj.weight)]["lr_scale"] == pytest.approx(0.5 * 0.8**5)
    assert of[id(model.decoder.head.weight)]["lr_scale"] == 1.0
    assert of[id(vit.blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.05
    for parameter in (vit.cls_token, vit.blocks[0].mlp.fc1.bias, vit.blocks[0].ls1.gamma):
        assert of[id(parameter)]["weight_decay"] == 0.0


def test_muon_learns_between_the_ends():
    config = make_config(optimizer__kind="muon", model__decoder="detail", model__image_channels=0)
    model = DINOCell(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    by_muon = {names[p] for group in groups if group["muon"] for p in group["params"]}
    assert "backbone.vit.blocks.0.mlp.fc1.weight" in by_muon
    assert "decoder.convolve.0.0.0.weight" in by_muon
    assert "decoder.pyramid.levels.0.1.0.weight" in by_muon
    for name in (
        "backbone.vit.patch_embed.proj.weight",
        "backbone.vit.cls_token",
        "backbone.vit.blocks.0.mlp.fc1.bias",
        "decoder.pyramid.levels.0.0.0.weight",
        "decoder.head.weight",
    ):
        assert name in names.values()
        assert name not in by_muon
    groups = parameter_groups(model, make_config(model__decoder="detail", model__image_channels=0))
    assert not any(group["muon"] for group in groups)


@pytest.mark.parametrize(
    ("size", "decoder", "ends"),
    [
        ("conv", "detail", {"backbone.levels.0.0.0.weight", "decoder.head.weight"}),
        (
            "tiny",
            "unet",
            {
                "backbone.vit.patch_embed.proj.weight",
                "decoder.image_stem.0.weight",
                "decoder.head.weight",
            },
        ),
    ],
)
def test_the_ends_of_every_network_learn_by_adamw(size, decoder, ends):
    image_channels = 0 if size == "conv" else 4
    changes = {"model__size": size, "model__decoder": decoder, "optimizer__kind": "muon"}
    config = make_config(**changes, model__image_channels=image_channels)
    model = DINOCell(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_adamw = {
        names[p]
        for group in parameter_groups(model, config)
        if not group["muon"]
        for p in group["params"]
        if p.ndim >= 2 and not names[p].endswith(("_token", "_tokens"))
    }
    assert by_adamw == ends


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_muon_is_that_of_torch(shape):
    """torch's computes in bfloat16: each step, from the same weights, differs by less than a tenth."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    rates = {"lr": 0.01, "weight_decay": 0.05}
    one = MuonAdamW([{"params": [ours], "muon": True}], **rates)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **rates)
    for _ in range(4):
        before = theirs.detach().clone()
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
        step = (theirs.detach() - before).abs().max()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.1 * float(step))
        with torch.no_grad():
            ours.copy_(theirs)


def test_a_convolution_is_a_matrix():
    weight = torch.randn(6, 4, 3, 3)
    gradient = torch.randn(6, 4, 3, 3)
    flat = torch.nn.Parameter(weight.flatten(1).clone())
    flat.grad = gradient.flatten(1)
    MuonAdamW([{"params": [flat], "muon": True}], lr=0.1).step()
    for layout in (torch.contiguous_format, torch.channels_last):
        kernel = torch.nn.Parameter(weight.clone(memory_format=layout))
        kernel.grad = gradient.clone(memory_format=layout)
        MuonAdamW([{"params": [kernel], "muon": True}], lr=0.1).step()
        torch.testing.assert_close(kernel.flatten(1), flat)
        assert kernel.is_contiguous(memory_format=layout)


def test_singular_values_become_alike():
    matrix = torch.diag(torch.tensor([1.0, 0.5, 0.1, 0.02]))
    values = orthogonalized(matrix).diagonal()
    assert torch.all((values > 0.6) & (values < 1.3))
    assert torch.equal(orthogonalized(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_other_groups_learn_by_adamw():
    ours = torch.nn.Linear(4, 3)
    theirs = copy.deepcopy(ours)
    # a run of an earlier version has groups without `muon`
    one = MuonAdamW([{"params": list(ours.parameters())}], lr=0.01)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for _ in range(2):
        x = torch.randn(5, 4)
        for layer, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_unknown_optimizer():
    with pytest.raises(ConfigError, match="must be one of adamw, muon"):
        make_config(optimizer__kind="sgd")
