"""The ViT against an independent one (transformers), and each of its flags against itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dinov3.models import vision_transformer
from dinov3.models.vision_transformer import DinoVisionTransformer, vit_small
from dinov3.utils.utils import count_parameters

RELEASED = {
    "layerscale_init": 1e-5,
    "norm_layer": "layernormbf16",
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "pos_embed_rope_dtype": "fp32",
    "pos_embed_rope_rescale_coords": 2.0,
}


def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter random, so that no term hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            around = 1.0 if name.endswith(("gamma", "lambda1")) or _is_norm_weight(name) else 0.0
            spread = 0.05 if value.ndim > 1 else 0.1
            value.copy_(around + spread * torch.randn(value.shape, generator=generator))


def _is_norm_weight(name: str) -> bool:
    return "norm" in name and name.endswith("weight")


def from_transformers(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Keys of the Hugging Face model → ours."""
    first = "embeddings."
    out = {
        "cls_token": state[first + "cls_token"],
        "storage_tokens": state[first + "register_tokens"],
        "mask_token": state[first + "mask_token"].reshape(1, -1),
        "patch_embed.proj.weight": state[first + "patch_embeddings.weight"],
        "patch_embed.proj.bias": state[first + "patch_embeddings.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    same = {
        "attention.o_proj": "attn.proj",
        "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
    }
    for block in range(depth):
        theirs, ours = f"model.layer.{block}.", f"blocks.{block}."
        for source, target in same.items():
            for kind in ("weight", "bias"):
                out[f"{ours}{target}.{kind}"] = state[f"{theirs}{source}.{kind}"]
        out[ours + "attn.qkv.weight"] = torch.cat(
            [state[f"{theirs}attention.{part}_proj.weight"] for part in "qkv"]
        )
        bias = state[theirs + "attention.q_proj.bias"]
        out[ours + "attn.qkv.bias"] = torch.cat(
            [bias, torch.full_like(bias, 7.0), state[theirs + "attention.v_proj.bias"]]
        )  # the middle third is masked and must not matter
        for index in (1, 2):
            out[f"{ours}ls{index}.gamma"] = state[f"{theirs}layer_scale{index}.lambda1"]
    return out


@pytest.mark.parametrize(
    ("patch", "width", "heads", "size"),
    [
        (16, 192, 3, (224, 224)),
        (16, 384, 6, (96, 160)),
        (8, 192, 3, (96, 96)),
        (8, 192, 3, (64, 112)),
    ],
)
def test_equals_transformers(patch, width, heads, size):
    transformers = pytest.importorskip(
        "transformers", reason="the independent ViT is not installed"
    )
    depth = 12
    theirs = transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(
            patch_size=patch,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_register_tokens=4,
            image_size=224,
        )
    ).eval()
    randomize(theirs, seed=patch + width)
    ours = DinoVisionTransformer(
        patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, **RELEASED
    )
    ours.init_weights()
    problems = ours.load_state_dict(from_transformers(theirs.state_dict(), depth), strict=False)
    assert not problems.unexpected_keys
    assert all(key.endswith(("bias_mask", "periods")) for key in problems.missing_keys)
    ours.eval()
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, *size, generator=generator)
    with torch.no_grad():
        expected = theirs(image, output_hidden_states=True)
        features = ours.forward_features(image)
        blocks = (2, 5, 8, 11)
        maps = ours.get_intermediate_layers(
            image, n=blocks, reshape=True, return_class_token=True, return_extra_tokens=True
        )
    last = torch.cat(
        [
            features["x_norm_clstoken"][:, None],
            features["x_storage_tokens"],
            features["x_norm_patchtokens"],
        ],
        dim=1,
    )
    assert (last - expected.last_hidden_state).abs().max() <= 1e-5
    assert last.abs().mean() > 0.1
    for block, (patches, cls_token, storage) in zip(blocks, maps, strict=True):
        with torch.no_grad():
            hidden = theirs.norm(expected.hidden_states[block + 1]) if block < 11 else last
        assert (cls_token - hidden[:, 0]).abs().max() <= 1e-5
        assert (storage - hidden[:, 1:5]).abs().max() <= 1e-5
        height, width_patches = size[0] // patch, size[1] // patch
        assert patches.shape == (2, width, height, width_patches)
        assert (patches.flatten(2).transpose(1, 2) - hidden[:, 5:]).abs().max() <= 1e-5


def small(**options) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        **{
            "patch_size": 4,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "layerscale_init": 0.5,
            "n_storage_tokens": 2,
            "pos_embed_rope_dtype": "fp32",
            **options,
        }
    )
    model.init_weights()
    return model.eval()


IMAGE = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.forward_features(IMAGE)["x_norm_patchtokens"]


