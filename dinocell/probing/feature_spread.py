"""Measures of how much features vary, and attention maps as rows that can be compared."""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dinocell.probing.views import unit_rows

# Variation of float32 features below this share of their size is rounding.
_RELATIVE_ROUNDING = 1e-6


def effective_rank(features: ArrayLike, *, centered: bool = False) -> float:
    """exp of the entropy of the singular values of (M, D) features, scaled to sum to 1.

    In [1, min(M, D)].  `centered` subtracts the mean row first, to see directions of variation only; 0 if
    then nothing but rounding varies, and for features that are all zero.

    Roy & Vetterli, The effective rank, EUSIPCO 2007, eq. 4.
    """
    matrix = np.asarray(features, dtype=np.float64)
    size = float(np.linalg.norm(matrix))
    if centered:
        matrix = matrix - matrix.mean(axis=0, keepdims=True)
    if float(np.linalg.norm(matrix)) <= _RELATIVE_ROUNDING * size:
        return 0.0
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: ArrayLike) -> float:
    """Spread of the directions of features: 0 collapsed, near 1 for directions drawn at random.

    √D times the mean over coordinates of the standard deviation of rows scaled to length 1 (Chen &
    He, SimSiam, 2021, section 4.1, whose value is this over √D).
    """
    unit = unit_rows(np.asarray(features, dtype=np.float64))
    return float(unit.std(axis=0).mean() * math.sqrt(unit.shape[1]))


def standardize_attention(attention: ArrayLike) -> NDArray[np.float64]:
    """(M, heads, N) maps → (M, heads·N) rows whose dot product is their correlation, mean over heads.

    A map without structure becomes zeros: it agrees with nothing, not with everything.

    Raises ValueError (not three axes).
    """
    maps = np.asarray(attention, dtype=np.float64)
    if maps.ndim != 3:
        raise ValueError(
            f"`attention` must be (M, heads, N), got shape {maps.shape}: keep the row of CLS and "
            "the columns of the patches"
        )
    level = np.abs(maps).max(axis=2, keepdims=True, initial=0.0)
    maps = maps - maps.mean(axis=2, keepdims=True)
    norms = np.linalg.norm(maps, axis=2, keepdims=True)
    flat = norms <= _RELATIVE_ROUNDING * level * math.sqrt(maps.shape[2])
    maps = np.where(flat, 0.0, maps / np.where(flat, 1.0, norms))
    return (maps / math.sqrt(maps.shape[1])).reshape(len(maps), -1)
