"""Random weights, pixels and a thumbnail: what each baseline is, and that it is nothing else."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from dinocell.pairs import find_pairs
from dinocell.probing import inspection
from dinocell.probing.backbones import InspectedBackbone
from dinocell.probing.baselines import PixelBackbone, principal_components, with_random_weights
from dinocell.probing.decoder_probe import ProbeConfig, probe_features
from dinocell.probing.feature_extraction import FieldImage, ViewExample, ViewFeatures, extract_views
from dinocell.probing.labelled_windows import read_windows


@pytest.fixture
def fields():
    rng = np.random.default_rng(2)
    return [FieldImage(f"f{n}", ("DNA", "ER"), rng.integers(0, 999, (2, 48, 48))) for n in range(3)]


def test_pixels_are_their_own_features(fields):
    found = extract_views(
        PixelBackbone(8, 4), fields, window_px=16, windows_per_field=4, attention=False
    )
    assert found.cls.shape == (36, 16)
    assert found.patch.shape == (36, 4, 16)
    np.testing.assert_allclose(found.cls.mean(axis=1), 0, atol=1e-6)
    # A window that is turned has the same numbers in another order.
    np.testing.assert_allclose(
        np.sort(found.turned["cls"], axis=1), np.sort(found.cls, axis=1), atol=1e-6
    )
    reduced = principal_components(found)
    centred = found.cls - found.cls.mean(axis=0)
    np.testing.assert_allclose(reduced.cls @ reduced.cls.T, centred @ centred.T, atol=1e-4)


def test_random_weights_pass_the_image_and_leave_the_generator(mini_model):
    vit = mini_model.backbone.vit
    before = torch.random.get_rng_state()
    first, again, other = (with_random_weights(vit, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    batch = torch.rand(2, 3, 32, 32)
    a, b, c = (made.forward_features(batch)["x_norm_patchtokens"] for made in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)
    assert (a[0] - a[1]).abs().mean() > 0.05


def scaled(vit, factor):
    """Other weights in the same shape."""
    made = copy.deepcopy(vit)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(factor)
    return made


def test_nothing_of_the_checkpoint_is_left_in_random_weights(mini_model):
    """Two checkpoints of one shape have the same baseline, which is none of them."""
    vit = mini_model.backbone.vit
    first, second = (with_random_weights(made, 0) for made in (vit, scaled(vit, 3.0)))
    own = dict(vit.named_parameters())
    assert not first.training
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
        assert not one.requires_grad
        if one.ndim > 1 and "mask_token" not in name:
            assert not torch.allclose(one, own[name], atol=1e-3), name
        if name.endswith(".gamma"):
            assert (one == 1).all(), name


def inspected_backbone(vit, name="net"):
    facts = {"patch_size": 16, "embed_dim": 48, "depth": len(vit.blocks), "num_heads": 3}
    return InspectedBackbone(name, vit, facts)


def test_baselines_of_a_checkpoint_are_random_weights_pixels_and_a_thumbnail(mini_model):
    vit = mini_model.backbone.vit
    made = {
        name: network for name, network, _ in inspection._baselines([inspected_backbone(vit)], 5)
    }
    assert list(made) == ["random weights", "pixels (PCA)", "4x4 thumbnail"]
    for one, expected in zip(
        made["random weights"].parameters(), with_random_weights(vit, 5).parameters(), strict=True
    ):
        assert torch.equal(one, expected)
    batch = torch.rand(1, 3, 64, 64).round()
    pixels, small = (
        made[name].forward_features(batch)["x_norm_clstoken"][0]
        for name in ("pixels (PCA)", "4x4 thumbnail")
    )
    halves = batch[0, 0].reshape(32, 2, 32, 2).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(pixels, halves - halves.mean())
    cells = batch[0, 0].reshape(4, 16, 4, 16).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(small, cells - cells.mean())


def test_one_random_network_per_shape(mini_model):
    vit = mini_model.backbone.vit
    deeper = copy.deepcopy(vit)
    deeper.blocks.append(copy.deepcopy(vit.blocks[0]))
    found = [
        inspected_backbone(net, name)
        for name, net in (("a", vit), ("b", scaled(vit, 2)), ("c", deeper))
    ]
    made = [(name, facts.get("shape_of")) for name, _, facts in inspection._baselines(found, 0)]
    assert made[:2] == [("random weights 1", "a"), ("random weights 2", "c")]


def test_patch_tokens_of_pixels_are_the_patches_row_by_row():
    batch = torch.rand(2, 1, 8, 12).expand(2, 3, 8, 12)
    found = PixelBackbone(4, 32).forward_features(batch)["x_norm_patchtokens"]
    assert found.shape == (2, 6, 16)
    for place in range(6):
        row, column = divmod(place, 3)
        patch = batch[:, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        torch.testing.assert_close(found[:, place], patch - patch.mean(dim=1, keepdim=True))


def test_the_decoder_sees_each_pixel_in_its_place_with_its_brightness():
    """Pixels of patches, put side by side again, are the image."""
    batch = torch.rand(2, 1, 8, 12).expand(2, 3, 8, 12)
    options = {"n": [0], "reshape": True, "norm": True}
    (found,) = PixelBackbone(4, 32).get_intermediate_layers(batch, **options)
    torch.testing.assert_close(functional.pixel_shuffle(found, 4), batch[:, :1])
    (small,) = PixelBackbone(4, 2).get_intermediate_layers(batch, **options)
    halves = functional.avg_pool2d(batch[:, :1], 2)
    torch.testing.assert_close(functional.pixel_shuffle(small, 2), halves)


def test_a_decoder_learns_bright_cells_from_pixels(blob_data):
    pairs = find_pairs(blob_data / "images", blob_data / "labels")
    windows = read_windows(pairs, window_px=48, windows_per_image=1)
    config = ProbeConfig(window_px=48, steps=20, batch_size=4)
    for edge in (32, 4):
        found = probe_features(PixelBackbone(8, edge), windows[:4], windows[4:], config)
        assert found.scores["ap50"] > 0.5


def random_basis(rng, rows, columns):
    return np.linalg.qr(rng.normal(size=(rows, columns)))[0]


@pytest.mark.parametrize("kind", ["cls", "patch_mean", "patch"])
def test_principal_components_of_known_directions(kind):
    """Features made of 80 directions of known sizes: the first 64 come back, largest first."""
    rng = np.random.default_rng(0)
    count, dim, sizes = 240, 80, np.linspace(100, 20, 80)
    weights = rng.normal(size=(count, dim))
    weights = np.linalg.qr(weights - weights.mean(axis=0))[0]  # columns of mean 0 and length 1
    directions = random_basis(rng, dim, dim).T
    upright = weights * sizes @ directions + 500 * rng.normal(size=dim)
    # Turned, all have more of the second direction, and differ from each other as upright.
    moved = upright + 30 * directions[1]

    def shaped(name, values):
        values = values if name == kind else rng.normal(size=values.shape)
        shape = (count // 4, 4, dim) if name == "patch" else (count, dim)
        return values.astype(np.float32).reshape(shape)

    kinds = ("cls", "patch_mean", "patch")
    features = ViewFeatures(
        fields=[],
        channels=[],
        locations=np.arange(count),
        **{name: shaped(name, upright) for name in kinds},
        turned={name: shaped(name, moved) for name in kinds},
        shortcuts={},
        attention=None,
        example=ViewExample("", (0, 0), (), np.zeros(0), None, np.zeros(0)),
    )
    reduced = principal_components(features)
    assert getattr(reduced, kind).shape[:-1] == getattr(features, kind).shape[:-1]
    found, turned = (x.reshape(count, -1) for x in (getattr(reduced, kind), reduced.turned[kind]))
    assert found.shape == (count, 64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), sizes[:64], rtol=1e-3)
    np.testing.assert_allclose(
        np.abs(np.sum(found * weights[:, :64], axis=0)), sizes[:64], rtol=1e-3
    )
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-3)
    shift = np.zeros(64)
    shift[1] = 30
    np.testing.assert_allclose(np.abs(turned - found), np.tile(shift, (count, 1)), atol=0.05)
