"""A picture of a reduction: step size and horizon by layer, one colour a class, with intervals and nulls."""

from typing import Any

import numpy as np
import xarray as xr

from mamba_probe.analyses.common import style
from mamba_probe.reducing.reduction import ALL

__all__ = ["draw"]

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
PANELS = {
    "layer_delta_mean": ("mean step size $\\Delta$", "over channels"),
    "layer_forward_horizon": ("median horizon (tokens)", "over tokens, channels, states"),
}
NULLS = {"layer_forward_horizon": "layer_null_lti_horizon"}


def draw(result: xr.Dataset, figure: Any = None) -> Any:
    """Draw a result of `probe.reduce` that holds mean("delta") or horizon(); nothing is computed here.

    Args:
        result: what `probe.reduce` returned.
        figure: matplotlib Figure; a new one by default.

    Returns:
        The figure.

    Raises:
        ValueError: something else, or a result that holds neither.
    """
    style.check(result, "reduction")
    shown = [name for name in PANELS if name in result]
    if not shown:
        raise ValueError(
            f'nothing to draw: reduce mean("delta") or horizon(); the result holds {sorted(map(str, result.data_vars))}'
        )
    with style.where_nothing_is_chosen():
        return _drawn(result, shown, figure)


def _drawn(result: xr.Dataset, shown: list[str], figure: Any) -> Any:
    if figure is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=style.size(6.4 * len(shown), 4.4), layout="constrained")
    for ax, name in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        _panel(result, name, ax)
    said = "bars 95 % interval" if int(result.attrs["n_batch"]) > 1 else "one row: no interval"
    figure.suptitle(
        f"{result.attrs['model']}: {int(result['n_tokens'].sel({'class': ALL})):,} tokens in"
        f" {int(result.attrs['n_batch']):,} rows; {said}",
        x=0.01, ha="left", fontsize="medium",
    )  # fmt: skip
    return figure


def _panel(result: xr.Dataset, name: str, ax: Any) -> None:
    names = result["class"].values.tolist()
    width = 0.7 / len(names)
    for i, of in enumerate(names):
        x = np.arange(result.sizes["layer"]) + width * (i - (len(names) - 1) / 2)
        colour = "black" if of == ALL else COLOURS[(i - 1) % len(COLOURS)]
        value, low, high = (_at(result, f"{name}{end}", of) for end in ("", "_low", "_high"))
        n_tokens = int(result["n_tokens"].sel({"class": of}))
        ax.vlines(x, low, np.where(np.isfinite(high), high, value), color=colour, lw=1.5)
        ax.plot(x, value, "o", color=colour, ms=4.5, label=f"{of} ({n_tokens:,})")
        if f"{name}_at_least" in result:
            least = np.where(np.isinf(value), _at(result, f"{name}_at_least", of), np.nan)
            ax.plot(x, least, "^", color=colour, mfc="white", ms=5)
        for null, marker in ((NULLS.get(name, ""), "_"), (f"baseline_{name}", "x")):
            if null in result:
                ax.plot(x, _at(result, null, of), marker, color=colour, ms=8, mew=1.2, alpha=0.7)
    for null, marker, text in (
        (NULLS.get(name, ""), "_", r"$\Delta$ at its row's mean (null)"), (f"baseline_{name}", "x", "baseline model"),
    ):  # fmt: skip
        if null in result:
            ax.plot([], [], marker, color="0.3", ms=8, label=text)
    if name == "layer_forward_horizon":
        ax.plot([], [], "^", color="0.3", mfc="white", label="not reached: at least this")
    style.layer_axis(ax, result["layer"].values.tolist())
    style.log_axis(ax)
    title, over = PANELS[name]
    ax.set_ylabel(f"{title}\n{over}")
    style.legend_outside(ax)


def _at(result: xr.Dataset, name: str, of: str) -> np.ndarray:
    values = result[name].sel({"class": of})
    return (values.sel(quantile=0.5) if "quantile" in values.dims else values).values
