"""Pictures of one layer: survival of a write, horizon against token, decay around an event."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["DRAW", "caption", "check"]

MOVING = "#009E73"
"""What was measured with selection moving."""

SIDES = {"before": "#E69F00", "at": "#CC79A7", "after": style.REAL}
NEEDS = {
    "token": ("token_forward_horizon", "tokens=[...]"),
    "decay": ("layer_decay_count", "event_tokens=..."),
    "survival": ("layer_forward_survival", "no more than a trace"),
}


def check(result: xr.Dataset, kind: str) -> None:
    """Check that a result holds what `kind` draws.

    Raises:
        ValueError: it does not; what to measure it with.
    """
    name, argument = NEEDS[kind]
    if name not in result:
        raise ValueError(f"kind={kind!r} draws {name}, which memory_horizon.measure gives with {argument}")


def caption(result: xr.Dataset, kind: str) -> str:
    """What was measured, on which model and layer."""
    model = result.attrs["model"].rstrip("/").rsplit("/", 1)[-1]
    layer = f"layer {result['layer'].item()}" if not result["layer"].ndim else ""
    level = str(result["level"].item()) if "level" in result.coords else result.attrs["level_name"]
    what = "frozen path" if kind == "decay" else f"frozen path, level {level}"
    return "; ".join(part for part in (model, layer, what) if part)


def _survival(result: xr.Dataset, ax: Any) -> None:
    """Lag 0 stands at 1 by definition and is left out of the logarithmic axis."""
    lag = result["lag"].values[1:]
    series = (
        ("null_shuffle", {"color": style.NULL, "lw": 4, "alpha": 0.7}, r"$\Delta$ shuffled in time (null)"),
        ("null_lti", {"color": style.LTI, "lw": 2, "ls": (0, (2, 1))}, r"$\Delta$ at its mean (null)"),
        ("forward", {"color": style.REAL, "lw": 1.8}, "executed (Kaplan-Meier)"),
    )
    ends = [result[f"layer_forward_survival_{end}"].values[1:] for end in ("at_least", "at_most")]
    ax.fill_between(
        lag, *ends, color=style.REAL, alpha=0.12, lw=0, step="post", label="executed, whatever the censored are"
    )
    low, high = (result[f"layer_forward_survival_{end}"].values[1:] for end in ("low", "high"))
    if np.isfinite(low).any():
        ax.fill_between(lag, low, high, color=style.REAL, alpha=0.4, lw=0, step="post", label="95 % interval")
    for kind, look, label in series:
        ax.plot(lag, result[f"layer_{kind}_survival"].values[1:], drawstyle="steps-post", label=label, **look)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlim(1, max(2, lag[-1]))
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("tokens since the write")
    ax.set_ylabel("share of writes not yet decayed" + ("" if np.isfinite(low).any() else "\n(one row: no interval)"))
    style.frame(ax)


def _token(result: xr.Dataset, ax: Any) -> None:
    horizon, least = (result[f"token_forward_horizon{end}"] for end in ("", "_at_least"))
    over = [dim for dim in horizon.dims if dim != "query_token"]
    value, bound = (_quantiles(of.transpose("query_token", *over).values) for of in (horizon, least))
    _points(result["query_token"].values, value, bound, ax, style.REAL, "o", "frozen, executed: median, bar 10-90 %")
    equivalent = max(1.0, np.ceil(result["layer_lti_horizon"].sel(quantile=0.5).item()))  # in whole tokens
    if np.isfinite(equivalent):
        ax.axhline(equivalent, color=style.LTI, ls="--", lw=1.2, label=r"$\Delta$ at its mean (null): median", zorder=0)
    if "jacobian_horizon" in result:
        _moving(result, ax)
    ax.plot([], [], marker="^", ls="", color="0.3", mfc="white", label="not reached: at least this")
    style.log_axis(ax)
    ax.set_xlabel("token")
    ax.set_ylabel("memory horizon (tokens)\nover rows, channels, states")
    style.frame(ax)


def _moving(result: xr.Dataset, ax: Any) -> None:
    value, bound = (
        result[f"jacobian_horizon{end}"].transpose("source_token", "batch").values for end in ("", "_at_least")
    )
    known = ~np.isnan(value).all(axis=1)
    at = result["source_token"].values[known]
    _points(at, _quantiles(value[known]), _quantiles(bound[known]), ax, MOVING, "D", "Jacobian, selection moving")


def _quantiles(values: np.ndarray) -> np.ndarray:
    """(quantile, token) over all that is known of each token."""
    flat = values.reshape(len(values), -1)
    return np.stack([np.quantile(of[~np.isnan(of)], (0.1, 0.5, 0.9), method="inverted_cdf") for of in flat], axis=-1)


def _points(x: np.ndarray, value: np.ndarray, bound: np.ndarray, ax: Any, colour: str, marker: str, label: str) -> None:
    low, mid, high = np.where(np.isinf(value), bound, value)
    ax.vlines(x, low, high, color=colour, lw=1, alpha=0.4)
    seen = np.isfinite(value[1])
    ax.plot(x[seen], mid[seen], marker, color=colour, ms=3.5, ls="", label=label)
    ax.plot(x[~seen], mid[~seen], "^", color=colour, mfc="white", ms=4.5, ls="")


def _decay(result: xr.Dataset, ax: Any) -> None:
    """Bars of a bin side by side; each side of the event sums to 1."""
    count, left = result["layer_decay_count"].transpose("event", "decay_bin"), result["decay_bin"].values
    width = result["decay_bin_end"].values - left
    for i, (event, colour) in enumerate(SIDES.items()):
        of, mean = count.sel(event=event).values, result["layer_mean_decay_event"].sel(event=event).item()
        if of.sum():
            label = f"{event} the event: mean {mean:.3g}, {of.sum()} steps"
            ax.bar(left + width * (0.2 + 0.3 * i), of / of.sum(), width * 0.28, color=colour, label=label)
    gamma, null = result["layer_gamma"].item(), result["layer_null_shuffle_gamma"].item()
    needed = result["needed_retention"].min().item()
    text = f"$\\Gamma$ = {gamma:.3g}; $\\Delta$ shuffled (null) {null:.2g}, $\\Delta$ at its mean 0"
    ax.plot([], [], " ", label=text)
    if np.isfinite(needed):
        said = f"needed after to keep {1 - float(result.attrs['epsilon']):g}: {needed:.5f}"
        ax.axvline(needed, color="0.4", ls=":", lw=1.2, label=said)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(0, 1.03)
    ax.set_xlabel(r"decay of one step, $e^{A \Delta_t}$")
    ax.set_ylabel("share of steps (rows, channels, states)")
    ax.legend(loc="upper center")
    style.frame(ax)


DRAW: MappingProxyType[str, Callable[[xr.Dataset, Any], None]] = MappingProxyType(
    {"survival": _survival, "token": _token, "decay": _decay}
)
