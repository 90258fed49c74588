"""Collapse monitors against float64 formulas, on healthy and on collapsed features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dinov3.cells.monitors import (
    CollapseMonitor,
    assignment_figures,
    attention_figures,
    effective_rank,
    feature_spread,
    feature_std,
    module_statistics,
)


def features(kind: str, rows: int = 128, width: int = 48) -> torch.Tensor:
    rng = np.random.default_rng(11)
    healthy = rng.normal(size=(rows, width))
    made = {
        "healthy": healthy,
        "equal": np.repeat(healthy[:1], rows, axis=0),
        "line": rng.normal(size=(rows, 1)) * healthy[:1],
        "plane": rng.normal(size=(rows, 3)) @ rng.normal(size=(3, width)),
        "tiny noise": healthy[:1] + 1e-4 * healthy,
    }[kind]
    return torch.from_numpy(made).float()


def distribution(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    logits = np.random.default_rng(seed).normal(size=shape) * scale
    return torch.from_numpy(logits).softmax(dim=-1)


# --- formulas ---


@pytest.mark.parametrize("kind", ["healthy", "equal", "line", "plane", "tiny noise"])
def test_effective_rank_against_the_formula(kind):
    x = features(kind)
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-sum(p * np.log(p) for p in shares if p > 0))
    assert effective_rank(x) == pytest.approx(expected, rel=1e-4)
    low, high = {
        "healthy": (40, 48), "equal": (1, 1.001), "line": (1, 1.001), "plane": (2, 3.001),
        "tiny noise": (1, 1.05),
    }[kind]  # fmt: skip
    assert low <= effective_rank(x) <= high


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(5, 9)) == pytest.approx(5.0)
    assert effective_rank(torch.zeros(4, 4)) == 0.0
    assert math.isnan(effective_rank(torch.full((4, 3), torch.nan)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("healthy", 0.97, 1.0), ("equal", 0, 1e-6), ("line", 0.9, 1.0), ("tiny noise", 0, 1e-3)],
)
def test_feature_std_against_the_formula(kind, low, high):
    x = features(kind)
    unit = x.double().numpy()
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    assert feature_std(x) == pytest.approx(unit.std(axis=0).mean(), rel=1e-4, abs=1e-9)
    assert feature_spread(x) == pytest.approx(feature_std(x) * math.sqrt(48))
    if kind != "line":  # +v and -v: spread, but of rank 1, which is why both are looked at
        assert low <= feature_spread(x) <= high


def test_assignment_statistics_against_the_formula():
    q = distribution(20, 7)
    found = assignment_figures(q.float())
    rows = q.numpy()
    mean = rows.mean(axis=0)
    assert found["prototype_entropy"] == pytest.approx(-(mean * np.log(mean)).sum() / math.log(7))
    assert found["assignment_entropy"] == pytest.approx(
        -(rows * np.log(rows)).sum(axis=1).mean() / math.log(7), rel=1e-5
    )
    assert found["prototypes_used"] == len(set(rows.argmax(axis=1))) / 7


@pytest.mark.parametrize(
    ("q", "expected"),
    [
        (torch.eye(8), (1.0, 0.0, 1.0)),  # each row its own prototype
        (torch.full((8, 8), 1 / 8), (1.0, 1.0, 1 / 8)),  # undecided: collapse to even assignments
        (torch.eye(8)[[2] * 8], (0.0, 0.0, 1 / 8)),  # all the same: collapse to one prototype
    ],
)
def test_assignment_statistics_of_known_ones(q, expected):
    found = assignment_figures(q)
    assert tuple(found.values()) == pytest.approx(expected)


def test_attention_entropy_against_the_formula():
    a = distribution(2, 3, 5, 5)
    cls = a[:, :, 0].numpy()
    by_head = -(cls * np.log(cls)).sum(axis=-1).mean(axis=0) / math.log(5)
    expected = by_head.mean(), by_head.min(), by_head.max()
    assert tuple(attention_figures(a.float()).values()) == pytest.approx(expected, rel=1e-5)
    for known, entropy in ((torch.full((1, 1, 4, 4), 0.25), 1.0), (torch.eye(4)[None, None], 0.0)):
        assert list(attention_figures(known).values()) == pytest.approx([entropy] * 3, abs=1e-6)


# --- weights, gradients, updates ---


class Small(nn.Module):
    """Names as those of a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.ones(1, 3))
        self.patch_embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.frozen = nn.Linear(2, 2)

    def forward(self, x):
        x = self.patch_embed(x) + self.cls_token
        for block in self.blocks:
            x = block(x).tanh()
        return x


