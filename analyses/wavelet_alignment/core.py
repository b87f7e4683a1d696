"""Kernels of a scan and their coordinates in an orthonormal wavelet basis: arrays in, arrays out.

Coefficients are ordered coarse to fine: the scaling function, then level log2 W (one wavelet as long as the window W),
down to level 1 (W / 2 wavelets of two tokens for Haar). Level 0 names the scaling function, which is no wavelet.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pywt
import scipy.linalg
from jaxtyping import Float, Int
from pywt import Wavelet, wavelist  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs

__all__ = [
    "best_wavelet",
    "coarse_cosines",
    "coefficients",
    "compaction",
    "effective_rank",
    "levels",
    "needed",
    "normalised",
    "orthonormal_wavelet",
    "read",
    "window_length",
]

RANK_TOLERANCE = 1e-6
"""Pivots below this share of the largest are rounding of fp32 recordings, and outside the kernels' span; so is a
read-out that cancels to below this share of its terms."""

DISCRETE = tuple(wavelist(kind="discrete"))

SHORTEST = 4
"""Fewest tokens in which wavelets of two scales exist."""


def orthonormal_wavelet(name: str) -> str:
    """The name of a wavelet whose periodised transform is orthonormal.

    Raises:
        ValueError: pywt does not know it as a discrete wavelet, or it is not orthonormal (bior, rbio, dmey).

    >>> orthonormal_wavelet("haar")
    'haar'
    """
    if name not in DISCRETE:
        raise ValueError(
            f"unknown wavelet {name!r}: needed is an orthonormal discrete wavelet of pywt, as 'haar', 'db2' or 'sym4'"
        )
    wavelet = Wavelet(name)
    taps = np.asarray(wavelet.dec_lo)
    overlap = np.correlate(taps, taps, "full")[len(taps) - 1 :: 2]
    if not wavelet.orthogonal or np.abs(overlap - np.eye(1, len(overlap))[0]).max() > 1e-8:
        raise ValueError(
            f"wavelet {name!r} is not orthonormal, so energies and cosines would not add up; use 'haar' or 'db2'"
        )
    return name


def window_length(n_tokens: int) -> int:
    """The dyadic window rule: the last 2^floor(log2 n) of n valid tokens, never padded.

    Raises:
        ValueError: fewer than 4 tokens.

    >>> window_length(100)
    64
    """
    if n_tokens < SHORTEST:
        raise ValueError(f"a wavelet window needs at least {SHORTEST} valid tokens up to the query; got {n_tokens}")
    return 1 << (n_tokens.bit_length() - 1)


def read(
    read_out: Float[np.ndarray, "kernel head"], kernel: Float[np.ndarray, "head token"]
) -> Float[np.ndarray, "kernel token"]:
    """Kernels after a read-out; one that cancels to rounding (`RANK_TOLERANCE` of its terms) becomes exactly zero.

    >>> read(np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 2.0]])).tolist()
    [[0.0, 0.0], [2.0, 4.0]]
    """
    found = read_out @ kernel
    terms = np.max(np.abs(read_out) @ np.abs(kernel), axis=1)
    return np.where((np.abs(found).max(axis=1) > RANK_TOLERANCE * terms)[:, None], found, 0.0)


def normalised(kernel: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, "kernel token"]:
    """Each kernel at unit energy; rows without energy become NaN.

    >>> normalised(np.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [nan, nan]]
    """
    peak = np.abs(kernel).max(axis=1, keepdims=True)
    scaled = kernel / np.where(peak > 0, peak, np.nan)
    return scaled / np.sqrt(np.sum(scaled**2, axis=1, keepdims=True))


def coefficients(kernel: Float[np.ndarray, "kernel token"], wavelet: str) -> Float[np.ndarray, "kernel token"]:
    """Coordinates in the periodised orthonormal basis of `wavelet`, all levels, coarse to fine.

    >>> coefficients(np.ones((1, 4)), "haar").round(6).tolist()
    [[2.0, 0.0, 0.0, 0.0]]
    """
    smooth, details = kernel, []
    while smooth.shape[1] > 1:
        smooth, detail = pywt.dwt(smooth, wavelet, mode="periodization", axis=1)
        details.append(detail)
    return np.concatenate([smooth, *reversed(details)], axis=1)


def levels(window: int) -> Int[np.ndarray, " coefficient"]:
    """Level of each coefficient: 0 the scaling function, then log2 W once, down to 1, W / 2 times.

    >>> levels(8).tolist()
    [0, 3, 2, 2, 1, 1, 1, 1]
    """
    depth = window.bit_length() - 1
    return np.concatenate([[0], np.repeat(np.arange(depth, 0, -1), 2 ** np.arange(depth))])


def compaction(coefficient: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, "kernel token"]:
    """Share of the energy in the largest 1, 2, .. coefficients of unit-energy kernels.

    >>> compaction(np.array([[0.6, 0.8]])).round(2).tolist()
    [[0.64, 1.0]]
    """
    energy = np.sort(coefficient**2, axis=1)[:, ::-1]
    return np.cumsum(energy, axis=1) / np.sum(energy, axis=1, keepdims=True)


def needed(compacted: Float[np.ndarray, "kernel token"], share: Sequence[float]) -> Float[np.ndarray, "kernel share"]:
    """How many coefficients hold each share of the energy; NaN for kernels without energy.

    >>> needed(np.array([[0.64, 1.0]]), (0.5, 0.9)).tolist()
    [[1.0, 2.0]]
    """
    counts = np.stack([1.0 + np.sum(compacted < s * (1 - 1e-12), axis=1) for s in share], axis=1)
    return np.where(np.isnan(compacted[:, :1]), np.nan, counts)


def effective_rank(coefficient: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, " kernel"]:
    """exp(-sum p ln p) of the energy shares p: how many coefficients a kernel is spread over.

    >>> effective_rank(np.full((1, 4), 0.5)).round(6).tolist()
    [4.0]
    """
    p = coefficient**2
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1))


def best_wavelet(
    coefficient: Float[np.ndarray, "kernel token"],
) -> tuple[Float[np.ndarray, " kernel"], Float[np.ndarray, " kernel"], Float[np.ndarray, " kernel"]]:
    """|cosine|, level and shift of the single wavelet (scaling function excluded) nearest to each unit-energy kernel.

    >>> [v.tolist() for v in best_wavelet(np.array([[0.0, 0.0, 0.0, 1.0]]))]
    [[1.0], [1.0], [1.0]]
    """
    level = levels(coefficient.shape[1])
    dead = np.isnan(coefficient[:, 0])
    size = np.abs(np.where(dead[:, None], 0.0, coefficient[:, 1:]))
    at = 1 + np.argmax(size, axis=1)
    shift = at - 2 ** (np.log2(at).astype(int))
    return np.where(dead, np.nan, size.max(axis=1)), np.where(dead, np.nan, level[at]), np.where(dead, np.nan, shift)


def spike_cosine(window: int, wavelet: str) -> float:
    """Mean |cosine| of a kernel that is one single token, anywhere in the window, with its best single wavelet.

    A reference for `best_wavelet`: large where a kernel is merely short.

    >>> round(spike_cosine(8, "haar"), 6)
    0.707107
    """
    return float(best_wavelet(coefficients(np.eye(window), wavelet))[0].mean())


def coarse_cosines(
    coefficient: Float[np.ndarray, "kernel token"], n_coarse: int
) -> tuple[Float[np.ndarray, " angle"], int]:
    """Cosines of the principal angles between the span of the kernels and the coarsest `n_coarse` basis functions.

    Returns:
        min(rank, n_coarse) cosines, largest first, and the numerical rank of the kernels (tolerance `RANK_TOLERANCE`).

    >>> coarse_cosines(np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]), 2)
    (array([1., 0.]), 2)
    """
    if not len(coefficient):
        return np.zeros(0), 0
    found: Any = scipy.linalg.qr(coefficient.T, mode="economic", pivoting=True)
    basis, triangle, _ = found
    pivots = np.abs(np.diag(triangle))
    rank = int(np.sum(pivots > RANK_TOLERANCE * pivots[0]))
    return np.clip(scipy.linalg.svdvals(basis[:n_coarse, :rank]), 0.0, 1.0), rank
