"""Kernels in, errors of their imitations out: labels, validation and what each number means."""

from collections.abc import Sequence
from difflib import get_close_matches

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from mamba_probe.analyses.common import described, refuse
from mamba_probe.analyses.lti_limits import core
from mamba_probe.analyses.lti_limits.fits import FITS

__all__ = ["NAMES", "measure"]

NAMES = (*FITS, "n_term_haar")
"""Every fit to a kernel by its name; all but the last are sums of exponentials, to which the bound applies."""

DIMS = ("kernel", "lag")


def measure(
    kernels: Float[np.ndarray, "kernel lag"] | xr.DataArray,
    *,
    n_states: Sequence[int] = (4, 8, 16, 32, 64),
    fits: Sequence[str] = NAMES,
    target_error: float = 0.1,
    seed: int = 0,
    weights: xr.Dataset | None = None,
    interventions: xr.Dataset | None = None,
    baseline: xr.Dataset | None = None,
) -> xr.Dataset:
    r"""Measure how well N exponentials imitate kernels of the lag, beside the error that none can go below.

    $\mathrm{error} = \min_c |f - \sum_{n \le N} c_n e^{\lambda_n m / M}| / |f|$ over the lags m = 0 .. M - 1, with the
    exponents of each fit; `lower_bound` is the Hankel bound of `core.hankel_lower_bound` for any N exponentials. The
    null is the zero kernel, error 1. Bound and estimators: ours.

    Args:
        kernels: (kernel, lag) real kernels or signals at consecutive lags, none without energy.
        n_states: numbers of exponentials, conjugates counted; "fourier" takes even ones and adds a constant.
        fits: of "s4d_real", "s4d_lin", "fourier", "optimised" (exponentials) and "n_term_haar", the best N Haar
            coefficients, which no time-invariant mixer computes and the bound does not concern.
        target_error: relative L2 error for which `lti_order` counts the states.
        seed: of the restart of "optimised".
        weights: not used; refused.
        interventions: not used; refused.
        baseline: not used; refused: the null is the zero kernel.

    Returns:
        Dataset over kernel, fit and n_states; `slope` is that of log error against log N.

    Raises:
        ValueError: dimensions other than (kernel, lag), a kernel without energy, an unknown fit, more states than
            lags, lags that are no power of two with "n_term_haar", an argument that is not used.

    >>> step = np.repeat([1.0, 0.0], 128)[None]
    >>> result = measure(step, n_states=(4, 8), fits=("fourier", "n_term_haar"))
    >>> result.error.sel(fit="fourier").values.round(3).tolist(), result.lower_bound.values.round(3).tolist()
    ([[0.223, 0.159]], [[0.159, 0.113]])
    """
    refuse("lti_limits", weights=weights, interventions=interventions, baseline=baseline)
    labels, values = _kernels(kernels)
    counts = _counts(n_states, values.shape[1])
    chosen = _fits(fits)
    error = np.stack([[_errors(kernel, fit, counts, seed) for fit in chosen] for kernel in values])
    bound = np.stack([core.hankel_lower_bound(kernel, counts) for kernel in values])
    order = np.array([core.lti_order(kernel, target_error) for kernel in values])
    unknown = np.full(error.shape, np.nan)
    grid, over = ("kernel", "fit", "n_states"), ("kernel", "n_states")
    entries = {
        "error": (grid, error, "relative L2 error", "1"),
        "error_low": (grid, unknown, "relative L2 error, lower end of the interval", "1"),
        "error_high": (grid, unknown, "relative L2 error, upper end of the interval", "1"),
        "null_error": (("kernel",), np.ones(len(values)), "relative L2 error of the zero kernel (null)", "1"),
        "lower_bound": (over, bound, "error that no sum of n_states exponentials goes below", "1"),
        "slope": (("kernel", "fit"), _slopes(error, counts), "slope of log error against log n_states", "1"),
        "bound_slope": (("kernel",), _slopes(bound, counts), "slope of log lower bound against log n_states", "1"),
        "lti_order": (("kernel",), order, "fewest states that target_error does not exclude", "1"),
        "n_modes": (("fit", "n_states"), _modes(chosen, counts), "terms of the fit, conjugates counted", "1"),
    }
    coords = {"kernel": labels, "fit": list(chosen), "n_states": counts}
    return described(entries, coords, _attrs(values.shape[1], target_error, seed))


