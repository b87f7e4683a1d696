"""What each unit costs when it is taken out, beside as many random channels; and against the entropy of its reads."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style

__all__ = ["KINDS", "plot"]

KINDS = ("effect", "entropy")
MOST_NAMES = 24
"""Units that are named on the axis, one by one."""


@style.names_as_they_are
def plot(result: xr.Dataset, ax: Any = None, *, kind: str = "effect") -> Any:
    """Draw a result of `measure`; nothing is computed here.

    `effect`: change of the accuracy (a task) or of the loss with each unit taken out, with its interval, beside that
    of as many random channels. `entropy`: the same against the entropy of what the unit reads.

    Args:
        result: Dataset from `measure`.
        ax: matplotlib Axes; new ones by default.
        kind: "effect" or "entropy".

    Returns:
        The Axes.

    Raises:
        ValueError: another kind, or a result of something else.

    >>> plot(xr.Dataset(), kind="pie")
    Traceback (most recent call last):
    ValueError: kind must be one of ('effect', 'entropy'); got 'pie'
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}; got {kind!r}")
    style.check(result, "ablation")
    ax = style.axes(ax)
    if "solved" in result and not bool(result["solved"]):
        ax.set_axis_off()
        text = f"{result.attrs['model']}:\n{result.attrs['verdict']}"
        ax.text(0.5, 0.5, text, ha="center", va="center", color="0.35", transform=ax.transAxes, wrap=True)
        return ax
    style.frame(ax)
    (_effects if kind == "effect" else _entropies)(result, ax)
    return ax


def _change(result: xr.Dataset) -> str:
    return "change of the accuracy" if result.attrs["scored"] == "accuracy" else "change of the loss, nats"


def _effects(result: xr.Dataset, ax: Any) -> None:
    name, x = result.attrs["scored"], np.arange(result.sizes["unit"])
    ax.axhline(0.0, color="0.3", lw=0.8, zorder=0)
    value, low, high = (result[f"effect_{name}{end}"].values for end in ("", "_low", "_high"))
    least, most = (result[f"random_{name}_{end}"].values for end in ("min", "max"))
    ax.vlines(x, least, most, color=style.NULL, lw=5, alpha=0.35, label="their range over the sets drawn")
    ax.plot(x, result[f"random_{name}"].values, "_", color=style.NULL, ms=9, mew=2.5, label="as many random channels")
    ax.vlines(x, low, high, color=style.REAL, lw=1.5)
    needed = result[f"effect_{name}_p"].values <= 0.05
    ax.plot(x[needed], value[needed], "o", color=style.REAL, ms=4.5, label="taken out; p at most 0.05 over all units")
    ax.plot(x[~needed], value[~needed], "o", mfc="white", mec=style.REAL, ms=4.5, label="taken out")
    _unit_axis(result, ax)
    style.legend_outside(ax)
    drawn = "bars 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
    ax.set_ylabel(f"{_change(result)}\n{drawn}")
    solved = f" (accuracy {result['accuracy'].item():.2f})" if "accuracy" in result else ""
    style.title(ax, f"{result.attrs['model']}: what each part is worth{solved}")


def _unit_axis(result: xr.Dataset, ax: Any) -> None:
    """Units by name; of many, the layers by theirs, which stand before their parts."""
    names, kinds = result["unit"].values.tolist(), result["kind"].values
    if len(names) <= MOST_NAMES:
        if len(set(result["layer"].values.tolist())) == 1:
            names = [names[0], *(name.removeprefix(f"{names[0]} ") for name in names[1:])]
        ax.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=style.dense("x"))
    else:
        at = np.flatnonzero(kinds == "layer")
        ax.set_xticks(at, [names[i] for i in at], rotation=90 if len(at) > 6 else 0, fontsize=style.dense("x"))
        part = next((kind for kind in kinds if kind != "layer"), "")
        if part:
            ax.set_xlabel(f"each layer as a whole, then its {part}s in order")
    ax.set_xlim(-0.8, len(names) - 0.2)


def _entropies(result: xr.Dataset, ax: Any) -> None:
    import matplotlib as mpl

    name, part = result.attrs["scored"], result.isel(unit=np.flatnonzero(result["kind"].values != "layer"))
    layers = sorted(set(part["layer"].values.tolist()))
    shade = mpl.colormaps["viridis"].resampled(256)
    for i, layer in enumerate(layers):
        one = part.isel(unit=np.flatnonzero(part["layer"].values == layer))
        colour = style.REAL if len(layers) == 1 else shade(0.9 * i / (len(layers) - 1))
        ax.plot(one["entropy"].values, one[f"effect_{name}"].values, "o", color=colour, ms=5, label=f"layer {layer}")
    ax.axhline(0.0, color="0.3", lw=0.8, zorder=0)
    ax.set_xlabel("entropy of what the unit reads, nats")
    ax.set_ylabel(_change(result))
    rho, low, high = (result[f"correlation{end}"].item() for end in ("", "_null_low", "_null_high"))
    said = f"Spearman of harm and entropy {rho:.2f} (paired at random: {low:.2f} to {high:.2f})"
    said = said if np.isfinite(rho) else "too few units, or no spread, for a correlation"
    style.title(ax, f"{result.attrs['model']}\n{said}")
    if len(layers) > 1:
        ax.legend()
