"""Layers against references written here, in float64 where it is arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dinov3.layers import (
    DINOHead,
    LayerScale,
    Mlp,
    PatchEmbed,
    RMSNorm,
    RopePositionEmbedding,
    SelfAttention,
    SelfAttentionBlock,
    SwiGLUFFN,
)
from dinov3.layers.attention import rope_apply
from dinov3.layers.patch_embed import make_2tuple
from dinov3.utils.utils import cat_keep_shapes, named_apply, named_replace, uncat_with_shapes


@pytest.mark.parametrize("normalize", ["separate", "max", "min"])
@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 2)])
def test_rope_angles_by_hand(normalize, grid):
    height, width = grid
    rope = RopePositionEmbedding(
        32, num_heads=2, base=50.0, normalize_coords=normalize, dtype=torch.float64
    )
    sin, cos = rope(H=height, W=width)
    assert sin.shape == (height * width, 16)
    spans = {"separate": grid, "max": (max(grid),) * 2, "min": (min(grid),) * 2}[normalize]
    for row in range(height):
        for column in range(width):
            position = (2 * (row + 0.5) / spans[0] - 1, 2 * (column + 0.5) / spans[1] - 1)
            for axis in range(2):
                for j in range(4):
                    angle = 2 * math.pi * position[axis] / 50.0 ** (2 * j / 8)
                    for half in (0, 8):
                        index = half + 4 * axis + j
                        assert sin[row * width + column, index].item() == pytest.approx(
                            math.sin(angle), abs=1e-12
                        )
                        assert cos[row * width + column, index].item() == pytest.approx(
                            math.cos(angle), abs=1e-12
                        )


def test_rope_periods_between_two_bounds():
    rope = RopePositionEmbedding(32, num_heads=2, base=None, min_period=0.5, max_period=8.0)
    torch.testing.assert_close(
        rope.periods, torch.tensor([0.5, 1.2599, 3.1748, 8.0]), rtol=1e-4, atol=0
    )


def test_rope_tables_are_made_once_a_grid(monkeypatch):
    made = []
    make = RopePositionEmbedding._make_tables

    def counted(self, H, W):
        made.append((H, W))
        return make(self, H, W)

    monkeypatch.setattr(RopePositionEmbedding, "_make_tables", counted)
    rope = RopePositionEmbedding(32, num_heads=2)
    assert rope(H=3, W=4)[0] is rope(H=3, W=4)[0]
    rope(H=4, W=3)
    assert made == [(3, 4), (4, 3)]
    before = rope(H=3, W=4)[0]
    rope.load_state_dict({"periods": 2 * rope.periods})
    assert not torch.equal(rope(H=3, W=4)[0], before), "other periods, other tables"
    assert rope.double()(H=3, W=4)[0].dtype == torch.float64
    with torch.inference_mode():
        assert rope(H=5, W=5)[0].is_inference()
    assert not rope(H=5, W=5)[0].is_inference(), "which training could not use"
    assert copy.deepcopy(rope)._tables == {}
    augmented = RopePositionEmbedding(32, num_heads=2, shift_coords=0.5).train()
    assert not torch.equal(augmented(H=3, W=3)[0], augmented(H=3, W=3)[0])


def test_rope_keeps_its_type_when_the_model_is_cast():
    rope = RopePositionEmbedding(32, num_heads=2, dtype=torch.float32)
    exact, _ = rope(H=7, W=5)
    cast, _ = rope.bfloat16()(H=7, W=5)
    assert rope.periods.dtype == torch.bfloat16
    assert cast.dtype == torch.float32
    wrong = RopePositionEmbedding(32, num_heads=2, dtype=torch.bfloat16)(H=7, W=5)[0].float()
    assert (cast - exact).abs().max() < (wrong - exact).abs().max()


def test_rope_wrong_arguments():
    with pytest.raises(ValueError, match="Either base or both"):
        RopePositionEmbedding(32, num_heads=2, base=10.0, min_period=1.0, max_period=2.0)
    with pytest.raises(ValueError, match="Either base or both"):
        RopePositionEmbedding(32, num_heads=2, base=None, min_period=1.0)
    with pytest.raises(ValueError, match="one of min, max, separate"):
        RopePositionEmbedding(32, num_heads=2, normalize_coords="mean")


def test_rope_is_a_rotation():
    rope = RopePositionEmbedding(32, num_heads=2, dtype=torch.float64)
    sin, cos = rope(H=3, W=4)
    x = torch.randn(2, 2, 12, 16, dtype=torch.float64)
    turned = rope_apply(x, sin, cos)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rope_apply(turned, -sin, cos), x)


def test_augmentation_of_coordinates_stays_in_range():
    torch.manual_seed(0)
    rope = RopePositionEmbedding(32, num_heads=2, rescale_coords=2.0, dtype=torch.float64).train()
    plain = RopePositionEmbedding(32, num_heads=2, dtype=torch.float64)
    assert rope.is_random
    assert not plain.is_random
    # the slowest of the two angles of a 1 × 1 grid is 0 wherever it is scaled to
    assert not rope(H=1, W=1)[0].any()
    scales = []
    for _ in range(200):
        coords = rope._augment(torch.ones(1, 2, dtype=torch.float64))
        assert coords[0, 0] == coords[0, 1]
        scales.append(coords[0, 0].item())
    assert 0.5 <= min(scales) < 0.6
    assert 1.7 < max(scales) <= 2.0


def test_attention_against_a_plain_formula():
    torch.manual_seed(0)
    layer = SelfAttention(32, num_heads=4, qkv_bias=True).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    q, k, v = layer.qkv(x).reshape(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(8), dim=-1)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(2, 9, 32))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SelfAttention(30, num_heads=4)
    with pytest.raises(ValueError, match="outnumber tokens"):
        layer(x, rope=(torch.zeros(12, 8), torch.zeros(12, 8)))
    with pytest.raises(ValueError, match="must be None"):
        layer(x, attn_bias=torch.zeros(1))


def test_stochastic_depth_keeps_the_expectation():
    torch.manual_seed(0)
    block = SelfAttentionBlock(16, 2, drop_path=0.5, init_values=1.0)
    x = torch.randn(8, 3, 16)
    block.eval()
    with torch.no_grad():
        attended = block.ls1(block.attn(block.norm1(x)))
        block.train()
        total = torch.zeros_like(x)
        for _ in range(400):
            added = block._add_for_some([x], block.norm1, block.attn.forward_list, block.ls1)[0] - x
            changed = added.abs().amax(dim=(1, 2)) > 0
            assert changed.sum() == 4  # half of the batch, exactly
            torch.testing.assert_close(added[changed], 2 * attended[changed], atol=1e-5, rtol=1e-4)
            total += added
    torch.testing.assert_close(total / 400, attended, atol=0.1, rtol=0.3)


def test_stochastic_depth_keeps_at_least_one():
    block = SelfAttentionBlock(16, 2, drop_path=0.99)
    assert len(block._choose(torch.zeros(3, 1, 16))) == 1
    few = SelfAttentionBlock(16, 2, drop_path=0.1)
    assert [len(few._choose(torch.zeros(batch, 1, 16))) for batch in (1, 2, 8)] == [1, 1, 7]


def test_layer_scale_and_rms_norm():
    x = torch.randn(4, 6)
    torch.testing.assert_close(LayerScale(6, 0.3)(x), 0.3 * x)
    expected = x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(RMSNorm(6)(x), expected)
    assert RMSNorm(6)(x.bfloat16()).shape == x.shape
    inplace = LayerScale(6, 0.5, inplace=True)
    with torch.no_grad():
        y = x.clone()
        assert inplace(y) is y


@pytest.mark.parametrize(("align", "hidden"), [(8, 88), (32, 96), (64, 128), (128, 128)])
def test_swiglu_width_and_formula(align, hidden):
    layer = SwiGLUFFN(32, 128, align_to=align)
    assert layer.w1.out_features == hidden
    x = torch.randn(3, 32)
    gate = layer.w1(x)
    torch.testing.assert_close(layer(x), layer.w3(gate * torch.sigmoid(gate) * layer.w2(x)))


def test_mlp_formula_and_options():
    torch.manual_seed(0)
    layer = Mlp(6, 10, 4).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    hidden = x @ layer.fc1.weight.T + layer.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    torch.testing.assert_close(layer(x), hidden @ layer.fc2.weight.T + layer.fc2.bias)
    assert Mlp(6).fc1.out_features == Mlp(6).fc2.out_features == 6
    assert Mlp(6, bias=False).fc2.bias is None
    assert isinstance(Mlp(6, act_layer=nn.ReLU).act, nn.ReLU)
    dropped = Mlp(6, 10, 400, drop=0.5)(torch.ones(1, 6))
    assert 0.3 < (dropped == 0).float().mean() < 0.7


def test_rms_norm_takes_statistics_in_float32():
    x = torch.full((2, 64), 300.0, dtype=torch.float16)  # 300² overflows half precision
    torch.testing.assert_close(RMSNorm(64).half()(x), torch.ones_like(x))
    assert not torch.equal(RMSNorm(4, eps=1.0)(torch.ones(1, 4)), RMSNorm(4)(torch.ones(1, 4)))


def test_dropout_on_the_output_acts_on_a_tensor_and_not_on_a_list():
    layer = SelfAttention(16, num_heads=2, proj_drop=0.5)
    x = torch.randn(2, 5, 16)
    torch.manual_seed(0)
    assert (layer(x) == 0).float().mean() > 0.2
    assert (layer.forward_list([x])[0] != 0).all()


def test_patch_embedding_sees_each_patch_alone():
    embed = PatchEmbed(img_size=(8, 12), patch_size=4, embed_dim=5)
    assert embed.num_patches == 6
    image = torch.randn(1, 3, 8, 12)
    out = embed(image)
    assert out.shape == (1, 6, 5)
    first = torch.einsum("chw,dchw->d", image[0, :, :4, 4:8], embed.proj.weight) + embed.proj.bias
    torch.testing.assert_close(out[0, 1], first)
    grid = PatchEmbed(patch_size=4, embed_dim=5, flatten_embedding=False, norm_layer=nn.LayerNorm)
    assert grid(image).shape == (1, 2, 3, 5)
    assert make_2tuple(3) == (3, 3)
    with pytest.raises(ValueError, match="two numbers"):
        make_2tuple((1, 2, 3))


def test_head():
    torch.manual_seed(0)
    head = DINOHead(12, 20, nlayers=3, hidden_dim=16, bottleneck_dim=8)
    head.init_weights()
    assert set(head.state_dict()) == {
        "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight", "mlp.4.bias",
        "last_layer.weight",
    }  # fmt: skip
    x = torch.randn(4, 12)
    bottleneck = head(x, no_last_layer=True)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(head(bottleneck, only_last_layer=True), head(x))
    assert head(x).shape == (4, 20)
    assert "mlp.weight" in DINOHead(12, 20, nlayers=1).state_dict()
    assert any(isinstance(m, nn.BatchNorm1d) for m in DINOHead(12, 20, use_bn=True).modules())
    assert "mlp.0.bias" not in DINOHead(12, 20, mlp_bias=False).state_dict()


def test_head_formula_and_start_values():
    torch.manual_seed(0)
    head = DINOHead(40, 50, nlayers=2, hidden_dim=60, bottleneck_dim=30)
    head.init_weights()
    assert head.last_layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not head.mlp[0].bias.any()
    x = torch.randn(4, 40)
    hidden = nn.functional.gelu(x @ head.mlp[0].weight.T)
    bottleneck = hidden @ head.mlp[2].weight.T
    bottleneck = bottleneck / bottleneck.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), bottleneck @ head.last_layer.weight.T)


def test_both_branches_of_a_kept_sample_are_its_own():
    torch.manual_seed(0)
    block = SelfAttentionBlock(16, 2, drop_path=0.5, init_values=1.0)
    with torch.no_grad():
        block.ls2.gamma.fill_(0.25)
        x = torch.randn(1, 5, 16)  # of one sample, one is kept: nothing is dropped or scaled
        expected = block.eval()(x)
        torch.testing.assert_close(block.train()(x), expected)


def test_lists_of_tokens_round_trip():
    items = [torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(1, 1, 7, 4)]
    rows, shapes, counts = cat_keep_shapes(items)
    assert rows.shape == (6 + 5 + 7, 4)
    for a, b in zip(items, uncat_with_shapes(rows, shapes, counts), strict=True):
        assert torch.equal(a, b)
    wider = uncat_with_shapes(torch.cat([rows, rows], dim=1), shapes, counts)
    assert wider[0].shape == (2, 3, 8)


def test_walking_module_trees():
    tree = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    seen: list[str] = []
    named_apply(lambda module, name: seen.append(name), tree, include_root=True)
    assert seen == ["0", "1.0", "1", ""]
    seen.clear()
    named_apply(lambda module, name: seen.append(name), tree, depth_first=False)
    assert seen == ["0", "1", "1.0"]
    named_replace(lambda module, name: nn.GELU() if isinstance(module, nn.ReLU) else module, tree)
    assert isinstance(tree[1][0], nn.GELU)