def _kernels(kernels: Float[np.ndarray, "kernel lag"] | xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(kernels, np.ndarray | xr.DataArray) or kernels.ndim != len(DIMS):
        shape = getattr(kernels, "shape", "no shape")
        raise ValueError(
            f"kernels needs an array with dims {DIMS}; got a {type(kernels).__name__} of {shape}. It takes kernels"
            " of the lag, not a trace: kernels[None] of one, np.stack of several"
        )
    if not isinstance(kernels, xr.DataArray):
        return np.arange(len(kernels)), _alive(kernels, np.arange(len(kernels)))
    if set(kernels.dims) != set(DIMS):
        raise ValueError(f"kernels needs dims {DIMS}; got {kernels.dims}: rename or select")
    labels = kernels.coords["kernel"].values if "kernel" in kernels.coords else np.arange(kernels.sizes["kernel"])
    return labels, _alive(kernels.transpose(*DIMS).values, labels)


def _alive(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if not len(values) or values.dtype.kind != "f":
        raise ValueError(f"kernels needs at least one kernel of real floats; got {len(values)} of {values.dtype}")
    for label, kernel in zip(labels, values, strict=True):
        try:
            core.checked_kernel(kernel)
        except ValueError as problem:
            raise ValueError(f"kernel {label}: {problem}") from None
    return values.astype(np.float64)


def _counts(n_states: Sequence[int], n_lags: int) -> Int[np.ndarray, " count"]:
    counts = core.checked_counts(n_states, least=1)
    if np.any(np.diff(counts) <= 0) or counts[-1] > n_lags:
        raise ValueError(f"n_states must increase and be at most the {n_lags} lags; got {counts.tolist()}")
    return counts


def _fits(fits: Sequence[str]) -> tuple[str, ...]:
    if isinstance(fits, str) or not fits or len(set(fits)) < len(fits):
        raise ValueError(f"fits needs a sequence of different names of {NAMES}; got {fits!r}")
    for name in fits:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"each of fits must be one of {NAMES}; got {name!r}{hint}")
    return tuple(fits)


def _errors(kernel: np.ndarray, fit: str, counts: Int[np.ndarray, " count"], seed: int) -> np.ndarray:
    if fit == "n_term_haar":
        return core.n_term_haar(kernel, counts)
    return np.array([FITS[fit](kernel, int(count), seed).error for count in counts])


def _modes(fits: tuple[str, ...], counts: Int[np.ndarray, " count"]) -> Int[np.ndarray, "fit count"]:
    return np.stack([counts + (fit == "fourier") for fit in fits])


def _slopes(error: Float[np.ndarray, "*shape count"], counts: Int[np.ndarray, " count"]) -> Float[np.ndarray, "*shape"]:
    """Least-squares slope in log-log over the counts whose error is above rounding; NaN from fewer than two."""
    seen = error > core.RCOND
    x = np.where(seen, np.log(counts), 0.0)
    y = np.log(np.where(seen, error, 1.0))
    size = seen.sum(axis=-1)
    spread = size * np.sum(x * x, axis=-1) - np.sum(x, axis=-1) ** 2
    shared = size * np.sum(x * y, axis=-1) - np.sum(x, axis=-1) * np.sum(y, axis=-1)
    return np.divide(shared, spread, out=np.full(np.shape(size), np.nan), where=size >= 2)


def _attrs(n_lags: int, target_error: float, seed: int) -> dict[str, str]:
    return {
        "analysis": "lti_limits",
        "estimator": "least squares over complex coefficients in float64; bound from Hankel singular values (ours)",
        "rcond": f"singular values below {core.RCOND:g} of the largest are dropped, in fits and in the bound",
        "null": "the zero kernel: error 1",
        "interval": "NaN: deterministic, nothing to resample",
        "fourier": "n_states harmonics and a constant: n_modes is n_states + 1",
        "n_term_haar": "chosen for the kernel, not linear and not time-invariant: lower_bound does not concern it",
        "n_lags": str(n_lags),
        "target_error": f"{target_error:.17g}",
        "seed": str(seed),
    }
