"""Alignment with single wavelets, and energy compaction, beside the time-invariant null."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["KINDS", "plot"]

KINDS = ("cosine", "compaction")


def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "cosine") -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `cosine`: mean |cosine| with the best single wavelet, by layer, with its interval, beside the null.
    `compaction`: share of the energy in the largest coefficients, a line a layer, executed (solid) and null (dashed).

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: "cosine" or "compaction".

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, or a result of another analysis.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('cosine', 'compaction'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "wavelet_alignment")
    ax = style.axes(ax)
    {"cosine": _cosine, "compaction": _compaction}[kind](result, ax)
    style.legend_outside(ax)
    return ax


def _cosine(result: xr.Dataset, ax: Any) -> None:
    series = (
        ("layer_best_cosine", style.REAL, "o", "executed"),
        ("layer_null_best_cosine", style.LTI, "D", "time-invariant (null)"),
    )
    for shift, (name, colour, marker, label) in zip((-0.12, 0.12), series, strict=True):
        x, value = np.arange(result.sizes["layer"]) + shift, result[name].values
        ax.vlines(x, result[f"{name}_low"].values, result[f"{name}_high"].values, color=colour, lw=6, alpha=0.35)
        ax.plot(x, value, marker, color=colour, ms=5, label=label, clip_on=False)
        for at in x[np.isnan(value)]:
            ax.annotate("no energy", (at, 0.0), rotation=90, ha="center", va="bottom", fontsize="x-small", color=colour)
    ax.set_ylim(0.0, 1.0)
    ax.set_ylabel(f"mean |cosine| with the best {result.attrs['wavelet']} wavelet\n{style.interval_text(result)}")
    style.layer_axis(ax, result.layer.values)


def _compaction(result: xr.Dataset, ax: Any) -> None:
    """One layer: its colours; several: a shade a layer with a colour bar."""
    import matplotlib as mpl

    several = result.sizes["layer"] > 1
    shade = mpl.colormaps["viridis"].resampled(256)
    x = result.coefficient.values
    for i, layer in enumerate(result.layer.values):
        tint = shade(i / (result.sizes["layer"] - 1)) if several else None
        for name, line, colour in (("layer_compaction", "-", style.REAL), ("layer_null_compaction", "--", style.LTI)):
            here = result.sel(layer=layer)
            ax.plot(x, here[name].values, line, color=tint or colour, lw=1.4, marker="" if several else "o", ms=4)
            if not several:
                ax.fill_between(
                    x, here[f"{name}_low"].values, here[f"{name}_high"].values, color=colour, alpha=0.25, lw=0
                )
    nothing = "" if result.layer_null_compaction.notnull().any() else ": no energy"
    for line, colour, label in (("-", style.REAL, "executed"), ("--", style.LTI, f"time-invariant (null){nothing}")):
        ax.plot([], [], line, color="0.2" if several else colour, label=label)
    if several:
        _layer_bar(result, shade, ax)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0.0, 1.02)
    ax.set_xlabel(f"largest {result.attrs['wavelet']} coefficients kept")
    ax.set_ylabel("mean share of a kernel's energy")
    ax.spines[["top", "right"]].set_visible(False)


def _layer_bar(result: xr.Dataset, shade: Any, ax: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = result.layer.values
    norm = Normalize(0, len(layers) - 1)
    ticks = np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int))
    bar = ax.figure.colorbar(ScalarMappable(norm, shade), ax=ax, ticks=ticks, label="layer")
    bar.ax.set_yticklabels([str(layer) for layer in layers[ticks]])
