"""Backbones of every format: each into each, the same network."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3.cells.weights import (
    FORMATS,
    WeightsError,
    load_backbone,
    read_backbone,
    sha256,
    vit_arguments,
    write_backbone,
)
from dinov3.checkpointer import save_checkpoint
from dinov3.models.vision_transformer import DinoVisionTransformer

RELEASED = {
    "layerscale_init": 1e-5,
    "n_storage_tokens": 4,
    "mask_k_bias": True,
    "norm_layer": "layernormbf16",
    "pos_embed_rope_dtype": "fp32",
}


def vit(patch_size: int = 16, seed: int = 0, **options) -> DinoVisionTransformer:
    """Small, with all weights random."""
    settings = {**RELEASED, "embed_dim": 128, "num_heads": 2, "depth": 2, **options}
    model = DinoVisionTransformer(patch_size=patch_size, **settings)
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            if name.endswith("qkv.bias") and settings["mask_k_bias"]:
                parameter[128:256] = 0
        model.mask_token.zero_()  # timm has none
    return model.eval()


def tokens(model: DinoVisionTransformer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x, is_training=True)["x_prenorm"]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(1))


def written(model, folder, kind):
    name = {"meta": "b.pth", "dinocell": "b.safetensors", "timm": "t.safetensors", "hf": "folder"}
    return write_backbone(model.state_dict(), folder / name[kind], kind)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("first", FORMATS)
def test_each_into_each(tmp_path, image, first, second, swiglu):
    options = {"ffn_layer": "swiglu", "ffn_ratio": 6.0} if swiglu else {}
    source = vit(**options)
    path = written(source, tmp_path / "one", first)
    state, described = read_backbone(path)
    assert described.embed_dim == 128
    assert described.num_heads == 2
    assert described.patch_size == 16
    again = vit(seed=5, **options)
    again.load_state_dict({**again.state_dict(), **state})
    load_backbone(again, written(again, tmp_path / "two", second))
    assert torch.equal(tokens(again, image), tokens(source, image))


@pytest.mark.parametrize("swiglu", [False, True])
def test_transformers_reads_and_agrees(tmp_path, image, swiglu):
    """Ours → their folder → their model: the same tokens; and back from what they save."""
    transformers = pytest.importorskip("transformers")
    options = {"ffn_layer": "swiglu", "ffn_ratio": 6.0} if swiglu else {}
    source = vit(**options)
    written(source, tmp_path, "hf")
    theirs = transformers.DINOv3ViTModel.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        output = theirs(image).last_hidden_state
        expected = source.norm(source(image, is_training=True)["x_prenorm"])
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs.save_pretrained(tmp_path / "saved")
    again = vit(seed=5, **options)
    load_backbone(again, tmp_path / "saved")
    assert torch.equal(tokens(again, image), tokens(source, image))


def test_published_and_newer_layer_names(tmp_path, image):
    """`layer.N` and `model.layer.N` are the same file."""
    source = vit()
    written(source, tmp_path, "hf")
    state = load_file(tmp_path / "folder" / "model.safetensors")
    assert "layer.0.attention.q_proj.bias" in state
    assert "layer.0.attention.k_proj.bias" not in state
    renamed = {k.replace("layer.", "model.layer.", 1): v for k, v in state.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    again = vit(seed=5)
    load_backbone(again, tmp_path / "other.safetensors")
    assert torch.equal(tokens(again, image), tokens(source, image))


def test_names_of_timm(tmp_path):
    """The names that timm's vit_small_patch16_dinov3_qkvb has, as recorded from it."""
    state = load_file(written(vit(), tmp_path, "timm"))
    block = {k.removeprefix("blocks.0.") for k in state if k.startswith("blocks.0.")}
    kinds = ("weight", "bias")
    expected = {
        f"{m}.{k}" for m in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for k in kinds
    }
    expected |= {"attn.qkv.weight", "attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2"}
    assert block == expected
    assert {k for k in state if "blocks" not in k} == {
        "cls_token", "reg_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm.weight", "norm.bias",
    }  # fmt: skip


def test_timm_agrees(tmp_path, image):
    """Where timm can be imported (it needs torchvision), its own network gives the same tokens."""
    timm = pytest.importorskip("timm", exc_type=ImportError)
    source = vit(embed_dim=384, num_heads=6, depth=12)
    state = load_file(written(source, tmp_path, "timm"))
    model = timm.create_model("vit_small_patch16_dinov3_qkvb", pretrained=False, num_classes=0)
    model.load_state_dict(state)
    with torch.no_grad():
        output = model.eval().forward_features(image)
        expected = source.norm(source(image, is_training=True)["x_prenorm"])
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- files of a training run ---


