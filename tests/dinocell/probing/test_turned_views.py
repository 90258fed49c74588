"""Features of turned windows, from a network that answers with the pixels it was shown."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinocell.probing.feature_extraction import FieldImage, extract_views

PATCH, WINDOW, VIEWS = 4, 16, 3
GRID = WINDOW // PATCH


class Mirror(nn.Module):
    """CLS is the whole window, a patch token the pixels of the patch; no pixel is like another."""

    patch_size = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.device_of = nn.Parameter(torch.zeros(()))

    def forward_features(self, batch: Tensor) -> dict[str, Tensor]:
        return {"x_norm_clstoken": batch[:, 0].flatten(1), "x_norm_patchtokens": cut(batch[:, 0])}


def cut(images):
    """(V, H, W) → (V, patches, pixels), patches row by row."""
    columns = images.shape[2] // PATCH
    parts = [
        images[:, PATCH * row : PATCH * (row + 1), PATCH * column : PATCH * (column + 1)]
        for row in range(images.shape[1] // PATCH)
        for column in range(columns)
    ]
    stack = torch.stack if isinstance(images, Tensor) else np.stack
    return stack([part.reshape(len(images), -1) for part in parts], 1)


@pytest.fixture(scope="module")
def found():
    """Nine windows of two channels and their mean."""
    planes = np.random.default_rng(0).random((2, 3 * WINDOW, 3 * WINDOW)).astype(np.float32)
    item = FieldImage("a", ("DNA", "ER"), planes)
    return extract_views(
        Mirror(), [item], window_px=WINDOW, windows_per_field=9, attention=False, batch_size=2
    )


def symmetries(image):
    """The image itself, and its seven other symmetries."""
    both = (image, image.T)
    return [np.rot90(start, turns) for start in both for turns in range(4)]


def test_upright_features_are_of_upright_windows(found):
    for kind, expected in (("patch", cut), ("patch_mean", lambda images: cut(images).mean(axis=1))):
        images = found.cls.reshape(-1, WINDOW, WINDOW)
        np.testing.assert_allclose(getattr(found, kind), expected(images), atol=1e-6)


def test_cls_of_the_turned_window_is_that_of_each_symmetry_but_not_of_the_upright_one(found):
    seen = []
    for upright, moved in zip(found.cls, found.turned["cls"], strict=True):
        same = [
            number
            for number, image in enumerate(symmetries(upright.reshape(WINDOW, WINDOW)))
            if np.array_equal(image.ravel(), moved)
        ]
        seen += same
    assert len(seen) == len(found.cls), "a turned view is no symmetry of its window"
    assert set(seen) == set(range(1, 8))
    of_window = np.reshape(seen, (-1, VIEWS))
    assert (of_window == of_window[:, :1]).all(), "all channels of a window are turned alike"


def test_mean_patch_of_the_turned_window_is_of_its_own_patches(found):
    moved = found.turned["cls"].reshape(-1, WINDOW, WINDOW)
    np.testing.assert_allclose(found.turned["patch_mean"], cut(moved).mean(axis=1), atol=1e-6)
    assert np.abs(found.turned["patch_mean"] - found.patch_mean).max(axis=1).min() > 0.01


def test_patches_of_the_turned_window_are_back_in_their_place_but_turned_inside(found):
    upright, moved = found.patch, found.turned["patch"]
    assert upright.shape == moved.shape == (9 * VIEWS, GRID**2, PATCH**2)
    for view, place in np.ndindex(upright.shape[:2]):
        before, after = (x[view, place].reshape(PATCH, PATCH) for x in (upright, moved))
        same = [np.array_equal(image, after) for image in symmetries(before)]
        assert any(same[1:]), (view, place)
        assert not same[0], (view, place)


def test_single_patches_are_spread_over_the_window():
    class Places(Mirror):
        def forward_features(self, batch: Tensor) -> dict[str, Tensor]:
            rows, columns = (size // PATCH for size in batch.shape[2:])
            grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
            return {
                "x_norm_clstoken": grid[:1].expand(len(batch), -1),
                "x_norm_patchtokens": grid.expand(len(batch), -1, -1),
            }

    item = FieldImage("a", ("DNA", "ER"), np.random.default_rng(0).random((2, 40, 40)))
    found = extract_views(Places(), [item], window_px=40, windows_per_field=1, attention=False)
    assert found.patch.shape == (VIEWS, 16, 2)  # of a grid of 10 × 10
    assert (found.patch == found.patch[0]).all()
    expected = [[row, column] for row in (0, 3, 6, 9) for column in (0, 3, 6, 9)]
    assert found.patch[0].tolist() == expected
