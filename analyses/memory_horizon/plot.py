"""Horizons of each layer against its time-invariant equivalent; survival, tokens and events of one layer."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.memory_horizon import curves

__all__ = ["KINDS", "plot"]

KINDS = ("horizon", "gain", "share", "survival", "token", "decay")


@style.names_as_they_are
def plot(
    result: xr.Dataset, ax: Any = None, *, kind: str = "horizon", level: str | None = None, layer: int | None = None
) -> Any:
    """Draw a result of `measure`; nothing is computed here but quantiles over what is not drawn.

    `horizon`: median forward horizon of each layer (bar: 10-90 % of tokens, channels and states; box: interval over
    rows) beside delta shuffled and the time-invariant equivalent; an arrow marks what the recording does not reach.
    `gain`: the median horizon over its time-invariant equivalent, beside the same nulls.
    `share`: share of channels and states, of all layers together, whose median horizon exceeds a number of tokens.
    `survival`: of one layer, the share of horizons longer than a lag (Kaplan-Meier) and its nulls; light: what it
    can be, whatever the censored horizons are.
    `token`: of one layer, horizons of `tokens`, and of the source tokens of a Jacobian where one was given.
    `decay`: of one layer, exp(A delta) before, at and after the event.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: one of the above.
        level: name of the level, where the result holds several.
        layer: the model's own layer number, for a kind that draws one layer of several.

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, a result of another analysis or without what the kind draws, several levels or layers
            and none named.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('horizon', 'gain', 'share', 'survival', 'token', 'decay'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "memory_horizon")
    result = _one(result, "level", level)
    if kind in curves.DRAW:
        result = _one(result, "layer", layer)
        curves.check(result, kind)
    ax = style.axes(ax)
    ({**curves.DRAW, "horizon": _horizon, "gain": _gain, "share": _share})[kind](result, ax)
    if kind in ("horizon", "gain"):
        style.layer_axis(ax, result.layer.values)
    ax.set_xlabel(f"{ax.get_xlabel()}\n{curves.caption(result, kind)}")
    if kind != "decay":
        style.legend_outside(ax)
    return ax


def _one(result: xr.Dataset, dim: str, label: str | int | None) -> xr.Dataset:
    """The result at one label of a dimension, which must be named where there are several."""
    if dim not in result.dims:
        return result
    known = result[dim].values.tolist()
    if label is None and len(known) == 1:
        label = known[0]
    if label not in known:
        raise ValueError(f"the result holds {dim}s {known}: name one, {dim}=...; got {label!r}")
    return result.sel({dim: label})


def _horizon(result: xr.Dataset, ax: Any) -> None:
    series = (
        ("layer_forward_horizon", style.REAL, "o", "executed"),
        ("layer_null_shuffle_horizon", style.NULL, "s", r"$\Delta$ shuffled in time (null)"),
        ("layer_null_lti_horizon", style.LTI, "D", r"$\Delta$ at its mean, time-invariant (null)"),
    )
    style.log_axis(ax)
    for shift, (name, colour, marker, label) in zip((-0.22, 0.0, 0.22), series, strict=True):
        _bars(result, name, np.arange(result.sizes["layer"]) + shift, ax, colour, marker, label)
    ax.set_ylabel(f"memory horizon (tokens)\nmedian, bar 10-90 %, {style.interval_text(result)}")
    _open_label(bool(np.isinf(result.layer_forward_horizon).any()), ax)


def _open_label(needed: bool, ax: Any) -> None:
    if needed:
        ax.plot([], [], marker="^", ls="", color="0.3", mfc="white", label="not reached: at least this")


def _arrows(x: np.ndarray, bound: np.ndarray, ax: Any, colour: str) -> None:
    ax.plot(x, bound, "^", color=colour, mfc="white", ms=5, ls="", clip_on=False)