def norm(tensors) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def parts_of(model: Small) -> dict[str, list]:
    return {
        "net.tokens": [model.cls_token],
        "net.patch_embed": [*model.patch_embed.parameters()],
        "net.blocks.0": [*model.blocks[0].parameters()],
        "net.blocks.1": [*model.blocks[1].parameters()],
    }


@pytest.mark.parametrize("per_block", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
def test_module_statistics_against_copies_of_the_weights(per_block, steps):
    torch.manual_seed(0)
    model = Small()
    trained = [p for name, p in model.named_parameters() if "frozen" not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": trained[:3], "lr": 3e-2, "weight_decay": 0.4},
            {"params": trained[3:], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=(0.8, 0.95),
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        before = {p: p.detach().clone() for p in trained}
        optimizer.step()
    found = module_statistics({"net": model}, optimizer, per_block=per_block)
    parts = parts_of(model) if per_block else {"net": trained}
    weights = parts if per_block else {"net": list(model.parameters())}
    for part, params in parts.items():
        assert found[f"weight_norm/{part}"].item() == pytest.approx(norm(weights[part]), rel=1e-5)
        assert found[f"grad_norm/{part}"].item() == pytest.approx(
            norm(p.grad for p in params), rel=1e-5
        )
        moved = norm(p.detach() - before[p] for p in params)
        assert found[f"update_ratio/{part}"].item() == pytest.approx(
            moved / norm(weights[part]), rel=1e-3
        )
    if per_block:
        assert "grad_norm/net.frozen" not in found
        assert "weight_norm/net.frozen" in found


def test_module_statistics_without_adamw_state():
    model = Small()
    found = module_statistics({"net": model}, torch.optim.SGD(model.parameters(), lr=0.1))
    assert {name.split("/")[0] for name in found} == {"weight_norm"}
    found = module_statistics({"net": model}, torch.optim.AdamW(model.parameters()))
    assert {name.split("/")[0] for name in found} == {"weight_norm"}


# --- the monitor ---


def test_max_rows(make_cfg):
    cls = features("healthy")
    found = []
    for limit in (128, 10):
        monitor = CollapseMonitor(make_cfg(f"monitor.max_rows={limit}"))
        found.append(monitor.feature_figures("cls", cls)["cls_effective_rank"])
    assert found[0] == pytest.approx(effective_rank(cls))
    assert found[1] <= 10
    with pytest.raises(ValueError, match=r"monitor\.max_rows` must be at least 2, got 1"):
        CollapseMonitor(make_cfg("monitor.max_rows=1"))


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        ((), [0, 100, 200]),
        (("monitor.period_iterations=150",), [0, 150]),
        (("monitor.period_iterations=0",), []),
        (("monitor.enabled=false",), []),
    ],
)
def test_is_due(make_cfg, changes, due):
    monitor = CollapseMonitor(make_cfg(*changes))
    assert [it for it in range(250) if monitor.is_due(it)] == due


def test_measure_has_the_figures_of_the_teacher(make_cfg):
    from dinov3.layers.dino_head import DINOHead
    from dinov3.models.vision_transformer import DinoVisionTransformer

    torch.manual_seed(0)
    vit = DinoVisionTransformer(patch_size=8, embed_dim=16, depth=2, num_heads=2)
    head = DINOHead(16, 12, hidden_dim=8, bottleneck_dim=4)
    for module in (vit, head):
        module.init_weights()
        module.eval()
    images = torch.randn(9, 3, 16, 16)
    found = CollapseMonitor(make_cfg("monitor.images=6", "teacher.teacher_temp=0.2")).measure(
        vit, images, head
    )
    with torch.no_grad():
        out = vit(images[:6], is_training=True)
        q = (head(out["x_norm_clstoken"]) / 0.2).softmax(-1)
        attention = vit.get_last_selfattention(images[:4])
    expected = {**assignment_figures(q), **attention_figures(attention)}
    for name, key in (("cls", "x_norm_clstoken"), ("patch", "x_norm_patchtokens")):
        rows = out[key].flatten(0, -2)
        expected[f"{name}_std"] = feature_std(rows)
        expected[f"{name}_spread"] = feature_spread(rows)
        expected[f"{name}_effective_rank"] = effective_rank(rows)
    assert found == pytest.approx({f"monitor/{k}": v for k, v in expected.items()}, rel=1e-6)
    assert not vit.training


def test_measure_runs_compiled_networks_as_written(make_cfg):
    """Another batch size than the training's must not compile them again."""
    from dinov3.models.vision_transformer import DinoVisionTransformer

    vit = DinoVisionTransformer(patch_size=8, embed_dim=16, depth=1, num_heads=2)
    vit.init_weights()
    vit.eval()
    plain = CollapseMonitor(make_cfg()).measure(vit, torch.ones(2, 3, 16, 16))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    vit.blocks[0].compile(backend=backend)
    assert CollapseMonitor(make_cfg()).measure(vit, torch.ones(2, 3, 16, 16)) == plain
    assert compiled == []


def figures(**changes: float) -> dict[str, float]:
    usual = {"cls_effective_rank": 40.0, "cls_spread": 0.8, "prototypes_used": 0.5}
    return {f"monitor/{name}": value for name, value in (usual | changes).items()}


LN_K = math.log(65536)


@pytest.mark.parametrize(
    ("seen", "loss", "sign", "cure"),
    [
        ({}, 7.0, None, ""),
        ({"cls_effective_rank": 1.3}, 7.0, "cls_effective_rank", "monitor.min_effective_rank=1.2"),
        ({"cls_effective_rank": math.nan}, 7.0, "cls_effective_rank", "monitor.min_effective_rank=null"),
        ({"cls_spread": 0.01}, 7.0, "cls_spread", "monitor.min_spread=0.005"),
        ({"prototypes_used": 0.01}, 7.0, "prototypes_used", "monitor.min_prototypes_used=null"),
        ({"update_ratio/backbone.blocks.3": 0.2}, 7.0, "monitor/update_ratio/backbone.blocks.3",
         "monitor.max_update_ratio=0.3"),
        ({}, LN_K * 1.001, "flat_loss", "monitor.flat_loss_margin=0.0001"),
        ({}, LN_K * 0.999, "flat_loss", "monitor.flat_loss_margin=null"),
        ({}, math.log(4096), None, ""),
    ],
)  # fmt: skip
def test_thresholds_warn(make_cfg, caplog, seen, loss, sign, cure):
    signs = [] if sign is None else [sign]
    monitor = CollapseMonitor(make_cfg())
    assert monitor.check(figures(**seen), 500, loss) == signs
    assert len(caplog.records) == len(signs)
    assert monitor.check(figures(**seen), 499, loss) == []
    later = CollapseMonitor(make_cfg("monitor.warn_after=1000"))
    assert later.check(figures(**seen), 500, loss) == []
    if cure:
        assert CollapseMonitor(make_cfg(cure)).check(figures(**seen), 500, loss) == []


def test_flat_loss_knows_the_number_of_prototypes(make_cfg):
    monitor = CollapseMonitor(make_cfg("dino.head_n_prototypes=4096"))
    assert monitor.check(figures(), 500, math.log(4096)) == ["flat_loss"]
    assert monitor.check(figures(), 500, LN_K) == []
    assert monitor.check(figures(), 500) == []


def test_a_sign_warns_once_until_it_was_away(make_cfg, caplog):
    monitor = CollapseMonitor(make_cfg())
    for spread in (0.001, 0.001, 0.5, 0.001):
        monitor.check(figures(cls_spread=spread), 600)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("kind", "collapsed"), [("healthy", False), ("equal", True), ("line", True)]
)
def test_features_of_a_collapsed_network_warn(make_cfg, kind, collapsed):
    monitor = CollapseMonitor(make_cfg())
    found = monitor.feature_figures("cls", features(kind))
    seen = {f"monitor/{name}": value for name, value in found.items()}
    assert bool(monitor.check(seen, 1000)) == collapsed
