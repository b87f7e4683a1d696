r"""Lower bounds on imitating a kernel of the lag with N exponentials: arrays in, arrays out.

A time-invariant mixer with N states (conjugates counted) has the kernel $\sum_{n \le N} c_n z_n^m$ of the lag m, whose
every Hankel matrix has rank at most N. All errors are relative in L2: |f - k| / |f|. Bounds and their proofs: ours.
"""

from collections.abc import Sequence

import numpy as np
import pywt
import scipy.linalg
from jaxtyping import Float, Int
from scipy.special import polygamma

__all__ = [
    "RCOND",
    "checked_counts",
    "checked_kernel",
    "hankel_lower_bound",
    "keep_lower_bound",
    "lti_order",
    "n_term_haar",
    "step_lower_bound",
]

RCOND = 1e-13
"""Relative tolerance: singular values below it count as zero (float64), in bounds and in least squares alike."""

WINDOWS = (1, 2, 4, 8)
"""Sub-ranges of the lags have the length of the kernel over these, and start at each quarter of their length."""

SHORTEST = 4
"""Shortest sub-range in lags."""


def checked_kernel(kernel: Float[np.ndarray, " lag"]) -> Float[np.ndarray, " lag"]:
    """The kernel in float64 (float32 widens exactly).

    Raises:
        ValueError: fewer than 2 lags, numbers that are not finite, or no energy.

    >>> checked_kernel(np.zeros(8))
    Traceback (most recent call last):
    ValueError: the kernel is zero at all 8 lags: a relative error needs energy; leave it out
    """
    if kernel.size < 2:
        raise ValueError(f"a kernel needs at least 2 lags; got {kernel.size}")
    if not np.all(np.isfinite(kernel)):
        where = int(np.flatnonzero(~np.isfinite(kernel))[0])
        raise ValueError(f"the kernel must be finite; got {kernel[where]} at lag {where}")
    if not np.any(kernel):
        raise ValueError(f"the kernel is zero at all {kernel.size} lags: a relative error needs energy; leave it out")
    return kernel.astype(np.float64)


def checked_counts(n_states: Sequence[int] | Int[np.ndarray, " count"], least: int = 0) -> Int[np.ndarray, " count"]:
    """Numbers of states as an integer array.

    Raises:
        ValueError: none, not integers, or one below `least`.

    >>> checked_counts([4, 8]).tolist()
    [4, 8]
    """
    counts = np.asarray(n_states)
    if counts.ndim != 1 or counts.size == 0 or counts.dtype.kind not in "iu" or counts.min() < least:
        raise ValueError(f"n_states needs a sequence of integers of at least {least}; got {n_states!r}")
    return counts.astype(np.int64)


def hankel_lower_bound(
    kernel: Float[np.ndarray, " lag"],
    n_states: Sequence[int] | Int[np.ndarray, " count"],
    *,
    subranges: bool = True,
) -> Float[np.ndarray, " count"]:
    r"""Least relative L2 error of any N exponentials, stable or not, on the lags of the kernel.

    $|f - k|^2 \ge \sum_{n > N} \sigma_n(H_{p \times q}(f))^2 / \min(p, q)$ with $p + q = M + 1$ for M lags (ours): the
    Hankel matrix of k has rank at most N (Eckart and Young), and each lag stands at most min(p, q) times in the matrix
    of f - k. p = q, or q = p + 1. A bound on some of the lags is a bound on all: with `subranges` the best of M, M/2,
    M/4 and M/8 consecutive lags at each quarter of their length.

    Args:
        kernel: (lag,) real values at consecutive lags.
        n_states: numbers of exponentials, conjugates counted.
        subranges: take the best bound over sub-ranges of the lags, else all lags at once.

    Returns:
        One bound for each of `n_states`, in [0, 1].

    Raises:
        ValueError: a kernel without energy or with numbers that are not finite, negative `n_states`.

    >>> step = (np.arange(1024) < 512).astype(float)
    >>> hankel_lower_bound(step, [4, 64], subranges=False).round(3).tolist()
    [0.159, 0.04]
    """
    counts, energy = checked_counts(n_states), _excluded_energy(checked_kernel(kernel), subranges)
    return np.sqrt(energy[np.minimum(counts, len(energy) - 1)])


def lti_order(kernel: Float[np.ndarray, " lag"], error: float = 0.1, *, subranges: bool = True) -> int:
    """Smallest number of states that the Hankel bound does not exclude for a relative L2 error of `error`.

    At least so many states are needed; whether so many suffice is another question (`fit`).

    Raises:
        ValueError: an error outside (0, 1), or a kernel that `hankel_lower_bound` refuses.

    >>> lti_order(0.9 ** np.arange(64.0))
    1
    >>> lti_order(np.repeat([1.0, -1.0], 128))
    20
    """
    if not 0 < error < 1:
        raise ValueError(f"error is relative and must be above 0 and below 1; got {error}")
    return int(np.argmax(_excluded_energy(checked_kernel(kernel), subranges) <= error**2))