@pytest.mark.parametrize(
    "options",
    [
        {"pos_embed_rope_base": 10.0},
        {
            "pos_embed_rope_base": None,
            "pos_embed_rope_min_period": 0.1,
            "pos_embed_rope_max_period": 3.0,
        },
        {"pos_embed_rope_normalize_coords": "max"},
        {"pos_embed_rope_normalize_coords": "min"},
        {"pos_embed_rope_dtype": "bf16"},
        {"layerscale_init": 0.1},
        {"layerscale_init": None},
        {"norm_layer": "rmsnorm"},
        {"norm_layer": "layernormbf16"},
        {"ffn_layer": "swiglu"},
        {"ffn_ratio": 2.0},
        {"num_heads": 4},
        {"depth": 2},
        {"n_storage_tokens": 0},
    ],
    ids=str,
)
def test_each_flag_changes_the_output(options):
    base, changed = output(small()), output(small(**options))
    assert base.shape == changed.shape
    assert not torch.equal(base, changed)


@pytest.mark.parametrize("flag", ["qkv_bias", "ffn_bias", "proj_bias"], ids=str)
def test_bias_flags_remove_parameters(flag):
    name = {"qkv_bias": "attn.qkv.bias", "ffn_bias": "mlp.fc1.bias", "proj_bias": "attn.proj.bias"}
    assert f"blocks.0.{name[flag]}" in small().state_dict()
    assert f"blocks.0.{name[flag]}" not in small(**{flag: False}).state_dict()


def test_flags_of_the_shape():
    model = small(img_size=32, in_chans=1, patch_size=8, embed_dim=48)
    assert model.patch_embed.num_patches == 16
    assert model.patch_embed.proj.weight.shape == (48, 1, 8, 8)
    assert model.num_features == model.embed_dim == 48
    assert (model.n_blocks, model.num_heads, model.n_storage_tokens) == (3, 2, 2)
    assert small(img_size=64).patch_embed.num_patches == 256
    assert not small().chunked_blocks
    with torch.no_grad():  # what does not fill a patch is not seen
        features = model.forward_features(torch.randn(1, 1, 20, 27))
    assert features["x_norm_patchtokens"].shape == (1, 6, 48)


@pytest.mark.parametrize(
    ("name", "width"), [("swiglu", 88), ("swiglu32", 96), ("swiglu64", 128), ("swiglu128", 128)]
)
def test_swiglu_layers(name, width):
    assert small(ffn_layer=name).blocks[0].mlp.w1.out_features == width


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_small", 21.59),
        ("vit_base", 85.65),
        ("vit_large", 303.10),
        ("vit_so400m", 415),
        ("vit_huge2", 631),
        ("vit_giant2", 1134),
        ("vit_7b", 6716),
    ],
)
def test_factories_without_storage(name, millions):
    model = getattr(vision_transformer, name)(device="meta")
    assert all(value.is_meta for value in model.state_dict().values())
    assert count_parameters(model) == pytest.approx(millions * 1e6, rel=1e-3)


