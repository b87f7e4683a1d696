"""Kernels and their coordinates in an orthonormal basis: arrays in, arrays out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from mamba_probe.analyses.lti_limits import core as limits
from mamba_probe.analyses.wavelet_alignment.basis import Basis
from mamba_probe.analyses.wavelet_alignment.span import Span

__all__ = [
    "best_wavelet",
    "coarse_cosines",
    "compaction",
    "discontinuity_index",
    "effective_rank",
    "fourier",
    "lti_order",
    "needed",
    "normalised",
    "spike_cosine",
]

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of fp32 recordings, and outside the kernels' span; so
is a read-out that cancels to below this share of its terms."""

RANGE_TOLERANCE = 1e-3
"""A kernel whose range is below this share of its peak is constant to a recording's rounding: it has no step."""

ROTATED = 4096
"""Functions of the basis rotated at a time."""

SPIKE_WINDOW = 1024
"""Longest window in which the reference of a single token is computed; longer ones have the same."""


def normalised(kernel: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, "kernel token"]:
    """Each kernel at unit energy; rows without energy become NaN.

    >>> normalised(np.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
    [[0.0, 1.0], [nan, nan]]
    """
    peak = np.abs(kernel).max(axis=1, keepdims=True)
    scaled = kernel / np.where(peak > 0, peak, np.nan)
    return scaled / np.sqrt(np.sum(scaled**2, axis=1, keepdims=True))


def fourier(kernel: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, "kernel frequency"]:
    """Moduli of the unitary DFT, conjugate frequencies both: the reference basis of as many functions.

    >>> fourier(np.array([[1.0, -1.0, 1.0, -1.0]])).round(6).tolist()
    [[0.0, 0.0, 2.0, 0.0]]
    """
    half, size = np.abs(np.fft.rfft(kernel, axis=1, norm="ortho")), kernel.shape[1]
    return np.concatenate([half, half[:, size - half.shape[1] : 0 : -1]], axis=1)


def compaction(coefficient: Float[np.ndarray, "kernel coefficient"]) -> Float[np.ndarray, "kernel coefficient"]:
    """Share of the energy in the largest 1, 2, .. coefficients of unit-energy kernels.

    >>> compaction(np.array([[0.6, 0.8]])).round(2).tolist()
    [[0.64, 1.0]]
    """
    energy = np.sort(coefficient**2, axis=1)[:, ::-1]
    found = np.cumsum(energy, axis=1)
    return np.divide(found, np.sum(energy, axis=1, keepdims=True), out=found)


def needed(
    compacted: Float[np.ndarray, "kernel coefficient"], share: Sequence[float]
) -> Float[np.ndarray, "kernel share"]:
    """How many coefficients hold each share of the energy; NaN for kernels without energy.

    >>> needed(np.array([[0.64, 1.0]]), (0.5, 0.9)).tolist()
    [[1.0, 2.0]]
    """
    counts = np.stack([1.0 + np.sum(compacted < s * (1 - 1e-12), axis=1) for s in share], axis=1)
    return np.where(np.isnan(compacted[:, :1]), np.nan, counts)


def effective_rank(coefficient: Float[np.ndarray, "kernel coefficient"]) -> Float[np.ndarray, " kernel"]:
    """exp(-sum p ln p) of the energy shares p: how many coefficients a kernel is spread over.

    >>> effective_rank(np.full((1, 4), 0.5)).round(6).tolist()
    [4.0]
    """
    p = coefficient**2
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1))


def best_wavelet(
    coefficient: Float[np.ndarray, "kernel coefficient"], level: Int[np.ndarray, " coefficient"]
) -> tuple[Float[np.ndarray, " kernel"], Float[np.ndarray, " kernel"], Float[np.ndarray, " kernel"]]:
    """|cosine|, level and shift of the single wavelet (level 0 excluded) nearest to each unit-energy kernel.

    >>> found = best_wavelet(np.array([[0.0, 0.0, 0.0, 1.0]]), np.array([0, 2, 1, 1]))
    >>> [value.tolist() for value in found]
    [[1.0], [1.0], [1.0]]
    """
    dead, first = np.isnan(coefficient[:, 0]), np.count_nonzero(level == 0)
    size = np.abs(coefficient[:, first:])
    at = first + np.argmax(size, axis=1)
    labels, start = np.unique(level, return_index=True)
    shift = at - start[np.searchsorted(labels, level[at])]
    return size.max(axis=1), np.where(dead, np.nan, level[at]), np.where(dead, np.nan, shift)


def spike_cosine(window: int, basis: Basis) -> float:
    """Mean |cosine| of a kernel that is one single token, anywhere in the window, with its best single wavelet.

    A reference for `best_wavelet`: large where a kernel is merely short.

    >>> round(spike_cosine(8, Basis("haar")), 6)
    0.707107
    """
    size = min(window, SPIKE_WINDOW)
    return float(best_wavelet(basis.transform(np.eye(size)), basis.levels(size))[0].mean())


