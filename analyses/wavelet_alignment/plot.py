"""Kernels beside their best wavelets, compaction beside the DFT and the nulls, energy by level, layers side by side."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.analyses.wavelet_alignment.labels import title

__all__ = ["KINDS", "plot"]

KINDS = ("cosine", "compaction", "levels", "kernels")
SERIES = {
    "": ("executed", style.REAL, "-", "o"),
    "null_": ("time-invariant (null)", style.LTI, "--", "D"),
    "null_shuffle_": (r"$\Delta$ shuffled (null)", style.NULL, "-.", "s"),
    "baseline_": ("baseline", "#009E73", ":", "^"),
    "dft_": ("executed, in the DFT", "#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "v"),
}
"""Label, colour, line and mark of each variant, by the prefix of its names."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "cosine", layer: Any = None) -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `cosine`: mean |cosine| with the best single wavelet, by layer, with its interval, beside nulls and baseline.
    `compaction`: share of the energy in the largest coefficients; one layer beside the DFT, nulls and baseline, several
    a line each, executed (solid) and time-invariant (dashed).
    `levels`: share of the energy by level, likewise.
    `kernels`: the kernels kept (`measure(n_kept=...)`) of one layer on their best wavelets.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: one of the above.
        layer: its own number: draw this one only; needed for `kernels` where there are several.

    Returns:
        The Axes; its title names model, layer, kernel and wavelet.

    Raises:
        ValueError: another kind, a result of another analysis, an unknown layer, no kernels kept.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('cosine', 'compaction', 'levels', 'kernels'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "wavelet_alignment")
    result = _of_layer(result, layer)
    ax = style.axes(ax)
    {"cosine": _cosine, "compaction": _compaction, "levels": _levels, "kernels": _kernels}[kind](result, ax)
    _head(result, ax)
    return ax


def _head(result: xr.Dataset, ax: Any) -> None:
    """Title, and beneath it the legend, above the data."""
    style.legend_outside(ax, handlelength=1.8, columnspacing=1.0)
    style.title(ax, title(result.attrs, result.layer.item() if result.sizes["layer"] == 1 else None))
    style.frame(ax)


def _of_layer(result: xr.Dataset, layer: Any) -> xr.Dataset:
    if layer is None:
        return result
    if layer not in result.layer.values:
        raise ValueError(f"layer must be one of {result.layer.values.tolist()}; got {layer!r}")
    return result.sel(layer=[layer])


def _variants(result: xr.Dataset, name: str) -> dict[str, tuple[Any, ...]]:
    """Those of the series that the result has of a layer's number."""
    return {prefix: look for prefix, look in SERIES.items() if f"layer_{prefix}{name}" in result}


def _interval(result: xr.Dataset) -> str:
    rule = result.attrs["interval"]
    return rule if rule.startswith("NaN") else f"box 95 % over {'token blocks' if 'blocks' in rule else 'rows'}"


def _cosine(result: xr.Dataset, ax: Any) -> None:
    series = _variants(result, "best_cosine")
    for i, (prefix, (label, colour, _, marker)) in enumerate(series.items()):
        name = f"layer_{prefix}best_cosine"
        x, value = np.arange(result.sizes["layer"]) + 0.18 * (i - (len(series) - 1) / 2), result[name].values
        ax.vlines(x, result[f"{name}_low"].values, result[f"{name}_high"].values, color=colour, lw=3, alpha=0.35)
        ax.plot(x, value, marker, color=colour, ms=4, label=label, clip_on=False)
        for at in x[np.isnan(value)]:
            ax.annotate("no energy", (at, 0.0), rotation=90, ha="center", va="bottom", fontsize="x-small", color=colour)
    ax.axhline(result.spike_best_cosine.item(), color="0.6", lw=0.8, ls=":", label="single token")
    ax.set_ylim(0.0, 1.0)
    what = "one row: no interval" if result.attrs["interval"].startswith("NaN") else _interval(result)
    ax.set_ylabel(f"mean |cosine| with the best wavelet\n{what}")
    style.layer_axis(ax, result.layer.values)


def _compaction(result: xr.Dataset, ax: Any) -> None:
    _curves(result, "compaction", result.coefficient.values, ax)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_ylim(0.0, 1.02)
    ax.set_xlabel(f"largest {result.attrs['wavelet']} coefficients kept")
    ax.set_ylabel("mean share of energy")


