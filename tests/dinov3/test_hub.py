"""Backbones by name: shapes, keys, and files that are wrong."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinov3.cells.weights import write_backbone
from dinov3.hub import backbones
from dinov3.hub.backbones import (
    Weights,
    convert_path_or_url_to_url,
    dinov3_vits16,
    dinov3_vits16plus,
    is_url,
)
from dinov3.models import build_model, build_model_from_cfg


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = dinov3_vits16(pretrained=False, depth=1)
    path = tmp_path / "weights file.pth"
    torch.save(model.state_dict(), path)
    return model, path


def test_state_dict_of_the_released_small_vit():
    state = dinov3_vits16(pretrained=False).state_dict()
    assert len(state) == 188
    expected = {
        "cls_token": (1, 1, 384),
        "storage_tokens": (1, 4, 384),
        "mask_token": (1, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16),
        "patch_embed.proj.bias": (384,),
        "rope_embed.periods": (16,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    for block in range(12):
        expected |= {
            f"blocks.{block}.{name}": shape
            for name, shape in {
                "norm1.weight": (384,), "norm1.bias": (384,),
                "attn.qkv.weight": (1152, 384), "attn.qkv.bias": (1152,),
                "attn.qkv.bias_mask": (1152,),
                "attn.proj.weight": (384, 384), "attn.proj.bias": (384,),
                "ls1.gamma": (384,), "ls2.gamma": (384,),
                "norm2.weight": (384,), "norm2.bias": (384,),
                "mlp.fc1.weight": (1536, 384), "mlp.fc1.bias": (1536,),
                "mlp.fc2.weight": (384, 1536), "mlp.fc2.bias": (384,),
            }.items()
        }  # fmt: skip
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_loading_from_a_path_and_a_file_url(saved):
    model, path = saved
    for weights in (path, str(path), path.as_uri()):
        again = dinov3_vits16(weights=weights, depth=1)
        for key, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.parametrize("name", ["teacher.pth", "w.safetensors", "folder"])
def test_every_format_of_weights_is_read(saved, tmp_path, name):
    model, _ = saved
    state = model.state_dict()
    if name == "teacher.pth":
        torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / name)
    else:
        write_backbone(state, tmp_path / name, "dinocell" if name == "w.safetensors" else "hf")
    again = dinov3_vits16(weights=tmp_path / name, depth=1)
    assert torch.equal(again.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_weights_of_another_patch_size_are_adapted(saved):
    model, path = saved
    again = dinov3_vits16(weights=path, patch_size=8, depth=1)
    summed = model.patch_embed.proj.weight.unflatten(2, (8, 2)).unflatten(4, (8, 2)).sum((3, 5))
    torch.testing.assert_close(again.patch_embed.proj.weight, summed)


def test_patch_size_may_be_given():
    model = dinov3_vits16(pretrained=False, patch_size=8, depth=1)
    assert model.patch_embed.proj.weight.shape == (384, 3, 8, 8)


def test_swiglu_variant():
    model = dinov3_vits16plus(pretrained=False, depth=1)
    assert model.blocks[0].mlp.w1.out_features == 1536


def test_hash_in_the_name(saved, tmp_path):
    _, path = saved
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    right = path.rename(tmp_path / f"w-{digest[:8]}.pth")
    dinov3_vits16(weights=str(right), check_hash=True, depth=1)
    wrong = right.rename(tmp_path / "w-00000000.pth")
    with pytest.raises(ValueError, match="must begin with 00000000"):
        dinov3_vits16(weights=str(wrong), check_hash=True, depth=1)
    bare = wrong.rename(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="-HASH"):
        dinov3_vits16(weights=str(bare), check_hash=True, depth=1)


def test_released_weights_are_gated(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"accept the DINOv3 licence.*weights=PATH"):
        dinov3_vits16()
    with pytest.raises(ValueError, match="SAT493M for vits16"):
        dinov3_vits16(weights=Weights.SAT493M)


def test_a_cached_file_needs_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    model = dinov3_vits16(pretrained=False)
    name = "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    torch.save(model.state_dict(), tmp_path / "checkpoints" / name)
    assert torch.equal(dinov3_vits16().cls_token, model.cls_token)


def test_an_address_is_fetched_once(saved, monkeypatch, tmp_path):
    model, path = saved
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    fetched = []

    def fetch(address, target):
        fetched.append(address)
        shutil.copy(path, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    address = "https://example.org/weights.pth?Signature=abc"
    for _ in range(2):
        again = dinov3_vits16(weights=address, depth=1)
        assert torch.equal(again.cls_token, model.cls_token)
    assert fetched == [address]
    assert (tmp_path / "cache" / "checkpoints" / "weights.pth").is_file()


def test_files_with_code_in_them_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"cls_token": Weights.LVD1689M}, path)
    with pytest.raises(ValueError, match="not unpickled"):
        dinov3_vits16(weights=path, depth=1)


def test_satellite_weights_have_a_norm_for_local_crops(monkeypatch):
    made = {}

    class Stop(Exception):
        pass

    def record(**options):
        made.update(options)
        raise Stop

    monkeypatch.setattr(backbones, "DinoVisionTransformer", record)
    for weights, untied in ((Weights.SAT493M, True), (Weights.LVD1689M, False)):
        with pytest.raises(Stop):
            backbones.dinov3_vitl16(weights=weights)
        assert made["untie_global_and_local_cls_norm"] is untied


def test_files_that_do_not_fit(saved, tmp_path):
    _, path = saved
    with pytest.raises(ValueError, match=r"missing: blocks\.1\."):
        dinov3_vits16(weights=str(path), depth=2)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="neither a PyTorch archive"):
        dinov3_vits16(weights=str(path), depth=1)
    with pytest.raises(FileNotFoundError, match="check the path"):
        dinov3_vits16(weights=str(tmp_path / "none.pth"))


def test_paths_and_urls(tmp_path):
    assert is_url("https://a/b.pth")
    assert not is_url("a/b.pth")
    assert convert_path_or_url_to_url(str(tmp_path)) == tmp_path.as_uri()
    assert convert_path_or_url_to_url("https://a/b.pth") == "https://a/b.pth"
    no_user = "~no such user/b.pth"  # a folder may have such a name
    assert convert_path_or_url_to_url(no_user) == (Path.cwd() / no_user).as_uri()


def test_every_entry_has_the_released_flags(monkeypatch):
    made = {}

    class Recorder:
        def __init__(self, **options):
            made.update(options)

        def init_weights(self):
            pass

    monkeypatch.setattr(backbones, "DinoVisionTransformer", Recorder)
    widths = {
        "vits16": 384, "vits16plus": 384, "vitb16": 768, "vitl16": 1024, "vitl16plus": 1024,
        "vith16plus": 1280, "vit7b16": 4096,
    }  # fmt: skip
    for name, width in widths.items():
        made.clear()
        getattr(backbones, f"dinov3_{name}")(pretrained=False)
        assert made["embed_dim"] == width
        assert made["n_storage_tokens"] == 4
        assert made["norm_layer"] == "layernormbf16"
        assert made["mask_k_bias"]
        assert made["pos_embed_rope_dtype"] == "fp32"
        assert made.get("qkv_bias", True) is (name != "vit7b16")


def test_models_from_a_configuration():
    student = SimpleNamespace(
        arch="vit_small", patch_size=8, drop_path_rate=0.3, layerscale=1e-5, ffn_layer="mlp",
        qkv_bias=True, proj_bias=True, ffn_bias=True, norm_layer="layernorm", n_storage_tokens=2,
        mask_k_bias=True, untie_cls_and_patch_norms=False, untie_global_and_local_cls_norm=False,
        pos_embed_rope_base=100.0, pos_embed_rope_min_period=None, pos_embed_rope_max_period=None,
        pos_embed_rope_normalize_coords="separate", pos_embed_rope_shift_coords=None,
        pos_embed_rope_jitter_coords=None, pos_embed_rope_rescale_coords=2.0,
    )  # fmt: skip
    config = SimpleNamespace(student=student, crops=SimpleNamespace(global_crops_size=[224, 256]))
    one, two, width = build_model_from_cfg(config)
    assert width == 384
    assert one.blocks[0].sample_drop_ratio == 0.3
    assert two.blocks[0].sample_drop_ratio == 0.0
    assert one.cls_token.device.type == "meta"
    assert one.patch_embed.img_size == (256, 256)
    teacher, _ = build_model(student, only_teacher=True, device="meta")
    assert teacher.n_storage_tokens == 2
    student.fp8_enabled = True
    with pytest.raises(ValueError, match="fp8"):
        build_model(student)
    student.fp8_enabled = False
    student.arch = "vit_tiny"
    assert build_model(student, only_teacher=True, device="meta")[1] == 192
    student.arch = "vit_enormous"
    with pytest.raises(ValueError, match="vit_small"):
        build_model(student)