def _bars(result: xr.Dataset, name: str, x: np.ndarray, ax: Any, colour: str, marker: str, label: str) -> None:
    """Median with its 10-90 % bar; censored ends stop at their lower bound with an arrow."""
    value = result[name].transpose("quantile", "layer").values
    bound = result[f"{name}_at_least"].transpose("quantile", "layer").values
    low, mid, high = np.where(np.isinf(value), bound, value)
    ax.vlines(x, low, high, color=colour, lw=1.2, alpha=0.8)
    _interval(result, name, x, ax, colour)
    seen = np.isfinite(value[1])
    ax.plot(x[seen], mid[seen], marker, color=colour, ms=5, ls="", label=label if seen.any() else None)
    ax.plot(x[~seen], mid[~seen], marker, color=colour, mfc="white", ms=5, ls="", label=None if seen.any() else label)
    _arrows(x, np.where(np.isinf(value[2]), high, np.nan), ax, colour)


def _interval(result: xr.Dataset, name: str, x: np.ndarray, ax: Any, colour: str) -> None:
    ends = (result[f"{name}_{end}"] for end in ("low", "high"))
    low, high = (end.sel(quantile=0.5).values if "quantile" in end.dims else end.values for end in ends)
    known = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[known], low[known], high[known], color=colour, lw=6, alpha=0.35)


def _gain(result: xr.Dataset, ax: Any) -> None:
    series = (
        ("layer_selectivity_gain", style.REAL, "o", "executed"),
        ("layer_null_shuffle_gain", style.NULL, "s", r"$\Delta$ shuffled in time (null)"),
    )
    style.log_axis(ax)
    ax.axhline(1.0, color=style.LTI, lw=1.2, ls="--", label=r"$\Delta$ at its mean, time-invariant (null)", zorder=0)
    for shift, (name, colour, marker, label) in zip((-0.12, 0.12), series, strict=True):
        x = np.arange(result.sizes["layer"]) + shift
        value, bound = result[name].values, result[f"{name}_at_least"].values
        _interval(result, name, x, ax, colour)
        ax.plot(x, np.where(np.isfinite(value), value, np.nan), marker, color=colour, ms=5, label=label)
        _arrows(x, np.where(np.isinf(value), bound, np.nan), ax, colour)
    ax.set_ylabel(f"selectivity gain (median / time-invariant)\n{style.interval_text(result)}")
    _open_label(bool(np.isinf(result.layer_selectivity_gain).any()), ax)


def _share(result: xr.Dataset, ax: Any) -> None:
    """Each curve ends where the first censored median could lie: beyond, its value was not measured."""
    end = min(_measured(result, name) for name in ("forward_horizon", "null_shuffle_horizon", "null_lti_horizon"))
    series = (
        ("null_shuffle_horizon", {"color": style.NULL, "lw": 5, "alpha": 0.6}, r"$\Delta$ shuffled in time (null)"),
        (
            "null_lti_horizon",
            {"color": style.LTI, "lw": 3, "ls": (0, (2, 1))},
            r"$\Delta$ at its mean, time-invariant (null)",
        ),
        ("forward_horizon", {"color": style.REAL, "lw": 1.5}, "executed"),
    )
    ax.set_xscale("log")
    edges = np.geomspace(0.5, end, 400, endpoint=False)
    for name, look, label in series:
        median = result[name].sel(quantile=0.5)
        known = np.sort(median.values[~np.isnan(median.values)])
        if known.size:
            over = 1.0 - np.searchsorted(known, edges, side="right") / known.size
            ax.plot(edges, over, label=label, drawstyle="steps-post", clip_on=False, **look)
    ax.set_xlim(0.5, end)
    ax.set_ylim(0.0, 1.0)
    ax.xaxis.set_major_formatter("{x:g}")
    longest = result.attrs["longest_row"]
    ax.set_xlabel(f"tokens (rows hold {longest}; drawn as far as every median is measured)")
    ax.set_ylabel("share of channels and states with a\nlonger median horizon (no interval)")
    style.frame(ax)


def _measured(result: xr.Dataset, name: str) -> float:
    """Tokens up to which no median is censored."""
    median, least = (result[f"{name}{end}"].sel(quantile=0.5).values for end in ("", "_at_least"))
    bounds = least[np.isinf(median)]
    return float(max(1.0, bounds.min())) if bounds.size else float(result.attrs["longest_row"])
