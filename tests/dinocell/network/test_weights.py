"""`dinocell weights`: conversion, description, names of released backbones, wrong calls."""

from __future__ import annotations

import pytest
import torch

from dinocell.cli import main
from dinocell.errors import UsageError
from dinocell.network.backbone import DINOv3Backbone
from dinocell.network.model import bundled_models
from dinocell.network.weights import (
    RELEASED,
    cache_folder,
    convert_weights,
    describe_weights,
    find_weights,
)
from dinocell.probing.backbones import load_backbone_of


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "b16.pth"
    torch.manual_seed(0)
    torch.save(DINOv3Backbone("tiny", patch_size=16).vit.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.delenv("DINOCELL_WEIGHTS_MIRROR", raising=False)
    monkeypatch.delenv("DINOCELL_OFFLINE", raising=False)


# --- convert and info ---


def test_convert_and_train_from_it(capsys, backbone, tmp_path):
    """patch 16 → 8, meta → hf → timm → dinocell → meta; each step is described."""
    steps = [
        ("hf", "folder"),
        ("timm", "t.safetensors"),
        ("dinocell", "d.safetensors"),
        ("meta", "m.pth"),
    ]
    source = backbone
    for number, (kind, name) in enumerate(steps):
        extra = ["--patch-size", "8"] if number == 0 else []
        target = tmp_path / name
        code, out, err = call(capsys, "weights", "convert", source, target, "--to", kind, *extra)
        assert code == 0, err
        assert f"({kind})" in out
        assert ("patch size 16 → 8 (nearest)" in out) == (number == 0)
        code, out, _ = call(capsys, "weights", "info", target)
        assert code == 0
        assert "ViT-Ti/8" in out
        source = target
    before = torch.load(backbone, weights_only=True)
    after = torch.load(source, weights_only=True)
    kernel = before["patch_embed.proj.weight"].unflatten(3, (8, 2)).unflatten(2, (8, 2)).sum((3, 5))
    torch.testing.assert_close(after["patch_embed.proj.weight"], kernel)
    assert torch.equal(after["blocks.3.attn.qkv.weight"], before["blocks.3.attn.qkv.weight"])


def test_format_follows_the_ending(backbone, tmp_path):
    assert "(dinocell)" in convert_weights(backbone, tmp_path / "x.safetensors")
    assert "(hf)" in convert_weights(backbone, tmp_path / "x")
    with pytest.raises(UsageError, match=r"`target` must end in .pth or .safetensors"):
        convert_weights(backbone, tmp_path / "x.bin")
    with pytest.raises(UsageError, match="`patch_method` must come with `patch_size`, got bicubic"):
        convert_weights(backbone, tmp_path / "y.pth", patch_method="bicubic")
    with pytest.raises(
        UsageError, match=r"`patch_method` must be one of nearest, .*, got best: choose"
    ):
        convert_weights(backbone, tmp_path / "y.pth", patch_size=16, patch_method="best")


def test_options_change_the_result(backbone, tmp_path):
    kernels = {}
    for method in ("nearest", "bilinear", "bicubic"):
        path = tmp_path / f"{method}.pth"
        convert_weights(backbone, path, patch_size=8, patch_method=method)
        kernels[method] = torch.load(path, weights_only=True)["patch_embed.proj.weight"]
    assert not torch.allclose(kernels["nearest"], kernels["bilinear"])
    assert not torch.allclose(kernels["bilinear"], kernels["bicubic"])


def test_student_or_teacher(tmp_path):
    states = [DINOv3Backbone("tiny").vit.state_dict() for _ in range(2)]
    states[1]["cls_token"] = states[1]["cls_token"] + 1
    content = {
        name: {f"backbone.{k}": v for k, v in state.items()}
        for name, state in zip(("student", "teacher"), states, strict=True)
    }
    torch.save(content, tmp_path / "both.pth")
    for name, state in zip(("student", "teacher"), states, strict=True):
        convert_weights(tmp_path / "both.pth", tmp_path / f"{name}.pth", which=name)
        assert torch.equal(torch.load(tmp_path / f"{name}.pth")["cls_token"], state["cls_token"])


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_models_load(name):
    """None is taken for a file that was cut short."""
    from dinocell.network.model import load_model

    assert load_model(name).card


def test_a_model_gives_its_backbone(capsys, tmp_path):
    if not bundled_models():
        pytest.skip("no bundled model in this tree")
    from dinocell.network.model import load_model
    from dinocell.network.weights import BUNDLED_FOLDER

    path = BUNDLED_FOLDER / "dinocell-tiny.safetensors"
    assert "ViT-Ti/8" in describe_weights(path)
    assert describe_weights("dinocell-tiny") == describe_weights(path), "by its name"
    convert_weights(path, tmp_path / "b.pth")
    state = torch.load(tmp_path / "b.pth", weights_only=True)
    expected = load_model("dinocell-tiny").backbone.vit.state_dict()
    assert torch.equal(state["blocks.5.mlp.fc1.weight"], expected["blocks.5.mlp.fc1.weight"])
    code, out, _ = call(capsys, "weights", "info", path)
    assert code == 0
    assert "thresholds" in out, "a whole model is described as one"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["weights", "convert", "none.pth", "o.pth"], 2, "must be a file or a folder"),
        (["weights", "convert", "IN", "IN"], 2, "OUT must not be IN"),
        (["weights", "convert", "IN", "o.pth", "--to", "onnx"], 2, "must be one of meta, hf"),
        (["weights", "convert", "IN", "o.pth", "--which", "aunt"], 2, "teacher or student"),
        (["weights", "convert", "IN", "o.pth", "--patch-size", "8", "--patch-method", "x"], 2,
         "--patch-method must be one of"),
        (["weights", "convert", "BAD", "o.pth"], 1, "a web page"),
        (["weights", "info", "BAD"], 1, "a web page"),
        (["weights", "fetch", "a/b"], 2, "NAME must be one of"),
        (["weights", "fetch", "mine.pth"], 2, "--from must name a folder or URL"),
        (["weights", "fetch", "dinov3_vits16"], 2, "accept its licence"),
        (["weights", "fetch", "dinov3_vits16", "--from", "nowhere"], 2, "--from must hold"),
    ],
)  # fmt: skip
def test_wrong_calls(capsys, backbone, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"<html>sign in</html>")
    places = {"IN": backbone, "BAD": tmp_path / "bad.pth"}
    found, _, err = call(capsys, *(places.get(a, a) for a in arguments))
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "o.pth").exists()