def run_state(student, teacher):
    heads = torch.nn.Linear(2, 2)
    parts = {"student": student, "teacher": teacher, "model_ema": teacher}
    return torch.nn.ModuleDict(
        {n: torch.nn.ModuleDict({"backbone": b, "dino_head": heads}) for n, b in parts.items()}
    )


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_checkpoints_of_a_run(tmp_path, image, which):
    student, teacher = vit(seed=1), vit(seed=2)
    expected = tokens({"student": student, "teacher": teacher}[which], image)
    run = run_state(student, teacher)
    save_checkpoint(tmp_path / "ckpt" / "7", iteration=7, model=run)
    again = vit(seed=5)
    report = load_backbone(again, tmp_path / "ckpt" / "7", which=which)
    assert torch.equal(tokens(again, image), expected)
    assert report.description.format == "checkpoint"
    assert report.description.which == which
    with pytest.raises(WeightsError, match=r"A folder must be a checkpoint .*: give .*ckpt"):
        read_backbone(tmp_path)


def test_teacher_file_and_sharded_teacher(tmp_path, image):
    teacher = vit(seed=2)
    parts = torch.nn.ModuleDict({"backbone": teacher, "dino_head": torch.nn.Linear(2, 2)})
    torch.save({"teacher": parts.state_dict()}, tmp_path / "teacher_checkpoint.pth")
    whole = torch.nn.ModuleDict({"teacher": parts})
    save_checkpoint(tmp_path / "sharded", iteration=0, model=whole)
    save_checkpoint(tmp_path / "alone", iteration=0, model=teacher)
    for name in ("teacher_checkpoint.pth", "sharded", "alone"):
        again = vit(seed=5)
        load_backbone(again, tmp_path / name)
        assert torch.equal(tokens(again, image), tokens(teacher, image)), name


