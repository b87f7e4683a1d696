"""Kernels of a layer whose selection is frozen in time."""

from typing import Any

import numpy as np
from jaxtyping import Float, Inexact, Int

__all__ = ["frozen"]


def frozen(
    delta: Float[np.ndarray, " head"],
    A: Inexact[np.ndarray, "head decay"],
    matched: Inexact[np.ndarray, "group state"],
    groups: Int[np.ndarray, " head"],
    zoh: bool,
    window: int,
) -> Float[np.ndarray, "head source"]:
    """Weights where delta, B and C are constant: powers, each the product of a coarse and a fine one.

    Args:
        delta: the step size of each head.
        A: one decay where all states share it (Mamba-2), else one a state; complex for S4D.
        matched: C at the query times B.
        groups: group that each head reads.
        zoh: whether the write is delta phi1(delta A) B instead of delta B.
        window: number of sources, a power of two.

    >>> frozen(np.ones(1), -np.ones((1, 1)), np.ones((1, 1)), np.array([0]), False, 4).round(3).tolist()
    [[0.05, 0.135, 0.368, 1.0]]
    """
    fine = 1 << window.bit_length() // 2
    matched = matched.sum(axis=1, keepdims=True) if A.shape[1] == 1 else matched
    rate = A * delta[:, None]
    size = matched[groups] * (_phi1(rate) if zoh else 1.0)
    coarse = np.exp(rate[:, None] * (fine * np.arange(window // fine)[:, None])) * size[:, None]
    lags: Any = (coarse @ np.exp(rate[:, :, None] * np.arange(fine))).reshape(len(A), window)
    return delta[:, None] * (2 * lags.real if np.iscomplexobj(lags) else lags)[:, ::-1]


def _phi1(z: Inexact[np.ndarray, "*shape"]) -> Inexact[np.ndarray, "*shape"]:
    """(exp(z) - 1) / z, and 1 at 0."""
    safe = np.where(z == 0, 1.0, z)
    return np.where(z == 0, 1.0, np.expm1(safe) / safe)