def test_existing_output_is_kept(capsys, backbone, tmp_path):
    target = tmp_path / "o.pth"
    target.write_bytes(b"mine")
    code, _, err = call(capsys, "weights", "convert", backbone, target)
    assert (code, "--overwrite" in err) == (2, True)
    assert target.read_bytes() == b"mine"
    assert call(capsys, "weights", "convert", backbone, target, "--overwrite")[0] == 0


def test_a_name_stands_for_its_fetched_file(capsys, backbone, tmp_path):
    cached = tmp_path / "cache" / RELEASED["dinov3_vits16"]
    with pytest.raises(UsageError, match="must be downloaded by you"):
        find_weights("dinov3_vits16")
    cached.parent.mkdir()
    cached.write_bytes(backbone.read_bytes())
    assert find_weights("dinov3_vits16") == cached
    assert find_weights(backbone) == backbone
    code, out, _ = call(capsys, "weights", "info", "dinov3_vits16")
    assert (code, "patch 16" in out) == (0, True)
    assert load_backbone_of("dinov3_vits16").facts["patch_size"] == 16


def test_list_names_what_is_here(capsys, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / RELEASED["dinov3_vitb16"]).write_bytes(b"x")
    _, out, _ = call(capsys, "weights", "list")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "not here" in lines["dinov3_vits16"]
    assert "not here" not in lines["dinov3_vitb16"]


def test_without_a_home_the_folder_must_be_named(monkeypatch):
    monkeypatch.delenv("DINOCELL_WEIGHTS")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user number
    with pytest.raises(UsageError, match="set DINOCELL_WEIGHTS"):
        cache_folder()