def _excluded_energy(kernel: Float[np.ndarray, " lag"], subranges: bool) -> Float[np.ndarray, " count"]:
    """Share of the energy that 0, 1, .. exponentials must miss; ends in a zero, non-increasing."""
    size = len(kernel)
    found = np.zeros((size + 1) // 2 + 1)
    scaled = kernel / np.max(np.abs(kernel))
    for window in WINDOWS if subranges else WINDOWS[:1]:
        length = size // window
        if length < SHORTEST and window > 1:
            break
        for start in range(0, size - length + 1, max(1, length // 4)):
            missed = _missed(scaled[start : start + length])
            found[: len(missed)] = np.maximum(found[: len(missed)], missed)
    return found / np.sum(scaled**2)


def _missed(kernel: Float[np.ndarray, " lag"]) -> Float[np.ndarray, " count"]:
    """Sum over n > N of sigma_n squared over min(p, q), for N = 0 .. min(p, q); rounding counts as zero."""
    p = (len(kernel) + 1) // 2
    sigma = scipy.linalg.svdvals(scipy.linalg.hankel(kernel[:p], kernel[p - 1 :]))
    tail = np.where(sigma > RCOND * sigma[0], sigma, 0.0) ** 2
    return np.append(np.cumsum(tail[::-1])[::-1], 0.0) / p


def step_lower_bound(n_states: Sequence[int] | Int[np.ndarray, " count"]) -> Float[np.ndarray, " count"]:
    r"""Least relative L2 error of N exponentials at a step at half the lags, in continuous time.

    $\sqrt{(4/\pi^2) \sum_{n > N} (2n - 1)^{-2}} = \sqrt{\psi_1(N + 1/2)}/\pi \sim 1/(\pi \sqrt N)$ (ours): the Hankel
    operator of the step is a mirrored Volterra operator, with singular values $1/((2n - 1)\pi)$.

    Args:
        n_states: numbers of exponentials, conjugates counted.

    Raises:
        ValueError: negative `n_states`.

    >>> step_lower_bound([4, 8, 16, 32, 64]).round(4).tolist()
    [0.1587, 0.1125, 0.0796, 0.0563, 0.0398]
    """
    return np.sqrt(polygamma(1, checked_counts(n_states) + 0.5)) / np.pi


def keep_lower_bound(
    n_tokens: int, lag: int, n_states: Sequence[int] | Int[np.ndarray, " count"]
) -> Float[np.ndarray, " count"]:
    r"""Least L2 error of N exponentials at a kernel that is 1 at one lag and 0 at the others of 0 .. T - 1.

    $\sqrt{1 - N / \min(m + 1, T - m)}$, 0 from there on (ours): the Hankel matrix around lag m has that many singular
    values, all 1. Its square is the mean squared error of keeping the token m back among independent unit tokens.

    Args:
        n_tokens: T, number of lags.
        lag: m, the lag to keep.
        n_states: numbers of exponentials, conjugates counted.

    Raises:
        ValueError: a lag outside 0 .. T - 1, negative `n_states`.

    >>> keep_lower_bound(64, 31, [4, 16, 64]).round(3).tolist()
    [0.935, 0.707, 0.0]
    """
    if not 0 <= lag < n_tokens:
        raise ValueError(f"lag must be among 0 .. n_tokens - 1 = {n_tokens - 1}; got {lag}")
    return np.sqrt(np.maximum(1 - checked_counts(n_states) / min(lag + 1, n_tokens - lag), 0.0))


def n_term_haar(
    signal: Float[np.ndarray, " lag"], n_terms: Sequence[int] | Int[np.ndarray, " count"]
) -> Float[np.ndarray, " count"]:
    """Relative L2 error of the best n Haar coefficients, chosen for this signal: not a linear method.

    Args:
        signal: (lag,) of a power of two.
        n_terms: numbers of coefficients kept, the scaling function among them.

    Raises:
        ValueError: another length, a signal without energy, negative `n_terms`.

    >>> n_term_haar(np.repeat([1.0, 0.0], 8), [0, 1, 2]).round(4).tolist()
    [1.0, 0.7071, 0.0]
    """
    values, counts = checked_kernel(signal), checked_counts(n_terms)
    if len(values) & (len(values) - 1):
        raise ValueError(f"the Haar transform needs a power of two of samples; got {len(values)}")
    found = np.concatenate(pywt.wavedec(values / np.max(np.abs(values)), "haar"))
    left = np.append(0.0, np.cumsum(np.sort(found**2)))[::-1]
    return np.sqrt(left[np.minimum(counts, len(values))] / left[0])
