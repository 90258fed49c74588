"""What a network saw of an image, and how far that is from its training."""

from __future__ import annotations

import numpy as np
import torch

from dinocell.network.familiarity import Appearance
from dinocell.segmentation.inference import predict_distance_map


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, (70, 90)).astype(np.uint16)


def test_no_window_has_no_signature(small_model):
    appearance = Appearance()
    predict_distance_map(small_model, np.ones((40, 40)), appearance=appearance)
    assert appearance.signature() is None


def test_features_are_weighted_by_the_map():
    """Two patches of 2 x 2 px: the mean feature is (3 * 1 + 1 * 5) / 4 where the map is 0.75 and 0.25."""
    appearance = Appearance()
    maps = torch.tensor([[0.75, 0.75, 0.25, 0.25]] * 2)[None, None]
    features = torch.tensor([[[[1.0, 5.0]]]])
    appearance.add(maps, features, maps)
    np.testing.assert_allclose(appearance.signature(), [2.0])


def test_signature_does_not_depend_on_batches(small_model):
    signatures = []
    for options in ({"batch_size": 1}, {"batch_size": 64}, {"tile_px": 40}):
        appearance = Appearance()
        observed = predict_distance_map(small_model, image(), appearance=appearance, **options)
        unobserved = predict_distance_map(small_model, image(), **options)
        np.testing.assert_array_equal(observed, unobserved)
        signatures.append(appearance.signature())
    np.testing.assert_allclose(signatures[1:], signatures[:1] * 2, rtol=1e-3, atol=1e-4)
