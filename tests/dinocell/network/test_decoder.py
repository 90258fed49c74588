"""Decoders: sizes, widths, cost, and that every option acts."""

from __future__ import annotations

import pytest
import torch

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
        create_decoder("fpn", 8, 8)
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