def _levels(result: xr.Dataset, ax: Any) -> None:
    """Coarse to fine; the scaling functions stand apart, joined by no line."""
    depth = result.sizes["level"] - 1
    ordered = result.isel(level=[0, 0, *range(depth, 0, -1)])
    _curves(ordered, "energy_by_level", np.array([-0.7, np.nan, *range(1, depth + 1)]), ax)
    names = ["scaling", *(f"{2**j}" for j in range(depth, 0, -1))]
    ax.set_xticks([-0.7, *range(1, depth + 1)], names, rotation=60 if depth > 7 else 0)
    ax.set_ylim(0.0, None)
    ax.set_xlabel(f"length of the {result.attrs['wavelet']} wavelets, tokens")
    ax.set_ylabel("mean share of energy")


def _curves(result: xr.Dataset, name: str, x: np.ndarray, ax: Any) -> None:
    if result.sizes["layer"] > 1:
        _by_layer(result, name, x, ax)
        return
    here = result.isel(layer=0)
    for prefix, (label, colour, line, marker) in _variants(result, name).items():
        values, ends = here[f"layer_{prefix}{name}"], (here[f"layer_{prefix}{name}_{end}"] for end in ("low", "high"))
        nothing = ": no energy" if values.isnull().all() else ""
        over = 3 if prefix == "" else 2
        ax.plot(
            x, values.values, ls=line, marker=marker, ms=3, color=colour, lw=1.4, label=f"{label}{nothing}", zorder=over
        )
        ax.fill_between(x, *(end.values for end in ends), color=colour, alpha=0.2, lw=0)


def _by_layer(result: xr.Dataset, name: str, x: np.ndarray, ax: Any) -> None:
    """A shade a layer with a colour bar, executed and time-invariant."""
    import matplotlib as mpl

    shade = mpl.colormaps["viridis"].resampled(256)
    shown = {prefix: look for prefix, look in _variants(result, name).items() if prefix in ("", "null_")}
    for prefix, (label, _, line, _) in shown.items():
        for i, values in enumerate(result[f"layer_{prefix}{name}"].values):
            tint = shade(i / (result.sizes["layer"] - 1))
            ax.plot(x, values, ls=line, marker="x" if prefix else ".", ms=3, color=tint, lw=1.2)
        ax.plot([], [], ls=line, color="0.2", label=label)
    _layer_bar(result, shade, ax)


def _layer_bar(result: xr.Dataset, shade: Any, ax: Any) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    layers = result.layer.values
    norm = Normalize(0, len(layers) - 1)
    ticks = np.unique(np.linspace(0, len(layers) - 1, min(6, len(layers))).round().astype(int))
    bar = ax.figure.colorbar(ScalarMappable(norm, shade), ax=ax, ticks=ticks, label="layer")
    bar.ax.set_yticklabels([str(layer) for layer in layers[ticks]])


def _kernels(result: xr.Dataset, ax: Any) -> None:
    """One below the other, each on its projection on its best wavelet."""
    if "kept_kernel" not in result:
        raise ValueError("no kernel was kept: pass n_kept= to wavelet_alignment.measure")
    if result.sizes["layer"] > 1:
        raise ValueError(f"kernels are drawn of one layer: pass layer=, one of {result.layer.values.tolist()}")
    here, token = result.isel(layer=0), result.kept_token.values
    size = 0.42 / np.nanmax(np.abs(here.kept_kernel.values), axis=1)
    for i, one in enumerate(size):
        kernel, wavelet = (here[name].values[i] * one - i for name in ("kept_kernel", "kept_wavelet"))
        ax.plot(token, wavelet, color=style.LTI, lw=3, alpha=0.45, label="its best wavelet" if i == 0 else None)
        ax.plot(token, kernel, color=style.REAL, lw=1.0, label="kernel" if i == 0 else None)
        _beside(f"{'|cos| ' if i == 0 else ''}{here.kept_cosine.values[i]:.3f}", -i, ax)
    ax.set_yticks(-np.arange(len(size)), [str(name) for name in here.kept_name.values])
    shown = _tail(here.kept_kernel.values)
    ax.set_xlim(token[-shown] - 0.5, token[-1] + 0.5)
    ax.set_xlabel("token s" if shown == len(token) else f"token s, the last {shown} of {len(token)}")
    ax.set_ylabel(f"kernel of token {here.query_position.values.ravel()[0]}")


def _beside(text: str, y: int, ax: Any) -> None:
    ax.annotate(text, (1.0, y), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                fontsize="x-small", annotation_clip=False)  # fmt: skip


def _tail(kernel: np.ndarray) -> int:
    """Tokens to show: the last 2^k that hold 99.9 % of each kernel's energy."""
    held = np.cumsum(np.nan_to_num(kernel[:, ::-1]) ** 2, axis=1)
    short = (held < 0.999 * held[:, -1:]).sum(axis=1).max() + 1
    return min(kernel.shape[1], max(16, 1 << int(short - 1).bit_length()))
