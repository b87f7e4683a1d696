"""Error against number of states, with the region that no time-invariant kernel enters."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["plot"]

LOOK = {
    "s4d_real": ("#E69F00", "v", "S4D-Real"),
    "s4d_lin": ("#CC79A7", "s", "S4D-Lin"),
    "fourier": ("#009E73", "^", "Fourier and a constant"),
    "optimised": (style.LTI, "D", "optimised modes"),
    "n_term_haar": (style.REAL, "o", "best N Haar terms, not LTI"),
}
DEEPEST = 1e-4
"""Nothing below this error is drawn to scale: it stands at the foot, hollow."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kernel: Any = None) -> Any:
    """Draw a result of `measure`, one kernel; nothing is computed here.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kernel: label of the kernel; needed where there are several.

    Returns:
        The Axes: error against n_states, log-log, slopes in the legend, the excluded region shaded.

    Raises:
        ValueError: a result of another analysis, no label among several kernels, a label that is not there.

    >>> plot(xr.Dataset(attrs={"analysis": "memory_horizon"}))
    Traceback (most recent call last):
    ValueError: lti_limits.plot draws what lti_limits.measure(trace) returned; got a result of memory_horizon
    """
    style.check(result, "lti_limits")
    here = result.sel(kernel=_label(result, kernel))
    ax, floor = style.axes(ax), _floor(here)
    _excluded(here, floor, ax)
    for fit in here.fit.values:
        _fit(here.sel(fit=fit), str(fit), floor, ax)
    if bool((here.error <= floor).any()):
        ax.plot([], [], "o", color="0.35", mfc="white", ms=7, ls="", label=f"hollow: error below {DEEPEST:g}")
    ax.axhline(1.0, color=style.NULL, lw=1.0, ls=":", label="zero kernel (null)")
    _scales(here.n_states.values, floor, ax)
    style.legend_outside(ax)
    return ax


def _label(result: xr.Dataset, kernel: Any) -> Any:
    labels = result.kernel.values.tolist()
    if kernel is None and len(labels) == 1:
        return labels[0]
    if kernel not in labels:
        raise ValueError(f"kernel must be one of {labels}; got {kernel!r}")
    return kernel


def _floor(here: xr.Dataset) -> float:
    """Foot of the axis: a little below the least error or bound that is drawn to scale."""
    drawn = np.concatenate([here.error.values.ravel(), here.lower_bound.values])
    return float(drawn[drawn > DEEPEST].min() / 1.6)


def _excluded(here: xr.Dataset, floor: float, ax: Any) -> None:
    counts, bound = here.n_states.values, np.maximum(here.lower_bound.values, floor)
    label = f"excluded for any LTI{_slope(here.bound_slope)}"
    ax.fill_between(counts, floor, bound, color=style.NULL, alpha=0.35, lw=0, label=label)
    ax.plot(counts, bound, color="0.35", lw=1.2)


def _fit(here: xr.Dataset, fit: str, floor: float, ax: Any) -> None:
    colour, marker, name = LOOK[fit]
    counts, error = here.n_states.values, here.error.values
    seen = error > floor
    label = f"{name}{_slope(here.slope)}"
    ax.plot(counts[seen], error[seen], marker=marker, color=colour, ms=5, lw=1.2, label=label)
    if not seen.all():
        foot = np.full(np.count_nonzero(~seen), floor)
        ax.plot(counts[~seen], foot, marker=marker, color=colour, mfc="white", ms=7, ls="", clip_on=False)


def _slope(slope: xr.DataArray) -> str:
    return "" if np.isnan(slope.item()) else f" (slope {slope.item():.2f})".replace("-", "\N{MINUS SIGN}")


def _scales(counts: np.ndarray, floor: float, ax: Any) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ticks = [digit * 10.0**power for power in range(-4, 1) for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if floor <= tick <= 1]
    ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
    ax.set_yticks([], minor=True)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.set_xticks([], minor=True)
    ax.set_xlim(counts[0] / 1.1, counts[-1] * 1.1)
    ax.set_ylim(floor, 1.2)
    ax.set_xlabel("N: exponentials (conjugates counted), or Haar terms")
    ax.set_ylabel("relative $L_2$ error (deterministic: no interval)")
    style.frame(ax)
