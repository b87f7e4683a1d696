"""Rows, lags and maps of hidden attention; signs are drawn, colours diverge about 0."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["KINDS", "plot"]

KINDS = ("lag", "rows", "map")

_SERIES = {
    "executed": ("", style.REAL, "-", "executed"),
    "null_lti": ("null_lti_", style.LTI, "--", "time-invariant (null)"),
    "null_shuffle": ("null_shuffle_", style.NULL, "-.", r"$\Delta$ shuffled in time (null)"),
}
MOST_ROWS = 8
"""Rows of one picture."""
DIVERGING = "PuOr_r"
"""Orange above 0, purple below, white at 0: told apart by the colour-blind."""


@style.names_as_they_are
def plot(
    result: xr.Dataset, ax: Any = None, *, kind: str = "lag", layer: int | None = None, row: int = 0,
    head: int | None = None, series: str = "executed",
) -> Any:  # fmt: skip
    """Draw a result of `measure`, or of `map`; nothing is computed here.

    `lag`: mean |alpha| against lag, executed beside both nulls, with intervals; of several layers, a shade each,
    executed and time-invariant.
    `rows`: alpha of the queries of one layer and row, signed, each in units of its largest |alpha|, beside the
    time-invariant null in the same units.
    `map`: alpha of all pairs of a window, from `map`; colours are symmetric about 0, run to the largest executed
    |alpha|, for the nulls too, and are logarithmic above 1 % of it.

    Args:
        result: Dataset from `measure` ("lag", "rows") or from `map` ("map").
        ax: matplotlib Axes; new ones by default.
        kind: "lag", "rows" or "map".
        layer: by its number; "rows" needs it where there are several, "lag" then draws that one alone.
        row: index on the batch axis, for "rows".
        head: by its label, for "rows" of a result with aggregate "none"; needed where there are several.
        series: "executed", "null_lti" or "null_shuffle", for "map".

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, series, layer, row or head, or a result of something else.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('lag', 'rows', 'map'); got 'pie'
    """
    if kind not in KINDS or series not in _SERIES:
        name, known, came = ("kind", KINDS, kind) if kind not in KINDS else ("series", tuple(_SERIES), series)
        raise ValueError(f"{name} must be one of {known}; got {came!r}")
    style.check(result, "hidden_attention.map" if kind == "map" else "hidden_attention")
    if kind == "map":
        return _map(result, style.axes(ax), series)
    chosen = _layers(result, layer, kind)
    one = _one_row(chosen, row, head) if kind == "rows" else None
    ax = style.axes(ax)
    if one is not None:
        _rows(one, ax, result.attrs)
    elif chosen.sizes["layer"] == 1:
        _lag(chosen.isel(layer=0), ax)
    else:
        _lag_by_layer(chosen, ax)
    return ax


def _layers(result: xr.Dataset, layer: int | None, kind: str) -> xr.Dataset:
    known = result["layer"].values.tolist()
    if layer is not None and layer not in known:
        raise ValueError(f"layer {layer} is not in the result, which holds {known}")
    if layer is None and kind == "rows" and len(known) > 1:
        raise ValueError(f"layer is needed for kind 'rows': the result holds {known}")
    return result if layer is None else result.sel(layer=[layer])


def _one_row(result: xr.Dataset, row: int, head: int | None) -> xr.Dataset:
    """One layer, row and, where heads are kept apart, head."""
    if not 0 <= row < result.sizes["batch"]:
        raise ValueError(f"row must be 0 to {result.sizes['batch'] - 1} on the batch axis; got {row}")
    dim = result.attrs["head_dim"]
    one = result.isel(layer=0, batch=row)
    if dim not in one["alpha"].dims:
        if head is not None:
            raise ValueError(f"head {head} was aggregated ({result.attrs['aggregation']}); measure aggregate='none'")
        return one
    known = result[dim].values.tolist()
    if head not in known and (head is not None or len(known) > 1):
        raise ValueError(f"head must be one of the result's `{dim}`, {known[:8]} ..; got {head}")
    return one.sel({dim: known[0] if head is None else head})


def _scaled(result_attrs: dict[str, Any]) -> str:
    return "" if result_attrs["normalise"] == "raw" else ", as shares of |alpha|"


def _lag(one: xr.Dataset, ax: Any) -> None:
    _lag_axis(one, ax)
    for width, (prefix, colour, line, label) in zip((1.5, 1.5, 3.0), _SERIES.values(), strict=True):
        name = f"layer_{prefix}by_lag"
        low, high = one[f"{name}_low"].values, one[f"{name}_high"].values
        ax.fill_between(np.arange(len(low)), low, high, color=colour, alpha=0.25, lw=0)
        look = {"ls": line, "lw": width, "color": colour, "marker": "o", "ms": 3, "zorder": 3 - width / 2}
        _curve(one[name].values, ax, label=label, **look)
    known = np.isfinite(one["layer_by_lag_low"].values).any()
    drawn = "band 95 % interval" if known else "no interval: too few queries"
    _finish_lag(one, ax, f"layer {one['layer'].item()}", f"mean |alpha|{_scaled(one.attrs)}\n{drawn}")


def _lag_by_layer(result: xr.Dataset, ax: Any) -> None:
    import matplotlib as mpl

    shade = mpl.colormaps["viridis"].resampled(256)
    _lag_axis(result, ax)
    n_layers = result.sizes["layer"]
    for i in range(n_layers):
        for key in ("executed", "null_lti"):
            prefix, _, line, _ = _SERIES[key]
            values = result[f"layer_{prefix}by_lag"].isel(layer=i).values
            _curve(values, ax, ls=line, lw=1.2, color=shade(0.9 * i / (n_layers - 1)))
    for key in ("executed", "null_lti"):
        ax.plot([], [], _SERIES[key][2], color="0.2", label=_SERIES[key][3])
    _layer_bar(result, shade, ax)
    _finish_lag(result, ax, f"{n_layers} layers", f"mean |alpha|{_scaled(result.attrs)}\n(no interval drawn)")


def _curve(values: np.ndarray, ax: Any, **look: Any) -> None:
    """A curve on the logarithmic axis; open marks on its floor stand for what lies below, 0 among it."""
    x, floor = np.arange(len(values)), ax.get_ylim()[0]
    seen = values > floor
    ax.plot(x, np.where(seen, values, np.nan), **look)
    below = ~seen & ~np.isnan(values)
    ax.plot(x[below], np.full(below.sum(), floor), "v", color=look["color"], mfc="white", ms=6, clip_on=False)


def _layer_bar(result: xr.Dataset, shade: Any, ax: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    layers = result["layer"].values
    shown = ListedColormap(shade(np.linspace(0, 0.9, 256)))
    ticks = np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int))
    bar = ax.figure.colorbar(ScalarMappable(Normalize(0, len(layers) - 1), shown), ax=ax, ticks=ticks, label="layer")
    bar.ax.set_yticklabels([str(layer) for layer in layers[ticks]])


def _lag_axis(result: xr.Dataset, ax: Any) -> None:
    """Bins side by side under their lags; sizes down to a millionth of the largest drawn."""
    starts = result["lag"].values
    ends = np.append(starts[1:] - 1, starts[-1] * 2 - 1)
    names = [str(a) if a >= b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    step = max(1, -(-len(starts) // 9))
    ax.set_xticks(np.arange(len(starts))[::step], names[::step])
    curves = np.concatenate([values.values.ravel() for name, values in result.items() if "by_lag" in str(name)])
    positive = curves[curves > 0]
    if positive.size:
        ax.set_yscale("log")
        ax.set_ylim(max(positive.min(), positive.max() * 1e-6) / 2, positive.max() * 1.5)


def _finish_lag(result: xr.Dataset, ax: Any, where: str, label: str) -> None:
    if any(line.get_marker() == "v" and len(line.get_xdata()) for line in ax.get_lines()):
        ax.plot([], [], "v", color="0.3", mfc="white", label="0, or below the axis")
    ax.set_xlabel("lag t - s (tokens, bins of doubling width)")
    ax.set_ylabel(label)
    style.frame(ax)
    heads = f"all {result.attrs['n_heads']} {result.attrs['head_dim']}s"
    style.legend_outside(ax)
    style.title(ax, f"{result.attrs['model']}, {where}, {heads}")


def _rows(one: xr.Dataset, ax: Any, attrs: dict[str, Any]) -> None:
    """Each query on a line of its own, executed over its time-invariant null."""
    queries = one.isel(query_token=slice(0, MOST_ROWS))
    here = one["valid"].values
    position = one["position"].values[here]
    for i in range(queries.sizes["query_token"]):
        at = queries["query_position"].values[i]
        seen = position <= at
        alpha, null = (queries[name].isel(query_token=i).values[here][seen] for name in ("alpha", "null_lti_alpha"))
        peak = np.nanmax(np.abs(alpha), initial=0.0) or 1.0
        ax.axhline(-i, color="0.85", lw=0.8, zorder=0)
        ax.vlines(position[seen], -i, alpha / peak * 0.45 - i, color=style.REAL, lw=_width(position))
        ax.plot(position[seen], np.clip(null / peak, -1, 1) * 0.45 - i, color=style.LTI, lw=1.0, ls="--")
        ax.annotate(f" max {peak:.2g}", (1.0, -i), xycoords=("axes fraction", "data"), va="center", fontsize="x-small")
    ax.plot([], [], color=style.REAL, label="executed")
    ax.plot([], [], color=style.LTI, ls="--", label="time-invariant (null), cut at the row's max")
    names = [str(at) for at in queries["query_position"].values]
    ax.set_yticks(-np.arange(len(names)), names)
    ax.set_xlabel("source token (position)")
    ax.set_ylabel("alpha by query token\n(up: positive, down: negative)")
    style.frame(ax)
    dim = attrs["head_dim"]
    which = f"{dim} {one[dim].item()}" if one[dim].ndim == 0 else attrs["aggregation"]
    cut = one.sizes["query_token"] - len(names)
    more = f", {cut} more queries not drawn" if cut else ""
    title = f"{attrs['model']}, layer {one['layer'].item()}, {which}{_scaled(attrs)}{more}"
    style.legend_outside(ax)
    style.title(ax, title)


def _width(position: np.ndarray) -> float:
    return float(np.clip(250 / max(1, len(position)), 0.5, 3.0))


def _map(result: xr.Dataset, ax: Any, series: str) -> Any:
    """Colours run to the largest executed |alpha|, for the nulls too, and are logarithmic above 1 % of it."""
    from matplotlib.colors import SymLogNorm

    prefix, _, _, label = _SERIES[series]
    alpha, extreme = result[f"{prefix}alpha"].values, np.nanmax(np.abs(result["alpha"].values), initial=0.0) or 1.0
    past = np.where(np.tri(len(alpha), dtype=bool), alpha, np.nan)
    first, end = result["token"].values[[0, -1]] + (-0.5, 0.5)
    ax.set_facecolor("0.9")
    norm = SymLogNorm(extreme * 1e-2, vmin=-extreme, vmax=extreme)
    image = ax.imshow(past, cmap=DIVERGING, norm=norm, extent=(first, end, end, first), interpolation="nearest")
    shown = [-extreme, -extreme / 10, 0.0, extreme / 10, extreme]
    cut = "both" if np.nanmax(np.abs(alpha)) > extreme else "neither"
    bar = ax.figure.colorbar(image, ax=ax, ticks=shown, format="{x:.2g}", extend=cut, shrink=0.8)
    bar.set_label(f"alpha{_scaled(result.attrs)} (logarithmic colours)")
    bar.ax.minorticks_off()
    ax.set_xlabel("source token s (position)")
    ax.set_ylabel("query token t (position)")
    attrs = result.attrs
    where = f"{attrs['model']}, layer {attrs['layer']}, row {attrs['row']}"
    style.title(ax, f"{where}\n{attrs['aggregation']}: {label}")
    return ax