def discontinuity_index(kernel: Float[np.ndarray, "kernel token"]) -> Float[np.ndarray, " kernel"]:
    """Largest step over the range, max_t |k(t+1) - k(t)| / (max k - min k); NaN for constant kernels.

    >>> discontinuity_index(np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])).tolist()
    [1.0, 0.5, nan]
    """
    span, peak = np.ptp(kernel, axis=1), np.abs(kernel).max(axis=1)
    stepped = span > RANGE_TOLERANCE * peak
    return np.abs(np.diff(kernel, axis=1)).max(axis=1) / np.where(stepped, span, np.nan)


def lti_order(kernel: Float[np.ndarray, "kernel token"], error: float, lags: int) -> Float[np.ndarray, " kernel"]:
    """States that a time-invariant layer needs at least for each kernel, to a relative L2 error; NaN without energy.

    The Hankel bound of `lti_limits.core.lti_order`, its singular values taken of many sub-ranges at once.

    Args:
        kernel: over a window that ends at the query.
        error: of the whole kernel.
        lags: only so many lags next to the query enter the bound, which then is one on the whole kernel too, if a
            weaker one.

    >>> lti_order(np.repeat([[1.0, -1.0]], 128, axis=1), 0.1, 256).tolist()
    [20.0]
    """
    scaled = normalised(kernel)
    near = np.nan_to_num(scaled[:, ::-1][:, :lags])
    size = near.shape[1]
    missed = np.zeros((len(near), (size + 1) // 2 + 1))
    for part in limits.WINDOWS:
        length = size // part
        if length < limits.SHORTEST and part > 1:
            break
        found = _missed(sliding_window_view(near, length, axis=1)[:, :: max(1, length // 4)]).max(axis=1)
        missed[:, : found.shape[1]] = np.maximum(missed[:, : found.shape[1]], found)
    return np.where(np.isnan(scaled[:, 0]), np.nan, np.argmax(missed <= error**2, axis=1))


def _missed(kernel: Float[np.ndarray, "*batch lag"]) -> Float[np.ndarray, "*batch count"]:
    """Energy that 0, 1, .. exponentials must miss; singular values at rounding count as zero."""
    p = (kernel.shape[-1] + 1) // 2
    sigma = np.linalg.svd(sliding_window_view(kernel, kernel.shape[-1] + 1 - p, axis=-1), compute_uv=False)
    tail = np.where(sigma > limits.RCOND * sigma[..., :1], sigma, 0.0) ** 2
    left = np.cumsum(tail[..., ::-1], axis=-1)[..., ::-1] / p
    return np.concatenate([left, np.zeros((*left.shape[:-1], 1))], axis=-1)


def coarse_cosines(span: Span, coarse: Bool[np.ndarray, " coefficient"]) -> tuple[Float[np.ndarray, " angle"], int]:
    """Cosines of the principal angles between the span of some kernels and some functions of the basis.

    The other functions are first rotated until the kernels reach as few as there are kernels: that keeps all angles.

    Returns:
        min(rank, number of functions) cosines, largest first, and the numerical rank of the kernels: their
        singular values above `RANK_TOLERANCE` of the largest, whose vectors make the span.

    >>> span = Span(2, 4)
    >>> span.add(np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]))
    >>> coarse_cosines(span, np.array([True, True, False, False]))
    (array([1., 0.]), 2)
    """
    if not len(span):
        return np.zeros(0), 0
    short = np.concatenate([_coordinates(span, np.flatnonzero(coarse)), _rotated(span, np.flatnonzero(~coarse))])
    basis, sigma, _ = np.linalg.svd(short, full_matrices=False)
    rank = int(np.sum(sigma > RANK_TOLERANCE * sigma[0]))
    return np.clip(scipy.linalg.svdvals(basis[: coarse.sum(), :rank]), 0.0, 1.0), rank


def _coordinates(span: Span, functions: Int[np.ndarray, " function"]) -> Float[np.ndarray, "function kernel"]:
    """Coordinates on ascending functions; what lies between them is read too."""
    return span.functions(int(functions[0]), int(functions[-1]) + 1)[:, functions - functions[0]].T


def _rotated(span: Span, functions: Int[np.ndarray, " function"]) -> Float[np.ndarray, "rotated kernel"]:
    """Coordinates on some functions, rotated until at most as many functions as kernels are reached."""
    found: Any = np.empty((0, len(span)))
    for start in range(0, len(functions), ROTATED):
        more = _coordinates(span, functions[start : start + ROTATED])
        found = np.linalg.qr(np.concatenate([found, more]), mode="r")
    return found
