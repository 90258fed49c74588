"""Pictures of attention and features, and the thread that makes them."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.cells.visuals import VisualLogger, attention_picture, pca_colors, pca_picture
from dinov3.models.vision_transformer import DinoVisionTransformer

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def make_vit() -> DinoVisionTransformer:
    vit = DinoVisionTransformer(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, n_storage_tokens=2, layerscale_init=1.0
    )
    vit.init_weights()
    return vit


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


# --- attention ---


def test_attention_picture_shows_patches_only():
    """One bright patch; CLS and storage tokens, brighter still, are left out."""
    attention = torch.full((1, 2, 1 + 4 + 6, 1 + 4 + 6), 0.01)
    attention[:, :, 0, :5] = 0.9
    attention[0, 0, 0, 5 + 4] = 0.5  # head 0: row 1, column 1 of 2 x 3
    attention[0, 1, 0, 5 + 2] = 0.5  # head 1: row 0, column 2
    picture = attention_picture(torch.zeros(1, 3, 16, 24), attention, 8, **PLAIN)
    assert picture.shape == (16, 3 * 24, 3)
    assert picture.dtype == np.uint8
    assert picture[:, :24].max() == 0  # the image itself
    light = picture.astype(int).sum(axis=-1)
    for head, (row, column) in enumerate([(1, 1), (0, 2)], start=1):
        bright = np.zeros((16, 24), bool)
        bright[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
        panel = light[:, 24 * head : 24 * head + 24]
        assert (panel[bright] == 255 + 255 + 204).all()
        assert (panel[~bright] == panel.min()).all()
    rows = attention[:, :, 0]
    assert (picture == attention_picture(torch.zeros(1, 3, 16, 24), rows, 8, **PLAIN)).all()


def test_attention_picture_at_patch_8():
    attention = torch.rand(2, 3, 1 + 4 + 28 * 28)
    picture = attention_picture(torch.zeros(2, 3, 224, 224), attention, 8)
    assert picture.shape == (448, 4 * 224, 3)
    assert len(np.unique(picture[:224, 224:448].reshape(-1, 3), axis=0)) > 100


def test_attention_of_another_size_is_refused():
    with pytest.raises(ValueError, match="attention` must have CLS and 6 patches, got 6 tokens"):
        attention_picture(torch.zeros(1, 3, 16, 24), torch.rand(1, 2, 6), 8)


def test_image_is_shown_in_its_own_colours():
    rgb = images(1)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    normalised = (rgb - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    picture = pca_picture(normalised, torch.rand(1, 6, 5), 8, mean=mean, std=std)
    shown = picture[:, :24].astype(float) / 255
    np.testing.assert_allclose(shown, rgb[0].permute(1, 2, 0).numpy(), atol=0.003)


# --- principal components ---


def test_pca_colors_are_the_principal_components():
    rng = np.random.default_rng(3)
    scores = rng.gamma(1.0, size=(40, 3)) * (9.0, 4.0, 2.0)  # skewed to one side
    basis = np.linalg.qr(rng.normal(size=(12, 3)))[0]
    patches = torch.from_numpy(scores @ basis.T + rng.normal(size=12)).float().reshape(2, 20, 12)
    colors = pca_colors(patches)
    assert colors.shape == (2, 20, 3)
    assert colors.min() == 0
    assert colors.max() == 1
    centred = scores - scores.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ axes.T
    for column in range(3):
        found = colors.reshape(40, 3)[:, column].numpy()
        correlation = np.corrcoef(np.clip(expected[:, column], -1e9, 1e9), found)[0, 1]
        assert abs(correlation) > 0.9
        assert (expected[:, column] ** 3).sum() * correlation > 0  # the longer tail is bright


@pytest.mark.parametrize("factor", [1.0, 37.0])
def test_pca_sign_and_scale_do_not_jump(factor):
    patches = torch.from_numpy(np.random.default_rng(5).gamma(1.0, size=(2, 30, 8)))
    rotation = torch.linalg.qr(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double()
    )[0]
    torch.testing.assert_close(
        pca_colors(patches @ rotation * factor), pca_colors(patches), atol=1e-5, rtol=0
    )


def test_pca_of_collapsed_features_is_gray():
    same = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(2, 12, 16)
    assert (pca_colors(same) == 0.5).all()
    line = torch.linspace(0, 1, 24).reshape(2, 12, 1) * same[:1, :1]
    colors = pca_colors(line)
    assert colors[..., 0].unique().numel() > 10
    assert (colors[..., 1:] == 0.5).all()


# --- the thread ---


@pytest.fixture
def drawn():
    return []


@pytest.fixture
def visuals(tmp_path, drawn):
    return VisualLogger(make_vit, tmp_path, lambda pictures, it: drawn.append((it, pictures)))


def test_files_and_pictures(visuals, tmp_path, drawn):
    teacher = make_vit().eval()
    assert visuals.submit(teacher.state_dict(), images(), 40)
    assert visuals.close()
    ((iteration, pictures),) = drawn
    assert iteration == 40
    with torch.no_grad():
        attention = teacher.get_last_selfattention(images())
        patches = teacher(images(), is_training=True)["x_norm_patchtokens"]
    expected = {
        "attention": attention_picture(images(), attention, 8),
        "pca": pca_picture(images(), patches, 8),
    }
    for name, picture in expected.items():
        file = np.asarray(Image.open(tmp_path / "visuals" / f"{name}_0000040.png"))
        assert (file == pictures[name]).all()
        assert np.abs(picture.astype(int) - file).max() <= 2
    assert sorted(path.name for path in (tmp_path / "visuals").iterdir()) == [
        "attention_0000040.png", "images.pt", "pca_0000040.png"
    ]  # fmt: skip


def test_colours_of_the_images(tmp_path, drawn):
    for number, mean in enumerate([(0.0,) * 3, (0.5,) * 3]):
        logger = VisualLogger(
            make_vit, tmp_path / str(number), lambda p, it: drawn.append(p["pca"]), mean=mean
        )
        logger.submit(make_vit().state_dict(), torch.zeros(1, 3, 16, 24), 0)
        assert logger.close()
    assert [picture[:, :24].max() for picture in drawn] == [0, 128]


def test_the_same_images_after_a_resumption(visuals, tmp_path, drawn):
    state = make_vit().state_dict()
    visuals.submit(state, images(), 0)
    visuals.close()
    visuals.submit(state, images(seed=1), 10)
    visuals.close()
    again = VisualLogger(make_vit, tmp_path, lambda pictures, it: drawn.append((it, pictures)))
    again.submit(state, images(seed=2), 20)
    again.close()
    assert len(drawn) == 3
    for _, pictures in drawn[1:]:
        for name, picture in pictures.items():
            assert (picture == drawn[0][1][name]).all()


def test_training_is_not_touched(visuals):
    """Random numbers, mode, gradients and threads of the training stay as they are."""
    teacher = make_vit().train()
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    visuals.submit(state, images(), 0)
    visuals.close()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.get_num_threads() == threads
    assert teacher.training
    assert all(param.grad is None and param.requires_grad for param in teacher.parameters())


def test_thread_has_one_core_and_later_ones_the_usual():
    from dinov3.cells.visuals import _use_one_core

    usual = torch.get_num_threads()
    counts = {}

    def work() -> None:
        _use_one_core()
        counts["thread"] = torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        for target in (work, lambda: counts.update(later=torch.get_num_threads())):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert counts == {"thread": 1, "later": 3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)


def test_busy_thread_is_not_waited_for(tmp_path, caplog):
    gate = threading.Event()
    visuals = VisualLogger(make_vit, tmp_path, lambda pictures, it: gate.wait())
    state = make_vit().state_dict()
    assert visuals.submit(state, images(), 0)
    assert visuals.busy
    assert not visuals.submit(state, images(), 10)
    assert visuals.skipped == 1
    assert not visuals.close(timeout_s=0.01)
    assert "not finished within 0.01 s" in caplog.text
    gate.set()
    assert visuals.close()
    assert visuals.submit(state, images(), 20)
    assert visuals.close()


@pytest.mark.parametrize("where", ["state", "network", "listener", "disk"])
def test_whatever_fails_only_warns(tmp_path, caplog, where):
    state = make_vit().state_dict()
    make, listener, folder = make_vit, None, tmp_path
    if where == "state":
        state.pop("cls_token")
    elif where == "network":
        make = lambda: 1 / 0  # noqa: E731
    elif where == "listener":
        listener = lambda pictures, it: 1 / 0  # noqa: E731
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file"
    visuals = VisualLogger(make, folder, listener)
    visuals.submit(state, images(), 7)
    assert visuals.close()
    assert visuals.failed == 1
    assert "Pictures of iteration 7 could not be made" in caplog.text


def test_nothing_to_close(visuals):
    assert visuals.close()
