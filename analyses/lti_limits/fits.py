r"""Fits of N exponentials to a kernel of the lag, by least squares in float64.

A fit has the kernel $\sum_n c_n e^{\lambda_n m / M}$ at lags m = 0 .. M - 1, $\lambda$ in units of one over the length
of the kernel. The coefficients are free and complex: whatever B and C would give. Singular values below `RCOND` of the
largest are dropped, so that a fit that needs larger coefficients than that stalls, as it would in any float64 layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Complex, Float
from scipy.optimize import least_squares, minimize_scalar

from mamba_probe.analyses.lti_limits.core import RCOND, checked_kernel

__all__ = ["FITS", "Fit", "fit_fourier", "fit_optimised", "fit_s4d_lin", "fit_s4d_real", "project"]

RATES = (1e-2, 1e2)
"""Range of the slowest decay rate of real S4D that is searched."""
N_RATES = 49
MAX_STEPS = 60
"""Steps of the optimiser of the modes, from each start."""
JITTER = 0.05
"""Relative displacement of the seeded restart."""
LEAST_MODULUS = 1e-6
"""A pole of the shift estimate is moved out to at least this modulus, so that it has a logarithm."""


@dataclass(frozen=True)
class Fit:
    """A sum of exponentials: its `exponent`s, its `kernel` (lag,) and its relative L2 `error`."""

    exponent: Complex[np.ndarray, " mode"]
    kernel: Complex[np.ndarray, " lag"]
    error: float


def project(kernel: Float[np.ndarray, " lag"], exponent: Complex[np.ndarray, " mode"]) -> Fit:
    r"""Least-squares fit of the given exponentials.

    Args:
        kernel: (lag,) the target.
        exponent: (mode,) $\lambda_n$, in units of one over the length of the kernel.

    Raises:
        ValueError: a kernel without energy or with numbers that are not finite, no exponent, or more than lags.

    >>> fit = project(0.5 ** np.arange(8.0), np.array([8 * np.log(0.5) + 0j]))
    >>> fit.error < 1e-15
    True
    """
    target = checked_kernel(kernel)
    if not 1 <= len(exponent) <= len(target):
        raise ValueError(f"a fit to {len(target)} lags takes 1 .. {len(target)} exponentials; got {len(exponent)}")
    peak = np.max(np.abs(target))
    residual = _Span(target / peak, exponent).residual
    error = np.linalg.norm(residual) / np.linalg.norm(target / peak)
    return Fit(exponent, target - peak * residual, float(error))


class _Span:
    """The span of the exponentials, at the numerical rank: orthonormal `basis`, `residual`, `coefficient`s."""

    def __init__(self, kernel: Float[np.ndarray, " lag"], exponent: Complex[np.ndarray, " mode"]) -> None:
        at = np.arange(len(kernel)) / len(kernel)
        self.modes = np.exp(np.outer(at, exponent) - np.maximum(np.real(exponent), 0.0))
        left, sigma, right = np.linalg.svd(self.modes, full_matrices=False)
        kept = sigma > RCOND * sigma[0]
        self.basis = left[:, kept]
        inside = self.basis.conj().T @ kernel
        self.residual = kernel - self.basis @ inside
        self.coefficient = (right[kept].conj().T / sigma[kept]) @ inside
        self.slope = at[:, None] * self.modes * self.coefficient

    def off(self, values: Complex[np.ndarray, "lag mode"]) -> Complex[np.ndarray, "lag mode"]:
        """What the span does not reach."""
        return values - self.basis @ (self.basis.conj().T @ values)


def fit_s4d_real(kernel: Float[np.ndarray, " lag"], n_states: int, seed: int = 0) -> Fit:
    r"""S4D-Real: $\lambda_n = -s n$, n = 1 .. N, at the best s of a grid, then refined between its neighbours.

    >>> round(fit_s4d_real(np.repeat([1.0, 0.0], 128), 4).error, 3)
    0.265
    """

    def at(log_rate: float) -> Fit:
        return project(kernel, -np.exp(log_rate) * np.arange(1, n_states + 1).astype(complex))

    grid = np.linspace(np.log(RATES[0]), np.log(RATES[1]), N_RATES)
    best = grid[int(np.argmin([at(rate).error for rate in grid]))]
    step = grid[1] - grid[0]
    refined: Any = minimize_scalar(lambda rate: at(rate).error, bounds=(best - step, best + step), method="bounded")
    return min((at(best), at(float(refined.x))), key=lambda fit: fit.error)


def fit_s4d_lin(kernel: Float[np.ndarray, " lag"], n_states: int, seed: int = 0) -> Fit:
    r"""S4D-Lin: $\lambda = -1/2 + i \pi n$, n = -floor(N/2) .. ceil(N/2) - 1, not trained.

    >>> round(fit_s4d_lin(np.repeat([1.0, 0.0], 128), 8).error, 3)
    0.186
    """
    return project(kernel, -0.5 + 1j * np.pi * _centred(n_states))


def fit_fourier(kernel: Float[np.ndarray, " lag"], n_states: int, seed: int = 0) -> Fit:
    r"""Odd harmonics of period two, $\lambda = \pm i \pi (2j - 1)$, and a constant: N + 1 exponentials, N even.

    Raises:
        ValueError: an odd number of states.

    >>> round(fit_fourier(np.repeat([1.0, 0.0], 128), 4).error, 4)
    0.2229
    """
    if n_states % 2:
        raise ValueError(f"fourier takes pairs of harmonics: n_states must be even; got {n_states}")
    odd = np.arange(1, n_states, 2)
    return project(kernel, 1j * np.pi * np.concatenate([[0], odd, -odd]))


def fit_optimised(kernel: Float[np.ndarray, " lag"], n_states: int, seed: int = 0) -> Fit:
    """N complex exponents free: the best of local searches from the shift estimate, from the DFT and from a restart.

    The coefficients are eliminated (variable projection, Jacobian after Kaufman); the exponents move by
    `scipy.optimize.least_squares`. The start from the kernel's own Hankel matrix is the matrix pencil's (ESPRIT). The
    search is local: a better fit may exist, down to the bound.

    Args:
        kernel: (lag,) the target.
        n_states: N, number of exponents.
        seed: of the restart near the best exponents.

    >>> round(fit_optimised(np.repeat([1.0, 0.0], 32), 4).error, 3)
    0.186
    """
    target = checked_kernel(kernel)
    target = target / np.max(np.abs(target))
    starts = [2j * np.pi * _centred(n_states), *_pencil(target, n_states)]
    best = _best(target, [refined for start in starts for refined in (start, _refine(target, start))])
    move = np.random.default_rng(seed).standard_normal((2, n_states)) * JITTER * (1 + np.abs(best.exponent))
    moved = _refine(target, best.exponent + move[0] + 1j * move[1])
    return project(kernel, _best(target, [best.exponent, moved]).exponent)


def _best(kernel: Float[np.ndarray, " lag"], exponents: list[Complex[np.ndarray, " mode"]]) -> Fit:
    return min((project(kernel, exponent) for exponent in exponents), key=lambda fit: fit.error)


def _centred(n_states: int) -> Float[np.ndarray, " mode"]:
    return np.arange(n_states) - float(n_states // 2)


def _pencil(kernel: Float[np.ndarray, " lag"], n_states: int) -> list[Complex[np.ndarray, " mode"]]:
    """Exponents of the shift between the leading left singular vectors of the Hankel matrix, where it has so many."""
    p = (len(kernel) + 1) // 2
    if n_states >= p:
        return []
    left = np.linalg.svd(scipy.linalg.hankel(kernel[:p], kernel[p - 1 :]), full_matrices=False)[0][:, :n_states]
    shift = np.linalg.lstsq(left[:-1], left[1:], rcond=RCOND)[0]
    pole = np.linalg.eigvals(shift).astype(complex)
    size = np.abs(pole)
    return [len(kernel) * (np.log(np.maximum(size, LEAST_MODULUS)) + 1j * np.angle(pole))]


def _refine(kernel: Float[np.ndarray, " lag"], exponent: Complex[np.ndarray, " mode"]) -> Complex[np.ndarray, " mode"]:
    """A local minimum of the residual over the exponents, real and imaginary parts side by side."""
    n_modes, scaled = len(exponent), kernel / np.linalg.norm(kernel)

    def span(parts: Float[np.ndarray, " part"]) -> _Span:
        return _Span(scaled, parts[:n_modes] + 1j * parts[n_modes:])

    def residual(parts: Float[np.ndarray, " part"]) -> Float[np.ndarray, " equation"]:
        missed = span(parts).residual
        return np.concatenate([np.real(missed), np.imag(missed)])

    def slope(parts: Float[np.ndarray, " part"]) -> Float[np.ndarray, "equation part"]:
        here = span(parts)
        moved = -here.off(here.slope)
        return np.block([[np.real(moved), -np.imag(moved)], [np.imag(moved), np.real(moved)]])

    start = np.concatenate([np.real(exponent), np.imag(exponent)])
    jacobian: Any = slope
    found = least_squares(residual, start, jac=jacobian, x_scale=10.0, max_nfev=MAX_STEPS).x
    return found[:n_modes] + 1j * found[n_modes:]


FITS: dict[str, Callable[..., Fit]] = {
    "s4d_real": fit_s4d_real,
    "s4d_lin": fit_s4d_lin,
    "fourier": fit_fourier,
    "optimised": fit_optimised,
}
"""Each fit by its name: (kernel, n_states, seed) -> Fit; only `optimised` draws anything."""
