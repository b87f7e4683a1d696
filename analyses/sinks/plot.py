"""Ratios of step sizes by class, head by head, beside their null; and what the ablation took."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["KINDS", "plot"]

KINDS = ("ratio", "effect")
SPREAD = 0.32
"""Half the width in which a class's heads are spread."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "ratio", layer: int | None = None) -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `ratio`: one dot a head (channel), specialists filled, by class; the bar is the mean over heads of each layer with
    its interval, the grey box the null's range.
    `effect`: change of the loss when the class's steps are set to the mean of the rest, beside random tokens.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: "ratio" or "effect".
        layer: by its number, for "ratio"; None is all.

    Returns:
        The Axes.

    Raises:
        ValueError: another kind or layer, a result of something else, or no ablation to draw.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('ratio', 'effect'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "sinks")
    if kind == "effect":
        if "effect_loss" not in result:
            raise ValueError("no ablation was measured: pass ablated=ablate_class(probe, ...) to sinks.measure")
        return _effects(result, style.axes(ax))
    known = result["layer"].values.tolist()
    if layer is not None and layer not in known:
        raise ValueError(f"layer {layer} is not in the result, which holds {known}")
    return _ratios(result if layer is None else result.sel(layer=[layer]), style.axes(ax))


def _class_axis(result: xr.Dataset, ax: Any) -> None:
    names = result["class"].values.tolist()
    ax.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    ax.set_xlim(-0.6, len(names) - 0.4)
    style.frame(ax)


def _ratios(result: xr.Dataset, ax: Any) -> Any:
    _class_axis(result, ax)
    n_layers, dim = result.sizes["layer"], result.attrs["head_dim"]
    width = 2 * SPREAD / n_layers
    for i in range(result.sizes["class"]):
        for j in range(n_layers):
            _one(result.isel({"class": i, "layer": j}), i - SPREAD + (j + 0.5) * width, width, ax)
    ax.axhline(1.0, color="0.3", lw=0.8, zorder=0)
    style.log_axis(ax)
    for marker, look, text in (
        ("o", {"mfc": "none", "mec": style.REAL}, f"a {dim}"), ("o", {"color": style.LTI}, "a specialist"),
        ("_", {"color": "black", "ms": 12, "mew": 2}, "geometric mean of a layer"),
        ("s", {"color": style.NULL}, "its null"),
    ):  # fmt: skip
        ax.plot([], [], marker, label=text, **look)
    style.legend_outside(ax)
    where = f"layer {result['layer'].item()}" if n_layers == 1 else f"{n_layers} layers, side by side"
    ax.set_ylabel(r"mean $\Delta$ at the class / rest" + f"\n{where}")
    style.title(ax, f"{result.attrs['model']}: step sizes by class of tokens")
    return ax


def _one(one: xr.Dataset, x: float, width: float, ax: Any) -> None:
    ratio, chosen = one["ratio"].values, one["specialist"].values
    at = x + width * (np.linspace(0.1, 0.9, len(ratio)) - 0.5)
    seen = ratio > 0
    ax.plot(at[seen & ~chosen], ratio[seen & ~chosen], "o", mfc="none", mec=style.REAL, ms=3, mew=0.6, alpha=0.7)
    ax.plot(at[seen & chosen], ratio[seen & chosen], "o", color=style.LTI, ms=3.5)
    low, high = one["layer_null_low"].item(), one["layer_null_high"].item()
    ax.fill_between([x - width / 2, x + width / 2], low, high, color=style.NULL, alpha=0.6, lw=0, zorder=0)
    mean = one["layer_ratio"].item()
    ax.plot([x - width / 2, x + width / 2], [mean, mean], color="black", lw=2)
    ends = one["layer_ratio_low"].item(), one["layer_ratio_high"].item()
    ax.plot([x, x], ends, color="black", lw=1)


def _effects(result: xr.Dataset, ax: Any) -> Any:
    _class_axis(result, ax)
    ax.axhline(0.0, color="0.3", lw=0.8, zorder=0)
    x = np.arange(result.sizes["class"])
    for name, colour, shift, text in (
        ("effect", style.REAL, -0.12, "the class"), ("random", style.NULL, 0.12, "random tokens"),
    ):  # fmt: skip
        value, low, high = (result[f"{name}_loss{end}"].values for end in ("", "_low", "_high"))
        ax.vlines(x + shift, low, high, color=colour, lw=2)
        ax.plot(x + shift, value, "o", color=colour, label=f"steps of {text} levelled")
    style.legend_outside(ax)
    drawn = "bars 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
    ax.set_ylabel(f"change of the loss, nats\n{drawn}")
    style.title(ax, f"{result.attrs['model']}: what the steps do (loss {result['intact_loss'].item():.2g} nats)")
    return ax
