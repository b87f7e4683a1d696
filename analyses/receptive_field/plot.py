"""Distances by query, profiles by lag, remembrance by what is removed, token distances by layer."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.common.words import shown

__all__ = ["KINDS", "plot"]

KINDS = ("distance", "profile", "remembrance", "tokens")
FLOOR = 1e-6
"""Shares below it, as a part of the largest, are not drawn."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "distance", layer: int | None = None) -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `distance`: mean distance read against the query's position, executed beside the time-invariant null; grey: all
    sources alike; a line marks the length trained on. `profile`: shares of the sources against lag, of the block
    (selection moving; where a Jacobian was given) and of its mixer (selection frozen). `remembrance`: total variation
    against how many of the first tokens are removed. `tokens`: distance of two tokens in each layer, its nulls beside
    it. Of many layers, `distance` and `profile` draw some, evenly spread.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: one of the above.
        layer: by its number, for "distance" or "profile": that one alone, with intervals and every null.

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, a layer that the result lacks, a result of another analysis or without what the kind
            draws.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('distance', 'profile', 'remembrance', 'tokens'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "receptive_field")
    known = result["layer"].values.tolist()
    if layer is not None and layer not in known:
        raise ValueError(f"layer {layer} is not in the result, which holds {known}")
    _check_held(result, kind)
    ax = style.axes(ax)
    chosen = result if layer is None else result.sel(layer=[layer])
    {"distance": _distance, "profile": _profile, "remembrance": _remembrance, "tokens": _tokens}[kind](chosen, ax)
    style.frame(ax)
    style.legend_outside(ax)
    return ax


def _check_held(result: xr.Dataset, kind: str) -> None:
    tokens = any(f"layer_token_distance_{name}" in result for name in ("u", "out"))
    if (kind == "remembrance" and "remembrance" not in result) or (kind == "tokens" and not tokens):
        raise ValueError(f"the result has nothing for kind {kind!r}; left out: {result.attrs['left_out']}")


def _layers(result: xr.Dataset) -> Iterator[tuple[xr.Dataset, Any, str]]:
    """The layers that are drawn, the colour of each, and its name."""
    import matplotlib as mpl

    drawn = shown(result)
    for place, layer in enumerate(drawn):
        shade = style.REAL if len(drawn) == 1 else mpl.colormaps["viridis"](0.9 * place / (len(drawn) - 1))
        yield result.sel(layer=layer), shade, f"layer {layer}"


def _distance(result: xr.Dataset, ax: Any) -> None:
    x = result["query_token"].values + 1
    one = result.sizes["layer"] == 1
    for part, colour, name in _layers(result):
        ax.plot(x, part["layer_mean_distance"], "o-", color=colour, ms=3, label=f"{name}, executed")
        if one:
            ends = (part[f"layer_mean_distance_{end}"] for end in ("low", "high"))
            ax.fill_between(x, *ends, color=colour, alpha=0.25, lw=0)
            ax.plot(
                x, part["layer_null_shuffle_mean_distance"], "-.", color=style.NULL, label=r"$\Delta$ shuffled (null)"
            )
        ax.plot(x, part["layer_null_lti_mean_distance"], "--", color=style.LTI if one else colour, lw=1)
    ax.plot([], [], "--", color=style.LTI if one else "0.3", lw=1, label="time-invariant (null)")
    top = ax.get_ylim()[1]
    ax.plot(x, (x - 1) / 2, ":", color="0.6", label="all sources alike")
    ax.set_ylim(0, 1.05 * top if top > 0 else 1)
    length = result.attrs["train_length"]
    if length != "unknown":
        ax.axvline(int(length), color="0.8", lw=1, zorder=0)
        ax.annotate(" trained on", (int(length), 0.02), xycoords=("data", "axes fraction"), color="0.4", size="small")
    ax.set_xlabel("tokens up to the query")
    ax.set_ylabel(f"mean distance read (tokens)\n{_band(result) if one else '(no interval drawn)'}")


def _band(result: xr.Dataset) -> str:
    return "band 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"


def _profile(result: xr.Dataset, ax: Any) -> None:
    kinds = (("block", "block_lag", "-", 1.5), ("mixer", "lag", ":", 1.2))
    held = [kind for kind in kinds if f"layer_{kind[0]}_profile" in result]
    peak = max(float(result[f"layer_{name}_profile"].fillna(0.0).max()) for name, *_ in held)
    for part, colour, layer in _layers(result):
        for place, (name, dim, line, width) in enumerate(held):
            shares = part[f"layer_{name}_profile"].where(lambda share: share > FLOOR * peak)
            label = layer if place == 0 else None
            ax.plot(part[dim].values + 1, shares, line, color=colour, lw=width, label=label)
    for name, _, line, width in held:
        words = {"block": "block: selection moving", "mixer": "mixer: selection frozen,\nwithout the skip D"}[name]
        ax.plot([], [], line, color="0.3", lw=width, label=words)
    ax.set_xscale("log")
    if peak > 0:
        ax.set_yscale("log")
    else:
        ax.text(0.5, 0.5, "no query reads anything", transform=ax.transAxes, ha="center", color="0.4")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("lag t - s, plus 1 (tokens)")
    ax.set_ylabel("share of a source, mean over rows\n(no interval drawn)")


def _remembrance(result: xr.Dataset, ax: Any) -> None:
    x = result["start"].values
    ax.plot(x, result["null_other_row"], "--", color=style.NULL, label="another row's context (null)")
    ax.plot(x, result["remembrance"], "o-", color=style.REAL, ms=3, label="without the first tokens")
    ax.fill_between(x, result["remembrance_low"], result["remembrance_high"], color=style.REAL, alpha=0.25, lw=0)
    ax.set_xscale("symlog", linthresh=1, linscale=0.3)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("first tokens removed")
    known = bool(np.isfinite(result["remembrance_low"]).any())
    drawn = "band 95 % interval over rows" if known else "one row: no interval"
    ax.set_ylabel(f"effective remembrance\n(total variation; {drawn})")


def _tokens(result: xr.Dataset, ax: Any) -> None:
    x = np.arange(result.sizes["layer"])
    words = {"u": ("mixer's input", style.REAL, "o"), "out": ("mixer's output", style.LTI, "s")}
    for shift, (name, (label, colour, marker)) in zip((-0.1, 0.1), words.items(), strict=True):
        key = f"layer_token_distance_{name}"
        if key not in result:
            continue
        ax.vlines(x + shift, result[f"{key}_low"], result[f"{key}_high"], color=colour, lw=6, alpha=0.35)
        ax.plot(x + shift, result[key], marker, color=colour, ms=5, label=label)
        twin = f"baseline_{key}"
        if twin in result:
            ax.plot(x + shift, result[twin], marker, color=colour, mfc="white", ms=5, label=f"{label}, untrained twin")
    ax.axhline(1.0, color="0.7", ls=":", label="unrelated tokens")
    ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))
    style.layer_axis(ax, result["layer"].values)
    ax.set_ylabel(f"distance of two tokens\n({style.interval_text(result)})")
