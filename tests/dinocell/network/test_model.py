"""The network, its file, and every file that is not one."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dinocell.errors import CheckpointError, ConfigError, UsageError
from dinocell.network.backbone import (
    DINOv3Backbone,
    feature_blocks,
    load_backbone_weights,
)
from dinocell.network.model import (
    DINOCell,
    create_dinocell_model,
    load_model,
    read_model_header,
    resolve_device,
    save_model,
    with_config,
)


def test_blocks_read():
    assert feature_blocks(12) == (2, 5, 8, 11)
    assert feature_blocks(24) == (4, 11, 17, 23)
    assert feature_blocks(4) == (0, 1, 2, 3)
    assert feature_blocks(8) == (1, 3, 5, 7)
    with pytest.raises(ValueError, match="at least 4"):
        feature_blocks(3)


def test_forward_shape_and_range(small_model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        out = small_model(torch.randn(2, 3, 48, 64, generator=generator))
    assert out.shape == (2, 1, 48, 64)
    assert out.dtype == torch.float32
    assert out.min() >= 0
    assert out.max() <= 1
    assert out.std() > 0.01


def test_backbone_returns_four_maps_of_the_patch_grid():
    backbone = DINOv3Backbone("tiny", patch_size=8).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 16, 40))
    assert [tuple(item.shape) for item in maps] == [(1, 192, 2, 5)] * 4


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 30, 32), (1, 3, 0, 32)])
def test_wrong_input_shapes(small_model, shape):
    with pytest.raises(ValueError, match="`image` must"):
        small_model(torch.zeros(shape))


def test_options_of_create(small_model):
    assert create_dinocell_model("tiny", patch_size=16, target="linear").config.target == "linear"
    with pytest.raises(ConfigError, match="did you mean window_px"):
        create_dinocell_model("tiny", window=64)
    scaled = create_dinocell_model("tiny", patch_size=16, layerscale_init=0.25)
    assert scaled.backbone.vit.blocks[3].ls1.gamma[0].item() == 0.25
    model = create_dinocell_model("tiny", patch_size=16, drop_path_rate=0.9, layerscale_init=1.0)
    model.train()
    image = torch.ones(4, 3, 32, 32)
    with torch.no_grad():
        first, second = model.backbone(image)[-1], model.backbone(image)[-1]
    assert not torch.equal(first, second)


def test_file_round_trip(small_model, tmp_path):
    path = tmp_path / "m.safetensors"
    small_model.card["licence"] = "CC0"
    save_model(path, small_model)
    again = DINOCell.from_pretrained(path)
    assert again.config == small_model.config
    assert again.card["licence"] == "CC0"
    assert not again.training
    for key, value in small_model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert list(tmp_path.iterdir()) == [path]  # no temporary file left


def test_half_is_half_the_size_and_loads_as_float32(small_model, tmp_path):
    save_model(tmp_path / "full.safetensors", small_model)
    small_model.save(tmp_path / "half.safetensors", half=True)
    full, half = (tmp_path / f"{name}.safetensors" for name in ("full", "half"))
    assert half.stat().st_size < 0.55 * full.stat().st_size
    model = load_model(half)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    image = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        difference = (model(image) - small_model(image)).abs().max()
    assert 0 < difference < 0.02


def test_with_config_keeps_a_subclass(small_model):
    class Mine(DINOCell):
        pass

    mine = Mine(small_model.config)
    assert type(with_config(mine, peak_threshold=0.8)) is Mine


def test_with_config_shares_weights_and_leaves_the_original(small_model):
    other = with_config(small_model, peak_threshold=0.8)
    assert other.config.peak_threshold == 0.8
    assert small_model.config.peak_threshold != 0.8
    assert other.decoder is small_model.decoder
    with pytest.raises(ConfigError, match=r"model.fill_threshold. < .model.peak_threshold"):
        with_config(small_model, peak_threshold=0.01)


class TestFilesThatAreNoModel:
    def test_missing(self):
        with pytest.raises(UsageError, match="file or a bundled name"):
            load_model("no-such-model")

    def test_a_size_is_no_model(self):
        with pytest.raises(UsageError, match="are not models"):
            load_model("small")

    def test_truncated(self, small_model, tmp_path):
        path = tmp_path / "m.safetensors"
        save_model(path, small_model)
        whole = path.read_bytes()
        for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match="must be"):
                load_model(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_pickled(self, tmp_path, zipped):
        path = tmp_path / "m.pth"
        if zipped:
            torch.save({"a": torch.zeros(2)}, path)
        else:
            path.write_bytes(pickle.dumps({"a": np.zeros(2)}))
        with pytest.raises(CheckpointError, match="pickled PyTorch checkpoint"):
            load_model(path)

    def test_error_page(self, tmp_path):
        path = tmp_path / "m.safetensors"
        path.write_text("<?xml version='1.0'?><Error>AccessDenied</Error>")
        with pytest.raises(CheckpointError, match="error page"):
            load_model(path)

    def test_foreign_safetensors(self, tmp_path):
        path = tmp_path / "m.safetensors"
        save_file({"a": torch.zeros(2)}, path)
        with pytest.raises(CheckpointError, match="without it"):
            read_model_header(path)

    def rewrite(self, path, change):
        header = read_model_header(path)
        state = load_file(path)
        change(header, state)
        save_file(state, path, metadata={"dinocell": json.dumps(header)})

    def test_another_architecture(self, small_model, tmp_path):
        path = tmp_path / "m.safetensors"
        save_model(path, small_model)
        self.rewrite(path, lambda header, state: header["model"].update(size="small"))
        with pytest.raises(
            CheckpointError, match=r"must fit its header \(small/16, unet\).* misshapen: "
        ):
            load_model(path)

    def test_missing_tensor(self, small_model, tmp_path):
        path = tmp_path / "m.safetensors"
        save_model(path, small_model)
        self.rewrite(path, lambda header, state: state.pop("decoder.head.bias"))
        with pytest.raises(CheckpointError, match=r"decoder\.head\.bias"):
            load_model(path)

    def test_newer_format_and_unknown_option(self, small_model, tmp_path):
        path = tmp_path / "m.safetensors"
        save_model(path, small_model)
        self.rewrite(path, lambda header, state: header["model"].update(flux=1))
        with pytest.raises(CheckpointError, match="known architecture"):
            load_model(path)
        self.rewrite(path, lambda header, state: header.update(format=99))
        with pytest.raises(CheckpointError, match="update dinocell"):
            load_model(path)


class TestBackboneWeights:
    def test_load(self, tmp_path):
        source, target = DINOv3Backbone("tiny"), DINOv3Backbone("tiny")
        torch.save(source.vit.state_dict(), tmp_path / "b.pth")
        load_backbone_weights(target, tmp_path / "b.pth")
        assert torch.equal(source.vit.patch_embed.proj.weight, target.vit.patch_embed.proj.weight)
        save_file(source.vit.state_dict(), tmp_path / "b.safetensors")
        load_backbone_weights(DINOv3Backbone("tiny"), tmp_path / "b.safetensors")

    def test_another_patch_size_is_adapted(self, tmp_path):
        source = DINOv3Backbone("tiny", patch_size=16)
        torch.save(source.vit.state_dict(), tmp_path / "b.pth")
        target = DINOv3Backbone("tiny", patch_size=8)
        assert "patch size 16 → 8 (nearest)" in load_backbone_weights(target, tmp_path / "b.pth")
        image = torch.randn(1, 3, 32, 48)
        enlarged = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
        with torch.no_grad():
            for small, large in zip(target.eval()(image), source.eval()(enlarged), strict=True):
                torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-5)

    def test_other_keys(self, tmp_path):
        state = DINOv3Backbone("tiny", patch_size=8).vit.state_dict()
        state["extra"] = torch.zeros(1)
        state["cls_token"] = torch.zeros(1, 1, 7)
        del state["norm.weight"]
        torch.save(state, tmp_path / "b.pth")
        with pytest.raises(CheckpointError) as caught:
            load_backbone_weights(DINOv3Backbone("tiny", patch_size=8), tmp_path / "b.pth")
        for part in ("1 missing: norm.weight", "1 unexpected: extra", "(1, 1, 7) instead of"):
            assert part in str(caught.value)

    def test_no_state_dict(self, tmp_path):
        (tmp_path / "b.pth").write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match="complete file of tensors"):
            load_backbone_weights(DINOv3Backbone("tiny"), tmp_path / "b.pth")
        torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match="DINOv3 ViT backbone"):
            load_backbone_weights(DINOv3Backbone("tiny"), tmp_path / "b.pth")
        with pytest.raises(UsageError, match="check the path"):
            load_backbone_weights(DINOv3Backbone("tiny"), tmp_path / "none.pth")

    def test_unknown_size(self):
        with pytest.raises(ValueError, match="tiny, small, base, large"):
            DINOv3Backbone("huge")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match="auto, cpu, cuda"):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="`device` must exist"):
        resolve_device("cuda:99")
