"""Colours and marks of every figure: one meaning each (colour-blind safe, Okabe and Ito)."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import xarray as xr

from mamba_probe.visible import literal

__all__ = [
    "LTI",
    "NULL",
    "REAL",
    "axes",
    "check",
    "interval_text",
    "layer_axis",
    "legend_outside",
    "log_axis",
    "names_as_they_are",
]

P = ParamSpec("P")
R = TypeVar("R")

REAL = "#0072B2"
"""The model as it ran."""
NULL = "#999999"
"""Its shuffled or frozen null."""
LTI = "#D55E00"
"""Its time-invariant equivalent."""


def names_as_they_are(plot: Callable[P, R]) -> Callable[P, R]:
    """A plot(result, ...) whose names, labels and texts are drawn as they stand, whoever chose them.

    A dollar begins no mathematics, and what is hidden or reorders a line is shown (`mamba_probe.visible`). Texts that a
    plot writes itself are left alone.
    """

    @wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = args
        if given and isinstance(given[0], xr.Dataset):
            given = (_literal(given[0]), *given[1:])
        return plot(*given, **kwargs)

    return drawn


def _literal(result: xr.Dataset) -> xr.Dataset:
    made = result.copy()
    made.attrs = literal(result.attrs)
    for name, variable in result.variables.items():
        attrs = literal(variable.attrs)
        if variable.dtype.kind in "OUT":
            values = np.empty(variable.shape, dtype=object)
            values.ravel()[:] = [literal(each) for each in variable.values.flat]
            add = made.assign_coords if name in made.coords else made.assign
            made = add({name: (variable.dims, values, attrs)})
        made[name].attrs = attrs
    return made


def check(result: Any, analysis: str) -> None:
    """Check that a plot was given a result of its own analysis.

    Raises:
        ValueError: what came instead, and the call to make.
    """
    came = getattr(result, "attrs", {}).get("analysis")
    if came != analysis:
        what = f"a result of {came}" if came else type(result).__name__
        raise ValueError(f"{analysis}.plot draws what {analysis}.measure(trace) returned; got {what}")


def axes(ax: Any) -> Any:
    """`ax`, or new axes of the house size."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(7.0, 4.0), layout="constrained")[1]


def legend_outside(ax: Any) -> None:
    """Legend above the data, where it hides none."""
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize="small", borderaxespad=0.2)


def layer_axis(ax: Any, layers: Any) -> None:
    """Layers side by side at 0, 1, .. under their own numbers, with room at both ends."""
    step = max(1, -(-len(layers) // 16))
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_xlim(-0.8, len(layers) - 0.2)
    ax.set_xlabel("layer")
    ax.spines[["top", "right"]].set_visible(False)


def log_axis(ax: Any) -> None:
    """Logarithmic y axis with plain numbers; numbers between powers of ten only where it spans less than one."""

    def between(value: float, _: int) -> str:
        low, high = ax.get_ylim()
        return f"{value:g}" if high < 10 * low else ""

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(between)


def interval_text(result: Any) -> str:
    """What the boxes of a figure are, or why there are none."""
    return "box 95 % interval over rows" if int(result.attrs["n_rows"]) > 1 else "one row: no interval"
