"""Half-lives, states along the context, effective sizes and saturated steps of each layer; nothing is computed here."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["KINDS", "plot"]

TWIN = "#56B4E9"
"""The baseline: an untrained twin."""
FEW = 4
"""Layers whose states are drawn with their intervals; more are drawn in shades, as lines alone."""
SHARES = {
    "closed": (style.REAL, "closed: next to nothing written"),
    "held": ("#009E73", "held: every state kept"),
    "erased": (style.LTI, "erased: every state gone"),
}


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "decay") -> Any:
    """Draw a result of `measure`.

    `decay`: half-life at the mean step of the median head and state of each layer (bar: 10-90 %; box: interval over
    rows), beside the baseline, and the length of the longest row. `state`: root mean square of each layer's states
    against tokens read, beside the same tokens in random order. `size`: effective state size, entropy form, of each
    layer, beside its nulls. `saturation`: shares of steps that are closed, held and erased, and of heads with delta at
    its mean.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: one of the above.

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, a result of another analysis, or states where none were measured.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('decay', 'state', 'size', 'saturation'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "state_dynamics")
    if kind == "state" and "layer_rms" not in result:
        raise ValueError(f"this result has no states ({result.attrs['states']}): name x or h in variables=")
    ax = style.axes(ax)
    _DRAW[kind](result, ax)
    style.frame(ax)
    style.legend_outside(ax)
    return ax


def _mark(
    result: xr.Dataset, name: str, shift: float, ax: Any, *, colour: str, marker: str, label: str, hollow: bool = False
) -> None:
    """A value of each layer with the box of its interval."""
    x, pick = np.arange(result.sizes["layer"]) + shift, {"quantile": 0.5} if "quantile" in result[name].dims else {}
    value, low, high = (result[f"{name}{end}"].sel(pick).values for end in ("", "_low", "_high"))
    known = np.isfinite(low) & np.isfinite(high)
    ax.vlines(x[known], low[known], high[known], color=colour, lw=6, alpha=0.35)
    ax.plot(x, value, marker, color=colour, mfc="white" if hollow else colour, ms=5, ls="", label=label)


def _decay(result: xr.Dataset, ax: Any) -> None:
    series = [("layer_half_life", -0.12, style.REAL, "o", "model")]
    if "baseline_layer_half_life" in result:
        series.append(("baseline_layer_half_life", 0.12, TWIN, "s", "untrained twin (baseline)"))
    style.log_axis(ax)
    for name, shift, colour, marker, label in series:
        low, high = (result[name].sel(quantile=q).values for q in (0.1, 0.9))
        ax.vlines(np.arange(len(low)) + shift, low, high, color=colour, lw=1.2, alpha=0.8)
        _mark(result, name, shift, ax, colour=colour, marker=marker, label=label)
    longest = int(result.attrs["longest"])
    ax.axhline(longest, color="0.6", ls=":", lw=1, zorder=0, label=f"longest row ({longest} tokens): above, not seen")
    style.layer_axis(ax, result["layer"].values)
    ax.set_ylabel(f"half-life at the mean step (tokens)\nmedian, bar 10-90 %,\n{style.interval_text(result)}")


def _size(result: xr.Dataset, ax: Any) -> None:
    series = [
        ("layer_ess_entropy", style.REAL, "o", "executed"),
        ("layer_null_shuffle_ess_entropy", style.NULL, "s", r"$\Delta$ shuffled in time (null)"),
        ("layer_null_lti_ess_entropy", style.LTI, "D", "time-invariant (null)"),
    ]
    if "baseline_layer_ess_entropy" in result:
        series.append(("baseline_layer_ess_entropy", TWIN, "^", "untrained twin (baseline)"))
    for i, (name, colour, marker, label) in enumerate(series):
        shift = 0.16 * (i - (len(series) - 1) / 2)
        _mark(result, name, shift, ax, colour=colour, marker=marker, label=label)
    style.layer_axis(ax, result["layer"].values)
    ax.set_ylim(bottom=0)
    states = result.attrs["n_states"]
    ax.set_ylabel(f"effective state size, of {states}\n{style.interval_text(result)}")


def _saturation(result: xr.Dataset, ax: Any) -> None:
    for i, (name, (colour, label)) in enumerate(SHARES.items()):
        shift = 0.24 * (i - 1)
        _mark(result, f"layer_{name}_share", shift - 0.05, ax, colour=colour, marker="o", label=label)
        null = f"layer_null_lti_{name}_share"
        _mark(result, null, shift + 0.05, ax, colour=colour, marker="D", label="_", hollow=True)
    ax.plot([], [], "D", color="0.3", mfc="white", label=r"hollow: $\Delta$ at its mean (null)")
    style.layer_axis(ax, result["layer"].values)
    ax.set_ylim(-0.03, 1.03)
    ax.set_ylabel(f"share of steps\n{style.interval_text(result)}")


def _state(result: xr.Dataset, ax: Any) -> None:
    import matplotlib as mpl

    count, n_layers = result["sample_token"].values + 1, result.sizes["layer"]
    shade, few = mpl.colormaps["viridis"].resampled(256), n_layers <= FEW
    for i, layer in enumerate(result["layer"].values):
        colour = style.REAL if n_layers == 1 else shade(0.85 * i / (n_layers - 1))
        one = result.isel(layer=i)
        if few:
            ax.fill_between(count, one["layer_rms_low"], one["layer_rms_high"], color=colour, alpha=0.25, lw=0)
        label = "executed" if n_layers == 1 else f"layer {layer}"
        shown = few or i in (0, n_layers - 1)
        ax.plot(count, one["layer_rms"], "o-" if few else "-", color=colour, ms=3, label=label if shown else None)
        if "layer_null_order_rms" in result:
            null = style.NULL if n_layers == 1 else colour
            ax.plot(count, one["layer_null_order_rms"], "--", color=null, lw=1.2 if few else 0.6)
    if "layer_null_order_rms" in result:
        ax.plot([], [], "--", color=style.NULL, label="tokens in random order (null)")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    style.log_axis(ax)
    ax.set_xlabel("tokens read")
    band = "band 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
    band = band if few else "(no interval drawn)"
    ax.set_ylabel(f"root mean square of the state\n{band}")


_DRAW = {"decay": _decay, "state": _state, "size": _size, "saturation": _saturation}
KINDS = tuple(_DRAW)
