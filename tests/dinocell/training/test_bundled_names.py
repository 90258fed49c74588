"""Names of bundled models where a backbone is wanted: in pretraining, training, conversion."""

from __future__ import annotations

import pytest
import torch
import yaml
from small_runs import small_run

from dinocell.cli import main
from dinocell.errors import CheckpointError, DINOCellError
from dinocell.network.model import load_model
from dinocell.network.weights import convert_weights, find_weights
from dinocell.probing.backbones import load_backbone_of

# Of one iteration with a learning rate of 0, so that its teacher is what it started from.
STILL = """
student: {arch: vit_tiny, patch_size: 8, n_storage_tokens: 4, drop_path_rate: 0.0}
dino: {head_n_prototypes: 16, head_hidden_dim: 16, head_bottleneck_dim: 8}
ibot: {head_n_prototypes: 16, head_hidden_dim: 16, head_bottleneck_dim: 8}
compute_precision: {param_dtype: fp32}
crops: {global_crops_size: 16, local_crops_size: 8, local_crops_number: 1}
train: {batch_size_per_gpu: 2, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 1}
optim: {epochs: 1, warmup_epochs: 0, freeze_last_layer_epochs: 0, lr: 0.0, min_lr: 0.0}
teacher: {warmup_teacher_temp_epochs: 0, momentum_teacher: 1.0, final_momentum_teacher: 1.0}
accelerator: {device: cpu}
monitor: {enabled: false}
"""
NO_BACKBONE = {
    "dinocell-nuclei": "a model of convolutions",
    "dinocell-fast": "an exported graph",
}


def exit_code(*command: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(command))
    return int(stop.value.code or 0)


def of_bundled(name: str) -> dict[str, torch.Tensor]:
    return load_model(name).backbone.vit.state_dict()


@pytest.fixture
def still(tmp_path, pictures):
    """Arguments of a pretraining that changes nothing."""
    config = tmp_path / "still.yaml"
    config.write_text(STILL)
    data = f"train.dataset_path=ImageFolder:root={pictures}"
    return [str(config), "--output-dir", str(tmp_path / "out"), data]


@pytest.fixture
def training(tmp_path, blob_data):
    """A configuration file of one step with a frozen backbone, and its output folder."""
    mapping = small_run(
        blob_data,
        tmp_path / "trained",
        backbone__frozen=True,
        model__patch_size=8,
        schedule__steps=1,
    )
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(mapping))
    return str(config), tmp_path / "trained"


def test_pretraining_starts_from_a_bundled_model(still, tmp_path):
    assert exit_code("pretrain", *still, "student.pretrained_weights=dinocell-tiny") == 0
    path = tmp_path / "out" / "eval" / "training_0" / "teacher_checkpoint.pth"
    found = torch.load(path, weights_only=True)["teacher"]
    expected = of_bundled("dinocell-tiny")
    assert len(expected) > 150
    for name, value in expected.items():
        if name.endswith("qkv.bias_mask"):
            continue  # the network that is pretrained has zeros for the k bias instead
        if name.endswith("qkv.bias"):
            value = value * expected[f"{name}_mask"]
        own = found[f"backbone.{name}"]  # the RoPE periods in bfloat16, as upstream
        assert torch.equal(own, value.to(own.dtype)), name


def test_training_starts_from_a_bundled_backbone(training):
    config, out = training
    assert exit_code("train", config, "backbone.weights=dinocell-tiny") == 0
    found = load_model(out / "model.safetensors")
    assert found.card["start"] == "dinocell-tiny"
    expected = of_bundled("dinocell-tiny")
    assert found.backbone.vit.state_dict().keys() == expected.keys()
    for name, value in found.backbone.vit.state_dict().items():
        assert torch.equal(value, expected[name]), name
    decoder = load_model("dinocell-tiny").decoder.state_dict()
    assert not torch.equal(found.decoder.state_dict()["head.weight"], decoder["head.weight"])


@pytest.mark.parametrize(("name", "kind"), NO_BACKBONE.items())
def test_models_without_a_transformer(name, kind, still, training, tmp_path, capsys):
    """One sentence at each door, and no run begins."""
    for command in (
        ["pretrain", *still, f"student.pretrained_weights={name}"],
        ["train", training[0], f"backbone.weights={name}"],
    ):
        assert exit_code(*command) in (1, 2)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in lines if "error" in line]) == 1
        assert f"ViT backbone, got {find_weights(name)}, {kind}" in lines[-1]
        assert "Traceback" not in "".join(lines)
    assert not list(tmp_path.rglob("*.pth")) + list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(CheckpointError, match=f"must hold a DINOv3 ViT backbone, got .*{kind}"):
        convert_weights(name, tmp_path / "b.pth")
    with pytest.raises(DINOCellError, match=f"must have a transformer, got {name} "):
        load_backbone_of(name)