def test_nested_and_prefixed_state_dicts(tmp_path, image):
    source = vit()
    state = source.state_dict()
    for number, content in enumerate(
        [
            {"model": state},
            {"state_dict": {f"module.{k}": v for k, v in state.items()}},
            {f"backbone.{k}": v for k, v in state.items()},
            {"student": {f"backbone.{k}": v for k, v in state.items()}, "teacher": {}},
        ]
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        again = vit(seed=5)
        load_backbone(again, tmp_path / f"{number}.pth", which="student")
        assert torch.equal(tokens(again, image), tokens(source, image)), number


# --- what is filled in, and what is refused ---


def test_other_patch_size_and_absent_buffers(tmp_path, image):
    source = vit()
    state = source.state_dict()
    for key in list(state):
        if key.endswith(("periods", "bias_mask")) or key == "mask_token":
            del state[key]
    torch.save(state, tmp_path / "b.pth")
    again = vit(patch_size=8, seed=5)
    report = load_backbone(again, tmp_path / "b.pth")
    text = str(report)
    for part in (
        "patch size 16 → 8 (nearest)",
        "has no mask token",
        "no mask of the k bias",
    ):
        assert part in text
    enlarged = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(tokens(again, image), tokens(source, enlarged), rtol=1e-4, atol=1e-4)
    other = vit(patch_size=8, seed=5)
    load_backbone(other, tmp_path / "b.pth", patch_method="bicubic")
    assert not torch.allclose(tokens(again, image), tokens(other, image), atol=1e-2)


def test_masked_bias_into_a_plain_network(tmp_path, image):
    source = vit()
    torch.save(source.state_dict(), tmp_path / "b.pth")
    again = vit(seed=5, mask_k_bias=False)
    report = load_backbone(again, tmp_path / "b.pth")
    assert "The masked k bias is written as zeros" in report.notes
    torch.testing.assert_close(tokens(again, image), tokens(source, image))


def test_all_differences_are_listed(tmp_path):
    state = vit().state_dict()
    state["extra.weight"] = torch.ones(1)
    state["norm.weight"] = torch.ones(3)
    del state["cls_token"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(WeightsError) as caught:
        load_backbone(vit(), tmp_path / "b.pth")
    text = str(caught.value)
    for part in (
        "1 missing: cls_token",
        "1 unexpected: extra.weight",
        "norm.weight (3,) instead of (128,)",
    ):
        assert part in text


def test_k_bias_is_not_dropped_in_silence(tmp_path):
    source = vit(mask_k_bias=False)
    with torch.no_grad():
        source.blocks[0].attn.qkv.bias[128:256] = 1.0
    torch.save(source.state_dict(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="without a bias on k, got one"):
        load_backbone(vit(), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="no k bias"):
        write_backbone(source.state_dict(), tmp_path / "t.safetensors", "timm")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "an empty file"),
        ("b.pth", b"<?xml version='1.0'?><Error>AccessDenied</Error>", "a web page or an error"),
        (
            "c.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            "a pointer of git LFS",
        ),
        ("d.pth", b"PK\x03\x04 half a file", "complete file of tensors"),
        ("e.safetensors", b"\x10\x00", r"complete \.safetensors"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_backbone(tmp_path / name)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_else_is_unpickled(tmp_path, capsys):
    torch.save({"teacher": Evil()}, tmp_path / "e.pth")
    with pytest.raises(WeightsError, match="not unpickled"):
        read_backbone(tmp_path / "e.pth")
    assert "unpickled\n" not in capsys.readouterr().out


def test_other_wrong_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file or a folder"):
        read_backbone(tmp_path / "none.pth")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a DINOv3 ViT backbone, got .* such as a"):
        read_backbone(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "l.pth")
    with pytest.raises(WeightsError, match="must be a state dict"):
        read_backbone(tmp_path / "l.pth")
    with pytest.raises(WeightsError, match="must be one of teacher, student"):
        read_backbone(tmp_path / "a.pth", which="parent")
    state = vit().state_dict()
    with pytest.raises(WeightsError, match="must be one of meta, hf"):
        write_backbone(state, tmp_path / "x.pth", "onnx")
    with pytest.raises(WeightsError, match=r"must be .pth or .pt"):
        write_backbone(state, tmp_path / "x.bin", "meta")
    with pytest.raises(FileExistsError, match="`overwrite`"):
        write_backbone(state, tmp_path / "a.pth", "meta")
    write_backbone(state, tmp_path / "a.pth", "meta", overwrite=True)
    untied = vit(untie_cls_and_patch_norms=True).state_dict()
    for kind, name in (("hf", "folder"), ("timm", "t.safetensors")):
        with pytest.raises(WeightsError, match=r"must have no cls_norm"):
            write_backbone(untied, tmp_path / name, kind)
        assert not (tmp_path / name).exists()


def test_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "b.pth"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        write_backbone(vit().state_dict(), path, "meta", overwrite=True)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_description_makes_the_network(tmp_path, image):
    source = vit(untie_cls_and_patch_norms=True, ffn_layer="swiglu", ffn_ratio=6.0)
    path = written(source, tmp_path, "dinocell")
    described = read_backbone(path)[1]
    assert described.name == "ViT-128+/16"
    assert described.untied_norms == ("cls_norm",)
    assert described.num_parameters == sum(p.numel() for p in source.parameters())
    again = DinoVisionTransformer(**vit_arguments(described)).eval()
    load_backbone(again, path)
    assert torch.equal(tokens(again, image), tokens(source, image))
    assert len(sha256(path)) == 64
    config = json.loads((written(vit(), tmp_path, "hf") / "config.json").read_text())
    assert config["num_register_tokens"] == 4


@pytest.mark.parametrize("part", ["whole", "last rows"])
def test_a_download_that_was_cut_short_is_refused(tmp_path, part):
    """Zeros stand where the rest of the file is missing."""
    state = vit().state_dict()
    matrix = state["blocks.1.mlp.fc2.weight"]
    matrix[0 if part == "whole" else 100 :] = 0
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(WeightsError, match=r"got zeros in blocks.1.mlp.fc2.weight of .*cut short"):
        read_backbone(tmp_path / "cut.pth")


def test_a_classifier_is_left_out_with_a_note(tmp_path):
    state = vit().state_dict()
    torch.save(
        state | {"head.weight": torch.zeros(5, 128), "head.bias": torch.zeros(5)},
        tmp_path / "c.pth",
    )
    found, description = read_backbone(tmp_path / "c.pth")
    assert found.keys() == state.keys()
    assert "The classifier of the file is left out: head.weight, head.bias" in description.notes