def test_masked_k_bias_does_not_matter():
    model = small(mask_k_bias=True)
    before = output(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[32:64] = 3.0
    assert torch.equal(output(model), before)
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[:32] = 3.0
    assert not torch.equal(output(model), before)


def test_uninitialised_k_mask_cannot_go_unnoticed():
    model = DinoVisionTransformer(
        patch_size=4, embed_dim=32, depth=1, num_heads=2, mask_k_bias=True
    )
    assert torch.isnan(model.blocks[0].attn.qkv.bias_mask).all()


@pytest.mark.parametrize(
    "name",
    [
        "pos_embed_rope_shift_coords",
        "pos_embed_rope_jitter_coords",
        "pos_embed_rope_rescale_coords",
    ],
)
def test_coordinate_augmentation_acts_in_training_only(name):
    model = small(**{name: 2.0})
    assert torch.equal(output(model), output(small()))
    model.train()
    assert not torch.equal(output(model), output(model))


@pytest.mark.parametrize(("rescale", "calls"), [(None, 1), (2.0, 3)])
def test_positions_are_computed_once_unless_augmented(monkeypatch, rescale, calls):
    model = small(pos_embed_rope_rescale_coords=rescale).train()
    made = []
    forward = model.rope_embed.forward
    monkeypatch.setattr(
        model.rope_embed, "forward", lambda **grid: made.append(grid) or forward(**grid)
    )
    output(model)
    assert made == [{"H": 4, "W": 6}] * calls
    made.clear()
    model.eval()
    output(model)
    assert len(made) == 1


def test_drop_path_acts_in_training_only():
    model = small(drop_path_rate=0.5)
    assert torch.equal(output(model), output(small()))
    model.train()
    outputs = [output(model) for _ in range(6)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_untied_norms():
    model = small(untie_cls_and_patch_norms=True, untie_global_and_local_cls_norm=True)
    with torch.no_grad():
        model.cls_norm.weight.fill_(2.0)
        model.local_cls_norm.weight.fill_(3.0)
        features = model.forward_features(IMAGE)
        plain = small().forward_features(IMAGE)
        torch.testing.assert_close(features["x_norm_clstoken"], 2 * plain["x_norm_clstoken"])
        torch.testing.assert_close(features["x_norm_patchtokens"], plain["x_norm_patchtokens"])
        model.train()
        first, second = model.forward_features([IMAGE, IMAGE], [None, None])
    torch.testing.assert_close(second["x_norm_clstoken"], 3 * plain["x_norm_clstoken"])
    torch.testing.assert_close(first["x_norm_clstoken"], 2 * plain["x_norm_clstoken"])


def test_masks_replace_patches():
    model = small()
    with torch.no_grad():
        model.mask_token.fill_(0.7)
        masks = torch.zeros(2, 24, dtype=torch.bool)
        none = model.forward_features(IMAGE, masks)
        masks[:] = True
        every = model.forward_features(IMAGE, masks)
        other = model.forward_features(torch.zeros_like(IMAGE), masks)
    torch.testing.assert_close(none["x_norm_patchtokens"], output(model))
    assert torch.equal(every["x_norm_patchtokens"], other["x_norm_patchtokens"])
    assert every["masks"] is masks


def test_list_equals_one_by_one():
    model = small()
    local = IMAGE[:, :, :8, :8]
    with torch.no_grad():
        together = model.forward_features([IMAGE, local], [None, None])
        apart = [model.forward_features(IMAGE), model.forward_features(local)]
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a["x_prenorm"], b["x_prenorm"])
    block = model.blocks[0]
    one, two = torch.randn(2, 5, 32), torch.randn(3, 7, 32)
    with torch.no_grad():
        for layer in (block.attn, block.mlp):
            for a, b in zip(layer.forward_list([one, two]), (layer(one), layer(two)), strict=True):
                torch.testing.assert_close(a, b)
        for a, b in zip(block([one, two]), (block(one), block(two)), strict=True):
            torch.testing.assert_close(a, b)


def test_intermediate_layers():
    model = small()
    with torch.no_grad():
        one, two = model.get_intermediate_layers(IMAGE, n=2)
        (last,) = model.get_intermediate_layers(IMAGE)
        (raw,) = model.get_intermediate_layers(IMAGE, norm=False)
    assert one.shape == two.shape == (2, 24, 32)
    assert torch.equal(two, last)
    torch.testing.assert_close(model.norm(raw), last)
    with pytest.raises(ValueError, match="among 0 to 2"):
        model.get_intermediate_layers(IMAGE, n=[3])


def test_forward_and_gradients():
    model = small(mask_k_bias=True).train()
    assert torch.equal(model(IMAGE), model.forward_features(IMAGE)["x_norm_clstoken"])
    assert set(model(IMAGE, is_training=True)) == {
        "x_norm_clstoken",
        "x_storage_tokens",
        "x_norm_patchtokens",
        "x_prenorm",
        "masks",
    }
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(
            value.float().square().mean() for value in model.get_intermediate_layers(IMAGE, n=3)
        )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_start_values():
    torch.manual_seed(0)
    model = vit_small(layerscale_init=1e-5, n_storage_tokens=4, mask_k_bias=True)
    model.init_weights()
    weight = model.blocks[3].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.blocks[3].mlp.fc1.bias.any()
    assert not model.mask_token.any()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert model.patch_embed.proj.weight.abs().max().item() <= 1 / (3 * 256) ** 0.5
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(
        (1 / (3 * 256) ** 0.5) / 3**0.5, rel=0.02
    )
    assert (model.blocks[0].ls1.gamma == 1e-5).all()
    assert count_parameters(vit_small()) == pytest.approx(21.59e6, rel=1e-3)


def test_wrong_arguments(caplog):
    with pytest.raises(ValueError, match="layernorm, layernormbf16, rmsnorm"):
        small(norm_layer="batchnorm")
    with pytest.raises(ValueError, match="mlp, swiglu"):
        small(ffn_layer="moe")
    with pytest.raises(ValueError, match="fp32, fp16, bf16"):
        small(pos_embed_rope_dtype="fp64")
    with pytest.raises(ValueError, match="multiple of 4"):
        small(embed_dim=36)
    small(window=3)
    assert "without effect: window" in caplog.text


def test_an_added_factory_is_found_by_its_name(monkeypatch):
    """As upstream, which looks up any name in the module; other functions of it make no network."""
    from dinov3.configs import get_default_config
    from dinov3.models import build_model_from_cfg, vision_transformer

    def my_network(patch_size: int = 16, **kwargs):
        return vision_transformer.DinoVisionTransformer(
            patch_size=patch_size, embed_dim=16, depth=1, num_heads=2, **kwargs
        )

    cfg = get_default_config()
    cfg.student.arch = "my_network"
    with pytest.raises(ValueError, match="arch` must be one of vit_tiny, "):
        build_model_from_cfg(cfg)
    monkeypatch.setattr(vision_transformer, "my_network", my_network, raising=False)
    assert build_model_from_cfg(cfg, only_teacher=True)[1] == 16
