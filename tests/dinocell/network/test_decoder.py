"""Decoders: sizes, widths, cost, and that every option acts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinocell.errors import ConfigError
from dinocell.network.decoder import UNetDecoder, create_decoder, unet_widths
from dinocell.network.info import count_macs, model_cost
from dinocell.network.model import create_dinocell_model


def features(dim: int, patch: int, height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, dim, height // patch, width // patch, generator=generator) for _ in range(4)
    ]


@pytest.mark.parametrize("patch", [4, 8, 14, 16])
@pytest.mark.parametrize("name", ["unet", "unet_wide", "linear"])
def test_output_has_the_size_of_the_input(name, patch):
    height, width = 3 * patch, 5 * patch
    decoder = create_decoder(name, 32, patch).eval()
    image = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        assert decoder(features(32, patch, height, width), image).shape == (2, 1, height, width)


@pytest.mark.parametrize("name", ["detail", "fpn"])
@pytest.mark.parametrize("patch", [4, 8, 16])
def test_decoders_with_a_pyramid_have_the_size_of_the_input_and_see_both(name, patch):
    height, width = 3 * patch, 5 * patch
    decoder = create_decoder(name, 32, patch).eval()
    image, maps = torch.zeros(2, 3, height, width), features(32, patch, height, width)
    with torch.no_grad():
        before = decoder(maps, image)
        assert before.shape == (2, 1, height, width)
        assert not torch.equal(decoder(maps, image + 1), before)
        for depth in range(4):
            changed = [value + (index == depth) for index, value in enumerate(maps)]
            assert not torch.equal(decoder(changed, image), before)


@pytest.mark.parametrize("name", ["detail", "fpn"])
def test_decoders_with_a_pyramid_keep_pixels_at_their_place(name):
    decoder = create_decoder(name, 32, 16).eval()
    image, maps = torch.zeros(1, 3, 128, 128), features(32, 16, 128, 128)
    maps = [value[:1] for value in maps]
    spot = image.clone()
    spot[..., 37, 82] = 5.0
    with torch.no_grad():
        change = (decoder(maps, spot) - decoder(maps, image)).abs()[0, 0]
    rows, columns = torch.nonzero(change > 0.3 * change.max(), as_tuple=True)
    assert abs(float(rows.float().mean()) - 37) < 6
    assert abs(float(columns.float().mean()) - 82) < 6


@pytest.mark.parametrize("name", ["detail", "fpn"])
def test_convolutions_alone_are_small_and_see_the_image(name):
    model = create_dinocell_model("conv", patch_size=16, decoder=name).eval()
    assert sum(p.numel() for p in model.parameters()) < 1e6
    with torch.no_grad():
        empty, deepest = model.map_and_features(torch.zeros(1, 3, 64, 96))
        assert empty.shape == (1, 1, 64, 96)
        assert [level.shape[1] for level in deepest] == [32, 64, 96, 128]
        assert deepest[-1].shape == (1, 128, 4, 6)
        assert not torch.equal(model(torch.ones(1, 3, 64, 96)), empty)
    assert model_cost(model, 64).backbone_macs > 0
    deeper = create_dinocell_model("conv", patch_size=32, decoder=name).eval()
    with torch.no_grad():
        assert deeper.map_and_features(torch.zeros(1, 3, 64, 96))[1][-1].shape == (1, 192, 2, 3)


def test_compressed_intensities_by_hand():
    from dinocell.network.model import compress_intensities
    from dinocell.segmentation.intensity import to_model_input

    gray = np.array([[0.0, 0.01, 0.1, 1.0]], np.float32)
    seen = compress_intensities(torch.from_numpy(to_model_input(gray))[None])[0, :, 0]
    np.testing.assert_allclose(seen[0], gray[0] * 2 - 1, atol=1e-5)
    np.testing.assert_allclose(seen[1, 2], 2 * np.arcsinh(1) / np.arcsinh(10) - 1, atol=1e-5)
    np.testing.assert_allclose(seen[2, 1], 2 * np.arcsinh(1) / np.arcsinh(100) - 1, atol=1e-5)
    np.testing.assert_allclose(seen[:, 3], 1.0, atol=1e-5)
    options = {"patch_size": 16, "decoder": "detail"}
    torch.manual_seed(0)
    model = create_dinocell_model("conv", **options, intensities="compressed").eval()
    torch.manual_seed(0)
    plain = create_dinocell_model("conv", **options).eval()
    image = torch.rand(1, 1, 32, 32).expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert not torch.allclose(model(image), plain(image))
        assert torch.equal(model(image), plain(compress_intensities(image)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 14, "decoder": "detail"}, "must be 4, 8 or 16"),
        ({"patch_size": 14, "decoder": "fpn"}, "must be 4, 8 or 16 for decoder fpn"),
        ({"size": "conv", "patch_size": 16}, "conv must have decoder detail or fpn"),
        ({"size": "conv", "decoder": "detail"}, "must be one of 16, 32, got 8"),
        ({"decoder": "detail", "patch_size": 32}, "must be one of 4, 8, 14, 16, got 32"),
        ({"intensities": "colour"}, "gray, compressed"),
    ],
)
def test_networks_that_do_not_exist(options, message):
    with pytest.raises(ConfigError, match=message):
        create_dinocell_model(**{"window_px": 224, "overlap_px": 0, **options})


def test_widths_of_the_design():
    assert unet_widths(384, 8) == ((128, 64, 32), 32)
    assert len(unet_widths(384, 16)[0]) == 4
    assert len(unet_widths(384, 4)[0]) == 2


@pytest.mark.parametrize("depth", range(4))
def test_every_feature_map_reaches_the_output(depth):
    decoder = create_decoder("unet", 32, 8).eval()
    maps = features(32, 8, 32, 32)
    image = torch.zeros(2, 3, 32, 32)
    with torch.no_grad():
        before = decoder(maps, image)
        maps[depth] = maps[depth] + 1.0
        assert (decoder(maps, image) - before).abs().max() > 1e-5


def test_image_skip_sees_the_image_and_only_then():
    maps = features(32, 8, 32, 32)
    dark, bright = torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)
    with torch.no_grad():
        plain = create_decoder("unet", 32, 8).eval()
        assert torch.equal(plain(maps, dark), plain(maps, bright))
        skip = create_decoder("unet", 32, 8, image_channels=4).eval()
        assert not torch.equal(skip(maps, dark), skip(maps, bright))


def test_linear_puts_pixels_in_their_patch():
    decoder = create_decoder("linear", 8, 4)
    with torch.no_grad():
        decoder.head.weight.zero_()
        decoder.head.bias.copy_(torch.arange(16.0))
        out = decoder(features(8, 4, 8, 8), torch.zeros(2, 3, 8, 8))
    expected = torch.arange(16.0).reshape(4, 4).tile(2, 2)
    assert torch.equal(out[0, 0], expected)


def test_wrong_options():
    with pytest.raises(ValueError, match="unet, unet_wide, linear"):
        create_decoder("mlp", 8, 8)
    with pytest.raises(ValueError, match="must be 0 for decoder linear"):
        create_decoder("linear", 8, 8, image_channels=3)
    with pytest.raises(ValueError, match="at least 4 widths"):
        UNetDecoder(8, 16, stages=(8, 8))


def test_fvcore_counts_a_convolution_and_attention_by_hand():
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert sum(count_macs(convolution, (torch.zeros(1, 3, 10, 12),)).values()) == 3 * 5 * 9 * 120

    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    counted = count_macs(Attention(), (torch.zeros(2, 3, 50, 16),))
    assert sum(counted.values()) == 2 * 3 * 50 * 50 * 16 * 2


@pytest.mark.parametrize(("size", "patch"), [("tiny", 8), ("tiny", 16), ("small", 16)])
def test_default_decoder_costs_at_most_a_fifth(size, patch):
    window = 224 // patch * patch
    model = create_dinocell_model(
        size, patch_size=patch, window_px=window, overlap_px=0, image_channels=8
    )
    cost = model_cost(model, window)
    assert cost.decoder_share <= 0.20
    assert cost.backbone_parameters == sum(p.numel() for p in model.backbone.parameters())


def test_small_8_costs_what_the_design_says():
    cost = model_cost(create_dinocell_model("small", patch_size=8), 256)
    assert cost.backbone_macs == pytest.approx(31.7e9, rel=0.02)
    assert cost.decoder_macs == pytest.approx(5.5e9, rel=0.06)
    assert cost.decoder_share <= 0.20
    assert cost.decoder_parameters == pytest.approx(0.73e6, rel=0.05)
    wide = model_cost(create_dinocell_model("small", patch_size=8, decoder="unet_wide"), 64)
    assert wide.decoder_macs > wide.backbone_macs
    assert wide.decoder_parameters == pytest.approx(3.67e6, rel=0.02)


def test_cost_needs_whole_patches():
    with pytest.raises(ValueError, match="multiple of the patch size 16"):
        model_cost(create_dinocell_model("tiny", patch_size=16), 100)
